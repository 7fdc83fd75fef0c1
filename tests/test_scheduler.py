"""The scheduler as lists of plain calls: who runs, in which batch, and when cells run out."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.pace import MIN_BESIDE, TILE, Pace
from engine.scheduler import AGEING
from engine.types import Batch
from tests.scheduling import BLOCK, Bench, FixedSpeculation, answer_to, repetitive_token, tokens

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


@pytest.mark.parametrize("n_slots", [2, 3])
def test_nobody_is_put_off_for_who_would_not_fit_all_the_same(n_slots: int) -> None:
    bench = Bench(n_slots=n_slots, n_batch=1000)
    bench.add(1, tokens(1000, 700))
    bench.add(2, tokens(2000, 100), rank=2.0)
    bench.step()
    bench.add(3, tokens(3000, 350), n_wanted=1, rank=1.0)
    for _ in range(3):
        assert bench.step() == {1: 1, 2: 1}
    bench.cancel(1)
    assert bench.step() == {2: 1, 3: 350}


def test_nobody_is_put_off_whose_cells_could_not_be_remembered() -> None:
    bench = Bench(is_cells=False, n_slots=1)
    bench.add(1, tokens(1000, 10), rank=5.0)
    bench.step()
    bench.add(2, tokens(2000, 10))
    assert bench.step() == {1: 1}


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


def test_each_token_of_a_prompt_is_scored_once_whatever_is_known_of_it() -> None:
    bench = Bench(n_slots=1, n_cells=100, n_batch=8, n_scored=5)
    prompt = tokens(1000, 12)
    bench.add(1, prompt, n_wanted=2)
    bench.run()
    bench.add(2, prompt, n_wanted=2, prompt_logprobs=0)
    assert [bench.step() for _ in range(2)] == [{2: 5}, {2: 5}]
    bench.add(3, prompt, n_wanted=1, rank=-1.0)  # it puts that off, and knows more of it then
    bench.run()
    assert bench.scored == {2: [*range(11)]}
    assert bench.answers == {
        n: answer_to(prompt, n_wanted) for n, n_wanted in [(1, 2), (2, 2), (3, 1)]
    }


def test_a_prompt_that_is_scored_holds_up_no_other() -> None:
    bench = Bench(n_batch=20, n_scored=4)
    for id in (1, 2):
        bench.add(id, tokens(1000 * id, 6), prompt_logprobs=0)
    bench.add(3, tokens(3000, 10))
    assert bench.step() == {1: 4, 3: 10}
    assert bench.step() == {1: 2, 2: 3, 3: 1}


def test_more_decodes_than_a_batch_holds_all_come_to_their_end() -> None:
    bench = Bench(n_slots=4, n_batch=2)
    for id in (1, 2, 3, 4):
        bench.add(id, tokens(1000 * id, 1), n_wanted=3)
    bench.run()
    assert bench.answers == {id: answer_to(tokens(1000 * id, 1), 3) for id in (1, 2, 3, 4)}


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


def test_a_prompt_that_nobody_waits_beside_finds_the_cells_of_those_before_it_free() -> None:
    bench = Bench(n_cells=4000, n_batch=800)
    bench.talk(1, tokens(1000, 900))
    bench.add(2, tokens(2000, 1000))
    assert bench.step() == {2: 800}
    assert bench.memory.n_used == 800, "and not those of the first"


def test_idle_slots_that_cannot_be_remembered_go_one_in_a_step() -> None:
    bench = Bench(n_cells=4000, tree_bytes=0)
    for id in (1, 2):
        bench.add(id, tokens(1000 * id, 40), n_wanted=2)
    bench.run()
    bench.add(3, tokens(3000, 1500))
    assert bench.step() == {3: 100}
    assert [bench.memory.tokens(slot)[:1] for slot in range(3)] == [[], [2000], [3000]]


def test_beside_a_stream_only_a_block_moves_out_in_a_step() -> None:
    bench = Bench(n_cells=4000)
    bench.talk(1, tokens(1000, 900))
    bench.add(2, tokens(2000, 10), n_wanted=5)
    bench.step()
    n_before = bench.tree.n_bytes
    bench.add(3, tokens(3000, 600))
    bench.step()
    assert bench.tree.n_bytes - n_before == 4 * BLOCK


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
    assert not bench.scheduler.lack_cells(Batch())
    bench = Bench()
    bench.talk(1, tokens(1000, 5))
    assert bench.scheduler.lack_cells(Batch())
    assert not bench.scheduler.lack_cells(Batch())
    bench = Bench()
    bench.add(1, tokens(1000, 5))
    bench.step()
    assert not bench.scheduler.lack_cells(Batch())
    bench = Bench()
    for id in (1, 2):
        bench.add(id, tokens(1000 * id, 5))
    bench.step()
    assert bench.scheduler.lack_cells(Batch())
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


def test_streams_wait_for_others_only_before_their_second_token() -> None:
    bench = Bench(n_slots=8, n_cells=2000, n_batch=512)
    bench.scheduler._pace = Pace(None, has_tiles=True)

    def step() -> dict[int, int]:
        batch = bench.plan()
        bench.commit(batch, 0.01 * (batch.n_decodes > 0) + 0.002 * batch.n_tokens)
        return {chunk.sequence.id: chunk.n_tokens for chunk in batch.chunks}

    bench.add(1, tokens(1000, 40))
    assert step() == {1: 40}
    for id in (2, 3, 4):
        bench.add(id, tokens(1000 * id, 50))
    assert step() == {1: 1, 2: 50, 3: 50, 4: 50}
    for id in (5, 6, 7, 8):
        bench.add(id, tokens(1000 * id, 60))
    assert sum(step().values()) < 50  # the first has said two


@settings(max_examples=25)
@given(token_s=st.floats(0.0005, 0.004), decode_s=st.floats(0.001, 0.02), rng=st.randoms())
def test_no_step_goes_over_its_budget(token_s: float, decode_s: float, rng: random.Random) -> None:
    """With a real pace, and a cost that the test decides."""
    bench = Bench(n_slots=4, n_cells=4000, n_batch=512)
    bench.scheduler._pace = Pace(0.2, has_tiles=True)
    for id in range(1, 30):
        bench.add(id, tokens(10_000 * id, rng.randint(1, 400)), n_wanted=rng.randint(1, 30))
    n_steps = 0
    while not bench.scheduler.idle:
        batch = bench.plan()
        n_prefill = batch.n_tokens - batch.n_decodes
        seconds = (decode_s if batch.n_decodes else 0) + n_prefill * token_s
        if n_steps > 8 and batch.n_decodes:
            assert seconds <= max(0.2, 1.5 * decode_s, decode_s + MIN_BESIDE * token_s) * 1.1
        bench.commit(batch, seconds)
        n_steps += 1


@settings(max_examples=25)
@given(token_s=st.floats(0.001, 0.05), decode_s=st.floats(0.001, 0.1), rng=st.randoms())
def test_prompts_and_streams_get_on_where_wide_steps_alternate(
    token_s: float, decode_s: float, rng: random.Random
) -> None:
    """With a real pace, and attention that costs more the further a prompt is."""
    bench = Bench(n_slots=4, n_cells=4000, n_batch=512)
    bench.scheduler._pace = Pace(None, has_tiles=True)
    for id in range(1, 12):
        bench.add(id, tokens(10_000 * id, rng.randint(1, 900)), n_wanted=rng.randint(1, 30))
    n_steps = n_waiting = 0
    while not bench.scheduler.idle:
        batch = bench.plan()
        n_prefill = batch.n_tokens - batch.n_decodes
        is_held_up = n_prefill == 0 and any(s.n_pending > 1 for s in bench.scheduler._running)
        n_waiting = n_waiting + 1 if is_held_up else 0
        assert n_waiting * decode_s < 0.5 + 2 * decode_s
        attention = max((chunk.start for chunk in batch.chunks), default=0) / 100
        cost_s = token_s * (1 + attention / (2 if n_prefill >= TILE else 1))
        bench.commit(batch, (decode_s if batch.n_decodes else 0) + n_prefill * cost_s)
        n_steps += 1
        assert n_steps < 5_000


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


def any_prompt(rng: random.Random) -> list[int]:
    common = [rng.randint(0, 1)] * rng.choice([0, 3, 40, 300, 600])
    return common + rng.choices([0, 1, 2], k=rng.randint(1, 60))


@settings(max_examples=120)
@given(
    n_slots=st.integers(1, 4),
    n_cells=st.integers(720, 1500),
    n_batch=st.integers(5, 300),
    n_prefill=st.integers(5, 300),
    tree_bytes=st.sampled_from([0, 100, 2000, 3000, 100_000]),
    kind=st.sampled_from(["cells", "marked", "marked, each its own"]),
    takes_back=st.booleans(),
    refuses=st.sampled_from([0.0, 0.2]),
    ranks=st.sampled_from([[0.0], [0.0, 1.0, 2.0]]),
    n_guesses=st.sampled_from([0, 1, 3, 8]),
    n_scored=st.sampled_from([1, 7, 64]),
    n_prompts=st.integers(1, 12),
    rng=st.randoms(use_true_random=True),
)
def test_whatever_the_order_of_calls_all_that_is_not_cancelled_ends_as_it_would_alone(
    n_slots: int,
    n_cells: int,
    n_batch: int,
    n_prefill: int,
    tree_bytes: int,
    kind: str,
    takes_back: bool,
    refuses: float,
    ranks: list[float],
    n_guesses: int,
    n_scored: int,
    n_prompts: int,
    rng: random.Random,
) -> None:
    bench = Bench(
        n_slots=n_slots,
        n_cells=n_cells,
        n_batch=n_batch,
        n_prefill=n_prefill,
        n_scored=n_scored,
        tree_bytes=tree_bytes,
        is_cells=kind == "cells",
        takes_back=takes_back or kind == "cells",
        shares_cells=kind != "marked, each its own",
        refuses=refuses,
        speculation=FixedSpeculation(n_guesses),
        next_token=repetitive_token,
    )
    prompts = [(any_prompt(rng), rng.randint(1, 40)) for _ in range(n_prompts)]
    todo = dict(enumerate(prompts))
    expected = {id: answer_to(*asked, repetitive_token) for id, asked in todo.items()}
    while todo or not bench.scheduler.idle:
        action = rng.random()
        if bench.sequences and action < 0.04:
            id = rng.choice(sorted(bench.sequences))
            bench.cancel(id)
            del expected[id]
        elif action < 0.06:
            bench.scheduler.lack_cells(Batch())
        elif action < 0.07:
            for sequence in bench.scheduler.fail(bench.plan()):
                del bench.sequences[sequence.id], expected[sequence.id]
        elif action < 0.08:
            bench.scheduler.lose(bench.plan())
        elif todo and action < 0.4:
            id = min(todo)
            n_logprobs = rng.choice([None, None, 0])
            bench.add(id, *todo.pop(id), rank=rng.choice(ranks), prompt_logprobs=n_logprobs)
        elif not bench.step():
            assert bench.scheduler.idle, "while anything is there to do, something is done"
    assert bench.answers == expected
    assert sorted(bench.started) == sorted(set(bench.started))
    for id, places in bench.scored.items():
        assert places == [*range(len(places))]
        assert id not in expected or len(places) == len(prompts[id][0]) - 1
