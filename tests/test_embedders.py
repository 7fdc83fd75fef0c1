"""From rows to vectors and from vectors to scores, as plain calls."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from embedders import (
    BGEM3Embedder,
    Embedded,
    Framed,
    SimpleEmbedder,
    lexical_weights,
    new_embedder,
    normalized,
)
from engine.backends.base import Floats, Ids
from engine.backends.fake import Script
from engine.backends.fake_encoder import FakeEncoder
from engine.heads import Heads
from engine.wire import EncoderSpec
from rerankers import EmbeddingReranker, max_sim, sparse_score

SPEC = EncoderSpec(kind="embedding")
UNUSED = np.array([0, 1, 2, 3], np.int32)


def ids(*tokens: int) -> Ids:
    return np.array(tokens, np.int32)


def floats(*values: Any) -> Floats:
    return np.array(values, np.float32)


class Rows(FakeEncoder):
    """Gives the rows that it was told."""

    def __init__(self, rows: Floats) -> None:
        super().__init__(Script(heads=False))
        self.rows = rows

    def encode(self, batch: Sequence[Ids], go_on: Callable[[], bool] = lambda: True) -> Floats:
        return self.rows[: sum(map(len, batch))]


# a text's tokens


@pytest.mark.parametrize(
    ("n_max", "truncate", "wanted"),
    [
        (9, "none", ([0, 1, 5, 6, 7, 2], 0)),
        (6, "none", ([0, 1, 5, 6, 7, 2], 0)),
        (5, "none", None),
        (5, "end", ([0, 1, 5, 6, 2], 1)),
        (5, "start", ([0, 1, 6, 7, 2], 1)),
        (3, "end", ([0, 1, 2], 3)),
        (3, "start", ([0, 1, 2], 3)),
        (2, "end", None),
    ],
)
def test_only_the_text_is_cut(n_max: int, truncate: Any, wanted: Any) -> None:
    fitting = Framed([0, 1], [5, 6, 7], [2]).fit(n_max, truncate)
    assert (fitting and (fitting[0].tolist(), fitting[1])) == wanted


# vectors


@pytest.mark.parametrize(
    ("pooling", "wanted"),
    [("cls", [[1, 0], [0, 1]]), ("last", [[0, 1], [0, 1]]), ("mean", [[0.6, 0.8], [0, 1]])],
)
def test_rows_are_pooled_text_by_text(pooling: Any, wanted: Any) -> None:
    rows = floats([3, 0], [3, 4], [0, 4], [0, 9], [-1, -1])
    embedder = SimpleEmbedder(Rows(rows), EncoderSpec(kind="embedding", pooling=pooling))
    found = embedder.embed([ids(0, 5, 2), ids(0)], [{"dense"}, {"dense"}], lambda: True)
    assert [text.dense.tolist() for text in found if text.dense is not None] == [
        pytest.approx(vector) for vector in wanted
    ]


def test_a_vector_knows_how_long_its_pooled_row_was() -> None:
    embedder = SimpleEmbedder(Rows(floats([3, 4], [0, 9])), EncoderSpec(kind="embedding"))
    found = embedder.embed([ids(0), ids(0)], [{"dense"}, {"dense"}], lambda: True)
    assert [text.norm for text in found] == pytest.approx([5, 9])


def test_the_spec_decides_and_then_the_file_how_rows_are_pooled() -> None:
    encoder = Rows(floats([1, 0], [0, 1]))
    encoder.pooling = "last"
    for given, wanted in ((None, [0, 1]), ("cls", [1, 0])):
        embedder = new_embedder(encoder, EncoderSpec(kind="embedding", pooling=given))
        (text,) = embedder.embed([ids(0, 2)], [{"dense"}], lambda: True)
        assert text.dense is not None
        assert text.dense.tolist() == wanted


def test_bge_m3_takes_cls_whatever_its_file_says() -> None:
    encoder = Rows(floats([1, 0], [0, 1]))
    encoder.pooling = "mean"
    encoder.heads = Heads(floats(1, 1), 0.0, np.eye(2, dtype=np.float32), floats(0, 0))
    (text,) = new_embedder(encoder, SPEC).embed([ids(0, 2)], [{"dense"}], lambda: True)
    assert text.dense is not None
    assert text.dense.tolist() == [1, 0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_text_with_a_row_that_is_no_number_is_not_sound_and_its_neighbours_are(
    bad: float,
) -> None:
    rows = np.ones((6, 2), np.float32)
    rows[3] = bad
    embedder = SimpleEmbedder(Rows(rows), SPEC)
    found = embedder.embed([ids(0, 2)] * 3, [{"dense"}] * 3, lambda: True)
    assert [text.is_sound for text in found] == [True, False, True]


def test_a_vector_of_zeros_is_not_sound() -> None:
    embedder = SimpleEmbedder(Rows(np.zeros((2, 2), np.float32)), SPEC)
    (text,) = embedder.embed([ids(0, 2)], [{"dense"}], lambda: True)
    assert not text.is_sound


def test_vectors_of_no_length_stay_as_they_are() -> None:
    assert normalized(floats([3, 4], [0, 0])).tolist() == [pytest.approx([0.6, 0.8]), [0, 0]]


def test_weights_are_the_highest_of_each_token_without_special_ones_and_zeros() -> None:
    known, weights = lexical_weights(
        ids(0, 9, 5, 9, 7, 8, 3, 2), floats(9, 1, 0.5, 2, 0, -1, 4, 5), UNUSED
    )
    assert (known.tolist(), weights.tolist()) == ([5, 9], [0.5, 2])
    known, weights = lexical_weights(ids(0, 2), floats(1, 1), UNUSED)
    assert (len(known), len(weights)) == (0, 0)


def test_heads_give_each_text_what_it_asked_for() -> None:
    encoder = Rows(floats([1, 0], [2, 1], [0, -1], [0, 1], [5, 5], [0, 3]))
    encoder.heads = Heads(floats(1, 0), -1.0, floats([0, 2], [1, 0], [0, 0]), floats(0, 0, 1))
    embedder = new_embedder(encoder, SPEC)
    assert isinstance(embedder, BGEM3Embedder)
    assert embedder.n_colbert == 3
    batch, wanted = [ids(0, 9, 2), ids(0, 8, 2)], [{"colbert"}, {"sparse"}]
    first, second = embedder.embed(batch, wanted, lambda: True)
    assert first.dense is first.sparse is None
    assert first.colbert is not None
    assert first.colbert == pytest.approx(normalized(floats([2, 2, 1], [-2, 0, 1])))
    assert second.colbert is None
    assert second.sparse is not None
    assert (second.sparse[0].tolist(), second.sparse[1].tolist()) == ([8], [4])


# scores

QUERY = Embedded(
    dense=floats(1, 0), sparse=(ids(4, 7), floats(2, 1)), colbert=floats([1, 0], [0, 1])
)
DOCUMENT = Embedded(
    dense=floats(0.6, 0.8),
    sparse=(ids(5, 7, 9), floats(9, 0.5, 9)),
    colbert=floats([0.6, 0.8], [0.8, 0.6], [-1, 0]),
)


def test_scores_are_flagembeddings() -> None:
    score = EmbeddingReranker.score
    assert score(QUERY, DOCUMENT, "dense") == pytest.approx(0.6)
    assert score(QUERY, DOCUMENT, "sparse") == pytest.approx(0.5)
    assert score(QUERY, DOCUMENT, "colbert") == pytest.approx(0.8)
    assert score(QUERY, DOCUMENT, "hybrid") == pytest.approx((0.6 + 0.5 + 0.8) / 3)
    assert score(QUERY, DOCUMENT, "hybrid", (1, 0, 3)) == pytest.approx((0.6 + 2.4) / 4)


def test_a_similarity_does_not_pass_1_by_rounding() -> None:
    long = np.array([1.0000002, 0], np.float32)  # of length 1 but for rounding
    for sign, wanted in ((1, 1.0), (-1, -1.0)):
        query, document = Embedded(dense=long), Embedded(dense=sign * long)
        assert EmbeddingReranker.score(query, document, "dense") == wanted
        query, document = Embedded(colbert=long[None]), Embedded(colbert=sign * long[None])
        assert EmbeddingReranker.score(query, document, "colbert") == wanted


def test_nothing_in_common_is_a_score_of_zero() -> None:
    assert sparse_score((ids(4), floats(1)), (ids(5), floats(1))) == 0
    assert sparse_score((ids(), floats()), (ids(5), floats(1))) == 0
    assert max_sim(floats([1, 0]), np.empty((0, 2), np.float32)) == 0


def test_methods_are_those_whose_vectors_the_model_makes() -> None:
    encoder = FakeEncoder(Script())
    assert EmbeddingReranker(new_embedder(encoder, SPEC)).methods[0] == "hybrid"
    plain = FakeEncoder(Script(heads=False))
    assert EmbeddingReranker(new_embedder(plain, SPEC)).methods == ("dense",)
