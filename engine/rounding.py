"""With how many rows a step is shortest: often with more than are wanted.

Kernels take rows in groups of four, eight or sixteen, and those that are left over one by one: with
seven rows a model in Q8_0 may take half as long again as with eight. There a row that nobody wants
makes the step shorter. Where that is so depends on the weights' format, the processor and the
kernels, so it is found out with steps that are to be computed anyway: one with each number in turn,
a few times.
"""

import math
from collections.abc import Sequence
from statistics import median

AS_WANTED = 0  # rows, in place of their number
LEAST, MOST = 3, 63  # rows wanted: of fewer each comes at its price, of more some are little
ROUNDS = 5  # of a trial: in each a step with each number, so that they are under equal conditions
GAIN = 0.95  # of a step's time may one with more rows take at most, to be better
AGAIN, SELDOM = 200, 6400  # steps until the next trial: after a new outcome, and at last


class Rounding:
    """Learns from steps that differ in their rows alone. `groups`: rows that are taken at once.
    `n_alike`: neighbours among the numbers wanted that are taken for one."""

    def __init__(self, *groups: int, n_alike: int = 1) -> None:
        self._groups, self._n_alike = groups, n_alike
        self._trials: dict[tuple[int, ...], _Trial] = {}

    def n_rows(self, n_wanted: int, n_most: int, *conditions: int) -> int:
        """How many to compute, of at most so many. Steps are alike where `conditions` are equal,
        such as the number of threads."""
        if not LEAST <= n_wanted <= MOST:
            return n_wanted
        key = n_wanted // self._n_alike, *conditions
        if key not in self._trials:
            last = (key[0] + 1) * self._n_alike - 1
            up = {-(-last // group) * group for group in self._groups}
            more = sorted(n for n in up if last < n <= min(2 * last - 1, n_most))
            self._trials[key] = _Trial([AS_WANTED, *more])
        n_rows = self._trials[key].n_rows
        return n_rows if n_wanted < n_rows <= n_most else n_wanted

    def took(self, seconds: float, n_wanted: int, n_rows: int, *conditions: int) -> None:
        """A step with so many rows, of which so many were wanted, took so long."""
        if trial := self._trials.get((n_wanted // self._n_alike, *conditions)):
            trial.took(AS_WANTED if n_rows == n_wanted else n_rows, seconds)


class _Trial:
    """Steps with one number of rows wanted, and the numbers that are tried."""

    def __init__(self, numbers: Sequence[int]) -> None:
        self._numbers = numbers
        self._best = numbers[0]
        self._seconds: list[float] = []  # of the steps of this trial
        self._again = AGAIN
        self._n_left = 0 if len(numbers) > 1 else math.inf  # steps until there is one

    @property
    def n_rows(self) -> int:
        if self._n_left:
            return self._best
        return self._numbers[len(self._seconds) % len(self._numbers)]

    def took(self, n_rows: int, seconds: float) -> None:
        if self._n_left:
            self._n_left -= 1
        elif n_rows == self.n_rows:
            self._seconds.append(seconds)
            if len(self._seconds) == ROUNDS * len(self._numbers):
                self._end()

    def _end(self) -> None:
        n, before = len(self._numbers), self._best
        plain, *more = (self._seconds[i::n] for i in range(n))
        shares = [median(a / b for a, b in zip(other, plain, strict=True)) for other in more]
        least = min(shares)
        self._best = self._numbers[1 + shares.index(least) if least <= GAIN else 0]
        self._again = min(2 * self._again, SELDOM) if self._best == before else AGAIN
        self._n_left = self._again
        self._seconds.clear()
