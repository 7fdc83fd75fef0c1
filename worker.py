"""The process that owns one loaded model: reads messages, steps the engine, writes messages.

`python -m worker FD` serves the socket with that number. One thread receives: it tokenises and
checks new jobs beside the step loop, and ends the process when the server has gone. The main
thread owns the engine and does all the writing.
"""

import logging
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from engine import wire
from engine.backends.base import Engine, Tokenizer, load_engine
from engine.text import TextStream
from engine.types import Finish, StepResult
from errors import BadRequest, ContextLengthExceeded, InternalError, ModelLoadFailed, ServiceError

logger = logging.getLogger("worker")

LOGGERS = ("worker", "engine", "llama.cpp")
EXIT_OK, EXIT_ENGINE_FAILED = 0, 70  # 70: EX_SOFTWARE of sysexits.h


@dataclass(slots=True)
class Job:
    """One request in the worker: its prompt, its text so far and its limits."""

    request: wire.Generate
    prompt: list[int]
    max_tokens: int
    text: TextStream
    n_prompt: int = field(init=False)
    n_cached: int = 0
    n_tokens: int = 0

    def __post_init__(self) -> None:
        self.n_prompt = len(self.prompt)

    def accept(self, token: int, tokenizer: Tokenizer) -> wire.TokenOut | None:
        """What the client gets for this token; None while it is all held back."""
        if self.max_tokens == 0:  # asked for the prefill only
            return self._last("", "length")
        self.n_tokens += 1
        if tokenizer.ends_generation(token):
            return self._last(self.text.finish(), "stop")
        text = self.text.push(tokenizer.piece(token))
        if self.text.stopped:
            return self._last(text, "stop")
        if self.n_tokens >= self.max_tokens:
            return self._last(text + self.text.finish(), "length")
        return wire.TokenOut(self.request.job, text) if text else None

    def _last(self, text: str, finish: Finish) -> wire.TokenOut:
        usage = wire.Usage(self.n_prompt, self.n_cached, self.n_tokens)
        return wire.TokenOut(self.request.job, text, wire.Done(finish, usage))


def prepare(request: wire.Generate, engine: Engine) -> Job:
    """Tokenise and check a request. Raises a ServiceError that is the client's answer."""
    prompt = _tokenize(request, engine.tokenizer)
    if not prompt:
        raise BadRequest("The prompt is empty.", param="prompt")
    n_vocab = engine.tokenizer.n_vocab
    if any(not 0 <= token < n_vocab for token in prompt):
        raise BadRequest(f"Token ids must be from 0 to {n_vocab - 1}.", param="prompt")
    n_left = engine.n_ctx - len(prompt)
    if n_left < 1:
        raise ContextLengthExceeded(
            f"The prompt has {len(prompt):,} tokens; the tier takes {engine.n_ctx:,} with the "
            "answer (its N_CTX).",
            param="prompt",
            n_prompt_tokens=len(prompt),
            n_ctx=engine.n_ctx,
        )
    max_tokens = n_left if request.max_tokens is None else min(request.max_tokens, n_left)
    return Job(request, prompt, max_tokens, TextStream(request.stop))


def _tokenize(request: wire.Generate, tokenizer: Tokenizer) -> list[int]:
    ids: list[int] = []
    for n, piece in enumerate(request.prompt):
        if isinstance(piece, int):
            ids.append(piece)
        else:
            ids += tokenizer.tokenize(
                piece.text, parse_special=piece.parse_special, continues=n > 0
            )
    is_text = any(isinstance(piece, wire.Segment) for piece in request.prompt[:1])
    bos = tokenizer.bos
    if request.add_bos and is_text and bos is not None and ids[:1] != [bos]:
        ids.insert(0, bos)
    return ids


Incoming = Job | wire.Cancel | wire.Failed | wire.Ping | wire.Shutdown


class Receiver(threading.Thread):
    """Reads the socket. Messages wait in `inbox`; new jobs are tokenised and checked here, beside
    the step loop. `on_disconnect` is called as soon as the server has gone."""

    def __init__(self, sock: socket.socket, on_disconnect: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self.inbox: queue.SimpleQueue[Incoming] = queue.SimpleQueue()
        self.engine: Engine | None = None  # must be set before the server is told Ready
        self._sock = sock
        self._on_disconnect = on_disconnect

    def run(self) -> None:
        try:
            while (message := wire.receive(self._sock)) is not None:
                assert not isinstance(message, wire.Load)
                self.inbox.put(
                    self._prepare(message) if isinstance(message, wire.Generate) else message
                )
        finally:
            self._on_disconnect()
            self.inbox.put(wire.Shutdown())

    def _prepare(self, request: wire.Generate) -> Job | wire.Failed:
        assert self.engine is not None
        try:
            return prepare(request, self.engine)
        except Exception as error:
            return _failure(request.job, error)


def serve(sock: socket.socket, on_disconnect: Callable[[], None] = lambda: None) -> int:
    """Serve one server on `sock` until it says Shutdown or goes. Returns the exit code."""
    load = wire.receive(sock)
    if not isinstance(load, wire.Load):
        return EXIT_OK
    for name in LOGGERS:
        logging.getLogger(name).setLevel(load.spec.log_level)
    receiver = Receiver(sock, on_disconnect)
    receiver.start()  # before the load, which takes long: without a server it is for nobody

    def send(*messages: wire.Message) -> None:
        sock.sendall(b"".join(map(wire.frame, messages)))

    engine = None
    try:
        engine = _load(load.spec, send)
        if engine is None:
            return EXIT_OK
        receiver.engine = engine
        send(wire.Ready(engine.n_ctx, engine.n_parallel, engine.tokenizer.n_vocab))
        return _loop(engine, receiver.inbox, send)
    except ConnectionError:  # the server has gone
        return EXIT_OK
    finally:
        if engine is not None:
            engine.close()


def _load(spec: wire.WorkerSpec, send: Callable[..., None]) -> Engine | None:
    """The engine, or None when the server was told why there is none."""
    try:
        return load_engine(spec, lambda fraction: send(wire.Progress(fraction)))
    except ModelLoadFailed as error:
        reason = error.message
    except MemoryError:
        reason = "There is not enough memory to load the model."
    send(wire.LoadFailed(reason))
    return None


def _loop(
    engine: Engine,
    inbox: "queue.SimpleQueue[Incoming]",
    send: Callable[..., None],
) -> int:
    jobs: dict[int, Job] = {}
    while True:
        while not inbox.empty() or engine.idle:
            message = inbox.get()
            if isinstance(message, wire.Shutdown):
                return EXIT_OK
            if isinstance(message, Job):
                _admit(message, jobs, engine, send)
            elif isinstance(message, wire.Cancel):
                jobs.pop(message.job, None)
                engine.cancel(message.job)
            elif isinstance(message, wire.Ping):
                send(wire.Pong())
            else:
                send(message)
        try:
            result = engine.step()
        except Exception:
            logger.critical("The engine cannot go on; the worker ends", exc_info=True)
            return EXIT_ENGINE_FAILED
        if messages := _report(result, jobs, engine):
            send(*messages)


def _admit(job: Job, jobs: dict[int, Job], engine: Engine, send: Callable[..., None]) -> None:
    job_id = job.request.job
    try:
        engine.admit(job_id, job.prompt, job.request.sampling)
    except Exception as error:
        send(_failure(job_id, error))
    else:
        jobs[job_id] = job


def _report(result: StepResult, jobs: dict[int, Job], engine: Engine) -> list[wire.Message]:
    """The messages for one step. Jobs that ended are taken out of `jobs` and the engine."""
    messages: list[wire.Message] = []
    failed = {job_id for job_id, _ in result.failed}
    for job_id, n_cached in result.started:
        job = jobs[job_id]
        job.n_cached = n_cached
        if job_id not in failed:  # else its client is told by an HTTP status
            messages.append(wire.Started(job_id, job.n_prompt, n_cached))
    outs = []
    for job_id, token in result.tokens:
        out = jobs[job_id].accept(token, engine.tokenizer)
        if out is None:
            continue
        outs.append(out)
        if out.done:
            del jobs[job_id]
            engine.cancel(job_id)
    if outs:
        messages.append(wire.Step(outs))
    for job_id, error in result.failed:
        del jobs[job_id]
        messages.append(_failure(job_id, error))
    return messages


def _failure(job: int, error: Exception) -> wire.Failed:
    if not isinstance(error, ServiceError):
        logger.error("Job %d failed", job, exc_info=error)
        error = InternalError("The model failed at this request. The log has the reason.")
    return wire.Failed(job, error.code, error.message, error.param, error.numbers)


def main() -> None:
    logging.basicConfig(level="NOTSET", format="%(levelname)s %(name)s[%(process)d]: %(message)s")
    # a terminal or a supervisor signals the whole group; the server decides when its workers end
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sock = socket.socket(fileno=int(sys.argv[1]))
    # without its server a worker has nobody to serve, whatever it is doing
    sys.exit(serve(sock, on_disconnect=lambda: os._exit(EXIT_OK)))


if __name__ == "__main__":
    main()
