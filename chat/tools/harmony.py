"""gpt-oss: messages in channels, one of them for thoughts. A call is a message to a function.

<|channel|>analysis<|message|>I need the weather.<|end|><|start|>assistant<|channel|>commentary
to=functions.get_weather <|constrain|>json<|message|>{"city": "Paris"}<|call|>

<|channel|>final<|message|>It rains.<|return|>
"""

import re
from collections.abc import Sequence
from typing import Any, Literal

from chat.events import CallArguments, CallBegin, Event, Reasoning, Splitter, Text
from chat.splitter import JsonSpan, ReasoningTags, n_held
from chat.tools.base import Function, Messages, ToolFormat, literal, one_call_a_turn

START, CHANNEL, MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
CONSTRAIN, END, CALL, RETURN = "<|constrain|>", "<|end|>", "<|call|>", "<|return|>"
KIND = f'(" "? «{CONSTRAIN}» "json" | " json")?'  # of what follows
HEADS = (START, CHANNEL, " to=functions.")  # behind the prompt's own beginning of a header
TAGS = ReasoningTags(f"{CHANNEL}analysis{MESSAGE}", END, HEADS, MESSAGE, HEADS[-1])


class Harmony(ToolFormat):
    name = "harmony"
    opener = ""
    calls_after_text = False
    visible = (START, CHANNEL, MESSAGE, CONSTRAIN, END, CALL, RETURN)

    def fits(self, template: str) -> bool:
        return CHANNEL in template and MESSAGE in template

    def reasoning(self, template: str) -> ReasoningTags | None:
        return TAGS

    def ending(self, tags: ReasoningTags, functions: Sequence[Function]) -> str:
        return f"{END}{START}assistant" + ("" if functions else f"{CHANNEL}final{MESSAGE}")

    def openers(self, functions: Sequence[Function]) -> Sequence[str]:
        return []

    def history(self, messages: Messages, tools: Sequence[Any]) -> Messages:
        """Its template has a name of its own for the thoughts that led to a call, takes what was
        said before the call for such, and refuses both together."""
        turns = []
        for message in one_call_a_turn(messages):
            texts = [message.get("reasoning_content"), message["content"]]
            if message.get("tool_calls") and any(texts):
                thinking = "\n\n".join(filter(None, texts))
                message = {**message, "content": "", "thinking": thinking}
            turns.append(message)
        return turns

    def frame(
        self,
        functions: Sequence[Function],
        *,
        answer: str | None,
        is_required: bool,
        is_parallel: bool,
        tags: ReasoningTags | None,
        is_open: bool,
    ) -> str:
        said = '"analysis"' if answer else '("analysis" | "commentary")'
        text = f"«» | «until {END}»"
        last = "calls"
        if not is_required:
            last = f'«{CHANNEL}» "final" {KIND} «{MESSAGE}» ({answer or text})'
            last += " | calls" if functions else ""
        rules = [
            f"start: aside* ({last})",
            f'aside: «{CHANNEL}» {said} «{MESSAGE}» «until {END}» «{START}» "assistant"',
        ]
        if functions:
            rules.append(self.calls(functions, is_parallel=is_parallel))
        return "\n".join(rules)

    def calls(self, functions: Sequence[Function], *, is_parallel: bool) -> str:
        calls = []
        for function in functions:
            to = f"to=functions.{function.name}"
            in_role = f'{literal(f" {to}")} «{CHANNEL}» "commentary"'
            in_channel = f"«{CHANNEL}» {literal(f'commentary {to}')}"
            calls.append(f"({in_role} | {in_channel}) {KIND} «{MESSAGE}» {function.arguments}")
        return f"calls: {' | '.join(calls)}"

    def call_splitter(self, functions: Sequence[Function], *, only_first: bool) -> Splitter:
        return HarmonySplitter([function.name for function in functions])

    def splitter(
        self,
        functions: Sequence[Function],
        *,
        only_first: bool,
        tags: ReasoningTags | None,
        is_open: bool,
    ) -> Splitter:
        return self.call_splitter(functions, only_first=only_first)


class HarmonySplitter:
    """Reads messages one by one: a header, then what it says. What is said to anybody else but the
    user and the functions counts as thoughts. Messages of a kind are paragraphs of one text."""

    _ENDS = (END, CALL, RETURN)
    _END = re.compile("|".join(map(re.escape, _ENDS)))
    _RECIPIENT = re.compile(r" to=(?!assistant)(?:functions\.)?([^\s<]+)")

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._in_header = True
        self._kind: Literal["text", "reasoning", "call"] = "text"
        self._arguments = JsonSpan()
        self._held = ""
        self._said_before: set[str] = set()  # kinds
        self._between = ""  # what was said before and what comes next

    @property
    def is_reasoning(self) -> bool:
        return self._kind == "reasoning"

    @property
    def is_calling(self) -> bool:
        return self._kind == "call" and not self._arguments.has_ended

    def feed(self, text: str) -> list[Event]:
        self._held += text
        events: list[Event] = []
        go_on = True
        while go_on and self._held:
            more, go_on = self._read_header() if self._in_header else self._read_body()
            events += more
        return events

    def finish(self) -> list[Event]:
        held, self._held = self._held, ""
        if self._in_header:
            return [] if held.startswith(HEADS) or not held else [Text(held)]
        return self._said(held)

    def _read_header(self) -> tuple[list[Event], bool]:
        if not self._held.startswith(HEADS):
            if any(head.startswith(self._held) for head in HEADS):
                return [], False
            self._begin("text")  # the model leaves the format: all is text
            return [], True
        header, found, body = self._held.partition(MESSAGE)
        if not found:
            return [], False
        self._held = body
        recipient = self._RECIPIENT.search(header)
        if recipient and recipient[1] in self._names:
            self._begin("call")
            self._arguments = JsonSpan()
            return [CallBegin(recipient[1])], True
        self._begin("reasoning" if recipient or f"{CHANNEL}analysis" in header else "text")
        return [], True

    def _begin(self, kind: Literal["text", "reasoning", "call"]) -> None:
        self._in_header = False
        self._kind = kind
        self._between = "\n\n" if kind in self._said_before else ""

    def _read_body(self) -> tuple[list[Event], bool]:
        if self.is_calling:  # a mark in JSON is a part of it
            end = self._arguments.feed(self._held)
            return self._said(self._taken(end)), end is not None
        if mark := self._END.search(self._held):
            said = self._said(self._taken(mark.start()))
            self._held = self._held.removeprefix(mark[0])
            self._in_header = True
            return said, True
        n_sure = len(self._held) - max(n_held(self._held, mark) for mark in self._ENDS)
        return self._said(self._taken(n_sure)), False

    def _taken(self, n: int | None) -> str:
        """The first characters of what is held, which go out."""
        taken = self._held[:n]
        self._held = self._held[len(taken) :]
        return taken

    def _said(self, text: str) -> list[Event]:
        if not text:
            return []
        if self._kind == "call":
            return [CallArguments(text)]
        text, self._between = self._between + text, ""
        self._said_before.add(self._kind)
        return [Reasoning(text) if self._kind == "reasoning" else Text(text)]
