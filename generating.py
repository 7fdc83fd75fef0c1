"""One request for text in a tier; and a text that becomes tokens, or tokens that become text."""

import asyncio
import copy
import itertools
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
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
    """One request in a tier: first `started()`, then iterate over what it says.

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
        self._messages: asyncio.Queue[wire.Started | wire.TokenOut | ServiceError] = asyncio.Queue()

    async def started(self) -> wire.Started:
        """Wait until the request has passed every check and has its place. Raises ServiceError."""
        message = await self._next()
        assert isinstance(message, wire.Started)
        return message

    async def __aiter__(self) -> AsyncIterator[wire.TokenOut]:
        """The rest, until each answer was `done`. Raises ServiceError."""
        n_done = 0
        while n_done < self.request.n:
            message = await self._next()
            assert isinstance(message, wire.TokenOut)
            n_done += message.done is not None
            yield message

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
            self._messages.put_nowait(message)
        elif isinstance(message, wire.Started) and not self._has_started:
            self._owner.metrics.started(message.prompt_tokens, message.cached_tokens)
            self._has_started = True  # a second start, after a retry, is nobody's business
            self._messages.put_nowait(message)

    def fail(self, error: ServiceError) -> None:
        self._messages.put_nowait(copy.copy(error))  # one error may end many requests


async def interleaved(
    generations: Sequence[Generation],
) -> AsyncGenerator[tuple[int, wire.TokenOut], None]:
    """What several generations say, in the order in which they say it; each answer by its number
    among those of all. Raises ServiceError."""
    if len(generations) == 1:
        async for out in generations[0]:
            yield out.index, out
        return
    queue: asyncio.Queue[tuple[int, wire.TokenOut] | BaseException] = asyncio.Queue()

    async def feed(first: int, generation: Generation) -> None:
        try:
            async for out in generation:
                queue.put_nowait((first + out.index, out))
        except Exception as error:
            queue.put_nowait(error)

    n_choices = [generation.request.n for generation in generations]
    firsts = [0, *itertools.accumulate(n_choices)]
    tasks = [
        asyncio.create_task(feed(first, generation))
        for first, generation in zip(firsts, generations, strict=False)
    ]
    try:
        n_open = sum(n_choices)
        while n_open:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            n_open -= item[1].done is not None
            yield item
    finally:
        for task in tasks:
            task.cancel()


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
