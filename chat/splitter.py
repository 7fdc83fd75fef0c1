"""Splitters that know nothing of tool calls, and what all splitters are made of."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from chat.events import Event, Reasoning, Splitter, Text


@dataclass(frozen=True, slots=True)
class ReasoningTags:
    """The texts or control tokens that a model's thoughts stand between. Where an answer is several
    messages: what their heads begin with, what ends each head, and what those of calls have."""

    open: str
    close: str
    heads: tuple[str, ...] = ()
    body: str = ""
    call: str = ""


class PlainText:
    """All is text."""

    is_reasoning = False
    is_calling = False

    def feed(self, text: str) -> list[Event]:
        return [Text(text)] if text else []

    def finish(self) -> list[Event]:
        return []


class ReasoningSplitter:
    """Thoughts, then what another splitter makes of the rest.

    Thoughts begin in the prompt (`is_open`) or where the answer begins with the tag; a tag further
    on is text. Spaces at their borders belong to neither side.
    """

    def __init__(self, tags: ReasoningTags, rest: Splitter, *, is_open: bool) -> None:
        self._tags = tags
        self._rest = rest
        self._held = ""
        self._state = "open" if is_open else "before"
        self._has_begun = False  # something that is no space has come in this state

    @property
    def is_reasoning(self) -> bool:
        return self._state == "open"

    @property
    def is_calling(self) -> bool:
        return self._rest.is_calling

    def feed(self, text: str) -> list[Event]:
        if self._state == "rest":
            return self._rest.feed(text)
        text, self._held = self._held + text, ""
        if self._state == "before":
            begun = text.lstrip()
            if begun.startswith(self._tags.open):
                self._state = "open"
                text = begun[len(self._tags.open) :]
            elif self._tags.open.startswith(begun):
                self._held = text
                return []
            else:
                self._state = "rest"
                return self._rest.feed(text)
        if self._state == "open":
            return self._feed_thoughts(text)
        text = text.lstrip()  # after the thoughts
        if not text:
            return []
        self._state = "rest"
        return self._rest.feed(text)

    def _feed_thoughts(self, text: str) -> list[Event]:
        if not self._has_begun:
            text = text.lstrip()
            self._has_begun = bool(text)
        thoughts, close, after = text.partition(self._tags.close)
        if close:
            self._state = "after"
            thoughts = thoughts.rstrip()
            more = self.feed(after)
        else:
            n_sure = len(thoughts) - n_held(thoughts, self._tags.close)
            thoughts, self._held, more = thoughts[:n_sure], thoughts[n_sure:], []
        return [Reasoning(thoughts), *more] if thoughts else more

    def finish(self) -> list[Event]:
        held, self._held = self._held, ""
        if self._state == "before":
            return [*self._rest.feed(held), *self._rest.finish()]
        if self._state == "open":
            return [Reasoning(held)] if held else []
        return self._rest.finish()


def n_held(text: str, mark: str) -> int:
    """Length of the end of `text` that must wait: spaces, and what may begin `mark`."""
    for n in range(min(len(text), len(mark) - 1), 0, -1):
        if mark.startswith(text[len(text) - n :]):
            text = text[: len(text) - n]
            return n + len(text) - len(text.rstrip())
    return len(text) - len(text.rstrip())


class InlineReasoning:
    """Leaves thoughts in the text, between `<think>` tags whatever the model's own are."""

    is_reasoning = False

    def __init__(self, inner: Splitter) -> None:
        self._inner = inner
        self._is_open = False

    @property
    def is_calling(self) -> bool:
        return self._inner.is_calling

    def feed(self, text: str) -> list[Event]:
        return [inline for event in self._inner.feed(text) for inline in self._inline(event)]

    def finish(self) -> list[Event]:
        return [inline for event in self._inner.finish() for inline in self._inline(event)]

    def _inline(self, event: Event) -> list[Event]:
        if isinstance(event, Reasoning):
            text = event.text if self._is_open else f"<think>\n{event.text}"
            self._is_open = True
            return [Text(text)]
        was_open, self._is_open = self._is_open, False
        return [Text("\n</think>\n\n"), event] if was_open else [event]


class Unwrapped:
    """Leaves out of the text the marks that an answer stands between, and spaces around them."""

    def __init__(self, inner: Splitter, marks: Sequence[str]) -> None:
        self._inner = inner
        self._marks = [mark for mark in marks if mark]
        self._mark = re.compile(rf"\s*({'|'.join(map(re.escape, self._marks))})")
        self._held = ""
        self._is_behind = False  # a mark, with no text since

    @property
    def is_reasoning(self) -> bool:
        return self._inner.is_reasoning

    @property
    def is_calling(self) -> bool:
        return self._inner.is_calling

    def feed(self, text: str) -> list[Event]:
        return [one for event in self._inner.feed(text) for one in self._unwrapped(event)]

    def finish(self) -> list[Event]:
        events = [one for event in self._inner.finish() for one in self._unwrapped(event)]
        return events + self._released()

    def _unwrapped(self, event: Event) -> list[Event]:
        if not isinstance(event, Text):
            return [*self._released(), event]
        said, text = "", self._stripped(self._held + event.text)
        while mark := self._mark.search(text):
            said += text[: mark.start()]
            self._is_behind = True
            text = self._stripped(text[mark.end() :])
        n_sure = len(text) - max(n_held(text, mark) for mark in self._marks)
        self._held = text[n_sure:]
        said += text[:n_sure]
        return [Text(said)] if said else []

    def _released(self) -> list[Event]:
        held, self._held = self._held, ""
        return [Text(held)] if held else []

    def _stripped(self, text: str) -> str:
        if self._is_behind:
            text = text.lstrip()
            self._is_behind = not text
        return text


class JsonSpan:
    """Finds where a JSON value ends, of which it is fed pieces."""

    _SPECIAL = re.compile(r'["\\{}\[\]]')
    _NO_LITERAL = re.compile(r"[^\w.+-]")  # in no number, nor in a word such as null

    def __init__(self) -> None:
        self.has_ended = False
        self._kind = ""  # the first character that is no space
        self._depth = 0
        self._is_string = False
        self._is_escaped = False

    def feed(self, text: str) -> int | None:
        """How many characters of `text` belong to the value, if it ends in it; None if not."""
        if self.has_ended:
            return 0
        end = self._end(text)
        self.has_ended = end is not None
        return end

    def _end(self, text: str) -> int | None:
        at = 0
        if not self._kind:
            at = len(text) - len(text.lstrip())
            if at == len(text):
                return None
            self._kind = text[at]
        if self._kind not in '{["':
            end = self._NO_LITERAL.search(text, at)
            return end.start() if end else None
        while at < len(text):
            if self._is_escaped:
                self._is_escaped = False
                at += 1
                continue
            found = self._SPECIAL.search(text, at)
            if found is None:
                return None
            at = found.end()
            if self._step(found[0]):
                return at
        return None

    def _step(self, char: str) -> bool:
        """Take a character that matters; whether the value ends with it."""
        if char == "\\":
            self._is_escaped = self._is_string
        elif char == '"':
            self._is_string = not self._is_string
        elif not self._is_string:
            self._depth += 1 if char in "{[" else -1
        return not self._is_string and not self._is_escaped and self._depth <= 0
