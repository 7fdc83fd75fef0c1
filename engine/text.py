"""Token bytes to text that is safe to send: whole characters, and no stop string."""

import codecs
import re
from collections.abc import Sequence
from typing import AnyStr

from engine.wire import Calls


class TextStream:
    """Feed bytes, get text. Holds back half a character and what may begin a stop string. These
    count before `calls`, and not in the spaces there, so what may begin calls waits too."""

    def __init__(self, stops: Sequence[str] = (), calls: Calls | None = None) -> None:
        self.stop: str | None = None  # that was met: nothing more comes out
        self.stops = tuple(stops)  # of what comes next
        self.n_decoded = 0  # characters that are whole, with those that are held back
        self._calls = calls  # that may come
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self._n_blank = 0  # characters of it that are no stop string by themselves
        self._has_text = False  # in which they count

    def push(self, data: bytes, n_blank: int = 0) -> str:
        """The text that `data` makes certain, without the stop string and what follows it. Its
        first `n_blank` characters are none by themselves."""
        decoded = self._decoder.decode(data)
        self.n_decoded += len(decoded)
        text = self._held + decoded
        if not self.stops:
            self._held, self._n_blank = "", 0
            return text
        n_blank = max(n_blank, self._n_blank)
        n_text, is_call = self._before_call(text)
        # the stop that is complete first counts, so how text is cut into tokens changes nothing
        places = ((text.find(s, max(n_blank - len(s) + 1, 0)), s) for s in self.stops)
        found = [(at + len(s), at, s) for at, s in places if at >= 0]
        end, cut, stop = min(found, default=(0, 0, None))
        if stop is not None and end <= n_text:
            self.stop, self._held = stop, ""
            return text[:cut]
        if is_call:
            self.stops = ()
            n_sure = n_text or len(text)  # text and call come one after the other
        else:
            begun = [len(text) - overlap(text, stop) for stop in self.stops]
            n_sure = min(n_text, *begun, *(at for _, at, _ in found))
        self._held, self._n_blank = text[n_sure:], max(n_blank - n_sure, 0)
        self._has_text = self._has_text or n_sure > 0
        return text[:n_sure]

    def finish(self) -> str:
        """What was held back, when no more bytes will come, so no call. It may have a stop string
        in it. Half a character is dropped."""
        self._calls = None
        text = self.push(b"")
        held, self._held = self._held, ""
        return text + held

    def _before_call(self, text: str) -> tuple[int, bool]:
        """How many characters are sure to come before any call, and whether one has begun."""
        if self._calls is None:
            return len(text), False
        calls = self._calls
        found = [at for opener in calls.openers if (at := text.find(opener)) >= 0]
        front = r"\n[ \t]*" if self._has_text else r"(?:^|\n)[ \t]*"
        lines = (re.search(f"{front}({re.escape(one)})", text) for one in calls.line_openers)
        found += [line.start(1) for line in lines if line]
        openers = (*calls.openers, *calls.line_openers)
        begin = min(found or [len(text) - overlap(text, opener) for opener in openers])
        n_text = len(text[:begin].rstrip())
        if calls.only_first and n_text:
            self._calls = None
            return len(text), False
        return n_text, bool(found)


def overlap(text: AnyStr, mark: AnyStr) -> int:
    """Length of the longest end of `text` that begins `mark` without completing it."""
    for n in range(min(len(text), len(mark) - 1), 0, -1):
        if text.endswith(mark[:n]):
            return n
    return 0
