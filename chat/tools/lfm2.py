"""LFM2 and LFM2.5: a list of calls between two control tokens. They write as Python does,
unless the system text asks for JSON, as it does here.

    <|tool_call_start|>[{"name": "get_weather", "arguments": {"city": "Paris"}}]<|tool_call_end|>
"""

import json
from collections.abc import Sequence
from typing import Any

from chat.events import Event, Splitter
from chat.tools.base import Function, Messages, ToolFormat
from chat.tools.calls import after_close
from chat.tools.mistral import MistralSplitter, listed
from engine.wire import Segment

OPEN, CLOSE = "<|tool_call_start|>", "<|tool_call_end|>"
AS_JSON = "Output function calls as JSON."  # in the words of their authors


class Lfm2(ToolFormat):
    name = "lfm2"
    opener = OPEN
    visible = (OPEN, CLOSE)

    def fits(self, template: str) -> bool:
        return "List of tools: " in template

    def calls(self, functions: Sequence[Function], *, is_parallel: bool) -> str:
        return listed(functions, end=f"«{CLOSE}»", is_parallel=is_parallel)

    def call_splitter(self, functions: Sequence[Function], *, only_first: bool) -> Splitter:
        return Lfm2Splitter(OPEN, only_first=only_first)

    def history(self, messages: Messages, tools: Sequence[Any]) -> Messages:
        """Calls in the text, since most of their templates print no others."""
        turns: list[dict[str, Any]] = []
        for message in messages:
            turn = dict(message)
            if calls := turn.pop("tool_calls", None):
                listed = json.dumps([_plain(call) for call in calls], ensure_ascii=False)
                turn["content"] = (
                    Segment(turn["content"], False),
                    Segment(OPEN, True),
                    Segment(listed, False),
                    Segment(CLOSE, True),
                )
            if "reasoning_content" in turn:
                turn["thinking"] = turn["reasoning_content"]
            turns.append(turn)
        if tools:
            if turns[0]["role"] == "system":
                turns[0]["content"] += f"\n\n{AS_JSON}"
            else:
                turns.insert(0, {"role": "system", "content": AS_JSON})
        return turns


def _plain(call: Any) -> dict[str, Any]:
    return {key: call["function"][key] for key in ("name", "arguments")}


class Lfm2Splitter(MistralSplitter):
    """There is a token behind the list too."""

    def _begin(self) -> None:
        super()._begin()
        self._after: str | None = None  # the list

    def _read(self, text: str) -> tuple[list[Event], str | None]:
        events: list[Event] = []
        if self._after is None:
            events, rest = super()._read(text)
            if rest is None or not self._has_begun:
                return events, rest
            self._after, text = "", rest
        self._after += text
        return events, after_close(self._after, CLOSE)
