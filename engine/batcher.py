"""Decides which texts of which jobs an encoder computes next, in one call.

No thread, clock or I/O: `add`, `plan` and `cancel` are plain calls. A batch is made so:

1. It begins with the job that has been passed over in MAX_PASSED batches, the oldest of them, or
   else with the one that has had the fewest tokens. A newcomer counts as having had as few as the
   one that has had the fewest, so a big job cannot keep small ones waiting, nor they it for ever.
2. That job gives the longest text of its window. One that fills the budget travels alone.
3. Then, as long as there is room for tokens and sequences, again the job with the fewest tokens of
   those that have a text that fits, and of these texts the longest. A small job takes only small
   ones along: it is to be answered at once.
4. A batch that was given up for a small job comes again as it was, after the small ones. One that
   began with a small job is not given up: it answers several who are no longer than the newcomer.
"""

from bisect import bisect_right, insort
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

WINDOW = 256  # texts of a job that are sorted by length
MAX_PASSED = 4  # batches in a row without a job
SMALL_TOKENS = 128  # left of a job that counts as small


@dataclass(slots=True)
class _Share:
    """What is left of a job, and what it has had."""

    job: int
    n_had: int  # tokens, with those that it counts as having had
    n_left: int = 0  # tokens
    n_passed: int = 0
    windows: deque[list[tuple[int, int]]] = field(default_factory=deque)  # length, index; sorted

    @property
    def is_small(self) -> bool:
        return self.n_left <= SMALL_TOKENS

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
        self.n_left -= n_tokens
        return index, n_tokens


class Batcher:
    def __init__(self, *, n_tokens: int, n_sequences: int) -> None:
        self._n_tokens = n_tokens
        self._n_sequences = n_sequences
        self._shares: dict[int, _Share] = {}  # of jobs that have texts left, by age
        self._given_up: list[tuple[int, int]] = []  # a batch, as (job, index)
        self._n_passed = 0  # batches since then
        self._is_again = False  # the last batch was one that had been given up
        self._is_small = False  # the last batch began with a small job

    @property
    def idle(self) -> bool:
        return not self._shares and not self._given_up

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
            share.n_left += n_tokens
        if window:
            share.windows.append(window)
        if share.windows:
            self._shares[job] = share

    def cancel(self, job: int) -> None:
        """Forget a job. Unknown ones are fine: it may just have ended."""
        self._shares.pop(job, None)
        self._given_up = [text for text in self._given_up if text[0] != job]

    @property
    def may_give_up(self) -> bool:
        """The last batch is of no small jobs and was not given up before, nor does another one wait
        to come again."""
        return not (self._is_small or self._is_again or self._given_up)

    def give_up(self, batch: list[tuple[int, int]]) -> None:
        """The last batch was not computed."""
        self._given_up, self._n_passed = batch, 0

    def plan(self) -> list[tuple[int, int]]:
        """The next batch, as (job, index) of its texts; empty only when idle."""
        shares = list(self._shares.values())
        self._is_small = self._is_again = False
        if self._given_up:
            own = {job for job, _ in self._given_up}  # their later texts may need these
            small = [share for share in shares if share.is_small and share.job not in own]
            self._n_passed += 1
            if not small or self._n_passed > MAX_PASSED:
                batch, self._given_up = self._given_up, []
                self._is_again = True
                return batch
            shares = small
        for share in shares:
            share.n_passed += 1
        batch = []
        room = self._n_tokens
        while shares and len(batch) < self._n_sequences:
            if not batch:
                overdue = [s for s in shares if s.n_passed > MAX_PASSED]
                share = overdue[0] if overdue else min(shares, key=_need)
                at = share.longest()
                self._is_small = share.is_small
                if self._is_small:
                    shares = [share for share in shares if share.is_small]
            else:
                fitting = [s for s in shares if s.longest(room) is not None]
                if not fitting:
                    break
                share = min(fitting, key=_need)
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


def _need(share: _Share) -> tuple[int, int]:
    return share.n_had, share.n_left
