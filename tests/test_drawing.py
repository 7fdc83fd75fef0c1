"""Tokens of a row of logits, drawn in numpy."""

import numpy as np
import pytest

from engine.drawing import Draw
from engine.types import SamplingParams

LIKELY = np.log([0.4, *np.linspace(0.06, 0.04, 12)]).astype(np.float32)


def mirostat(tau: float, **values: float) -> Draw:
    return Draw(SamplingParams(temperature=1.0, mirostat=1, mirostat_tau=tau, seed=1, **values))  # type: ignore[arg-type]


@pytest.mark.parametrize("least", [-np.inf, -200.0])
def test_mirostat_draws_from_all_that_is_likely_and_nothing_else(least: float) -> None:
    logits = np.full(300, least, np.float32)
    logits[:13] = LIKELY
    draw = mirostat(tau=5.0)
    assert {draw(logits.copy()) for _ in range(400)} == {*range(13)}


@pytest.mark.parametrize("tau", [5.0, 100.0])
def test_mirostat_keeps_all_candidates_while_it_cannot_reach_its_surprise(tau: float) -> None:
    """Rows of 1.9 bits. What it has learned meanwhile must not overflow."""
    logits = (-2.0 * np.log(np.arange(1, 401))).astype(np.float32)
    draw = mirostat(tau=tau, mirostat_eta=1.0)
    drawn = [draw(logits.copy()) for _ in range(3000)]
    assert 0.5 < np.mean(np.array(drawn[-1000:]) == 0) < 0.7, "the likeliest has 0.61"
    assert max(drawn[-1000:]) > 50


@pytest.mark.parametrize(
    "row",
    [[0.0], [0.0, 0.0], [0.0] * 200, [5.0, -np.inf], [80.0, 0.0, 0.0], [95.0, 0.0, -1.0],
     [100.0, 3.0, 3.0, -1.0]],
)  # fmt: skip
def test_mirostat_takes_any_row(row: list[float]) -> None:
    draw = mirostat(tau=3.0, mirostat_eta=1.0)
    allowed = set(np.flatnonzero(np.array(row) > -np.inf).tolist())
    assert {draw(np.array(row, np.float32)) for _ in range(300)} <= allowed


def test_mirostat_comes_to_its_surprise() -> None:
    """Rows of 6.6 bits, of which it is to take 3."""
    logits = (-1.1 * np.log(np.arange(1, 2001))).astype(np.float32)
    shares = np.exp(logits) / np.exp(logits).sum()
    draw = mirostat(tau=3.0)
    drawn = np.array([draw(logits.copy()) for _ in range(2000)])[500:]
    n_kept = int(drawn.max()) + 1
    of_kept = shares[:n_kept] / shares[:n_kept].sum()
    assert 2.5 < float(-np.log2(of_kept[drawn]).mean()) < 3.5
