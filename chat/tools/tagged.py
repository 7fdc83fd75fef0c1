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
from chat.tools.base import Function, Messages, Parts, Tool, ToolFormat, literal, pattern
from chat.tools.calls import HeadedCalls, begun, inner_json
from chat.tools.hermes import CLOSE, OPEN
from chat.tools.parameters import ANY, Parameter, Parameters
from engine.wire import GrammarPart
from errors import UnsupportedParameter

BARE = "<function="  # without the opener
MAX_FREE = 4  # required arguments of a function whose order is free: each doubles its rules


class Tagged(ToolFormat):
    opener = OPEN
    value_end: ClassVar[str]
    splitter_class: ClassVar[type["TaggedSplitter"]]

    @abstractmethod
    def call(self, functions: Sequence[Function]) -> str:
        """Lark of a call of one of these, from behind its opener."""

    @abstractmethod
    def argument(self, name: str, value: str) -> str:
        """Lark of an argument. Both are Lark, and the value has its end in it."""

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
            rules.append(f"NAME_{number}: /[^\\n<>=]+/" + (f" & ~/({names})/" if names else ""))
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
        if parameter.length:
            return f"«inside {{{parameter.length}}} until {self.value_end}»"
        return "value"

    def calls(self, functions: Sequence[Function], *, is_parallel: bool) -> str:
        more = f'("\\n"? «{OPEN}» call)*' if is_parallel else ""
        rules = [
            'calls: call more "\\n"?',  # some end the last one with it too
            f"more: {more}",
            f"call: {self.call(functions)}",
            f"value: «inside until {self.value_end}»",
        ]
        return "\n".join([*rules, *(rule for function in functions for rule in function.rules)])

    def call_splitter(self, functions: Sequence[Function], *, only_first: bool) -> Splitter:
        return self.splitter_class(functions, only_first=only_first)

    def history(self, messages: Messages, tools: Sequence[Any]) -> Messages:
        """Their templates print each argument by itself, and those that are no texts as Python
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
    arguments = call["function"].get("arguments", {})
    if not isinstance(arguments, Mapping):
        arguments = {"arguments": arguments}
    texts = {
        name: value if isinstance(value, str | list | dict) else json.dumps(value)
        for name, value in arguments.items()
    }
    return {**call, "function": {**call["function"], "arguments": texts}}


class TaggedSplitter(HeadedCalls):
    """Texts go out as they come, and so does JSON."""

    CLOSE = CLOSE
    KEY: ClassVar[re.Pattern[str]]  # of an argument, up to its value
    VALUE_END: ClassVar[str]
    END: ClassVar[str]  # of all arguments
    MARKS: ClassVar[tuple[str, ...]]  # that come next where no value is

    def __init__(self, functions: Sequence[Function], *, only_first: bool) -> None:
        super().__init__(OPEN, only_first=only_first)
        self._parameters = {function.name: function.parameters for function in functions}

    def _begin(self) -> None:
        super()._begin()
        self._parameter: Parameter | None = None  # whose value comes
        self._is_text = False  # and it is one
        self._json = JsonSpan()  # of it
        self._n_arguments = 0

    def _next(self, name: str) -> str | None:
        if self._parameter:
            return self._value(self._parameter)
        self._raw = self._raw.lstrip()
        if key := self.KEY.match(self._raw):
            self._raw = self._raw[key.end() :]
            self._parameter = self._of(name, key[1])
            self._is_text = self._parameter.form == "text"
            self._json = JsonSpan()
            self._n_arguments += 1
            separator = ", " if self._n_arguments > 1 else ""
            quote = '"' if self._is_text else ""
            return f"{separator}{json.dumps(key[1], ensure_ascii=False)}: {quote}"
        ends = self._raw.startswith(self.END)
        if not ends and any(
            self._raw.startswith(mark) or mark.startswith(self._raw) for mark in self.MARKS
        ):
            return None
        self._is_whole = True
        if self.END != CLOSE:
            self._raw = self._raw.removeprefix(self.END)
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
        said, mark, after = self._raw.partition(self.VALUE_END)
        if mark:
            self._raw = after
            self._parameter = None
            if parameter.form == "json":
                return ""
            return f'{inner_json(said)}"' if self._is_text else parameter.value(said)
        if not self._is_text:
            return None
        n_sure = len(said) - n_held(said, self.VALUE_END)
        self._raw = said[n_sure:]
        return inner_json(said[:n_sure]) or None

    def _may_be_null(self) -> bool:
        null = f"null{self.VALUE_END}"
        return null.startswith(self._raw[: len(null)])


class Qwen3CoderSplitter(TaggedSplitter):
    HEAD = re.compile(rf"\s*{BARE}(\S+?)>")
    HALF_HEAD = re.compile(rf"\s*({begun(BARE)}|{BARE}\S*)")
    BARE_HEAD, BARE_HALF_HEAD = re.compile(r"(\S+?)>"), re.compile(r"\S*")
    KEY = re.compile(r"<parameter=(.*?)>\n", re.DOTALL)
    VALUE_END = "\n</parameter>"
    END = "</function>"
    MARKS = ("<parameter=", END)
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
            self._head, self._half_head = self.BARE_HEAD, self.BARE_HALF_HEAD


class Qwen3Coder(Tagged):
    """Its models leave the opener out at times, and begin a line with the function."""

    name = "qwen3-coder"
    visible = (OPEN, CLOSE)
    value_end = Qwen3CoderSplitter.VALUE_END
    splitter_class = Qwen3CoderSplitter

    def fits(self, template: str) -> bool:
        return OPEN in template and "<parameter=" in template

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
                f"named: {' | '.join(map(self._named, functions))}",
                f'bare: line named ("\\n" «{CLOSE}»)? more "\\n"?',
                "line[lazy]: LINE",
                f"LINE: /{begin}{pattern(BARE)}/ & ~/(.|\\n)*{pattern(OPEN)}(.|\\n)*/",
            ]
        )

    def call(self, functions: Sequence[Function]) -> str:
        return f'"\\n{BARE}" named "\\n" «{CLOSE}»'

    def _named(self, function: Function) -> str:
        return f'({literal(function.name)} ">\\n" {function.arguments} "</function>")'

    def argument(self, name: str, value: str) -> str:
        return f'"<parameter=" {name} ">\\n" {value} "\\n"'


class GlmSplitter(TaggedSplitter):
    HEAD = re.compile(rf"\s*([^\s<]+)\s*(?=<arg_key>|{CLOSE})")
    HALF_HEAD = re.compile(rf"\s*[^\s<]*\s*({begun('<arg_key>')}|{begun(CLOSE)})")
    KEY = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>", re.DOTALL)
    VALUE_END = "</arg_value>"
    END = CLOSE
    MARKS = ("<arg_key>", CLOSE)


class Glm(Tagged):
    name = "glm"
    visible = (OPEN, CLOSE, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
    value_end = GlmSplitter.VALUE_END
    splitter_class = GlmSplitter

    def fits(self, template: str) -> bool:
        return OPEN in template and "<arg_key>" in template

    def call(self, functions: Sequence[Function]) -> str:
        calls = (f'{literal(one.name)} "\\n"? {one.arguments}' for one in functions)
        return f"({' | '.join(calls)}) «{CLOSE}»"

    def argument(self, name: str, value: str) -> str:
        return f'«<arg_key>» {name} «</arg_key>» "\\n"? «<arg_value>» {value} "\\n"?'
