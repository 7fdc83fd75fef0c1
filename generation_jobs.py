"""The requests in a worker that generates: checked and tokenised, in the engine, answered."""

import codecs
import itertools
import re
from collections import deque
from dataclasses import dataclass, field

import msgspec
import numpy as np
import numpy.typing as npt

from engine import wire
from engine.backends.base import Constraint, Engine, Tokenizer
from engine.grammar import Compiler, GrammarState, control_token
from engine.text import TextStream
from engine.thinking import Thoughts
from engine.types import Finish, Sampled, StepResult
from errors import BadRequest, ContextLengthExceeded
from worker_requests import check_ids, failure, tokenize

# The further answers of a job wait for the first ones of jobs that come within so many seconds.
SECOND_ANSWER_RANK = 10.0
PROMPT_PART = 512  # tokens of a prompt whose log probabilities are in one frame


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
    scored: "ScoredPrompt | None" = None  # where its log probabilities are asked for
    has_started: bool = False
    answers: dict[int, "Answer"] = field(default_factory=dict)  # unfinished, by sequence


class ScoredPrompt:
    """A prompt whose tokens have log probabilities. Their texts are that of the prompt: what the
    tokenizer has put there, BOS and spaces, is none."""

    def __init__(self, request: wire.Generate, prompt: list[int], tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._n_tokens = len(prompt)
        texts = (piece.text for piece in request.prompt if isinstance(piece, wire.Segment))
        self._text = "".join(texts)
        self._at = 0  # in it
        self._spelling = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._tokens: list[wire.TokenLogprob] = []
        self.add(Sampled(prompt[0]))

    def add(self, sampled: Sampled) -> None:
        """The next token."""
        literal = self._tokenizer.literal
        token = literal(sampled.token)
        text = self._spelling.decode(token, final=len(self._tokens) == self._n_tokens - 1)
        if self._text and not self._text.startswith(text, self._at):
            if not self._tokens and sampled.token == self._tokenizer.bos:
                text = ""
            elif self._text.startswith(text.removeprefix(" "), self._at):
                text = text.removeprefix(" ")
        self._at += len(text)
        top = [(literal(other), logprob) for other, logprob in sampled.top]
        self._tokens.append(wire.TokenLogprob(token, text, sampled.logprob, top))

    def take(self, job: int) -> list[wire.Message]:
        """What the client gets before the answer, and once: in parts, since a frame is read in one
        go."""
        tokens, self._tokens, n = self._tokens, [], PROMPT_PART
        parts = (tokens[at : at + n] for at in range(0, len(tokens), n))
        return [wire.Step([wire.TokenOut(job, "", prompt=part)]) for part in parts]


class Progress:
    """What an answer may say next; implements Constraint. It keeps what was so after each token
    until the token is told: MLX chooses the next one before that."""

    def __init__(
        self, own: Constraint, grammar: GrammarState | None, thoughts: Thoughts | None
    ) -> None:
        """`own` is that of the two which is asked; the thoughts ask the grammar."""
        self._own = own
        self._grammar = grammar
        self._thoughts = thoughts
        self._ahead: deque[tuple[bool, int, int, bool | None]] = deque()
        self.is_over, self.n_begun, self.n_held, self.is_complete = self._now()

    def apply(self, logits: npt.NDArray[np.float32]) -> None:
        self._own.apply(logits)

    def accept(self, token: int) -> None:
        self._own.accept(token)
        self._ahead.append(self._now())

    def told(self) -> None:
        """The next token was told: from here on all is as it was after that."""
        self.is_over, self.n_begun, self.n_held, self.is_complete = self._ahead.popleft()

    def _now(self) -> tuple[bool, int, int, bool | None]:
        """Whether thoughts are over, with how many bytes an answer begins or may, how many of these
        are not known to be of it, and whether it is a whole one by its grammar."""
        is_complete = self._grammar.is_complete if self._grammar else None
        if self._thoughts is None:
            return True, 0, 0, is_complete
        thoughts = self._thoughts
        return thoughts.is_over, thoughts.n_begun, thoughts.n_held, is_complete


class Answer:
    """One of the answers to a job: its text so far, and what it may say next."""

    def __init__(self, job: Job, index: int, tokenizer: Tokenizer) -> None:
        self.job = job
        self._index = index
        self._tokenizer = tokenizer
        grammar = job.grammar.copy() if job.grammar else None
        thoughts = None
        if thinking := job.request.thinking:
            thoughts = Thoughts(thinking, self._piece, job.ending, grammar)
        own = thoughts or grammar
        self._progress = Progress(own, grammar, thoughts) if own else None
        self._text = TextStream([] if thoughts else job.request.stop, job.request.calls)
        self._late = b""  # of which it is not known yet whether stop strings count in it
        self._is_answer = thoughts is None  # they count now
        self.n_guessed = self.n_right = 0
        self._n_tokens = 0
        self._logprob = 0.0  # of all tokens, also of the end
        self._spelling = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held: deque[tuple[int, wire.TokenLogprob]] = deque()  # with where their text begins
        self._n_out = 0  # characters

    @property
    def constraint(self) -> Constraint | None:
        return self._progress

    def accept(self, sampled: Sampled) -> wire.TokenOut | None:
        """What the client gets for this token; None while it is all held back."""
        if self.job.max_tokens == 0:  # asked for the prefill only
            return self._last("", "length")
        self._n_tokens += 1
        self._logprob += sampled.logprob or 0.0
        if self._progress:
            self._progress.told()
        if self._tokenizer.ends_generation(sampled.token):
            if self.job.scored:  # then it counts too
                self._hold(b"", sampled)
            return self._last(self._rest(), "stop")
        piece = self._piece(sampled.token)
        self._hold(piece, sampled)
        text = self._read(self._progress, piece) if self._progress else self._text.push(piece)
        if self._text.stop is not None:
            return self._last(text, "stop")
        if self._n_tokens >= self.job.max_tokens:
            return self._last(text + self._rest(), "length")
        return self._out(text, None) if text else None

    def _read(self, progress: Progress, piece: bytes) -> str:
        """Text, in which stop strings count from where the answer begins; spaces there are none."""
        was_answer, self._is_answer = self._is_answer, progress.is_over
        self._late += piece
        if was_answer and self._is_answer:
            return self._text.push(self._taken(progress.n_held))
        self._text.stops = ()
        text = self._text.push(self._taken(progress.n_begun))
        return text + self._begin(progress.n_held) if self._is_answer else text

    def _begin(self, n_held: int = 0) -> str:
        """What the answer begins with, now that this is known."""
        data = self._taken(n_held)
        self._text.stops = tuple(self.job.request.stop)
        return self._text.push(data, len(data) - len(data.lstrip()))

    def _rest(self) -> str:
        """What was held back, now that nothing comes behind it."""
        thinking = self.job.request.thinking
        if self._late and not (thinking and thinking.heads):  # no tag has come of it
            return self._begin() + self._text.finish()
        return self._text.push(self._taken()) + self._text.finish()

    def _taken(self, n_late: int = 0) -> bytes:
        """What was late, but for so many bytes that are so still."""
        n_sure = len(self._late) - n_late
        taken, self._late = self._late[:n_sure], self._late[n_sure:]
        return taken

    def _piece(self, token: int) -> bytes:
        return self.job.visible.get(token) or self._tokenizer.piece(token)

    def _hold(self, piece: bytes, sampled: Sampled) -> None:
        if sampled.logprob is None:
            return
        top = [(self._piece(token), logprob) for token, logprob in sampled.top]
        begin = self._text.n_decoded + len(self._late)
        spelt = self._spelling.decode(piece)
        self._held.append((begin, wire.TokenLogprob(piece, spelt, sampled.logprob, top)))

    def _last(self, text: str, finish: Finish) -> wire.TokenOut:
        mean = None
        if self.job.request.sampling.n_logprobs is not None:
            mean = self._logprob / max(self._n_tokens, 1)
        stop = self._text.stop  # it may have been in what was held back
        finish = finish if stop is None else "stop"
        is_valid = self._progress.is_complete if self._progress else None
        if is_valid and stop is not None:  # it was cut out of what the grammar saw
            is_valid = False
        done = wire.Done(finish, self._n_tokens, mean, is_valid, stop, self.n_guessed, self.n_right)
        return self._out(text, done)

    def _out(self, text: str, done: wire.Done | None) -> wire.TokenOut:
        self._n_out += len(text)
        is_all = done is not None and done.stop is None  # also what is no text: half a character
        logprobs = []
        while self._held and (is_all or self._held[0][0] < self._n_out):
            logprobs.append(self._held.popleft()[1])
        if done and self.job.scored:  # what a stop string has cut off is told without text
            logprobs += (msgspec.structs.replace(token, text="") for _, token in self._held)
        return wire.TokenOut(
            self.job.request.job, text, done, self._index, self._n_tokens, logprobs
        )


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
        first: int | None = None
        for index in range(job.request.n):
            number = next(self._ids)
            seed = (sampling.seed + index) % 2**32
            own = msgspec.structs.replace(
                sampling,
                seed=seed,
                logit_bias=job.logit_bias,
                # the prompt of the others is that of the first
                prompt_logprobs=None if index else sampling.prompt_logprobs,
            )
            answer = Answer(job, index, self._engine.tokenizer)
            try:
                self._engine.admit(
                    number,
                    job.prompt,
                    own,
                    answer.constraint,
                    reuses=job.request.reuse,
                    goes_on_from=None if job.request.reuse else first,
                    rank=job.request.rank + SECOND_ANSWER_RANK * index,
                )
            except Exception:
                self.cancel(job.request.job)
                raise
            job.answers[number] = self._answers[number] = answer
            first = first or number

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
                unenforced = job.grammar.unenforced if job.grammar else ()
                messages.append(
                    wire.Started(job.request.job, len(job.prompt), n_cached, unenforced)
                )
        for number, n_guesses in result.guessed:
            if answer := self._answers.get(number):
                answer.n_guessed += n_guesses
        for number in result.right:
            if answer := self._answers.get(number):
                answer.n_right += 1
        for number, sampled in result.scored:
            answer = self._answers.get(number)
            if answer is not None and answer.job.scored:
                answer.job.scored.add(sampled)
        outs = []
        for number, sampled in result.tokens:
            answer = self._answers.get(number)
            if answer is None:
                continue
            out = answer.accept(sampled)
            if answer.job.scored:
                messages += answer.job.scored.take(answer.job.request.job)
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


def prepare(request: wire.Generate, engine: Engine, compiler: Compiler) -> Job:
    """Tokenise and check a request. Raises a ServiceError that is the client's answer."""
    grammar = compiler.compile(request.grammar) if request.grammar else None
    bias = _logit_bias(request.logit_bias, engine.tokenizer)
    prompt = tokenize(request.prompt, request.add_bos, engine.tokenizer)
    if not prompt:
        raise BadRequest("The prompt is empty.", param="prompt")
    check_ids(prompt, engine.tokenizer, "prompt")
    n_left = engine.n_ctx - len(prompt)
    if n_left < 1:
        raise ContextLengthExceeded(
            f"This model's maximum context length is {engine.n_ctx} tokens with the answer (its "
            f"tier's N_CTX); the prompt has {len(prompt)}.",
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
    scored = None
    if request.sampling.prompt_logprobs is not None:
        scored = ScoredPrompt(request, prompt, tokenizer)
    return Job(request, prompt, max_tokens, grammar, bias, visible, ending, scored)


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
