"""Families whose calls stand in a section of control tokens, each with its name, a mark, and its
arguments as JSON.

Kimi K2, whose calls have ids with a number that counts them through the conversation:

    <|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0
    <|tool_call_argument_begin|>{"city": "Paris"}<|tool_call_end|><|tool_calls_section_end|>

(without the line break)

DeepSeek V3.1, whose templates print neither tools nor, for all clients, calls:

    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Paris"}
    <｜tool▁call▁end｜><｜tool▁calls▁end｜>
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from chat.events import Splitter
from chat.splitter import JsonSpan
from chat.tools.base import Function, Messages, ToolFormat, add_to_system, literal
from chat.tools.calls import HeadedCalls, begun
from engine.wire import Segment


class Sections(ToolFormat):
    closer: ClassVar[str]
    begin: ClassVar[str]  # of a call
    name_end: ClassVar[str]  # behind its name
    end: ClassVar[str]
    prefix: ClassVar[str] = ""  # of a name
    number: ClassVar[str] = ""  # behind it, as a regular expression

    def calls(self, functions: Sequence[Function], *, is_parallel: bool) -> str:
        number = self.number and f"/{self.number}/"
        names = " | ".join(
            f"{literal(self.prefix + one.name)} {number} «{self.name_end}» {one.arguments}"
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
        begin, prefix, name_end = map(re.escape, (family.begin, family.prefix, family.name_end))
        name = rf"(?:{prefix})?([^\s<]+?)(?:{family.number})?"
        self._head = re.compile(rf"\s*{begin}\s*{name}\s*{name_end}")
        self._half_head = re.compile(
            rf"\s*({begun(family.begin)}|{begin}\s*[^\s<]*\s*{begun(family.name_end)})"
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
    begin, name_end = "<|tool_call_begin|>", "<|tool_call_argument_begin|>"
    end = "<|tool_call_end|>"
    visible = (opener, closer, begin, name_end, end)
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
                    sent = call.get("id", id)
                    ids[id if sent in ids else sent] = id
                    calls.append({**call, "id": id})
                    n_calls += 1
                turn["tool_calls"] = calls
            elif turn["role"] == "tool" and ids:
                sent = turn.get("tool_call_id")
                turn["tool_call_id"] = ids.pop(sent if sent in ids else next(iter(ids)))
            turns.append(turn)
        return turns


# in the words of its authors
TOOLS = "## Tools\nYou have access to the following tools:\n\n"
FORM = """IMPORTANT: ALWAYS adhere to this exact format for tool use:
<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>tool_call_name<｜tool▁sep｜>tool_call_arguments\
<｜tool▁call▁end｜>{{additional_tool_calls}}<｜tool▁calls▁end｜>

Where:
- `tool_call_name` must be an exact match to one of the available tools
- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema
- For multiple tool calls, chain them directly without separators or spaces"""


class DeepSeekV31(Sections):
    name = "deepseek-v3.1"
    shows_tools = False
    opener, closer = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
    begin, name_end, end = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
    visible = (opener, closer, begin, name_end, end)

    def fits(self, template: str) -> bool:
        # V3 and R1 write the JSON as a block of code
        return self.opener in template and "```json" not in template

    def history(self, messages: Messages, tools: Sequence[Any]) -> Messages:
        """Tools in the system text and calls in the text: of its templates some want arguments as a
        text, and some as an object."""
        turns: list[dict[str, Any]] = []
        for message in messages:
            turn = dict(message)
            if calls := turn.pop("tool_calls", None):
                said = [Segment(turn["content"], False), Segment(self.opener, True)]
                for call in calls:
                    said += self._past(call["function"])
                turn["content"] = (*said, Segment(self.closer, True))
            turns.append(turn)
        if tools:
            described = "\n\n".join(_described(tool["function"]) for tool in tools)
            form = Segment(f"\n\n{FORM}", True)
            add_to_system(turns, (Segment(TOOLS, True), Segment(described, False), form))
        return turns

    def _past(self, function: Mapping[str, Any]) -> list[Segment]:
        arguments = function.get("arguments", {})
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        # which templates take for the end of thoughts
        arguments = arguments.replace("</think>", "\\u003c/think>")
        parts = [self.begin, function["name"], self.name_end, arguments, self.end]
        return [Segment(part, n % 2 == 0) for n, part in enumerate(parts)]


def _described(function: Mapping[str, Any]) -> str:
    parameters = json.dumps(function["parameters"], ensure_ascii=False)
    description = f"Description: {function['description']}\n\nParameters: {parameters}"
    return f"### {function['name']}\n{description}"
