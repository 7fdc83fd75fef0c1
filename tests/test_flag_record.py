"""The reference and the service against what FlagEmbedding said (record_flag.py)."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.backends.base import Encoder
from models.convert.bge_m3 import convert
from rerankers import BGEReranker, max_sim
from tests import encoder_fixtures as tiny
from tests.encoder_fixtures import PAIRS, TEXTS, FileType
from tests.own_encoder import Load, embed, embedder_of, loading, pairs_of, scores_of, sequences
from tests.plain_encoder import cosine
from tests.record_flag import (
    PAIR_LENGTHS,
    REAL_PAIR_LENGTHS,
    REAL_TEXTS,
    fingerprint,
    pairs,
    real_model,
    recorded,
    strings,
)

real = pytest.mark.real


Found = tuple[float, float, float]


def differences(model: tiny.Bert, hidden: list[Any], part: dict[str, Any]) -> Found:
    """From the record, at most: dense (1 - cosine), sparse weights, MaxSim."""
    dense = max(
        1 - cosine(model.dense(rows), vector)
        for rows, vector in zip(hidden, part["dense"], strict=True)
    )
    sparse = 0.0
    for rows, ids, right in zip(hidden, part["ids"], part["sparse"], strict=True):
        found = model.sparse(rows, ids)
        for token in found | right:
            sparse = max(sparse, abs(found.get(token, 0) - right.get(token, 0)))
    late = [model.colbert(rows) for rows in hidden]
    scores = np.array([[tiny.max_sim(query, document) for document in late] for query in late])
    return dense, sparse, float(abs(scores - np.array(part["max_sim"])).max())


def test_the_reference_is_flag_embedding() -> None:
    part, model = recorded()["tiny"], tiny.tiny_embedder()
    hidden = [model.hidden(ids, "erf") for ids in part["ids"]]
    dense, sparse, max_sim = differences(model, hidden, part)
    assert dense < 1e-11
    assert sparse < 2e-6
    assert max_sim < 2e-6


@pytest.mark.parametrize(("length", "key"), [(512, "logits"), (24, "short_logits")])
def test_the_references_logits_are_flag_rerankers(length: int, key: str) -> None:
    record = recorded()["reranker"]
    logits = [tiny.tiny_reranker().logit(ids, "erf") for ids in record["pair_ids"][str(length)]]
    assert logits == pytest.approx(record[key], abs=1e-5)


# From FlagEmbedding, which rounds nothing: dense (1 - cosine), sparse, MaxSim.
FROM_FLAG: dict[FileType, Found] = {
    "F32": (1e-5, 2e-3, 1e-3),
    "F16": (1e-5, 2e-3, 1e-3),
    "Q8_0": (3e-3, 2e-2, 1e-2),
}


@pytest.fixture
def load() -> Iterator[Load]:
    with loading(flash_attention=True) as load:
        yield load


def differences_of_own(encoder: Encoder, texts: Sequence[str], part: dict[str, Any]) -> Found:
    """The same for what the service answers."""
    embedder = embedder_of(encoder)
    assert [ids.tolist() for ids in sequences(embedder, texts)] == part["ids"]
    found = embed(embedder, texts)
    dense = max(
        1 - cosine(ours.dense, vector) for ours, vector in zip(found, part["dense"], strict=True)
    )
    sparse = 0.0
    for ours, right in zip(found, part["sparse"], strict=True):
        weights = dict(zip(*(values.tolist() for values in ours.sparse), strict=True))
        for token in weights | right:
            sparse = max(sparse, abs(weights.get(token, 0) - right.get(token, 0)))
    late = [ours.colbert for ours in found]
    scores = np.array([[max_sim(query, document) for document in late] for query in late])
    return dense, sparse, float(abs(scores - np.array(part["max_sim"])).max())


@real
@pytest.mark.parametrize("file_type", FROM_FLAG)
def test_the_services_vectors_are_close_to_flag_embeddings(
    file_type: FileType, load: Load, tmp_path: Path
) -> None:
    tiny.write_heads(tmp_path)
    encoder = load(tiny.write_embedder(tmp_path / "embedder.gguf", file_type))
    found = differences_of_own(encoder, TEXTS, recorded()["tiny"])
    assert np.less(found, FROM_FLAG[file_type]).all(), found


@real
@pytest.mark.parametrize(("file_type", "off"), [("F32", 3e-2), ("F16", 3e-2), ("Q8_0", 0.5)])
def test_the_services_scores_are_flag_rerankers(
    file_type: FileType, off: float, load: Load, tmp_path: Path
) -> None:
    reranker = BGEReranker(load(tiny.write_reranker(tmp_path / "reranker.gguf", file_type)))
    record = recorded()["reranker"]
    logits = scores_of(reranker, PAIRS)
    assert logits == pytest.approx(record["logits"], abs=off)
    if file_type != "Q8_0":
        for start in range(0, len(PAIRS), len(TEXTS)):
            of_query = slice(start, start + len(TEXTS))
            found = np.argsort(logits[of_query])[::-1][:10]
            assert found.tolist() == np.argsort(record["logits"][of_query])[::-1][:10].tolist()


# Real weights and the real vocabulary


BOTH = ("sparse", "colbert")


@pytest.fixture(scope="module")
def e5_with_heads() -> tiny.Bert:
    return real_model()


def without_last(part: dict[str, Any]) -> dict[str, Any]:
    """Without the text that is known to be off by up to 2e-2 in Q8_0, alone of all texts."""
    assert REAL_TEXTS[-1] == "."
    shorter = {name: values[:-1] for name, values in part.items()}
    return shorter | {"max_sim": [scores[:-1] for scores in shorter["max_sim"]]}


@real
@pytest.mark.parametrize("file_type", ["F32", "Q8_0"])
def test_the_services_vectors_of_real_weights_are_flag_embeddings(
    file_type: FileType, e5: Path, e5_with_heads: tiny.Bert, load: Load, tmp_path: Path
) -> None:
    path, texts, part = tmp_path / "e5.gguf", [*REAL_TEXTS], recorded()["real"]
    heads = {}
    if file_type == "F32":
        path.symlink_to(e5)
        tiny.write_heads(tmp_path, e5_with_heads)
        # set, since its file says the mean and heads beside it count for CLS only
        heads = {f"{name}_head_path": str(tmp_path / f"{name}_linear.pt") for name in BOTH}
    else:
        tiny.write_hf(tmp_path / "hf", e5_with_heads, tiny.vocabulary_in(e5))
        convert(tmp_path / "hf", path, file_type)
        texts, part = texts[:-1], without_last(part)
    found = differences_of_own(load(path, **heads), texts, part)
    assert np.less(found, FROM_FLAG[file_type]).all(), found


@real
def test_strings_of_forty_languages_are_split_alike(e5: Path, load: Load) -> None:
    texts, record = strings(), recorded()["strings"]
    different = {
        text
        for text, ids, right in zip(
            texts, sequences(embedder_of(load(e5)), texts), record, strict=True
        )
        if fingerprint(ids.tolist()) != right
    }
    assert len(texts) > 1000
    assert different == set()


@real
@pytest.mark.parametrize("length", PAIR_LENGTHS)
def test_pairs_are_put_together_alike(length: int, load: Load, tmp_path: Path) -> None:
    path = tiny.write_reranker(tmp_path / "reranker.gguf")
    found = pairs_of(BGEReranker(load(path, n_ctx=length)), PAIRS)
    assert [ids.tolist() for ids in found] == recorded()["reranker"]["pair_ids"][str(length)]


@real
@pytest.mark.parametrize("length", REAL_PAIR_LENGTHS)
def test_pairs_of_the_real_vocabulary_are_put_together_alike(
    length: int, e5: Path, load: Load
) -> None:
    found = pairs_of(BGEReranker(load(e5, n_ctx=length)), pairs())
    assert [fingerprint(ids.tolist()) for ids in found] == recorded()["pairs"][str(length)]
    assert max(map(len, found)) == length, "some had to be cut"
