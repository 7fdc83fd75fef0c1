"""The server's side of a worker: one in a thread, a process that dies, one that talks nonsense."""

import asyncio
import json
import os
import signal
import socket
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

import errors
from engine import wire
from engine.client import (
    EndReason,
    Handle,
    JobSink,
    Launcher,
    Worker,
    error_from,
    launch_process,
)
from engine.types import SamplingParams
from errors import ModelLoadFailed, ServiceError
from tests.serving import in_threads
from worker import EXIT_ENGINE_FAILED
from worker_requests import failure

WAIT_S = 20


def spec(script: str = "", **values: Any) -> wire.WorkerSpec:
    defaults: dict[str, Any] = {
        "name": "light",
        "backend": "fake",
        "n_ctx": 1000,
        "n_parallel": 2,
        "kv_tokens": 2000,
        "n_batch": 32,
        "n_threads": 1,
        "n_gpu_layers": 0,
        "log_level": "WARNING",
    }
    return wire.WorkerSpec(model_path=script, **defaults | values)


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., str]:
    def write(*rules: dict[str, Any], **values: Any) -> str:
        path = tmp_path / "script.json"
        path.write_text(json.dumps({"rules": rules, **values}))
        return str(path)

    return write


def generate(prompt: str, job: int = 1) -> wire.Generate:
    return wire.Generate([wire.Segment(prompt, True)], False, SamplingParams(), [], None, job=job)


class Sink(JobSink):
    """Keeps what it is told; the last word can be waited for."""

    def __init__(self) -> None:
        self.messages: list[wire.OfJob] = []
        self._first: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._last: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def deliver(self, message: wire.OfJob) -> None:
        assert not self._last.done(), "nothing comes after the last word"
        self.messages.append(message)
        if not self._first.done():
            self._first.set_result(None)
        if isinstance(message, wire.TokenOut):
            if message.done:
                self._last.set_result(None)
        elif not isinstance(message, wire.Started):
            self._last.set_result(None)

    async def first(self) -> None:
        await asyncio.wait_for(self._first, WAIT_S)

    async def last(self) -> None:
        await asyncio.wait_for(self._last, WAIT_S)

    @property
    def text(self) -> str:
        return "".join(m.text for m in self.messages if isinstance(m, wire.TokenOut))


class Started:
    """A worker that was started, and what it reported."""

    worker: Worker

    def __init__(self, launch: Launcher) -> None:
        self._launch = launch
        self.handle: Handle | None = None
        self.progress: list[float] = []
        self.is_loading = asyncio.Event()
        self.losses: list[tuple[Worker, EndReason]] = []
        self._is_lost = asyncio.Event()

    async def start(self, spec: wire.WorkerSpec, timeout_s: float = WAIT_S) -> Worker:
        self.worker = await Worker.start(
            spec,
            launch=self._keep_handle,
            on_progress=self._on_progress,
            on_lost=self._on_lost,
            timeout_s=timeout_s,
        )
        return self.worker

    async def lost(self) -> EndReason:
        await asyncio.wait_for(self._is_lost.wait(), WAIT_S)
        ((lost, reason),) = self.losses
        assert lost is self.worker
        return reason

    async def _keep_handle(self, theirs: socket.socket) -> Handle:
        self.handle = await self._launch(theirs)
        return self.handle

    def _on_progress(self, fraction: float) -> None:
        self.progress.append(fraction)
        self.is_loading.set()

    def _on_lost(self, lost: Worker, reason: EndReason) -> None:
        self.losses.append((lost, reason))
        self._is_lost.set()

    @property
    def has_process(self) -> bool:
        assert self.handle is not None
        try:
            os.kill(self.handle.pid, 0)
        except ProcessLookupError:
            return False
        return True


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def with_limit() -> None:
        await asyncio.wait_for(test(), 3 * WAIT_S)

    asyncio.run(with_limit())


# jobs


def test_a_job_hears_that_it_started_its_text_and_its_end() -> None:
    async def test() -> None:
        started = Started(in_threads)
        worker = await started.start(spec())
        assert started.progress == [0.0, 1.0]
        assert (worker.ready.n_ctx, worker.ready.n_parallel) == (1000, 2)
        sink = Sink()
        worker.generate(generate("Hi", job=5), sink)
        await sink.last()
        assert sink.messages[0] == wire.Started(5, 2, 0)
        assert sink.text == "You said: Hi"
        await worker.stop()
        assert started.losses == []

    run(test)


def test_each_job_hears_its_own_text() -> None:
    async def test() -> None:
        worker = await Started(in_threads).start(spec())
        sinks = {job: Sink() for job in range(6)}
        for job, sink in sinks.items():
            worker.generate(generate(f"prompt {job}", job), sink)
        for sink in sinks.values():
            await sink.last()
        assert [sink.text for sink in sinks.values()] == [f"You said: prompt {j}" for j in sinks]
        await worker.stop()

    run(test)


def test_a_job_that_is_refused_hears_why() -> None:
    async def test() -> None:
        worker = await Started(in_threads).start(spec(n_ctx=10))
        sink = Sink()
        worker.generate(generate("much too long", 1), sink)
        await sink.last()
        (failed,) = sink.messages
        assert isinstance(failed, wire.Failed)
        assert isinstance(error_from(failed), errors.ContextLengthExceeded)
        await worker.stop()

    run(test)


def test_a_text_is_converted_and_back_by_one_word_each() -> None:
    async def test() -> None:
        worker = await Started(in_threads).start(spec())
        tokens, text, bad = Sink(), Sink(), Sink()
        worker.convert(wire.Tokenize([wire.Segment("Hi", True)], True, 1), tokens)
        worker.convert(wire.Detokenize([72, 105], 2), text)
        worker.convert(wire.Detokenize([-1], 3), bad)
        for sink in (tokens, text, bad):
            await sink.last()
        assert tokens.messages == [wire.Tokens(1, [72, 105], [b"H", b"i"])]
        assert text.messages == [wire.Text(2, "Hi")]
        assert isinstance(bad.messages[0], wire.Failed)
        assert isinstance(error_from(bad.messages[0]), errors.BadRequest)
        assert not worker._expectants
        await worker.stop()

    run(test)


def test_a_cancelled_job_hears_no_more_and_makes_room(script: Callable[..., str]) -> None:
    async def test() -> None:
        path = script({"match": "long", "answer": "x" * 900}, step_ms=1)
        worker = await Started(in_threads).start(spec(path, n_parallel=1))
        sink, next_sink = Sink(), Sink()
        worker.generate(generate("long", 1), sink)
        worker.generate(generate("Hi", 2), next_sink)
        await sink.first()
        worker.cancel(1)
        worker.cancel(1)
        n_heard = len(sink.messages)
        await next_sink.last()
        assert next_sink.text == "You said: Hi"
        assert len(sink.messages) == n_heard
        await worker.stop()

    run(test)


# loads that fail


def test_a_load_that_fails_is_model_load_failed_with_the_reason(
    script: Callable[..., str],
) -> None:
    async def test() -> None:
        started = Started(in_threads)
        with pytest.raises(ModelLoadFailed, match="told to fail"):
            await started.start(spec(script(fault="load")))
        assert started.losses == []

    run(test)


def test_a_process_that_dies_while_it_loads_is_model_load_failed(
    script: Callable[..., str],
) -> None:
    async def test() -> None:
        started = Started(launch_process)
        with pytest.raises(ModelLoadFailed, match="killed by SIGKILL"):
            await started.start(spec(script(fault="load_crash")))
        assert not started.has_process
        assert started.losses == []

    run(test)


def test_a_start_that_is_given_up_during_the_launch_leaves_no_socket() -> None:
    async def test() -> None:
        launched: asyncio.Future[socket.socket] = asyncio.get_running_loop().create_future()

        async def launch(theirs: socket.socket) -> Handle:
            launched.set_result(theirs.dup())
            await asyncio.Event().wait()
            raise AssertionError("nobody sets it")

        task = asyncio.create_task(Started(launch).start(spec("unused")))
        with await launched as other:
            task.cancel()
            await asyncio.wait({task})
            other.settimeout(1)
            assert other.recv(1) == b"", "the other end is closed"

    run(test)


def test_a_start_that_is_given_up_leaves_no_process(script: Callable[..., str]) -> None:
    async def test() -> None:
        started = Started(launch_process)
        task = asyncio.create_task(started.start(spec(script(load_s=600))))
        await asyncio.wait_for(started.is_loading.wait(), WAIT_S)
        assert started.has_process
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not started.has_process

    run(test)


# ends


def test_a_process_that_dies_is_told_once_with_the_reason(script: Callable[..., str]) -> None:
    async def test() -> None:
        path = script({"match": "poison", "answer": "abcdef", "fault": "crash", "after": 3})
        started = Started(launch_process)
        worker = await started.start(spec(path))
        sink = Sink()
        worker.generate(generate("poison"), sink)
        assert (await started.lost()).startswith("killed by SIGKILL, probably because memory")
        assert sink.text == "abc"
        assert not started.has_process
        worker.cancel(1)  # whoever does not know yet may still say so
        worker.generate(generate("Hi", 2), Sink())
        await worker.stop()
        assert len(started.losses) == 1

    run(test)


def test_a_process_that_another_processor_would_run_says_how_to_build_for_this_one(
    script: Callable[..., str],
) -> None:
    async def test() -> None:
        started = Started(launch_process)
        await started.start(spec(script()))
        assert started.handle is not None
        os.kill(started.handle.pid, signal.SIGILL)
        assert "LLAMA_WHEEL_PAGE=none ./setup.sh" in await started.lost()

    run(test)


def test_a_process_that_hangs_is_ended(script: Callable[..., str]) -> None:
    async def test() -> None:
        started = Started(launch_process)
        path = script({"match": "poison", "fault": "hang"})
        worker = await started.start(spec(path), timeout_s=1.5)
        worker.generate(generate("poison"), Sink())
        assert await started.lost() == "killed by SIGKILL"
        assert not started.has_process

    run(test)


def test_a_worker_that_ends_by_itself_is_told_with_its_code(script: Callable[..., str]) -> None:
    async def test() -> None:
        started = Started(in_threads)
        running = await started.start(spec(script({"match": "poison", "fault": "step"})))
        for job in (1, 2, 3):
            sink = Sink()
            running.generate(generate("poison", job), sink)
            await (sink.last() if job < 3 else started.lost())
        assert await started.lost() == f"exit code {EXIT_ENGINE_FAILED}"

    run(test)


def test_stop_leaves_no_process_and_is_no_loss() -> None:
    async def test() -> None:
        started = Started(launch_process)
        worker = await started.start(spec())
        assert worker.pid not in (0, os.getpid())
        assert started.has_process
        await worker.stop()
        assert not started.has_process
        assert started.losses == []

    run(test)


# a worker that follows a script of frames


Receive = Callable[[], Awaitable[wire.ToWorker]]
Say = Callable[..., None]
Talk = Callable[[Receive, Say], Awaitable[None]]


class Scripted:
    """The handle of a worker that is a coroutine on the other end of the socket."""

    pid = 0

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.is_killed = False
        self._reader = reader
        self._writer = writer
        self._task: asyncio.Task[None]

    def live(self, talk: Talk) -> None:
        self._task = asyncio.create_task(self._live(talk))

    async def wait(self) -> EndReason:
        await asyncio.wait([self._task])
        if not self._task.cancelled():
            self._task.result()
        return "killed" if self.is_killed else "exit code 0"

    def kill(self) -> None:
        self.is_killed = True
        self._task.cancel()

    async def _live(self, talk: Talk) -> None:
        try:
            assert isinstance(await self._receive(), wire.Load)
            await talk(self._receive, self._say)
        finally:
            self._writer.close()

    async def _receive(self) -> wire.ToWorker:
        (length,) = struct.unpack("<I", await self._reader.readexactly(4))
        return wire._to_worker.decode(await self._reader.readexactly(length))

    def _say(self, *messages: wire.Message | bytes) -> None:
        for message in messages:
            self._writer.write(message if isinstance(message, bytes) else wire.frame(message))


READY = wire.Ready(100, 2)
FOR_EVER = asyncio.Event  # nobody sets it


def scripted(talk: Talk) -> Launcher:
    async def launch(theirs: socket.socket) -> Handle:
        handle = Scripted(*await asyncio.open_connection(sock=theirs.dup()))
        handle.live(talk)
        return handle

    return launch


def text(job: int, words: str, *, is_last: bool = False) -> wire.Step:
    done = wire.Done("stop", 1) if is_last else None
    return wire.Step([wire.TokenOut(job, words, done)])


def test_a_worker_that_does_not_end_when_told_is_killed() -> None:
    async def test() -> None:
        async def talk(receive: Receive, say: Say) -> None:
            say(READY)
            assert isinstance(await receive(), wire.Shutdown)
            await FOR_EVER().wait()

        started = Started(scripted(talk))
        worker = await started.start(spec())
        await worker.stop(timeout_s=0.01)
        assert isinstance(started.handle, Scripted)
        assert started.handle.is_killed
        assert started.losses == []

    run(test)


@pytest.mark.parametrize("says_more", [b"", b"\xff\xff\xff\xff", wire.frame(wire.LoadFailed("no"))])
def test_a_worker_that_could_not_be_started_is_killed(says_more: bytes) -> None:
    async def test() -> None:
        async def talk(receive: Receive, say: Say) -> None:
            say(wire.Progress(0.5), says_more)
            await FOR_EVER().wait()

        started = Started(scripted(talk))
        start = asyncio.create_task(started.start(spec()))
        await asyncio.wait_for(started.is_loading.wait(), WAIT_S)
        if not says_more:
            start.cancel()
        with pytest.raises((asyncio.CancelledError, ValueError, ModelLoadFailed)):
            await start
        assert isinstance(started.handle, Scripted)
        assert started.handle.is_killed

    run(test)


@pytest.mark.parametrize("junk", [b"\xff\xff\xff\xff", b"\x01\0\0\0\xc1", b"\x04\0\0\0junk"])
def test_a_worker_that_talks_nonsense_is_ended(junk: bytes) -> None:
    async def test() -> None:
        async def talk(receive: Receive, say: Say) -> None:
            say(READY, junk)
            await FOR_EVER().wait()

        started = Started(scripted(talk))
        await started.start(spec())
        assert await started.lost() == "killed"

    run(test)


def test_a_busy_worker_that_answers_pings_is_left_alone() -> None:
    async def test() -> None:
        async def talk(receive: Receive, say: Say) -> None:
            say(READY)
            assert isinstance(await receive(), wire.Generate)
            for _ in range(2):
                assert isinstance(await receive(), wire.Ping)
                say(wire.Pong())
            say(text(1, "at last", is_last=True))
            assert isinstance(await receive(), wire.Shutdown)

        started = Started(scripted(talk))
        worker = await started.start(spec(), timeout_s=2)
        sink = Sink()
        worker.generate(generate("a long prompt"), sink)
        await sink.last()  # after more than timeout_s without a word of the job
        await worker.stop()
        assert started.losses == []

    run(test)


def test_a_worker_that_was_stopped_together_with_the_server_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As with Ctrl-Z, or when a container is paused: the clock has gone on, and nobody could say
    anything."""

    async def test() -> None:
        loop = asyncio.get_running_loop()
        time, paused_s = loop.time, 0.0
        monkeypatch.setattr(loop, "time", lambda: time() + paused_s)

        async def talk(receive: Receive, say: Say) -> None:
            nonlocal paused_s
            say(READY)
            assert isinstance(await receive(), wire.Generate)
            paused_s = 1000.0
            assert isinstance(await receive(), wire.Ping)
            paused_s = 2000.0
            say(wire.Pong(), text(1, "at last", is_last=True))
            assert isinstance(await receive(), wire.Shutdown)

        started = Started(scripted(talk))
        worker = await started.start(spec(), timeout_s=0.6)
        sink = Sink()
        worker.generate(generate("a long prompt"), sink)
        await sink._last  # its limit is over
        await worker.stop()
        assert started.losses == []

    asyncio.run(test())


def test_a_load_that_was_stopped_together_with_the_server_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def test() -> None:
        loop = asyncio.get_running_loop()
        time, paused_s = loop.time, 0.0
        monkeypatch.setattr(loop, "time", lambda: time() + paused_s)

        async def talk(receive: Receive, say: Say) -> None:
            nonlocal paused_s
            say(wire.Progress(0.5))
            await started.is_loading.wait()
            paused_s = 1000.0
            for _ in range(10):  # turns of the event loop, in which timers end
                await asyncio.sleep(0)
            say(READY)
            assert isinstance(await receive(), wire.Shutdown)

        started = Started(scripted(talk))
        worker = await started.start(spec(), timeout_s=0.6)
        await worker.stop()

    asyncio.run(test())


def test_after_a_jobs_last_word_its_sink_hears_no_more() -> None:
    async def test() -> None:
        async def talk(receive: Receive, say: Say) -> None:
            say(READY)
            for _ in range(3):
                assert isinstance(await receive(), wire.Generate)
            say(text(1, "one", is_last=True), wire.Failed(2, None, "two"))
            say(text(1, "more"), text(2, "more"), text(9, "never asked"))
            say(text(3, "three", is_last=True))
            assert isinstance(await receive(), wire.Shutdown)

        worker = await Started(scripted(talk)).start(spec())
        sinks = [Sink(), Sink(), Sink()]
        for job, sink in enumerate(sinks, start=1):
            worker.generate(generate("Hi", job), sink)
        await sinks[2].last()
        assert [len(sink.messages) for sink in sinks] == [1, 1, 1]
        await worker.stop()

    run(test)


def test_a_cancelled_job_hears_no_more_and_its_worker_is_told_once() -> None:
    async def test() -> None:
        async def talk(receive: Receive, say: Say) -> None:
            say(READY)
            assert isinstance(await receive(), wire.Generate)
            say(wire.Started(1, 2, 0))
            assert await receive() == wire.Cancel(1)
            say(text(1, "on its way when the worker was told"))
            assert isinstance(await receive(), wire.Generate)
            say(text(2, "two", is_last=True))
            assert await receive() == wire.Shutdown()

        started = Started(scripted(talk))
        worker = await started.start(spec())
        first, second = Sink(), Sink()
        worker.generate(generate("Hi", 1), first)
        await first.first()
        worker.cancel(1)
        worker.cancel(1)
        worker.generate(generate("Hi", 2), second)
        await second.last()
        assert first.messages == [wire.Started(1, 2, 0)]
        await worker.stop()
        assert started.losses == []

    run(test)


# errors


def subclasses(of: type[ServiceError]) -> list[type[ServiceError]]:
    return [c for sub in of.__subclasses__() for c in (sub, *subclasses(sub))]


@pytest.mark.parametrize("error_class", subclasses(ServiceError))
def test_every_error_crosses_the_wire(error_class: type[ServiceError]) -> None:
    error = error_class("What happened.", param="prompt", n_ctx=8192)
    back = error_from(failure(1, error))
    assert type(back) is error_class
    assert back.body() == error.body()


def test_an_error_without_a_name_is_an_internal_error() -> None:
    back = error_from(failure(1, RuntimeError("secret")))
    assert isinstance(back, errors.InternalError)
    assert "secret" not in back.message


def test_an_error_of_an_unknown_name_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="of_tomorrow"):
        error_from(wire.Failed(1, "of_tomorrow", "?"))
