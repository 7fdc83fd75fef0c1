"""The backend onnx: what it computes. What it refuses to load is the same as on mlx.

References are the network in float64, what torch said (tests/recorded), and llama.cpp.
"""

import importlib.util
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from embedders import BGEM3Embedder, Embedded
from engine import wire
from engine.backends import llama_encoder, onnx_encoder
from engine.backends.base import Interrupted, load_encoder
from engine.client import launch_process
from errors import ModelLoadFailed
from model_manager import ModelManager
from rerankers import BGEReranker
from settings import TierSettings
from tests import encoder_fixtures as tiny
from tests.encoder_fixtures import PAIRS, TEXTS
from tests.own_encoder import (
    Load,
    embedder_of,
    ids_of,
    loading,
    pairs_of,
    sequences,
    spec,
    vectors_of,
    weights_of,
    write_hf_folders,
)
from tests.record_flag import REAL_TEXTS, real_model, recorded
from tests.test_flag_encoder import config
from tests.test_model_manager import items_of, run

needs_onnx = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("onnxruntime", "onnx", "tokenizers"))),
    reason="ONNX Runtime is not installed: ./setup.sh --onnx",
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf_folders(tmp_path_factory.mktemp("onnx"))


@pytest.fixture
def load() -> Iterator[Load]:
    with loading(backend="onnx") as load:
        yield load


@pytest.mark.parametrize("library", ["onnxruntime", "tokenizers"])
def test_a_library_that_is_missing_is_told_with_the_line_to_run(
    library: str, folders: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ModelLoadFailed, match=r"needs onnxruntime.*setup.sh --onnx"):
        load(folders / "embedder")


@needs_onnx
def test_the_three_vectors_are_those_of_the_network_in_float64(folders: Path, load: Load) -> None:
    embedder = embedder_of(load(folders / "embedder"))
    assert isinstance(embedder, BGEM3Embedder)
    model, batch = tiny.tiny_embedder(), sequences(embedder, TEXTS)
    assert [ids.tolist() for ids in batch] == recorded()["tiny"]["ids"]
    for text, ids in zip(vectors_of(embedder, batch[:-1]), batch, strict=False):
        hidden = model.hidden(ids.tolist(), "erf")
        assert text.is_sound
        assert text.dense == pytest.approx(model.dense(hidden), abs=1e-5)
        assert weights_of(text) == pytest.approx(model.sparse(hidden, ids.tolist()), abs=1e-5)
        assert text.colbert == pytest.approx(model.colbert(hidden), abs=1e-5)


@needs_onnx
def test_the_three_vectors_are_those_of_llama_cpp(folders: Path, tmp_path: Path) -> None:
    tiny.write_embedder(tmp_path / "embedder.gguf")
    tiny.write_heads(tmp_path)
    found: dict[str, list[Embedded]] = {}
    for path, backend in ((folders / "embedder", "onnx"), (tmp_path / "embedder.gguf", "llamacpp")):
        start = llama_encoder.load if backend == "llamacpp" else load_encoder
        encoder = start(spec(path, backend=backend), lambda _: None)
        embedder = embedder_of(encoder)
        found[backend] = vectors_of(embedder, sequences(embedder, TEXTS[:-1]))
        encoder.close()
    for ours, theirs in zip(found["onnx"], found["llamacpp"], strict=True):
        assert ours.dense == pytest.approx(theirs.dense, abs=1e-3)
        assert weights_of(ours) == pytest.approx(weights_of(theirs), abs=1e-3)
        assert ours.colbert == pytest.approx(theirs.colbert, abs=1e-3)


@needs_onnx
def test_logits_of_pairs_are_those_of_torch(folders: Path, load: Load) -> None:
    reranker = BGEReranker(load(folders / "reranker"))
    record = recorded()["reranker"]
    pairs = pairs_of(reranker, PAIRS[:20])
    assert [ids.tolist() for ids in pairs] == record["pair_ids"]["512"][:20]
    assert reranker.score(pairs) == pytest.approx(record["logits"][:20], abs=1e-4)


@needs_onnx
def test_a_bert_is_pooled_as_its_directory_says(folders: Path, load: Load) -> None:
    embedder = embedder_of(load(folders / "bert"))
    model, batch = tiny.tiny_bert(), sequences(embedder, TEXTS[:8])
    for text, ids in zip(vectors_of(embedder, batch), batch, strict=True):
        mean = model.hidden(ids.tolist(), "erf").mean(axis=0)
        assert text.dense == pytest.approx(mean / np.linalg.norm(mean), abs=1e-5)


@needs_onnx
def test_a_bert_is_told_which_tokens_are_the_documents(folders: Path, load: Load) -> None:
    reranker = BGEReranker(load(folders / "bert-reranker"))
    model = tiny.tiny_typed_reranker()
    pairs = pairs_of(reranker, [("hello world", "the fox"), ("what", "rain in paris"), ("a", "")])
    wanted = []
    for pair in pairs:
        n_query = pair.tolist().index(3) + 1
        types = [0] * n_query + [1] * (len(pair) - n_query)
        wanted.append(model.logit(pair.tolist(), "erf", types))
        assert wanted[-1] != pytest.approx(model.logit(pair.tolist(), "erf"), abs=1e-2)
    assert reranker.score(pairs) == pytest.approx(wanted, abs=1e-4)


@needs_onnx
@pytest.mark.parametrize("name", ["embedder", "reranker"])
def test_company_changes_nothing(
    name: str, folders: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention is computed in one way where sequences are of one length, and else in another; and
    long ones are computed alone."""
    encoder = load(folders / name, batch_tokens=100)
    first, other, shorter = ids_of(*([0, *range(5, end), 2] for end in (60, 60, 55)))
    for batch in ([first, other], [first, shorter]):
        alone = np.concatenate([encoder.encode([ids]) for ids in batch])
        assert encoder.encode(batch) == pytest.approx(alone, abs=1e-5)
    monkeypatch.setattr(onnx_encoder, "ATTENTION_NUMBERS", 0)
    assert encoder.encode(batch) == pytest.approx(alone, abs=1e-5)


@needs_onnx
@pytest.mark.parametrize(("named", "gelu"), [("gelu_new", "tanh"), ("gelu", "erf")])
def test_the_activation_is_the_one_that_is_named(
    named: str, gelu: Any, tmp_path: Path, load: Load
) -> None:
    folder = tiny.write_hf_embedder(tmp_path / "embedder")
    config(hidden_act=named, model_type="roberta")(folder)
    ids = [0, *range(4, 40), 2]
    rows = load(folder).encode(ids_of(ids))
    assert rows == pytest.approx(tiny.tiny_embedder().hidden(ids, gelu), abs=1e-5)


@needs_onnx
def test_what_an_array_cannot_hold_is_refused(folders: Path, load: Load) -> None:
    encoder = load(folders / "embedder", n_ctx=16, batch_tokens=32)
    for batch in ([], [[]], [[5] * 17], [[5] * 16] * 3, [[5]] * 65, [[-1]], [[289]]):
        with pytest.raises(ValueError, match=r"batch|sequence|ids"):
            encoder.encode(ids_of(*batch))


@needs_onnx
def test_a_call_that_nobody_wants_any_more_is_ended(
    folders: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_encoder, "ASK_EVERY_S", 0.001)
    encoder = load(folders / "embedder")
    assert isinstance(encoder, onnx_encoder.OnnxEncoder)
    session, ended = encoder._session, []

    def endless(outputs: None, feed: object, options: Any) -> None:
        while not options.terminate:
            time.sleep(0.001)
        ended.append(True)
        raise RuntimeError("terminated")

    encoder._session = SimpleNamespace(run=endless)
    with pytest.raises(Interrupted):
        encoder.encode(ids_of([0, 5, 2]), iter([True, True, True, False]).__next__)
    assert ended == [True], "before it was told"
    with pytest.raises(StopIteration):  # what asking raises is not lost
        encoder.encode(ids_of([0, 5, 2]), iter([True, True, True]).__next__)
    assert ended == [True, True]
    encoder._session = session
    with pytest.raises(Interrupted):
        encoder.encode(ids_of([0, 5, 2]), lambda: False)
    assert encoder.encode(ids_of([0, 5, 2])).shape == (3, 64)


@needs_onnx
@pytest.mark.real
def test_real_weights_give_the_vectors_of_torch_and_llama_cpp(e5: Path, tmp_path: Path) -> None:
    """In a worker, which takes of the memory what was estimated."""
    folder = tiny.write_hf(tmp_path / "e5", real_model(), tiny.vocabulary_in(e5))
    part = recorded()["real"]
    chosen = [n for n, ids in enumerate(part["ids"]) if len(ids) < 13]
    found: dict[str, list[Any]] = {}

    async def test(manager: ModelManager) -> None:
        tier = manager.tiers["embedding"]
        asked = wire.Embed([REAL_TEXTS[n] for n in chosen], ["dense"])
        with tier.embed(asked) as encoding:
            vectors = await items_of(encoding)
        found[tier.settings.backend] = [np.frombuffer(v.dense or b"", "<f4") for v in vectors]
        assert tier.life.memory_bytes is not None
        assert tier.life.footprint().loaded == pytest.approx(tier.life.memory_bytes, rel=0.15)

    for backend, path in (("onnx", folder), ("llamacpp", e5)):
        tier = TierSettings(backend=backend, model_path=str(path), pooling="cls", n_threads=1)  # type: ignore[arg-type]
        run(test, launch_process, embedding=tier)
    for n, ours, theirs in zip(chosen, found["onnx"], found["llamacpp"], strict=True):
        assert ours == pytest.approx(part["dense"][n], abs=1e-4)
        assert ours == pytest.approx(theirs, abs=1e-3)
