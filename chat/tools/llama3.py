"""Llama 3.1 to 3.3: the whole answer is one call as JSON, sometimes behind a control token.

{"name": "get_weather", "parameters": {"city": "Paris"}}
<|python_tag|>{"type": "function", "name": "get_weather", "parameters": {"city": "Paris"}}
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from chat.events import Event, Splitter, Text
from chat.tools.base import Function, Messages, ToolFormat, one_call_a_turn
from chat.tools.calls import CallReader
from engine.grammar_text import pattern

TAG = "<|python_tag|>"


class Llama3(ToolFormat):
    name = "llama3"
    opener = ""
    calls_after_text = False
    visible = (TAG,)
    mixes_with_json = False

    def fits(self, template: str) -> bool:
        # others that know the tag write their calls in another way
        return '"parameters": ' in template and (TAG in template or "ipython" in template)

    def calls(self, functions: Sequence[Function], *, is_parallel: bool) -> str:
        # one terminal: beside free text, which is longer, none that are shorter count
        options = [
            f"/[ \\n]{{0,4}}{pattern(opening)}/ {function.arguments}"
            for function in functions
            for opening in _openings(function.name)
        ]
        return f"""calls: ({" | ".join(options)}) "}}\""""

    def body(
        self, functions: Sequence[Function], *, answer: str | None, is_required: bool, unlike: str
    ) -> str:
        if not functions and answer:
            return answer
        calls = f"«spaced {TAG}»? calls"
        if is_required:
            return calls
        # a text that begins like a call is one
        names = "|".join(pattern(_quoted(function.name)) for function in functions)
        call = rf'\s*({pattern(TAG)}|\{{("type": "function", )?"name": ({names}))'
        return f"{calls} | «unlike {unlike and f'{unlike}|'}{call}»"

    def openers(self, functions: Sequence[Function]) -> Sequence[str]:
        return [TAG, *(opening for one in functions for opening in _openings(one.name))]

    def call_splitter(self, functions: Sequence[Function], *, only_first: bool) -> Splitter:
        return Llama3Splitter([function.name for function in functions])

    def history(self, messages: Messages, tools: Sequence[Any]) -> Messages:
        """What was said before a call in a turn of its own, since templates show only the call."""
        turns: list[Mapping[str, Any]] = []
        for turn in one_call_a_turn(messages):
            if turn.get("tool_calls") and turn["content"]:
                turns.append({"role": turn["role"], "content": turn["content"]})
                turn = {**turn, "content": ""}
            turns.append(turn)
        return turns


def _quoted(name: str) -> str:
    return json.dumps(name, ensure_ascii=False)


def _openings(name: str) -> list[str]:
    rest = f'"name": {_quoted(name)}, "parameters": '
    return ["{" + rest, '{"type": "function", ' + rest]


class Llama3Splitter:
    """The answer is a call if it begins like one of a known function."""

    is_reasoning = False

    def __init__(self, names: Sequence[str]) -> None:
        self._openings = tuple(opening for name in names for opening in _openings(name))
        self._held = ""
        self._reader: CallReader | None = None
        self._is_text = False

    @property
    def is_calling(self) -> bool:
        return self._reader is not None and not self._reader.is_whole

    def feed(self, text: str) -> list[Event]:
        if self._is_text:
            return self._text(text)
        if self._reader:
            return self._read(self._reader, text)
        self._held += text
        begun = self._held.lstrip().removeprefix(TAG).lstrip()
        if begun.startswith(self._openings):
            self._held = self._held[: len(self._held) - len(begun)]
            self._reader = CallReader()
            return self._read(self._reader, begun)
        if any(mark.startswith(begun) for mark in (TAG, *self._openings)):
            return []
        return self.finish()

    def finish(self) -> list[Event]:
        held, self._held = self._held, ""
        if self._reader:
            return [] if self._reader.is_call else self._text(held + self._reader.raw)
        return self._text(held)

    def _read(self, reader: CallReader, text: str) -> list[Event]:
        events: list[Event] = []
        if not reader.is_whole:
            events, rest = reader.feed(text)
            if rest is None:
                return events
            text = rest if reader.is_call else self._held + reader.raw + rest
        return events + self._text(text.lstrip() if reader.is_call else text)

    def _text(self, text: str) -> list[Event]:
        self._is_text = bool(text)
        return [Text(text)] if text else []
