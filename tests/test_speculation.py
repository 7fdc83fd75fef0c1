"""Guesses: what comes next, whether it pays to compute it, and that nobody hears a difference."""

import random
from array import array
from collections import defaultdict
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import generation_jobs
from engine import speculation, wire
from engine.backends.fake import FakeDecoder, Script
from engine.batch_engine import BatchEngine
from engine.grammar import Compiler
from engine.speculation import BESIDE, LEAST, LONGEST, MEMORY, UNKNOWN, Guesses, Speculation
from engine.types import MOST_GUESSES, Batch, SamplingParams
from tests.engines import lanes_of, open_lanes
from tests.scheduling import Bench, FixedSpeculation, answer_to, repetitive_token, tokens
from tests.serving import fake, script, serving
from tests.serving import settings as settings_of
from tests.test_llamacpp import GREEDY, differ_by_rounding, engine_of, generate, ids
from tests.test_worker import generate as request_for
from tests.test_worker import spec

# what comes next


def guesses_after(said: list[int], n: int = 4) -> list[int]:
    guesses = Guesses()
    guesses.follow(array("i", said))
    return list(guesses.next(array("i", said), n))


def test_a_sequence_goes_on_as_it_did_where_it_was_the_same() -> None:
    assert guesses_after([1, 2, 3, 4, 5, 6, 9, 1, 2], 3) == [3, 4, 5]


def test_what_is_new_has_no_guess() -> None:
    assert guesses_after([1]) == guesses_after([1, 2, 3, 4]) == []
    assert guesses_after([1, 2, 3, 9, 2]) == [], "one token alone says little"


def test_the_longest_match_is_taken_and_of_equal_ones_the_last() -> None:
    assert guesses_after([7, 1, 2, 50, 8, 1, 2, 60, 7, 1, 2], 1) == [50]
    assert guesses_after([7, 1, 2, 50, 7, 1, 2, 60, 7, 1, 2], 1) == [60]
    long = tokens(1000, LONGEST)  # as far as they are looked at
    assert guesses_after([7, *long, 50, 8, *long, 60, 7, *long], 1) == [60]


def test_a_loop_goes_round() -> None:
    assert guesses_after([1, 2, 3, 1, 2, 3], 7) == [1, 2, 3, 1, 2, 3, 1]


def test_a_token_in_the_place_of_another_does_not_lose_the_thread() -> None:
    said = array("i", [*tokens(1000, 10), 1, *tokens(1000, 4)])
    guesses = Guesses()
    guesses.follow(said)
    said.append(77)
    guesses.follow(said)
    assert list(guesses.next(said, 2)) == [1005, 1006]
    said.append(78)  # another story
    guesses.follow(said)
    assert not guesses.exist


def test_trust_follows_what_was_right_also_while_nothing_is_computed() -> None:
    said, guesses, trusts = array("i", tokens(1000, 60)), Guesses(), []
    for token in [1, *tokens(1000, 60)]:
        said.append(token)
        guesses.follow(said)
        trusts.append(guesses.trust)
    assert trusts[2] == 0
    assert trusts == sorted(trusts)
    assert trusts[-1] > 0.99
    dice = random.Random(1)
    for _ in range(200):
        said.append(dice.choice([1000, 1001, 1002, 1003]))
        guesses.follow(said)
    assert guesses.trust < 0.5


# whether it pays


def taught(cost: dict[int, float], *, repeats: bool = False) -> Speculation:
    found = Speculation(repeats=repeats)
    for n_tokens, seconds in cost.items():
        found.observe(n_tokens, seconds)
    return found


CHEAP = {n: 1 + n / 50 for n in range(1, 40)}  # as where weights have to be read from memory
DEAR = {n: float(n) for n in range(1, 40)}  # as where they need not be


def test_nothing_is_guessed_before_a_step_without_guesses_was_measured() -> None:
    assert Speculation().plan([1.0], 0, 100) == [0]
    assert taught({2: 1.0}).plan([1.0], 0, 100) == [0]


def test_the_price_of_guesses_is_found_out_where_they_are_likely_right() -> None:
    found = taught({1: 1.0})
    (n,) = found.plan([0.95], 0, 100)
    assert n > 0
    found.observe(1 + n, 1.0 + n)
    assert found.plan([0.95], 0, 100) < [n]


def test_a_price_that_is_not_known_lies_between_its_neighbours_or_a_little_above_the_last() -> None:
    assert taught({4: 1.0, 12: 3.0})._seconds(8) == 2.0
    assert taught({4: 1.0})._seconds(8) == 1.0 + UNKNOWN


def test_cheap_guesses_are_many_and_dear_ones_are_none() -> None:
    assert taught(CHEAP).plan([1.0], 0, 100) == [MOST_GUESSES - 1]
    assert taught(DEAR).plan([1.0], 0, 100) == [0]
    assert 0 < taught(CHEAP).plan([0.6], 0, 100)[0] < MOST_GUESSES - 1


def test_guesses_that_are_likely_wrong_are_not_computed() -> None:
    assert taught(CHEAP).plan([LEAST / 2], 0, 100) == [0]
    assert taught({1: 1.0, 4: 3.0, 8: 5.0, 12: 7.0, 16: 9.0}).plan([0.5], 0, 100) == [0]


def test_neighbours_are_not_kept_waiting() -> None:
    half = {n: 1 + n / 2 for n in range(1, 40)}
    assert taught(half).plan([1.0], 0, 100)[0] > 0
    assert taught(half).plan([1.0], 3, 100) == [0]
    (n,) = taught(CHEAP).plan([1.0], 3, 100)
    assert n > 0
    assert CHEAP[4 + n] <= BESIDE * CHEAP[4]


def test_several_sequences_share_what_a_step_may_take() -> None:
    numbers = taught(CHEAP).plan([0.9, 0.95, LEAST / 2], 1, 100)
    assert numbers[1] > 0 == numbers[2]
    assert CHEAP[4 + sum(numbers)] <= BESIDE * CHEAP[4]


@pytest.mark.parametrize("n_room", [-3, 0, 1, 2, 3, 7])
def test_guesses_fit_the_room_that_is_left(n_room: int) -> None:
    assert sum(taught(CHEAP).plan([1.0, 1.0], 0, n_room)) <= max(n_room, 0)


def test_a_price_is_asked_again_after_a_while() -> None:
    found = taught({16: 60.0, 12: 50.0, 8: 40.0, 4: 30.0, 1: 1.0})
    assert found.plan([0.95], 0, 100) == [0]
    for _ in range(MEMORY + 1):
        found.observe(1, 1.0)
    assert found.plan([0.95], 0, 100)[0] > 0


def test_a_step_without_guesses_is_measured_again_after_a_while() -> None:
    found = taught(CHEAP)
    numbers = []
    for _ in range(2 * MEMORY):
        (n,) = found.plan([1.0], 0, 100)
        numbers.append(n)
        found.observe(1 + n, CHEAP[1 + n])
    assert 1 <= numbers.count(0) <= 3


def test_one_slow_step_does_not_decide() -> None:
    found = taught(CHEAP)
    found.observe(MOST_GUESSES, 100.0)
    assert found.plan([1.0], 0, 100)[0] > 0


# in the scheduler


def guessing(n: int = 4, **values: Any) -> Bench:
    return Bench(speculation=FixedSpeculation(n), next_token=repetitive_token, **values)


def test_right_guesses_save_steps_and_wrong_ones_leave_no_cells() -> None:
    bench = guessing()
    bench.add(1, tokens(1000, 9), n_wanted=100)
    n_steps = bench.run()  # which checks the cells
    assert bench.answers[1] == answer_to(tokens(1000, 9), 100, repetitive_token)
    assert n_steps - 1 <= 100 - bench.n_right <= n_steps  # the last may have been guessed
    assert 0 < bench.n_right < bench.n_guessed


def test_an_answer_that_ends_among_guesses_is_continued_like_any_other() -> None:
    bench = guessing()
    bench.talk(1, tokens(1000, 9), n_wanted=50)
    assert bench.n_right > 0
    history = tokens(1000, 9) + bench.answers[1]
    again = bench.talk(2, [*history, 7], n_wanted=3)
    assert again.n_cached >= len(history) - 1
    assert bench.answers[2] == answer_to([*history, 7], 3, repetitive_token)


def test_nothing_is_guessed_beside_a_prompt() -> None:
    bench = guessing(n_batch=16)
    bench.add(1, [1, 2, 3, 1, 2, 3])
    bench.step()
    bench.add(2, tokens(2000, 40))
    while bench.sequences[2].n_pending > 1 or bench.sequences[2].slot is None:
        assert bench.plan().n_guesses == 0
        bench.step()


def test_a_request_that_must_have_the_same_numbers_gets_no_guesses() -> None:
    bench = guessing()
    bench.add(1, [1, 2, 3] * 5, n_wanted=40, reuses=False)
    bench.add(2, [1, 2, 3] * 5, n_wanted=40, reuses=False, goes_on_from=1)
    bench.run()
    assert bench.n_guessed == 0


def test_memory_that_cannot_drop_an_end_comes_back_to_a_copy() -> None:
    bench = guessing(is_cells=False, takes_back=False)
    bench.add(1, tokens(1000, 9), n_wanted=100)
    n_steps = bench.run()  # which checks the cells
    assert bench.answers[1] == answer_to(tokens(1000, 9), 100, repetitive_token)
    assert 0 < bench.memory.n_rewound < bench.n_right < bench.n_guessed
    assert n_steps < 100


def said_in(bench: Bench, id: int) -> int:
    """Tokens that a sequence said in the next step, in which it may have ended."""
    sequence = bench.sequences[id]
    n_before = len(sequence.tokens)
    bench.step()
    return len(sequence.tokens) - n_before


@pytest.mark.parametrize("takes_back", [True, False])
@pytest.mark.parametrize("n_batch", [24, 100])
def test_whoever_is_past_its_prompt_says_more_in_each_step_whatever_comes(
    takes_back: bool, n_batch: int
) -> None:
    """Also where a step is computed again, and beside prompts that come first."""
    room = {"n_cells": 3000, "n_batch": n_batch, "n_prefill": 16}
    bench = guessing(8, is_cells=False, takes_back=takes_back, **room)
    for id in (1, 2):
        bench.add(id, [id, *tokens(1000, 9)], rank=100.0)
    while any(sequence.n_pending > 1 for sequence in bench.sequences.values()):
        bench.step()
    for _ in range(20):
        assert said_in(bench, 1) > 0
    while bench.sequences[1].n_pending == 1 and not takes_back:
        bench.step()
    bench.add(3, tokens(5000, 1500))
    while bench.sequences[3].n_past < 1400:
        sequence = bench.sequences[2]
        n_before = len(sequence.tokens)
        assert said_in(bench, 1) > 0
        assert len(sequence.tokens) > n_before


def test_idle_slots_stay_beside_a_stream_whose_step_is_computed_again() -> None:
    bench = guessing(4, is_cells=False, takes_back=False, n_slots=4, n_cells=4000)
    bench.add(3, tokens(3000, 9), n_wanted=200)
    bench.step()
    for id in (1, 2):
        bench.add(id, tokens(1000 * id, 400), n_wanted=3)
    bench.run()
    assert bench.memory.n_rewound > 5
    assert sorted(map(len, bench.memory.slots))[-2:] == [402, 402]


@pytest.mark.parametrize("n_copies", [0, 1, 2, 20])
def test_copies_for_guesses_cost_no_conversation_what_is_remembered_of_it(n_copies: int) -> None:
    """Each has so many bytes as its tokens; a quarter of the room is for those of steps."""
    n_prompt = 600
    room = {"n_slots": 3, "n_cells": 9000, "n_batch": 700, "tree_bytes": 4 * 4 * 620 * n_copies}
    n_cached, n_decoded = [], []
    for n_guesses in (0, 8):
        bench = guessing(n_guesses, is_cells=False, takes_back=False, **room)
        prompts = {id: tokens(1000 * id, n_prompt) for id in (1, 2, 3)}
        for id, prompt in prompts.items():
            bench.add(id, prompt, n_wanted=10)
        bench.run()
        for id, prompt in prompts.items():
            again = bench.talk(id + 10, [*prompt, *bench.answers[id], 7], n_wanted=10)
            n_cached.append(again.n_cached)
            assert bench.answers[id] == answer_to(prompt, 10, repetitive_token)
        n_decoded.append(bench.n_decoded)
        assert bool(bench.n_guessed) == bool(n_guesses and n_copies)
    # an answer that ends among guesses may end a step earlier in the cells
    assert all(n - 8 <= guessed <= n for n, guessed in zip(n_cached[:3], n_cached[3:], strict=True))
    assert n_decoded[0] <= n_decoded[1] <= n_decoded[0] + 3 * 8


def test_a_step_that_is_computed_again_is_paid_twice() -> None:
    found = taught(CHEAP)
    (n,) = found.plan([0.8], 0, 100)
    found = taught(CHEAP, repeats=True)
    assert found.plan([1.0], 0, 100) == [MOST_GUESSES - 1]
    assert 0 < found.plan([0.8], 0, 100)[0] < n
    assert found.plan([0.4], 0, 100) == [0]


def test_memory_that_cannot_be_copied_either_gets_no_guesses() -> None:
    bench = guessing(is_cells=False, takes_back=False, tree_bytes=0)
    bench.add(1, [1, 2, 3] * 5, n_wanted=40)
    bench.run()
    assert bench.n_guessed == 0


def test_guesses_go_first_when_the_memory_lacks_cells() -> None:
    bench = guessing()
    bench.add(1, [1, 2, 3] * 5, n_wanted=40)
    bench.step()
    batch = bench.plan()
    assert batch.n_guesses > 0
    assert bench.scheduler.lack_cells(batch)
    assert bench.plan().n_guesses == 0
    assert not bench.scheduler.lack_cells(Batch())
    bench.run()
    assert bench.answers[1] == answer_to([1, 2, 3] * 5, 40, repetitive_token)


def test_guesses_use_no_cells_that_others_would_miss() -> None:
    bench = guessing(n_cells=48, n_slots=2)
    for id in (1, 2):
        bench.add(id, [id, 8, 9] * 4, n_wanted=11)
    bench.run()
    for id in (1, 2):
        assert bench.answers[id] == answer_to([id, 8, 9] * 4, 11, repetitive_token)
    assert bench.started == [1, 2]


def test_no_guess_lies_beyond_the_positions_of_the_model() -> None:
    """Where these are learned, one more ends the process."""
    bench = guessing(n=8, n_ctx=40)
    bench.add(1, [1, 2, 3] * 5, n_wanted=40 - 15)
    ends = []
    while not bench.scheduler.idle:
        batch = bench.plan()
        ends += [chunk.start + len(chunk.tokens) for chunk in batch.chunks]
        bench.commit(batch)
    assert bench.n_guessed > 0
    assert max(ends) == 40
    assert bench.answers[1] == answer_to([1, 2, 3] * 5, 25, repetitive_token)


# in the engine


def engine_with(rule: dict[str, Any], n_guesses: int) -> BatchEngine:
    script = msgspec.convert({"rules": [rule]}, Script)
    decoder = FakeDecoder(script, n_slots=2, n_cells=400, sleep=lambda _: None)
    engine = BatchEngine(decoder, spec(), n_ctx=200, n_cells=400, n_batch=64)
    if n_guesses:
        engine._scheduler._speculation = FixedSpeculation(n_guesses)
    return engine


def heard(engine: BatchEngine, requests: list[wire.Generate]) -> dict[tuple[int, int], list[Any]]:
    """What the worker would send for each job and answer, without the counts of guesses."""
    jobs, compiler = generation_jobs.Jobs(engine), Compiler(engine.tokenizer)
    for request in requests:
        jobs.admit(generation_jobs.prepare(request, engine, compiler))
    outs: dict[tuple[int, int], list[Any]] = defaultdict(list)
    for _ in range(1000):
        if engine.idle:
            return outs
        for message in jobs.report(engine.step()):
            for out in message.outs if isinstance(message, wire.Step) else ():
                done = out.done and msgspec.structs.replace(out.done, n_guessed=0, n_right=0)
                outs[out.job, out.index].append(msgspec.structs.replace(out, done=done))
            if isinstance(message, wire.Failed):
                outs[message.job, 0].append(message)
    pytest.fail("it does not end")


WHOLE = wire.Grammar((wire.GrammarPart("grammar", 'start: /[ab]*/ "c"', "grammar"),))
THINKING = [
    None,
    wire.Thinking("<t>", "ba", True, budget=None, ending=""),
    wire.Thinking("<t>", "ba", True, budget=7, ending="ba c"),
]


@settings(max_examples=80)
@given(
    answer=st.text("ab", min_size=1, max_size=4).map(lambda text: text * 9 + "cd"),
    n_guesses=st.integers(1, 8),
    stop=st.lists(st.text("abc", min_size=1, max_size=5), max_size=2),
    max_tokens=st.sampled_from([None, 0, 1, 5, 12, 23]),
    n_logprobs=st.sampled_from([None, 0, 2]),
    grammar=st.sampled_from([None, WHOLE]),
    thinking=st.sampled_from(THINKING),
    n=st.integers(1, 3),
)
def test_what_clients_get_is_the_same_with_guesses(
    answer: str, n_guesses: int, n_logprobs: int | None, grammar: Any, **values: Any
) -> None:
    sampling = SamplingParams(n_logprobs=n_logprobs)
    requests = [
        request_for("first", job=1, sampling=sampling, grammar=grammar, **values),
        request_for("second" + "ab" * 20, job=2, sampling=sampling),
    ]
    rule = {"answer": answer}
    plain = heard(engine_with(rule, 0), requests)
    assert heard(engine_with(rule, n_guesses), requests) == plain
    assert all(outs for outs in plain.values())
    assert len(plain) == values["n"] + 1 or grammar


def test_guesses_are_counted() -> None:
    engine = engine_with({"answer": "abc" * 20}, 4)
    jobs = generation_jobs.Jobs(engine)
    jobs.admit(generation_jobs.prepare(request_for("Hi"), engine, Compiler(engine.tokenizer)))
    messages = []
    while not engine.idle:
        messages += jobs.report(engine.step())
    assert isinstance(messages[-1], wire.Step)
    done = messages[-1].outs[-1].done
    assert done is not None
    assert 40 < done.n_right < done.n_guessed


def test_a_failure_that_is_scripted_comes_also_where_its_place_is_guessed() -> None:
    engine = engine_with({"answer": "abc" * 20, "fault": "step", "after": 30}, 8)
    (outs,) = heard(engine, [request_for("Hi")]).values()
    assert isinstance(outs[-1], wire.Failed)


@pytest.mark.parametrize("speculation", [True, False])
def test_a_tier_guesses_where_that_pays_and_unless_it_is_told_not_to(
    speculation: bool, tmp_path: Path
) -> None:
    path = script(tmp_path, {"answer": "abcdef" * 30}, step_ms=3, guesses=True)
    with serving(settings_of(light=fake(path, speculation=speculation))) as service:
        body = service.chat(timings=True).json()
        metrics = service.http.get("/metrics").text
    assert body["choices"][0]["message"]["content"] == "abcdef" * 30
    assert body["usage"]["completion_tokens"] == 181
    n_guessed, n_right = body["timings"]["draft_n"], body["timings"]["draft_n_accepted"]
    assert (n_guessed >= n_right > 50) if speculation else (n_guessed == n_right == 0)
    assert f'quintet_draft_tokens_total{{tier="light"}} {n_guessed:.1f}' in metrics
    assert f'quintet_draft_tokens_accepted_total{{tier="light"}} {n_right:.1f}' in metrics


# on a real model


@pytest.mark.real
def test_guesses_change_nothing_that_a_model_says(smollm2: Path) -> None:
    """Alone to the letter, also with a seed and penalties; in company up to rounding."""
    code = Path(speculation.__file__).read_text(encoding="utf-8")[:160]
    texts = [
        f"<|im_start|>user\nRepeat exactly:\n{code}<|im_end|>\n<|im_start|>assistant\n{code[:20]}",
        "1, 2, 3, 1, 2, 3, 1, 2,",
        "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n",
    ]
    seeded = SamplingParams(seed=3, temperature=0.6, repeat_penalty=1.02, n_logprobs=1)

    def said(n_guesses: int) -> tuple[list[list[int]], list[list[int]], int]:
        engine = engine_of(smollm2, n_parallel=4, lane_tokens=256)
        open_lanes(engine)._least = 2  # where they are computed together, and not alone
        engine._scheduler._speculation = FixedSpeculation(n_guesses)
        n_right, step = 0, engine.step

        def counting() -> Any:
            nonlocal n_right
            result = step()
            n_right += len(result.right)
            return result

        engine.step = counting  # type: ignore[method-assign]
        prompts = {number: ids(engine, text) for number, text in enumerate(texts)}
        alone = [
            generate(engine, {0: prompts[number]}, 16, sampling)[0]
            for number, sampling in ((0, GREEDY), (1, seeded))
        ]
        together = generate(engine, prompts, 16)
        assert lanes_of(engine)._buffer.nbytes  # cells were copied,
        assert lanes_of(engine)._n_cells  # and none failed
        engine.close()
        return alone, [together[number] for number in prompts], n_right

    alone, together, n_right = said(0)
    alone_guessed, together_guessed, n_right_guessed = said(3)
    assert (n_right, n_right_guessed > 20) == (0, True)
    assert alone_guessed == alone
    engine = engine_of(smollm2, n_parallel=1)
    prompts = [ids(engine, text) for text in texts]
    engine.close()
    assert differ_by_rounding(smollm2, prompts, together, together_guessed) <= 2
