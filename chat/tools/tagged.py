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
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from chat.events import CallArguments, CallBegin, Event, Splitter
from chat.splitter import JsonSpan, n_held
from chat.tools.base import (
    Function,
    Messages,
    OpenedCalls,
    Tool,
    ToolFormat,
    added,
    after_close,
    begun,
    literal,
    may_go_on,
    with_plain_arguments,
)
from chat.tools.hermes import CLOSE, OPEN
from chat.tools.parameters import ANY, Parameter, Parameters
from engine.wire import GrammarPart
from errors import UnsupportedParameter

OTHER_NAME = "/[^\\n<>=]+/"  # of an argument that no schema names


class Tagged(ToolFormat):
    opener = OPEN
    head: ClassVar[re.Pattern[str]]  # of a call, up to its first argument
    half_head: ClassVar[re.Pattern[str]]  # what may become one
    key: ClassVar[re.Pattern[str]]  # of an argument, up to its value
    value_end: ClassVar[str]
    end: ClassVar[str]  # of all arguments
    marks: ClassVar[tuple[str, ...]]  # that come next where no value is

    @abstractmethod
    def call(self, function: Function) -> str:
        """Lark of a call, from behind its opener."""

    @abstractmethod
    def argument(self, name: str, value: str) -> str:
        """Lark of an argument. Both are Lark, and the value has its end in it."""

    def function(self, tool: Tool, parts: list[GrammarPart]) -> Function:
        found = Parameters(tool.arguments)
        if found.is_exact and found.unknown:
            raise UnsupportedParameter(
                f"'{found.unknown[0]}' of all arguments cannot be enforced in calls of this "
                f"model ({self.name}); leave `strict` out.",
                param=tool.arguments.param,
            )
        rules, parameters = [], {}
        for parameter in found.listed:
            if any(self.value_end in choice for choice in parameter.choices):
                parameter = replace(parameter, form="json", choices=())
            rule = self.argument(literal(parameter.name), self._value(parameter, tool, parts))
            rules.append(rule if parameter.is_required else f"({rule})?")
            parameters[parameter.name] = parameter
        if found.takes_others:
            rules.append(f"({self.argument(OTHER_NAME, 'value')})*")
        return Function(tool.name, " ".join(rules), parameters)

    def _value(self, parameter: Parameter, tool: Tool, parts: list[GrammarPart]) -> str:
        end = f"«{self.value_end}»"
        if parameter.form == "json":
            schema = json.dumps(parameter.schema, ensure_ascii=False)
            part = GrammarPart(
                "json_schema", schema, tool.arguments.param, tool.arguments.is_lenient
            )
            return f"{added(parts, part)} {end}"
        if parameter.choices:
            return f"({' | '.join(map(literal, parameter.choices))}) {end}"
        return "value"

    def calls(self, functions: Sequence[Function], *, is_parallel: bool) -> str:
        more = f' ("\\n"? «{OPEN}» call)*' if is_parallel else ""
        calls = " | ".join(f"({self.call(function)})" for function in functions)
        value = f"«inside until {self.value_end}»"
        return f"calls: call{more}\ncall: {calls}\nvalue: {value}"

    def call_splitter(self, functions: Sequence[Function], *, only_first: bool) -> Splitter:
        return TaggedSplitter(self, functions, only_first=only_first)

    def history(self, messages: Messages, tools: Sequence[Any]) -> Messages:
        return with_plain_arguments(messages)


class Qwen3Coder(Tagged):
    name = "qwen3-coder"
    visible = (OPEN, CLOSE)
    head = re.compile(r"\s*<function=(\S+?)>")
    half_head = re.compile(rf"\s*({begun('<function=')}|<function=\S*)")
    key = re.compile(r"<parameter=([^\n]*?)>\n")
    value_end = "\n</parameter>"
    end = "</function>"
    marks = ("<parameter=", end)

    def fits(self, template: str) -> bool:
        return OPEN in template and "<parameter=" in template

    def call(self, function: Function) -> str:
        begin = literal(f"\n<function={function.name}>\n")
        return f'{begin} {function.arguments} "</function>\\n" «{CLOSE}»'

    def argument(self, name: str, value: str) -> str:
        return f'"<parameter=" {name} ">\\n" {value} "\\n"'


class Glm(Tagged):
    name = "glm"
    visible = (OPEN, CLOSE, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
    head = re.compile(rf"\s*([^\s<]+)\s*(?=<arg_key>|{CLOSE})")
    half_head = re.compile(rf"\s*[^\s<]*\s*({begun('<arg_key>')}|{begun(CLOSE)})")
    key = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>")
    value_end = "</arg_value>"
    end = CLOSE
    marks = ("<arg_key>", CLOSE)

    def fits(self, template: str) -> bool:
        return OPEN in template and "<arg_key>" in template

    def call(self, function: Function) -> str:
        return f'{literal(function.name)} "\\n"? {function.arguments} «{CLOSE}»'

    def argument(self, name: str, value: str) -> str:
        return f'«<arg_key>» {name} «</arg_key>» "\\n"? «<arg_value>» {value} "\\n"?'


class TaggedSplitter(OpenedCalls):
    """Texts go out as they come, and so does JSON."""

    def __init__(self, form: Tagged, functions: Sequence[Function], *, only_first: bool) -> None:
        super().__init__(OPEN, only_first=only_first)
        self._form = form
        self._functions = {function.name: function for function in functions}

    def _begin(self) -> None:
        self._raw = ""  # what was not read yet
        self._function: Function | None = None  # None: it is no call yet
        self._parameter: Parameter | None = None  # whose value comes
        self._json = JsonSpan()  # of it
        self._n_arguments = 0
        self._is_whole = False

    @property
    def is_calling(self) -> bool:
        return self._in_call and not self._is_whole

    def _unread(self) -> str:
        return "" if self._function else OPEN + self._raw

    def _read(self, text: str) -> tuple[list[Event], str | None]:
        self._raw += text
        if self._function is None:
            if not (head := self._form.head.match(self._raw)):
                if self._form.half_head.fullmatch(self._raw):
                    return [], None
                text, self._raw = self._raw, ""
                return [], text
            self._function = self._functions.get(head[1]) or Function(head[1], "")
            self._raw = self._raw[head.end() :]
            said = "{"
            events: list[Event] = [CallBegin(head[1])]
        else:
            said, events = "", []
        while not self._is_whole and (more := self._next(self._function)) is not None:
            said += more
        if said:
            events.append(CallArguments(said))
        return events, after_close(self._raw, CLOSE) if self._is_whole else None

    def _next(self, function: Function) -> str | None:
        """JSON of what can be said now of the arguments; None if more must come first."""
        if self._parameter:
            return self._value(self._parameter)
        self._raw = self._raw.lstrip()
        if key := self._form.key.match(self._raw):
            self._raw = self._raw[key.end() :]
            self._parameter = function.parameters.get(key[1], ANY)
            self._json = JsonSpan()
            self._n_arguments += 1
            separator = ", " if self._n_arguments > 1 else ""
            quote = '"' if self._parameter.form == "text" else ""
            return f"{separator}{json.dumps(key[1], ensure_ascii=False)}: {quote}"
        ends = self._raw.startswith(self._form.end)
        if not ends and any(may_go_on(self._raw, mark) for mark in self._form.marks):
            return None
        self._is_whole = True
        if self._form.end != CLOSE:
            self._raw = self._raw.removeprefix(self._form.end)
        return "}"

    def _value(self, parameter: Parameter) -> str | None:
        """JSON of an argument, or of what came of it."""
        if parameter.form == "json" and not self._json.has_ended:
            n_sure = self._json.feed(self._raw)
            said = self._raw[:n_sure]
            self._raw = self._raw[len(said) :]
            return said if said or self._json.has_ended else None
        said, mark, after = self._raw.partition(self._form.value_end)
        if mark:
            self._raw = after
            self._parameter = None
            if parameter.form == "json":
                return ""
            value = parameter.value(said)
            return value[1:] if parameter.form == "text" else value
        if parameter.form != "text":
            return None
        n_sure = len(said) - n_held(said, self._form.value_end)
        self._raw = said[n_sure:]
        return json.dumps(said[:n_sure], ensure_ascii=False)[1:-1] or None
