"""Families whose calls stand in a section of control tokens, each with its name, a mark, and its
arguments as JSON.

Kimi K2, whose calls have ids with a number that counts them through the conversation:

    <|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0
    <|tool_call_argument_begin|>{"city": "Paris"}<|tool_call_end|><|tool_calls_section_end|>

(without the line break)
"""

import re
from collections.abc import Sequence
from typing import Any, ClassVar

from chat.events import Splitter
from chat.splitter import JsonSpan
from chat.tools.base import Function, Messages, ToolFormat, literal
from chat.tools.calls import HeadedCalls, begun


class Sections(ToolFormat):
    closer: ClassVar[str]
    begin: ClassVar[str]  # of a call
    named: ClassVar[str]  # behind its name
    end: ClassVar[str]
    prefix: ClassVar[str] = ""  # of a name
    number: ClassVar[str] = ""  # behind it, as a regular expression

    def calls(self, functions: Sequence[Function], *, is_parallel: bool) -> str:
        number = self.number and f"/{self.number}/"
        names = " | ".join(
            f"{literal(self.prefix + one.name)} {number} «{self.named}» {one.arguments}"
            for one in functions
        )
        more = "call*" if is_parallel else ""
        call = f"call: «{self.begin}» ({names}) «{self.end}»"
        return f"calls: call {more} «{self.closer}»\n{call}"

    def call_splitter(self, functions: Sequence[Function], *, only_first: bool) -> Splitter:
        return SectionSplitter(self, only_first=only_first)


class SectionSplitter(HeadedCalls):
    _is_section = True
    _first = ""

    def __init__(self, family: Sections, *, only_first: bool) -> None:
        super().__init__(family.opener, only_first=only_first)
        begin, named = re.escape(family.begin), re.escape(family.named)
        name = rf"(?:{re.escape(family.prefix)})?([^\s<]+?)(?:{family.number})?"
        self._head = re.compile(rf"\s*{begin}\s*{name}\s*{named}")
        self._half_head = re.compile(
            rf"\s*({begun(family.begin)}|{begin}\s*[^\s<]*\s*{begun(family.named)})"
        )
        self._end, self._close = family.end, family.closer

    def _begin(self) -> None:
        super()._begin()
        self._json = JsonSpan()

    def _next(self, name: str) -> str | None:
        end = self._json.feed(self._raw)
        said = self._raw[:end]
        self._raw = self._raw[len(said) :]
        self._is_whole = end is not None
        return said or None


class KimiK2(Sections):
    name = "kimi-k2"
    opener, closer = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
    begin, named = "<|tool_call_begin|>", "<|tool_call_argument_begin|>"
    end = "<|tool_call_end|>"
    visible = (opener, closer, begin, named, end)
    prefix, number = "functions.", ":[0-9]{1,9}"

    def fits(self, template: str) -> bool:
        return self.opener in template and self.begin in template

    def history(self, messages: Messages, tools: Sequence[Any]) -> Messages:
        """Ids as the model writes them, since some of its templates print those of the messages."""
        turns: list[dict[str, Any]] = []
        n_calls = 0
        ids: dict[str, str] = {}  # of calls without a result, by those that the client sent
        for message in messages:
            turn = dict(message)
            if "tool_calls" in turn:
                ids, calls = {}, []
                for call in turn["tool_calls"]:
                    id = f"{self.prefix}{call['function']['name']}:{n_calls}"
                    ids[call.get("id", id)] = id
                    calls.append({**call, "id": id})
                    n_calls += 1
                turn["tool_calls"] = calls
            elif turn["role"] == "tool" and ids:
                sent = turn.get("tool_call_id")
                turn["tool_call_id"] = ids.pop(sent if sent in ids else next(iter(ids)))
            turns.append(turn)
        return turns
