"""The process that owns one loaded model: reads messages, steps the engine, writes messages.

`python -m worker FD` serves the socket with that number. One thread receives: it tokenises and
checks new jobs beside the step loop, turns texts into tokens and back for whoever asks, and ends
the process when the server has gone. The main thread owns the engine and does all the writing.
A worker with an encoder has a loop of its own: batches in place of steps.
"""

import logging
import os
import queue
import signal
import socket
import sys
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import logs
from embedders import Embedder, new_embedder
from encoder_jobs import EncoderJobs
from encoder_requests import Model
from engine import wire
from engine.apart import Apart
from engine.backends.base import Engine, Tokenizer, load_encoder, load_engine
from engine.deep import DeepThread
from engine.grammar import Compiler
from errors import BadRequest, ModelLoadFailed
from generation_jobs import Job, Jobs, prepare
from rerankers import BGEReranker, EmbeddingReranker
from worker_requests import convert, failure

logger = logging.getLogger("worker")

T = TypeVar("T")

ENCODER_SEATS = 256  # jobs that an encoder takes: the batcher shares it out among them
LOGGERS = ("worker", "engine", "llama.cpp")
EXIT_OK, EXIT_ENGINE_FAILED = 0, 70  # 70: EX_SOFTWARE of sysexits.h


Answered = wire.Failed | wire.Tokens | wire.Text
Incoming = Job | Answered | wire.Embed | wire.Score | wire.Cancel | wire.Ping | wire.Shutdown
WorkOn = Callable[[wire.Request], Incoming]


class Receiver(DeepThread):
    """Reads the socket. Messages wait in `inbox`; requests are worked on before, beside the step
    loop: tokenised and checked, their grammars compiled, texts converted. `on_disconnect` is called
    as soon as the server has gone."""

    def __init__(self, sock: socket.socket, on_disconnect: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self.inbox: queue.SimpleQueue[Incoming] = queue.SimpleQueue()
        self._work_on: WorkOn | None = None
        self._sock = sock
        self._on_disconnect = on_disconnect

    def run(self) -> None:
        try:
            while (message := wire.receive(self._sock)) is not None:
                assert not isinstance(message, wire.Load)
                if isinstance(message, wire.Cancel | wire.Ping | wire.Shutdown):
                    self.inbox.put(message)
                else:
                    self.inbox.put(self._worked_on(message))
        finally:
            self._on_disconnect()
            self.inbox.put(wire.Shutdown())

    def begin(self, work_on: WorkOn) -> None:
        """From now on there may be jobs. Must be called before the server is told Ready."""
        self._work_on = work_on

    def _worked_on(self, request: wire.Request) -> Incoming:
        assert self._work_on is not None
        try:
            return self._work_on(request)
        except Exception as error:
            return failure(request.job, error)


def serve(
    sock: socket.socket,
    on_disconnect: Callable[[], None] = lambda: None,
    on_load: Callable[[wire.WorkerSpec], None] = lambda _: None,
) -> int:
    """Serve one server on `sock` until it says Shutdown or goes. Returns the exit code."""
    load = wire.receive(sock)
    if not isinstance(load, wire.Load):
        return EXIT_OK
    on_load(load.spec)
    for name in LOGGERS:
        logging.getLogger(name).setLevel(load.spec.log_level)
    receiver = Receiver(sock, on_disconnect)
    receiver.start()  # before the load, which takes long: without a server it is for nobody

    def send(*messages: wire.Message) -> None:
        if messages:
            sock.sendall(b"".join(map(wire.frame, messages)))

    spec = load.spec
    apart = Apart()
    engine: Engine | None = None
    model: Model | None = None
    try:
        if spec.encoder is None:
            engine = _load(load_engine, spec, send)
            if engine is None:
                return EXIT_OK
            receiver.begin(partial(_before_generating, engine, Compiler(engine.tokenizer)))
            send(wire.Ready(engine.n_ctx, engine.n_parallel))
            return _loop(engine, apart, receiver.inbox, send)
        model = _load(load_model, spec, send)
        if model is None:
            return EXIT_OK
        tokenizer = model.encoder.tokenizer
        receiver.begin(partial(_before_encoding, tokenizer))
        info = _encoder_info(model)
        send(wire.Ready(model.encoder.n_ctx, ENCODER_SEATS, info))
        jobs = EncoderJobs(model, tier=spec.name, batch_tokens=spec.encoder.batch_tokens)
        return _encoder_loop(jobs, apart, receiver.inbox, send)
    except ConnectionError:  # the server has gone
        return EXIT_OK
    finally:
        if engine is not None:
            engine.close()
        if model is not None:
            model.encoder.close()


def _load(
    load: Callable[[wire.WorkerSpec, Callable[[float], None]], T],
    spec: wire.WorkerSpec,
    send: Callable[..., None],
) -> T | None:
    """What is loaded, or None when the server was told why nothing is."""
    try:
        return load(spec, lambda fraction: send(wire.Progress(fraction)))
    except ModelLoadFailed as error:
        reason = error.message
    except MemoryError:
        reason = "There is not enough memory to load the model."
    send(wire.LoadFailed(reason))
    return None


def load_model(spec: wire.WorkerSpec, progress: Callable[[float], None]) -> Model:
    """An embedder or a cross-encoder. Raises ModelLoadFailed."""
    assert spec.encoder is not None
    encoder = load_encoder(spec, progress)
    if encoder.scale is None:
        return new_embedder(encoder, spec.encoder)
    reranker = BGEReranker(encoder)
    try:
        reranker.prove()
    except BaseException:
        encoder.close()
        raise
    return reranker


def _encoder_info(model: Model) -> wire.EncoderInfo:
    n_embd = model.encoder.n_embd
    if isinstance(model, Embedder):
        methods = EmbeddingReranker(model).methods
        return wire.EncoderInfo(sorted(model.outputs), [*methods], n_embd, model.n_colbert)
    return wire.EncoderInfo([], [*model.methods], n_embd)


def _before_generating(engine: Engine, compiler: Compiler, request: wire.Request) -> Incoming:
    if isinstance(request, wire.Generate):
        return prepare(request, engine, compiler)
    if isinstance(request, wire.Tokenize | wire.Detokenize):
        return convert(request, engine.tokenizer)
    raise BadRequest("The model generates text, and neither embeds nor scores.", param="model")


def _before_encoding(tokenizer: Tokenizer, request: wire.Request) -> Incoming:
    if isinstance(request, wire.Embed | wire.Score):
        return request  # tokenised between batches, a few texts at a time
    if isinstance(request, wire.Tokenize | wire.Detokenize):
        return convert(request, tokenizer)
    raise BadRequest("The model does not generate text.", param="model")


def _loop(
    engine: Engine,
    apart: Apart,
    inbox: "queue.SimpleQueue[Incoming]",
    send: Callable[..., None],
) -> int:
    jobs = Jobs(engine)
    while True:
        while not inbox.empty() or engine.idle:
            message = inbox.get()
            if isinstance(message, wire.Shutdown):
                return EXIT_OK
            if isinstance(message, Job):
                try:
                    jobs.admit(message)
                except Exception as error:
                    send(failure(message.request.job, error))
            elif isinstance(message, wire.Cancel):
                jobs.cancel(message.job)
            elif isinstance(message, wire.Ping):
                send(wire.Pong())
            elif not isinstance(message, wire.Embed | wire.Score):
                send(message)
        try:
            with apart:
                result = engine.step()
        except Exception:
            logger.critical("The engine cannot go on; the worker ends", exc_info=True)
            return EXIT_ENGINE_FAILED
        if messages := jobs.report(result):
            send(*messages)


def _encoder_loop(
    jobs: EncoderJobs,
    apart: Apart,
    inbox: "queue.SimpleQueue[Incoming]",
    send: Callable[..., None],
) -> int:
    is_over = False

    def hear(message: Incoming) -> None:
        nonlocal is_over
        if isinstance(message, wire.Shutdown):
            is_over = True
            jobs.clear()
        elif isinstance(message, wire.Embed | wire.Score):
            send(*jobs.admit(message))
        elif isinstance(message, wire.Cancel):
            jobs.cancel(message.job)
        elif isinstance(message, wire.Ping):
            send(wire.Pong())
        elif not isinstance(message, Job):
            send(message)

    def go_on() -> bool:
        """Asked while a batch is computed, which may take minutes."""
        while not inbox.empty():
            hear(inbox.get())
        return jobs.goes_on and not is_over

    while not is_over:
        if jobs.idle:
            hear(inbox.get())
        go_on()
        try:
            send(*jobs.tokenize())
            if not jobs.has_batch:
                continue
            with apart:
                messages = jobs.compute(go_on)
            send(*messages)
        except ConnectionError:
            raise
        except Exception:
            logger.critical("The encoder cannot go on; the worker ends", exc_info=True)
            return EXIT_ENGINE_FAILED
    return EXIT_OK


def _configure_logging(spec: wire.WorkerSpec | None = None) -> None:
    line = "%(levelname)s %(name)s[%(process)d]: %(message)s"
    logs.configure("WARNING", line, spec.log_format if spec else "text")


def main() -> None:
    _configure_logging()
    # a terminal or a supervisor signals the whole group; the server decides when its workers end
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sock = socket.socket(fileno=int(sys.argv[1]))
    # without its server a worker has nobody to serve, whatever it is doing
    try:
        code = serve(sock, lambda: os._exit(EXIT_OK), on_load=_configure_logging)
    except Exception:
        logger.critical("The worker ends by a fault of ours", exc_info=True)
        code = EXIT_ENGINE_FAILED
    sys.exit(code)


if __name__ == "__main__":
    main()
