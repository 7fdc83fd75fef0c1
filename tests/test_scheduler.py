"""The scheduler as lists of plain calls, on cells that are lists of tokens."""

import random
from array import array
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.cells import BLOCK
from engine.pace import MIN_TOKENS, Pace
from engine.prefix import PrefixTree
from engine.scheduler import AGEING, WORTH_WAITING_FOR, Scheduler
from engine.types import Batch, Sequence


class Memory:
    """What a decoder remembers: cells with a token each, which slots may share. `is_cells=False`
    is a memory that cannot be cut, shared or saved."""

    def __init__(self, n_slots: int, n_cells: int, *, is_cells: bool = True) -> None:
        self.slots: list[list[list[int]]] = [[] for _ in range(n_slots)]
        self.n_cells = n_cells
        self.is_cells = is_cells
        self.n_loaded = 0

    def truncate(self, slot: int, n_tokens: int) -> bool:
        assert self.is_cells
        del self.slots[slot][n_tokens:]
        return True

    def share(self, source: int, slot: int, n_tokens: int) -> None:
        assert self.is_cells
        assert self.slots[slot] == []
        self.slots[slot] = self.slots[source][:n_tokens]

    def save(self, slot: int, start: int, end: int) -> Any:
        assert self.is_cells
        return np.array(self.tokens(slot)[start:end], np.int32)

    def load(self, slot: int, saved: Any, start: int, end: int) -> bool:
        assert self.n_used + len(saved) <= self.n_cells
        assert len(self.slots[slot]) == start
        self.n_loaded += len(saved)
        self.slots[slot] += [[int(token)] for token in saved[: end - start]]
        return True

    def clear(self, slot: int) -> None:
        self.slots[slot] = []

    def tokens(self, slot: int) -> list[int]:
        return [token for (token,) in self.slots[slot]]

    @property
    def n_used(self) -> int:
        return len({id(cell) for slot in self.slots for cell in slot})

    def decode(self, batch: Batch) -> None:
        for chunk in batch.chunks:
            cells = self.slots[chunk.slot]
            assert len(cells) == chunk.start, "a chunk begins where the cells of its slot end"
            cells += [[token] for token in chunk.sequence.tokens[chunk.start : chunk.end]]
        assert self.n_used <= self.n_cells


class FixedPace(Pace):
    """So many prompt tokens for each step."""

    def __init__(self, n_tokens: int) -> None:
        self.n_tokens = n_tokens

    def n_prefill(self, n_decodes: int) -> int:
        return self.n_tokens

    def observe(self, n_decodes: int, n_prefill: int, seconds: float) -> None:
        assert n_prefill <= self.n_tokens


def next_token(cells: list[int]) -> int:
    """Depends on every cell and its position, so that a wrong cell gives a wrong answer."""
    return hash(tuple(cells)) % 1000


def answer_to(prompt: list[int], n_tokens: int) -> list[int]:
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
        n_cells: int = 1000,
        n_batch: int = 100,
        n_prefill: int = 1000,
        tree_bytes: int = 1 << 20,  # four for each token
        is_cells: bool = True,
    ) -> None:
        self.memory = Memory(n_slots, n_cells, is_cells=is_cells)
        self.n_batch = n_batch
        self.tree = PrefixTree(tree_bytes)
        self.scheduler = Scheduler(
            self.memory,
            n_slots=n_slots,
            n_cells=n_cells,
            n_batch=n_batch,
            pace=FixedPace(n_prefill),
            tree=self.tree,
        )
        self.tree_bytes = tree_bytes
        self.n_decoded = 0  # prompt tokens
        self.sequences: dict[int, Sequence] = {}  # what was added and has not ended
        self.wanted: dict[int, int] = {}
        self.answers: dict[int, list[int]] = {}  # of those that got all they wanted
        self.started: list[int] = []

    def add(self, id: int, prompt: list[int], n_wanted: int = 1000, turn: int = 0) -> Sequence:
        sequence = self.sequences[id] = Sequence(id, array("i", prompt), turn=turn)
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
        return {chunk.sequence.id: chunk.n_tokens for chunk in batch.chunks}

    def plan(self) -> Batch:
        batch, started = self.scheduler.plan()
        self.started += [sequence.id for sequence in started]
        assert batch.n_tokens == sum(chunk.n_tokens for chunk in batch.chunks) <= self.n_batch
        assert all(chunk.n_tokens > 0 for chunk in batch.chunks)
        ids = [chunk.sequence.id for chunk in batch.chunks]
        assert len(ids) == len(set(ids)), "one chunk for each sequence"
        return batch

    def commit(self, batch: Batch, seconds: float = 0.1) -> None:
        self.memory.decode(batch)
        wanting = [chunk.sequence for chunk in batch.chunks if chunk.wants_logits]
        sampled = [next_token(self.cells_of(sequence)) for sequence in wanting]
        self.n_decoded += batch.n_tokens - batch.n_decodes
        self.scheduler.commit(batch, seconds)
        for sequence, token in zip(wanting, sampled, strict=True):
            sequence.tokens.append(token)
        for sequence in wanting:
            answer = list(sequence.tokens[sequence.n_prompt :])
            if len(answer) >= self.wanted[sequence.id]:
                self.answers[sequence.id] = answer
                self.cancel(sequence.id)
        self.check()

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

    def cells_of(self, sequence: Sequence) -> list[int]:
        assert sequence.slot is not None
        return self.memory.tokens(sequence.slot)

    def run(self, max_steps: int = 1000) -> None:
        for _ in range(max_steps):
            if self.scheduler.idle:
                return
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


# continuous batching


def test_nothing_to_do_is_an_empty_batch() -> None:
    bench = Bench()
    assert bench.scheduler.idle
    batch, started = bench.scheduler.plan()
    assert (batch.chunks, batch.n_tokens, started) == ([], 0, [])


def test_a_prompt_is_decoded_in_one_batch_and_then_a_token_at_a_time() -> None:
    bench = Bench()
    bench.add(1, tokens(1000, 7))
    assert not bench.scheduler.idle
    assert [bench.step() for _ in range(3)] == [{1: 7}, {1: 1}, {1: 1}]


def test_sequences_join_and_leave_at_any_step() -> None:
    bench = Bench()
    bench.add(1, tokens(1000, 5))
    assert bench.step() == {1: 5}
    bench.add(2, tokens(2000, 3))
    assert bench.step() == {1: 1, 2: 3}
    bench.add(3, tokens(3000, 2))
    bench.cancel(1)
    assert bench.step() == {2: 1, 3: 2}
    bench.cancel(2)
    assert bench.step() == {3: 1}
    bench.cancel(3)
    assert bench.scheduler.idle
    assert bench.step() == {}


def test_each_sequence_gets_the_answer_it_would_get_alone() -> None:
    bench = Bench(n_slots=3, n_batch=5)
    prompts = {id: tokens(1000 * id, 2 + 3 * id) for id in range(1, 7)}
    for id, prompt in prompts.items():
        bench.add(id, prompt, n_wanted=2 * id)
    bench.run()
    assert bench.answers == {id: answer_to(prompt, 2 * id) for id, prompt in prompts.items()}


def test_a_sequence_starts_once_and_in_the_order_of_arrival() -> None:
    bench = Bench(n_slots=2)
    for id in (1, 2, 3, 4):
        bench.add(id, tokens(1000 * id, 4), n_wanted=id)
    bench.step()
    assert bench.started == [1, 2]
    bench.run()
    assert bench.started == [1, 2, 3, 4]


def test_a_newcomer_waits_while_its_prompt_does_not_fit_and_nobody_overtakes_it() -> None:
    bench = Bench(n_slots=4, n_cells=20)
    bench.add(1, tokens(1000, 10))
    bench.add(2, tokens(2000, 10))  # with this the cells would be full, and nobody could go on
    bench.add(3, tokens(3000, 1))
    assert bench.step() == {1: 10}
    assert bench.step() == {1: 1}
    bench.cancel(1)
    assert bench.step() == {2: 10, 3: 1}


def test_a_prompt_one_short_of_all_cells_runs_alone() -> None:
    bench = Bench(n_cells=20)
    bench.talk(1, tokens(1000, 19), n_wanted=2)
    assert bench.answers[1] == answer_to(tokens(1000, 19), 2)


# prompts in chunks


def test_a_long_prompt_is_cut_to_the_batch() -> None:
    bench = Bench(n_batch=8)
    bench.add(1, tokens(1000, 20))
    assert [bench.step() for _ in range(4)] == [{1: 8}, {1: 8}, {1: 4}, {1: 1}]


def test_a_long_prompt_stalls_no_decode() -> None:
    bench = Bench(n_batch=8)
    bench.add(1, tokens(1000, 3))
    bench.step()
    bench.add(2, tokens(2000, 20))
    assert [bench.step() for _ in range(4)] == [
        {1: 1, 2: 7},
        {1: 1, 2: 7},
        {1: 1, 2: 6},
        {1: 1, 2: 1},
    ]


def test_short_prompts_share_a_batch_first_come_first_served() -> None:
    bench = Bench(n_batch=8)
    for id in (1, 2, 3):
        bench.add(id, tokens(1000 * id, 5))
    assert bench.step() == {1: 5, 2: 3}
    assert bench.step() == {1: 1, 2: 2, 3: 5}
    assert bench.step() == {1: 1, 2: 1, 3: 1}


def test_only_the_chunk_at_the_end_of_a_prompt_wants_logits() -> None:
    bench = Bench(n_batch=8)
    sequence = bench.add(1, tokens(1000, 12))
    (chunk,) = bench.plan().chunks
    assert (chunk.start, chunk.end, chunk.wants_logits) == (0, 8, False)
    bench.commit(bench.plan())
    assert (sequence.n_past, len(sequence.tokens)) == (8, 12)
    (chunk,) = bench.plan().chunks
    assert (chunk.start, chunk.end, chunk.wants_logits) == (8, 12, True)


def test_more_decodes_than_a_batch_holds_all_come_to_their_end() -> None:
    bench = Bench(n_slots=4, n_batch=2)
    for id in (1, 2, 3, 4):
        bench.add(id, tokens(1000 * id, 1), n_wanted=3)
    bench.run()
    assert bench.answers == {id: answer_to(tokens(1000 * id, 1), 3) for id in (1, 2, 3, 4)}


# prefix reuse


def test_the_next_turn_of_a_conversation_decodes_only_what_is_new() -> None:
    bench = Bench()
    bench.talk(1, tokens(1000, 10), n_wanted=5)
    history = tokens(1000, 10) + bench.answers[1]
    second = bench.talk(2, history + tokens(2000, 3), n_wanted=4)
    # the last token that was sampled has no cell: nothing came after it
    assert second.n_cached == 14
    assert bench.answers[2] == answer_to(history + tokens(2000, 3), 4)


def test_the_same_prompt_again_decodes_its_last_token_for_the_logits() -> None:
    bench = Bench()
    prompt = tokens(1000, 10)
    bench.talk(1, prompt, n_wanted=3)
    again = bench.add(2, prompt, n_wanted=3)
    assert bench.step() == {2: 1}
    assert again.n_cached == 9
    bench.run()
    assert bench.answers[2] == bench.answers[1]


def test_a_regenerated_turn_keeps_what_comes_before_it() -> None:
    bench = Bench()
    bench.talk(1, tokens(1000, 10), n_wanted=8)
    edited = tokens(1000, 9) + tokens(2000, 4)
    assert bench.talk(2, edited, n_wanted=4).n_cached == 9
    assert bench.answers[2] == answer_to(edited, 4)


def test_each_conversation_finds_its_own_slot() -> None:
    bench = Bench(n_slots=3)
    first = {id: tokens(1000 * id, 10) for id in (1, 2, 3)}
    for id, prompt in first.items():
        bench.talk(id, prompt)
    for id in (2, 3, 1):
        assert bench.talk(10 + id, [*first[id], 7, 8]).n_cached == 10


def test_a_short_match_is_used_and_does_not_overwrite_the_other_conversation() -> None:
    bench = Bench(n_slots=2)
    system = tokens(1000, 4)
    bench.talk(1, system + tokens(2000, 20))
    assert bench.talk(2, system + tokens(3000, 20)).n_cached == 4
    assert bench.talk(3, system + tokens(2000, 20) + [7]).n_cached == 24
    assert bench.talk(4, system + tokens(3000, 20) + [7]).n_cached == 24


def test_the_longest_match_is_taken() -> None:
    bench = Bench(n_slots=3)
    bench.add(1, tokens(1000, 6) + tokens(2000, 3), n_wanted=1)
    bench.add(2, tokens(1000, 8) + tokens(3000, 1), n_wanted=1)
    bench.run()
    assert bench.talk(3, tokens(1000, 12)).n_cached == 8


def test_many_conversations_are_remembered_beyond_the_slots_and_the_cells() -> None:
    bench = Bench(n_slots=2, n_cells=64)
    for id in range(1, 9):
        bench.talk(id, tokens(1000 * id, 30))
    for id in range(1, 9):
        assert bench.talk(10 + id, [*tokens(1000 * id, 30), 7]).n_cached == 30


def test_what_is_remembered_is_bounded_and_the_least_recently_used_is_forgotten() -> None:
    bench = Bench(n_slots=1, tree_bytes=4 * 65)
    for id in (1, 2, 3):
        bench.talk(id, tokens(1000 * id, 30))
    assert bench.talk(4, [*tokens(1000, 30), 7]).n_cached == 30  # moves 3 out, and 2 is too much
    assert bench.talk(5, [*tokens(2000, 30), 7]).n_cached == 0


def test_a_running_sequence_shares_its_cells() -> None:
    bench = Bench(n_slots=3, n_cells=64)
    bench.add(1, tokens(1000, 40))
    bench.step()
    twin = bench.add(2, tokens(1000, 40))
    cousin = bench.add(3, tokens(1000, 35) + tokens(2000, 5))
    assert bench.step() == {1: 1, 2: 1, 3: 5}
    assert (twin.n_cached, cousin.n_cached) == (39, 35)
    assert bench.memory.n_used == 41 + 1 + 5


def test_shared_cells_stay_while_anybody_holds_them() -> None:
    bench = Bench(n_slots=3, n_cells=64)
    bench.add(1, tokens(1000, 40))
    bench.step()
    bench.add(2, tokens(1000, 40), n_wanted=6)
    bench.step()
    bench.cancel(1)
    bench.add(3, tokens(3000, 2), n_wanted=1)  # moves out what nobody runs in
    bench.run()
    assert bench.answers[2] == answer_to(tokens(1000, 40), 6)


def test_newcomers_with_a_common_beginning_wait_for_one_prefill_and_share_it() -> None:
    bench = Bench(n_slots=8, n_batch=16)
    system = tokens(1000, 100)
    for id in range(1, 9):
        bench.add(id, system + tokens(2000 + 10 * id, 5), n_wanted=3)
    bench.run()
    assert bench.n_decoded == 100 + 8 * 5
    assert bench.answers == {
        id: answer_to(system + tokens(2000 + 10 * id, 5), 3) for id in range(1, 9)
    }


def test_those_who_wait_for_a_prefill_hold_nobody_up() -> None:
    bench = Bench(n_slots=4, n_batch=16)
    bench.add(1, tokens(1000, 100))
    bench.add(2, tokens(1000, 100))
    bench.add(3, tokens(3000, 4))
    assert bench.step() == {3: 4, 1: 12}


def test_who_waits_for_a_prefill_that_is_cancelled_goes_on_with_it() -> None:
    bench = Bench(n_slots=4, n_batch=16)
    bench.add(1, tokens(1000, 100))
    second = bench.add(2, tokens(1000, 100), n_wanted=2)
    bench.step()
    bench.step()
    bench.cancel(1)
    bench.run()
    assert second.n_cached == 32
    assert bench.answers[2] == answer_to(tokens(1000, 100), 2)


def test_a_short_common_beginning_is_not_worth_waiting_for() -> None:
    bench = Bench(n_slots=2, n_batch=100)
    common = tokens(1000, WORTH_WAITING_FOR - 1)
    bench.add(1, common + tokens(2000, 5))
    bench.add(2, common + tokens(3000, 5))
    assert set(bench.step()) == {1, 2}


def test_idle_cells_move_out_a_block_in_each_step_while_somebody_runs() -> None:
    bench = Bench(n_slots=4, n_cells=2000, n_batch=1000)
    for id in (1, 2):
        bench.add(id, tokens(10_000 * id, BLOCK + 50), n_wanted=1)
    bench.run()
    assert bench.memory.n_used == 2 * (BLOCK + 50)
    bench.add(3, tokens(50_000, 5))
    used = []
    for _ in range(6):
        bench.step()
        used.append(bench.memory.n_used - bench.sequences[3].n_past)
    assert used == [2 * BLOCK + 100, BLOCK + 50, BLOCK + 50, 0, 0, 0]
    for id in (1, 2):
        twin = bench.add(10 + id, tokens(10_000 * id, BLOCK + 50), n_wanted=1)
        bench.step()
        assert twin.n_cached == BLOCK + 49


def test_only_the_blocks_that_are_wanted_come_back() -> None:
    bench = Bench(n_slots=1, n_cells=2000, n_batch=2000)
    bench.talk(1, tokens(1000, 3 * BLOCK))
    bench.talk(2, tokens(9000, 5))
    bench.memory.n_loaded = 0
    assert bench.talk(3, [*tokens(1000, 20), 7]).n_cached == 20
    assert bench.memory.n_loaded == BLOCK


def test_the_first_answers_of_all_jobs_come_before_the_second_ones() -> None:
    bench = Bench(n_slots=2)
    for id in range(1, 9):
        bench.add(id, tokens(1000, 10), n_wanted=2, turn=id - 1)
    bench.step()
    bench.step()
    bench.add(9, tokens(9000, 3), n_wanted=1)
    bench.run()
    assert list(bench.answers).index(9) <= 3


def test_a_prompt_cached_up_to_its_last_token_goes_beside_the_decodes() -> None:
    bench = Bench(n_slots=2, n_batch=4)
    bench.talk(1, tokens(1000, 12))
    bench.add(2, tokens(2000, 3))
    bench.step()
    bench.add(3, tokens(1000, 12))
    assert bench.step() == {2: 1, 3: 1}


def test_memory_that_cannot_drop_an_end_decodes_the_whole_prompt_again() -> None:
    bench = Bench(is_cells=False)
    prompt = tokens(1000, 10)
    bench.talk(1, prompt, n_wanted=5)
    again = bench.talk(2, prompt, n_wanted=5)
    assert again.n_cached == 0
    assert bench.answers[2] == bench.answers[1] == answer_to(prompt, 5)


def test_memory_that_cannot_drop_an_end_still_goes_on_where_it_stopped() -> None:
    bench = Bench(is_cells=False)
    bench.talk(1, tokens(1000, 10), n_wanted=5)
    history = tokens(1000, 10) + bench.answers[1]
    assert bench.talk(2, [*history, 7], n_wanted=2).n_cached == 14
    assert bench.answers[2] == answer_to([*history, 7], 2)


def test_memory_that_cannot_be_cut_remembers_a_conversation_in_each_slot() -> None:
    bench = Bench(n_slots=3, is_cells=False)
    for id in (1, 2, 3):
        bench.talk(id, tokens(1000 * id, 10))
    for id in (2, 3, 1):
        assert bench.talk(10 + id, [*tokens(1000 * id, 10), 7, 8]).n_cached == 10


def test_memory_that_cannot_be_cut_holds_nobody_up() -> None:
    bench = Bench(n_slots=2, n_cells=506, n_prefill=16, is_cells=False)
    bench.add(1, tokens(1000, 367), n_wanted=3)
    bench.add(2, tokens(1000, 157) + tokens(2000, 28), n_wanted=3)
    bench.run()
    assert len(bench.answers) == 2


def test_an_idle_twin_of_what_runs_costs_a_newcomer_nothing() -> None:
    bench = Bench(n_slots=4, n_cells=150)
    bench.add(1, tokens(1000, 100), n_wanted=40)
    bench.step()
    bench.add(2, [*tokens(1000, 100), 7], n_wanted=1)
    bench.step()
    bench.add(3, [*tokens(1000, 100), 8], n_wanted=1)
    bench.step()
    assert 3 in bench.answers


# cancel


def test_a_cancelled_sequence_is_in_no_further_batch() -> None:
    bench = Bench()
    bench.add(1, tokens(1000, 5))
    bench.add(2, tokens(2000, 5))
    bench.step()
    bench.cancel(1)
    assert bench.step() == {2: 1}


def test_a_waiting_sequence_that_is_cancelled_never_starts() -> None:
    bench = Bench(n_slots=1)
    for id in (1, 2, 3):
        bench.add(id, tokens(1000 * id, 5), n_wanted=1)
    bench.cancel(2)
    bench.run()
    assert bench.started == [1, 3]
    assert set(bench.answers) == {1, 3}


def test_cancel_in_the_middle_of_a_prompt_frees_the_slot_and_keeps_the_cells() -> None:
    bench = Bench(n_slots=1, n_batch=8)
    bench.add(1, tokens(1000, 20))
    bench.step()
    bench.step()
    bench.cancel(1)
    assert bench.scheduler.idle
    assert bench.talk(2, tokens(1000, 20)).n_cached == 16
    assert bench.answers[2] == answer_to(tokens(1000, 20), 1)


def test_cancelling_what_is_unknown_changes_nothing() -> None:
    bench = Bench()
    bench.add(1, tokens(1000, 5))
    bench.cancel(7)
    assert bench.step() == {1: 5}


# cells run out


def test_a_decode_that_finds_no_cell_moves_an_idle_slot_out() -> None:
    bench = Bench(n_slots=2, n_cells=24)
    bench.add(1, tokens(1000, 10), n_wanted=3)
    bench.add(2, tokens(2000, 9), n_wanted=8)
    bench.run()
    assert bench.answers[2] == answer_to(tokens(2000, 9), 8)
    assert bench.talk(3, [*tokens(1000, 10), 7]).n_cached == 10


def test_when_cells_run_out_the_youngest_goes_back_to_the_queue_with_its_tokens() -> None:
    bench = Bench(n_slots=3, n_cells=20)
    old = bench.add(1, tokens(1000, 8))
    young = bench.add(2, tokens(2000, 8))
    for _ in range(3):
        bench.step()
    assert bench.step() == {1: 1}  # 2 × 10 cells are used: no room for two more
    assert (young.slot, young.n_past) == (None, 0)
    assert list(young.tokens) == tokens(2000, 8) + answer_to(tokens(2000, 8), 3)
    assert old.slot is not None


def test_a_preempted_sequence_resumes_with_the_same_continuation_and_starts_only_once() -> None:
    bench = Bench(n_slots=3, n_cells=20)
    bench.add(1, tokens(1000, 8), n_wanted=8)
    bench.add(2, tokens(2000, 8), n_wanted=8)
    bench.run()
    assert bench.answers == {id: answer_to(tokens(1000 * id, 8), 8) for id in (1, 2)}
    assert bench.started == [1, 2]


def test_a_preempted_sequence_is_ahead_of_younger_ones_that_wait() -> None:
    bench = Bench(n_slots=2, n_cells=20)
    bench.add(1, tokens(1000, 8), n_wanted=8)
    bench.add(2, tokens(2000, 8), n_wanted=8)
    bench.step()
    bench.add(3, tokens(3000, 12), n_wanted=1)  # one of the two fits when the first has ended
    bench.run()
    assert list(bench.answers) == [1, 2, 3]


def test_a_preempted_sequence_keeps_the_count_of_its_first_start() -> None:
    bench = Bench(n_slots=3, n_cells=30)
    bench.talk(1, tokens(2000, 6))
    bench.add(2, tokens(1000, 10), n_wanted=12)
    young = bench.add(3, [*tokens(2000, 6), 7], n_wanted=12)
    bench.run()
    assert young.n_cached == 6
    assert bench.answers[3] == answer_to([*tokens(2000, 6), 7], 12)


def test_a_preempted_sequence_can_be_cancelled() -> None:
    bench = Bench(n_slots=2, n_cells=20)
    bench.add(1, tokens(1000, 8), n_wanted=9)
    bench.add(2, tokens(2000, 8))
    for _ in range(4):
        bench.step()
    bench.cancel(2)
    bench.run()
    assert list(bench.answers) == [1]


def test_a_preempted_sequence_does_not_compute_its_cells_again() -> None:
    bench = Bench(n_slots=3, n_cells=44)
    bench.add(1, tokens(1000, 18), n_wanted=12)
    bench.add(2, tokens(2000, 18), n_wanted=12)
    bench.run()
    assert bench.n_decoded == 36
    assert bench.answers == {id: answer_to(tokens(1000 * id, 18), 12) for id in (1, 2)}


def test_a_memory_that_lacks_cells_takes_from_the_idle_then_from_the_youngest() -> None:
    bench = Bench()
    assert not bench.scheduler.lack_cells()
    bench = Bench()
    bench.talk(1, tokens(1000, 5))
    assert bench.scheduler.lack_cells()
    assert not bench.scheduler.lack_cells()
    bench = Bench()
    bench.add(1, tokens(1000, 5))
    bench.step()
    assert not bench.scheduler.lack_cells()
    bench = Bench()
    for id in (1, 2):
        bench.add(id, tokens(1000 * id, 5))
    bench.step()
    assert bench.scheduler.lack_cells()
    assert bench.sequences[2].slot is None


# the pace


def test_prompts_share_what_the_pace_allows_the_shortest_first() -> None:
    bench = Bench(n_slots=4, n_prefill=10)
    bench.add(1, tokens(1000, 30))
    bench.add(2, tokens(2000, 5))
    bench.add(3, tokens(3000, 8))
    assert bench.step() == {2: 5, 3: 5}
    assert bench.step() == {2: 1, 3: 3, 1: 7}


def test_a_long_prompt_ages_and_is_not_starved_by_short_ones() -> None:
    bench = Bench(n_slots=4, n_cells=2000, n_prefill=12)
    long = bench.add(1, tokens(1000, 20 * AGEING), n_wanted=1)
    n_steps = 0
    while 1 not in bench.answers:
        n_steps += 1
        if len(bench.sequences) < 4:
            bench.add(1 + n_steps, tokens(10_000 + 100 * n_steps, 10), n_wanted=1)
        bench.step()
        assert n_steps < 2 * 20 * AGEING / 12, f"{long.n_past} tokens after {n_steps} steps"


@settings(max_examples=25, deadline=None)
@given(token_s=st.floats(0.0005, 0.004), decode_s=st.floats(0.001, 0.02), rng=st.randoms())
def test_no_step_goes_over_its_budget(token_s: float, decode_s: float, rng: random.Random) -> None:
    """With a real pace, and a cost that the test decides."""
    bench = Bench(n_slots=4, n_cells=4000, n_batch=512)
    bench.scheduler._pace = Pace(0.2)
    for id in range(1, 30):
        bench.add(id, tokens(10_000 * id, rng.randint(1, 400)), n_wanted=rng.randint(1, 30))
    n_steps = 0
    while not bench.scheduler.idle:
        batch = bench.plan()
        n_prefill = batch.n_tokens - batch.n_decodes
        seconds = (decode_s if batch.n_decodes else 0) + n_prefill * token_s
        if n_steps > 8 and batch.n_decodes:
            assert seconds <= max(0.2, 1.5 * decode_s, decode_s + MIN_TOKENS * token_s) * 1.1
        bench.commit(batch, seconds)
        n_steps += 1


# a failed batch


def test_a_failed_batch_ends_its_sequences_and_frees_their_cells() -> None:
    bench = Bench(n_slots=2, n_batch=8)
    bench.add(1, tokens(1000, 8))
    bench.step()
    bench.add(2, tokens(2000, 5))
    batch = bench.plan()
    assert [s.id for s in bench.scheduler.fail(batch)] == [1, 2]
    assert bench.scheduler.idle
    assert bench.memory.n_used == 0
    # what may be wrong in those cells is not built upon
    assert bench.talk(3, tokens(1000, 8), n_wanted=2).n_cached == 0
    assert bench.answers[3] == answer_to(tokens(1000, 8), 2)


def test_a_failed_batch_spares_who_was_not_in_it() -> None:
    bench = Bench(n_slots=2, n_batch=4)
    bench.add(1, tokens(1000, 6))
    bench.add(2, tokens(2000, 6), n_wanted=2)
    bench.add(3, tokens(3000, 6), n_wanted=2)
    batch = bench.plan()
    assert [s.id for s in bench.scheduler.fail(batch)] == [1]
    bench.run()
    assert bench.answers == {id: answer_to(tokens(1000 * id, 6), 2) for id in (2, 3)}


# anything, in any order

Prompt = st.builds(
    lambda common, rest: [0] * common + rest,
    st.sampled_from([0, 0, 3, 40, 300, 700]),
    st.lists(st.integers(0, 2), min_size=1, max_size=12),
)


@settings(max_examples=120, deadline=None)
@given(
    n_slots=st.integers(1, 4),
    n_cells=st.integers(720, 1500),
    n_batch=st.integers(5, 300),
    n_prefill=st.integers(5, 300),
    tree_bytes=st.sampled_from([0, 100, 3000, 100_000]),
    is_cells=st.booleans(),
    prompts=st.lists(st.tuples(Prompt, st.integers(1, 4)), min_size=1, max_size=12),
    rng=st.randoms(use_true_random=False),
)
def test_whatever_the_order_of_calls_all_that_is_not_cancelled_ends_as_it_would_alone(
    n_slots: int,
    n_cells: int,
    n_batch: int,
    n_prefill: int,
    tree_bytes: int,
    is_cells: bool,
    prompts: list[tuple[list[int], int]],
    rng: random.Random,
) -> None:
    bench = Bench(
        n_slots=n_slots,
        n_cells=n_cells,
        n_batch=n_batch,
        n_prefill=n_prefill,
        tree_bytes=tree_bytes,
        is_cells=is_cells,
    )
    todo = dict(enumerate(prompts))
    expected = {id: answer_to(prompt, n_wanted) for id, (prompt, n_wanted) in todo.items()}
    while todo or not bench.scheduler.idle:
        action = rng.random()
        if todo and action < 0.4:
            id = min(todo)
            bench.add(id, *todo.pop(id))
        elif bench.sequences and action < 0.5:
            id = rng.choice(sorted(bench.sequences))
            bench.cancel(id)
            del expected[id]
        elif action < 0.52:
            bench.scheduler.lack_cells()
        elif action < 0.55:
            for sequence in bench.scheduler.fail(bench.plan()):
                del bench.sequences[sequence.id], expected[sequence.id]
        elif not bench.step():
            assert bench.scheduler.idle, "while anything is there to do, something is done"
    assert bench.answers == expected
    assert sorted(bench.started) == sorted(set(bench.started))
