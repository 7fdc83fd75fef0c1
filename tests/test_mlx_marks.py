"""Prompts on MLX that begin with what others had, where memory cannot be cut anywhere."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.backends import mlx_rows
from engine.types import SamplingParams
from tests.engines import GREEDY, generate, needs_mlx, run
from tests.mlx_models import remembered, write_random

pytestmark = [pytest.mark.real, needs_mlx]

Load = Callable[..., Any]
MARKED = ["mamba", "gemma3_text", "recurrent_gemma", "falcon_h1", "qwen3_5", "llama4"]
PROMPT = [1000 + 7 * i for i in range(700)]
SYSTEM = PROMPT[:600]


def answers(
    engine: Any, prompts: dict[int, list[int]], n_tokens: int, *, ends: dict[int, int] | None = None
) -> tuple[dict[int, list[int]], dict[int, int]]:
    """What is said to all prompts at once, and how much of each was cached. Others that run end
    after so many tokens."""
    for number, prompt in prompts.items():
        engine.admit(number, prompt, GREEDY)
    return run(engine, dict.fromkeys(prompts, n_tokens) | (ends or {}))


@pytest.mark.parametrize("family", MARKED)
def test_a_prompt_goes_on_where_another_was_marked(
    family: str, tiny_mlx: Path, tmp_path: Path, load: Load
) -> None:
    """With other thoughts or none in the last answer, with another question about the same text,
    and exactly where an answer ended."""
    model = write_random(tmp_path / family, family, tokenizer_of=tiny_mlx)
    engine = load(model, n_ctx=1024, n_batch=200)
    fresh = load(model, n_ctx=1024, n_batch=1024, prefix_cache_bytes=0)
    said, cached = answers(engine, {1: PROMPT}, 5)
    assert cached == {1: 0}
    ended = [*PROMPT, *said[1]]
    for prompt, n_cached in (
        ([*ended, 55, 56], len(ended)),
        ([*PROMPT[:-3], 55, 56, 57], len(PROMPT) - 4),
        ([*SYSTEM, 58, 59], 512),
        ([*PROMPT[:300], 60], 256),
        ([*PROMPT[:200], 61], 0),
    ):
        said, cached = answers(engine, {2: prompt}, 4)
        # of one row the last token is never in its memory
        assert cached[2] in ((n_cached, n_cached - 1) if family == "llama4" else (n_cached,))
        assert said == answers(fresh, {2: prompt}, 4)[0]


@pytest.mark.parametrize("family", ["mamba", "gemma3_text", "falcon_h1", "qwen3_5"])
def test_who_comes_together_has_its_beginning_computed_once(
    family: str, tiny_mlx: Path, tmp_path: Path, load: Load
) -> None:
    model = write_random(tmp_path / family, family, tokenizer_of=tiny_mlx)
    engine = load(model, n_ctx=1024, n_batch=128, n_parallel=4)
    fresh = load(model, n_ctx=1024, n_batch=1024, prefix_cache_bytes=0)
    prompts = {n: [*PROMPT[:150], *(2000 + n + 3 * i for i in range(20 + 9 * n))] for n in range(4)}
    said, cached = answers(engine, prompts, 6)
    assert cached == {0: 0, 1: 150, 2: 150, 3: 150}
    for number, prompt in prompts.items():
        assert said[number] == generate(fresh, {number: prompt}, 6)[number]


def test_a_row_that_has_no_mark_in_common_costs_nothing(
    tiny_mlx: Path, tmp_path: Path, load: Load
) -> None:
    model = write_random(tmp_path / "lfm2", "lfm2", tokenizer_of=tiny_mlx)
    engine = load(model, n_ctx=1024)
    answers(engine, {1: [5, *PROMPT]}, 3)
    ((kept, _),) = remembered(engine)
    engine.admit(2, PROMPT[:60], GREEDY)
    while not engine.step().tokens:
        pass
    engine.admit(3, [*PROMPT[:50], 9, 8, 7], GREEDY)
    assert engine.step().started == [(3, 0)]
    assert [tokens.tolist() for tokens, _ in remembered(engine)] == [kept.tolist()]
    engine.cancel(2)
    engine.cancel(3)


def test_a_prompt_that_joins_another_one_before_its_mark_keeps_its_first_token(
    tiny_mlx: Path, tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A piece of one token leaves a window in an order for which mlx-lm's mask is one off."""
    model = write_random(tmp_path / "gemma3_text", "gemma3_text", tokenizer_of=tiny_mlx)
    engine = load(model, n_ctx=1024, n_batch=51, n_parallel=2)
    fresh = load(model, n_ctx=1024, prefix_cache_bytes=0)
    monkeypatch.setattr(engine._pace, "n_prefill", lambda *_: 51)
    engine.admit(1, PROMPT[:400], GREEDY)
    while not engine._running or engine._rows.n_past(1) < 255:
        engine.step()
    assert engine._rows.n_past(1) == 255
    other = [20000 + 3 * i for i in range(12)]
    assert answers(engine, {2: other}, 6, ends={1: 6})[0][2] == answers(fresh, {2: other}, 6)[0][2]


def test_below_a_window_beginnings_are_shared_wherever_they_end(
    tiny_mlx: Path, tmp_path: Path, load: Load
) -> None:
    """Also by who comes when the other's prefill has come further than that."""
    model = write_random(
        tmp_path / "wide", "gemma3_text", tokenizer_of=tiny_mlx, sliding_window=512
    )
    prompt = [*PROMPT[:200], 5, 6]
    expected = generate(load(model), {1: prompt}, 3)[1]
    for n_bytes in (1 << 28, 0):
        engine = load(model, n_ctx=1024, n_batch=64, n_parallel=4, prefix_cache_bytes=n_bytes)
        engine.admit(1, PROMPT[:400], GREEDY)
        while not engine._running or engine._rows.n_past(1) < 250:
            engine.step()
        said, cached = answers(engine, {2: prompt}, 3, ends={1: 3})
        assert cached == {2: 200}
        assert said[2] == expected


def test_without_a_prompt_cache_nobody_waits_for_a_mark(
    tiny_mlx: Path, tmp_path: Path, load: Load
) -> None:
    model = write_random(tmp_path / "lfm2", "lfm2", tokenizer_of=tiny_mlx)
    engine = load(model, n_ctx=1024, n_batch=64, n_parallel=2, prefix_cache_bytes=0)
    engine.admit(1, PROMPT, GREEDY)
    engine.step()
    engine.admit(2, [*PROMPT[:400], 5], GREEDY)
    assert engine.step().started == [(2, 0)]
    assert not engine._prompts._marks._wanted


def test_a_few_tokens_before_a_mark_say_nothing_of_the_pace(
    tiny_mlx: Path, tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_random(tmp_path / "lfm2", "lfm2", tokenizer_of=tiny_mlx)
    engine = load(model, n_ctx=1024, n_batch=250)
    observed: list[int] = []
    monkeypatch.setattr(engine._pace, "n_prefill", lambda *_: 250)
    monkeypatch.setattr(engine._pace, "observe", lambda _, n, seconds: observed.append(n))
    engine.admit(1, PROMPT, GREEDY)
    while not engine.step().tokens:
        pass
    engine.cancel(1)
    assert [n for n in observed if n] == [250, 250, 184, 3], "of 250, 6, 250, 6, 184, 3"


@pytest.mark.parametrize("family", ["gemma3_text", "lfm2", "llama4"])
@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(temperature=2.0, top_k=20, seed=3)])
def test_who_is_put_off_goes_on_where_it_was(
    family: str,
    sampling: SamplingParams,
    tiny_mlx: Path,
    tmp_path: Path,
    load: Load,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = write_random(tmp_path / family, family, tokenizer_of=tiny_mlx)
    engine = load(model, n_parallel=1)
    undisturbed = generate(load(model), {1: PROMPT[:50]}, 16, sampling)[1]
    joined: list[tuple[int, int]] = []
    kind = type(engine._rows)
    add = kind.add

    def added(
        self: Any, number: int, tokens: list[int], cached: Any, n: int, *rest: Any, is_marked: bool
    ) -> None:
        joined.append((number, len(tokens) - n))
        add(self, number, tokens, cached, n, *rest, is_marked=is_marked)

    monkeypatch.setattr(kind, "add", added)
    engine.admit(2, PROMPT[:50], sampling, rank=5.0)
    said: dict[int, list[int]] = {2: [], 3: []}
    started: list[tuple[int, int]] = []
    while not engine.idle:
        result = engine.step()
        started += result.started
        for number, (token, *_) in result.tokens:
            said[number].append(token)
            if len(said[number]) == {2: 16, 3: 2}[number]:
                engine.cancel(number)
            if number == 2 and len(said[2]) == 5:
                engine.admit(3, [7, 8, 9], GREEDY, rank=1.0)
    assert started == [(2, 0), (3, 0)]
    assert joined == [(2, 50), (3, 3), (2, 1)], "all but its last token was computed"
    assert said[2] == undisturbed


def test_marks_are_bounded_with_what_is_remembered(
    tiny_mlx: Path, tmp_path: Path, load: Load
) -> None:
    model = write_random(tmp_path / "qwen3_5", "qwen3_5", tokenizer_of=tiny_mlx)
    engine = load(model, n_ctx=1024)
    answers(engine, {1: PROMPT}, 2)
    n_whole = engine._prompts.n_bytes
    ((_, n_kept),) = remembered(engine)
    assert n_whole > 1.5 * n_kept, "with three marks"
    most = int(0.9 * n_whole)
    engine = load(model, n_ctx=1024, kv_tokens=1, prefix_cache_bytes=most)
    for number in range(4):
        engine.admit(number, [5 + number, *PROMPT], GREEDY)
        while not engine.idle:
            result = engine.step()
            assert engine._prompts.n_bytes <= most
            for of, _ in result.tokens:
                engine.cancel(of)
    assert engine._prompts.n_bytes > 0


def test_a_mark_behind_a_window_has_no_more_than_the_window(
    tiny_mlx: Path, tmp_path: Path, load: Load
) -> None:
    """Though a pass leaves all that its first token sees."""
    model = write_random(tmp_path / "gemma3_text", "gemma3_text", tokenizer_of=tiny_mlx)
    engine = load(model, n_ctx=1024, n_batch=512)
    engine.admit(1, PROMPT, GREEDY)
    while engine._prompts.n_bytes == 0:
        engine.step()
    (mark,) = engine._prompts._marks._saved.values()
    assert {layer.keys.shape[2] for layer in mark.caches} == {16}
    engine.cancel(1)


def test_an_answer_that_is_to_have_the_same_numbers_makes_no_marks(
    tiny_mlx: Path, tmp_path: Path, load: Load
) -> None:
    """Its prompt is computed in the same pieces every time; nor does anybody wait for some."""
    model = write_random(tmp_path / "lfm2", "lfm2", tokenizer_of=tiny_mlx)
    engine = load(model, n_ctx=1024)
    engine.admit(1, PROMPT, GREEDY, reuses=False)
    assert engine.step().started == [(1, 0)]
    engine.admit(2, PROMPT, GREEDY)
    assert engine.step().started == [(2, 0)]
    assert engine._prompts._marks.n_bytes == 0


def test_what_cannot_be_copied_costs_no_answer(
    tiny_mlx: Path, tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_random(tmp_path / "lfm2", "lfm2", tokenizer_of=tiny_mlx)
    expected = generate(load(model, n_ctx=1024), {1: PROMPT}, 4)[1]
    engine = load(model, n_ctx=1024)

    def fails(*_: Any) -> Any:
        raise RuntimeError("no buffer is left")

    monkeypatch.setattr(mlx_rows.BatchRows, "_copied", fails)
    assert answers(engine, {1: PROMPT}, 4) == ({1: expected}, {1: 0})


def test_a_step_that_fails_leaves_no_marks(
    tiny_mlx: Path, tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_random(tmp_path / "lfm2", "lfm2", tokenizer_of=tiny_mlx)
    engine = load(model, n_ctx=1024, n_batch=256)
    engine.admit(1, PROMPT, GREEDY)
    while engine._prompts.n_bytes == 0:
        engine.step()

    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(type(engine._model), "__call__", fails)
    assert [number for number, _ in engine.step().failed] == [1]
    assert engine._prompts.n_bytes == 0
