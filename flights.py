"""Work that several requests share: each reads all of it, from the first item, and none owns it.

1. The first request for a key starts the work, in a task of its own; those that come before its end
   join it. Every reader gets what has come so far, and then the rest as it comes.
2. The work never waits for a reader. When it has more than `max_items` nobody may join any more,
   and what all its readers have read is forgotten.
3. The last reader to leave cancels it. A reader that leaves, or whose task is cancelled, is nobody
   else's business.
4. When it ends, is cancelled or fails, its place is free at once: who comes then starts anew. Its
   error reaches every reader, after the items before it, as a copy.
"""

import asyncio
import copy
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

from errors import InternalError

T = TypeVar("T")

MAX_ITEMS = 1 << 16

Tell = Callable[[T], None]
Work = Callable[[Tell[T]], Coroutine[Any, Any, None]]  # it tells each item as soon as there is one


class Flights(Generic[T]):
    """Belongs to one event loop."""

    def __init__(self, *, max_items: int = MAX_ITEMS) -> None:
        self._max_items = max_items
        self._flights: dict[bytes, _Flight[T]] = {}
        self._tasks: set[asyncio.Task[None]] = set()  # the loop alone would forget them

    def __len__(self) -> int:
        """Those that can be joined."""
        return len(self._flights)

    def join(self, key: bytes, work: Work[T]) -> "Reader[T]":
        """What the flight under this key tells; without one, what `work` does."""
        flight = self._flights.get(key)
        return Reader(flight or self._start(key, work), is_joined=flight is not None)

    def alone(self, work: Work[T]) -> "Reader[T]":
        """What `work` tells, which nobody shares."""
        return Reader(self._begin(work, lambda: None), is_joined=False)

    def _start(self, key: bytes, work: Work[T]) -> "_Flight[T]":
        def release() -> None:
            if self._flights.get(key) is flight:  # and not one that came after it
                del self._flights[key]

        flight = self._flights[key] = self._begin(work, release)
        return flight

    def _begin(self, work: Work[T], release: Callable[[], None]) -> "_Flight[T]":
        flight = _Flight(work, self._max_items, release)
        self._tasks.add(flight.task)
        flight.task.add_done_callback(self._tasks.discard)
        return flight


class Reader(Generic[T]):
    """One request's view of a flight: an iterator over its items, to be entered at once. Raises
    what the work failed with."""

    def __init__(self, flight: "_Flight[T]", *, is_joined: bool) -> None:
        self.is_joined = is_joined  # another request had started the work
        self.n_read = 0
        self._flight = flight

    def __enter__(self) -> "Reader[T]":
        self._flight.readers.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._flight.leave(self)

    def __aiter__(self) -> "Reader[T]":
        return self

    async def __anext__(self) -> T:
        item = await self._flight.item(self.n_read)
        self.n_read += 1
        return item


class _Flight(Generic[T]):
    def __init__(self, work: Work[T], max_items: int, release: Callable[[], None]) -> None:
        self.readers: set[Reader[T]] = set()
        self._max_items = max_items
        self._release = release
        self._items: deque[T] = deque()
        self._n_forgotten = 0  # items before these
        self._end: Exception | None = None
        self._changed = asyncio.Event()
        self.task = asyncio.create_task(self._run(work))
        self.task.add_done_callback(self._ended)  # it is called whatever happens

    def leave(self, reader: Reader[T]) -> None:
        self.readers.remove(reader)
        if not self.readers:
            self._release()
            self.task.cancel()

    async def item(self, n: int) -> T:
        """Wait for it. Raises a copy of what came instead: StopAsyncIteration, or an error."""
        while n >= self._n_forgotten + len(self._items):
            if self._end is not None:
                raise _copy(self._end)
            self._changed.clear()  # whoever waits has what `set` told it
            await self._changed.wait()
        return self._items[n - self._n_forgotten]

    async def _run(self, work: Work[T]) -> None:
        await work(self._tell)  # here, so that also what fails before it begins is its error

    def _tell(self, item: T) -> None:
        self._items.append(item)
        self._changed.set()
        if self._n_forgotten + len(self._items) > self._max_items:
            self._release()
            self._forget()

    def _forget(self) -> None:
        n_read = min((reader.n_read for reader in self.readers), default=0)
        while self._n_forgotten < n_read:
            self._items.popleft()
            self._n_forgotten += 1

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._release()
        if task.cancelled():
            self._end = InternalError("The work that this request shared was cancelled.")
        elif isinstance(error := task.exception(), Exception):
            self._end = error
        else:
            self._end = StopAsyncIteration()
        self._changed.set()


def _copy(error: Exception) -> Exception:
    """Raising adds to a traceback, so each reader has its own."""
    try:
        return copy.copy(error).with_traceback(error.__traceback__)
    except TypeError:  # its arguments do not make another one
        return error
