"""Llama 3.1 to 3.3: the whole answer is one call as JSON, sometimes behind a control token.

{"name": "get_weather", "parameters": {"city": "Paris"}}
<|python_tag|>{"type": "function", "name": "get_weather", "parameters": {"city": "Paris"}}
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from chat.events import CallArguments, CallBegin, Event, Splitter, Text
from chat.splitter import JsonSpan
from chat.tools.base import Function, Messages, ToolFormat, literal

TAG = "<|python_tag|>"


class Llama3(ToolFormat):
    name = "llama3"
    opener = ""
    calls_after_text = False
    visible = (TAG,)
    mixes_with_json = False

    def fits(self, template: str) -> bool:
        return TAG in template or ('"parameters": ' in template and "ipython" in template)

    def calls(self, functions: Sequence[Function], *, is_parallel: bool) -> str:
        options = [
            f"{literal(opening)} {function.arguments}"
            for function in functions
            for opening in _openings(function.name)
        ]
        return f"""calls: ({" | ".join(options)}) "}}\""""

    def body(self, functions: Sequence[Function], *, answer: str | None, is_required: bool) -> str:
        body = f"body: «{TAG}»? calls"
        if is_required:
            return body
        # a text that begins like a call is one
        names = "|".join(
            re.sub(r"\W", lambda c: f"\\x{{{ord(c[0]):x}}}", _quoted(f.name)) for f in functions
        )
        call = rf'\{{("type": "function", )?"name": ({names})(.|\n)*'
        return f"{body} | TEXT\nTEXT: /(.|\\n)*/ & ~/{call}/"

    def call_splitter(self, functions: Sequence[Function], *, only_first: bool) -> Splitter:
        return Llama3Splitter([function.name for function in functions])

    def history(self, messages: Messages, tools: Sequence[Any]) -> Messages:
        """Its templates take one call in a turn: of several each gets its own, with its result."""
        results = {m.get("tool_call_id"): m for m in messages if m["role"] == "tool"}
        turns: list[Any] = []
        moved = set()
        for message in messages:
            calls = message.get("tool_calls") or ()
            if len(calls) < 2:
                if message.get("tool_call_id") not in moved:
                    turns.append(message)
                continue
            for number, call in enumerate(calls):
                content = "" if number else message["content"]
                turns.append({**message, "content": content, "tool_calls": [call]})
                if result := results.get(call.get("id")):
                    turns.append(result)
                    moved.add(call["id"])
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
        self._openings = {opening: name for name in names for opening in _openings(name)}
        self._held = ""
        self._arguments: JsonSpan | None = None
        self._is_text = False

    @property
    def is_calling(self) -> bool:
        return self._arguments is not None and not self._arguments.has_ended

    def feed(self, text: str) -> list[Event]:
        if self._arguments:
            return self._feed_arguments(text)
        if self._is_text:
            return [Text(text)]
        self._held += text
        begun = self._held.lstrip().removeprefix(TAG).lstrip()
        for opening, name in self._openings.items():
            if begun.startswith(opening):
                self._held = ""
                self._arguments = JsonSpan()
                return [CallBegin(name), *self._feed_arguments(begun[len(opening) :])]
        if TAG.startswith(begun) or any(opening.startswith(begun) for opening in self._openings):
            return []
        return self._all_text()

    def finish(self) -> list[Event]:
        return self._all_text()

    def _feed_arguments(self, text: str) -> list[Event]:
        assert self._arguments
        if self._arguments.has_ended:  # the brace around name and arguments
            return []
        text = text[: self._arguments.feed(text)]
        return [CallArguments(text)] if text else []

    def _all_text(self) -> list[Event]:
        self._is_text = True
        held, self._held = self._held, ""
        return [Text(held)] if held else []
