"""Rows that nobody wants: whether they make steps shorter, and that nobody hears of them."""

import random
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import llama_cpp
import numpy as np
import pytest

from engine.backends.base import Engine, Interrupted
from engine.backends.llama_encoder import LlamaEncoder
from engine.backends.llamacpp import LlamaDecoder
from engine.batch_engine import BatchEngine
from engine.rounding import GAIN, LEAST, MEMORY, MOST, TIMES, Rounding
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
        rounding.took(rows[-1], n_threads, cost(rows[-1]))
    return rows


def settled(n: int, cost: Cost) -> int:
    return used(Rounding(), n, 100, cost)[-1]


def test_left_over_rows_are_rounded_up_where_that_is_faster() -> None:
    assert [settled(n, leftovers_one_by_one) for n in (3, 4, 5, 6, 7, 8)] == [4, 4, 5, 8, 8, 8]


def test_rows_stay_where_each_has_its_price() -> None:
    assert [settled(n, by_rows) for n in range(1, 64)] == list(range(1, 64))


@pytest.mark.parametrize(("group", "n", "best"), [(8, 15, 16), (16, 13, 16), (64, 50, 64)])
def test_larger_groups_are_tried_too(group: int, n: int, best: int) -> None:
    assert settled(n, lambda rows: leftovers_one_by_one(rows, group)) == best


def test_a_little_is_no_gain() -> None:
    assert settled(7, lambda rows: 1.0 if rows == 7 else GAIN + 0.001) == 7
    assert settled(7, lambda rows: 1.0 if rows == 7 else GAIN - 0.001) == 8


def test_each_number_is_tried_a_few_times_and_the_shortest_counts() -> None:
    slow = iter([9.0, 1.0, 9.0, 9.0, 0.5, 9.0])
    rounding = Rounding()
    assert used(rounding, 7, 2 * TIMES, lambda _: next(slow)) == [7] * TIMES + [8] * TIMES
    assert rounding.n_rows(7, PLENTY, 2) == 8


def test_who_wants_other_rows_need_not_try_what_was_tried() -> None:
    rounding = Rounding()
    used(rounding, 50, 100, lambda rows: leftovers_one_by_one(rows, 64))
    assert used(rounding, 51, 5, lambda rows: leftovers_one_by_one(rows, 64)) == [51] * 3 + [64] * 2


def test_what_becomes_slow_is_left() -> None:
    """As with the cells that are looked at."""
    rounding = Rounding()
    assert used(rounding, 7, 50, leftovers_one_by_one)[-1] == 8
    assert used(rounding, 7, 2 * TIMES, lambda rows: 9.0)[-1] == 7
    assert used(rounding, 7, 50, lambda rows: leftovers_one_by_one(rows) + 9)[-1] == 8


def test_few_rows_and_many_are_taken_as_they_are() -> None:
    """Of those a trial would be most of what they cost, or gain nothing."""
    for n in (1, LEAST - 1, MOST + 1, 500):
        assert used(Rounding(), n, 20, lambda rows: 1 / rows) == [n] * 20


def test_no_step_becomes_twice_as_long() -> None:
    for n in range(1, MOST + 1):
        assert max(used(Rounding(), n, 20, by_rows)) < max(2 * n, 2)


def test_there_are_no_more_rows_than_have_room() -> None:
    rounding = Rounding()
    assert used(rounding, 7, 20, leftovers_one_by_one, n_most=7) == [7] * 20
    assert used(rounding, 7, 20, leftovers_one_by_one)[-1] == 8, "when there is room it is tried"
    assert used(rounding, 7, 1, leftovers_one_by_one, n_most=7) == [7]
    assert used(rounding, 7, 1, leftovers_one_by_one, n_most=5) == [7], "who are wanted are there"


def test_what_was_not_best_is_tried_again_after_a_while() -> None:
    rows = used(Rounding(), 7, 3 * MEMORY, by_rows)
    assert rows.count(8) == 3 * TIMES
    rounding = Rounding()
    used(rounding, 7, MEMORY, by_rows)
    rows = used(rounding, 7, MEMORY, leftovers_one_by_one)
    assert rows[-1] == 8, "it has become best"
    assert used(rounding, 7, MEMORY, by_rows)[-1] == 7, "and is no more"


def test_threads_have_measurements_of_their_own() -> None:
    rounding = Rounding()
    used(rounding, 7, 20, leftovers_one_by_one, n_threads=2)
    assert used(rounding, 7, 1, by_rows, n_threads=1) == [7]
    assert used(rounding, 7, 1, leftovers_one_by_one, n_threads=2) == [8]


# on real models


def up_to_fours(_: Rounding, n_wanted: int, n_most: int, __: int) -> int:
    n_rows = -(-n_wanted // 4) * 4
    return n_rows if n_rows <= n_most and n_wanted <= MOST else n_wanted


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
@pytest.mark.parametrize("lane_tokens", [0, 256])
@pytest.mark.parametrize("n", [3, 6, 7])
def test_streams_say_the_same_beside_rows_that_nobody_wants(
    tiny: Path, lane_tokens: int, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Rounding, "n_rows", up_to_fours)
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
def test_states_have_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rounding, "n_rows", up_to_fours)
    path = gguf_fixtures.write_tiny_lfm2(tmp_path / "lfm2.gguf")
    engine = engine_of(path, n_parallel=4, kv_tokens=1024, n_batch=128)
    counts = count_rows(engine)
    generate(engine, {i: [5 + i] * 20 for i in range(3)}, 10)
    assert not any(counts)
    engine.close()


@pytest.mark.real
def test_a_job_with_a_seed_has_none(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which there are would be a matter of time, and change last digits."""
    monkeypatch.setattr(Rounding, "n_rows", up_to_fours)
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
def test_where_cells_are_missing_they_are_given_up(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Rounding, "n_rows", up_to_fours)
    engine = engine_of(tiny, n_parallel=4, n_ctx=256, kv_tokens=256)
    prompts = {i: [10 * i + at % 50 for at in range(3, 83)] for i in range(3)}
    counts = count_rows(engine)
    for number, prompt in prompts.items():
        engine.admit(number, prompt, GREEDY)
    n_said = 0
    while n_said < 3 * 5:  # 255 of 256 cells
        result = engine.step()
        assert not result.failed
        n_said += len(result.tokens)
    assert sum(counts) > 0
    assert spare_cells(engine, 4) == 0
    engine.close()


@pytest.mark.real
@pytest.mark.parametrize("lane_tokens", [0, 256])
def test_a_step_that_is_broken_off_is_computed_without_them(
    tiny: Path, lane_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Rounding, "n_rows", up_to_fours)
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
def test_they_are_no_more_than_a_batch_has_room_for(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Rounding, "n_rows", up_to_fours)
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
    assert [n for n in filled if n >= 4] == [4, 16, 8, 8, 36, 64]


@pytest.mark.real
def test_an_encoder_has_no_more_of_them_than_fit(
    tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "embedder.gguf"
    encoder_fixtures.write_embedder(path)
    encoder = load(path, n_ctx=512)
    seen: list[int] = []

    def n_rows(_: Rounding, n_wanted: int, n_most: int, __: int) -> int:
        seen.append(n_most)
        return n_wanted

    monkeypatch.setattr(Rounding, "n_rows", n_rows)
    encoder.encode([np.full(5, 7, np.int32)])
    encoder.encode([np.full(1, 7, np.int32)] * encoder.n_sequences)
    assert seen[0] > 64
    assert seen[1] == encoder.n_sequences


@pytest.mark.real
def test_a_computation_that_is_given_up_teaches_nothing(tmp_path: Path, load: Load) -> None:
    path = tmp_path / "embedder.gguf"
    encoder_fixtures.write_embedder(path)
    encoder = load(path)
    taught: list[int] = []
    encoder._rounding.took = lambda n, *_: taught.append(n)  # type: ignore[attr-defined]
    with pytest.raises(Interrupted):
        encoder.encode([np.full(7, 7, np.int32)], lambda: False)
    encoder.encode([np.full(7, 7, np.int32)])
    assert taught == [7]
