"""Families whose calls are a list of JSON objects between an opener and, with most, a closer.

LFM2 and LFM2.5. They write as Python does, unless the system text asks for JSON, as it does here:

    <|tool_call_start|>[{"name": "get_weather", "arguments": {"city": "Paris"}}]<|tool_call_end|>

Granite 3, Phi-4-mini, Nemotron Nano v2, Apriel:

    <|tool_call|>[{"name": "get_weather", "arguments": {"city": "Paris"}}]
    <tool_call>[{"name": "get_weather", "arguments": {"city": "Paris"}}]
    <|tool_call|>[{"name": "get_weather", "arguments": {"city": "Paris"}}]<|/tool_call|>
    <TOOLCALL>[{"name": "get_weather", "arguments": {"city": "Paris"}}]</TOOLCALL>
    <tool_calls>[{"name": "get_weather", "arguments": {"city": "Paris"}}]</tool_calls>
"""

import json
from collections.abc import Sequence
from typing import Any, ClassVar

from chat.events import Event, Splitter
from chat.splitter import ReasoningTags, Unwrapped, n_held
from chat.tools.base import Function, Messages, ToolFormat, add_to_system, literal, named
from chat.tools.calls import CallReader, OpenedCalls, after_close
from engine.wire import Segment

AS_JSON = "Output function calls as JSON."  # in the words of LFM2's authors
WITH_TOOLS = "You are a helpful assistant with some tools."  # and in those of Phi's


class Listed(ToolFormat):
    closer: ClassVar[str] = ""
    other_opener: ClassVar[str] = ""  # of some of its models
    wraps: ClassVar[tuple[str, str]] = ("", "")  # what an answer's text stands between
    layout: ClassVar[tuple[str, str, str]] = ("[", ", ", "]")
    head: ClassVar[str] = literal('{"name": ')  # Lark of a call, up to the name
    arguments: ClassVar[str] = "arguments"

    def calls(self, functions: Sequence[Function], *, is_parallel: bool) -> str:
        begin, between, end = map(literal, self.layout)
        more = f" ({between} call)*" if is_parallel else ""
        close = f' «{self.closer}» "\\n"?' if self.closer else ""
        call = f"{self.head} {named(functions, self.arguments)}"
        return f'calls: " "? {begin} call{more} {end}{close}\ncall: {call}'

    def body(
        self, functions: Sequence[Function], *, answer: str | None, is_required: bool, unlike: str
    ) -> str:
        begin, end = (mark and f"«{mark}»" for mark in self.wraps)
        if begin and answer:
            answer = f"{begin} {answer} {end}"
        body = super().body(functions, answer=answer, is_required=is_required, unlike=unlike)
        if is_required or answer:
            return body
        unlike = unlike and f"unlike {unlike} "
        if self.other_opener:
            body += f" | «{unlike}until {self.other_opener}» calls"
        if end:
            body += f" | «{unlike}until {self.wraps[1]}» SPACE? («{self.opener}» calls)?"
        return f"{begin}? ({body})" if begin else body

    def openers(self, functions: Sequence[Function]) -> Sequence[str]:
        return [self.opener, self.other_opener] if self.other_opener else [self.opener]

    def call_splitter(self, functions: Sequence[Function], *, only_first: bool) -> Splitter:
        openers = self.openers(functions)
        return ListSplitter(*openers, closer=self.closer, only_first=only_first)

    def splitter(
        self,
        functions: Sequence[Function],
        *,
        only_first: bool,
        tags: ReasoningTags | None,
        is_open: bool,
    ) -> Splitter:
        splitter = super().splitter(functions, only_first=only_first, tags=tags, is_open=is_open)
        return Unwrapped(splitter, self.wraps) if any(self.wraps) else splitter


class InText(Listed):
    """Past calls are a part of the text, since templates print no others, or not as JSON."""

    before_calls: ClassVar[str] = ""  # behind a text
    result_role: ClassVar[str] = "tool"

    def history(self, messages: Messages, tools: Sequence[Any]) -> Messages:
        turns: list[dict[str, Any]] = []
        for message in messages:
            turn = dict(message)
            if turn["role"] == "tool":
                turn["role"] = self.result_role
            if calls := turn.pop("tool_calls", None):
                plain = [{key: c["function"][key] for key in ("name", "arguments")} for c in calls]
                between = self.before_calls if turn["content"] else ""
                turn["content"] = (
                    Segment(turn["content"] + between, False),
                    Segment(self.opener, True),
                    Segment(json.dumps(plain, ensure_ascii=False), False),
                    Segment(self.closer, True),
                )
            turns.append(turn)
        return turns


class Lfm2(InText):
    name = "lfm2"
    opener, closer = visible = ("<|tool_call_start|>", "<|tool_call_end|>")

    def fits(self, template: str) -> bool:
        return "List of tools: " in template

    def history(self, messages: Messages, tools: Sequence[Any]) -> Messages:
        turns = [dict(turn) for turn in super().history(messages, tools)]
        for turn in turns:
            if "reasoning_content" in turn:
                turn["thinking"] = turn["reasoning_content"]
        if tools:
            add_to_system(turns, AS_JSON)
        return turns


class Granite3(InText):
    name = "granite3"
    opener = "<|tool_call|>"
    other_opener = "<tool_call>"  # 3.1, which is told of the token all the same
    visible = (opener,)
    result_role = "tool_response"

    def fits(self, template: str) -> bool:
        return self.opener in template and "<|start_of_role|>" in template


class Phi4Mini(InText):
    """Its template takes the tools as a text in the system message, and knows no other roles than
    its tokens, of which results have one."""

    name = "phi4-mini"
    opener, closer = visible = ("<|tool_call|>", "<|/tool_call|>")
    shows_tools = False
    result_role = "tool_response"

    def fits(self, template: str) -> bool:
        return "<|/tool|>" in template

    def history(self, messages: Messages, tools: Sequence[Any]) -> Messages:
        turns = list(super().history(messages, tools))
        if tools:
            if turns[0]["role"] != "system":
                turns.insert(0, {"role": "system", "content": WITH_TOOLS})
            functions = [tool["function"] for tool in tools]
            turns[0] = {**turns[0], "tools": json.dumps(functions, ensure_ascii=False)}
        return turns


class Nemotron2(Listed):
    name = "nemotron2"
    opener, closer = visible = ("<TOOLCALL>", "</TOOLCALL>")

    def fits(self, template: str) -> bool:
        return self.opener in template


class Apriel(InText):
    name = "apriel"
    opener, closer = visible = ("<tool_calls>", "</tool_calls>")
    before_calls = "\n"
    wraps = ("", "[END FINAL RESPONSE]")

    def fits(self, template: str) -> bool:
        return f"{self.opener}[" in template


class ListSplitter(OpenedCalls):
    """Reads one call after the other. Of a list that is not closed, what came."""

    def __init__(self, *openers: str, closer: str = "", only_first: bool) -> None:
        super().__init__(openers[0], only_first=only_first)
        self._openers = openers
        self._closer = closer

    def _opening(self, text: str) -> tuple[str, str, str]:
        found = [text.partition(opener) for opener in self._openers]
        return min(found, key=lambda parts: len(parts[0]))

    def _n_held(self, text: str) -> int:
        return max(n_held(text, opener) for opener in self._openers)

    def _begin(self) -> None:
        self._raw = ""  # behind the opener, while it is no call yet
        self._has_begun = False  # it is one
        self._reader: CallReader | None = None  # in the list
        self._is_between = False  # calls of the list
        self._after: str | None = None  # the list

    @property
    def is_calling(self) -> bool:
        return self._in_call and not self._is_between

    def _unread(self) -> str:
        begun = "" if self._has_begun else self._opened + self._raw
        return begun + (self._reader.raw if self._reader else "")

    def _read(self, text: str) -> tuple[list[Event], str | None]:
        events: list[Event] = []
        if self._after is None:
            events, rest = self._read_list(text)
            if rest is None or not self._has_begun:
                return events, rest
            self._after, text = "", rest
        self._after += text
        return events, after_close(self._after, self._closer)

    def _read_list(self, text: str) -> tuple[list[Event], str | None]:
        reader = self._reader
        if reader is None:
            text, self._raw = self._raw + text, ""
            before, bracket, begun = text.partition("[")
            if before.strip():
                return [], text
            self._raw = before + bracket
            if not bracket:
                return [], None
            self._reader = reader = CallReader()
            text = begun
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
