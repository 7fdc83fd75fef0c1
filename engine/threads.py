"""How many threads compute the next step: no more than there are cores that nobody else uses.

Threads that compute a step together wait for each other many times in every layer. Where one of
them has no core the others wait for it, so two threads on a core and a half are slower than one.
What others use is measured, not found by trying, so it costs nothing where there are none.
"""

import random
from collections import deque
from collections.abc import Sequence

from engine.machine import Cores

WINDOW_S = 0.25  # systems count CPU time in hundredths of a second: what is shorter is noise
HOLD_S = 1.0  # so long, and up to twice that, must a core have been free before a thread takes it
PAUSE_S = 0.05  # without a step: what others did before says nothing of now
SLACK = 0.35  # of a core may others use before a thread makes room for them
LATE_S, LATE = 0.1, 5.0  # a step is late after so long, and after so many times what it takes
DRIFT = 1.05  # from one step to the next: with the length of a context steps take longer


class Threads:
    """Learns from what was used of the cores since the last look. At most `n_most`, at least one;
    times are seconds by any clock. With the `dice` workers that wait for the same core do not take
    it at the same time, again and again."""

    def __init__(self, n_most: int, dice: random.Random) -> None:
        self.n = n_most
        self.may_be_more = False  # it has fewer by a look at one moment, and nothing was measured
        self._n_most = n_most
        self._dice = dice
        self._hold_s = HOLD_S
        self._seen_at: float | None = None
        self._own_s = 0.0
        self._cores: Sequence[Cores] = ()
        self._free: deque[tuple[float, float]] = deque()  # when, and how many cores were

    def give_way(self) -> None:
        """A step was so late that its threads must have waited for a core."""
        self.n = (self.n + 1) // 2

    def is_due(self, now_s: float) -> bool:
        """It is time to look again."""
        is_new = self._seen_at is None or now_s - self._seen_at >= WINDOW_S
        return self._n_most > 1 and is_new

    def resume(self, n_free: int | None) -> None:
        """After a pause so many cores have nobody who computes on them just now, if that is known.
        With fewer than half of its threads it would never be seen by others who give way too."""
        self._seen_at = None
        self._free.clear()
        if n_free is not None:
            self.n = min(self._n_most, max(n_free, (self._n_most + 1) // 2))
            self.may_be_more = self.n < self._n_most

    def look_again(self, n_free: int) -> None:
        """A moment later so many cores have nobody: who had them may only have been about to end,
        as threads that still look for work, or a client that has just asked."""
        self.n = max(self.n, min(self._n_most, n_free))
        self.may_be_more = self.n < self._n_most

    def observe(self, now_s: float, own_s: float, cores: Sequence[Cores]) -> None:
        """By now this process has computed for `own_s`; and what is so of the cores."""
        if self._seen_at is not None and cores and len(cores) == len(self._cores):
            seconds, own = now_s - self._seen_at, own_s - self._own_s
            free = min(
                new.n - max(new.used_s - old.used_s - own, 0) / seconds
                for old, new in zip(self._cores, cores, strict=True)
            )
            self._free.append((now_s, free))
            while self._free[0][0] <= now_s - self._hold_s:
                self._free.popleft()
            least = min(free for _, free in self._free)
            before = self.n
            self.n = max(1, min(self._n_most, int(least + SLACK)))
            self.may_be_more = False
            if self.n < before:
                self._hold_s = HOLD_S * (1 + self._dice.random())
        self._seen_at, self._own_s, self._cores = now_s, own_s, cores


class Lateness:
    """When a step is so late that others must have taken a core in its midst: before that can be
    seen in what they used, it may wait for seconds."""

    def __init__(self) -> None:
        self._least_s: dict[tuple[int, int], float] = {}  # by sizes, in powers of two

    def limit_s(self, n_tokens: int, n_held: int) -> float | None:
        """So long may a step of so many tokens take beside so many in the cells; None while that is
        not known."""
        least_s = self._least_s.get((n_tokens.bit_length(), n_held.bit_length()))
        return None if least_s is None else max(LATE_S, LATE * least_s)

    def took(self, n_tokens: int, n_held: int, seconds: float, *, at_least: bool = False) -> None:
        """A step did; `at_least` it would have, had it not been broken off."""
        size = n_tokens.bit_length(), n_held.bit_length()
        known_s = self._least_s.get(size, seconds)
        self._least_s[size] = max(seconds, known_s) if at_least else min(seconds, known_s * DRIFT)
