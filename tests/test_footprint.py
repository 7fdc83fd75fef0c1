"""What a worker will take of the memory, beside what it takes."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from engine import wire
from engine.client import launch_process
from engine.model_file import read_model_file
from footprint import estimate
from model_manager import ModelManager
from settings import Settings, TierSettings
from tests.engines import needs_mlx, spec
from tests.test_model_manager import ask, items_of, run

pytestmark = pytest.mark.real


def of(model_path: Path | str, **values: object) -> TierSettings:
    return TierSettings(model_path=str(model_path), n_threads=1, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "values",
    [
        {"kv_tokens": 1024, "n_batch": 512},
        {"kv_tokens": 8192, "n_batch": 128},
        {"kv_tokens": 2048, "n_batch": 512, "flash_attention": False},
    ],
)
def test_a_chat_model_takes_what_was_estimated(smollm2: Path, values: dict[str, int]) -> None:
    async def test(manager: ModelManager) -> None:
        tier = manager.tiers["light"]
        assert await ask(tier)
        measured = tier.life.memory_bytes
        assert measured is not None
        assert tier.life.footprint().loaded == pytest.approx(measured, rel=0.15)
        occupant = tier.occupant()
        assert occupant is not None
        assert occupant.n_bytes == tier.life.footprint().most

    light = of(smollm2, **values, n_ctx=1024, max_tokens=4)
    run(test, launch_process, light=light)


def test_several_answers_at_once_take_what_was_estimated_for_their_lanes(smollm2: Path) -> None:
    async def test(manager: ModelManager) -> None:
        tier = manager.tiers["light"]
        await asyncio.gather(*(ask(tier, "Hi" * n, 40) for n in range(1, 5)))
        footprint = tier.life.footprint()
        assert tier.life.memory_bytes == pytest.approx(footprint.loaded + footprint.lanes, rel=0.15)
        assert footprint.lanes > 0.3 * footprint.loaded

    run(test, launch_process, light=of(smollm2, kv_tokens=8192, n_parallel=4, n_ctx=2048))


@needs_mlx
def test_a_model_on_mlx_takes_what_was_estimated_but_cells_only_as_they_fill(
    tiny_mlx: Path,
) -> None:
    async def test(manager: ModelManager) -> None:
        tier = manager.tiers["light"]
        assert await ask(tier)
        measured = tier.life.memory_bytes
        assert measured is not None
        footprint = tier.life.footprint()
        assert footprint.loaded - footprint.kv == pytest.approx(measured, rel=0.2)

    light = of(tiny_mlx, kv_tokens=1024, n_ctx=64, n_batch=64, n_parallel=2)
    run(test, launch_process, light=light)


def test_an_embedding_model_takes_what_was_estimated(e5: Path) -> None:
    async def test(manager: ModelManager) -> None:
        tier = manager.tiers["embedding"]
        with tier.embed(wire.Embed(["word " * 600] * 3, ["dense"], "end")) as encoding:
            await items_of(encoding)
        measured = tier.life.memory_bytes
        assert measured is not None
        assert tier.life.footprint().loaded == pytest.approx(measured, rel=0.15)

    run(test, launch_process, embedding=of(Settings.load(None).tiers["embedding"].path))


def test_a_decoder_that_embeds_takes_what_was_estimated_for_cells_and_logits(
    smollm2: Path,
) -> None:
    async def test(manager: ModelManager) -> None:
        tier = manager.tiers["embedding"]
        with tier.embed(wire.Embed(["word " * 600], ["dense"], "end")) as encoding:
            await items_of(encoding)
        measured = tier.life.memory_bytes
        assert measured is not None
        footprint = tier.life.footprint()
        assert footprint.loaded == pytest.approx(measured, rel=0.15)
        assert footprint.kv == 2048 * 23040
        assert footprint.compute > 2 * 512 * 49152 * 4

    embedding = of(smollm2, embedding_mode=True, pooling="last", n_ctx=2000)
    run(test, launch_process, embedding=embedding)


def test_each_sequence_has_states_beside_the_cells(smollm2: Path) -> None:
    model, worker = read_model_file(smollm2), spec(smollm2, n_parallel=3)
    plain, hybrid = (estimate(worker, replace(model, state_bytes=size)).kv for size in (0, 1000))
    assert hybrid - plain == 3 * 1000


def test_without_flash_attention_scores_lie_in_memory(smollm2: Path) -> None:
    model = read_model_file(smollm2)
    plain, flash = (
        estimate(spec(smollm2, kv_tokens=4096, n_batch=512, flash_attention=flash), model)
        for flash in (False, True)
    )
    assert plain.compute - flash.compute == 128 * 4096 * (9 * 6 + 4)


def test_what_is_set_aside_is_all_that_it_may_take() -> None:
    spec = wire.WorkerSpec(
        name="light", backend="fake", model_path="", n_ctx=16, n_parallel=1, kv_tokens=16,
        n_batch=16, n_threads=1, n_gpu_layers=0, prefix_cache_bytes=1 << 20,
    )  # fmt: skip
    from engine.backends.fake import model_file

    footprint = estimate(spec, model_file("", "chat"))
    assert footprint.most == footprint.loaded == footprint.process
