"""Token bytes to text that is safe to send: whole characters, and no stop string."""

import codecs
from collections.abc import Sequence


class TextStream:
    """Feed bytes, get text. Holds back half a character and what may begin a stop string."""

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self.stop: str | None = None  # that was met: nothing more comes out
        self.stops = tuple(stops)  # of what comes next
        self.n_decoded = 0  # characters that are whole, with those that are held back
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self._n_blank = 0  # characters of it that are no stop string by themselves

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
        # the stop that is complete first counts, so how text is cut into tokens changes nothing
        places = ((text.find(s, max(n_blank - len(s) + 1, 0)), s) for s in self.stops)
        found = ((at + len(s), at, s) for at, s in places if at >= 0)
        _, cut, self.stop = min(found, default=(0, 0, None))
        if self.stop is not None:
            self._held = ""
            return text[:cut]
        n_held = max(_overlap(text, stop) for stop in self.stops)
        n_sure = len(text) - n_held
        self._held, self._n_blank = text[n_sure:], max(n_blank - n_sure, 0)
        return text[:n_sure]

    def finish(self) -> str:
        """What was held back, when no more bytes will come. Half a character is dropped."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` without completing it."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0
