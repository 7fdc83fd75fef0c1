"""The requests in a worker that embeds or scores: tokenised, put into batches, answered.

Texts are tokenised between batches, a few of each request in turn, and a request is computed when
all of it is tokenised: a fault in it is found before any work, and nobody waits for a long one.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from functools import partial

from embedders import Embedded, Embedder
from encoder_requests import Item, Job, Model, Result, new_job
from engine import wire
from engine.backends.base import Ids, Interrupted
from engine.batcher import Batcher
from engine.types import Output
from errors import InternalError, ServiceError
from worker_requests import failure

logger = logging.getLogger("worker.encoder_jobs")

TOKENS_AT_ONCE = 8192  # tokenised between two batches: some 25 ms
WORTH_GIVING_UP = 128  # tokens of a batch
REPEATED = 0.25  # of the time of batches may go into those that were given up
MAX_REPEATED_S = 2.0  # saved up
MAX_FAILURES = 8  # batches in a row; then the encoder is taken to be broken


class EncoderJobs:
    """The requests in the worker. `tokenize` and `compute` do a piece of the work, in turn."""

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
            job = new_job(request, self._model, self._tier)
        except Exception as error:
            return [failure(request.job, error)]
        self._jobs[job.id] = self._new[job.id] = job
        return []

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


def _is_sound(result: Result | ServiceError) -> bool:
    if isinstance(result, Embedded):
        return result.is_sound
    return isinstance(result, ServiceError) or math.isfinite(result)


def _unsound() -> ServiceError:
    return InternalError("The model made no numbers of this text, also when it was alone.")
