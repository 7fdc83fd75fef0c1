"""Who waits for a tier, in the order in which they are served."""

from bisect import bisect
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")

STEP_S = 10.0  # of waiting, for which a step of priority counts


class WaitingLine(Generic[T]):
    """Lower priorities go first, and of equal ones the oldest.

    Age counts: one joins with a place in time, its arrival and STEP_S for each step of priority,
    and the earliest place is served. So nobody is overtaken by those who come later than that, and
    a stream of urgent ones holds up the others for a bounded time.
    """

    def __init__(self) -> None:
        self._line: list[tuple[float, int, T]] = []  # place, number of arrival
        self._n_arrived = 0

    def __len__(self) -> int:
        return len(self._line)

    def __iter__(self) -> Iterator[T]:
        return (who for _, _, who in self._line)

    @staticmethod
    def place(priority: int, now: float) -> float:
        """Where one stands that joins now: the least is served first."""
        return now + STEP_S * priority

    def join(self, who: T, priority: int, now: float) -> int:
        """So many are before it."""
        self._n_arrived += 1
        at = self.place(priority, now), self._n_arrived, who
        n_before = bisect(self._line, at[:2], key=lambda at: at[:2])
        self._line.insert(n_before, at)
        return n_before

    @property
    def first_place(self) -> float:
        return self._line[0][0]

    @property
    def last(self) -> T | None:
        return self._line[-1][2] if self._line else None

    def n_before(self, who: T) -> int | None:
        """How many are before it; None when it does not wait."""
        return next((n for n, at in enumerate(self._line) if at[2] is who), None)

    def pop(self) -> T:
        """The next one."""
        return self._line.pop(0)[2]

    def leave(self, who: T) -> None:
        """Unknown ones are fine: they were served."""
        self._line = [at for at in self._line if at[2] is not who]
