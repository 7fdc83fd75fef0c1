"""The process that owns one loaded model: reads messages, steps the engine, writes messages.

`python -m worker FD` serves the socket with that number. One thread receives: it tokenises and
checks new jobs beside the step loop, turns texts into tokens and back for whoever asks, and ends
the process when the server has gone. The main thread owns the engine and does all the writing.
A worker with an encoder has a loop of its own: batches in place of steps.
"""

import itertools
import logging
import os
import queue
import re
import signal
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import msgspec

import logs
from embedders import Embedder, new_embedder
from encoder_jobs import EncoderJobs, Model, failure
from engine import wire
from engine.backends.base import Constraint, Engine, Tokenizer, load_encoder, load_engine
from engine.grammar import Compiler, GrammarState, control_token
from engine.text import TextStream
from engine.thinking import Thoughts
from engine.types import Finish, Sampled, StepResult
from errors import BadRequest, ContextLengthExceeded, ModelLoadFailed
from rerankers import BGEReranker, EmbeddingReranker

logger = logging.getLogger("worker")

T = TypeVar("T")

# The further answers of a job wait for the first ones of jobs that come within so many seconds.
SECOND_ANSWER_RANK = 10.0
ENCODER_SEATS = 256  # jobs that an encoder takes: the batcher shares it out among them
LOGGERS = ("worker", "engine", "llama.cpp")
EXIT_OK, EXIT_ENGINE_FAILED = 0, 70  # 70: EX_SOFTWARE of sysexits.h


@dataclass(slots=True)
class Job:
    """One request in the worker, checked and tokenised."""

    request: wire.Generate
    prompt: list[int]
    max_tokens: int
    grammar: GrammarState | None  # at its beginning
    logit_bias: dict[int, float]
    visible: dict[int, bytes]  # control tokens that the text shows
    ending: list[int]  # of thoughts that take too long
    has_started: bool = False
    answers: dict[int, "Answer"] = field(default_factory=dict)  # unfinished, by sequence


class Answer:
    """One of the answers to a job: its text so far, and what it may say next."""

    def __init__(self, job: Job, index: int, tokenizer: Tokenizer) -> None:
        self.job = job
        self._index = index
        self._tokenizer = tokenizer
        self._grammar = job.grammar.copy() if job.grammar else None
        self._thoughts = None
        if thinking := job.request.thinking:
            self._thoughts = Thoughts(thinking, self._piece, job.ending, self._grammar)
        self._text = TextStream([] if self._thoughts else job.request.stop)
        self.n_guessed = self.n_right = 0
        self._n_tokens = 0
        self._logprob = 0.0
        self._held: deque[tuple[int, wire.TokenLogprob]] = deque()  # with where their text begins
        self._n_bytes = 0  # of all tokens
        self._n_bytes_out = 0

    @property
    def constraint(self) -> Constraint | None:
        return self._thoughts or self._grammar

    def accept(self, sampled: Sampled) -> wire.TokenOut | None:
        """What the client gets for this token; None while it is all held back."""
        if self.job.max_tokens == 0:  # asked for the prefill only
            return self._last("", "length")
        self._n_tokens += 1
        if self._tokenizer.ends_generation(sampled.token):
            return self._last(self._text.finish(), "stop")
        piece = self._piece(sampled.token)
        self._hold(piece, sampled)
        if self._thoughts and self._thoughts.is_over:
            self._text.stops = tuple(self.job.request.stop)
        text = self._text.push(piece)
        if self._text.stop is not None:
            return self._last(text, "stop")
        if self._n_tokens >= self.job.max_tokens:
            return self._last(text + self._text.finish(), "length")
        return self._out(text, None) if text else None

    def _piece(self, token: int) -> bytes:
        return self.job.visible.get(token) or self._tokenizer.piece(token)

    def _hold(self, piece: bytes, sampled: Sampled) -> None:
        if sampled.logprob is None:
            return
        self._logprob += sampled.logprob
        top = [(self._piece(token), logprob) for token, logprob in sampled.top]
        self._held.append((self._n_bytes, wire.TokenLogprob(piece, sampled.logprob, top)))
        self._n_bytes += len(piece)

    def _last(self, text: str, finish: Finish) -> wire.TokenOut:
        mean = None
        if self.job.request.sampling.n_logprobs is not None:
            mean = self._logprob / max(self._n_tokens, 1)
        is_valid = self._grammar.is_complete if self._grammar else None
        stop = self._text.stop
        done = wire.Done(finish, self._n_tokens, mean, is_valid, stop, self.n_guessed, self.n_right)
        return self._out(text, done)

    def _out(self, text: str, done: wire.Done | None) -> wire.TokenOut:
        self._n_bytes_out += len(text.encode())
        logprobs = []
        while self._held and self._held[0][0] < self._n_bytes_out:
            logprobs.append(self._held.popleft()[1])
        return wire.TokenOut(
            self.job.request.job, text, done, self._index, self._n_tokens, logprobs
        )


def prepare(request: wire.Generate, engine: Engine, compiler: Compiler) -> Job:
    """Tokenise and check a request. Raises a ServiceError that is the client's answer."""
    grammar = compiler.compile(request.grammar) if request.grammar else None
    bias = _logit_bias(request.logit_bias, engine.tokenizer)
    prompt = _tokenize(request.prompt, request.add_bos, engine.tokenizer)
    if not prompt:
        raise BadRequest("The prompt is empty.", param="prompt")
    _check_ids(prompt, engine.tokenizer, "prompt")
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
    tokenizer = engine.tokenizer
    marks = {text: control_token(text, tokenizer) for text in request.visible}
    visible = {token: text.encode() for text, token in marks.items() if token is not None}
    ending: list[int] = []
    if request.thinking and request.thinking.budget is not None:
        ending = tokenizer.tokenize(request.thinking.ending, parse_special=True, continues=True)
    return Job(request, prompt, max_tokens, grammar, bias, visible, ending)


def convert(
    request: wire.Tokenize | wire.Detokenize, tokenizer: Tokenizer
) -> wire.Tokens | wire.Text:
    """Text to tokens, or tokens to text. Raises a ServiceError that is the client's answer."""
    if isinstance(request, wire.Tokenize):
        ids = _tokenize(request.segments, request.add_bos, tokenizer)
        return wire.Tokens(request.job, ids, [tokenizer.literal(token) for token in ids])
    _check_ids(request.tokens, tokenizer, "tokens")
    data = b"".join(map(tokenizer.literal, request.tokens))
    return wire.Text(request.job, data.decode(errors="replace"))


def _check_ids(ids: Iterable[int], tokenizer: Tokenizer, param: str) -> None:
    if any(not 0 <= token < tokenizer.n_vocab for token in ids):
        raise BadRequest(f"Token ids must be from 0 to {tokenizer.n_vocab - 1}.", param=param)


def _logit_bias(asked: dict[str, float], tokenizer: Tokenizer) -> dict[int, float]:
    bias: dict[int, float] = {}
    for key, value in asked.items():
        if not re.fullmatch(r"-?[0-9]+", key):
            ids = tokenizer.tokenize(key, parse_special=True, continues=True)
            bias |= dict.fromkeys(ids, value)
        elif len(key) < 10 and 0 <= int(key) < tokenizer.n_vocab:
            bias[int(key)] = value
        else:
            raise BadRequest(
                f"{key} is no token; ids go from 0 to {tokenizer.n_vocab - 1}.", param="logit_bias"
            )
    return bias


def _tokenize(
    prompt: Sequence[wire.Segment | int], add_bos: bool, tokenizer: Tokenizer
) -> list[int]:
    ids: list[int] = []
    for n, piece in enumerate(prompt):
        if isinstance(piece, int):
            ids.append(piece)
        else:
            ids += tokenizer.tokenize(
                piece.text, parse_special=piece.parse_special, continues=n > 0
            )
    is_text = any(isinstance(piece, wire.Segment) for piece in prompt[:1])
    bos = tokenizer.bos
    if add_bos and is_text and bos is not None and ids[:1] != [bos]:
        ids.insert(0, bos)
    return ids


Answered = wire.Failed | wire.Tokens | wire.Text
Incoming = Job | Answered | wire.Embed | wire.Score | wire.Cancel | wire.Ping | wire.Shutdown
WorkOn = Callable[[wire.Request], Incoming]


class Receiver(threading.Thread):
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
        sock.sendall(b"".join(map(wire.frame, messages)))

    spec = load.spec
    engine: Engine | None = None
    model: Model | None = None
    try:
        if spec.encoder is None:
            engine = _load(load_engine, spec, send)
            if engine is None:
                return EXIT_OK
            receiver.begin(partial(_before_generating, engine, Compiler(engine.tokenizer)))
            send(wire.Ready(engine.n_ctx, engine.n_parallel, engine.tokenizer.n_vocab))
            return _loop(engine, receiver.inbox, send)
        model = _load(load_model, spec, send)
        if model is None:
            return EXIT_OK
        tokenizer = model.encoder.tokenizer
        receiver.begin(partial(_before_encoding, tokenizer))
        info = _encoder_info(model)
        send(wire.Ready(model.encoder.n_ctx, ENCODER_SEATS, tokenizer.n_vocab, info))
        jobs = EncoderJobs(model, tier=spec.name, batch_tokens=spec.encoder.batch_tokens)
        return _encoder_loop(jobs, receiver.inbox, send)
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
            result = engine.step()
        except Exception:
            logger.critical("The engine cannot go on; the worker ends", exc_info=True)
            return EXIT_ENGINE_FAILED
        if messages := jobs.report(result):
            send(*messages)


def _encoder_loop(
    jobs: EncoderJobs,
    inbox: "queue.SimpleQueue[Incoming]",
    send: Callable[..., None],
) -> int:
    is_over = False

    def hear(message: Incoming) -> None:
        nonlocal is_over
        if isinstance(message, wire.Shutdown):
            is_over = True
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
            send(*jobs.compute(go_on))
        except ConnectionError:
            raise
        except Exception:
            logger.critical("The encoder cannot go on; the worker ends", exc_info=True)
            return EXIT_ENGINE_FAILED
    return EXIT_OK


class Jobs:
    """The jobs in the engine, and the sequences that answer them."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._jobs: dict[int, Job] = {}
        self._answers: dict[int, Answer] = {}  # by sequence
        self._ids = itertools.count(1)

    def admit(self, job: Job) -> None:
        """Answer a job: after one prefill, which its sequences share."""
        self._jobs[job.request.job] = job
        sampling = job.request.sampling
        for index in range(job.request.n):
            number = next(self._ids)
            seed = (sampling.seed + index) % 2**32
            own = msgspec.structs.replace(sampling, seed=seed, logit_bias=job.logit_bias)
            answer = Answer(job, index, self._engine.tokenizer)
            try:
                self._engine.admit(
                    number,
                    job.prompt,
                    own,
                    answer.constraint,
                    reuses=job.request.reuse or index > 0,  # of the job's own first one
                    rank=job.request.rank + SECOND_ANSWER_RANK * index,
                )
            except Exception:
                self.cancel(job.request.job)
                raise
            job.answers[number] = self._answers[number] = answer

    def cancel(self, job_id: int) -> None:
        """Forget a job. Unknown ones are fine: it may just have ended."""
        job = self._jobs.pop(job_id, None)
        for number in job.answers if job else ():
            del self._answers[number]
            self._engine.cancel(number)

    def report(self, result: StepResult) -> list[wire.Message]:
        """The messages for one step. What ended is forgotten."""
        failed = {self._answers[number].job.request.job: error for number, error in result.failed}
        messages: list[wire.Message] = []
        messages += (failure(job_id, error) for job_id, error in failed.items())
        for job_id in failed:  # one that starts and fails at once is told by an HTTP status
            self.cancel(job_id)
        for number, n_cached in result.started:
            answer = self._answers.get(number)
            if answer is not None and not answer.job.has_started:
                job = answer.job
                job.has_started = True
                messages.append(wire.Started(job.request.job, len(job.prompt), n_cached))
        for number, n_guesses in result.guessed:
            if answer := self._answers.get(number):
                answer.n_guessed += n_guesses
        for number in result.right:
            if answer := self._answers.get(number):
                answer.n_right += 1
        outs = []
        for number, sampled in result.tokens:
            answer = self._answers.get(number)
            if answer is None:
                continue
            out = answer.accept(sampled)
            if out is not None:
                outs.append(out)
                if out.done:
                    self._finish(number, answer.job)
        if outs:
            messages.append(wire.Step(outs))
        return messages

    def _finish(self, number: int, job: Job) -> None:
        self._engine.cancel(number)
        del self._answers[number]
        del job.answers[number]
        if not job.answers:
            del self._jobs[job.request.job]


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
