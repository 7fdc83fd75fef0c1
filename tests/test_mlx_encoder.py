"""The backend mlx on encoders: what it computes, and what it refuses to load.

References are the network in float64, what torch said (tests/recorded), and llama.cpp.
"""

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedders import BGEM3Embedder, Embedded
from engine import wire
from engine.backends import llama_encoder
from engine.backends.base import Interrupted, load_encoder
from engine.backends.hf_tokenizer import FolderTokenizer
from engine.client import launch_process
from engine.model_folder import read_model_folder
from errors import ModelLoadFailed
from model_manager import ModelManager
from models.convert.hf_folder import write_safetensors
from rerankers import PROOF, BGEReranker, max_sim
from settings import Settings, TierSettings
from tests import encoder_fixtures as tiny
from tests.encoder_fixtures import PAIRS, TEXTS
from tests.own_encoder import (
    ALL,
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
from tests.serving import Service, serving
from tests.test_flag_encoder import Damage, config
from tests.test_mlx_fields import fate, written
from tests.test_model_manager import Launches, items_of, run
from tests.torch_files import write_pt

pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("mlx", "tokenizers"))),
    reason="mlx is not installed: ./setup.sh --mlx",
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf_folders(tmp_path_factory.mktemp("mlx"))


@pytest.fixture
def load() -> Iterator[Load]:
    """In the thread of the test."""
    with loading(backend="mlx") as load:
        yield load


# what it computes


def test_the_three_vectors_are_those_of_the_network_in_float64(folders: Path, load: Load) -> None:
    embedder = embedder_of(load(folders / "embedder"))
    assert isinstance(embedder, BGEM3Embedder)
    model, batch = tiny.tiny_embedder(), sequences(embedder, TEXTS)
    for text, ids in zip(vectors_of(embedder, batch[:-1]), batch, strict=False):
        hidden = model.hidden(ids.tolist(), "erf")
        assert text.is_sound
        assert text.dense == pytest.approx(model.dense(hidden), abs=1e-5)
        assert weights_of(text) == pytest.approx(model.sparse(hidden, ids.tolist()), abs=1e-5)
        assert text.colbert == pytest.approx(model.colbert(hidden), abs=1e-5)


def test_the_three_vectors_are_those_of_torch(folders: Path, load: Load) -> None:
    embedder = embedder_of(load(folders / "embedder"))
    part = recorded()["tiny"]
    batch = sequences(embedder, TEXTS)
    assert [ids.tolist() for ids in batch] == part["ids"]
    found = vectors_of(embedder, batch[:10]) + vectors_of(embedder, batch[10:])
    for text, dense, sparse in zip(found, part["dense"], part["sparse"], strict=True):
        assert text.dense == pytest.approx(dense, abs=1e-5)
        assert weights_of(text) == pytest.approx(sparse, abs=1e-5)
    for query, scores in zip(found, part["max_sim"], strict=True):
        assert [max_sim(query.colbert, t.colbert) for t in found] == pytest.approx(scores, abs=1e-5)


def test_logits_of_pairs_are_those_of_torch(folders: Path, load: Load) -> None:
    reranker = BGEReranker(load(folders / "reranker"))
    record = recorded()["reranker"]
    pairs = pairs_of(reranker, PAIRS[:20])
    assert [ids.tolist() for ids in pairs] == record["pair_ids"]["512"][:20]
    found = reranker.score(pairs[:10]) + reranker.score(pairs[10:])
    assert found == pytest.approx(record["logits"][:20], abs=1e-4)
    model = tiny.tiny_reranker()
    wanted = [model.logit(ids.tolist(), "erf") for ids in pairs]
    assert found == pytest.approx(wanted, abs=1e-4)


def test_a_bert_is_pooled_as_its_directory_says(folders: Path, load: Load) -> None:
    encoder = load(folders / "bert")
    embedder = embedder_of(encoder)
    assert encoder.pooling == "mean"
    assert embedder.outputs == {"dense"}
    model, batch = tiny.tiny_bert(), sequences(embedder, TEXTS[:8])
    assert {(ids[0], ids[-1]) for ids in batch} == {(2, 3)}
    for text, ids in zip(vectors_of(embedder, batch), batch, strict=True):
        mean = model.hidden(ids.tolist(), "erf").mean(axis=0)
        assert text.dense == pytest.approx(mean / np.linalg.norm(mean), abs=1e-5)


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


def test_a_roberta_is_an_xlm_roberta_with_other_tokens(tmp_path: Path, load: Load) -> None:
    folder = tiny.write_hf_embedder(tmp_path / "embedder")
    config(model_type="roberta")(folder)
    model, ids = tiny.tiny_embedder(), [0, 9, 10, 11, 2]
    rows = load(folder).encode(ids_of(ids))
    assert rows == pytest.approx(model.hidden(ids, "erf"), abs=1e-4)


@pytest.mark.real
def test_the_three_vectors_are_those_of_llama_cpp(folders: Path, tmp_path: Path) -> None:
    tiny.write_embedder(tmp_path / "embedder.gguf")
    tiny.write_heads(tmp_path)
    found: dict[str, list[Embedded]] = {}
    for path, backend in ((folders / "embedder", "mlx"), (tmp_path / "embedder.gguf", "llamacpp")):
        start = llama_encoder.load if backend == "llamacpp" else load_encoder
        encoder = start(spec(path, backend=backend), lambda _: None)
        embedder = embedder_of(encoder)
        found[backend] = vectors_of(embedder, sequences(embedder, TEXTS[:-1]))
        encoder.close()
    for ours, theirs in zip(found["mlx"], found["llamacpp"], strict=True):
        assert ours.dense == pytest.approx(theirs.dense, abs=1e-3)
        assert weights_of(ours) == pytest.approx(weights_of(theirs), abs=1e-3)
        assert ours.colbert == pytest.approx(theirs.colbert, abs=1e-3)


def test_company_changes_nothing(folders: Path, load: Load) -> None:
    encoder = load(folders / "embedder")
    batch = sequences(embedder_of(encoder), TEXTS[:9])
    alone = np.concatenate([encoder.encode([ids]) for ids in batch])
    assert encoder.encode(batch) == pytest.approx(alone, abs=1e-5)


def test_a_long_text_is_computed_in_pieces_and_given_up_between_them(
    folders: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.backends import mlx_bert

    encoder = load(folders / "embedder")
    batch = ids_of([0, *range(5, 200), 2], [0, *range(100, 280), 2])
    whole = encoder.encode(batch)
    monkeypatch.setattr(mlx_bert, "ATTENTION_NUMBERS", 2 * 197 * 4 * 10)  # ten rows of both
    asked: list[bool] = []

    def five_times() -> bool:
        asked.append(len(asked) < 5)
        return asked[-1]

    assert encoder.encode(batch, lambda: not asked.append(True)) == pytest.approx(whole, abs=1e-5)
    assert len(asked) == 1 + 2 * 20, "of each layer"
    asked.clear()
    with pytest.raises(Interrupted):
        encoder.encode(batch, five_times)
    assert len(asked) == 6
    assert encoder.encode(batch) == pytest.approx(whole, abs=1e-5), "and nothing is left of it"


def test_a_batch_is_given_up_between_layers(
    folders: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.backends import mlx_bert

    monkeypatch.setattr(mlx_bert, "STEP_TOKENS", 10)
    encoder = load(folders / "embedder")
    with pytest.raises(Interrupted):
        encoder.encode(ids_of([0, *range(5, 15), 2]), iter([True, True, False]).__next__)
    for _ in range(3):
        encoder.encode(ids_of([0, 5, 2]), iter([True]).__next__)  # short ones are asked for once


def test_what_an_array_cannot_hold_is_refused(folders: Path, load: Load) -> None:
    encoder = load(folders / "embedder", n_ctx=16, batch_tokens=32)
    for batch in ([], [[]], [[5] * 17], [[5] * 16] * 3, [[5]] * 65, [[-1]], [[289]]):
        with pytest.raises(ValueError, match=r"batch|sequence|ids"):
            encoder.encode(ids_of(*batch))


# what a directory may look like


def test_weights_may_come_as_torch_saves_them_and_by_old_names(tmp_path: Path, load: Load) -> None:
    folder = tiny.write_hf_bert(tmp_path / "bert", tiny.tiny_bert())
    (folder / "model.safetensors").unlink()
    tensors = {}
    for name, values in tiny.hf_tensors(tiny.tiny_bert(), "bert").items():
        old = name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta")
        tensors[f"bert.{old}"] = values
    tensors["cls.predictions.bias"] = np.zeros(9, np.float32)  # of what it was trained with
    names = sorted(tensors)
    for n, part in enumerate((names[::2], names[1::2]), 1):
        write_pt(folder / f"pytorch_model-0000{n}-of-00002.bin", {k: tensors[k] for k in part})
    ids = [2, 7, 8, 3]
    rows = load(folder).encode(ids_of(ids))
    assert rows == pytest.approx(tiny.tiny_bert().hidden(ids, "erf"), abs=1e-4)


@pytest.mark.parametrize(
    ("named", "gelu"), [("gelu", "erf"), ("gelu_new", "tanh"), ("gelu_pytorch_tanh", "tanh")]
)
def test_the_activation_is_the_one_that_is_named(
    named: str, gelu: Any, tmp_path: Path, load: Load
) -> None:
    folder = tiny.write_hf_embedder(tmp_path / "embedder")
    config(hidden_act=named)(folder)
    ids = [0, *range(4, 40), 2]
    rows = load(folder).encode(ids_of(ids))
    assert rows == pytest.approx(tiny.tiny_embedder().hidden(ids, gelu), abs=1e-5)


def test_halves_count_as_what_they_become(tmp_path: Path) -> None:
    folder = tiny.write_hf_embedder(tmp_path / "embedder")
    size = read_model_folder(folder).size_bytes
    config(torch_dtype="float16")(folder)
    assert read_model_folder(folder).size_bytes == 2 * size


def without(name: str) -> Damage:
    def change(folder: Path) -> None:
        tensors = tiny.hf_tensors(tiny.tiny_reranker())
        del tensors[name]
        write_safetensors(folder / "model.safetensors", tensors)

    return change


def rewritten(name: str, text: str) -> Damage:
    return lambda folder: (folder / name).write_text(text)


def without_frame(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": None}))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (without("roberta.encoder.layer.1.output.dense.bias"), "encoder.layer.1.output.dense.bias"),
        (without("classifier.out_proj.weight"), "no head that scores pairs"),
        (config(intermediate_size=64), "other weights than its config.json says"),
        (config(num_attention_heads=7), "64 numbers among 7 heads"),
        (config(num_attention_heads=None), "no num_attention_heads"),
        (config(hidden_act="swish"), "'swish'"),
        (config(layer_norm_eps=None), "no layer_norm_eps"),
        (config(position_embedding_type="relative_key"), "no plain encoder"),
        (config(is_decoder=True), "no plain encoder"),
        (config(pad_token_id=0), "pad_token_id"),
        (config(quantization={"bits": 4}), "is quantized"),
        (lambda folder: (folder / "tokenizer.json").rename(folder / "vocab.txt"), "no tokenizer"),
        (rewritten("tokenizer.json", "{}"), "tokenizer.json that cannot be read"),
        (rewritten("model.safetensors", "nothing"), "model.safetensors"),
        (without_frame, "no tokens around texts"),
    ],
)
def test_a_directory_that_will_not_do_is_told_by_its_name(
    damage: Damage, says: str, tmp_path: Path, load: Load
) -> None:
    folder = tiny.write_hf_reranker(tmp_path / "reranker")
    damage(folder)
    with pytest.raises(ModelLoadFailed) as caught:
        load(folder)
    assert says in caught.value.message
    assert str(tmp_path) not in caught.value.message


@pytest.mark.parametrize("library", ["mlx.core", "tokenizers"])
def test_a_library_that_is_missing_is_told_with_the_line_to_run(
    library: str, folders: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ModelLoadFailed, match=r"needs mlx and tokenizers .*setup.sh --mlx"):
        load(folders / "embedder")


# tokens


def test_control_tokens_are_obeyed_only_where_told(folders: Path, load: Load) -> None:
    encoder = load(folders / "embedder")
    tokenizer = encoder.tokenizer
    assert encoder.specials.unused == {0, 1, 2, 3}
    assert tokenizer.tokenize("<s>\ud800", parse_special=True, continues=False)[0] == 0
    plain = tokenizer.tokenize("<s> hello", parse_special=False, continues=False)
    assert 0 not in plain
    assert b"".join(map(tokenizer.literal, plain)) == b" <s> hello"
    unknown = tokenizer.tokenize("ஃ", parse_special=False, continues=False)
    assert unknown[-1] == 3, "is what it is"
    assert (tokenizer.piece(0), tokenizer.literal(0)) == (b"", b"<s>")


def test_a_directory_does_not_decide_where_texts_are_cut(folders: Path, load: Load) -> None:
    tokenizer = load(folders / "bert").tokenizer
    ids = tokenizer.tokenize("hello world " * 40, parse_special=False, continues=False)
    assert len(ids) == 80, "its tokenizer.json says 8"
    assert tokenizer.literal(ids[0]) == b" hello"


def test_pieces_of_a_roberta_are_bytes() -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel

    pieces = {letter: n for n, letter in enumerate(sorted(ByteLevel.alphabet()))}
    backend = Tokenizer(BPE(pieces | {"<s>": 256}, []))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer = FolderTokenizer(backend, 257, begin=256, unknown=None, controls=[256])
    text = "naïve \t\n\u00ad🙂"
    ids = tokenizer.tokenize(text, parse_special=False, continues=False)
    assert b"".join(map(tokenizer.literal, ids)) == text.encode()
    assert len(ids) == len(text.encode())


# in a worker


def test_a_worker_that_has_computed_ends_with_0(folders: Path) -> None:
    launches = Launches(launch_process)

    async def test(manager: ModelManager) -> str:
        tier = manager.tiers["embedding"]
        with tier.embed(wire.Embed(["hello"], ["dense"])) as encoding:
            await items_of(encoding)
        await tier.unload()
        return await launches.handles[0].wait()

    of = TierSettings(backend="mlx", model_path=str(folders / "embedder"))
    assert run(test, launches, embedding=of) == "exit code 0"


@pytest.fixture(scope="module")
def service(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Both tiers in workers, as the environment sets them; the reranker tells answers apart."""
    encoder = load_encoder(spec(folders / "reranker", backend="mlx"), lambda _: None)
    texts = [(query, answer) for query, _ in PROOF[0] for _, answer in PROOF[0]]
    pairs = [pair.tolist() for pair in pairs_of(BGEReranker(encoder), texts)]
    encoder.close()
    taught = tiny.tiny_reranker().taught(pairs, [4 if p in PROOF[0] else -4 for p in texts])
    path = tiny.write_hf(tmp_path_factory.mktemp("taught") / "reranker", taught, tiny.unigram())
    with pytest.MonkeyPatch.context() as environment:
        for name, folder in (("EMBEDDING", folders / "embedder"), ("RERANKER", path)):
            environment.setenv(f"{name}_BACKEND", "mlx")
            environment.setenv(f"{name}_MODEL_PATH", str(folder))
        environment.setenv("EMBEDDING_MATRYOSHKA", "true")
        of = Settings.load(None)
    with serving(of, launch=launch_process) as service:
        yield service


def test_vectors_of_all_kinds_are_served(service: Service) -> None:
    reply = service.embed(list(TEXTS[:3]), embedding_type=sorted(ALL), return_tokens=True)
    assert reply.status_code == 200, reply.text
    model = tiny.tiny_embedder()
    for item, ids in zip(reply.json()["data"], recorded()["tiny"]["ids"], strict=False):
        hidden = model.hidden(ids, "erf")
        assert item["embedding"] == pytest.approx(model.dense(hidden).tolist(), abs=1e-5)
        sparse = item["sparse_embedding"]
        weights = dict(zip(sparse["indices"], sparse["values"], strict=True))
        assert weights == pytest.approx(model.sparse(hidden, ids), abs=1e-5)
        colbert = np.array(item["colbert_vecs"])
        assert colbert == pytest.approx(model.colbert(hidden), abs=1e-5)
        assert item["token_ids"] == ids


def test_what_is_too_long_is_refused_or_cut(service: Service) -> None:
    refused = service.embed("hello " * 600)
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    assert "it has 602 (EMBEDDING_N_CTX)" in refused.json()["error"]["message"]
    cut = service.embed("hello " * 600, truncate="end")
    assert cut.status_code == 200, cut.text
    assert cut.json()["usage"]["prompt_tokens"] == 512


def test_an_answer_is_ranked_before_others(service: Service) -> None:
    (query, answer), *others = PROOF[0]
    documents = [text for _, text in others] + [answer]
    results = service.rerank(query, documents, raw_scores=True).json()["results"]
    assert results[0]["index"] == 2
    found = [item["relevance_score"] for item in results]
    assert found == pytest.approx([4, -4, -4], abs=0.1)


VECTORS: dict[str, Any] = {
    "input": ["a"], "model": "embedding", "encoding_format": "base64", "dimensions": 8,
    "user": "me", "embedding_type": "sparse", "return_dense": True, "return_sparse": True,
    "return_colbert": True, "keep_alive": "5m", "return_tokens": True, "colbert_dtype": "float16",
    "input_type": "query", "truncate": "end",
}  # fmt: skip
RANKED: dict[str, Any] = {
    "query": "b", "documents": ["a", "b"], "texts": ["a"], "model": "reranker", "top_n": 1,
    "return_documents": True, "return_text": True, "raw_scores": True, "method": "hybrid",
    "weights": [1, 2, 3], "max_tokens_per_doc": 2, "truncate": "start",
    "truncation_direction": "left", "keep_alive": "5m",
}  # fmt: skip
BESIDE = {"texts": {"documents": None}, "weights": {"method": "hybrid"}}


@pytest.mark.parametrize(
    ("path", "body", "fields"),
    [
        ("/v1/embeddings", {"model": "embedding", "input": "a b"}, VECTORS),
        ("/v1/rerank", {"query": "a", "documents": ["a", "b"]}, RANKED),
    ],
)
def test_the_fate_of_a_field_is_what_a_run_gives(
    path: str, body: dict[str, Any], fields: dict[str, Any], service: Service
) -> None:
    asked = {name: {**body, **BESIDE.get(name, {}), name: value} for name, value in fields.items()}
    found = {name: fate(service.http.post(path, json=of), name) for name, of in asked.items()}
    assert found == written(path)


@pytest.mark.real
def test_real_weights_give_the_vectors_of_torch_and_llama_cpp(e5: Path, tmp_path: Path) -> None:
    """In a worker, which takes of the memory what was estimated."""
    model = real_model()
    folder = tiny.write_hf(tmp_path / "e5", model, tiny.vocabulary_in(e5))
    part = recorded()["real"]
    chosen = [n for n, ids in enumerate(part["ids"]) if len(ids) < 13]
    texts = [REAL_TEXTS[n] for n in chosen]
    found: dict[str, list[wire.Vector]] = {}

    async def test(manager: ModelManager) -> None:
        tier = manager.tiers["embedding"]
        kinds: list[Any] = ["dense"]
        if tier.settings.backend == "mlx":
            kinds += ["sparse", "colbert"]
        asked = wire.Embed(texts, kinds, return_tokens=True)
        with tier.embed(asked) as encoding:
            found[tier.settings.backend] = await items_of(encoding)
        assert tier.life.memory_bytes is not None
        assert tier.life.footprint().loaded == pytest.approx(tier.life.memory_bytes, rel=0.15)

    for backend, path in (("mlx", folder), ("llamacpp", e5)):
        tier = TierSettings(backend=backend, model_path=str(path), pooling="cls", n_threads=1)  # type: ignore[arg-type]
        run(test, launch_process, embedding=tier)
    for n, ours, theirs in zip(chosen, found["mlx"], found["llamacpp"], strict=True):
        assert ours.tokens == theirs.tokens == part["ids"][n]
        dense = np.frombuffer(ours.dense or b"", "<f4")
        assert dense == pytest.approx(part["dense"][n], abs=1e-4)
        assert dense == pytest.approx(np.frombuffer(theirs.dense or b"", "<f4"), abs=1e-3)
        sparse_ids = np.frombuffer(ours.sparse_ids or b"", "<i4").tolist()
        sparse_weights = np.frombuffer(ours.sparse_weights or b"", "<f4").tolist()
        weights = dict(zip(sparse_ids, sparse_weights, strict=True))
        assert weights == pytest.approx(part["sparse"][n], abs=1e-4)
