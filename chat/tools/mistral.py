"""Mistral: a control token, then a list of calls or, from version 11 of its tokenizer on, each call
with its name before its arguments.

    [TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}}]
    [TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]get_weather[ARGS]{"city": "Rome"}
    [TOOL_CALLS]get_weather[CALL_ID]9kTq2Zx0B[ARGS]{"city": "Paris"}
"""

import hashlib
import re
from collections.abc import Sequence
from typing import Any, ClassVar

from chat.events import CallArguments, CallBegin, Event, Splitter
from chat.splitter import JsonSpan
from chat.tools.base import Function, Messages, ToolFormat, literal, named
from chat.tools.calls import CallReader, OpenedCalls

OPEN, ARGS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"


class Mistral(ToolFormat):
    name = "mistral"
    opener = OPEN
    visible: ClassVar[tuple[str, ...]] = (OPEN,)

    def fits(self, template: str) -> bool:
        return OPEN in template

    def calls(self, functions: Sequence[Function], *, is_parallel: bool) -> str:
        return listed(functions, begin='" "?', is_parallel=is_parallel)

    def call_splitter(self, functions: Sequence[Function], *, only_first: bool) -> Splitter:
        return MistralSplitter(OPEN, only_first=only_first)

    def history(self, messages: Messages, tools: Sequence[Any]) -> Messages:
        """Its templates refuse ids that are not nine letters and digits, and a user's turn behind
        the result of a tool, of which it becomes the end."""
        turns: list[dict[str, Any]] = []
        for message in messages:
            turn = dict(message)
            if turn["role"] == "user" and turns and turns[-1]["role"] == "tool":
                turns[-1]["content"] += f"\n\n{turn['content']}"
                continue
            if "tool_call_id" in turn:
                turn["tool_call_id"] = _short_id(turn["tool_call_id"])
            if "tool_calls" in turn:
                turn["tool_calls"] = [
                    {**call, "id": _short_id(call.get("id", ""))} for call in turn["tool_calls"]
                ]
            turns.append(turn)
        return turns


class MistralV11(Mistral):
    name = "mistral-v11"
    visible = (OPEN, ARGS, CALL_ID)

    def fits(self, template: str) -> bool:
        return OPEN in template and ARGS in template

    def calls(self, functions: Sequence[Function], *, is_parallel: bool) -> str:
        more = f" («{OPEN}» call)*" if is_parallel else ""
        id = f"(«{CALL_ID}» /[a-zA-Z0-9]{{9}}/)?"
        options = " | ".join(f"{literal(f.name)} {id} «{ARGS}» {f.arguments}" for f in functions)
        return f"calls: call{more}\ncall: {options}"


def listed(
    functions: Sequence[Function], *, begin: str = "", end: str = "", is_parallel: bool
) -> str:
    """Lark of the rule `calls`: a list of objects."""
    more = f" ({literal(', ')} call)*" if is_parallel else ""
    name = literal('{"name": ')
    call = f"call: {name} {named(functions, 'arguments')}"
    return f'calls: {begin} "[" call{more} "]" {end}\n{call}'


def _short_id(id: str) -> str:
    if re.fullmatch("[a-zA-Z0-9]{9}", id):
        return id
    return hashlib.sha256(id.encode(errors="replace")).hexdigest()[:9]


class MistralSplitter(OpenedCalls):
    """Takes both forms."""

    _NAMED = re.compile(
        r"\s*(?P<name>[\w.-]+)(\[CALL_ID\][\w.-]*)?(\[ARGS\]\s*(?=[\"{\[\w-])|\s*(?=\{))"
    )
    _HALF = re.compile(r"\s*([\w.-]+(\[[A-Z_]*(\][\w.-]*)?)*\s*)?")  # of what may be a named one

    def _begin(self) -> None:
        self._raw = ""  # behind the opener, while it is no call yet
        self._has_begun = False  # it is one
        self._reader: CallReader | None = None  # in a list
        self._is_between = False  # calls of a list
        self._arguments = JsonSpan()  # behind a name

    @property
    def is_calling(self) -> bool:
        return self._in_call and not self._is_between

    def _unread(self) -> str:
        begun = "" if self._has_begun else self._opened + self._raw
        return begun + (self._reader.raw if self._reader else "")

    def _read(self, text: str) -> tuple[list[Event], str | None]:
        if self._reader:
            return self._read_list(self._reader, text)
        if self._has_begun:
            return self._read_arguments(text)
        text, self._raw = self._raw + text, ""
        before, bracket, begun = text.partition("[")
        if bracket and not before.strip():
            self._raw = before + bracket
            self._reader = CallReader()
            return self._read_list(self._reader, begun)
        if head := self._NAMED.match(text):
            self._has_begun = True
            events, rest = self._read_arguments(text[head.end() :])
            return [CallBegin(head["name"]), *events], rest
        if self._HALF.fullmatch(text):
            self._raw = text
            return [], None
        return [], text

    def _read_arguments(self, text: str) -> tuple[list[Event], str | None]:
        end = self._arguments.feed(text)
        events: list[Event] = [CallArguments(text[:end])] if text[:end] else []
        return events, None if end is None else text[end:]

    def _read_list(self, reader: CallReader, text: str) -> tuple[list[Event], str | None]:
        events: list[Event] = []
        while text:
            if self._is_between:
                text = text.lstrip(", \n\t")
                if text.startswith("]"):
                    return events, text[1:]
                if not text:
                    break
                self._is_between = False
                self._reader = reader = CallReader()
            more, rest = reader.feed(text)
            events += more
            self._has_begun |= reader.is_call
            if rest is None:
                break
            if not reader.is_call:
                return events, rest
            self._is_between = True
            text = rest
        return events, None
