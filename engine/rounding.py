"""With how many rows a step is shortest: often with more than are wanted.

Kernels take rows in groups of four, eight or sixteen, and those that are left over one by one: with
seven rows a model in Q8_0 may take half as long again as with eight. There a row that nobody wants
makes the step shorter. Where that is so depends on the weights' format, the processor and the
kernels, so it is found out: steps that are to be computed anyway are computed with each number a
few times, and again after a while.
"""

import math
from collections import deque

GROUPS = 4, 8, 16, 64  # rows that kernels take at once; so many only where they are of attention
LEAST, MOST = 3, 63  # rows wanted: of fewer each comes at its price, of more some are little
TIMES = 3  # last steps with a number, of which the shortest counts
GAIN = 0.97  # of a step's time may one with more rows take at most, to be better
MEMORY = 1000  # steps after which a number that was not computed is tried again

NUMBERS = {  # of rows, by those that are wanted: these, and whole groups of less than twice as many
    n: sorted({n} | {up for group in GROUPS if (up := math.ceil(n / group) * group) < 2 * n})
    for n in range(LEAST, MOST + 1)
}


class Rounding:
    """Learns from steps that differ in their rows alone."""

    def __init__(self) -> None:
        self._n_steps = 0
        self._measured: dict[tuple[int, int], _Measured] = {}  # by rows and threads

    def n_rows(self, n_wanted: int, n_most: int, n_threads: int) -> int:
        """How many to compute, of at most so many."""
        if not LEAST <= n_wanted <= MOST:
            return n_wanted
        seconds = {}
        for n in NUMBERS[n_wanted]:
            if n <= max(n_most, n_wanted):
                measured = self._measured.get((n, n_threads))
                if measured is None or measured.is_due(self._n_steps):
                    return n
                seconds[n] = measured.least_s
        best = min(seconds, key=seconds.__getitem__)
        return best if seconds[best] <= GAIN * seconds[n_wanted] else n_wanted

    def took(self, n_rows: int, n_threads: int, seconds: float) -> None:
        """A step with so many rows took so long."""
        self._n_steps += 1
        if LEAST <= n_rows <= MOST + 1:
            self._measured.setdefault((n_rows, n_threads), _Measured()).add(self._n_steps, seconds)


class _Measured:
    """The last steps with one number of rows."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=TIMES)
        self._last = 0

    def add(self, step: int, seconds: float) -> None:
        if self._is_old(step):
            self._seconds.clear()
        self._seconds.append(seconds)
        self._last = step

    def is_due(self, step: int) -> bool:
        return len(self._seconds) < TIMES or self._is_old(step)

    def _is_old(self, step: int) -> bool:
        return step - self._last > MEMORY

    @property
    def least_s(self) -> float:
        return min(self._seconds)
