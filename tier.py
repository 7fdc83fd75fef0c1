"""One model and everybody who wants it: a queue, leases, who is handed to the worker, and what
happens to requests when that dies.

A tier's state goes stopped → waiting (for memory) → starting → ready → stopping → stopped, or to
failed from starting; before it has a file it may be downloading. One task makes every transition,
so none of them can race (`worker_life.py` has what a transition does):

1. A waiting job starts the worker. A load that fails fails the jobs that wait for it; a worker
   that could not load is tried again after a back-off, when the next job comes. With PRELOAD it
   needs no job until it has been loaded once.
2. There is memory for it, or it waits until others have made way (`room.py`). When the tier is
   to make way itself it hands out nothing more, and stops once what is in the worker has ended.
3. While the worker has free sequences it gets the next waiting job, by priority and age; also one
   that should be served before those that run, whose place it takes. One that embeds or scores
   takes nearly all, and shares itself out among them. Conversions between text and tokens need no
   sequence: they go to it at once, and fail with it.
4. When nobody has a lease for IDLE_TTL_S the worker is stopped.
5. When the worker dies, jobs that had sent text fail; the others are suspects: each is tried again
   alone on a fresh worker, and a second death is its own fault. Vectors and scores that have come
   are kept, and the rest is tried. Waiting jobs just wait on, unless workers die again and again
   without an answer to anybody: then it counts as a load that fails.
"""

import asyncio
import itertools
import logging
import math
import re
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from encoding import Encoding
from engine import wire
from engine.client import EndReason, Launcher, Worker
from engine.model_file import ModelFile
from errors import (
    InsufficientMemory,
    InternalError,
    QueueFull,
    QueueTimeout,
    ServiceError,
    TierUnavailable,
    WorkerCrashed,
)
from generating import Conversion, Generation
from hub_model import FOLDER_BACKENDS
from lengths import Lengths
from metrics import Metrics
from progress import ProgressLog
from room import Occupant, Room
from settings import ServerSettings, TierName, TierSettings
from waiting import WaitingLine
from worker_life import State, WorkerLife, back_off_s
from worker_spec import effective_n_ctx

logger = logging.getLogger(__name__)

MAX_RETRY_AFTER_S = 60

Job = Generation | Encoding[wire.Vector] | Encoding[wire.Scored]


class Tier:
    """One model and everybody who wants it."""

    def __init__(
        self,
        name: TierName,
        settings: TierSettings,
        server: ServerSettings,
        *,
        room: Room,
        metrics: Metrics,
        launch: Launcher,
        progress_log: ProgressLog,
    ) -> None:
        self.name = name
        self.settings = settings
        self._server = server
        self._room = room
        self.metrics = metrics.of(name)
        self.life = WorkerLife(
            name,
            settings,
            server,
            tenant=self,
            on_lost=self._on_lost,
            room=room,
            metrics=self.metrics,
            launch=launch,
            progress_log=progress_log,
        )
        self._waiting: WaitingLine[Job] = WaitingLine()
        self._suspects: deque[Job] = deque()
        self._running: dict[int, Job] = {}  # by job
        self._conversions: dict[int, Conversion] = {}  # that somebody waits for, by job
        self._job_ids = itertools.count(1)
        self._n_leases = 0
        self._job_s = 1.0  # what a job takes, averaged; for Retry-After
        self._text_s = 0.01  # what a text takes an encoder, averaged
        self._counted_at = 0.0
        self._is_to_load = settings.preload
        self._loads_at: float | None = None  # once that has failed: when it is tried again
        self._n_preloads_failed = 0
        self._is_closing = False
        self._is_refusing = False  # new requests
        self._n_making_way = 0  # for how many others
        self._keep_alive_s: float | None = None  # as the last request wants it
        self._wakeup = asyncio.Event()
        self._wakeup.set()
        self._task: asyncio.Task[None] | None = None

    @property
    def state(self) -> State:
        return self.life.state

    @property
    def n_ctx(self) -> int:
        """Most tokens of one request, prompt and answer. Raises ModelLoadFailed."""
        return effective_n_ctx(self.settings, self.model())

    @property
    def encoder(self) -> wire.EncoderInfo | None:
        """What the model can do that embeds or scores, once it has been loaded."""
        return self.life.encoder

    @property
    def aliases(self) -> list[str]:
        """Further names that requests may use."""
        if (model := self.settings.hub_model) is not None:
            names = [self.settings.model_path.removeprefix("hf:")]
            names.append(re.sub("-GGUF$", "", model.repo.rpartition("/")[2], flags=re.IGNORECASE))
            if self.settings.backend not in FOLDER_BACKENDS and self.is_downloaded:
                names.append(self.life.source.settings.path.stem)
            return [*self.settings.aliases, *names]
        path = Path(self.settings.model_path)
        is_folder = self.settings.backend in FOLDER_BACKENDS  # whose dots are no suffix
        stem = path.name if is_folder else path.stem
        return [*self.settings.aliases, *([stem] if stem else [])]

    def _lengths(self) -> Lengths:
        model = self.model()
        n_ctx = effective_n_ctx(self.settings, model)
        return Lengths(self.name, n_ctx, model.max_token_bytes)

    def least_tokens(self, prompt: Sequence[wire.Segment | int]) -> int:
        """So many tokens a prompt has at least. Raises ModelLoadFailed."""
        return self._lengths().least_tokens(prompt)

    def model(self) -> ModelFile:
        """What the file's header says. Raises ModelLoadFailed."""
        return self.life.model()

    @property
    def created(self) -> int:
        """When the model file was written, in seconds since 1970. Raises ModelLoadFailed."""
        self.model()
        return self.life.source.created

    @property
    def fingerprint(self) -> str:
        """Short for `identity`: changes with all that changes answers. Raises ModelLoadFailed."""
        return f"fp_{self.identity[:16]}"

    @property
    def identity(self) -> str:
        """Stands for all of the model, its library and its settings that decides what a request is
        answered; while it is loaded, for what the worker has. Raises ModelLoadFailed."""
        self.model()
        return self.life.source.identity

    def is_still(self, identity: str) -> bool:
        """What has just answered was that for certain, and not a file that was put in its place."""
        return self.life.source.identity == identity and self.life.source.is_unchanged()

    @contextmanager
    def lease(self) -> Iterator[None]:
        """While somebody has one, the worker is not stopped for being idle."""
        self._n_leases += 1
        try:
            yield
        finally:
            self._n_leases -= 1
            self.life.used_at = time.monotonic()
            self._wakeup.set()
            self._room.changed()

    def keep_alive(self, seconds: float | None) -> None:
        """From now on the model stays so long without a request, if it is loaded; for ever where
        that is negative. None leaves it as it is."""
        if seconds is not None and self.life.worker is not None:
            self._keep_alive_s = seconds
            self._wakeup.set()

    @property
    def is_wanted(self) -> bool:
        """Somebody waits for the model, or is in it."""
        if self._is_closing:
            return False
        return bool(self._n_leases or self._is_to_load or self._suspects or self._waiting)

    @property
    def has_failed_to_preload(self) -> bool:
        """It was to be loaded at start, could not be, and has not been loaded since."""
        is_owed = self._is_to_load or self._loads_at is not None
        return is_owed and self.life.reason is not None

    @property
    def wanted_until(self) -> float:
        """When that was so for the last time; inf while it is."""
        return math.inf if self.is_wanted else self.life.used_at

    def waits_for(self, job: Generation | None) -> str:
        """In words for people: what happens before the job's answer begins."""
        if (doing := self.life.doing()) is not None:
            return doing
        n_before = self._waiting.n_before(job) if job is not None else None
        if n_before is not None:
            return f"queue {n_before + 1}/{len(self._waiting)}"
        return f"{self.name} is at it"

    @property
    def n_waiting(self) -> int:
        return len(self._waiting)

    @property
    def n_running(self) -> int:
        return len(self._running)

    def occupant(self) -> Occupant | None:
        """What the tier has of the memory, as `room` sees it."""
        life = self.life
        if not life.held_bytes:
            return None
        return Occupant(
            self.name, life.held_bytes, self.settings.pin, self.is_wanted, life.used_at,
            life.stays_until,
        )  # fmt: skip

    @property
    def is_downloaded(self) -> bool:
        """False while the model is still to be fetched from the hub."""
        return self.life.source.is_here()

    async def fetched(self) -> None:
        """Returns when the model's file is here: at once, but for one from the hub that was never
        asked for. Raises ModelLoadFailed."""
        if self.life.source.is_here():
            return
        with self.lease():
            await self.life.fetched()

    async def load(self) -> None:
        """Load the model, if it is not. Raises ServiceError."""
        await self.tokenize([], add_bos=False)

    async def unload(self, *, force: bool = False) -> None:
        """Stop the worker: when it has answered what is in it, or at once by `force`. Requests that
        come or wait load it again."""
        if force:
            for job in [*self._running.values()]:
                self.drop(job)
                job.fail(TierUnavailable("The model was unloaded by force.", retry_after_s=1))
        await self._leave()

    async def make_way(self) -> None:
        """Stop the worker for another's. Returns when it has ended what was in it."""
        has_worker = self.life.worker is not None
        await self._leave()
        self.metrics.evictions.inc(has_worker)

    async def _leave(self) -> None:
        """Returns when the worker has ended what was in it and is stopped. Meanwhile it gets
        nothing new."""
        self._n_making_way += 1
        try:
            while self.life.held_bytes and not self._is_closing:
                self.life.has_stopped.clear()
                self._wakeup.set()
                await self.life.has_stopped.wait()
        finally:
            self._n_making_way -= 1
            self._wakeup.set()

    def submit(self, request: wire.Generate, *, priority: int = 0) -> Generation:
        """Queue a request; a lower priority is served earlier. Raises QueueFull,
        ContextLengthExceeded where that is certain without tokenising, or TierUnavailable when the
        service is stopping."""
        self._lengths().check_prompt(request.prompt)
        self._check_open()
        now = time.monotonic()
        place = self._waiting.place(priority, now)
        if len(self._waiting) >= self.settings.queue_size:
            self._make_room_in_line(priority)
        request = msgspec.structs.replace(request, job=next(self._job_ids), rank=place)
        generation = Generation(self, request, priority)
        generation.n_before = self._waiting.join(generation, priority, now)
        self._expire(generation)
        self._wakeup.set()
        return generation

    def _make_room_in_line(self, priority: int) -> None:
        """The last in line leaves it for one that is more urgent. Raises QueueFull."""
        last = self._waiting.last
        error = self._queue_full(len(self._waiting))
        if not isinstance(last, Generation) or last.priority <= priority:
            raise error
        self.drop(last)
        last.fail(error)

    def _expire(self, job: Job) -> None:
        """End the job if it still waits when QUEUE_TIMEOUT_S are over."""
        timeout_s = self._server.queue_timeout_s
        timer = asyncio.get_running_loop().call_later(timeout_s, self._time_out, job)
        job.on_end = timer.cancel

    def _time_out(self, job: Job) -> None:
        if job.request.job in self._running:
            return
        self.drop(job)
        job.fail(self._waited_too_long())

    def _waited_too_long(self) -> ServiceError:
        wait_s = self._wait_s(len(self._waiting) + 1)
        if self.state == "waiting":
            needed, free = self.life.needed_bytes, self._room.free_bytes
            return self._room.insufficient(needed, free, retry_after_s=wait_s)
        return QueueTimeout(
            f"The request has waited for tier '{self.name}' for "
            f"{self._server.queue_timeout_s:g} s (QUEUE_TIMEOUT_S).",
            retry_after_s=wait_s,
        )

    def embed(self, request: wire.Embed) -> Encoding[wire.Vector]:
        """Queue texts to be embedded; raises as `submit` does."""
        encoding = Encoding[wire.Vector](self, self._with_job(request))
        self._queue_texts(encoding)
        return encoding

    def score(self, request: wire.Score) -> Encoding[wire.Scored]:
        """Queue pairs to be scored; raises as `submit` does."""
        encoding = Encoding[wire.Scored](self, self._with_job(request))
        self._queue_texts(encoding)
        return encoding

    def _with_job(self, request: wire.Embed | wire.Score) -> wire.Embed | wire.Score:
        self._lengths().check_texts(request)
        return msgspec.structs.replace(request, job=next(self._job_ids))

    def _queue_texts(self, encoding: Encoding[wire.Vector] | Encoding[wire.Scored]) -> None:
        self._check_room_for_texts()
        encoding.n_before = self._waiting.join(encoding, 0, time.monotonic())
        self._expire(encoding)
        self._wakeup.set()

    def _check_room_for_texts(self) -> None:
        """A request of any size finds room as long as there is any."""
        self._check_open()
        jobs = itertools.chain(self._waiting, self._suspects, self._running.values())
        n_texts = sum(job.n_open for job in jobs)
        if n_texts >= self.settings.queue_texts:
            raise QueueFull(
                f"{n_texts} texts are waiting for tier '{self.name}', and it takes no more "
                f"({self.name.upper()}_QUEUE_TEXTS). Try again later.",
                retry_after_s=min(max(1, math.ceil(self._text_s * n_texts)), MAX_RETRY_AFTER_S),
            )

    def count(self, n_texts: int) -> None:
        """So many texts have just been computed."""
        self.life.answered()
        self.metrics.batch_size.observe(n_texts)
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
        await self.fetched()  # a download is no queue
        self._check_open()
        if len(self._unsent) >= self.settings.queue_size:
            raise self._queue_full(len(self._unsent))
        job = next(self._job_ids)
        conversion = Conversion(msgspec.structs.replace(request, job=job))
        self._conversions[job] = conversion

        def expire() -> None:
            if conversion.worker is None:
                conversion.fail(self._waited_too_long())

        timer = asyncio.get_running_loop().call_later(self._server.queue_timeout_s, expire)
        with self.lease():
            self._wakeup.set()
            try:
                return await conversion.answer
            finally:
                timer.cancel()
                del self._conversions[job]
                if conversion.worker is not None:
                    conversion.worker.cancel(job)

    @property
    def _unsent(self) -> list[Conversion]:
        conversions = self._conversions.values()
        return [c for c in conversions if c.worker is None and not c.answer.done()]

    def _check_open(self) -> None:
        if self._is_refusing:
            raise stopping()

    def _queue_full(self, n_waiting: int) -> QueueFull:
        return QueueFull(
            f"{n_waiting} requests are waiting for tier '{self.name}', and it takes no more "
            f"({self.name.upper()}_QUEUE_SIZE). Try again later.",
            retry_after_s=self._wait_s(n_waiting),
        )

    def _wait_s(self, n_waiting: int) -> int:
        """How long so many requests will take, as the last ones did."""
        n_at_once = self.settings.n_parallel
        if (worker := self.life.worker) is not None:  # which may not be able to
            n_at_once = min(n_at_once, worker.ready.n_parallel)
        wait_s = self._job_s * n_waiting / n_at_once
        return min(max(1, math.ceil(wait_s)), MAX_RETRY_AFTER_S)

    def drop(self, generation: Job) -> None:
        """Forget a request that ended or whose client left. Unknown ones are fine."""
        generation.on_end()
        job = generation.request.job
        if job in self._running:
            handed_at = self._running.pop(job).handed_at
            self._job_s += 0.2 * (time.monotonic() - handed_at - self._job_s)
            if generation.has_answered:
                self.life.answered()
            assert self.life.worker is not None
            self.life.worker.cancel(job)
        self._waiting.leave(generation)
        if generation in self._suspects:
            self._suspects.remove(generation)
        self._wakeup.set()

    def refuse(self) -> None:
        """Take no more requests; those that are here go on."""
        self._is_refusing = True

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
        self._is_closing = self._is_refusing = True
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
                self._put_preload_off(error)
                self._fail_waiting(error)
            except Exception as error:
                self._put_preload_off(error)
                logger.exception("Tier %s: its requests fail by a fault of ours", self.name)
                self._fail_waiting(InternalError("The tier failed. The log has the reason."))
            if self._n_making_way and not self._is_busy:
                await self._stop_worker()
                self.life.has_stopped.set()
            try:
                await asyncio.wait_for(self._wakeup.wait(), self._timeout_s())
            except asyncio.TimeoutError:
                if self._loads_at is not None:
                    self._try_preload_again()
                elif self._idle_timeout_s() is not None:  # nobody took a lease meanwhile
                    logger.info("Tier %s has been idle and is unloaded", self.name)
                    await self._stop_worker()

    def _put_preload_off(self, error: Exception) -> None:
        """What was to be loaded at start is tried until it has been, unless there is no room."""
        if self._is_to_load and not isinstance(error, InsufficientMemory):
            self._n_preloads_failed += 1
            self._loads_at = time.monotonic() + back_off_s(self._n_preloads_failed)
        self._is_to_load = False

    def _try_preload_again(self) -> None:
        """If there is room: for a load that failed once no model goes from the memory again."""
        if self.life.needed_bytes <= self._room.free_bytes:
            self._is_to_load, self._loads_at = True, None
        else:
            self._loads_at = time.monotonic() + back_off_s(self._n_preloads_failed)

    def _timeout_s(self) -> float | None:
        if self._loads_at is not None:
            return max(self._loads_at - time.monotonic(), 0)
        return self._idle_timeout_s()

    def _idle_timeout_s(self) -> float | None:
        if self.life.worker is None or self._n_leases or self.settings.pin:
            return None
        seconds = self.settings.idle_ttl_s if self._keep_alive_s is None else self._keep_alive_s
        return seconds if seconds >= 0 else None

    @property
    def _is_busy(self) -> bool:
        """Something is in the worker."""
        conversions = self._conversions.values()
        return bool(self._running) or any(c.worker is not None for c in conversions)

    async def _hand_out(self) -> None:
        while self._is_to_load or self._suspects or self._waiting or self._unsent:
            if self._n_making_way:
                return
            worker = await self.life.ready()
            if worker is None:
                return
            self._is_to_load, self._loads_at = False, None
            for conversion in self._unsent:
                conversion.send(worker)
            generation = self._next(worker.ready.n_parallel)
            if generation is None:
                return
            generation.handed_at = time.monotonic()
            waited_s = generation.handed_at - generation.queued_at
            self.metrics.queue_seconds.observe(waited_s)
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
        3. The first in the waiting line, if a sequence is free, or has one that comes after it.
        """
        if any(generation.n_crashes for generation in self._running.values()):
            return None
        if self._suspects:  # since these were in the worker that died, nobody is in this one
            # the least of them first: nobody waits for the longest
            job = min(self._suspects, key=lambda job: job.n_open)
            self._suspects.remove(job)
            return job
        if self._waiting and len(self._running) < n_seats:
            return self._waiting.pop()
        if self._waiting and len(self._running) < 2 * n_seats and self._outranks_one():
            return self._waiting.pop()
        return None

    def _outranks_one(self) -> bool:
        """The first in line comes before one that runs, which the worker then puts off."""
        ranks = [g.request.rank for g in self._running.values() if isinstance(g, Generation)]
        return bool(ranks) and self._waiting.first_place < max(ranks)

    async def _stop_worker(self) -> None:
        if self.life.worker is not None:
            await self.life.stop()
            self._keep_alive_s = None

    def _on_lost(self, worker: Worker, end: EndReason) -> None:
        logger.error("Tier %s: its worker died with %d requests in it: %s",
                     self.name, len(self._running), end)  # fmt: skip
        crashed = WorkerCrashed(f"The process with the model of tier '{self.name}' died ({end}).")
        guilty = WorkerCrashed(
            f"The process with the model of tier '{self.name}' died again with this request in it "
            f"({end})."
        )
        guilty.is_final = True  # it was in two workers that died, in the second one alone
        for generation in self._running.values():
            generation.n_crashes += 1
            if generation.has_answered or generation.n_crashes > 1:
                generation.fail(guilty if generation.n_crashes > 1 else crashed)
            else:
                self._suspects.append(generation)
        self._running.clear()
        if not self._suspects:  # who is tried again has said it for the next worker too
            self._keep_alive_s = None
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
            job.fail(error)
        for conversion in self._unsent:
            conversion.fail(error)


def stopping() -> ServiceError:
    return TierUnavailable("The service is stopping.", retry_after_s=5)
