"""Splitters of text in which there are calls, and what they are made of."""

import json
import re
from abc import ABC, abstractmethod
from contextlib import suppress
from typing import Any

from chat.events import CallArguments, CallBegin, Event, Text
from chat.splitter import JsonSpan, n_held


def inner_json(text: str) -> str:
    """A text in JSON, without its quotes."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def begun(mark: str) -> str:
    """A regular expression of all that the mark begins with, from nothing to itself."""
    return "".join(f"({re.escape(char)}" for char in mark) + ")?" * len(mark)


class CallReader:
    """Reads one call as a JSON object with a name and arguments, of which it is fed pieces.

    Arguments go out as they come when the name stands before them, else once the object is whole.
    Arguments that are JSON in a string are taken out of it.
    """

    _HEAD = re.compile(
        r'\s*\{\s*(?:"(?:type|tool_call_id)"\s*:\s*"\w*"\s*,\s*)?'
        r'"(?:tool_)?name"\s*:\s*"(?P<name>[^"\\]*)"\s*,'
        r'\s*"(?:arguments|parameters)"\s*:\s*(?=[{\[\w-])'
    )
    _MAX_HEAD_CHARS = 1000  # a longer one is read when the object is whole

    def __init__(self) -> None:
        self.raw = ""  # what was fed while it is no call yet
        self.is_call = False  # its name is known
        self.is_whole = False  # it has ended, or was no object from the start
        self._object = JsonSpan()
        self._arguments = JsonSpan()

    def feed(self, text: str) -> tuple[list[Event], str | None]:
        """Events, and what of `text` comes after the object; None while it goes on."""
        if not self.is_call and (self.raw + text).lstrip()[:1] not in ("", "{"):
            self.is_whole = True
            text, self.raw = self.raw + text, ""
            return [], text
        end = self._object.feed(text)
        self.is_whole = end is not None
        rest = None if end is None else text[end:]
        return self._take(text[:end]), rest

    def _take(self, text: str) -> list[Event]:
        if self.is_call:
            return self._take_arguments(text)
        text, self.raw = self.raw + text, ""
        if head := self._HEAD.match(text, 0, self._MAX_HEAD_CHARS):
            self.is_call = True
            return [CallBegin(head["name"]), *self._take_arguments(text[head.end() :])]
        if self.is_whole and (call := _whole_call(text)):
            self.is_call = True
            return call
        self.raw = text
        return []

    def _take_arguments(self, text: str) -> list[Event]:
        text = text[: self._arguments.feed(text)]
        return [CallArguments(text)] if text else []


def _whole_call(text: str) -> list[Event]:
    """The events of a call as a whole object; none if it is not one."""
    try:
        call = json.loads(text, strict=False)
        name = call["name"] if "name" in call else call["tool_name"]
        arguments = _as_json(call.get("arguments", call.get("parameters", {})))
        f"{name}{arguments}".encode()  # half a surrogate pair is no text
    except (ValueError, KeyError, RecursionError):
        return []
    return [CallBegin(name), CallArguments(arguments)] if isinstance(name, str) else []


def _as_json(arguments: Any) -> str:
    """Arguments as JSON text, which they may be already."""
    if isinstance(arguments, str):
        with suppress(ValueError, RecursionError):
            text = arguments.strip() or "{}"
            json.loads(text)
            return text
    return json.dumps(arguments, ensure_ascii=False)


def after_close(text: str, close: str) -> str | None:
    """What comes after a whole call, behind what closes it if it does; None while that is open."""
    after = text.lstrip()
    if after.startswith(close):
        return after[len(close) :]
    return None if close.startswith(after) else text


class OpenedCalls(ABC):
    """A splitter of text in which each call, or list of calls, begins with an opener.

    Subclasses read what comes behind it. Spaces around calls belong to nobody. With `only_first`
    no call comes after text.
    """

    is_reasoning = False

    def __init__(self, opener: str, *, only_first: bool) -> None:
        self._opener = self._opened = opener
        self._only_first = only_first
        self._in_call = False
        self._had_call = False  # and no text since
        self._has_text = False
        self._held = ""
        self._spaces = ""  # before the opener: text, if no call follows

    @property
    @abstractmethod
    def is_calling(self) -> bool:
        """A call has begun and is not whole."""

    def _opening(self, text: str) -> tuple[str, str, str]:
        """What comes before the first opener, that, and what comes behind it."""
        return text.partition(self._opener)

    def _n_held(self, text: str) -> int:
        """Length of the end of `text` that may belong to an opener."""
        return n_held(text, self._opener)

    @abstractmethod
    def _begin(self) -> None:
        """An opener was met."""

    @abstractmethod
    def _read(self, text: str) -> tuple[list[Event], str | None]:
        """Events of a call, and what comes after it; None while it goes on."""

    @abstractmethod
    def _unread(self) -> str:
        """What was read, opener and all, if it is no call."""

    def feed(self, text: str) -> list[Event]:
        events: list[Event] = []
        rest: str | None = self._held + text
        self._held = ""
        while rest:
            more, rest = self._read_call(rest) if self._in_call else self._read_text(rest)
            events += more
        return events

    def finish(self) -> list[Event]:
        held, self._held = self._held, ""
        return self._given_back() if self._in_call else self._text(held)

    def _read_call(self, text: str) -> tuple[list[Event], str | None]:
        events, rest = self._read(text)
        if rest is not None:
            self._in_call = False
            given_back = self._given_back()
            self._had_call = not given_back
            events += given_back
        return events, rest

    def _given_back(self) -> list[Event]:
        """What only looked like a call."""
        unread = self._unread()
        return self._text(self._spaces + unread) if unread else []

    def _read_text(self, text: str) -> tuple[list[Event], str | None]:
        if self._only_first and self._has_text:
            return [Text(text)], None
        before, opener, after = self._opening(text)
        if opener and not (self._only_first and before.strip()):
            self._in_call = True
            self._opened = opener
            self._begin()
            said = before.rstrip()
            self._spaces = before[len(said) :]
            return self._text(said), after
        n_sure = len(text) - self._n_held(text)
        self._held = text[n_sure:]
        return self._text(text[:n_sure]), None

    def _text(self, text: str) -> list[Event]:
        if self._had_call:
            text = text.lstrip()
        if not text:
            return []
        self._had_call = False
        self._has_text = True
        return [Text(text)]


class HeadedCalls(OpenedCalls):
    """Such in which a call begins with the name of its function, and its arguments are put into
    JSON as they come. Several calls may come in one, each with such a head."""

    _head: re.Pattern[str]  # behind the opener, with the name as its only group
    _half_head: re.Pattern[str]  # what may become one
    _end: str = ""  # what ends a call
    _close: str = ""  # and closes what was opened
    _is_section: bool = False  # several calls may come before that
    _first: str = "{"  # of the JSON of the arguments

    def _begin(self) -> None:
        self._raw = ""  # what was not read yet
        self._name = ""  # empty: it is no call yet
        self._said = self._first  # and is to go out
        self._is_whole = False

    @property
    def is_calling(self) -> bool:
        return self._in_call and not self._is_whole

    def _unread(self) -> str:
        return self._opened + self._raw if not self._name else ""

    def _read(self, text: str) -> tuple[list[Event], str | None]:
        self._raw += text
        events: list[Event] = []
        if not self._name:
            if not (head := self._head.match(self._raw)):
                if self._half_head.fullmatch(self._raw):
                    return [], None
                text, self._raw = self._raw, ""
                return [], text
            events += self._take(head)
        while True:
            events += self._arguments()
            rest = after_close(self._raw, self._end) if self._is_whole else None
            if rest is None:
                return events, None
            if not self._is_section:
                return events, after_close(rest, self._close)
            if not (head := self._head.match(rest)):
                is_half = self._half_head.fullmatch(rest)
                return events, None if is_half else after_close(rest, self._close)
            self._begin()
            self._raw = rest
            events += self._take(head)

    def _take(self, head: re.Match[str]) -> list[Event]:
        self._name = head[1]
        self._raw = self._raw[head.end() :]
        return [CallBegin(head[1])]

    def _arguments(self) -> list[Event]:
        said, self._said = self._said, ""
        while not self._is_whole and (more := self._next(self._name)) is not None:
            said += more
        return [CallArguments(said)] if said else []

    @abstractmethod
    def _next(self, name: str) -> str | None:
        """JSON of the next piece of the arguments; None if more must come first. When they are
        whole, it says so."""
