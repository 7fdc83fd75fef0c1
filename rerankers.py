"""Scores of a query and a document. It runs in the worker.

A cross-encoder reads both together; an embedding model has vectors of each, which are compared.
"""

import math
import operator
import re
from abc import ABC
from collections.abc import Sequence
from itertools import chain

import numpy as np

from embedders import Embedded, Embedder, Framed, GoOn
from engine.backends.base import Encoder, Floats, Ids
from engine.types import Method, Output, Scale
from errors import ModelLoadFailed

QUERY_SHARE = 3, 4  # of all tokens, which a query does not pass: FlagEmbedding's
EQUAL_WEIGHTS = 1.0, 1.0, 1.0  # of dense, sparse and ColBERT
# Query, answer, nonsense. A trained head tells them apart in some language; one that got lost on
# the way in none, or it scores all alike.
PROOF = (
    (
        "what is the capital of France?",
        "Paris is the capital of France.",
        "Photosynthesis turns light into sugar.",
    ),
    (
        "how tall is Mount Everest?",
        "Mount Everest is 8,849 metres high.",
        "My cat sleeps all day.",
    ),
    (
        "How do I sort a list in Python?",
        "Call sorted(), or the list's own sort().",
        "The recipe needs two eggs.",
    ),
    ("中国的首都是哪里？", "北京是中国的首都。", "今天的晚饭很好吃。"),
)


class Reranker(ABC):
    methods: tuple[Method, ...]  # the first is its own

    def scale(self, method: Method) -> Scale:
        return "similarity"


class BGEReranker(Reranker):
    """A cross-encoder: bge-reranker, other XLM-R and BERT ones, and Qwen3-Reranker by its
    template."""

    methods: tuple[Method, ...] = ("cross-encoder",)

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    def scale(self, method: Method) -> Scale:
        assert self.encoder.scale is not None
        return self.encoder.scale

    def score(self, batch: Sequence[Ids], go_on: GoOn = lambda: True) -> list[float]:
        return [float(score) for score in self.encoder.encode(batch, go_on)]

    def tokenize(self, text: str) -> list[int]:
        return self.encoder.tokenizer.tokenize(text, parse_special=False, continues=False)

    def frame(
        self, query: str, document: str, *, max_tokens: int | None = None, may_cut: bool = True
    ) -> tuple[Framed, int]:
        """A pair as its model was trained on it, and how many tokens of it are already cut: of the
        document what is beyond `max_tokens`, of the query what is beyond its share."""
        if self.encoder.template is not None:
            return self._prompt(self.encoder.template, query, document, max_tokens)
        specials, n_ctx = self.encoder.specials, self.encoder.n_ctx
        query_ids, ids = self.tokenize(query), self.tokenize(document)
        n_query = n_ctx * QUERY_SHARE[0] // QUERY_SHARE[1] if may_cut else len(query_ids)
        n_document = len(ids) if max_tokens is None else max_tokens
        n_cut = max(len(query_ids) - n_query, 0) + max(len(ids) - n_document, 0)
        begin = [] if specials.begin is None else [specials.begin]
        end = [] if specials.end is None else [specials.end]
        head = [*begin, *query_ids[:n_query], *specials.between]
        return Framed(head, ids[:n_document], end), n_cut

    def _prompt(
        self, template: str, query: str, document: str, max_tokens: int | None
    ) -> tuple[Framed, int]:
        """A pair in a template. As one text where that is harmless: merges cross the borders."""
        tokenizer = self.encoder.tokenizer
        given = {"{query}": query, "{document}": document}
        parts = re.split(r"(\{query\}|\{document\})", template)
        ids = self.tokenize(document)
        n_document = len(ids) if max_tokens is None else max_tokens
        bos = [] if tokenizer.bos is None else [tokenizer.bos]
        if n_document >= len(ids) and all(
            self.tokenize(text) == tokenizer.tokenize(text, parse_special=True, continues=False)
            for text in given.values()
        ):
            text = "".join(given.get(part, part) for part in parts)
            whole = bos + tokenizer.tokenize(text, parse_special=True, continues=False)
            if len(whole) <= self.encoder.n_ctx:
                return Framed(whole, [], []), 0
        pieces = [
            ids[:n_document]
            if part == "{document}"
            else tokenizer.tokenize(
                given.get(part, part), parse_special=part not in given, continues=n > 0
            )
            for n, part in enumerate(parts)
        ]
        at = parts.index("{document}")
        head, tail = [*bos, *chain(*pieces[:at])], [*chain(*pieces[at + 1 :])]
        return Framed(head, pieces[at], tail), max(len(ids) - n_document, 0)

    def prove(self) -> None:
        """Raises ModelLoadFailed where the model scores nonsense as high as an answer."""
        verdicts = []
        for query, good, bad in PROOF:
            framed = [self.frame(query, document) for document in (good, bad)]
            whole = [pair.fit(self.encoder.n_ctx, "none") for pair, n_cut in framed if not n_cut]
            scores = [self.score([fit[0]])[0] for fit in whole if fit is not None]
            if len(scores) == 2:  # cut ones would prove nothing
                verdicts.append(math.isfinite(sum(scores)) and scores[0] > scores[1])
        if verdicts and not any(verdicts):
            raise ModelLoadFailed(
                "The model scores an answer no higher than nonsense: its file seems to lack the "
                "head that was trained for that; take another conversion of the model."
            )


class EmbeddingReranker(Reranker):
    """Compares the vectors of an embedding model, as FlagEmbedding's compute_score does."""

    def __init__(self, embedder: Embedder) -> None:
        self.embedder = embedder
        kinds: tuple[Output, ...] = ("dense", "sparse", "colbert")
        own: tuple[Method, ...] = tuple(kind for kind in kinds if kind in embedder.outputs)
        self.methods = ("hybrid", *own) if len(own) == len(kinds) else own

    @staticmethod
    def outputs(method: Method) -> frozenset[Output]:
        """The vectors that a method compares."""
        if method == "hybrid":
            return frozenset({"dense", "sparse", "colbert"})
        assert method != "cross-encoder"
        return frozenset({method})

    @staticmethod
    def score(
        query: Embedded,
        document: Embedded,
        method: Method,
        weights: tuple[float, float, float] = EQUAL_WEIGHTS,
    ) -> float:
        if method == "dense":
            return _dot(query.dense, document.dense)
        if method == "sparse":
            return sparse_score(query.sparse, document.sparse)
        if method == "colbert":
            return max_sim(query.colbert, document.colbert)
        scores = (
            _dot(query.dense, document.dense),
            sparse_score(query.sparse, document.sparse),
            max_sim(query.colbert, document.colbert),
        )
        return math.fsum(map(operator.mul, weights, scores)) / math.fsum(weights)


def _dot(query: Floats | None, document: Floats | None) -> float:
    assert query is not None
    assert document is not None
    return _similarity(float(query @ document))


def _similarity(score: float) -> float:
    """Of vectors of length 1, without what rounding has added."""
    return max(-1.0, min(score, 1.0))


def sparse_score(query: tuple[Ids, Floats] | None, document: tuple[Ids, Floats] | None) -> float:
    """The sum of products of the weights that both have."""
    assert query is not None
    assert document is not None
    _, ours, theirs = np.intersect1d(query[0], document[0], assume_unique=True, return_indices=True)
    return float(query[1][ours] @ document[1][theirs])


def max_sim(query: Floats | None, document: Floats | None) -> float:
    """For each row of the query the most similar one of the document; the mean of that."""
    assert query is not None
    assert document is not None
    if not len(query) or not len(document):
        return 0.0
    return _similarity(float((query @ document.T).max(axis=1).mean()))
