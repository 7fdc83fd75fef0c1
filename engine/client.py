"""The server's side of a worker: starts it, sends it jobs, hands on what it says, ends it."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from engine import wire
from errors import BadRequest, ModelLoadFailed, ServiceError

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent
# So often does a thread of OpenMP look whether the others are there before it sleeps: some 2 ms. To
# wake one takes longer than what it waits for, so threads that slept are late and sleep again.
SPIN_COUNT = 100_000
LOAD_PATIENCE = 5  # times the timeout may a load be silent: some of its steps say nothing
WATCHDOG_LOOKS = 4  # in its timeout
EndReason = str  # how a worker ended, for people


class Handle(Protocol):
    """A started worker as the operating system sees it."""

    pid: int

    async def wait(self) -> EndReason: ...

    def kill(self) -> None: ...


Launcher = Callable[[socket.socket], Awaitable[Handle]]


class JobSink(Protocol):
    """Who gets what the worker says about one job."""

    def deliver(self, message: wire.OfJob) -> None: ...


@dataclass(slots=True)
class _Expectant:
    sink: JobSink
    n_open: int  # answers that are not done, texts that are not computed


class _Line(asyncio.Protocol):
    """The socket to a worker. Its messages are handed on as they come, without a task between: that
    would be a turn of the event loop for each token."""

    transport: asyncio.Transport

    def __init__(self, name: str, handle: Handle) -> None:
        self.heard: asyncio.Queue[wire.FromWorker | None] = asyncio.Queue()
        self.on_message: Callable[[wire.FromWorker | None], None] = self.heard.put_nowait
        self._name = name
        self._handle = handle
        self._frames = wire.Frames()

    async def next(self, timeout_s: float) -> wire.FromWorker | None:
        """What is said next during a load. Raises ModelLoadFailed when that takes too long, in
        looks as those of the watchdog."""
        for _ in range(LOAD_PATIENCE * WATCHDOG_LOOKS):
            with contextlib.suppress(asyncio.TimeoutError):
                return await asyncio.wait_for(self.heard.get(), timeout_s / WATCHDOG_LOOKS)
        raise ModelLoadFailed("The load got no further, and was ended.")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        try:
            for message in self._frames.feed(data):
                self.on_message(message)
        except Exception:
            logger.exception("What worker %s said makes no sense; it is ended", self._name)
            self._handle.kill()
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.on_message(None)


class Worker:
    """A loaded model in its process. Make one with `Worker.start`."""

    def __init__(
        self,
        name: str,
        handle: Handle,
        line: _Line,
        ready: wire.Ready,
        on_lost: Callable[["Worker", EndReason], None],
        timeout_s: float,
    ) -> None:
        self.name = name
        self.ready = ready
        self.pid = handle.pid
        self._handle = handle
        self._transport = line.transport
        self._has_gone = asyncio.Event()
        self._on_lost = on_lost
        self._expectants: dict[int, _Expectant] = {}  # by job
        self._n_silent = 0  # times that the watchdog has looked since it said something
        self._is_stopping = False
        self._task = asyncio.create_task(self._live(), name=f"worker {name}")
        self._watchdog = asyncio.create_task(self._watch(timeout_s), name=f"watchdog {name}")
        line.on_message = self._hear
        while not line.heard.empty():
            self._hear(line.heard.get_nowait())

    @classmethod
    async def start(
        cls,
        spec: wire.WorkerSpec,
        *,
        launch: Launcher,
        on_progress: Callable[[float], None],
        on_lost: Callable[["Worker", EndReason], None],
        timeout_s: float,
    ) -> "Worker":
        """Start a worker and wait until its model is loaded. Raises ModelLoadFailed.

        `on_lost` is called once if it ends without being told to. It is ended when it has jobs and
        its step loop says nothing for `timeout_s`, and when a load gets no further.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                handle = await launch(theirs)
            except BaseException as error:
                ours.close()
                if isinstance(error, OSError):
                    raise ModelLoadFailed(f"The worker cannot be started: {error}.") from error
                raise
        line = _Line(spec.name, handle)
        try:
            await asyncio.get_running_loop().create_connection(lambda: line, sock=ours)
            line.transport.write(wire.frame(wire.Load(spec)))
            while isinstance(message := await line.next(timeout_s), wire.Progress):
                on_progress(message.fraction)
            if isinstance(message, wire.Ready):
                return cls(spec.name, handle, line, message, on_lost, timeout_s)
            if isinstance(message, wire.LoadFailed):
                raise ModelLoadFailed(message.reason)
            reason = await handle.wait()
            raise ModelLoadFailed(f"The worker ended while it loaded the model: {reason}.")
        except BaseException:
            getattr(line, "transport", ours).close()  # whoever has the socket by now
            handle.kill()
            await asyncio.shield(handle.wait())
            raise

    def generate(self, request: wire.Generate, sink: JobSink) -> None:
        self._submit(request, sink, request.n)

    def encode(self, request: wire.Embed | wire.Score, sink: JobSink) -> None:
        asked = request.inputs if isinstance(request, wire.Embed) else request.pairs
        self._submit(request, sink, len(asked))

    def convert(self, request: wire.Tokenize | wire.Detokenize, sink: JobSink) -> None:
        self._submit(request, sink, 1)

    def _submit(self, request: wire.Request, sink: JobSink, n_answers: int) -> None:
        data = wire.frame(request)  # may fail: before anybody counts on an answer
        if not self._expectants:
            self._n_silent = 0
        self._expectants[request.job] = _Expectant(sink, n_answers)
        self._write(data)

    def cancel(self, job: int) -> None:
        """The sink hears no more of the job, and the worker drops it before its next step."""
        if self._expectants.pop(job, None) is not None:
            self._send(wire.Cancel(job))

    async def stop(self, timeout_s: float = 5.0) -> None:
        """End the worker: politely first. Its memory is free when this returns."""
        self._is_stopping = True
        self._send(wire.Shutdown())
        try:
            await asyncio.wait_for(asyncio.shield(self._task), timeout_s)
        except asyncio.TimeoutError:
            self._handle.kill()
            await self._task

    def _send(self, message: wire.Message) -> None:
        self._write(wire.frame(message))

    def _write(self, data: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(data)

    def _hear(self, message: wire.FromWorker | None) -> None:
        """None: it has gone."""
        if message is None:
            self._has_gone.set()
        else:
            self._n_silent = 0
            self._dispatch(message)

    async def _live(self) -> None:
        await self._has_gone.wait()
        self._watchdog.cancel()
        reason = await self._handle.wait()
        if not self._is_stopping:
            self._on_lost(self, reason)

    async def _watch(self, timeout_s: float) -> None:
        """Looks are counted and not time, which also passes while server and worker are stopped."""
        while True:
            await asyncio.sleep(timeout_s / WATCHDOG_LOOKS)
            self._n_silent += 1
            if self._expectants and self._n_silent > WATCHDOG_LOOKS:
                logger.error("Worker %s has hung for %.0f s and is ended", self.name, timeout_s)
                self._handle.kill()
            elif self._expectants and self._n_silent > WATCHDOG_LOOKS / 2:
                self._send(wire.Ping())

    def _dispatch(self, message: wire.FromWorker) -> None:
        if isinstance(message, wire.Step):
            for out in message.outs:
                self._deliver(out.job, out)
        elif not isinstance(message, wire.Progress | wire.Ready | wire.LoadFailed | wire.Pong):
            self._deliver(message.job, message)

    def _deliver(self, job: int, message: wire.OfJob) -> None:
        expectant = self._expectants.get(job)
        if expectant is None:
            return
        if isinstance(message, wire.TokenOut):
            expectant.n_open -= message.done is not None
        elif isinstance(message, wire.Vectors | wire.Scores):
            expectant.n_open -= len(message.items)
        elif not isinstance(message, wire.Started):  # the last word
            expectant.n_open = 0
        if expectant.n_open == 0:
            del self._expectants[job]
        expectant.sink.deliver(message)


def error_from(failed: wire.Failed) -> ServiceError:
    """The exception that a worker's Failed stands for."""
    # the one without a code first, then whoever has one
    classes: list[type[ServiceError]] = [BadRequest, *ServiceError.__subclasses__()]
    for error_class in classes:
        if error_class.code == failed.code:
            return error_class(failed.message, param=failed.param, **failed.numbers)
        classes += error_class.__subclasses__()
    raise ValueError(f"no error has the code {failed.code!r}")


# launchers


class _Process:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.pid = process.pid
        self._process = process
        self._is_killed = False  # by us

    async def wait(self) -> EndReason:
        code = await self._process.wait()
        if code == -signal.SIGKILL and not self._is_killed:  # the kernel says no more than that
            return "killed by SIGKILL, probably because memory ran out: see MEMORY_LIMIT"
        if code == -signal.SIGILL:
            return (
                "killed by SIGILL, probably because llama.cpp was built for another processor: "
                "`rm -rf .venv; LLAMA_WHEEL_PAGE=none ./setup.sh` builds it for this one"
            )
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def kill(self) -> None:
        self._is_killed = True
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()


async def launch_process(theirs: socket.socket) -> Handle:
    """A worker in a process of its own, started afresh: GPU libraries do not survive a fork."""
    environment = {
        "GOMP_SPINCOUNT": str(SPIN_COUNT),
        "OPENBLAS_THREAD_TIMEOUT": "4",  # and numpy's, after each product, the model's own
        "OPENBLAS_NUM_THREADS": "1",  # numpy's own threads would wait for cores where those spin
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "worker",
        str(theirs.fileno()),
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
        cwd=ROOT,
        env=environment,
    )
    return _Process(process)
