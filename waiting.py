"""Who waits for a tier, in the order in which they are served."""

from bisect import insort
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

    def join(self, who: T, priority: int, now: float) -> None:
        self._n_arrived += 1
        insort(self._line, (now + STEP_S * priority, self._n_arrived, who), key=lambda at: at[:2])

    def pop(self) -> T:
        """The next one."""
        return self._line.pop(0)[2]

    def leave(self, who: T) -> None:
        """Unknown ones are fine: they were served."""
        self._line = [at for at in self._line if at[2] is not who]
