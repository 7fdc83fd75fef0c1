"""Guessed tokens on MLX: what is said with them is what is said without."""

import random
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.speculation import Guesses, Speculation
from engine.types import Sampled, SamplingParams
from tests.engines import GREEDY, needs_mlx
from tests.mlx_models import FAMILIES, write_random

pytestmark = [pytest.mark.real, needs_mlx]

Load = Callable[..., Any]
SAMPLINGS = [
    GREEDY,
    SamplingParams(temperature=2.0, top_k=20, seed=3),
    SamplingParams(temperature=2.0, top_k=20, seed=3, frequency_penalty=0.5, n_logprobs=2),
]
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
    engine: Any, prompt: list[int], sampling: SamplingParams, n_tokens: int
) -> tuple[list[Sampled], int, int]:
    """What is said, a token a step at most; how many tokens were guessed, and how many right."""
    engine.admit(1, list(prompt), sampling)
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


def model_of(name: str, tiny_mlx: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if name in FAMILIES:
        return write_random(folder / name, name, tokenizer_of=tiny_mlx)
    if name == "one row":
        monkeypatch.setattr("engine.backends.mlx_rows._can_merge", lambda _: False)
    return tiny_mlx


@pytest.mark.parametrize("name", ["plain", "one row", *FAMILIES])
def test_what_is_said_is_the_same_with_guesses(
    name: str,
    tiny_mlx: Path,
    tmp_path: Path,
    load: Load,
    monkeypatch: pytest.MonkeyPatch,
    guess: Callable[[list[int]], None],
) -> None:
    """Of every kind of memory, also where windows and chunks are long left; and what is remembered
    of it afterwards is what was said."""
    model = model_of(name, tiny_mlx, tmp_path, monkeypatch)
    without, speculating = load(model, n_batch=64), load(model, n_batch=64, speculates=True)
    prompt = [1000 + 7 * i for i in range(40)]
    for sampling in SAMPLINGS:
        expected, *counts = answer(without, prompt, sampling, 60)
        assert counts == [0, 0]
        tokens = [sampled.token for sampled in expected]
        guess(prompt + tokens)
        said, n_guessed, n_right = answer(speculating, prompt, sampling, 60)
        assert [sampled.token for sampled in said] == tokens
        assert [sampled.logprob for sampled in said] == pytest.approx(
            [sampled.logprob for sampled in expected], abs=1e-4
        )
        assert 20 < n_right < n_guessed
    # what is remembered of it is what was said
    longer = [*prompt, *tokens[:-1], 55, 56]
    expected, *_ = answer(load(model, n_batch=64), longer, GREEDY, 10)
    guess(longer + [sampled.token for sampled in expected])
    said, *_ = answer(speculating, longer, GREEDY, 10)
    assert [sampled.token for sampled in said] == [sampled.token for sampled in expected]
