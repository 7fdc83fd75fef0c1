"""Families whose calls have each argument between tags of its own, a text without quotes.

Qwen3-Coder, Qwen 3.5, Nemotron 3, Step 3.5:

    <tool_call>
    <function=get_weather>
    <parameter=city>
    Paris
    </parameter>
    <parameter=n_days>
    3
    </parameter>
    </function>
    </tool_call>

Seed-OSS:

    <seed:tool_call>
    <function=get_weather>
    <parameter=city>Paris</parameter>
    </function>
    </seed:tool_call>

MiniMax M2, whose calls stand together between one pair of tags:

    <minimax:tool_call>
    <invoke name="get_weather">
    <parameter name="city">Paris</parameter>
    </invoke>
    </minimax:tool_call>

GLM 4.5 and later, with or without the line breaks:

    <tool_call>get_weather
    <arg_key>city</arg_key>
    <arg_value>Paris</arg_value>
    </tool_call>
"""

import json
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from chat.events import Splitter
from chat.splitter import JsonSpan, n_held
from chat.tools.base import Function, Messages, Parts, Tool, ToolFormat, literal
from chat.tools.calls import HeadedCalls, begun, inner_json
from chat.tools.hermes import CLOSE, OPEN
from chat.tools.parameters import ANY, Parameter, Parameters
from engine.grammar_text import pattern
from engine.wire import GrammarPart
from errors import UnsupportedParameter

BARE = "<function="  # without the opener
MAX_FREE = 4  # required arguments of a function whose order is free: each doubles its rules


class Tagged(ToolFormat):
    opener = OPEN
    closer: ClassVar[str] = CLOSE
    is_section: ClassVar[bool] = False  # several calls stand between these, else each has its own
    key: ClassVar[str]  # what an argument begins with
    value_end: ClassVar[str]
    end: ClassVar[str]  # of all arguments

    @abstractmethod
    def call(self, functions: Sequence[Function]) -> str:
        """Lark of a call of one of these, from behind its opener."""

    @abstractmethod
    def argument(self, name: str, value: str) -> str:
        """Lark of an argument. Both are Lark, and the value has its end in it."""

    @abstractmethod
    def head(self) -> tuple[str, str]:
        """Regular expressions of what a call begins with, its name as the only group, and of what
        may become that."""

    @abstractmethod
    def key_pattern(self) -> str:
        """Regular expression of what comes before a value, its name as the first group."""

    def value_end_of(self, key: re.Match[str]) -> str:
        """What ends the value that comes behind this."""
        return self.value_end

    def text(self, length: str = "") -> str:
        """Lark of a text and its end. `length` may be a range."""
        return f"«inside {length and f'{{{length}}} '}until {self.value_end}»"

    def function(self, tool: Tool, number: int, parts: Parts) -> Function:
        found = Parameters(tool.arguments, self.value_end)
        if found.is_exact and found.unknown:
            raise UnsupportedParameter(
                f"'{found.unknown[0]}' of all arguments cannot be enforced in calls of this "
                f"model ({self.name}); leave `strict` out.",
                param=tool.arguments.param,
            )
        rules: list[str] = []
        arguments = [
            self.argument(literal(one.name), self._value(one, tool.arguments, parts))
            for one in found.listed
        ]
        required = [one.is_required for one in found.listed]
        if found.is_exact or sum(required) > MAX_FREE:
            arguments = [
                one if is_needed else f"({one})?"
                for one, is_needed in zip(arguments, required, strict=True)
            ]
        else:
            arguments = [_in_any_order(arguments, required, f"a{number}_", rules)]
        if found.others:
            names = "|".join(pattern(parameter.name) for parameter in found.listed)
            rules.append(f'NAME_{number}: /[^\\n<>="]+/' + (f" & ~/({names})/" if names else ""))
            value = self._value(found.others, tool.arguments, parts)
            arguments.append(f"({self.argument(f'NAME_{number}', value)})*")
        return Function(tool.name, " ".join(arguments), rules, found)

    def _value(self, parameter: Parameter, whole: GrammarPart, parts: Parts) -> str:
        if parameter.form == "json":
            text = json.dumps(parameter.schema, ensure_ascii=False)
            part = GrammarPart("json_schema", text, whole.param, whole.is_lenient)
            return f"{parts.rule(part)} «{self.value_end}»"
        if parameter.choices:
            return f"({' | '.join(map(literal, parameter.choices))}) «{self.value_end}»"
        return self.text(parameter.length) if parameter.length else "value"

    def calls(self, functions: Sequence[Function], *, is_parallel: bool) -> str:
        more = "call*" if self.is_section else f'("\\n"? «{self.opener}» call)*'
        close = f'"\\n" «{self.closer}»' if self.is_section else ""
        rules = [
            f'calls: call more {close} "\\n"?',  # some end the last one with it too
            f"more: {more if is_parallel else ''}",
            f"call: {self.call(functions)}",
            f"value: {self.text()}",
        ]
        return "\n".join([*rules, *(rule for function in functions for rule in function.rules)])

    def call_splitter(self, functions: Sequence[Function], *, only_first: bool) -> Splitter:
        return TaggedSplitter(self, functions, only_first=only_first)

    def history(self, messages: Messages, tools: Sequence[Any]) -> Messages:
        """Their templates print each argument by itself, and some those that are no texts as Python
        does: past calls have these as JSON, and an object where something else was sent."""
        turns: list[Mapping[str, Any]] = []
        for turn in messages:
            if calls := turn.get("tool_calls"):
                turn = {**turn, "tool_calls": [_with_texts(call) for call in calls]}
            turns.append(turn)
        return turns


def _in_any_order(
    arguments: Sequence[str], required: Sequence[bool], prefix: str, rules: list[str]
) -> str:
    """Lark of all required arguments and any others, in the order that the model likes. Models do
    not keep to that of the schema, in which an argument that is passed over cannot come any more.
    Each comes once; of many those that are not required may come again, and the last one counts.
    """
    names = [f"{prefix}{n}" for n in range(len(arguments))]
    rules += [f"{name}: {argument}" for name, argument in zip(names, arguments, strict=True)]
    is_needed = dict(zip(names, required, strict=True))
    once = [name for name in names if is_needed[name] or len(names) <= MAX_FREE]
    others = [name for name in names if name not in once]
    free = f"{prefix}free" if others else ""
    if others:
        rules.append(f"{free}: ({' | '.join(others)}){{0,{len(others)}}}")
    for left in range(1 << len(once)):  # of those that may come once, as bits
        which = [n for n in range(len(once)) if left >> n & 1]
        nexts = " | ".join(f"{once[n]} {prefix}{left ^ 1 << n}left" for n in which)
        may_end = not any(is_needed[once[n]] for n in which)
        rest = f"({nexts}){'?' if may_end else ''}" if which else ""
        rules.append(f"{prefix}{left}left: {free} {rest}")
    return f"{prefix}{(1 << len(once)) - 1}left"


def _with_texts(call: Mapping[str, Any]) -> dict[str, Any]:
    texts = {name: written(value) for name, value in arguments_of(call["function"]).items()}
    return {**call, "function": {**call["function"], "arguments": texts}}


def arguments_of(function: Mapping[str, Any]) -> Mapping[str, Any]:
    """Those of a past call, as an object where something else was sent."""
    arguments = function.get("arguments", {})
    return arguments if isinstance(arguments, Mapping) else {"arguments": arguments}


def written(value: Any) -> str:
    """An argument as models write it: a text without quotes, all else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def marked(text: str, marks: Sequence[str]) -> str:
    """Lark of a text in which there may be marks."""
    parts = re.split(f"({'|'.join(map(re.escape, marks))})", text)
    return " ".join(f"«{part}»" if part in marks else literal(part) for part in parts if part)


class TaggedSplitter(HeadedCalls):
    """Texts go out as they come, and so does JSON."""

    def __init__(self, family: Tagged, functions: Sequence[Function], *, only_first: bool) -> None:
        super().__init__(family.opener, only_first=only_first)
        self._end, self._close = family.end, family.closer
        self._is_section = family.is_section
        self._key = re.compile(family.key_pattern(), re.DOTALL)
        self._nexts = (family.key, family.end)  # where no value is
        self._parameters = {function.name: function.parameters for function in functions}
        self._family = family

    def _begin(self) -> None:
        super()._begin()
        self._head, self._half_head = map(re.compile, self._family.head())
        self._parameter: Parameter | None = None  # whose value comes
        self._is_text = False  # and it is one
        self._json = JsonSpan()  # of it
        self._value_end = ""  # behind it
        self._n_arguments = 0

    def _next(self, name: str) -> str | None:
        if self._parameter:
            return self._value(self._parameter)
        self._raw = self._raw.lstrip()
        if key := self._key.match(self._raw):
            self._raw = self._raw[key.end() :]
            self._parameter = self._of(name, key[1])
            self._is_text = self._parameter.form == "text"
            self._json = JsonSpan()
            self._value_end = self._family.value_end_of(key)
            self._n_arguments += 1
            separator = ", " if self._n_arguments > 1 else ""
            quote = '"' if self._is_text else ""
            return f"{separator}{json.dumps(key[1], ensure_ascii=False)}: {quote}"
        ends = self._raw.startswith(self._end)
        if not ends and any(
            self._raw.startswith(mark) or mark.startswith(self._raw) for mark in self._nexts
        ):
            return None
        self._is_whole = True
        return "}"

    def _of(self, name: str, key: str) -> Parameter:
        known = self._parameters.get(name)
        return known.of(key) if known else ANY

    def _value(self, parameter: Parameter) -> str | None:
        """JSON of an argument, or of what came of it."""
        if parameter.form == "json" and not self._json.has_ended:
            n_sure = self._json.feed(self._raw)
            said = self._raw[:n_sure]
            self._raw = self._raw[len(said) :]
            return said if said or self._json.has_ended else None
        if parameter.is_text_or_null and not self._is_text and not self._may_be_null():
            self._is_text = True
            return '"'
        said, mark, after = self._raw.partition(self._value_end)
        if mark:
            self._raw = after
            self._parameter = None
            if parameter.form == "json":
                return ""
            return f'{inner_json(said)}"' if self._is_text else parameter.value(said)
        if not self._is_text:
            return None
        n_sure = len(said) - n_held(said, self._value_end)
        self._raw = said[n_sure:]
        return inner_json(said[:n_sure]) or None

    def _may_be_null(self) -> bool:
        null = f"null{self._value_end}"
        return null.startswith(self._raw[: len(null)])


class NamedTags(Tagged):
    """Those with the names of functions and arguments in the tags."""

    begin: ClassVar[str] = "<function="  # before the name of a function
    key = "<parameter="
    name_end: ClassVar[str] = ">"  # behind a name
    value_begin: ClassVar[str] = ""  # behind that
    value_end = "</parameter>"
    end = "</function>"
    line: ClassVar[str] = "\n"  # behind what opens, an argument and what closes

    def head(self) -> tuple[str, str]:
        begin = re.escape(self.begin)
        return (
            rf"\s*{begin}(\S+?){re.escape(self.name_end)}",
            rf"\s*({begun(self.begin)}|{begin}\S*)",
        )

    def key_pattern(self) -> str:
        return f"{re.escape(self.key)}(.*?){re.escape(self.name_end + self.value_begin)}"

    def call(self, functions: Sequence[Function]) -> str:
        close = "" if self.is_section else self._lark(f"{self.line}{self.closer}")
        names = " | ".join(map(self.function_named, functions))
        return f"{self._lark(self.line)} {self._lark(self.begin)} ({names}) {close}"

    def function_named(self, function: Function) -> str:
        """Lark of a function from its name on, to the end of its arguments."""
        opening = f"{literal(function.name)} {self._lark(f'{self.name_end}{self.line}')}"
        return f"({opening} {function.arguments} {self._lark(self.end)})"

    def argument(self, name: str, value: str) -> str:
        opening = (
            f"{self._lark(self.key)} {name} {self._lark(f'{self.name_end}{self.value_begin}')}"
        )
        return f"{opening} {value} {self._lark(self.line)}"

    def _lark(self, text: str) -> str:
        return marked(text, self.visible)


class Qwen3Coder(NamedTags):
    """Its models leave the opener out at times, and begin a line with the function."""

    name = "qwen3-coder"
    line_openers = (BARE,)
    visible = (OPEN, CLOSE)
    value_begin = "\n"
    value_end = "\n</parameter>"

    def fits(self, template: str) -> bool:
        return OPEN in template and self.key in template

    def body(
        self, functions: Sequence[Function], *, answer: str | None, is_required: bool, unlike: str
    ) -> str:
        body = super().body(functions, answer=answer, is_required=is_required, unlike=unlike)
        is_free = functions and not (answer or is_required or unlike)
        return f"{body} | bare" if is_free else body

    def calls(self, functions: Sequence[Function], *, is_parallel: bool) -> str:
        begin = r"((.|\n)*\n)?[ \t]*"
        return "\n".join(
            [
                super().calls(functions, is_parallel=is_parallel),
                f"named: {' | '.join(map(self.function_named, functions))}",
                f'bare: line named ("\\n" «{CLOSE}»)? more "\\n"?',
                "line[lazy]: LINE",
                f"LINE: /{begin}{pattern(self.begin)}/ & ~/(.|\\n)*{pattern(OPEN)}(.|\\n)*/",
            ]
        )

    def call(self, functions: Sequence[Function]) -> str:
        return f'"\\n" {literal(self.begin)} named "\\n" «{CLOSE}»'

    def call_splitter(self, functions: Sequence[Function], *, only_first: bool) -> Splitter:
        return Qwen3CoderSplitter(self, functions, only_first=only_first)


class Qwen3CoderSplitter(TaggedSplitter):
    _BARE_HEADS = re.compile(r"(\S+?)>"), re.compile(r"\S*")
    _BARE = re.compile(rf"(?:^|\n)[ \t]*({BARE})")
    _BARE_LATER = re.compile(rf"\n[ \t]*({BARE})")

    def _opening(self, text: str) -> tuple[str, str, str]:
        is_begun = self._has_text and not self._had_call
        bare = (self._BARE_LATER if is_begun else self._BARE).search(text)
        before, opener, after = super()._opening(text)
        if bare and bare.start(1) < len(before) and not self._only_first:
            return text[: bare.start(1)], BARE, text[bare.end() :]
        return before, opener, after

    def _n_held(self, text: str) -> int:
        return max(super()._n_held(text), n_held(text, BARE))

    def _begin(self) -> None:
        super()._begin()
        if self._opened == BARE:
            self._head, self._half_head = self._BARE_HEADS


class SeedOss(NamedTags):
    name = "seed-oss"
    opener, closer = "<seed:tool_call>", "</seed:tool_call>"
    visible = (opener, closer)

    def fits(self, template: str) -> bool:
        return self.opener in template


class MiniMaxM2(NamedTags):
    name = "minimax-m2"
    opener, closer = "<minimax:tool_call>", "</minimax:tool_call>"
    is_section = True
    visible = (opener, closer)
    begin, key, name_end = '<invoke name="', '<parameter name="', '">'
    end = "</invoke>"

    def fits(self, template: str) -> bool:
        return self.opener in template


class Glm(Tagged):
    name = "glm"
    visible = (OPEN, CLOSE, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
    closer = ""
    key, value_end, end = "<arg_key>", "</arg_value>", CLOSE

    def fits(self, template: str) -> bool:
        return OPEN in template and self.key in template

    def head(self) -> tuple[str, str]:
        return (
            rf"\s*([^\s<]+)\s*(?={self.key}|{CLOSE})",
            rf"\s*[^\s<]*\s*({begun(self.key)}|{begun(CLOSE)})",
        )

    def key_pattern(self) -> str:
        return r"<arg_key>(.*?)</arg_key>\s*<arg_value>"

    def call(self, functions: Sequence[Function]) -> str:
        calls = (f'{literal(one.name)} "\\n"? {one.arguments}' for one in functions)
        return f"({' | '.join(calls)}) «{CLOSE}»"

    def argument(self, name: str, value: str) -> str:
        return f'«<arg_key>» {name} «</arg_key>» "\\n"? «<arg_value>» {value} "\\n"?'
