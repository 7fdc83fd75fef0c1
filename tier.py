"""One model and everybody who wants it: a queue, the life of its worker, and what happens when that
dies.

A tier's state goes stopped → starting → ready → stopping → stopped, or to failed from starting.
One task makes every transition, so none of them can race:

1. A waiting job starts the worker. A load that fails fails the jobs that wait for it; a worker
   that could not load is tried again after a back-off, when the next job comes.
2. While the worker has free sequences it gets the next waiting job, by priority and age; one that
   embeds or scores takes nearly all, and shares itself out among them. Conversions between text
   and tokens need no sequence: they go to it at once, and fail with it.
3. When nobody has a lease for IDLE_TTL_S the worker is stopped.
4. When the worker dies, jobs that had sent text fail; the others are suspects: each is tried again
   alone on a fresh worker, and a second death is its own fault. Vectors and scores that have come
   are kept, and the rest is tried. Waiting jobs just wait on.
"""

import asyncio
import itertools
import logging
import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import msgspec

from encoding import Encoding
from engine import wire
from engine.client import EndReason, Launcher, Worker
from engine.model_file import ModelFile
from errors import (
    BadRequest,
    ContextLengthExceeded,
    InternalError,
    ModelLoadFailed,
    QueueFull,
    ServiceError,
    TierUnavailable,
    WorkerCrashed,
)
from generating import Conversion, Generation
from model_source import ModelSource, Signature
from settings import ENCODER_TIERS, TierName, TierSettings
from waiting import WaitingLine
from worker_spec import effective_n_ctx, worker_spec

logger = logging.getLogger(__name__)

State = Literal["stopped", "starting", "ready", "stopping", "failed"]

MOST_TO_CUT = 16  # times the longest text that could fit: all of it is tokenised before the cut
MAX_BACK_OFF_S = 60.0
MAX_RETRY_AFTER_S = 60


Job = Generation | Encoding[wire.Vector] | Encoding[wire.Scored]


class Tier:
    """One model and everybody who wants it."""

    def __init__(
        self, name: TierName, settings: TierSettings, *, launch: Launcher, worker_timeout_s: float,
        log_level: str = "INFO",
    ) -> None:  # fmt: skip
        self.name = name
        self.settings = settings
        self.state: State = "stopped"
        self.progress = 0.0  # of a load, 0…1
        self.reason: str | None = None  # of the last failure, until a load succeeds
        self._launch = launch
        self._worker_timeout_s = worker_timeout_s
        self._log_level = log_level
        self._source = ModelSource(name, settings)
        self._worker: Worker | None = None
        self._encoder: wire.EncoderInfo | None = None
        self._waiting: WaitingLine[Job] = WaitingLine()
        self._suspects: deque[Job] = deque()
        self._running: dict[int, Job] = {}  # by job
        self._encodings: set[Job] = set()  # that have not ended, wherever they are
        self._conversions: dict[int, Conversion] = {}  # that somebody waits for, by job
        self._job_ids = itertools.count(1)
        self._n_leases = 0
        self._n_load_failures = 0
        self._retry_at = 0.0  # unless the file has changed
        self._failed_signature: Signature = 0, 0
        self._job_s = 1.0  # what a job takes, averaged; for Retry-After
        self._text_s = 0.01  # what a text takes an encoder, averaged
        self._counted_at = 0.0
        self._is_wanted = settings.preload
        self._is_closing = False
        self._wakeup = asyncio.Event()
        self._wakeup.set()
        self._task: asyncio.Task[None] | None = None

    @property
    def n_ctx(self) -> int:
        """Most tokens of one request, prompt and answer. Raises ModelLoadFailed."""
        return effective_n_ctx(self.settings, self.model())

    @property
    def encoder(self) -> wire.EncoderInfo | None:
        """What the model can do that embeds or scores, once it has been loaded."""
        return self._encoder

    @property
    def aliases(self) -> list[str]:
        """Further names that requests may use."""
        path = Path(self.settings.model_path)
        stem = path.name if self.settings.backend == "flag" else path.stem  # a directory's dots
        return [*self.settings.aliases, *([stem] if stem else [])]

    def model(self) -> ModelFile:
        """What the file's header says, read again when the file has changed and is not loaded.
        Raises ModelLoadFailed."""
        return self._source.read(is_loaded=self._worker is not None)

    def status(self) -> tuple[State, str | None]:
        """The state, and why the tier is not as it should be."""
        if self._worker is None and self.state != "starting":
            try:
                self.model()
            except ModelLoadFailed as error:
                return "failed", error.message
        return self.state, self.reason

    @property
    def created(self) -> int:
        """When the model file was written, in seconds since 1970. Raises ModelLoadFailed."""
        self.model()
        return self._source.created

    @property
    def fingerprint(self) -> str:
        """Changes with all that changes answers: the file, its template, the backend."""
        self.model()
        return self._source.fingerprint

    @contextmanager
    def lease(self) -> Iterator[None]:
        """While somebody has one, the worker is not stopped for being idle."""
        self._n_leases += 1
        try:
            yield
        finally:
            self._n_leases -= 1
            self._wakeup.set()

    def submit(self, request: wire.Generate, *, priority: int = 0) -> Generation:
        """Queue a request; a lower priority is served earlier. Raises QueueFull,
        ContextLengthExceeded where that is certain without tokenising, or TierUnavailable when the
        service is stopping."""
        self._check_length(request)
        self._check_room(len(self._waiting))
        request = msgspec.structs.replace(request, job=next(self._job_ids))
        generation = Generation(self, request)
        self._waiting.join(generation, priority, time.monotonic())
        self._wakeup.set()
        return generation

    def embed(self, request: wire.Embed, *, priority: int = 0) -> Encoding[wire.Vector]:
        """Queue texts to be embedded; raises as `submit` does."""
        encoding = Encoding[wire.Vector](self, self._with_job(request))
        self._queue_texts(encoding, priority)
        return encoding

    def score(self, request: wire.Score, *, priority: int = 0) -> Encoding[wire.Scored]:
        """Queue pairs to be scored; raises as `submit` does."""
        encoding = Encoding[wire.Scored](self, self._with_job(request))
        self._queue_texts(encoding, priority)
        return encoding

    def _with_job(self, request: wire.Embed | wire.Score) -> wire.Embed | wire.Score:
        if self.name not in ENCODER_TIERS:
            raise BadRequest(
                f"The model of tier '{self.name}' neither embeds nor scores.", param="model"
            )
        if isinstance(request, wire.Embed) and not request.inputs:
            raise BadRequest("There is no input.", param="input")
        if isinstance(request, wire.Score) and not request.pairs:
            raise BadRequest("There is no document.", param="documents")
        self._check_lengths(request)
        return msgspec.structs.replace(request, job=next(self._job_ids))

    def _queue_texts(
        self, encoding: Encoding[wire.Vector] | Encoding[wire.Scored], priority: int
    ) -> None:
        self._check_room_for_texts()
        self._encodings.add(encoding)
        self._waiting.join(encoding, priority, time.monotonic())
        self._wakeup.set()

    def _check_room_for_texts(self) -> None:
        """A request of any size finds room as long as there is any."""
        if self._is_closing:
            raise stopping()
        n_texts = sum(job.n_open for job in self._encodings if isinstance(job, Encoding))
        if n_texts >= self.settings.queue_texts:
            raise QueueFull(
                f"{n_texts} texts are waiting for tier '{self.name}', and it takes no more "
                f"({self.name.upper()}_QUEUE_TEXTS). Try again later.",
                retry_after_s=min(max(1, math.ceil(self._text_s * n_texts)), MAX_RETRY_AFTER_S),
            )

    def count(self, n_texts: int) -> None:
        """So many texts have just been computed."""
        now = time.monotonic()
        text_s = (now - self._counted_at) / max(n_texts, 1)
        self._text_s += min(0.02 * n_texts, 1) * (text_s - self._text_s)
        self._counted_at = now

    async def tokenize(self, segments: Sequence[wire.Segment], *, add_bos: bool) -> wire.Tokens:
        """The tokens of a text, by the loaded model. Raises ServiceError."""
        answer = await self._convert(wire.Tokenize([*segments], add_bos))
        assert isinstance(answer, wire.Tokens)
        return answer

    async def detokenize(self, ids: Sequence[int]) -> str:
        """The text of tokens, control tokens by their names. Raises ServiceError; for an id that
        the vocabulary does not have BadRequest, param `tokens`."""
        answer = await self._convert(wire.Detokenize([*ids]))
        assert isinstance(answer, wire.Text)
        return answer.text

    async def _convert(self, request: wire.Tokenize | wire.Detokenize) -> wire.OfJob:
        self._check_room(len(self._unsent))
        job = next(self._job_ids)
        conversion = Conversion(msgspec.structs.replace(request, job=job))
        self._conversions[job] = conversion
        with self.lease():
            self._wakeup.set()
            try:
                return await conversion.answer
            finally:
                del self._conversions[job]
                if conversion.worker is not None:
                    conversion.worker.cancel(job)

    @property
    def _unsent(self) -> list[Conversion]:
        conversions = self._conversions.values()
        return [c for c in conversions if c.worker is None and not c.answer.done()]

    def _check_room(self, n_waiting: int) -> None:
        if self._is_closing:
            raise stopping()
        if n_waiting >= self.settings.queue_size:
            wait_s = self._job_s * n_waiting / self.settings.n_parallel
            raise QueueFull(
                f"{n_waiting} requests are waiting for tier '{self.name}', and it takes no more "
                f"({self.name.upper()}_QUEUE_SIZE). Try again later.",
                retry_after_s=min(max(1, math.ceil(wait_s)), MAX_RETRY_AFTER_S),
            )

    def least_tokens(self, prompt: Sequence[wire.Segment | int]) -> int:
        """So many tokens a prompt has at least. Raises ModelLoadFailed."""
        n_bytes = sum(len(p.text.encode()) for p in prompt if isinstance(p, wire.Segment))
        n_ids = sum(isinstance(piece, int) for piece in prompt)
        return n_ids + n_bytes // self.model().max_token_bytes

    def _check_length(self, request: wire.Generate) -> None:
        """A prompt that is far too long must not keep the worker busy with tokenising it."""
        n_tokens = self.least_tokens(request.prompt)
        if n_tokens > self.n_ctx:
            raise ContextLengthExceeded(
                f"The prompt has more than {n_tokens:,} tokens; tier '{self.name}' takes "
                f"{self.n_ctx:,} with the answer ({self.name.upper()}_N_CTX).",
                param="prompt",
                n_prompt_tokens=n_tokens,
                n_ctx=self.n_ctx,
            )

    def _check_lengths(self, request: wire.Embed | wire.Score) -> None:
        """The same for texts, of which spaces and accents may not count."""
        fields: dict[str, Sequence[str | list[int]]]
        if isinstance(request, wire.Embed):
            fields = {"input": request.inputs}
        else:
            fields = {"query": request.queries, "documents": request.documents}
        n_ctx, n_bytes = self.n_ctx, self.model().max_token_bytes
        for what, texts in fields.items():
            for index, text in enumerate(texts):
                least = len(text)
                if least > n_ctx and isinstance(text, str):
                    least = len("".join(text.split())) // (4 * n_bytes)
                if least > n_ctx and request.truncate == "none":
                    raise ContextLengthExceeded(
                        f"{what}[{index}] has more than {least:,} tokens; tier '{self.name}' "
                        f"takes {n_ctx:,} ({self.name.upper()}_N_CTX).",
                        param=what,
                        n_prompt_tokens=least,
                        n_ctx=n_ctx,
                        index=index,
                    )
                if len(text) > MOST_TO_CUT * n_ctx * n_bytes:
                    raise BadRequest(
                        f"{what}[{index}] has {len(text):,} characters, which is too much even to "
                        f"be cut to {n_ctx:,} tokens.",
                        param=what,
                        index=index,
                    )

    def drop(self, generation: Job) -> None:
        """Forget a request that ended or whose client left. Unknown ones are fine."""
        self._encodings.discard(generation)
        job = generation.request.job
        if job in self._running:
            handed_at = self._running.pop(job).handed_at
            self._job_s += 0.2 * (time.monotonic() - handed_at - self._job_s)
            assert self._worker is not None
            self._worker.cancel(job)
        self._waiting.leave(generation)
        if generation in self._suspects:
            self._suspects.remove(generation)
        self._wakeup.set()

    def start(self) -> None:
        """Begin to serve what is submitted."""
        self._task = asyncio.create_task(self._run(), name=f"tier {self.name}")

    async def close(self) -> None:
        """End everything. No process is left when this returns."""
        self.abandon(stopping())
        if self._task:
            self._task.cancel()
            await asyncio.wait([self._task])
        await self._stop_worker()

    def abandon(self, error: ServiceError) -> None:
        """Take no more requests, and end those that are here."""
        self._is_closing = True
        self._fail_waiting(error)
        for generation in list(self._running.values()):
            self.drop(generation)
            generation.fail(error)
        for conversion in self._conversions.values():
            conversion.fail(error)

    # the tier's task

    async def _run(self) -> None:
        while not self._is_closing:  # wait_for may swallow a cancellation before Python 3.12
            self._wakeup.clear()
            try:
                await self._hand_out()
            except ServiceError as error:
                self._fail_waiting(error)
            except Exception:
                logger.exception("Tier %s: its requests fail by a fault of ours", self.name)
                self._fail_waiting(InternalError("The tier failed. The log has the reason."))
            try:
                await asyncio.wait_for(self._wakeup.wait(), self._idle_timeout_s())
            except asyncio.TimeoutError:
                if self._idle_timeout_s() is not None:  # nobody took a lease meanwhile
                    logger.info("Tier %s has been idle and is unloaded", self.name)
                    await self._stop_worker()

    def _idle_timeout_s(self) -> float | None:
        if self._worker is None or self._n_leases or self.settings.pin:
            return None
        return self.settings.idle_ttl_s

    async def _hand_out(self) -> None:
        while self._is_wanted or self._suspects or self._waiting or self._unsent:
            worker = await self._ensure_ready()
            self._is_wanted = False
            for conversion in self._unsent:
                conversion.send(worker)
            generation = self._next(worker.ready.n_parallel)
            if generation is None:
                return
            generation.handed_at = time.monotonic()
            if not self._running:
                self._counted_at = generation.handed_at
            self._running[generation.request.job] = generation
            try:
                generation.send(worker)
            except Exception as error:  # it alone cannot be sent
                logger.error("Tier %s: a request cannot be sent", self.name, exc_info=error)
                self.drop(generation)
                generation.fail(InternalError("The request could not be sent to its model."))

    def _next(self, n_seats: int) -> Job | None:
        """Who goes to the worker now.

        1. Nobody while a suspect is in there, alone.
        2. A suspect, once the worker is empty.
        3. The first in the waiting line, if a sequence is free.
        """
        if any(generation.n_crashes for generation in self._running.values()):
            return None
        if self._suspects:
            return None if self._running else self._suspects.popleft()
        if self._waiting and len(self._running) < n_seats:
            return self._waiting.pop()
        return None

    async def _ensure_ready(self) -> Worker:
        if self._worker is not None:
            return self._worker
        wait_s = self._retry_at - time.monotonic()
        if wait_s > 0 and self._failed_signature == self._source.signature():
            raise TierUnavailable(
                f"{self.reason} It is tried again in {wait_s:.0f} s.",
                retry_after_s=math.ceil(wait_s),
            )
        self.state, self.progress = "starting", 0.0
        started_at = time.monotonic()
        try:
            model = await asyncio.to_thread(self.model)
            spec = worker_spec(self.name, self.settings, model, self._log_level)
            logger.info("Tier %s: loading %s", self.name, model.name)
            self._worker = await Worker.start(
                spec,
                launch=self._launch,
                on_progress=self._on_progress,
                on_lost=self._on_lost,
                timeout_s=self._worker_timeout_s,
            )
        except Exception as error:
            self._load_failed(error)
            raise
        except BaseException:
            self.state = "stopped"
            raise
        self.state, self.reason, self._n_load_failures = "ready", None, 0
        self._encoder = self._worker.ready.encoder
        logger.info(
            "Tier %s: ready after %.1f s, %d tokens of context, %d requests at once",
            self.name, time.monotonic() - started_at, self._worker.ready.n_ctx,
            self._worker.ready.n_parallel,
        )  # fmt: skip
        return self._worker

    def _on_progress(self, fraction: float) -> None:
        self.progress = fraction

    def _load_failed(self, error: Exception) -> None:
        self.state = "failed"
        self._is_wanted = False
        self.reason = error.message if isinstance(error, ServiceError) else "A fault of ours."
        logger.error("Tier %s cannot be loaded: %s", self.name, self.reason)
        self._failed_signature = self._source.signature()
        if self._source.is_known:  # the header was fine, so trying again costs a process
            self._n_load_failures += 1
            self._retry_at = time.monotonic() + min(2.0**self._n_load_failures, MAX_BACK_OFF_S)

    async def _stop_worker(self) -> None:
        if self._worker is not None:
            self.state = "stopping"
            await self._worker.stop()
            self._worker = None  # not before: who cancels this must find it
            self.state = "stopped"

    def _on_lost(self, worker: Worker, end: EndReason) -> None:
        logger.error("Tier %s: its worker died with %d requests in it: %s",
                     self.name, len(self._running), end)  # fmt: skip
        self._worker = None
        self.state = "stopped"
        self.reason = f"The worker died ({end}); the next request starts another."
        crashed = WorkerCrashed(f"The process with the model of tier '{self.name}' died ({end}).")
        for generation in self._running.values():
            generation.n_crashes += 1
            if generation.has_answered or generation.n_crashes > 1:
                self._encodings.discard(generation)
                generation.fail(crashed)
            else:
                self._suspects.append(generation)
        self._running.clear()
        for conversion in self._conversions.values():
            if conversion.worker is worker:
                conversion.fail(crashed)
        self._wakeup.set()

    def _fail_waiting(self, error: ServiceError) -> None:
        failed = [*self._suspects]
        while self._waiting:
            failed.append(self._waiting.pop())
        self._suspects.clear()
        for job in failed:
            self._encodings.discard(job)
            job.fail(error)
        for conversion in self._unsent:
            conversion.fail(error)


def stopping() -> ServiceError:
    return TierUnavailable("The service is stopping.", retry_after_s=5)
