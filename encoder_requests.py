"""One request in a worker that embeds or scores: which texts are computed for it, and what it is
answered of them."""

from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass
from typing import Any

from embedders import Embedded, Embedder, Framed, GoOn
from engine import wire
from engine.backends.base import Ids, Tokenizer
from engine.types import EQUAL_WEIGHTS, Method, Output, Truncate
from errors import BadRequest, ContextLengthExceeded, ServiceError
from lengths import check_colbert
from rerankers import BGEReranker, EmbeddingReranker, Reranker, is_blank
from worker_requests import naming

MAX_QUERY_NUMBERS = 1 << 27  # of ColBERT vectors of queries, kept until all is compared: 512 MB

Model = Embedder | BGEReranker
Item = wire.Vector | wire.Scored
Result = Embedded | float


@dataclass(slots=True)
class Text:
    """A sequence to compute."""

    ids: Ids
    n_cut: int
    n_cut_query: int = 0  # of a pair
    n_beside: int = 0  # further tokens that were found on the way to it


class Job(ABC):
    """One request. Its texts are numbered in the order in which they should be computed."""

    windows: list[int]  # how many texts come before any of the next window
    n_chars: int  # of all that is to be computed, about: a token counts as four
    outputs: frozenset[Output] = frozenset()

    def __init__(self, request: wire.Embed | wire.Score, n_texts: int, tier: str) -> None:
        self.id = request.job
        self.texts: list[Text] = []
        self.n_texts = n_texts
        self.n_left = n_texts  # that are not computed
        self.copies: dict[int, list[int]] = {}  # texts with the same ids as one before them
        self._tier = tier

    @abstractmethod
    def tokenize(self, index: int) -> Text:
        """Raises a ServiceError that is the answer to the whole request."""

    @abstractmethod
    def take(self, index: int, result: Result | ServiceError, go_on: GoOn) -> list[Item]:
        """What can be said now that a text is computed. Raises Interrupted where it is not to go
        on, which is asked where that takes long."""

    @abstractmethod
    def message(self, items: list[Any]) -> wire.Message: ...

    def _fit(
        self,
        framed: Framed,
        n_ctx: int,
        truncate: Truncate,
        what: str,
        at: int,
        *,
        can_be_cut: bool = True,
    ) -> Text:
        """The text as long as it may be; `what` is the field of the request that has it `at`."""
        fitting = framed.fit(n_ctx, truncate)
        if fitting is None:
            tier = self._tier.upper()
            advice = "Shorten it"
            if can_be_cut and truncate == "none":
                advice += ", or send `truncate` to have it cut"
                if what == "input":
                    advice += f" (or set {tier}_TRUNCATE=end for all requests)"
            raise ContextLengthExceeded(
                f"{_named(what, at)} is too long: this model's maximum context length is {n_ctx} "
                f"tokens, it has {len(framed)} ({tier}_N_CTX). {advice}.",
                param=what,
                n_prompt_tokens=len(framed),
                n_ctx=n_ctx,
                index=at,
            )
        if not len(fitting[0]):
            raise BadRequest(f"{_named(what, at)} is empty.", param=what, index=at)
        return Text(*fitting)


class EmbedJob(Job):
    def __init__(self, request: wire.Embed, embedder: Embedder, tier: str) -> None:
        super().__init__(request, len(request.inputs), tier)
        self.windows = [self.n_texts]
        self.n_chars = sum(len(t) if isinstance(t, str) else 4 * len(t) for t in request.inputs)
        self._request = request
        self._embedder = embedder
        for output in request.outputs:
            if output not in embedder.outputs:
                raise BadRequest(embedder.missing(output), param=f"return_{output}")
        self.outputs = frozenset(request.outputs)
        self._n_numbers = 0  # of ColBERT vectors

    def tokenize(self, index: int) -> Text:
        given = self._request.inputs[index]
        _check_input(given, self._embedder.encoder.tokenizer, "input", index)
        with naming("input", index=index):
            framed = self._embedder.frame(given, self._request.role)
        n_ctx = self._embedder.encoder.n_ctx
        text = self._fit(framed, n_ctx, self._request.truncate, "input", index)
        if "colbert" in self.outputs:
            self._n_numbers += len(text.ids) * self._embedder.n_colbert
        check_colbert(self._n_numbers, self._request.max_colbert)
        return text

    def take(self, index: int, result: Result | ServiceError, go_on: GoOn) -> list[Item]:
        text = self.texts[index]
        n_tokens = len(text.ids)
        if isinstance(result, ServiceError):
            return [wire.Vector(index, n_tokens, text.n_cut, fault=_fault(result))]
        assert isinstance(result, Embedded)
        tokens = text.ids.tolist() if self._request.return_tokens else None
        literal = self._embedder.encoder.tokenizer.literal
        return [
            wire.Vector(
                index,
                n_tokens,
                text.n_cut,
                None if result.dense is None else _bytes(result.dense, "<f4"),
                None if result.sparse is None else _bytes(result.sparse[0], "<i4"),
                None if result.sparse is None else _bytes(result.sparse[1], "<f4"),
                None if result.colbert is None else _bytes(result.colbert, "<f4"),
                tokens,
                None if tokens is None else [literal(token) for token in tokens],
                norm=None if result.dense is None else result.norm,
            )
        ]

    def message(self, items: list[Any]) -> wire.Message:
        return wire.Vectors(self.id, items)


class ScoreJob(Job):
    """What the two ways of scoring have in common."""

    def __init__(self, request: wire.Score, reranker: Reranker, n_texts: int, tier: str) -> None:
        super().__init__(request, n_texts, tier)
        method = request.method or reranker.methods[0]
        if method not in reranker.methods:
            raise BadRequest(
                f"The model of tier '{tier}' scores by {', '.join(reranker.methods)}, and not by "
                f"{method}.", param="method",
            )  # fmt: skip
        weights = request.weights
        if weights is not None and method != "hybrid":
            raise BadRequest(
                f"Weights are for the method 'hybrid', and this one is '{method}'.", param="weights"
            )
        self._weights = weights or EQUAL_WEIGHTS
        self._request = request
        self._reranker = reranker
        self._method: Method = method

    def message(self, items: list[Any]) -> wire.Message:
        return wire.Scores(self.id, items, self._method, self._reranker.scale())


class PairJob(ScoreJob):
    """A cross-encoder reads each pair."""

    def __init__(self, request: wire.Score, reranker: BGEReranker, tier: str) -> None:
        super().__init__(request, reranker, len(request.pairs), tier)
        self.windows = [self.n_texts]
        queries, documents = request.queries, request.documents
        self.n_chars = sum(len(queries[q]) + len(documents[d]) for q, d in request.pairs)
        self._cross_encoder = reranker
        self._query: int | None = None  # whose ids these are
        self._query_ids: list[int] = []

    def tokenize(self, index: int) -> Text:
        request = self._request
        query, document = request.pairs[index]
        is_new = query != self._query
        if is_new:
            with naming("query", index=query):
                self._query_ids = self._cross_encoder.tokenize(request.queries[query])
            self._query = query
        with naming("documents", index=document):
            framed, n_cut, n_cut_query = self._cross_encoder.frame(
                request.queries[query],
                request.documents[document],
                query_ids=self._query_ids,
                max_tokens=request.max_tokens,
                may_cut=request.truncate != "none",
            )
        n_ctx = self._cross_encoder.encoder.n_ctx
        what, at, can_be_cut = "documents", document, True
        if len(framed) - len(framed.body) > n_ctx:  # without any of it
            what, at = "query", query
            can_be_cut = self._cross_encoder.encoder.template is None
        text = self._fit(framed, n_ctx, request.truncate, what, at, can_be_cut=can_be_cut)
        text.n_cut += n_cut
        text.n_cut_query = n_cut_query
        text.n_beside = n_cut_query if is_new else 0
        return text

    def take(self, index: int, result: Result | ServiceError, go_on: GoOn) -> list[Item]:
        text = self.texts[index]
        score, fault = (0.0, _fault(result)) if isinstance(result, ServiceError) else (result, None)
        assert isinstance(score, float)
        return [wire.Scored(index, len(text.ids), text.n_cut, score, fault, text.n_cut_query)]


class SimilarityJob(ScoreJob):
    """The vectors of queries and documents are compared: first come the queries', which are kept,
    so that those of documents need not be."""

    def __init__(self, request: wire.Score, reranker: EmbeddingReranker, tier: str) -> None:
        self._query_at = sorted({query for query, _ in request.pairs})
        self._document_at = sorted({document for _, document in request.pairs})
        self.windows = [len(self._query_at), len(self._document_at)]
        super().__init__(request, reranker, sum(self.windows), tier)
        self.n_chars = sum(len(request.queries[at]) for at in self._query_at)
        self.n_chars += sum(len(request.documents[at]) for at in self._document_at)
        self.outputs = reranker.outputs(self._method)
        self._embedder = reranker.embedder
        self._queries: dict[int, tuple[Text, Embedded | ServiceError]] = {}
        self._n_numbers = 0  # of ColBERT vectors of queries
        self._n_open = Counter(query for query, _ in request.pairs)  # pairs, by query
        self._pairs: dict[int, list[tuple[int, int]]] = {}  # by document: query, index
        for index, (query, document) in enumerate(request.pairs):
            self._pairs.setdefault(document, []).append((query, index))

    def tokenize(self, index: int) -> Text:
        request, embedder = self._request, self._embedder
        n_ctx = embedder.encoder.n_ctx
        if index < len(self._query_at):
            at = self._query_at[index]
            with naming("query", index=at):
                framed = embedder.frame(request.queries[at], "query")
            text = self._fit(framed, n_ctx, request.truncate, "query", at)
            if "colbert" in self.outputs:
                self._n_numbers += len(text.ids) * embedder.n_colbert
            if self._n_numbers > MAX_QUERY_NUMBERS:
                raise BadRequest(
                    f"The ColBERT vectors of these queries have more than {MAX_QUERY_NUMBERS:,} "
                    "numbers, the most that are compared at once. Send fewer or shorter ones, or "
                    "the method 'dense'.", param="query", index=at,
                )  # fmt: skip
            return text
        at = self._document_at[index - len(self._query_at)]
        with naming("documents", index=at):
            framed = embedder.frame(request.documents[at], "passage")
        if not len(framed):  # an empty one, of a model that puts no tokens around texts
            framed = embedder.frame(" ", "passage")
        n_cut = 0
        if request.max_tokens is not None and len(framed.body) > request.max_tokens:
            n_cut = len(framed.body) - request.max_tokens
            del framed.body[request.max_tokens :]
        text = self._fit(framed, n_ctx, request.truncate, "documents", at)
        text.n_cut += n_cut
        return text

    def take(self, index: int, result: Result | ServiceError, go_on: GoOn) -> list[Item]:
        assert not isinstance(result, float)
        text = self.texts[index]
        if index < len(self._query_at):
            self._queries[self._query_at[index]] = text, result
            return []
        items: list[Item] = []
        document = self._document_at[index - len(self._query_at)]
        says_nothing = is_blank(self._request.documents[document])
        for query, pair in self._pairs[document]:
            of_query, ours = self._queries[query]
            fault = next((r for r in (ours, result) if isinstance(r, ServiceError)), None)
            score = 0.0
            if isinstance(ours, Embedded) and isinstance(result, Embedded) and not says_nothing:
                score = EmbeddingReranker.score(ours, result, self._method, self._weights, go_on)
            self._n_open[query] -= 1
            if not self._n_open[query]:
                del self._queries[query]
            told = _fault(fault) if fault else None
            n_query, n_document = len(of_query.ids), len(text.ids)
            numbers = of_query.n_cut, n_query, n_document
            items.append(wire.Scored(pair, n_query + n_document, text.n_cut, score, told, *numbers))
        return items


def new_job(request: wire.Embed | wire.Score, model: Model, tier: str) -> Job:
    """Raises BadRequest where the model does not do that."""
    if isinstance(model, Embedder):
        if isinstance(request, wire.Embed):
            return EmbedJob(request, model, tier)
        return SimilarityJob(request, EmbeddingReranker(model), tier)
    if isinstance(request, wire.Embed):
        raise BadRequest(f"Tier '{tier}' scores and does not embed.", param="model")
    return PairJob(request, model, tier)


def _check_input(text: str | list[int], tokenizer: Tokenizer, what: str, at: int) -> None:
    if not text:
        raise BadRequest(f"{_named(what, at)} is empty.", param=what, index=at)
    if not isinstance(text, str) and any(not 0 <= i < tokenizer.n_vocab for i in text):
        raise BadRequest(
            f"{_named(what, at)} has token ids that the model does not know; they go from 0 to "
            f"{tokenizer.n_vocab - 1}.", param=what, index=at,
        )  # fmt: skip


def _named(what: str, at: int) -> str:
    return what if what == "query" and at == 0 else f"{what}[{at}]"


def _fault(error: ServiceError) -> wire.Fault:
    return wire.Fault(error.code, error.message)


def _bytes(array: Any, dtype: str) -> bytes:
    data: bytes = array.astype(dtype, copy=False).tobytes()
    return data
