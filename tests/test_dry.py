"""DRY: as llama.cpp's sampler of that name, on the same tokens."""

import ctypes
import random
from pathlib import Path
from typing import Any

import llama_cpp as lib
import numpy as np
import pytest

from engine.backends.llama_sampling import LlamaDry
from engine.backends.llamacpp import LlamaDecoder
from engine.dry import Dry
from engine.types import SamplingParams
from tests.engines import spec


def lowered(dry: Dry, n_vocab: int) -> dict[int, float]:
    """By how much each token is lowered."""
    logits = np.zeros(n_vocab, np.float32)
    dry.apply(logits)
    return {int(token): float(-logits[token]) for token in np.flatnonzero(logits)}


def word(token: int) -> bytes:
    return b"\n" if token == 0 else b" %d" % token


@pytest.mark.parametrize(
    ("tokens", "values", "expected"),
    [
        ([1, 2, 3, 1, 2], {}, {3: 2.0}),
        ([1, 2, 3, 4, 1, 2, 3], {}, {4: 4.0}),
        ([1, 2, 3, 1, 2], {"dry_allowed_length": 3}, {}),
        ([1, 2, 3, 1, 2], {"dry_penalty_last_n": 4}, {}),
        ([1, 2, 0, 1, 2, 3, 0, 1, 2], {}, {3: 2.0}),  # the newline is a breaker
        ([1, 0, 2, 1, 0], {}, {}),
        ([], {}, {}),
    ],
)
def test_a_token_that_would_repeat_more_is_lowered(
    tokens: list[int], values: dict[str, Any], expected: dict[int, float]
) -> None:
    sampling = SamplingParams(dry_multiplier=2.0, dry_base=2.0, **values)
    assert lowered(Dry(sampling, tokens, word), 8) == expected
    later = Dry(sampling, tokens[:2], word)
    for token in tokens[2:]:
        later.accept(token)
    assert lowered(later, 8) == expected


def test_a_breaker_may_be_spread_over_tokens() -> None:
    sampling = SamplingParams(
        dry_multiplier=2.0, dry_allowed_length=1, dry_sequence_breakers=("1 2",)
    )
    assert lowered(Dry(sampling, [1, 2, 3, 1, 2], word), 8) == {}
    assert lowered(Dry(sampling, [2, 1, 3, 2, 1], word), 8) != {}


@pytest.mark.real
def test_the_numbers_are_llama_cpps(tiny: Path) -> None:
    decoder = LlamaDecoder(spec(tiny), lambda _: None)
    vocab = lib.llama_model_get_vocab(decoder._model)
    newline = decoder.tokenizer.tokenize("\n", parse_special=False, continues=True)
    few = [*newline, 1000, 1001, 1002, 1003]
    dice = random.Random(3)
    n_lowered = 0
    for _ in range(200):
        tokens = dice.choices(few, weights=[1, 8, 8, 1, 8], k=dice.randint(1, 60))
        last_n = dice.choice([60, 60, 12])
        sampling = SamplingParams(
            dry_multiplier=dice.uniform(0.1, 3),
            dry_base=dice.uniform(1.01, 2),
            dry_allowed_length=dice.randint(1, 4),
            dry_penalty_last_n=last_n,
        )
        theirs = LlamaDry(
            vocab,
            sampling.dry_multiplier,
            sampling.dry_base,
            sampling.dry_allowed_length,
            last_n,
            sampling.dry_sequence_breakers,
        )
        for token in tokens:
            lib.llama_sampler_accept(theirs._sampler, token)
        data = (lib.llama_token_data * len(few))(
            *(lib.llama_token_data(token, 0.0, 0.0) for token in few)
        )
        row = lib.llama_token_data_array(data, len(few), -1, False)
        lib.llama_sampler_apply(theirs._sampler, ctypes.byref(row))
        expected = {one.id: -one.logit for one in data if one.logit}
        ours = lowered(Dry(sampling, tokens, decoder.tokenizer.piece), decoder.tokenizer.n_vocab)
        assert ours == pytest.approx(expected, rel=1e-4), (tokens, sampling)
        n_lowered += bool(expected)
    decoder.close()
    assert n_lowered > 60
