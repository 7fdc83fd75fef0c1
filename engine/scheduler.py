"""Decides which tokens of which sequences the next decode call computes.

No thread, clock or I/O: `add`, `plan`, `commit`, `cancel` and `fail` are plain calls, and only the
memory that is passed in is touched. A plan is made so:

1. Waiting sequences get slots, first come first served, while their whole prompt fits beside what
   runs. A slot keeps its cells when its sequence ends; a newcomer that begins with the same tokens
   decodes only the rest.
2. Every sequence that is past its prompt gets one token. Where cells are missing, idle slots are
   forgotten, least recently used first, and then the youngest running sequence is preempted: it
   goes back to the queue with its tokens and its sampler.
3. What is left of the batch goes to prompts, first come first served.
"""

from bisect import insort
from dataclasses import dataclass, field

import numpy as np

from engine.backends.base import Memory
from engine.types import Batch, Sequence


@dataclass(slots=True, eq=False)
class Slot:
    """Cells of one sequence at a time. Idle, it remembers the tokens of the last one."""

    index: int
    sequence: Sequence | None = None
    remembered: list[int] = field(default_factory=list)
    last_used: int = 0

    @property
    def n_cells(self) -> int:
        return self.sequence.n_past if self.sequence else len(self.remembered)


class Scheduler:
    def __init__(self, memory: Memory, *, n_slots: int, n_cells: int, n_batch: int) -> None:
        self._memory = memory
        self._n_cells = n_cells
        self._n_admitted = n_cells  # tokens that may run together; less where the memory says so
        self._n_batch = n_batch
        self._slots = [Slot(i) for i in range(n_slots)]
        self._waiting: list[Sequence] = []  # by age: ids grow with arrival
        self._running: list[Sequence] = []  # by age
        self._n_plans = 0

    @property
    def idle(self) -> bool:
        return not self._waiting and not self._running

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Its prompt must be shorter than the cells."""
        insort(self._waiting, sequence, key=lambda s: s.id)

    def cancel(self, id: int) -> None:
        """Forget a sequence, wherever it is. Its slot keeps the cells for who comes next."""
        for sequence in self._waiting:
            if sequence.id == id:
                self._waiting.remove(sequence)
                return
        for sequence in self._running:
            if sequence.id == id:
                self._release(sequence, keep=True)
                return

    def plan(self) -> tuple[Batch, list[Sequence]]:
        """The next batch (empty when idle) and the sequences that got their first slot for it."""
        self._n_plans += 1
        started = self._admit()
        batch = Batch()
        self._plan_decodes(batch)
        self._plan_prefills(batch)
        return batch, started

    def commit(self, batch: Batch, sampled: list[int]) -> None:
        """The batch was computed; `sampled` has a token for each chunk that wanted logits."""
        tokens = iter(sampled)
        for chunk in batch.chunks:
            wants_logits = chunk.wants_logits
            chunk.sequence.n_past = chunk.end
            if wants_logits:
                chunk.sequence.tokens.append(next(tokens))

    def fail(self, batch: Batch) -> list[Sequence]:
        """The batch could not be computed: its sequences end and their cells are freed."""
        failed = [chunk.sequence for chunk in batch.chunks]
        for sequence in failed:
            self._release(sequence, keep=False)
        return failed

    def preempt_youngest(self) -> bool:
        """Send the youngest running sequence back to the queue. False if it runs alone."""
        if len(self._running) < 2:
            return False
        # without this bound it would come back to where it did not fit, and nobody would go on
        self._n_admitted = min(self._n_admitted, sum(len(s.tokens) for s in self._running))
        sequence = self._running[-1]
        self._release(sequence, keep=False)
        self.add(sequence)
        return True

    # 1. slots

    def _admit(self) -> list[Sequence]:
        started = []
        while self._waiting:
            sequence = self._waiting[0]
            n_running = sum(len(s.tokens) for s in self._running)
            if self._running and n_running + len(sequence.tokens) >= self._n_admitted:
                break
            slot, n_match = self._choose_slot(sequence.tokens)
            if slot is None:
                break
            del self._waiting[0]
            self._occupy(slot, sequence, n_match)
            if not sequence.has_started:
                sequence.has_started = True
                sequence.n_cached = sequence.n_past
                started.append(sequence)
        return started

    def _choose_slot(self, tokens: list[int]) -> tuple[Slot | None, int]:
        """The slot for a newcomer with these tokens, and how many of its cells can be kept.

        1. The idle slot with the longest match, if that is at least half of what it remembers:
           the conversation goes on there. A shorter match must not cost another conversation.
        2. An empty slot.
        3. The least recently used idle slot.
        """
        idle = [slot for slot in self._slots if slot.sequence is None]
        if not idle:
            return None, 0
        wanted = np.array(tokens[:-1], dtype=np.int32)  # the last one is decoded for its logits
        matches = {slot.index: _n_common(slot.remembered, wanted) for slot in idle}
        best = max(idle, key=lambda slot: matches[slot.index])
        if 2 * matches[best.index] >= len(best.remembered) > 0 and matches[best.index] > 0:
            return best, matches[best.index]
        slot = min(idle, key=lambda slot: (len(slot.remembered) > 0, slot.last_used))
        return slot, matches[slot.index]

    def _occupy(self, slot: Slot, sequence: Sequence, n_match: int) -> None:
        if n_match < len(slot.remembered) and not self._memory.truncate(slot.index, n_match):
            n_match = 0
        if n_match == 0 and slot.remembered:
            self._memory.clear(slot.index)
        slot.remembered = []
        slot.sequence = sequence
        sequence.slot = slot.index
        sequence.n_past = n_match
        insort(self._running, sequence, key=lambda s: s.id)

    def _release(self, sequence: Sequence, *, keep: bool) -> None:
        assert sequence.slot is not None
        slot = self._slots[sequence.slot]
        slot.sequence = None
        slot.remembered = sequence.tokens[: sequence.n_past] if keep else []
        slot.last_used = self._n_plans
        if not keep:
            self._memory.clear(slot.index)
        sequence.slot = None
        sequence.n_past = 0
        self._running.remove(sequence)

    # 2. one token for each sequence that is past its prompt

    def _plan_decodes(self, batch: Batch) -> None:
        while True:
            decoding = [s for s in self._running if s.n_pending == 1]
            if self._n_free() >= len(decoding) or not self._make_room(len(decoding)):
                break
        for sequence in decoding[: self._n_batch]:
            batch.add(sequence, 1)

    def _n_free(self) -> int:
        return self._n_cells - sum(slot.n_cells for slot in self._slots)

    def _make_room(self, n_wanted: int) -> bool:
        """Free some cells; False when everything that can be given up has been."""
        return self.forget_idle(n_wanted) or self.preempt_youngest()

    def forget_idle(self, n_wanted: int) -> bool:
        """Clear idle slots, least recently used first, until `n_wanted` cells are free.
        False if there was none to clear."""
        idle = [s for s in self._slots if s.sequence is None and s.remembered]
        for slot in sorted(idle, key=lambda slot: slot.last_used):
            self._memory.clear(slot.index)
            slot.remembered = []
            if self._n_free() >= n_wanted:
                break
        return bool(idle)

    # 3. prompts

    def _plan_prefills(self, batch: Batch) -> None:
        prefilling = [s for s in self._running if s.n_pending > 1]
        n_wanted = min(self._n_batch - batch.n_tokens, sum(s.n_pending for s in prefilling))
        if self._n_free() - batch.n_tokens < n_wanted:
            self.forget_idle(batch.n_tokens + n_wanted)
        n_left = min(n_wanted, self._n_free() - batch.n_tokens)
        for sequence in prefilling:
            n_tokens = min(sequence.n_pending, n_left)
            if n_tokens <= 0:
                break
            batch.add(sequence, n_tokens)
            n_left -= n_tokens


def _n_common(remembered: list[int], wanted: "np.ndarray[tuple[int], np.dtype[np.int32]]") -> int:
    """How many tokens two sequences share at their beginning."""
    n = min(len(remembered), len(wanted))
    if n == 0 or remembered[0] != wanted[0]:
        return 0
    differs = np.array(remembered[:n], dtype=np.int32) != wanted[:n]
    first = int(differs.argmax())
    return first if differs[first] else n
