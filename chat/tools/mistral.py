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
from chat.tools.base import Function, Messages, literal
from chat.tools.lists import Listed, ListSplitter

OPEN, ARGS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"


class Mistral(Listed):
    name = "mistral"
    opener = OPEN
    visible: ClassVar[tuple[str, ...]] = (OPEN,)

    def fits(self, template: str) -> bool:
        return OPEN in template

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


def _short_id(id: str) -> str:
    if re.fullmatch("[a-zA-Z0-9]{9}", id):
        return id
    return hashlib.sha256(id.encode(errors="replace")).hexdigest()[:9]


class MistralSplitter(ListSplitter):
    """Takes both forms."""

    _NAMED = re.compile(
        r"\s*(?P<name>[\w.-]+)(\[CALL_ID\][\w.-]*)?(\[ARGS\]\s*(?=[\"{\[\w-])|\s*(?=\{))"
    )
    _HALF = re.compile(r"\s*([\w.-]+(\[[A-Z_]*(\][\w.-]*)?)*\s*)?")  # of what may be a named one

    def _begin(self) -> None:
        super()._begin()
        self._arguments: JsonSpan | None = None  # behind a name

    def _read(self, text: str) -> tuple[list[Event], str | None]:
        if self._arguments:
            return self._read_arguments(self._arguments, text)
        if self._reader is None:
            begun = self._raw + text
            if head := self._NAMED.match(begun):
                self._has_begun = True
                self._arguments = JsonSpan()
                events, rest = self._read_arguments(self._arguments, begun[head.end() :])
                return [CallBegin(head["name"]), *events], rest
            if self._HALF.fullmatch(begun):
                self._raw = begun
                return [], None
        return super()._read(text)

    def _read_arguments(self, arguments: JsonSpan, text: str) -> tuple[list[Event], str | None]:
        end = arguments.feed(text)
        events: list[Event] = [CallArguments(text[:end])] if text[:end] else []
        return events, None if end is None else text[end:]
