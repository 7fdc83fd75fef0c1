"""A scheduler on cells that are lists of tokens, for tests that are lists of calls."""

import random
from array import array
from collections.abc import Callable
from collections.abc import Sequence as Sequence_
from typing import Any

import numpy as np
import pytest

from engine.pace import Pace
from engine.prefix import PrefixTree
from engine.scheduler import Scheduler
from engine.speculation import Speculation
from engine.types import Batch, Chunk, Sequence

BLOCK = 256  # tokens that are saved at once


class Memory:
    """What a decoder remembers: cells with a token each, which slots may share. `is_cells=False`
    is a memory that cannot be saved, and cut and shared only where it was marked; but it can take
    back guesses of the last step if it `takes_back`. It refuses what it may refuse in so many cases
    of one."""

    def __init__(
        self,
        n_slots: int,
        n_cells: int,
        *,
        is_cells: bool = True,
        takes_back: bool = True,
        shares_cells: bool = True,
        refuses: float = 0.0,
    ) -> None:
        self.slots: list[list[list[int]]] = [[] for _ in range(n_slots)]
        self.n_cells = n_cells
        self.is_cells, self.can_mark, self.block = is_cells, not is_cells, BLOCK
        self.shares_cells, self.takes_back = shares_cells, takes_back
        self.n_loaded = 0
        self.n_rewound = 0  # times
        self._uncut: set[int] = set()  # slots that share what must be cut first
        self._ends: dict[int, int] = {}  # of what the last step computed but guesses, by slot
        self.refuses, self._dice = refuses, random.Random(1)

    def accepts(self) -> bool:
        return self._dice.random() >= self.refuses

    def truncate(self, slot: int, n_tokens: int) -> bool:
        if not self.is_cells:
            assert self.takes_back
            assert n_tokens >= self._ends[slot], "only guesses of the last step are taken back"
        if not self.accepts():
            return False
        del self.slots[slot][n_tokens:]
        return True

    def share(self, source: int, slot: int, n_tokens: int) -> None:
        assert self.slots[slot] == []
        self.slots[slot] = self.slots[source][:n_tokens]
        if not self.shares_cells:
            self.slots[slot] = [list(cell) for cell in self.slots[slot]]
        if not self.is_cells:
            self._uncut.add(slot)

    def save(self, slot: int, start: int, end: int) -> Any:
        assert self.is_cells
        return np.array(self.tokens(slot)[start:end], np.int32) if self.accepts() else None

    def load(self, slot: int, saved: Any, start: int, end: int) -> bool:
        assert self.n_used + len(saved) <= self.n_cells
        assert len(self.slots[slot]) == start
        if not self.accepts():
            return False
        self.n_loaded += len(saved)
        self.slots[slot] += [[int(token)] for token in saved[: end - start]]
        return True

    def mark(self, slot: int, max_bytes: int, *, is_whole: bool = False) -> Any:
        assert not self.is_cells
        if 4 * len(self.slots[slot]) > max_bytes or not self.accepts():
            return None
        return np.array(self.tokens(slot), np.int32)

    def rewind(self, slot: int, saved: Any, n_tokens: int) -> bool:
        assert not self.is_cells
        assert self.tokens(slot)[:n_tokens] == saved.tolist(), "a mark is of what is before it"
        if not self.accepts():
            return False
        del self.slots[slot][n_tokens:]
        self._uncut.discard(slot)
        self.n_rewound += 1
        return True

    def clear(self, slot: int) -> None:
        self.slots[slot] = []
        self._uncut.discard(slot)

    def tokens(self, slot: int) -> list[int]:
        return [token for (token,) in self.slots[slot]]

    @property
    def n_used(self) -> int:
        return len({id(cell) for slot in self.slots for cell in slot})

    def decode(self, batch: Batch) -> None:
        self._ends = {chunk.slot: chunk.end for chunk in batch.chunks}
        for chunk in batch.chunks:
            cells = self.slots[chunk.slot]
            assert chunk.slot not in self._uncut
            assert len(cells) == chunk.start, "a chunk begins where the cells of its slot end"
            cells += [[token] for token in chunk.tokens]
        assert self.n_used <= self.n_cells


class FixedPace(Pace):
    """So many prompt tokens for each step."""

    def __init__(self, n_tokens: int) -> None:
        self.n_tokens = n_tokens

    def n_prefill(self, n_decodes: int, n_most: int, burst: Sequence_[int] = ()) -> int:
        return min(self.n_tokens, n_most)

    def observe(
        self, n_decodes: int, n_prefill: int, seconds: float, *, is_beginning: bool = False
    ) -> None:
        assert n_decodes == 0 or n_prefill <= self.n_tokens


class FixedSpeculation(Speculation):
    """So many guesses for each sequence, whatever they cost."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n

    def plan(self, trusts: list[float], n_others: int, n_room: int) -> list[int]:
        n_each = max(min(self.n, n_room // max(len(trusts), 1)), 0)
        return [n_each] * len(trusts)


def next_token(cells: list[int]) -> int:
    """Depends on every cell and its position, so that a wrong cell gives a wrong answer."""
    return hash(tuple(cells)) % 1000


def repetitive_token(cells: list[int]) -> int:
    """The same, but mostly what stood three before."""
    surprise = hash(tuple(cells))
    return cells[-3] if surprise % 4 and len(cells) > 3 else surprise % 3


def answer_to(
    prompt: list[int], n_tokens: int, next_token: Callable[[list[int]], int] = next_token
) -> list[int]:
    tokens = list(prompt)
    for _ in range(n_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class Bench:
    """A scheduler with its cells; `step` computes a batch as an engine would."""

    def __init__(
        self,
        *,
        n_slots: int = 4,
        n_ctx: int = 1000,
        n_cells: int = 1000,
        n_batch: int = 100,
        n_prefill: int = 1000,
        n_scored: int = 64,
        tree_bytes: int = 1 << 20,  # four for each token
        is_cells: bool = True,
        takes_back: bool = True,
        shares_cells: bool = True,
        refuses: float = 0.0,
        speculation: Speculation | None = None,
        next_token: Callable[[list[int]], int] = next_token,
    ) -> None:
        self.next_token = next_token
        self.memory = Memory(
            n_slots,
            n_cells,
            is_cells=is_cells,
            takes_back=takes_back,
            shares_cells=shares_cells,
            refuses=refuses,
        )
        self.n_batch = n_batch
        self.tree = PrefixTree(tree_bytes)
        self.scheduler = Scheduler(
            self.memory,
            n_slots=n_slots,
            n_ctx=n_ctx,
            n_cells=n_cells,
            n_batch=n_batch,
            pace=FixedPace(n_prefill),
            tree=self.tree,
            speculation=speculation,
            n_scored=n_scored,
        )
        self.n_scored = n_scored
        self.scored: dict[int, list[int]] = {}  # where the next token was scored, by id
        self.tree_bytes = tree_bytes
        self.n_decoded = 0  # prompt tokens
        self.n_guessed = self.n_right = 0
        self.sequences: dict[int, Sequence] = {}  # what was added and has not ended
        self.wanted: dict[int, int] = {}
        self.answers: dict[int, list[int]] = {}  # of those that got all they wanted
        self.started: list[int] = []

    def add(
        self,
        id: int,
        prompt: list[int],
        n_wanted: int = 1000,
        rank: float = 0.0,
        reuses: bool = True,
        goes_on_from: int | None = None,
        prompt_logprobs: int | None = None,
    ) -> Sequence:
        sequence = Sequence(
            id,
            array("i", prompt),
            rank=rank,
            reuses=reuses,
            goes_on_from=goes_on_from,
            prompt_logprobs=prompt_logprobs,
        )
        self.sequences[id] = sequence
        self.wanted[id] = n_wanted
        self.scheduler.add(sequence)
        return sequence

    def cancel(self, id: int) -> None:
        self.sequences.pop(id, None)
        self.scheduler.cancel(id)

    def step(self) -> dict[int, int]:
        """Number of tokens that each sequence had in the batch, by id."""
        batch = self.plan()
        self.commit(batch)
        return {c.sequence.id: c.n_tokens + len(c.guesses) for c in batch.chunks}

    def plan(self) -> Batch:
        batch, started = self.scheduler.plan()
        self.started += [sequence.id for sequence in started]
        assert batch.n_tokens == sum(len(chunk.tokens) for chunk in batch.chunks) <= self.n_batch
        assert all(chunk.n_tokens > 0 for chunk in batch.chunks)
        assert sum(chunk.n_scored for chunk in batch.chunks) <= self.n_scored
        ids = [chunk.sequence.id for chunk in batch.chunks]
        assert len(ids) == len(set(ids)), "one chunk for each sequence"
        return batch

    def commit(self, batch: Batch, seconds: float = 0.1) -> None:
        self.memory.decode(batch)
        wanting = [chunk for chunk in batch.chunks if chunk.wants_logits]
        for chunk in batch.chunks:
            first = chunk.end - chunk.n_wanted
            if chunk.n_scored:
                assert first >= chunk.start
                places = self.scored.setdefault(chunk.sequence.id, [])
                places += range(first, first + chunk.n_scored)
        self.n_decoded += batch.n_prefill
        self.n_guessed += batch.n_guesses
        self.scheduler.commit(batch, seconds)
        for chunk in wanting:
            self.take(chunk)
        self.check()

    def take(self, chunk: Chunk) -> None:
        """Tokens for one sequence, while its guesses are right and it wants more."""
        sequence, is_right = chunk.sequence, True
        while is_right and sequence.id in self.sequences:
            token = self.next_token(self.cells_of(sequence)[: len(sequence.tokens)])
            is_right = self.scheduler.take(chunk, token)
            self.n_right += is_right
            answer = list(sequence.tokens[sequence.n_prompt :])
            if len(answer) >= self.wanted[sequence.id]:
                self.answers[sequence.id] = answer
                self.cancel(sequence.id)

    def check(self) -> None:
        held = set()
        for sequence in self.sequences.values():
            if sequence.slot is None:
                assert sequence.n_past == 0
            else:
                assert self.cells_of(sequence) == list(sequence.tokens[: sequence.n_past])
                assert sequence.slot not in held, "a slot belongs to one sequence"
                held.add(sequence.slot)
        cells = self.scheduler._cells
        assert self.memory.n_cells - cells.n_free == self.memory.n_used, "cells are counted"
        assert [list(t) for t in cells.tokens] == [
            self.memory.tokens(slot) for slot in range(len(self.memory.slots))
        ]
        assert self.tree.n_bytes <= self.tree_bytes
        assert cells._marks.n_bytes <= self.tree_bytes

    def cells_of(self, sequence: Sequence) -> list[int]:
        assert sequence.slot is not None
        return self.memory.tokens(sequence.slot)

    def run(self, max_steps: int = 1000) -> int:
        """Until all is idle, which takes so many steps."""
        for n_steps in range(max_steps):
            if self.scheduler.idle:
                return n_steps
            assert self.step(), "while anything is there to do, something is done"
        pytest.fail("it does not end")

    def talk(self, id: int, prompt: list[int], n_wanted: int = 1) -> Sequence:
        """Add a sequence and run until all is idle. It is returned for its `n_cached`."""
        sequence = self.add(id, prompt, n_wanted)
        self.run()
        return sequence


def tokens(first: int, n: int) -> list[int]:
    """`n` tokens that no other `first` (a multiple of 1000) has."""
    return [first + i for i in range(n)]
