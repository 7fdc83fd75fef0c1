"""Decides which texts of which jobs an encoder computes next, in one call.

No thread, clock or I/O: `add`, `plan` and `cancel` are plain calls. A batch is made so:

1. It begins with the job that has been passed over in MAX_PASSED batches, the oldest of them, or
   else with the one that has had the fewest tokens. A newcomer counts as having had as few as the
   one that has had the fewest, so a big job cannot keep small ones waiting, nor they it for ever.
2. That job gives the longest text of its window. One that fills the budget travels alone.
3. Then, as long as there is room for tokens and sequences, again the job with the fewest tokens of
   those that have a text that fits, and of these texts the longest.
"""

from bisect import bisect_right, insort
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

WINDOW = 256  # texts of a job that are sorted by length
MAX_PASSED = 4  # batches in a row without a job


@dataclass(slots=True)
class _Share:
    """What is left of a job, and what it has had."""

    job: int
    n_had: int  # tokens, with those that it counts as having had
    n_passed: int = 0
    windows: deque[list[tuple[int, int]]] = field(default_factory=deque)  # length, index; sorted

    def longest(self, room: int | None = None) -> int | None:
        """Where in the window the longest text stands that fits into the room."""
        window = self.windows[0]
        at = len(window) if room is None else bisect_right(window, room, key=lambda text: text[0])
        return at - 1 if at else None

    def take(self, at: int) -> tuple[int, int]:
        n_tokens, index = self.windows[0].pop(at)
        if not self.windows[0]:
            self.windows.popleft()
        self.n_had += n_tokens
        return index, n_tokens


class Batcher:
    def __init__(self, *, n_tokens: int, n_sequences: int) -> None:
        self._n_tokens = n_tokens
        self._n_sequences = n_sequences
        self._shares: dict[int, _Share] = {}  # of jobs that have texts left, by age

    @property
    def idle(self) -> bool:
        return not self._shares

    def add(self, job: int, texts: Iterable[tuple[int, int]]) -> None:
        """Texts of a job, as (index, tokens). Those of an earlier call go first."""
        share = self._shares.get(job)
        if share is None:
            share = _Share(job, min((s.n_had for s in self._shares.values()), default=0))
        window: list[tuple[int, int]] = []
        for index, n_tokens in texts:
            if len(window) == WINDOW:
                share.windows.append(window)
                window = []
            insort(window, (n_tokens, index))
        if window:
            share.windows.append(window)
        if share.windows:
            self._shares[job] = share

    def cancel(self, job: int) -> None:
        """Forget a job. Unknown ones are fine: it may just have ended."""
        self._shares.pop(job, None)

    def plan(self) -> list[tuple[int, int]]:
        """The next batch, as (job, index) of its texts; empty only when idle."""
        batch: list[tuple[int, int]] = []
        room = self._n_tokens
        shares = list(self._shares.values())
        for share in shares:
            share.n_passed += 1
        while shares and len(batch) < self._n_sequences:
            if not batch:
                overdue = [s for s in shares if s.n_passed > MAX_PASSED]
                share = overdue[0] if overdue else min(shares, key=lambda s: s.n_had)
                at = share.longest()
            else:
                fitting = [s for s in shares if s.longest(room) is not None]
                if not fitting:
                    break
                share = min(fitting, key=lambda s: s.n_had)
                at = share.longest(room)
            assert at is not None
            index, n_tokens = share.take(at)
            share.n_passed = 0
            batch.append((share.job, index))
            room -= n_tokens
            if not share.windows:
                shares.remove(share)
                del self._shares[share.job]
        return batch
