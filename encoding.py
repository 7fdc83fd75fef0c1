"""One request for vectors or scores in a tier.

What has come stays, so after a crash only the rest is computed again, if by the same model.
"""

import asyncio
import copy
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Generic, Protocol, TypeVar

import msgspec

from engine import wire
from engine.client import Worker, error_from
from engine.types import Method, Scale
from errors import ServiceError, WorkerCrashed

Item = TypeVar("Item", wire.Vector, wire.Scored)


class Owner(Protocol):
    """The tier, as far as its requests know it."""

    @property
    def identity(self) -> str:
        """Stands for the model that is loaded."""

    def drop(self, job: "Encoding[Any]") -> None:
        """Forget a request that ended or whose client left."""

    def count(self, n_texts: int) -> None:
        """So many texts have just been computed."""


class Encoding(Generic[Item]):
    """Iterate over its items, which come in any order, each once.

    Leaving the `with` block ends it, wherever it is: waiting, being computed or finished.
    """

    def __init__(self, owner: Owner, request: wire.Embed | wire.Score) -> None:
        self.on_end: Callable[[], None] = lambda: None
        self.request = request  # what is left of it when it is handed to a worker
        self.n_before = 0  # requests that were to be served before it when it came
        self.queued_at = self.handed_at = time.monotonic()  # to the worker, for the last time
        self.has_answered = False  # nothing that a second try would contradict
        self.n_crashes = 0
        self.method: Method | None = None  # of scores, once there is one
        self.scale: Scale | None = None
        self._owner = owner
        self._identity = ""  # of the model that has or had it
        asked = request.inputs if isinstance(request, wire.Embed) else request.pairs
        self._sent = list(range(len(asked)))  # where each item of `request` stood at first
        self._open = set(self._sent)
        self._n_asked = self._n_unread = len(asked)
        self._messages: asyncio.Queue[Item | ServiceError] = asyncio.Queue()

    @property
    def n_open(self) -> int:
        """Texts or pairs that are not computed."""
        return len(self._open)

    async def __aiter__(self) -> AsyncIterator[Item]:
        """Raises ServiceError when the whole request fails. An item that alone has failed says so
        in its `fault`."""
        while self._n_unread:
            message = await self._messages.get()
            if isinstance(message, ServiceError):
                raise message
            self._n_unread -= 1
            yield message

    def __enter__(self) -> "Encoding[Item]":
        return self

    def __exit__(self, *_: object) -> None:
        self._owner.drop(self)

    def send(self, worker: Worker) -> None:
        """Hand what is left of it to a worker."""
        request = self.request
        asked: Any = request.inputs if isinstance(request, wire.Embed) else request.pairs
        if len(self._open) == self._n_asked:
            self._identity = self._owner.identity
        elif self._owner.identity != self._identity:
            self._owner.drop(self)
            self.fail(WorkerCrashed("The process with the model died in the middle of the request, "
                                    "and the model's file is another by now."))  # fmt: skip
            return
        if len(self._open) < len(asked):
            kept = [n for n, at in enumerate(self._sent) if at in self._open]
            self._sent = [self._sent[n] for n in kept]
            field = "inputs" if isinstance(request, wire.Embed) else "pairs"
            left = {field: [asked[n] for n in kept]}
            self.request = msgspec.structs.replace(request, **left)
        worker.encode(self.request, self)

    def deliver(self, message: wire.OfJob) -> None:
        """Take what the worker says (JobSink)."""
        if isinstance(message, wire.Failed):
            self._owner.drop(self)
            self.fail(error_from(message))
            return
        assert isinstance(message, wire.Vectors | wire.Scores)
        if isinstance(message, wire.Scores):
            self.method, self.scale = message.method, message.scale
        for item in message.items:
            at = self._sent[item.index]
            self._open.remove(at)
            moved: Any = msgspec.structs.replace(item, index=at) if at != item.index else item
            self._messages.put_nowait(moved)
        self._owner.count(len(message.items))
        if not self._open:
            self._owner.drop(self)

    def fail(self, error: ServiceError) -> None:
        self._messages.put_nowait(copy.copy(error))  # one error may end many requests


def error_of(item: wire.Vector | wire.Scored) -> ServiceError:
    """The exception that an item's fault stands for."""
    assert item.fault is not None
    failed = wire.Failed(0, item.fault.code, item.fault.message, None, {"index": item.index})
    return error_from(failed)
