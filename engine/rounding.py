"""With how many rows a step is shortest: often with more than are wanted.

Kernels take rows in groups of four, eight or sixteen, and those that are left over one by one: with
seven rows a model in Q8_0 may take half as long again as with eight. There a row that nobody wants
makes the step shorter. Where that is so depends on the weights' format, the processor and the
kernels, so it is found out: steps that are to be computed anyway are computed with each number a
few times, and again after a while.
"""

import math

GROUPS = 4, 8, 16, 64  # rows that kernels take at once; so many only where they are of attention
LEAST, MOST = 3, 63  # rows wanted: of fewer each comes at its price, of more some are little
TIMES = 3  # steps with each number, of which the shortest counts
GAIN = 0.97  # of a step's time may one with more rows take at most, to be better
AGAIN, SELDOM = 100, 6400  # steps from one trial to the next: at first, and at last


class Rounding:
    """Learns from steps that differ in their rows alone."""

    def __init__(self) -> None:
        self._trials: dict[tuple[int, int], _Trial] = {}

    def n_rows(self, n_wanted: int, n_most: int, n_threads: int) -> int:
        """How many to compute, of at most so many."""
        if not LEAST <= n_wanted <= MOST:
            return n_wanted
        n_rows = self._trial(n_wanted, n_threads).n_rows
        return n_rows if n_rows <= n_most else n_wanted

    def took(self, n_wanted: int, n_rows: int, n_threads: int, seconds: float) -> None:
        """A step with so many rows, of which so many were wanted, took so long."""
        if LEAST <= n_wanted <= MOST:
            self._trial(n_wanted, n_threads).took(n_rows, seconds)

    def _trial(self, n_wanted: int, n_threads: int) -> "_Trial":
        key = n_wanted, n_threads
        if key not in self._trials:
            self._trials[key] = _Trial(n_wanted)
        return self._trials[key]


class _Trial:
    """Steps with one number of rows wanted."""

    def __init__(self, n_wanted: int) -> None:
        whole = {math.ceil(n_wanted / group) * group for group in GROUPS}
        self._numbers = sorted({n_wanted} | {n for n in whole if n < 2 * n_wanted})
        self._seconds: list[float] = []  # of the steps of this trial, by number
        self._n_left = 0  # steps until there is one
        self._again = AGAIN
        self._best = n_wanted

    @property
    def n_rows(self) -> int:
        return self._best if self._n_left else self._numbers[len(self._seconds) // TIMES]

    def took(self, n_rows: int, seconds: float) -> None:
        if self._n_left:
            self._n_left -= 1
        elif n_rows == self.n_rows:  # else there was no room for more
            self._seconds.append(seconds)
            if len(self._seconds) == TIMES * len(self._numbers):
                self._end()

    def _end(self) -> None:
        plain, *more = (
            (min(self._seconds[i * TIMES :][:TIMES]), n) for i, n in enumerate(self._numbers)
        )
        least = min(more, default=plain)
        self._best = (least if least[0] <= GAIN * plain[0] else plain)[1]
        self._seconds.clear()
        self._n_left, self._again = self._again, min(2 * self._again, SELDOM)
