"""Vectors and scores from a tier: its queue, and what happens when its worker dies."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import wire
from engine.client import launch_process
from engine.types import SamplingParams
from errors import (
    BadRequest,
    ContextLengthExceeded,
    InternalError,
    ModelLoadFailed,
    ModelNotFound,
    QueueFull,
    ServiceError,
    TierUnavailable,
    WorkerCrashed,
)
from model_manager import ModelManager
from tests import encoder_fixtures
from tests.serving import fake, script
from tests.test_model_manager import Launches, items_of, run, until
from tier import Tier


def embed(*inputs: str | list[int], **values: Any) -> wire.Embed:
    return wire.Embed([*inputs], values.pop("outputs", ["dense"]), **values)


def score(query: str, *documents: str, **values: Any) -> wire.Score:
    return wire.Score([query], [*documents], [(0, i) for i in range(len(documents))], **values)


async def vectors(tier: Tier, *inputs: str) -> list[bytes | None]:
    with tier.lease(), tier.embed(embed(*inputs)) as encoding:
        return [item.dense for item in await items_of(encoding)]


async def computed(tier: Tier, request: wire.Embed) -> list[wire.Vector]:
    with tier.embed(request) as encoding:
        return await items_of(encoding)


async def scores(tier: Tier, query: str, *documents: str, **values: Any) -> list[float]:
    with tier.lease(), tier.score(score(query, *documents, **values)) as encoding:
        return [item.score for item in await items_of(encoding)]


def cosine(a: bytes | None, b: bytes | None) -> float:
    return float(np.frombuffer(a or b"", "<f4") @ np.frombuffer(b or b"", "<f4"))


def test_the_first_request_starts_a_worker_and_gets_its_vectors_in_order() -> None:
    launches = Launches()

    async def test(manager: ModelManager) -> None:
        tier = manager.tiers["embedding"]
        texts = [f"text number {i}" for i in range(300)]
        together, alone = await asyncio.gather(vectors(tier, *texts), vectors(tier, texts[7]))
        assert together[7] == alone[0]
        assert len(set(together)) == 300

    run(test, launches, embedding=fake())
    assert len(launches.handles) == 1


def test_the_longest_text_has_all_its_rows() -> None:
    async def test(manager: ModelManager) -> None:
        tier = manager.tiers["embedding"]
        asked = embed("a " * 8190, outputs=["colbert"])
        with tier.lease(), tier.embed(asked) as encoding:
            (item,) = await items_of(encoding)
        assert tier.encoder is not None
        assert item.n_tokens == 8192
        assert item.colbert is not None
        assert len(item.colbert) == 8191 * tier.encoder.n_colbert * 4

    run(test, embedding=fake())


def test_items_come_as_they_are_computed() -> None:
    async def test(manager: ModelManager) -> None:
        with manager.tiers["embedding"].embed(embed("a", "a b c", "a b")) as encoding:
            found = [(item.index, item.n_tokens) async for item in encoding]
        assert sorted(found) == [(0, 3), (1, 5), (2, 4)]
        assert encoding.n_open == 0

    run(test, embedding=fake())


def test_scores_come_from_either_tier_with_what_they_mean() -> None:
    async def test(manager: ModelManager) -> None:
        for name, method, scale in (
            ("reranker", "cross-encoder", "logit"),
            ("embedding", "hybrid", "similarity"),
        ):
            with manager.resolve(name).score(score("where is rain", "eggs", "here is rain")) as of:
                worse, better = await items_of(of)
                assert (of.method, of.scale) == (method, scale)
            assert better.score > worse.score

    run(test, embedding=fake(), reranker=fake())


def test_without_a_reranker_the_embedding_tier_scores() -> None:
    launches = Launches()

    async def test(manager: ModelManager) -> None:
        tier = manager.resolve("reranker")
        assert tier is manager.tiers["embedding"] is manager.scorer("reranker", None)
        assert tier is manager.scorer("reranker", "hybrid") is manager.scorer("embedding", "dense")
        await asyncio.gather(vectors(tier, "a"), scores(tier, "a", "b"))
        with pytest.raises(BadRequest, match="RERANKER_MODEL_PATH") as caught:
            manager.scorer("reranker", "cross-encoder")
        assert caught.value.param == "method"

    run(test, launches, embedding=fake())
    assert len(launches.handles) == 1, "one worker for both"


def test_a_method_that_the_reranker_does_not_know_is_the_embedding_tiers() -> None:
    async def both(manager: ModelManager) -> None:
        assert manager.scorer("reranker", None).name == "reranker"
        assert manager.scorer("reranker", "cross-encoder").name == "reranker"
        assert manager.scorer("reranker", "sparse").name == "embedding"

    async def alone(manager: ModelManager) -> None:
        with pytest.raises(BadRequest, match="EMBEDDING_MODEL_PATH"):
            manager.scorer("reranker", "dense")
        with pytest.raises(ModelNotFound):
            manager.resolve("embedding")
        with pytest.raises(BadRequest, match="does not score"):
            manager.scorer("light", None)

    run(both, embedding=fake(), reranker=fake())
    run(alone, light=fake(), reranker=fake())


def test_a_worker_that_generates_does_not_embed() -> None:
    async def test(manager: ModelManager) -> None:
        with pytest.raises(BadRequest) as caught:
            await vectors(manager.tiers["light"], "a")
        assert caught.value.param == "model"

    run(test, light=fake())


def test_a_worker_that_embeds_does_not_generate() -> None:
    async def test(manager: ModelManager) -> None:
        request = wire.Generate([wire.Segment("Hi", True)], True, SamplingParams(), [], None)
        with manager.tiers["embedding"].submit(request) as generation:
            with pytest.raises(BadRequest) as caught:
                await generation.started()
            assert caught.value.param == "model"

    run(test, embedding=fake())


# faults


@pytest.mark.parametrize(
    ("request_", "error", "param"),
    [
        (embed("a", ""), BadRequest, "input"),
        (embed("a", [-1]), BadRequest, "input"),
        (embed("a", "b " * 50), ContextLengthExceeded, "input"),
        (embed("a", [5] * 50), ContextLengthExceeded, "input"),
    ],
)
def test_a_request_that_cannot_be_computed_is_the_clients_error(
    request_: wire.Embed, error: type[ServiceError], param: str
) -> None:
    async def test(manager: ModelManager) -> None:
        tier = manager.tiers["embedding"]
        with pytest.raises(error) as caught:
            await computed(tier, request_)
        assert caught.value.param == param
        assert len(await vectors(tier, "fine")) == 1

    run(test, embedding=fake(n_ctx=32))


def test_a_text_of_megabytes_is_refused_without_a_worker() -> None:
    launches = Launches()

    async def test(manager: ModelManager) -> None:
        with pytest.raises(ContextLengthExceeded, match="EMBEDDING_N_CTX") as caught:
            manager.tiers["embedding"].embed(embed("a", "b" * 10_000_000))
        assert caught.value.numbers["index"] == 1
        with pytest.raises(ContextLengthExceeded):
            manager.tiers["embedding"].embed(embed([5] * 9000))
        with pytest.raises(BadRequest, match="even to be cut") as other:
            manager.tiers["embedding"].score(score("q " * 10_000_000, "d"))
        assert other.value.param == "query"

    run(test, launches, embedding=fake())
    assert launches.handles == []


def test_an_item_that_fails_names_itself_and_spares_the_others(tmp_path: Path) -> None:
    poison = {"match": "poison", "fault": "nan"}

    async def test(manager: ModelManager) -> None:
        tier = manager.tiers["embedding"]
        with tier.embed(embed("a", "poison", "b")) as encoding:
            items = {item.index: item async for item in encoding}
        assert [items[i].fault is None for i in range(3)] == [True, False, True]
        with tier.embed(embed("a", "poison")) as encoding:
            with pytest.raises(InternalError) as caught:
                await items_of(encoding)
            assert caught.value.numbers == {"index": 1}

    run(test, embedding=fake(script(tmp_path, poison)))


# the queue


def test_the_queue_is_bounded_in_texts_and_takes_one_request_of_any_size(tmp_path: Path) -> None:
    async def test(manager: ModelManager) -> None:
        tier = manager.tiers["embedding"]
        with tier.embed(embed(*["a"] * 50)) as big:
            with pytest.raises(QueueFull, match=r"50 texts.*EMBEDDING_QUEUE_TEXTS") as caught:
                tier.embed(embed("b"))
            assert caught.value.retry_after_s
            await items_of(big)
        assert len(await vectors(tier, "b")) == 1

    run(test, embedding=fake(script(tmp_path, load_s=0.05), queue_texts=20))


def test_a_small_request_is_served_beside_a_big_one(tmp_path: Path) -> None:
    async def test(manager: ModelManager) -> None:
        tier = manager.tiers["embedding"]
        with tier.embed(embed(*[f"big {i}" for i in range(2000)])) as big:
            iterator = aiter(big)
            await anext(iterator)
            await asyncio.wait_for(vectors(tier, "small"), 5)
            assert big.n_open > 1000

    run(test, embedding=fake(script(tmp_path, step_ms=5)))


def test_leaving_the_block_ends_a_request_wherever_it_is(tmp_path: Path) -> None:
    stall = {"match": "stall", "fault": "stall"}

    async def test(manager: ModelManager) -> None:
        tier = manager.tiers["embedding"]
        await vectors(tier, "a")
        with tier.embed(embed("stall")), tier.embed(embed("never sent")):
            await asyncio.sleep(0.02)
        assert await asyncio.wait_for(vectors(tier, "b"), 5)
        task = asyncio.create_task(vectors(tier, "stall"))
        await asyncio.sleep(0.02)
        task.cancel()
        assert await asyncio.wait_for(vectors(tier, "c"), 5)

    run(test, embedding=fake(script(tmp_path, stall)))


def test_a_tier_that_stops_ends_its_requests(tmp_path: Path) -> None:
    async def test(manager: ModelManager) -> None:
        tier = manager.tiers["embedding"]
        tasks = [asyncio.create_task(vectors(tier, "stall")) for _ in range(3)]
        await until(lambda: tier.state == "ready")
        manager.abandon()
        for error in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(error, TierUnavailable)
        with pytest.raises(TierUnavailable):
            tier.embed(embed("a"))

    run(test, embedding=fake(script(tmp_path, {"match": "stall", "fault": "stall"})))


def test_an_idle_tier_is_unloaded_and_loaded_again() -> None:
    async def test(manager: ModelManager) -> None:
        tier = manager.tiers["embedding"]
        first = await vectors(tier, "a")
        await until(lambda: tier.state == "stopped")
        assert await vectors(tier, "a") == first

    run(test, embedding=fake(idle_ttl_s=0.02))


def test_a_load_that_fails_fails_who_waits(tmp_path: Path) -> None:
    async def test(manager: ModelManager) -> None:
        tier = manager.tiers["embedding"]
        for error in await asyncio.gather(*(vectors(tier, "a"), scores(tier, "a", "b")),
                                          return_exceptions=True):  # fmt: skip
            assert isinstance(error, ModelLoadFailed)

    run(test, embedding=fake(script(tmp_path, fault="load")))


# a worker that dies


def test_a_poison_text_is_its_requests_error_and_its_neighbours_get_their_vectors(
    tmp_path: Path,
) -> None:
    poison = {"match": "poison", "fault": "crash"}

    async def test(manager: ModelManager) -> None:
        tier = manager.tiers["embedding"]
        asked = [vectors(tier, f"innocent {i}") for i in range(5)]
        *innocents, guilty = await asyncio.gather(
            *asked, vectors(tier, "a", "poison"), return_exceptions=True
        )
        assert isinstance(guilty, WorkerCrashed)
        assert guilty.headers() == {"x-should-retry": "false"}
        assert all(isinstance(found, list) and found[0] for found in innocents)

    launches = Launches(launch_process)
    run(test, launches, embedding=fake(script(tmp_path, poison)))
    assert len(launches.handles) == 2, "all together, then each alone"


def test_what_had_come_before_a_crash_is_kept(tmp_path: Path) -> None:
    slow = script(tmp_path, step_ms=20)

    async def test(manager: ModelManager) -> None:
        tier = manager.tiers["embedding"]
        texts = [f"text {i}" for i in range(1000)]
        pairs = [(i % 2, i) for i in range(300)]
        with (
            tier.embed(embed(*texts)) as encoding,
            tier.score(wire.Score(["q", "r"], texts, pairs)) as scoring,
        ):
            items = aiter(encoding)
            found = {item.index: item.dense for item in [await anext(items) for _ in range(200)]}
            assert tier.life.worker is not None
            tier.life.worker._handle.kill()
            async for item in items:
                assert item.index not in found
                found[item.index] = item.dense
            scored = [item.score for item in await items_of(scoring)]
        assert [found[i] for i in range(1000)] == await vectors(tier, *texts)
        with tier.score(wire.Score(["q", "r"], texts, pairs)) as scoring:
            assert scored == [item.score for item in await items_of(scoring)]

    run(test, Launches(launch_process), embedding=fake(slow))


def test_what_had_come_is_not_mixed_with_what_another_file_makes(tmp_path: Path) -> None:
    path, other = Path(script(tmp_path, step_ms=20)), Path(script(tmp_path, step_ms=1))

    def replace_it() -> None:
        other.replace(path)

    async def test(manager: ModelManager) -> None:
        tier = manager.tiers["embedding"]
        with tier.embed(embed(*(f"text {i}" for i in range(1000)))) as encoding:
            items = aiter(encoding)
            await anext(items)
            assert tier.life.worker is not None
            replace_it()
            tier.life.worker._handle.kill()
            with pytest.raises(WorkerCrashed, match="another by now") as caught:
                [item async for item in items]
            assert "x-should-retry" not in caught.value.headers()
        assert await vectors(tier, "a")

    run(test, Launches(launch_process), embedding=fake(str(path)))


def test_a_worker_that_hangs_in_a_batch_is_ended(tmp_path: Path) -> None:
    hang = {"match": "hang", "fault": "hang"}

    async def test(manager: ModelManager) -> None:
        tier = manager.tiers["embedding"]
        with pytest.raises(WorkerCrashed):
            await vectors(tier, "hang")
        assert await vectors(tier, "a")

    run(
        test,
        Launches(launch_process),
        server={"watchdog_s": 1.5},
        embedding=fake(script(tmp_path, hang)),
    )


def test_a_long_batch_is_no_hang(tmp_path: Path) -> None:
    launches = Launches()

    async def test(manager: ModelManager) -> None:
        tier = manager.tiers["embedding"]
        await vectors(tier, "a")
        with tier.embed(embed("stall")):
            await asyncio.sleep(1.6)  # it is asked for a sign of life, and gives one
        assert await vectors(tier, "b")

    stall = {"match": "stall", "fault": "stall"}
    run(
        test,
        launches,
        server={"watchdog_s": 1},
        embedding=fake(script(tmp_path, stall)),
    )
    assert len(launches.handles) == 1


# which file is for what


def test_a_file_is_served_only_by_the_tier_that_it_is_made_for(tmp_path: Path) -> None:
    embedder = encoder_fixtures.write_embedder(tmp_path / "embedder.gguf")
    reranker = encoder_fixtures.write_reranker(tmp_path / "reranker.gguf")

    async def test(manager: ModelManager) -> None:
        assert manager.tiers["embedding"].life.status()[0] == "failed"
        reason = manager.tiers["embedding"].life.status()[1]
        assert reason == "reranker.gguf is a model for reranking and not for embeddings."
        reason = manager.tiers["reranker"].life.status()[1]
        assert reason == "embedder.gguf is a model for embeddings and not for reranking."
        reason = manager.tiers["light"].life.status()[1]
        assert reason == "embedder.gguf is a model for embeddings and not for chat."

    def of(path: Path) -> Any:
        return fake(str(path)).model_copy(update={"backend": "llamacpp"})

    run(test, light=of(embedder), embedding=of(reranker), reranker=of(embedder))


def test_what_changes_vectors_changes_the_fingerprint(tmp_path: Path) -> None:
    path = str(encoder_fixtures.write_embedder(tmp_path / "embedder.gguf"))
    fingerprints: list[str] = []

    async def test(manager: ModelManager) -> None:
        fingerprints.append(manager.tiers["embedding"].fingerprint)

    def of(**values: Any) -> Any:
        return fake(path, **values).model_copy(update={"backend": "llamacpp"})

    several: list[Callable[[], Any]] = [
        of, of,
        lambda: of(pooling="mean"),
        lambda: of(query_prefix="query: "),
        lambda: of(n_ctx=100),
    ]  # fmt: skip
    for tier in several:
        run(test, embedding=tier())
    encoder_fixtures.write_heads(tmp_path)
    run(test, embedding=of())
    assert fingerprints[0] == fingerprints[1]
    assert len(set(fingerprints)) == len(fingerprints) - 1
