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
from engine.backends.base import Encoder, Floats, Ids, Interrupted
from engine.types import EQUAL_WEIGHTS, Method, Output, Scale
from errors import ModelLoadFailed

QUERY_SHARE = 3, 4  # of all tokens, which a query does not pass: FlagEmbedding's
PRODUCTS_AT_ONCE = 1 << 24  # of ColBERT rows: some 0.3 s, and 64 MB
# Of each language queries with their answers, which are no answers to the others. A trained head
# tells them apart in some language; one that got lost on the way in none, or only by chance.
PROOF = (
    (
        ("what is the capital of France?", "Paris is the capital of France."),
        ("how tall is Mount Everest?", "Mount Everest is 8,849 metres tall."),
        ("How do I sort a list in Python?", "To sort a list in Python, call sorted()."),
    ),
    (
        ("中国的首都是哪里？", "中国的首都是北京。"),
        ("珠穆朗玛峰有多高？", "珠穆朗玛峰高8849米。"),
        ("怎样做番茄炒蛋？", "做番茄炒蛋要先炒鸡蛋，再放番茄。"),
    ),
)
PROOF_MARGIN = 0.05  # of logits or probabilities; trained ones lie further apart


class Reranker(ABC):
    methods: tuple[Method, ...]  # the first is its own

    def scale(self) -> Scale:
        return "similarity"


class BGEReranker(Reranker):
    """A cross-encoder: bge-reranker, other XLM-R and BERT ones, and Qwen3-Reranker by its
    template."""

    methods: tuple[Method, ...] = ("cross-encoder",)

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    def scale(self) -> Scale:
        assert self.encoder.scale is not None
        return self.encoder.scale

    def score(self, batch: Sequence[Ids], go_on: GoOn = lambda: True) -> list[float]:
        return [float(score) for score in self.encoder.encode(batch, go_on)]

    def tokenize(self, text: str) -> list[int]:
        return self.encoder.tokenizer.tokenize(text, parse_special=False, continues=False)

    def frame(
        self,
        query: str,
        document: str,
        *,
        query_ids: Sequence[int] | None = None,
        max_tokens: int | None = None,
        may_cut: bool = True,
    ) -> tuple[Framed, int, int]:
        """A pair as its model was trained on it, and how many tokens of it are already cut: of the
        document those beyond `max_tokens`, of the query those beyond its share. A query that comes
        with many documents may be tokenised before."""
        if self.encoder.template is not None:
            return self._prompt(self.encoder.template, query, document, max_tokens)
        specials, n_ctx = self.encoder.specials, self.encoder.n_ctx
        query_ids = self.tokenize(query) if query_ids is None else query_ids
        ids = self.tokenize(document)
        n_query = n_ctx * QUERY_SHARE[0] // QUERY_SHARE[1] if may_cut else len(query_ids)
        n_document = len(ids) if max_tokens is None else max_tokens
        begin = [] if specials.begin is None else [specials.begin]
        end = [] if specials.end is None else [specials.end]
        head = [*begin, *query_ids[:n_query], *specials.between]
        framed = Framed(head, ids[:n_document], end)
        return framed, max(len(ids) - n_document, 0), max(len(query_ids) - n_query, 0)

    def _prompt(
        self, template: str, query: str, document: str, max_tokens: int | None
    ) -> tuple[Framed, int, int]:
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
                return Framed(whole, [], []), 0, 0
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
        return Framed(head, pieces[at], tail), max(len(ids) - n_document, 0), 0

    def prove(self) -> None:
        """Raises ModelLoadFailed where the model scores nonsense as high as an answer."""
        is_refuted = False
        for pairs in PROOF:
            verdict = self._tells_apart(pairs)
            if verdict:
                return
            is_refuted |= verdict is False
        if is_refuted:
            raise ModelLoadFailed(
                "The model scores an answer no higher than nonsense: its file seems to lack the "
                "head that was trained for that; take another conversion of the model."
            )

    def _tells_apart(self, pairs: Sequence[tuple[str, str]]) -> bool | None:
        """Each answer scores higher than any other pair with its query or with its text. None where
        the pairs are too long for the model: cut ones would prove nothing."""
        fits = []
        for query, _ in pairs:
            for _, answer in pairs:
                framed, *n_cut = self.frame(query, answer)
                fit = framed.fit(self.encoder.n_ctx, "none")
                if any(n_cut) or fit is None:
                    return None
                fits.append(fit[0])
        scores = np.array([self.score([ids])[0] for ids in fits], float).reshape(len(pairs), -1)
        if not np.isfinite(scores).all():
            return False
        answers = scores.diagonal().copy()
        np.fill_diagonal(scores, -math.inf)
        others = np.maximum(scores.max(axis=0), scores.max(axis=1))
        return bool((answers >= others + PROOF_MARGIN).all())


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
        go_on: GoOn = lambda: True,
    ) -> float:
        """Raises Interrupted where it is not to go on."""
        if method == "dense":
            return _dot(query.dense, document.dense)
        if method == "sparse":
            return sparse_score(query.sparse, document.sparse)
        if method == "colbert":
            return max_sim(query.colbert, document.colbert, go_on)
        scores = (
            _dot(query.dense, document.dense),
            sparse_score(query.sparse, document.sparse),
            max_sim(query.colbert, document.colbert, go_on),
        )
        return math.fsum(map(operator.mul, weights, scores)) / math.fsum(weights)


def is_blank(document: str) -> bool:
    """It says nothing. Its vectors are near many others' all the same, often nearer than what says
    something else; so compared it scores 0."""
    return not document.strip()


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


def max_sim(query: Floats | None, document: Floats | None, go_on: GoOn = lambda: True) -> float:
    """For each row of the query the most similar one of the document; the mean of that. Raises
    Interrupted where it is not to go on, which is asked before each slice of the query."""
    assert query is not None
    assert document is not None
    if not len(query) or not len(document):
        return 0.0
    highest = np.empty(len(query), query.dtype)
    n_rows = max(PRODUCTS_AT_ONCE // len(document), 1)
    for start in range(0, len(query), n_rows):
        if not go_on():
            raise Interrupted
        rows = slice(start, start + n_rows)
        highest[rows] = (query[rows] @ document.T).max(axis=1)
    return _similarity(float(highest.mean()))
