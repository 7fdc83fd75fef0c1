"""Penalties against the plain formulas."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.sampling import Penalties
from engine.types import SamplingParams

N_VOCAB = 12


def row(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def penalties(prompt: list[int], generated: list[int], **values: float) -> Penalties:
    result = Penalties(SamplingParams(**values), prompt)  # type: ignore[arg-type]
    for token in generated:
        result.accept(token)
    return result


def by_formula(
    logits: list[float],
    prompt: list[int],
    generated: list[int],
    *,
    repeat_penalty: float = 1.0,
    frequency_penalty: float = 0.0,
    presence_penalty: float = 0.0,
) -> list[float]:
    """One token at a time, as the papers and OpenAI's reference write it."""
    recent = (prompt + generated)[-SamplingParams().repeat_last_n :]
    counts = Counter(generated)
    result = []
    for token, logit in enumerate(logits):
        value = logit
        if token in recent:
            value = value / repeat_penalty if value > 0 else value * repeat_penalty
        value -= counts[token] * frequency_penalty
        value -= (counts[token] > 0) * presence_penalty
        result.append(value)
    return result


def test_values_that_change_nothing_want_no_penalties() -> None:
    assert not Penalties.wanted(SamplingParams())


@pytest.mark.parametrize("name", ["repeat_penalty", "frequency_penalty", "presence_penalty"])
def test_any_of_the_three_wants_penalties(name: str) -> None:
    assert Penalties.wanted(SamplingParams(**{name: 0.5}))
    assert Penalties.wanted(SamplingParams(**{name: -0.5}))


def test_frequency_counts_how_often_a_token_came() -> None:
    logits = row(1, 1, 1)
    penalties([], [0, 2, 2], frequency_penalty=0.5).apply(logits)
    assert logits.tolist() == [0.5, 1, 0]


def test_presence_counts_a_token_once() -> None:
    logits = row(1, 1, 1)
    penalties([], [0, 2, 2], presence_penalty=0.5).apply(logits)
    assert logits.tolist() == [0.5, 1, 0.5]


def test_negative_penalties_make_tokens_more_likely() -> None:
    logits = row(1, 1)
    penalties([], [0], presence_penalty=-2).apply(logits)
    assert logits.tolist() == [3, 1]


def test_prompt_tokens_do_not_count_for_frequency_and_presence() -> None:
    logits = row(1, 1, 1)
    penalties([0, 1, 2, 2], [1], frequency_penalty=1, presence_penalty=1).apply(logits)
    assert logits.tolist() == [1, -1, 1]


def test_a_repeat_penalty_lowers_what_is_positive_and_what_is_negative() -> None:
    logits = row(2, -2, 0, 2)
    penalties([0], [1, 2], repeat_penalty=2).apply(logits)
    assert logits.tolist() == [1, -4, 0, 2]


def test_a_repeat_penalty_looks_at_the_last_tokens_of_prompt_and_answer() -> None:
    logits = row(2, 2, 2)
    penalties([0, 1] + [5] * (SamplingParams().repeat_last_n - 2), [], repeat_penalty=2).apply(
        padded := np.concatenate([logits, row(0, 0, 2)])
    )
    assert padded.tolist() == [1, 1, 2, 0, 0, 1]
    rules = penalties([0, 1] + [5] * (SamplingParams().repeat_last_n - 2), [2], repeat_penalty=2)
    rules.apply(padded := np.concatenate([logits, row(0, 0, 2)]))
    assert padded.tolist() == [2, 1, 1, 0, 0, 1]


def test_a_token_that_came_twice_gets_one_repeat_penalty() -> None:
    logits = row(8, 8)
    penalties([0], [0, 0], repeat_penalty=2).apply(logits)
    assert logits.tolist() == [4, 8]


def test_minus_infinity_stays_out_of_reach() -> None:
    logits = row(-np.inf, 1)
    penalties([0], [0], repeat_penalty=2, frequency_penalty=-2, presence_penalty=-2).apply(logits)
    assert logits.tolist() == [-np.inf, 1]


def test_a_row_is_changed_in_place_and_each_step_counts_anew() -> None:
    rules = penalties([], [0], frequency_penalty=1)
    buffer = np.zeros((2, 3), dtype=np.float32)
    rules.apply(buffer[1])
    rules.accept(0)
    assert buffer.tolist() == [[0, 0, 0], [-1, 0, 0]]
    buffer[:] = 0
    rules.apply(buffer[0])
    assert buffer.tolist() == [[-2, 0, 0], [0, 0, 0]]
    assert buffer.dtype == np.float32


def test_an_empty_history_changes_nothing() -> None:
    logits = row(1, -1)
    penalties([], [], repeat_penalty=2, frequency_penalty=1, presence_penalty=1).apply(logits)
    assert logits.tolist() == [1, -1]


Tokens = st.lists(st.integers(0, N_VOCAB - 1), max_size=80)


@settings(max_examples=150)
@given(
    logits=st.lists(st.floats(-30, 30, width=32), min_size=N_VOCAB, max_size=N_VOCAB),
    prompt=Tokens,
    generated=Tokens,
    repeat_penalty=st.floats(0.5, 2),
    frequency_penalty=st.floats(-2, 2),
    presence_penalty=st.floats(-2, 2),
)
def test_penalties_are_what_the_formulas_say(
    logits: list[float], prompt: list[int], generated: list[int], **values: float
) -> None:
    changed = row(*logits)
    penalties(prompt, generated, **values).apply(changed)
    expected = by_formula(logits, prompt, generated, **values)
    np.testing.assert_allclose(changed, expected, rtol=1e-4, atol=1e-4)


def test_temperature_zero_and_one_candidate_are_greedy() -> None:
    assert SamplingParams(temperature=0).is_greedy
    assert SamplingParams(top_k=1).is_greedy
    assert not SamplingParams().is_greedy
    assert not SamplingParams(top_k=0).is_greedy  # 0 means that top_k is off
