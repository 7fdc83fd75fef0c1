"""Rows that nobody wants: whether they make steps shorter, and that nobody hears of them."""

import logging
import random
from array import array
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import llama_cpp
import numpy as np
import pytest

from engine.backends.base import Engine, Interrupted
from engine.backends.llama_encoder import LlamaEncoder
from engine.backends.llamacpp import LlamaDecoder
from engine.batch_engine import BatchEngine
from engine.rounding import AGAIN, GAIN, LEAST, MOST, ROUNDS, SELDOM, Rounding
from engine.types import Batch, Sequence
from tests import encoder_fixtures, gguf_fixtures
from tests.engines import GREEDY, engine_of, generate, ids, lanes_of, open_lanes
from tests.own_encoder import Load, loading
from tests.test_llamacpp import differ_by_rounding, say_alone

PLENTY = 1000
Cost = Callable[[int], float]


def leftovers_one_by_one(n: int, group: int = 4) -> float:
    """As of kernels that take whole groups at once."""
    return 1.0 + n // group * 1.0 + n % group * 0.9


def by_rows(n: int) -> float:
    return 1.0 + n / 4


def used(rounding: Rounding, n: int, n_steps: int, cost: Cost, **values: int) -> list[int]:
    """The rows of so many steps in which `n` are wanted."""
    n_most, n_threads = values.get("n_most", PLENTY), values.get("n_threads", 2)
    rows = []
    for _ in range(n_steps):
        rows.append(rounding.n_rows(n, n_most, n_threads))
        rounding.took(cost(rows[-1]), n, rows[-1], n_threads)
    return rows


def new() -> Rounding:
    return Rounding(4, 8, 16)


def settled(n: int, cost: Cost, rounding: Rounding | None = None) -> int:
    return used(rounding or new(), n, 50, cost)[-1]


def test_left_over_rows_are_rounded_up_where_that_is_faster() -> None:
    assert [settled(n, leftovers_one_by_one) for n in (3, 4, 5, 6, 7, 8)] == [4, 4, 5, 8, 8, 8]


def test_rows_stay_where_each_has_its_price() -> None:
    assert [settled(n, by_rows) for n in range(1, 64)] == list(range(1, 64))


@pytest.mark.parametrize(("group", "n", "best"), [(8, 15, 16), (16, 13, 16), (64, 50, 64)])
def test_larger_groups_are_tried_too(group: int, n: int, best: int) -> None:
    assert settled(n, lambda rows: leftovers_one_by_one(rows, group), Rounding(4, group)) == best


def test_a_little_is_no_gain() -> None:
    assert settled(7, lambda rows: 1.0 if rows == 7 else GAIN + 0.001) == 7
    assert settled(7, lambda rows: 1.0 if rows == 7 else GAIN - 0.001) == 8


def test_numbers_take_turns_so_that_what_else_slows_steps_meets_all() -> None:
    """As a context that grows, and programs beside."""
    rounding, n_steps = new(), 0

    def cost(rows: int) -> float:
        nonlocal n_steps
        n_steps += 1
        return by_rows(rows) * (n_steps + (20 if 4 <= n_steps < 9 else 0))

    assert used(rounding, 10, 3 * ROUNDS, cost) == [10, 12, 16] * ROUNDS
    assert settled(10, cost, rounding) == 10


def test_few_rows_and_many_are_taken_as_they_are() -> None:
    """Of those a trial would be most of what they cost, or gain nothing."""
    for n in (1, LEAST - 1, MOST + 1, 500):
        assert used(new(), n, 20, lambda rows: 1 / rows) == [n] * 20


def test_no_step_becomes_twice_as_long() -> None:
    for n in range(1, MOST + 1):
        assert max(used(Rounding(4, 8, 16, 64), n, 20, by_rows)) < max(2 * n, 2)


def test_there_are_no_more_rows_than_have_room() -> None:
    rounding = new()
    assert used(rounding, 7, 20, leftovers_one_by_one, n_most=7) == [7] * 20
    assert set(used(rounding, 11, 20, by_rows, n_most=12)) == {11, 12}
    assert used(rounding, 8, 1, leftovers_one_by_one, n_most=5) == [8], "who are wanted are there"
    assert used(rounding, 6, 20, leftovers_one_by_one)[-1] == 8
    assert used(rounding, 6, 1, leftovers_one_by_one, n_most=7) == [6], "there was more room before"


def test_what_was_not_asked_for_says_nothing() -> None:
    rounding = new()
    rounding.took(1.0, 7, 7, 2)
    assert rounding.n_rows(7, PLENTY, 2) == 7
    rounding.took(0.1, 7, 8, 2)
    rounding.took(1.0, 7, 7, 1)
    assert rounding.n_rows(7, PLENTY, 2) == 7


def test_it_is_asked_again_and_the_more_seldom_the_oftener_it_is_the_same() -> None:
    rounding = new()
    assert used(rounding, 7, 2 * ROUNDS, by_rows) == [7, 8] * ROUNDS
    assert used(rounding, 7, 2 * AGAIN, by_rows) == [7] * 2 * AGAIN
    assert used(rounding, 7, 2 * ROUNDS, leftovers_one_by_one) == [7, 8] * ROUNDS
    assert used(rounding, 7, AGAIN, leftovers_one_by_one) == [8] * AGAIN, "it has become best"
    n_right, n_left = 0, 40 * SELDOM
    while n_left:
        n_left -= 1
        n_right += used(rounding, 7, 1, leftovers_one_by_one) == [8]
    assert n_right > 0.998 * 40 * SELDOM


def test_neighbours_may_count_as_one() -> None:
    rounding, cost = Rounding(64, n_alike=8), partial(leftovers_one_by_one, group=64)
    for n in (48, 55, 50, 52, 51):  # whichever comes first
        assert used(rounding, n, 2, cost) == [n, 64]
    assert used(rounding, 49, 1, cost) == [64]
    assert used(rounding, 32, 2, cost) == [32, 64]


def test_each_condition_has_measurements_of_its_own() -> None:
    rounding = new()
    assert settled(7, leftovers_one_by_one, rounding) == 8
    assert used(rounding, 7, 2, by_rows, n_threads=1) == [7, 8]
    assert used(rounding, 7, 1, leftovers_one_by_one, n_threads=2) == [8]


def test_noise_costs_little() -> None:
    """As much as a fifth more or less, most of the time."""
    dice = random.Random(1)

    def noisy(rows: int) -> float:
        return by_rows(rows) * dice.lognormvariate(0.0, 0.2)

    for n in (5, 9, 17, 33):
        rows = used(new(), n, 3000, noisy)
        assert sum(map(by_rows, rows)) < 1.07 * 3000 * by_rows(n)


# on real models


def up_to_fours(_: Rounding, n_wanted: int, n_most: int, *__: int) -> int:
    n_rows = -(-n_wanted // 4) * 4
    return n_rows if n_rows <= n_most and n_wanted <= MOST else n_wanted


@pytest.fixture
def in_fours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are whole groups of four in any case, where there is room."""
    monkeypatch.setattr(Rounding, "n_rows", up_to_fours)


def decoder_of(engine: Engine) -> LlamaDecoder:
    return cast(LlamaDecoder, cast(BatchEngine, engine)._decoder)


def count_rows(engine: Engine) -> list[int]:
    """Of each call of llama_decode, what was computed and nobody wanted."""
    counts: list[int] = []
    decoder = decoder_of(engine)
    run = decoder._run

    def counting(context: Any, chunks: Any, spare: Any) -> int:
        counts.append(len(spare))
        return run(context, chunks, spare)

    decoder._run = counting  # type: ignore[method-assign]
    return counts


def spare_cells(engine: Engine, n_parallel: int) -> int:
    memory = llama_cpp.llama_get_memory(decoder_of(engine)._context)
    return int(llama_cpp.llama_memory_seq_pos_max(memory, n_parallel)) + 1


@pytest.mark.real
@pytest.mark.usefixtures("in_fours")
@pytest.mark.parametrize("lane_tokens", [0, 256])
@pytest.mark.parametrize("n", [3, 6, 7])
def test_streams_say_the_same_beside_rows_that_nobody_wants(
    tiny: Path, lane_tokens: int, n: int
) -> None:
    engine = engine_of(tiny, n_parallel=8, lane_tokens=lane_tokens)
    if lane_tokens:
        open_lanes(engine)
    counts = count_rows(engine)
    prompts = [ids(engine, f"Once upon a time, {i} years ago, there was") for i in range(n)]
    together = generate(engine, dict(enumerate(prompts)), 32)
    if lane_tokens:
        assert lanes_of(engine)._n_cells, "no lane failed"
    assert counts.count(-n % 4) > 20
    assert spare_cells(engine, 8) == 0
    engine.close()
    alone = say_alone(tiny, prompts, [32] * n)
    assert differ_by_rounding(tiny, prompts, alone, list(together.values())) < n


@pytest.mark.real
def test_a_sliding_window_is_right_beside_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = gguf_fixtures.write_tiny_gemma3(tmp_path / "gemma3.gguf")
    dice = random.Random(2)
    prompts = {i: [dice.randint(3, 390) for _ in range(30 + 20 * i)] for i in range(3)}
    said = []
    for n_rows in (lambda _, n_wanted, *__: n_wanted, up_to_fours):
        monkeypatch.setattr(Rounding, "n_rows", n_rows)
        engine = engine_of(path, n_parallel=4, kv_tokens=1024, n_batch=128)
        counts = count_rows(engine)
        said.append(generate(engine, prompts, 40))
        assert bool(sum(counts)) == (n_rows is up_to_fours)
        engine.close()
    for number in prompts:
        assert said[0][number][:12] == said[1][number][:12]  # later ones may differ by rounding


@pytest.mark.real
@pytest.mark.usefixtures("in_fours")
def test_states_have_none(tmp_path: Path) -> None:
    path = gguf_fixtures.write_tiny_lfm2(tmp_path / "lfm2.gguf")
    engine = engine_of(path, n_parallel=4, kv_tokens=1024, n_batch=128)
    counts = count_rows(engine)
    generate(engine, {i: [5 + i] * 20 for i in range(3)}, 10)
    assert not any(counts)
    engine.close()


@pytest.mark.real
@pytest.mark.usefixtures("in_fours")
def test_a_job_with_a_seed_has_none(tiny: Path) -> None:
    """Which there are would be a matter of time, and change last digits."""
    engine = engine_of(tiny, n_parallel=4)
    counts = count_rows(engine)
    prompt = ids(engine, "Once upon a time")
    for number in range(3):
        goes_on_from = 0 if number else None
        engine.admit(number, prompt, GREEDY, reuses=False, goes_on_from=goes_on_from)
    for _ in range(30):
        engine.step()
    assert len(counts) == 30
    assert not any(counts)
    engine.close()


def step_of(n: int) -> Batch:
    """The first token of each of the first slots."""
    batch = Batch()
    for slot in range(n):
        batch.add(Sequence(slot, array("i", [100 + slot]), slot=slot), 1)
    return batch


@pytest.mark.real
@pytest.mark.usefixtures("in_fours")
def test_where_cells_are_missing_they_are_given_up(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    decode = llama_cpp.llama_decode
    found: list[tuple[int, int]] = []

    def watched(context: Any, batch: Any) -> int:
        status = decode(context, batch)
        found.append((batch.n_tokens, status))
        return int(status)

    monkeypatch.setattr(llama_cpp, "llama_decode", watched)
    engine = engine_of(tiny, n_parallel=4, n_ctx=256, kv_tokens=256)
    for number, n_tokens in enumerate((80, 80, 90)):  # then 253 of 256 are in use
        engine.admit(number, [10 * number + at % 50 for at in range(3, 3 + n_tokens)], GREEDY)
    n_said = 0
    while n_said < 3 * 3:
        result = engine.step()
        assert not result.failed
        n_said += len(result.tokens)
    assert found[-2:] == [(4, 1), (3, 0)]
    assert spare_cells(engine, 4) == 0
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    engine.close()


@pytest.mark.real
@pytest.mark.usefixtures("in_fours")
@pytest.mark.parametrize("lane_tokens", [0, 256])
def test_a_step_that_is_broken_off_is_computed_without_them(
    tiny: Path, lane_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(tiny, n_parallel=4, lane_tokens=lane_tokens)
    if lane_tokens:
        open_lanes(engine)
    statuses: list[int] = []
    decode = llama_cpp.llama_decode

    def broken_off(context: Any, batch: Any) -> int:
        status = decode(context, batch)
        assert status == 0
        statuses.append(2 if batch.n_tokens == 4 and len(statuses) % 3 == 0 else 0)
        return statuses[-1]

    monkeypatch.setattr(llama_cpp, "llama_decode", broken_off)
    prompts = {i: ids(engine, f"Once upon a time, {i} years ago, " * 5) for i in range(3)}
    assert all(len(said) == 20 for said in generate(engine, prompts, 20).values())
    assert statuses.count(2) > 4
    assert spare_cells(engine, 4) == 0
    engine.close()


@pytest.mark.real
@pytest.mark.usefixtures("in_fours")
def test_they_are_no_more_than_a_batch_has_room_for(tiny: Path) -> None:
    for n, expected in ((3, 1), (5, 0)):
        engine = engine_of(tiny, n_parallel=5, n_batch=6)
        counts = count_rows(engine)
        decoder_of(engine).decode(step_of(n))
        assert counts == [expected]
        engine.close()


@pytest.fixture
def load() -> Any:
    with loading() as load:
        yield load


@pytest.mark.real
@pytest.mark.parametrize("kind", ["embedder", "reranker", "decoder"])
@pytest.mark.parametrize("flash", [False, True])
def test_vectors_and_scores_are_the_same_beside_them(
    kind: str, flash: bool, tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"{kind}.gguf"
    getattr(encoder_fixtures, f"write_{kind}")(path)
    encoder = load(path, flash_attention=flash)
    dice = np.random.default_rng(3)
    batches = [
        [dice.integers(5, 40, n, dtype=np.int32) for n in lengths]
        for lengths in ([3], [5, 9], [7], [2, 2, 2], [33], [61])
    ]
    plain = [np.array(encoder.encode(batch)) for batch in batches]
    monkeypatch.setattr(Rounding, "n_rows", up_to_fours)
    filled: list[int] = []
    fill = LlamaEncoder._fill

    def counting(self: LlamaEncoder, batch: Any) -> None:
        filled.append(sum(map(len, batch)))
        fill(self, batch)

    monkeypatch.setattr(LlamaEncoder, "_fill", counting)
    for batch, expected in zip(batches, plain, strict=True):
        found = encoder.encode(batch)
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() < 5e-3  # GELU is read off a table
    assert filled == [4, 16, 8, 8, 36, 64]


@pytest.mark.real
@pytest.mark.parametrize(("n_ctx", "n_most"), [(512, 512), (64, 128), (63, 5)])
def test_an_encoder_has_no_more_of_them_than_fit(
    n_ctx: int, n_most: int, tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "embedder.gguf"
    encoder_fixtures.write_embedder(path)
    encoder = load(path, n_ctx=n_ctx, batch_tokens=128)
    seen: list[int] = []

    def n_rows(_: Rounding, n_wanted: int, n_most: int, *__: int) -> int:
        seen.append(n_most)
        return n_wanted

    monkeypatch.setattr(Rounding, "n_rows", n_rows)
    encoder.encode([np.full(5, 7, np.int32)])
    encoder.encode([np.full(1, 7, np.int32)] * encoder.n_sequences)
    assert seen == [n_most, encoder.n_sequences]


@pytest.mark.real
def test_a_computation_that_is_given_up_teaches_nothing(tmp_path: Path, load: Load) -> None:
    path = tmp_path / "embedder.gguf"
    encoder_fixtures.write_embedder(path)
    encoder = load(path)
    taught: list[int] = []
    encoder._rounding.took = lambda _, n, *__: taught.append(n)  # type: ignore[attr-defined]
    with pytest.raises(Interrupted):
        encoder.encode([np.full(7, 7, np.int32)], lambda: False)
    encoder.encode([np.full(7, 7, np.int32)])
    assert taught == [7]
