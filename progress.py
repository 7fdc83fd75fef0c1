"""How far loads and downloads are: now and then in the log, or in one line of a terminal."""

import logging
import math
from contextlib import suppress
from typing import TextIO

from logs import ERASE

logger = logging.getLogger(__name__)

LOG_PERIOD_S = 10.0
DRAW_PERIOD_S = 0.25


class ProgressLog:
    """A line of the log every LOG_PERIOD_S. How it begins and ends is logged by who does it."""

    def __init__(self) -> None:
        self._told_at: dict[str, float] = {}

    def tell(self, who: str, words: str, now: float) -> None:
        """`who` is so far, in words for people, at `now` seconds of a monotonic clock."""
        if now - self._told_at.setdefault(who, now) >= LOG_PERIOD_S:
            self._told_at[who] = now
            logger.info("%s", words.capitalize())

    def end(self, who: str) -> None:
        """It has come to an end, good or bad."""
        self._told_at.pop(who, None)


class ProgressLine(ProgressLog):
    """One line at the bottom of a terminal, for all together, that is drawn anew a few times per
    second. It leaves the cursor at its beginning, where the log goes on over it."""

    def __init__(self, terminal: TextIO) -> None:
        super().__init__()
        self._terminal = terminal
        self._words: dict[str, str] = {}
        self._drawn_at = -math.inf

    def tell(self, who: str, words: str, now: float) -> None:
        is_new = who not in self._words
        self._words[who] = words
        if is_new or now - self._drawn_at >= DRAW_PERIOD_S:
            self._drawn_at = now
            self._draw()

    def end(self, who: str) -> None:
        if self._words.pop(who, None) is not None:
            self._draw()

    def _draw(self) -> None:
        with suppress(OSError):  # a terminal that has gone is no reason to stop a load
            self._terminal.write(" · ".join(self._words.values()) + ERASE + "\r")
            self._terminal.flush()
