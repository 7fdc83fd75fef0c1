"""Vectors of texts, made from the rows of an encoder. It runs in the worker.

An embedder says as data which vectors it makes (`outputs`), frames texts as its model wants them,
and turns a batch of them into vectors. A further one is one class, named in `new_embedder`.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.backends.base import Encoder, Floats, Ids
from engine.heads import Heads
from engine.types import Output, Pooling, Role, Truncate
from engine.wire import EncoderSpec

logger = logging.getLogger("worker.embedders")

EPSILON = 1e-12  # of torch's normalize, which the reference uses
NORM_TOLERANCE = 1e-3  # float32 leaves a tenth of it at the most

GoOn = Callable[[], bool]


@dataclass(slots=True)
class Embedded:
    """The vectors of one text, those that were asked for."""

    is_sound: bool = True  # finite, not zero, of the length that they should have
    dense: Floats | None = None  # [n_embd], of length 1
    sparse: tuple[Ids, Floats] | None = None  # ascending token ids, and their weights over 0
    colbert: Floats | None = None  # [n_tokens - 1, D], rows of length 1; without that of CLS
    norm: float = 1.0  # length of the dense one as it was pooled


@dataclass(frozen=True, slots=True)
class Framed:
    """A text's tokens, between those that are never cut."""

    head: list[int]
    body: list[int]
    tail: list[int]

    def __len__(self) -> int:
        return len(self.head) + len(self.body) + len(self.tail)

    def fit(self, n_max: int, truncate: Truncate) -> tuple[Ids, int] | None:
        """At most `n_max` tokens, and how many are cut; None where that is not wanted."""
        n_cut = max(len(self) - n_max, 0)
        n_body = len(self.body) - n_cut
        if n_cut and (truncate == "none" or n_body < 0):
            return None
        body = self.body[n_cut:] if truncate == "start" else self.body[:n_body]
        return np.array(self.head + body + self.tail, np.int32), n_cut


class Embedder(ABC):
    outputs: frozenset[Output]
    n_colbert = 0  # length of a ColBERT row

    def __init__(self, encoder: Encoder, spec: EncoderSpec) -> None:
        self.encoder = encoder
        self._spec = spec

    @abstractmethod
    def embed(
        self, batch: Sequence[Ids], wanted: Sequence[Collection[Output]], go_on: GoOn
    ) -> list[Embedded]:
        """Compute a batch that the encoder takes; of each text what is wanted of it."""

    def missing(self, output: Output) -> str:
        """Why it does not make these vectors."""
        files = " and ".join(self.encoder.missing_heads)
        beside = f": there is no {files} beside its file" if files else ""
        return f"The model makes no {output} vectors{beside}."

    def frame(self, text: str | list[int], role: Role) -> Framed:
        """A text, or token ids, with the prefix of its role and the model's own tokens around it.
        Ids that already begin or end with these do not get them twice."""
        specials, tokenizer = self.encoder.specials, self.encoder.tokenizer
        prefix = ""
        if role != "none":
            prefix = self._spec.query_prefix if role == "query" else self._spec.passage_prefix
        head = tokenizer.tokenize(prefix, parse_special=False, continues=False) if prefix else []
        if isinstance(text, str):
            body = tokenizer.tokenize(prefix + text, parse_special=False, continues=False)
            n_head = 0
            while n_head < min(len(head), len(body)) and head[n_head] == body[n_head]:
                n_head += 1
            head, body = body[:n_head], body[n_head:]
        else:
            body = text[text[:1] == [specials.begin] : len(text) - (text[-1:] == [specials.end])]
        begin = [] if specials.begin is None else [specials.begin]
        end = [] if specials.end is None else [specials.end]
        return Framed(begin + head, body, end)


class SimpleEmbedder(Embedder):
    """One vector a text: a row of its tokens, or the mean of all."""

    outputs: frozenset[Output] = frozenset({"dense"})

    def __init__(self, encoder: Encoder, spec: EncoderSpec) -> None:
        super().__init__(encoder, spec)
        self._pooling = spec.pooling or self._own_pooling()

    def _own_pooling(self) -> Pooling:
        if self.encoder.pooling is None:
            logger.warning(
                "The model does not say how its rows become a vector; '%s' is taken. POOLING of "
                "its tier can be cls, mean or last.", self.encoder.default_pooling
            )  # fmt: skip
        return self.encoder.pooling or self.encoder.default_pooling

    def embed(
        self, batch: Sequence[Ids], wanted: Sequence[Collection[Output]], go_on: GoOn
    ) -> list[Embedded]:
        return self._vectors(Rows(self.encoder.encode(batch, go_on), batch), wanted)

    def _vectors(self, rows: "Rows", wanted: Sequence[Collection[Output]]) -> list[Embedded]:
        pooled = rows.pooled(self._pooling)
        norms = _norms(pooled)
        dense = _scaled(pooled, norms)
        is_sound = rows.are_finite & (abs(np.linalg.norm(dense, axis=1) - 1) <= NORM_TOLERANCE)
        return [
            Embedded(bool(is_right), vector if "dense" in kinds else None, norm=float(norm))
            for kinds, vector, norm, is_right in zip(wanted, dense, norms, is_sound, strict=True)
        ]


class BGEM3Embedder(SimpleEmbedder):
    """Dense, sparse and ColBERT vectors from one pass, by the two heads of BGE-M3."""

    outputs: frozenset[Output] = frozenset({"dense", "sparse", "colbert"})

    def __init__(self, encoder: Encoder, spec: EncoderSpec, heads: Heads) -> None:
        super().__init__(encoder, spec)
        self._heads = heads
        self.n_colbert = len(heads.colbert_bias)
        self._unused = np.array(sorted(encoder.specials.unused), np.int32)

    def _own_pooling(self) -> Pooling:
        return "cls"  # with which the heads were trained

    def _vectors(self, rows: "Rows", wanted: Sequence[Collection[Output]]) -> list[Embedded]:
        embedded = super()._vectors(rows, wanted)
        heads = self._heads
        if texts := [i for i, kinds in enumerate(wanted) if "sparse" in kinds]:
            weights = rows.of(texts) @ heads.sparse_weight + heads.sparse_bias
            for i, of_text in zip(texts, rows.split(weights, texts), strict=True):
                embedded[i].sparse = lexical_weights(rows.batch[i], of_text, self._unused)
        if texts := [i for i, kinds in enumerate(wanted) if "colbert" in kinds]:
            vectors = rows.of(texts) @ heads.colbert_weight.T + heads.colbert_bias
            n_left_out = 0 if self.encoder.specials.begin is None else 1  # the one of CLS
            for i, of_text in zip(texts, rows.split(normalized(vectors), texts), strict=True):
                embedded[i].colbert = of_text[n_left_out:]
        return embedded


class Rows:
    """The rows of a batch's tokens, text after text."""

    def __init__(self, values: Floats, batch: Sequence[Ids]) -> None:
        self.batch = batch
        self._values = values
        self._lengths = np.array([len(ids) for ids in batch])
        self._ends = np.cumsum(self._lengths)
        self._starts = self._ends - self._lengths

    @property
    def are_finite(self) -> NDArray[np.bool_]:
        """For each text. What is no number makes a sum that is none."""
        sums = np.add.reduceat(self._values.sum(axis=1), self._starts)
        are_finite: NDArray[np.bool_] = np.isfinite(sums)
        return are_finite

    def pooled(self, pooling: Pooling) -> Floats:
        """One row for each text."""
        pooled: Floats
        if pooling == "cls":
            pooled = self._values[self._starts]
        elif pooling == "last":
            pooled = self._values[self._ends - 1]
        else:
            pooled = np.add.reduceat(self._values, self._starts, axis=0)
            pooled /= self._lengths[:, None].astype(np.float32)
        return pooled

    def of(self, texts: Sequence[int]) -> Floats:
        """The rows of some texts, without a copy where they are all."""
        if len(texts) == len(self.batch):
            return self._values
        return np.concatenate([self._values[self._starts[i] : self._ends[i]] for i in texts])

    def split(self, values: Floats, texts: Sequence[int]) -> list[Floats]:
        """What was made of the rows of some texts, text by text."""
        return np.split(values, np.cumsum(self._lengths[texts])[:-1])


def new_embedder(encoder: Encoder, spec: EncoderSpec) -> Embedder:
    """The embedder that fits what is loaded."""
    if encoder.heads is not None:
        return BGEM3Embedder(encoder, spec, encoder.heads)
    return SimpleEmbedder(encoder, spec)


def normalized(vectors: Floats) -> Floats:
    """Each of length 1; those of length 0 as they are."""
    return _scaled(vectors, _norms(vectors))


def _scaled(vectors: Floats, norms: NDArray[Any]) -> Floats:
    scaled: Floats = vectors / np.maximum(norms, EPSILON)[:, None]
    return scaled


def _norms(vectors: Floats) -> NDArray[Any]:
    norms: NDArray[Any] = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))
    return norms


def lexical_weights(ids: Ids, weights: Floats, unused: Ids) -> tuple[Ids, Floats]:
    """The highest weight of each token, where it is over 0 and the token counts; ids ascend."""
    counts = (weights > 0) & ~np.isin(ids, unused)
    ids, weights = ids[counts], weights[counts]
    order = np.argsort(ids, kind="stable")
    known, starts = np.unique(ids[order], return_index=True)
    if not len(known):
        return known, weights
    return known, np.maximum.reduceat(weights[order], starts)
