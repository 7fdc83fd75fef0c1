"""The MLX backend: its batch, its prompt cache, its numbers beside llama.cpp's, and its faults."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest

import generation_jobs
from engine import wire
from engine.backends import mlx_rows
from engine.backends.base import Engine
from engine.chat_folder import (
    AddedToken,
    TokenizerConfig,
    TokenizerFile,
    Vocabulary,
    end_tokens,
    read_chat_folder,
)
from engine.grammar import Compiler
from engine.types import SamplingParams, StepResult
from errors import ModelLoadFailed
from tests.engines import GREEDY, engine_of, generate, ids, needs_mlx, run, seeded_answers
from tests.gguf_fixtures import spm_vocabulary, write_tiny_spm
from tests.mlx_models import FAMILIES, remembered, write_random

pytestmark = [pytest.mark.real, needs_mlx]

FREE = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
Load = Callable[..., Any]


@pytest.fixture(scope="module")
def engine(tiny_mlx: Path) -> Iterator[Engine]:
    """For tests that leave nothing behind: with no prompt cache."""
    engine = engine_of(tiny_mlx, n_parallel=8, prefix_cache_bytes=0)
    yield engine
    engine.close()


# many at once


def test_streams_that_join_and_leave_say_what_each_says_alone(engine: Engine) -> None:
    """Prompts of all lengths, greedy, drawn on the device and chosen in numpy."""
    dice = random.Random(4)
    samplings = [GREEDY, SamplingParams(seed=5), SamplingParams(seed=6, frequency_penalty=0.5)]
    jobs = {
        number: (
            [dice.randint(3, 40_000) for _ in range(dice.choice([1, 2, 7, 30, 90]))],
            samplings[number % 3],
            dice.randint(1, 20),
        )
        for number in range(12)
    }
    said: dict[int, list[int]] = {number: [] for number in jobs}
    waiting = sorted(jobs, reverse=True)
    while waiting or not engine.idle:
        if waiting:  # one more joins in each step, eight at most are in it
            prompt, sampling, _ = jobs[number := waiting.pop()]
            engine.admit(number, prompt, sampling)
        result = engine.step()
        assert not result.failed
        for number, (token, *_) in result.tokens:
            said[number].append(token)
            if len(said[number]) == jobs[number][2]:
                engine.cancel(number)
    for number, (prompt, sampling, n_tokens) in jobs.items():
        alone = []
        engine.admit(number, prompt, sampling)
        while len(alone) < n_tokens:
            alone += [token for _, (token, *_) in engine.step().tokens]
        engine.cancel(number)
        assert said[number] == alone, number


def test_answers_to_one_prompt_need_one_prefill(tiny_mlx: Path, load: Load) -> None:
    engine = load(tiny_mlx, prefix_cache_bytes=0)
    prompt = [1000 + i for i in range(80)]
    for number in range(4):
        engine.admit(number, prompt, GREEDY, rank=10.0 * (number > 0))
    said, cached = run(engine, dict.fromkeys(range(4), 6))
    assert cached == {0: 0, 1: 79, 2: 79, 3: 79}
    assert said[0] == said[1] == said[2] == said[3]


def test_all_answers_to_a_seeded_request_are_the_same_every_time(
    tiny_mlx: Path, load: Load
) -> None:
    engine = load(tiny_mlx, n_parallel=3)
    prompt = [1000 + i for i in range(90)]
    said = seeded_answers(engine, prompt, n=5)
    assert len({len(answer) for answer in said}) > 2
    generate(engine, {101: prompt[:60], 102: prompt}, 12)
    assert seeded_answers(engine, prompt, n=5) == said
    assert seeded_answers(engine, prompt, n=5) == said


@pytest.mark.parametrize("is_cancelled", [False, True])
def test_answers_without_reuse_go_on_from_their_first_one_whatever_is_known(
    is_cancelled: bool, tiny_mlx: Path, load: Load
) -> None:
    """If that is gone, from the first that is left, which computes the prompt anew."""
    engine = load(tiny_mlx)
    prompt = [1000 + i for i in range(90)]
    generate(engine, {9: prompt}, 2)
    for number in (1, 2, 3):
        first, rank = (1, 10.0) if number > 1 else (None, 0.0)
        engine.admit(number, prompt, GREEDY, reuses=False, goes_on_from=first, rank=rank)
    assert engine.step().started == [(1, 0)], "the others wait"
    if is_cancelled:
        engine.cancel(1)
    said, cached = run(engine, {1: 4, 2: 4, 3: 4})
    assert cached == ({2: 0, 3: 89} if is_cancelled else {2: 89, 3: 89})
    assert said[2] == said[3]


@pytest.mark.parametrize(
    "sampling",
    [GREEDY, SamplingParams(**FREE, seed=3), SamplingParams(**FREE, seed=3, min_tokens=99)],
)
def test_who_is_put_off_goes_on_as_if_nothing_had_been(
    tiny_mlx: Path, load: Load, sampling: SamplingParams
) -> None:
    engine = load(tiny_mlx, n_parallel=1)
    prompt = [1000 + i for i in range(20)]
    undisturbed = generate(engine, {1: prompt}, 16, sampling)[1]
    engine.admit(2, prompt, sampling, rank=5.0)
    said: dict[int, list[int]] = {2: [], 3: []}
    order: list[int] = []
    while not engine.idle:
        for number, (token, *_) in engine.step().tokens:
            order.append(number)
            said[number].append(token)
            if len(said[number]) == {2: 16, 3: 4}[number]:
                engine.cancel(number)
            if order == [2] * 5:
                engine.admit(3, [7, 8, 9], GREEDY, rank=1.0)
    assert said[2] == undisturbed
    assert order.index(3) < 8  # it did not wait for the end of the other


def test_json_is_whole_only_with_its_last_token(tiny_mlx: Path, load: Load) -> None:
    """Although the last one is chosen when the one before it is told."""
    engine = load(tiny_mlx)
    compiler = Compiler(engine.tokenizer)
    schema = {"type": "array", "items": {"const": 7}, "minItems": 2, "maxItems": 2}
    form = wire.Grammar((wire.GrammarPart("json_schema", json.dumps(schema), "response_format"),))
    texts = {}
    for max_tokens in range(8):
        request = wire.Generate([5, 6, 7], False, GREEDY, [], max_tokens, grammar=form)
        jobs = generation_jobs.Jobs(engine)
        jobs.admit(generation_jobs.prepare(request, engine, compiler))
        outs = []
        while not engine.idle:
            outs += [
                out
                for message in jobs.report(engine.step())
                if isinstance(message, wire.Step)
                for out in message.outs
            ]
        assert outs[-1].done
        texts[max_tokens] = "".join(out.text for out in outs)
        assert outs[-1].done.is_valid is (texts[max_tokens] == "[7, 7]"), max_tokens
    assert texts[0] == ""
    assert len(set(texts.values())) > 3


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(**FREE, seed=3)])
def test_what_the_directory_suppresses_is_never_said(
    sampling: SamplingParams, engine: Engine, tiny_mlx: Path, tmp_path: Path, load: Load
) -> None:
    prompt = {1: [1000 + i for i in range(20)]}
    said = set(generate(engine, prompt, 16, sampling)[1])
    for file in tiny_mlx.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    config = {"suppress_tokens": sorted(said)}
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    assert said.isdisjoint(generate(load(tmp_path), prompt, 32, sampling)[1])


# faults


def test_a_step_that_raises_fails_who_was_in_it_and_the_others_go_on(
    tiny_mlx: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load(tiny_mlx, n_parallel=2, prefix_cache_bytes=0)
    prompts = {number: [1000 + number, 1001, 1002] for number in range(3)}
    expected = generate(engine, prompts, 5)[2]
    kind = type(engine._model)
    compute = kind.__call__
    n_calls = 0

    def fails_once(*args: Any, **kwargs: Any) -> Any:
        nonlocal n_calls
        n_calls += 1
        if n_calls == 4:
            raise RuntimeError("the device is lost")
        return compute(*args, **kwargs)

    monkeypatch.setattr(kind, "__call__", fails_once)
    for number, prompt in prompts.items():
        engine.admit(number, prompt, GREEDY)
    said: list[int] = []
    failed = []
    while not engine.idle and len(said) < 5:
        result = engine.step()
        failed += result.failed
        said += [token for number, (token, *_) in result.tokens if number == 2]
    engine.cancel(2)
    assert [(number, str(error)) for number, error in failed] == [
        (0, "the device is lost"), (1, "the device is lost"),
    ]  # fmt: skip
    assert said == expected


@pytest.mark.parametrize(
    ("max_stall_s", "n_allowed", "n_each"), [(None, 0, 6), (None, 4, 6), (None, 20, 7), (0.2, 4, 2)]
)
def test_prompts_that_share_a_step_have_no_less_than_it_may_have(
    tiny_mlx: Path,
    load: Load,
    monkeypatch: pytest.MonkeyPatch,
    max_stall_s: float | None,
    n_allowed: int,
    n_each: int,
) -> None:
    """Or nothing would be learned from steps of so few tokens. And they get on in any case."""
    engine = load(tiny_mlx, max_stall_s=max_stall_s)
    n_prefilled: list[int] = []
    monkeypatch.setattr(engine._pace, "n_prefill", lambda n_decodes, n_most: n_allowed)
    monkeypatch.setattr(engine._pace, "observe", lambda _, n, seconds: n_prefilled.append(n))
    for number in range(3):
        engine.admit(number, [300 + number + i for i in range(40)], GREEDY)
    while len(n_prefilled) < 5:
        engine.step()
    assert n_prefilled[-1] == 3 * n_each


def test_a_model_that_fails_again_and_again_is_given_up(
    tiny_mlx: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load(tiny_mlx)

    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(type(engine._model), "__call__", fails)
    for number in range(2):
        engine.admit(number, [5, 6], GREEDY)
        assert [failed for failed, _ in engine.step().failed] == [number]
    engine.admit(2, [5, 6], GREEDY)
    with pytest.raises(RuntimeError, match="the device is lost"):
        engine.step()


class Refuses:
    """A constraint that has nothing to say after two tokens."""

    def __init__(self) -> None:
        self._n = 0

    def apply(self, logits: npt.NDArray[np.float32]) -> None:
        if self._n == 2:
            raise ValueError("it leads nowhere")

    def accept(self, token: int) -> None:
        self._n += 1


def test_a_constraint_that_raises_ends_its_own_answer_only(engine: Engine) -> None:
    expected = generate(engine, {1: [5, 6, 7]}, 8)[1]
    engine.admit(1, [5, 6, 7], GREEDY)
    engine.admit(2, [5, 6, 7], GREEDY, Refuses())
    said: dict[int, list[int]] = {1: [], 2: []}
    failed: list[tuple[int, str]] = []
    while len(said[1]) < 8:
        result = engine.step()
        failed += [(number, str(error)) for number, error in result.failed]
        for number, (token, *_) in result.tokens:
            said[number].append(token)
    engine.cancel(1)
    assert failed == [(2, "it leads nowhere")]
    assert said == {1: expected, 2: expected[:2]}
    assert engine.idle


def test_an_answer_that_ends_before_its_constraint_raises_is_fine(engine: Engine) -> None:
    """One step is computed ahead, and what goes wrong in it is nobody's fault."""
    engine.admit(1, [5, 6, 7], GREEDY, Refuses())
    said, _ = run(engine, {1: 2})
    assert len(said[1]) == 2


def test_who_fails_when_put_off_is_told_even_if_the_step_fails_too(
    tiny_mlx: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load(tiny_mlx, n_parallel=1)
    engine.admit(1, [5, 6, 7], GREEDY, Refuses(), rank=5.0)
    n_said = 0
    while n_said < 2:  # what comes next is refused, and not told yet
        n_said += len(engine.step().tokens)

    def fails(_: int) -> Any:
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(engine._rows, "step", fails)
    engine.admit(2, [8, 9], GREEDY, rank=1.0)
    failed = [(number, str(error)) for number, error in engine.step().failed]
    assert failed == [(1, "it leads nowhere"), (2, "the device is lost")]
    assert engine.idle


def test_a_row_that_cannot_be_copied_costs_what_is_remembered_and_no_answer(
    tiny_mlx: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load(tiny_mlx)
    prompts = {n: [1000 + i for i in range(40)] + [n] for n in range(4)}
    expected = {n: generate(engine, {n: prompts[n]}, 4, reuses=False)[n] for n in prompts}

    def fails(_: int) -> Any:
        raise RuntimeError("no buffer is left")

    monkeypatch.setattr(engine._rows, "cache_of", fails)
    engine.admit(0, prompts[0], GREEDY)
    engine.admit(1, prompts[1], GREEDY)
    said: dict[int, list[int]] = {n: [] for n in prompts}
    while not engine.idle:
        for number, (token, *_) in engine.step().tokens:
            said[number].append(token)
            if len(said[number]) == 4:
                engine.cancel(number)  # which would be remembered
            if number == 1 and len(said[1]) == 1:  # two that would go on from it
                engine.admit(2, prompts[2], GREEDY)
                engine.admit(3, prompts[3], GREEDY)
    assert said == expected
    assert len(engine._prompts) == 0


# what is remembered


def test_a_cancelled_answer_and_one_that_ended_are_remembered_and_never_hit_whole(
    tiny_mlx: Path, load: Load
) -> None:
    engine = load(tiny_mlx)
    prompt = [1000 + i for i in range(40)]
    answer = generate(engine, {1: prompt}, 5)[1]
    for wanted, n_known in (
        (prompt, 39),  # all but the last, whose successor is asked for
        (prompt + answer, 44),
        (prompt[:20], 19),
        ([*prompt[:20], 7, 8, 9], 20),
        ([7, *prompt], 0),
    ):
        engine.admit(2, wanted, GREEDY)
        _, cached = run(engine, {2: 3})
        assert cached == {2: n_known}, wanted
    engine.admit(3, prompt, GREEDY, reuses=False)
    _, cached = run(engine, {3: 3})
    assert cached == {3: 0}


def test_cells_that_no_row_takes_remember_prompts_too(tiny_mlx: Path, load: Load) -> None:
    """One conversation may be more than all of the prompt cache."""
    engine = load(tiny_mlx, prefix_cache_bytes=40_000, kv_tokens=400)
    n_each = read_chat_folder(tiny_mlx).kv_bytes_per_token
    prompt = [1000 + i for i in range(300)]
    assert 300 * n_each > 40_000
    cached = {}
    for number, tokens in enumerate([prompt, [*prompt, 5, 6], [7] * 350, prompt]):
        engine.admit(number, tokens, GREEDY)
        while not engine.idle:
            result = engine.step()
            cached |= dict(result.started)
            n_free = 400 - sum(len(live.tokens) for live in engine._running)
            assert engine._prompts.n_bytes <= 40_000 + n_free * n_each
            if result.tokens:
                engine.cancel(number)
    assert cached == {0: 0, 1: 300, 2: 0, 3: 0}, "the third one needed the cells"


def test_a_prompt_that_is_cancelled_in_the_middle_is_remembered_so_far(
    tiny_mlx: Path, load: Load
) -> None:
    engine = load(tiny_mlx, n_batch=16)
    prompt = [1000 + i for i in range(100)]
    engine.admit(1, prompt, GREEDY)
    assert not engine.step().tokens
    assert not engine.step().tokens
    engine.cancel(1)
    engine.admit(2, prompt, GREEDY)
    said, cached = run(engine, {2: 4})
    assert cached == {2: 32}
    assert said[2] == generate(load(tiny_mlx), {1: prompt}, 4)[1]


@pytest.mark.parametrize("reason", ["mamba", "jamba", "gemma3_text", "llama4", "not mergeable"])
def test_models_whose_memory_cannot_be_cut_or_merged_answer_too(
    reason: str, tiny_mlx: Path, tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason in FAMILIES:
        model = write_random(tmp_path / reason, reason, tokenizer_of=tiny_mlx)
    else:
        model = tiny_mlx
        monkeypatch.setattr("engine.backends.mlx_rows._can_merge", lambda _: False)
    engine = load(model, n_batch=32)
    prompts = {n: [1000 + n + 7 * i for i in range(5 + 22 * n)] for n in range(3)}
    together = generate(engine, prompts, 6)
    fresh = load(model, n_batch=256, prefix_cache_bytes=0)
    assert together == {number: generate(fresh, {number: prompt}, 6)[number]
                        for number, prompt in prompts.items()}  # fmt: skip
    longer = prompts[2] + together[2] + [55, 56]
    other = [*longer[:44], 57, 58]  # which wants the memory of the longer one to be cut
    for number, prompt, most in ((9, longer, len(longer) - 2), (10, other, 44)):
        engine.admit(number, prompt, GREEDY)
        said, cached = run(engine, {number: 4})
        assert cached[number] in ((most - 1, most) if number == 9 else (0, most))
        assert said[number] == generate(fresh, {number: prompt}, 4)[number]


def test_what_is_remembered_takes_the_memory_that_it_is_counted_with(
    tiny_mlx: Path, tmp_path: Path, load: Load
) -> None:
    """Of rows that were in one batch, and of one whose prompt has not begun when it is cancelled:
    those of a model with states are computed one after the other."""
    import mlx.core as mx

    engine = load(write_random(tmp_path / "mamba", "mamba", tokenizer_of=tiny_mlx), n_batch=64)
    generate(engine, {0: [5, 6]}, 2)  # whatever a first step leaves
    n_before, n_counted = mx.get_active_memory(), engine._prompts.n_bytes
    for number in range(1, 9):
        engine.admit(number, [1000 * number, *range(30)], GREEDY)
    engine.step()
    engine.cancel(8)
    said, _ = run(engine, dict.fromkeys(range(1, 8), 3))
    assert sorted(said) == [*range(1, 8)]
    n_counted = engine._prompts.n_bytes - n_counted
    assert len(engine._prompts) == 8
    assert n_counted <= mx.get_active_memory() - n_before < 1.2 * n_counted


def test_one_row_gives_memory_back_as_it_grows(
    tiny_mlx: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mlx keeps what grew too small for its cells, on a GPU without end."""
    import mlx.core as mx

    monkeypatch.setattr("engine.backends.mlx_rows._can_merge", lambda _: False)
    engine = load(tiny_mlx, n_batch=100)
    n_given_back = 0

    def given_back() -> None:
        nonlocal n_given_back
        n_given_back += 1

    monkeypatch.setattr(mx, "clear_cache", given_back)
    engine.admit(1, [1000 + i for i in range(250)], GREEDY)
    n_told = 0
    while n_told < 8:
        n_told += len(engine.step().tokens)
    assert n_given_back == 4, "after each part of the prompt, and where the cells grew"
    engine.cancel(1)
    n_given_back = 0
    engine.admit(2, [2000 + i for i in range(250)], SCORED)
    for _ in range(3):
        engine.step()
    engine.cancel(2)
    assert n_given_back == 4, "after each part of what is scored, and at its end"


SCORED = SamplingParams(temperature=0, n_logprobs=0, prompt_logprobs=0)


def scored_tokens(result: StepResult, number: int) -> list[int]:
    return [sampled.token for of, sampled in result.scored if of == number]


def test_a_prompt_that_cannot_be_scored_fails_alone(
    tiny_mlx: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load(tiny_mlx, n_parallel=2)
    expected = generate(engine, {1: [1000, 1001]}, 8)[1]

    def fails(*_: Any) -> int:
        raise RuntimeError("there is no room")

    monkeypatch.setattr(mlx_rows.ScoredPrompt, "step", fails)
    engine.admit(1, [1000, 1001], GREEDY)
    for number in (2, 3, 4):  # as often as would end the worker
        engine.admit(number, [1002] * 9, SCORED, reuses=False)
    said: list[int] = []
    failed: list[int] = []
    while len(said) < 8:
        result = engine.step()
        failed += (number for number, _ in result.failed)
        said += (token for number, (token, *_) in result.tokens if number == 1)
    engine.cancel(1)
    assert (said, failed) == (expected, [2, 3, 4])


def test_a_short_prompt_is_scored_before_a_long_one(tiny_mlx: Path, load: Load) -> None:
    engine = load(tiny_mlx, n_parallel=3)
    long, short = [1000 + i for i in range(400)], [2000 + i for i in range(70)]
    engine.admit(1, long, SCORED)
    engine.step()
    engine.admit(2, short, SCORED)
    engine.admit(3, short, GREEDY)  # does not wait for what that computes
    scored: dict[int, list[int]] = {1: [], 2: []}
    said: list[int] = []
    while len(said) < 2:
        result = engine.step()
        said += {number for number, _ in result.tokens} - {*said} - {1}
        for number, tokens in scored.items():
            tokens += scored_tokens(result, number)
    assert scored == {1: [], 2: short[1:]}
    while len(scored[1]) < len(long) - 1:
        scored[1] += scored_tokens(engine.step(), 1)
    assert scored[1] == long[1:]
    for number in (1, 2, 3):
        engine.cancel(number)


def test_a_prompt_of_one_token_is_not_scored_with_its_answer(tiny_mlx: Path, load: Load) -> None:
    engine = load(tiny_mlx, n_parallel=1)
    engine.admit(1, [1000], SCORED)
    for _ in range(4):
        assert engine.step().scored == []
    engine.admit(2, [1001, 1002], GREEDY, rank=-1.0)  # puts that off
    for _ in range(4):
        assert engine.step().scored == []
    engine.cancel(2)
    n_told = 0
    while not n_told:
        result = engine.step()
        n_told += len(result.tokens)
        assert result.scored == []
    engine.cancel(1)


@pytest.mark.parametrize("family", ["lfm2", "smollm3", "falcon_h1"])
def test_what_layers_count_is_computed_in_each_step(
    family: str, tiny_mlx: Path, tmp_path: Path, load: Load
) -> None:
    """Of a sum that nothing asks for every term would wait, with a buffer."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    engine = load(write_random(tmp_path / family, family, tokenizer_of=tiny_mlx))
    sizes = []
    engine.admit(1, [5, 6, 7], GREEDY)
    for _ in range(8):
        engine.step()
        cache = engine._rows._generator._generation_batch.prompt_cache
        parts = [part for _, part in tree_flatten([layer.state for layer in cache])]
        mx.export_to_dot(
            str(tmp_path / "graph"), *(part for part in parts if isinstance(part, mx.array))
        )
        sizes.append((tmp_path / "graph").stat().st_size)
    engine.cancel(1)
    assert sizes[-1] == sizes[-4]


@pytest.mark.parametrize(
    "family",
    ["gemma3_text", "glm4_moe_lite", "deepseek_v2", "minicpm3", "qwen3_5", "nemotron_h",
     "granitemoehybrid", "lfm2", "falcon_h1"],
)  # fmt: skip
def test_what_a_row_keeps_is_known_from_its_config(
    family: str, tiny_mlx: Path, tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.chat_folder.FLOAT_BYTES", 4)  # the weights are such
    folder = write_random(tmp_path / family, family, tokenizer_of=tiny_mlx)
    engine, facts = load(folder), read_chat_folder(folder)
    generate(engine, {1: [5] * 7}, 1)
    generate(engine, {2: [6] * 15}, 1)
    (short, n_short), (long, n_long) = remembered(engine)
    assert n_long - n_short == (len(long) - len(short)) * facts.kv_bytes_per_token
    n_states = n_short - len(short) * facts.kv_bytes_per_token
    assert 0.5 * facts.state_bytes <= n_states <= 1.3 * facts.state_bytes


# beside llama.cpp


def llama_logits(path: Path, tokens: list[int]) -> npt.NDArray[np.float32]:
    """Of every position, in F32 and with cells in F32."""
    llama = llama_cpp.Llama(
        str(path), n_ctx=len(tokens) + 8, n_threads=1, logits_all=True, type_k=0, type_v=0,
        verbose=False,
    )  # fmt: skip
    try:
        llama.eval(tokens)
        return np.array(llama.scores[: len(tokens)])
    finally:
        llama.close()


def mlx_logits(engine: Any, tokens: list[int]) -> npt.NDArray[np.float32]:
    import mlx.core as mx

    return np.array(engine._model(mx.array([tokens]))[0])


def as_f32(path: Path, out: Path) -> Path:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize = llama_cpp.LLAMA_FTYPE_ALL_F32, True
    params.nthread = 2
    assert llama_cpp.llama_model_quantize(str(path).encode(), str(out).encode(), params) == 0
    return out


@pytest.mark.parametrize("which", ["tiny", "smollm2"])
def test_the_numbers_are_llama_cpps(
    which: str, request: pytest.FixtureRequest, tmp_path: Path, load: Load
) -> None:
    gguf: Path = request.getfixturevalue(which)
    engine = load(request.getfixturevalue(f"{which}_mlx"))
    text = (
        "<|im_start|>user\nWhat is the capital of France, and how many people live there? 🎉"
        "<|im_end|>\n<|im_start|>assistant\nThe capital of France is Paris."
    )
    tokens = (
        ids(engine, text) if which == "smollm2" else random.Random(1).choices(range(49152), k=200)
    )
    theirs = llama_logits(as_f32(gguf, tmp_path / "f32.gguf"), tokens).astype(np.float64)
    ours = mlx_logits(engine, tokens).astype(np.float64)
    assert (theirs.argmax(axis=-1) == ours.argmax(axis=-1)).all()
    log_p, log_q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (theirs, ours))
    assert float((np.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean()) < 1e-4


ALPHABETS = [
    "abc XYZ", "0123456789", " \t\n\r", "äöüß Größe", "世界日本語", "'s 't ll '", "<|im_start|>",
    "🎉👩\u200d👩\u200d👧e\u0301", "</s><tool_call>{}[]\":,", "\x00\x7f\u200b\u00a0\ufffd",
    "def f(x):\n    return", "Ωмир العربية",
]  # fmt: skip


def test_texts_have_the_ids_that_llama_cpp_gives_them(
    tiny: Path, tiny_mlx: Path, load: Load
) -> None:
    ours, theirs = load(tiny_mlx).tokenizer, load(tiny).tokenizer
    assert ours.n_vocab == theirs.n_vocab
    dice = random.Random(8)
    for number in range(1000):
        alphabets = dice.sample(ALPHABETS, k=dice.randint(1, 4))
        pieces = [dice.choice(dice.choice(alphabets)) for _ in range(dice.randint(1, 40))]
        text = "".join(pieces) if number % 3 else "".join(dice.choices(ALPHABETS, k=3))
        for parse_special in (False, True):
            wanted = theirs.tokenize(text, parse_special=parse_special, continues=False)
            found = ours.tokenize(text, parse_special=parse_special, continues=False)
            assert found == wanted, text
    for token in range(ours.n_vocab):
        assert ours.piece(token) == theirs.piece(token), token
        assert ours.literal(token) == theirs.literal(token), token
        assert ours.ends_generation(token) == theirs.ends_generation(token), token


ENDS = (
    "<|endoftext|> <|end_of_text|> <|eot_id|> <|eom_id|> <end_of_turn> <eos> <end_of_utterance> "
    "<｜end▁of▁sentence｜> <|file_sep|> <|end|> <|calls|> <turn|> [EOT] [EOS] "
    "[PAD] _<EOT>"
)


@pytest.mark.parametrize(
    "more", [f"{ENDS} <|call|>", f"{ENDS} <|call|> <|return|>", f"{ENDS} <|flush|>"]
)
def test_an_answer_ends_with_the_tokens_that_llama_cpp_takes_for_ends(
    more: str, tmp_path: Path, load: Load
) -> None:
    """Also where a directory does not say so. In harmony <|end|> ends a message, not the turn."""
    others = ["<|EOT|>", "<|eot|>", "<|im_sep|>", "<|tool_call|>", "<|end_of_role|>"]
    tokens = [*more.split(), *others]
    theirs = load(write_tiny_spm(tmp_path / "ends.gguf", more_tokens=tokens)).tokenizer
    names = [*spm_vocabulary()[0], *tokens]
    file = TokenizerFile(
        Vocabulary(), [AddedToken(name, number, special=True) for number, name in enumerate(names)]
    )
    wanted = {number for number in range(len(names)) if theirs.ends_generation(number)}
    assert end_tokens(tmp_path, file, TokenizerConfig()) == wanted


# loading


def test_directories_that_are_no_models_fail_with_one_sentence(
    tiny_mlx: Path, tmp_path: Path
) -> None:
    def broken(name: str, change: Callable[[Path], object]) -> None:
        folder = tmp_path / name
        folder.mkdir()
        for file in tiny_mlx.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        change(folder)
        with pytest.raises(ModelLoadFailed) as caught:
            engine_of(folder)
        assert name in caught.value.message
        assert str(tmp_path) not in caught.value.message

    def cut(folder: Path) -> None:
        whole = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(whole[:-1000])

    def of_another_family(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "perpetuum"}))

    def with_other_sizes(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))

    def that_mlx_lm_trips_over(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"rope_scaling": "linear"}))

    broken("trip", that_mlx_lm_trips_over)
    broken("cut", cut)
    broken("odd", of_another_family)
    broken("short", with_other_sizes)
    broken("mute", lambda folder: (folder / "tokenizer.json").unlink())
    broken("empty", lambda folder: (folder / "model.safetensors").unlink())
