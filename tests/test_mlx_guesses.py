"""Guessed tokens on MLX: what is said with them is what is said without."""

import random
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from engine.speculation import Guesses, Speculation
from engine.types import Sampled, SamplingParams
from tests.engines import GREEDY, needs_mlx
from tests.mlx_models import FAMILIES, remembered, write_random

pytestmark = [pytest.mark.real, needs_mlx]

Load = Callable[..., Any]
SAMPLINGS = [
    GREEDY,
    SamplingParams(temperature=2.0, top_k=20, seed=3),
    SamplingParams(temperature=2.0, top_k=20, seed=3, frequency_penalty=0.5, n_logprobs=2),
]
NAMES = [  # a kind of memory each
    "plain", "one row", "deepseek_v2", "gemma3_text", "recurrent_gemma", "lfm2", "falcon_h1",
    "qwen3_5", "nemotron_h", "llama4",
]  # fmt: skip
WRONG = 77


@pytest.fixture
def guess(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[int]], None]:
    """Has what follows of these tokens guessed in every step, mostly with one wrong token."""
    dice = random.Random(3)

    def guess(truth: list[int]) -> None:
        def follow(_: Guesses, tokens: "array[int]") -> None:
            assert truth[: len(tokens)] == tokens.tolist()

        def next_guesses(_: Guesses, tokens: "array[int]", n: int) -> "array[int]":
            guesses = array("i", truth[len(tokens) : len(tokens) + n])
            if guesses and dice.random() < 0.7:
                guesses[dice.randrange(len(guesses))] = WRONG
            return guesses

        monkeypatch.setattr(Guesses, "exist", property(lambda _: True))
        monkeypatch.setattr(Guesses, "follow", follow)
        monkeypatch.setattr(Guesses, "next", next_guesses)
        monkeypatch.setattr(Speculation, "plan", lambda *_: [dice.randint(0, 6)])

    return guess


def answer(
    engine: Any, prompt: list[int], sampling: SamplingParams, n_tokens: int, *, reuses: bool = True
) -> tuple[list[Sampled], int, int]:
    """What is said, a token a step at most; how many tokens were guessed, and how many right."""
    engine.admit(1, list(prompt), sampling, reuses=reuses)
    said: list[Sampled] = []
    n_guessed = n_right = 0
    while not engine.idle:
        result = engine.step()
        assert not result.failed
        assert len(result.tokens) <= 1
        said += (sampled for _, sampled in result.tokens)
        n_guessed += sum(n for _, n in result.guessed)
        n_right += len(result.right)
        if len(said) == n_tokens:
            engine.cancel(1)
    return said, n_guessed, n_right


@pytest.fixture
def model_of(
    tiny_mlx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], Path]:
    def model_of(name: str) -> Path:
        if name in FAMILIES:
            return write_random(tmp_path / name, name, tokenizer_of=tiny_mlx)
        if name == "gemma3, wide":
            return write_random(
                tmp_path / name, "gemma3_text", tokenizer_of=tiny_mlx, sliding_window=64
            )
        if name == "one row":
            monkeypatch.setattr("engine.backends.mlx_rows._can_merge", lambda _: False)
        return tiny_mlx

    return model_of


@pytest.mark.parametrize("name", NAMES)
def test_what_is_said_is_the_same_with_guesses(
    name: str,
    model_of: Callable[[str], Path],
    load: Load,
    guess: Callable[[list[int]], None],
) -> None:
    """Of every kind of memory, also where windows and chunks are long left."""
    model = model_of(name)
    without, speculating = load(model, n_batch=64), load(model, n_batch=64, speculates=True)
    prompt = [1000 + 7 * i for i in range(40)]
    for sampling in SAMPLINGS:
        expected, *counts = answer(without, prompt, sampling, 40)
        assert counts == [0, 0]
        tokens = [sampled.token for sampled in expected]
        guess(prompt + tokens)
        said, n_guessed, n_right = answer(speculating, prompt, sampling, 40)
        assert [sampled.token for sampled in said] == tokens
        assert [sampled.logprob for sampled in said] == pytest.approx(
            [sampled.logprob for sampled in expected], abs=1e-4
        )
        assert 12 < n_right < n_guessed


def test_what_is_to_have_the_same_numbers_every_time_has_no_guesses(
    tiny_mlx: Path, load: Load, guess: Callable[[list[int]], None]
) -> None:
    engine = load(tiny_mlx, speculates=True)
    guess([])
    said, n_guessed, _ = answer(engine, [5, 6, 7], GREEDY, 20, reuses=False)
    assert len(said) == 20
    assert n_guessed == 0


@pytest.mark.parametrize("name", ["one row", "gemma3_text", "recurrent_gemma", "lfm2", "llama4"])
def test_an_answer_that_ends_before_its_guesses_is_remembered_as_it_was_told(
    name: str,
    model_of: Callable[[str], Path],
    load: Load,
    guess: Callable[[list[int]], None],
) -> None:
    """Or the next turn of a conversation would begin from nothing, where memory cannot be cut.
    Where it can only be put back some tokens are lost."""
    model = model_of(name)
    without, speculating = load(model, prefix_cache_bytes=0), load(model, speculates=True)
    prompt = [1000 + 7 * i for i in range(40)]
    expected = prompt + [sampled.token for sampled in answer(without, prompt, GREEDY, 30)[0]]
    is_exact = name in ("one row", "gemma3_text", "llama4")
    n_lost = []
    for n_tokens in range(4, 12):
        guess(expected)
        answer(speculating, prompt, GREEDY, n_tokens)
        assert not speculating._said
        ((entry, _),) = remembered(speculating)
        n_told = len(prompt) + n_tokens
        assert entry.tolist() == expected[: len(entry)]
        n_lost.append(n_told - len(entry))
        longer = [*expected[: len(entry)], 55, 56]
        following = [sampled.token for sampled in answer(without, longer, GREEDY, 5)[0]]
        guess(longer + following)
        speculating.admit(2, longer, GREEDY)
        result = speculating.step()
        assert result.started == [(2, len(entry))]
        said = [token for _, (token, *_) in result.tokens]
        while len(said) < 5:
            said += [token for _, (token, *_) in speculating.step().tokens]
        speculating.cancel(2)
        assert said == following
        speculating._prompts.clear()
    # of one row the last token is never in its memory
    assert min(n_lost) == (name in ("one row", "llama4"))
    assert max(n_lost) <= (1 if is_exact else 8)


@pytest.mark.parametrize("name", ["plain", "gemma3_text", "gemma3, wide", "lfm2"])
def test_a_row_that_had_company_has_guesses_when_it_is_alone(
    name: str,
    model_of: Callable[[str], Path],
    load: Load,
    guess: Callable[[list[int]], None],
) -> None:
    """Its cells begin behind those of the other's longer prompt then; and who comes in the midst
    of its guesses joins it."""
    model = model_of(name)
    without, speculating = load(model), load(model, speculates=True)
    prompt, other = [1000 + 7 * i for i in range(10)], [2000 + 3 * i for i in range(58)]
    expected, others = (
        [sampled.token for sampled in answer(without, of, GREEDY, 60)[0]] for of in (prompt, other)
    )
    guess(prompt + expected)
    said: dict[int, list[int]] = {1: [], 2: [], 3: []}
    n_guessed = 0
    speculating.admit(1, prompt, GREEDY)
    speculating.admit(2, other, GREEDY)
    while len(said[1]) < 60:
        result = speculating.step()
        assert not result.failed
        if n_guessed < 20 <= n_guessed + sum(n for _, n in result.guessed):
            speculating.admit(3, other, GREEDY)
        n_guessed += sum(n for _, n in result.guessed)
        for number, (token, *_) in result.tokens:
            said[number].append(token)
            if number > 1 and len(said[number]) == 14:
                speculating.cancel(number)
    speculating.cancel(1)
    assert n_guessed > 20
    assert said == {1: expected, 2: others[:14], 3: others[:14]}


class Says:
    """A constraint that leaves nothing else, and raises behind it."""

    def __init__(self, script: list[int]) -> None:
        self._left = script[::-1]

    def apply(self, logits: npt.NDArray[np.float32]) -> None:
        if not self._left:
            raise ValueError("it leads nowhere")
        token = logits[self._left[-1]]
        logits[:] = -np.inf
        logits[self._left[-1]] = token

    def accept(self, token: int) -> None:
        assert token == self._left.pop()


@pytest.mark.parametrize("name", ["plain", "one row", "lfm2"])
@pytest.mark.parametrize("is_ended", [True, False])
def test_what_repeats_the_prompt_takes_few_passes(
    name: str,
    is_ended: bool,
    model_of: Callable[[str], Path],
    load: Load,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As soon as the guesses are known to be right, where passes with several tokens cost no more;
    and what goes wrong behind the last token is told after it."""
    model = model_of(name)
    engine = load(model, speculates=True)
    monkeypatch.setattr(Speculation, "_seconds", lambda *_: 1.0)
    n_passes = 0
    kind = type(engine._model)
    compute = kind.__call__

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal n_passes
        n_passes += 1
        return compute(*args, **kwargs)

    monkeypatch.setattr(kind, "__call__", counted)
    prompt = [1000 + i * i for i in range(80)]
    engine.admit(1, prompt, GREEDY, Says(prompt[:60]))
    said: list[int] = []
    n_right = 0
    failed: list[str] = []
    while not engine.idle:
        result = engine.step()
        said += (token for _, (token, *_) in result.tokens)
        n_right += len(result.right)
        failed += (str(error) for _, error in result.failed)
        if len(said) == 60 and is_ended:
            engine.cancel(1)
    assert said == prompt[:60]
    assert failed == ([] if is_ended else ["it leads nowhere"])
    assert n_right > 45
    assert n_passes < 20


def test_what_says_something_else_in_long_passes_has_no_guesses(
    tiny_mlx: Path, tmp_path: Path, load: Load, guess: Callable[[list[int]], None]
) -> None:
    engine = load(
        write_random(tmp_path / "plamo3", "plamo3", tokenizer_of=tiny_mlx), speculates=True
    )
    guess([])
    said, n_guessed, _ = answer(engine, [5, 6, 7], GREEDY, 20)
    assert (len(said), n_guessed) == (20, 0)
