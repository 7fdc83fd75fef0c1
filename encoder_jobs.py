"""The requests in a worker that embeds or scores: tokenised, put into batches, answered.

Texts are tokenised between batches, a few of each request in turn, and a request is computed when
all of it is tokenised: a fault in it is found before any work, and nobody waits for a long one.
"""

import logging
import math
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from embedders import Embedded, Embedder, Framed, GoOn
from engine import wire
from engine.backends.base import Ids, Interrupted, Tokenizer
from engine.batcher import Batcher
from engine.types import Method, Output, Truncate
from errors import BadRequest, ContextLengthExceeded, InternalError, ServiceError
from lengths import check_colbert
from rerankers import EQUAL_WEIGHTS, BGEReranker, EmbeddingReranker, Reranker, is_blank
from worker_requests import failure, naming

logger = logging.getLogger("worker.encoder_jobs")

TOKENS_AT_ONCE = 8192  # tokenised between two batches: some 25 ms
WORTH_GIVING_UP = 128  # tokens of a batch
REPEATED = 0.25  # of the time of batches may go into those that were given up
MAX_REPEATED_S = 2.0  # saved up
MAX_QUERY_NUMBERS = 1 << 27  # of ColBERT vectors of queries, kept until all is compared: 512 MB
MAX_FAILURES = 8  # batches in a row; then the encoder is taken to be broken

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

    def _fit(self, framed: Framed, n_ctx: int, truncate: Truncate, what: str, at: int) -> Text:
        """The text as long as it may be; `what` is the field of the request that has it `at`."""
        fitting = framed.fit(n_ctx, truncate)
        if fitting is None:
            always = f" ({self._tier.upper()}_TRUNCATE: always)" if what == "input" else ""
            raise ContextLengthExceeded(
                f"{_named(what, at)} has {len(framed):,} tokens; tier '{self._tier}' takes "
                f"{n_ctx:,} ({self._tier.upper()}_N_CTX). Shorten it, or send `truncate` to have "
                f"it cut{always}.",
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
        if weights is not None and (sum(weights) <= 0 or min(weights) < 0):
            raise BadRequest("Weights are not negative, and not all zero.", param="weights")
        if weights is not None and method != "hybrid":
            raise BadRequest(
                f"Weights are for the method 'hybrid', and this one is '{method}'.", param="weights"
            )
        self._weights = weights or EQUAL_WEIGHTS
        self._request = request
        self._reranker = reranker
        self._method: Method = method

    def message(self, items: list[Any]) -> wire.Message:
        return wire.Scores(self.id, items, self._method, self._reranker.scale(self._method))


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
        what, at = "documents", document
        if len(framed) - len(framed.body) > n_ctx:  # without any of it
            what, at = "query", query
        text = self._fit(framed, n_ctx, request.truncate, what, at)
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


class EncoderJobs:
    """The requests in the worker. `advance` does the next piece of work."""

    def __init__(self, model: Model, *, tier: str, batch_tokens: int) -> None:
        self._model = model
        self._tier = tier
        encoder = model.encoder
        self._batcher = Batcher(
            n_tokens=min(batch_tokens, encoder.n_tokens), n_sequences=encoder.n_sequences
        )
        self._jobs: dict[int, Job] = {}
        self._new: dict[int, Job] = {}  # those that are not all tokenised
        self._computing: list[tuple[int, int]] = []
        self._n_computing = 0  # tokens of these
        self._began_at = 0.0
        self._may_repeat_s = MAX_REPEATED_S  # of batches
        self._n_failures = 0

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def idle(self) -> bool:
        return not self._new and self._batcher.idle

    @property
    def has_batch(self) -> bool:
        """There is something to compute."""
        return not self._batcher.idle

    @property
    def goes_on(self) -> bool:
        """What is being computed is wanted, and gives way to nobody. Asked while it is."""
        return self._is_wanted and not self._gives_way

    @property
    def _is_wanted(self) -> bool:
        return any(job in self._jobs for job, _ in self._computing)

    @property
    def _gives_way(self) -> bool:
        """A request has come that takes a fraction of the time, and what is lost is bounded."""
        return (
            self._n_computing >= WORTH_GIVING_UP
            and any(job.n_chars <= self._n_computing for job in self._new.values())
            and self._batcher.may_give_up
            and time.monotonic() - self._began_at <= self._may_repeat_s
        )

    def admit(self, request: wire.Embed | wire.Score) -> list[wire.Message]:
        """Take a request; what there is to say about it at once."""
        try:
            job = self._new_job(request)
            if not job.n_texts:
                raise BadRequest("There is nothing to compute.", param="input")
        except Exception as error:
            return [failure(request.job, error)]
        self._jobs[job.id] = self._new[job.id] = job
        return []

    def _new_job(self, request: wire.Embed | wire.Score) -> Job:
        if isinstance(self._model, Embedder):
            if isinstance(request, wire.Embed):
                return EmbedJob(request, self._model, self._tier)
            return SimilarityJob(request, EmbeddingReranker(self._model), self._tier)
        if isinstance(request, wire.Embed):
            raise BadRequest(f"Tier '{self._tier}' scores and does not embed.", param="model")
        return PairJob(request, self._model, self._tier)

    def cancel(self, job_id: int) -> None:
        """Forget a job. Unknown ones are fine: it may just have ended."""
        self._jobs.pop(job_id, None)
        self._new.pop(job_id, None)
        self._batcher.cancel(job_id)

    def clear(self) -> None:
        """Forget all: nobody will hear of them."""
        for job_id in [*self._jobs]:
            self.cancel(job_id)

    def tokenize(self) -> list[wire.Message]:
        """A few texts of those that have come; faults of requests."""
        messages: list[wire.Message] = []
        n_tokens = 0
        while self._new and n_tokens < TOKENS_AT_ONCE:
            for job in list(self._new.values()):
                try:
                    if len(job.texts) < job.n_texts:
                        text = job.tokenize(len(job.texts))
                        job.texts.append(text)
                        n_tokens += len(text.ids) + text.n_cut + text.n_beside
                except Exception as error:
                    self.cancel(job.id)
                    messages.append(failure(job.id, error))
                    continue
                if len(job.texts) == job.n_texts:
                    del self._new[job.id]
                    self._plan(job)
        return messages

    def _plan(self, job: Job) -> None:
        """Equal texts are computed once: in different company their numbers would differ."""
        start = 0
        for size in job.windows:
            firsts: dict[bytes, int] = {}
            for index in range(start, start + size):
                first = firsts.setdefault(job.texts[index].ids.tobytes(), index)
                if first != index:
                    job.copies.setdefault(first, []).append(index)
            self._batcher.add(job.id, [(i, len(job.texts[i].ids)) for i in firsts.values()])
            start += size

    def compute(self, go_on: Callable[[], bool]) -> list[wire.Message]:
        """One batch, and what can be said after it. Raises when the encoder is broken."""
        self._computing = self._batcher.plan()
        lengths = [len(self._jobs[job].texts[index].ids) for job, index in self._computing]
        self._n_computing = sum(lengths)
        self._began_at = time.monotonic()
        try:
            results = self._results(self._computing, go_on)
        except Interrupted:
            if self._is_wanted:
                self._may_repeat_s -= time.monotonic() - self._began_at
                self._batcher.give_up([t for t in self._computing if t[0] in self._jobs])
            return []
        useful_s = time.monotonic() - self._began_at
        self._may_repeat_s = min(self._may_repeat_s + REPEATED * useful_s, MAX_REPEATED_S)
        messages: list[wire.Message] = []
        items: dict[int, list[Item]] = {}
        for (job_id, index), result in zip(self._computing, results, strict=True):
            job = self._jobs.get(job_id)
            if job is None:  # everybody has left
                continue
            alike = [index, *job.copies.get(index, ())]
            job.n_left -= len(alike)
            try:
                for at in alike:
                    wanted = partial(self._is_wanted_by, job_id, go_on)
                    items.setdefault(job_id, []).extend(job.take(at, result, wanted))
            except Interrupted:  # everybody has left meanwhile
                continue
            except Exception as error:
                self.cancel(job_id)
                del items[job_id]
                messages.append(failure(job_id, error))
        self._computing = []
        for job_id, found in items.items():
            job = self._jobs.get(job_id)
            if job is None:
                continue
            if found:
                messages.append(job.message(found))
            if not job.n_left:
                del self._jobs[job_id]
        return messages

    def _is_wanted_by(self, job_id: int, go_on: Callable[[], bool]) -> bool:
        """Of what is made of a batch. Whoever comes meanwhile is heard, and is not given way to."""
        go_on()
        return job_id in self._jobs

    def _results(
        self, batch: list[tuple[int, int]], go_on: Callable[[], bool], *, is_again: bool = False
    ) -> Sequence[Result | ServiceError]:
        if not batch:
            return []
        ids = [self._jobs[job].texts[index].ids for job, index in batch]
        try:
            results = self._call(ids, [self._jobs[job].outputs for job, _ in batch], go_on)
        except Interrupted:
            raise
        except ServiceError as error:  # it says what is wrong, and the encoder is fine
            return [error] if len(batch) == 1 else self._alone(batch, go_on)
        except Exception:
            self._n_failures += not is_again  # many bad texts may be in one batch
            if self._n_failures >= MAX_FAILURES:
                raise
            logger.exception("A batch of %d texts failed", len(batch))
            if len(batch) == 1:
                return [InternalError("The model failed at this text. The log has the reason.")]
            return self._alone(batch, go_on)
        self._n_failures = 0
        unsound = [n for n, result in enumerate(results) if not _is_sound(result)]
        if unsound and len(batch) > 1:
            again = self._alone([batch[n] for n in unsound], go_on)
        else:
            again = [_unsound() for _ in unsound]
        for n, result in zip(unsound, again, strict=True):
            results[n] = result
        return results

    def _alone(
        self, batch: list[tuple[int, int]], go_on: Callable[[], bool]
    ) -> list[Result | ServiceError]:
        """Each by itself: a text must not spoil another's answer."""
        results: list[Result | ServiceError] = []
        for text in batch:
            if text[0] in self._jobs:
                results += self._results([text], go_on, is_again=True)
            else:  # nobody will look at it
                results.append(_unsound())
        return results

    def _call(
        self, ids: list[Ids], outputs: list[frozenset[Output]], go_on: Callable[[], bool]
    ) -> list[Result | ServiceError]:
        if isinstance(self._model, Embedder):
            return [*self._model.embed(ids, outputs, go_on)]
        return [*self._model.score(ids, go_on)]


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


def _is_sound(result: Result | ServiceError) -> bool:
    if isinstance(result, Embedded):
        return result.is_sound
    return isinstance(result, ServiceError) or math.isfinite(result)


def _unsound() -> ServiceError:
    return InternalError("The model made no numbers of this text, also when it was alone.")


def _fault(error: ServiceError) -> wire.Fault:
    return wire.Fault(error.code, error.message)


def _bytes(array: Any, dtype: str) -> bytes:
    data: bytes = array.astype(dtype, copy=False).tobytes()
    return data
