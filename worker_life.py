"""The life of a tier's worker: its model's file, the memory it has, its start, end and death."""

import asyncio
import logging
import math
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Literal

import psutil

from engine import wire
from engine.client import EndReason, Launcher, Worker
from engine.model_file import ModelFile
from errors import InsufficientMemory, ModelLoadFailed, ServiceError, TierUnavailable
from footprint import Footprint, estimate
from metrics import TierMetrics
from model_source import ModelSource, Signature
from progress import ProgressLog
from room import Room, Tenant
from settings import ServerSettings, TierName, TierSettings
from worker_spec import worker_spec

logger = logging.getLogger(__name__)

# waiting: for memory
State = Literal["stopped", "downloading", "waiting", "starting", "ready", "stopping", "failed"]

MAX_BACK_OFF_S = 60.0
MAX_DEATHS = 5  # of workers in a row without an answer; two are one poisonous request


def back_off_s(n_failures: int) -> float:
    """For so long nothing is tried after so many loads in a row that failed."""
    return min(2.0 ** min(n_failures, 10), MAX_BACK_OFF_S)


class WorkerLife:
    """How the worker is, and what makes it so. Only the tier's task calls `ready` and `stop`."""

    def __init__(
        self,
        name: TierName,
        settings: TierSettings,
        server: ServerSettings,
        *,
        tenant: Tenant,
        on_lost: Callable[[Worker, EndReason], None],
        room: Room,
        metrics: TierMetrics,
        launch: Launcher,
        progress_log: ProgressLog,
    ) -> None:
        self.name = name
        self.state: State = "stopped"
        self.progress = 0.0  # of a load, 0…1
        self.reason: str | None = None  # of the last failure, until a load succeeds
        self._logged = ""  # the one of the last load that the log has
        self.worker: Worker | None = None
        self.encoder: wire.EncoderInfo | None = None  # what the model can do, once it was loaded
        self.source = ModelSource(name, settings, server.hub)
        self.needed_bytes = 0  # of the memory, by the worker that was or is to be started last
        self.held_bytes = 0  # of it, from before the start to after the end
        self.used_at = 0.0
        self.stays_until = 0.0  # as `Occupant` has it
        self.has_stopped = asyncio.Event()  # since somebody has cleared it to wait for that
        self._settings = settings
        self._server = server
        self._tenant = tenant
        self._on_lost = on_lost
        self._room = room
        self._metrics = metrics
        self._launch = launch
        self._progress_log = progress_log
        self._fetching: asyncio.Task[None] | None = None
        self._footprint: Footprint | None = None  # of the worker that was started last
        self._load_began_at = 0.0
        self._n_load_failures = 0
        self._retry_at = 0.0  # unless the file has changed
        self._failed_signature: Signature = 0, 0
        self._n_deaths = 0  # of workers in a row that had answered nobody

    # how it is

    def model(self) -> ModelFile:
        """What the file's header says, read again when the file has changed and is neither loaded
        nor on its way. Raises ModelLoadFailed."""
        is_loaded = self.worker is not None or self.state == "starting"
        return self.source.read(is_loaded=is_loaded)

    def status(self) -> tuple[State, str | None]:
        """The state, and why the tier is not as it should be."""
        if self.worker is None and self.state != "starting" and (fault := self._fault()):
            return "failed", fault
        return self.state, self.reason

    def _fault(self) -> str | None:
        """Why it cannot be loaded, by what is known of its file and of the memory now."""
        if not self.source.is_here():
            return self.source.fault
        try:
            self._room.check(self._tenant, self.footprint().most)
        except (ModelLoadFailed, InsufficientMemory) as error:
            return error.message
        return None

    def doing(self) -> str | None:
        """In words for people: what happens before there is a worker."""
        if self.state in ("downloading", "starting"):
            verb = "loading" if self.state == "starting" else self.state
            return f"{verb} {self.name} {self.progress:.0%}"
        return f"waiting for memory for {self.name}" if self.state == "waiting" else None

    @property
    def can_be_tried(self) -> bool:
        """The next request would not be refused for what is known of the model."""
        if self.worker is not None:
            return True
        return self._fault() is None and self._back_off_s() <= 0

    def _back_off_s(self) -> float:
        """For so long no load is tried after one that failed; a file that has changed is at
        once."""
        has_changed = self._failed_signature != self.source.signature()
        return 0.0 if has_changed else self._retry_at - time.monotonic()

    def footprint(self) -> Footprint:
        """What the worker takes of the memory, or would take. Raises ModelLoadFailed."""
        if self._footprint is None or self.worker is None:
            model = self.model()
            return estimate(self._spec(model), model)
        return self._footprint

    def _spec(self, model: ModelFile) -> wire.WorkerSpec:
        return worker_spec(self.name, self.source.settings, model, self._server)

    @property
    def memory_bytes(self) -> int | None:
        """What the worker has now, with what is mapped of its file; None where that is unknown."""
        worker = self.worker  # which another thread may set to None
        if worker is None or not worker.pid:
            return None
        with suppress(psutil.Error):
            return int(psutil.Process(worker.pid).memory_info().rss)
        return None

    # its file

    async def fetched(self) -> None:
        """Returns when the model's file is here. A download is shared by all who wait for it, and
        stops when nobody wants the tier any more. Raises ModelLoadFailed."""
        if self.source.is_here():
            return
        if self._fetching is None or self._fetching.done():
            self._fetching = asyncio.create_task(self._fetch(), name=f"fetch {self.name}")
        await asyncio.shield(self._fetching)

    async def _is_fetched(self) -> bool:
        """False when nobody wants it any more."""
        try:
            await self.fetched()
        except ModelLoadFailed:
            if self._tenant.is_wanted:
                raise
            return False
        return True

    async def _fetch(self) -> None:
        loop = asyncio.get_running_loop()
        before, self.state = self.state, "downloading"
        started_at = time.monotonic()
        if not self._logged:  # else it is tried again
            logger.info("Tier %s: downloading %s", self.name, self._settings.model_path)

        def on_progress(fraction: float) -> None:
            loop.call_soon_threadsafe(self._on_progress, fraction)

        has_said_no = False

        def is_wanted() -> bool:
            nonlocal has_said_no
            has_said_no = not self._tenant.is_wanted
            return not has_said_no

        try:
            while True:
                try:
                    await asyncio.to_thread(self.source.fetch, on_progress, is_wanted)
                    break
                except ModelLoadFailed:
                    if not has_said_no or not is_wanted():  # somebody may have come meanwhile
                        raise
            self.reason = None
            seconds = time.monotonic() - started_at
            logger.info("Tier %s: downloaded after %.1f s", self.name, seconds)
        except ModelLoadFailed as error:
            self._failed(error.message)
            raise
        finally:
            self.state = before
            self._progress_log.end(self.name)

    def _on_progress(self, fraction: float) -> None:
        self.progress = fraction
        if (doing := self.doing()) is not None:
            self._progress_log.tell(self.name, doing, time.monotonic())

    # its start, its end and its death

    async def ready(self) -> Worker | None:
        """The worker; None when nobody wants it any more. Raises ServiceError."""
        if self.worker is not None:
            return self.worker
        if (wait_s := self._back_off_s()) > 0:
            raise TierUnavailable(
                f"{self.reason} It is tried again in {wait_s:.0f} s.",
                retry_after_s=math.ceil(wait_s),
            )
        try:
            if not await self._is_fetched():
                return None
            worker = await self._loaded()
            if worker is not None and not self.source.is_unchanged():
                logger.warning("Tier %s: its file was replaced meanwhile; once more", self.name)
                await worker.stop()
                self._free()
                worker = await self._loaded()
            if worker is None:
                self.state = "stopped"
                return None
            self.worker = worker
        except InsufficientMemory as error:
            self.state = "stopped"
            self._failed(error.message)
            raise
        except Exception as error:
            self._free()
            reason = error.message if isinstance(error, ServiceError) else "A fault of ours."
            self._fail_for_a_while(reason)
            raise
        except BaseException:
            self._free()
            self.state = "stopped"
            raise
        self.source.was_loaded()
        self._metrics.loads.inc()
        self.state, self.reason, self._logged = "ready", None, ""
        self._n_load_failures *= bool(self._n_deaths)
        self.encoder = self.worker.ready.encoder
        self.used_at = time.monotonic()
        load_s = self.used_at - self._load_began_at
        self.stays_until = self.used_at + load_s
        self._room.changed()
        assert self._footprint is not None
        logger.info(
            "Tier %s: ready after %.1f s, %d tokens of context, %d requests at once, about %d MB",
            self.name, load_s, self.worker.ready.n_ctx, self.worker.ready.n_parallel,
            self._footprint.loaded >> 20,
        )  # fmt: skip
        return self.worker

    async def _loaded(self) -> Worker | None:
        """A worker that has loaded the file as it was just before; None when nobody wants it."""
        while True:
            model = await asyncio.to_thread(self.model)
            spec = self._spec(model)
            self._footprint = estimate(spec, model)
            self.needed_bytes = self._footprint.most
            self.state = "waiting"
            if not await self._room.wait_for(self._tenant, self.needed_bytes):
                return None
            self.held_bytes, self.stays_until = self.needed_bytes, math.inf
            if await asyncio.to_thread(self.model) is model:
                break
            self._free()  # it waited for another file's memory
        self.state, self.progress = "starting", 0.0
        self._load_began_at = time.monotonic()
        if not self._logged:
            logger.info("Tier %s: loading %s", self.name, model.name)
        try:
            return await Worker.start(
                spec,
                launch=self._launch,
                on_progress=self._on_progress,
                on_lost=self._lost,
                timeout_s=self._server.watchdog_s,
            )
        finally:
            self._progress_log.end(self.name)

    def answered(self) -> None:
        """Somebody has been answered, so the deaths of workers are counted anew."""
        self._n_deaths = 0

    async def stop(self) -> None:
        """End the worker. Its memory is free when this returns."""
        assert self.worker is not None
        self.state = "stopping"
        await self.worker.stop()
        self.worker = None  # not before: who cancels this must find it
        self.state = "stopped"
        self._free()

    def _lost(self, worker: Worker, end: EndReason) -> None:
        self.worker = None
        self._free()
        self.state = "stopped"
        self.reason = f"The worker died ({end}); the next request starts another."
        self._n_deaths += 1
        self._metrics.deaths.inc()
        self._on_lost(worker, end)
        if self._n_deaths >= MAX_DEATHS:
            self._fail_for_a_while(
                f"The worker died {self._n_deaths} times without an answer, at last with {end}."
            )

    def _free(self) -> None:
        self.held_bytes, self.stays_until = 0, 0.0
        self.has_stopped.set()
        self._room.changed()

    def _fail_for_a_while(self, reason: str) -> None:
        self.state = "failed"
        self._failed(reason)
        self._failed_signature = self.source.signature()
        if self.source.is_known:  # the header was fine, so trying again costs a process
            self._n_load_failures += 1
            self._retry_at = time.monotonic() + back_off_s(self._n_load_failures)

    def _failed(self, reason: str) -> None:
        """The log has each reason once until a load succeeds, however often it is tried."""
        self.reason = reason
        if reason != self._logged:
            self._logged = reason
            logger.error("Tier %s cannot be loaded: %s", self.name, reason)
