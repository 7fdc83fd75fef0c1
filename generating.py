"""One request for text in a tier; and a text that becomes tokens, or tokens that become text."""

import asyncio
import copy
import logging
import time
from collections.abc import Callable
from typing import Protocol

from engine import wire
from engine.client import Worker, error_from
from errors import InternalError, ServiceError
from metrics import TierMetrics

logger = logging.getLogger(__name__)


class Owner(Protocol):
    """The tier, as far as its requests know it."""

    metrics: TierMetrics

    def drop(self, job: "Generation") -> None:
        """Forget a request that ended or whose client left."""


class Generation:
    """One request in a tier: first `started()`, then `tell` what it says.

    Leaving the `with` block ends it, wherever it is: waiting, in a prefill or finished.
    """

    def __init__(self, owner: Owner, request: wire.Generate, priority: int = 0) -> None:
        self.request = request
        self.priority = priority
        self.n_before = 0  # requests that were to be served before it when it came
        self.on_end: Callable[[], None] = lambda: None
        self.queued_at = self.handed_at = time.monotonic()  # to the worker, for the last time
        self._heard: dict[int, tuple[float, int]] = {}  # of each answer: when, and tokens so far
        self.has_answered = False
        self.n_crashes = 0
        self._owner = owner
        self.n_open = request.n
        self._has_started = False
        # what comes before somebody hears it
        self._messages: asyncio.Queue[wire.Started | wire.TokenOut | ServiceError] = asyncio.Queue()
        self._hear: Callable[[wire.TokenOut], None] = self._messages.put_nowait
        self._end: asyncio.Future[None] | None = None

    async def started(self) -> wire.Started:
        """Wait until the request has passed every check and has its place. Raises ServiceError."""
        message = await self._next()
        assert isinstance(message, wire.Started)
        return message

    async def tell(self, hear: Callable[[wire.TokenOut], None]) -> None:
        """Have the rest heard, each as it comes and at once, until each answer was `done`. Raises
        ServiceError."""
        while not self._messages.empty():
            message = await self._next()
            assert isinstance(message, wire.TokenOut)
            hear(message)
        if self.n_open:
            self._hear = hear
            self._end = asyncio.get_running_loop().create_future()
            await self._end

    def send(self, worker: Worker) -> None:
        worker.generate(self.request, self)

    def __enter__(self) -> "Generation":
        return self

    def __exit__(self, *_: object) -> None:
        self._owner.drop(self)

    async def _next(self) -> wire.Started | wire.TokenOut:
        message = await self._messages.get()
        if isinstance(message, ServiceError):
            raise message
        return message

    def deliver(self, message: wire.OfJob) -> None:
        """Take what the worker says (JobSink)."""
        if isinstance(message, wire.Failed):
            error = error_from(message)
            self._owner.drop(self)
            self.fail(error)
        elif isinstance(message, wire.TokenOut):
            self.has_answered = True
            if message.prompt:
                self._hear(message)
                return
            since, n_before = self._heard.get(message.index, (self.handed_at, 0))
            now = time.monotonic()
            self._heard[message.index] = now, message.n_tokens
            n_new = message.n_tokens - n_before
            self._owner.metrics.answered(now - since, n_new, is_first=not n_before)
            if message.done:
                self._owner.metrics.guessed(message.done.n_guessed, message.done.n_right)
            self.n_open -= message.done is not None
            if self.n_open == 0:
                self._owner.drop(self)
            self._hear(message)
            if self.n_open == 0 and self._end is not None and not self._end.done():
                self._end.set_result(None)
        elif isinstance(message, wire.Started) and not self._has_started:
            self._owner.metrics.started(message.prompt_tokens, message.cached_tokens)
            self._has_started = True  # a second start, after a retry, is nobody's business
            self._messages.put_nowait(message)

    def fail(self, error: ServiceError) -> None:
        error = copy.copy(error)  # one error may end many requests
        if self._end is None:
            self._messages.put_nowait(error)
        elif not self._end.done():
            self._end.set_exception(error)
            self._end.exception()  # known, also if nobody waits for the end any more


class Conversion:
    """A text that becomes tokens, or tokens that become text: one question with one answer."""

    def __init__(self, request: wire.Tokenize | wire.Detokenize) -> None:
        self.request = request
        self.answer: asyncio.Future[wire.OfJob] = asyncio.get_running_loop().create_future()
        self.worker: Worker | None = None  # who has it

    def send(self, worker: Worker) -> None:
        self.worker = worker
        try:
            worker.convert(self.request, self)
        except Exception as error:
            logger.error("A text cannot be sent to worker %s", worker.name, exc_info=error)
            self.fail(InternalError("The request could not be sent to its model."))

    def deliver(self, message: wire.OfJob) -> None:
        """Take what the worker says (JobSink)."""
        if isinstance(message, wire.Failed):
            self.fail(error_from(message))
        elif not self.answer.done():  # it is, when the client has just left
            self.answer.set_result(message)

    def fail(self, error: ServiceError) -> None:
        if not self.answer.done():
            self.answer.set_exception(copy.copy(error))
