"""The part of the cache that outlives the process: a file, and a thread each that reads it, counts
what is in it, and writes what waits in a queue. Nothing waits for a write, and no client sees a
fault."""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from cache_file import ROW_BYTES, ROW_LOG_BYTES, Batch, CacheFile, Stored

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_QUEUED_BYTES = 32 << 20
GATHER_S = 0.1  # that what is put waits for more: one transaction costs as much as many rows
IDLE_S = 30.0  # that uses wait for a batch which they can be written with
RETRY_S = 60.0  # that the file is left alone after a fault
READ_TIMEOUT_S = 2.0  # a disk that takes longer is no help
CLOSE_TIMEOUT_S = 10.0


@dataclass(slots=True)
class DiskKind:
    """What the file has of a kind."""

    entries: int = 0
    size_bytes: int = 0  # of the values
    evictions: int = 0  # since the start, by this process


@dataclass(slots=True)
class DiskStats:
    kinds: dict[str, DiskKind] = field(default_factory=dict)
    file_bytes: int = 0  # with its log
    dropped: int = 0  # writes, for which the queue was full or the disk failed
    is_resting: bool = False  # after a fault of the disk


class DiskStore:
    """Call `start` before the rest and `close` after it. A key belongs to one kind."""

    def __init__(
        self,
        folder: Path,
        *,
        max_bytes: int,
        ttl_s: float | None = None,  # None or 0: entries do not expire
        clock: Callable[[], float] = time.time,
        retry_s: float = RETRY_S,
    ) -> None:
        self._ttl_s = ttl_s or None
        self._clock = clock
        self._reads = CacheFile(folder, max_bytes=max_bytes, retry_s=retry_s, makes=False)
        self._writes = CacheFile(folder, max_bytes=max_bytes, retry_s=retry_s)
        self._counts = CacheFile(folder, max_bytes=max_bytes, retry_s=retry_s, makes=False)
        self._counter = ThreadPoolExecutor(1, "cache-counter")
        self._counting: asyncio.Future[dict[str, tuple[int, int]]] | None = None
        self._counted: dict[str, tuple[int, int]] = {}
        self._queue = _Queue(self._writes)
        self._n_failed = 0
        self._reader = ThreadPoolExecutor(1, "cache-reader")
        self._writer = threading.Thread(target=self._write_loop, name="cache-writer", daemon=True)

    def start(self) -> None:
        self._queue.flush()  # a first look at the file: an earlier limit may have been higher
        self._writer.start()

    async def close(self) -> None:
        """Write what waits, and let go of the file."""
        self._queue.close()
        await asyncio.to_thread(self._writer.join, CLOSE_TIMEOUT_S)
        await self._in_reader(self._reads.close)
        self._reader.shutdown(wait=False)
        self._counter.submit(self._counts.close)
        self._counter.shutdown(wait=False)

    async def get_many(self, kind: str, keys: Sequence[bytes]) -> dict[bytes, Stored]:
        """Those that are there, of whatever age."""
        if self._reads.is_resting or self._queue.is_clearing(kind):
            return {}
        waiting = self._queue.get_many(keys)
        written = [key for key in keys if key not in waiting]
        found = await self._in_reader(lambda: self._reads.select(written)) or {}
        broken = [key for key, stored in found.items() if stored is None]
        if broken:
            logger.warning("%d damaged entries are removed from the cache's file", len(broken))
            self._queue.remove(broken)
        found |= waiting
        return {key: s for key, s in found.items() if s is not None and s.kind == kind}

    def put(self, key: bytes, stored: Stored) -> None:
        """Have it written. What finds no room in the queue is dropped."""
        self._queue.put(key, stored)

    def touch(self, keys: Iterable[bytes]) -> None:
        """They were used, here or in memory."""
        self._queue.touch(keys, self._clock())

    async def clear(self, kind: str | None) -> None:
        """Remove the entries of a kind, or all. While the disk fails they stay in the file, but
        this process does not see them any more, and removes them as soon as it can."""
        await asyncio.wrap_future(self._queue.clear(kind))

    async def flush(self) -> None:
        """Wait until all that was put has been written, or dropped."""
        await asyncio.wrap_future(self._queue.flush())

    async def stats(self) -> DiskStats:
        counts = await self._count()
        stats = DiskStats({kind: DiskKind(n, size) for kind, (n, size) in counts.items()})
        for kind, n in self._writes.evictions.copy().items():
            stats.kinds.setdefault(kind, DiskKind()).evictions = n
        stats.file_bytes = self._writes.size_bytes
        stats.dropped = self._queue.n_dropped + self._n_failed
        stats.is_resting = self._reads.is_resting or self._writes.is_resting
        return stats

    async def _count(self) -> dict[str, tuple[int, int]]:
        """Entries and bytes by kind: where a large file takes long to count, and nobody who looks
        something up waits for that, as they were the last time."""
        if self._counting is None:
            loop = asyncio.get_running_loop()
            try:
                self._counting = loop.run_in_executor(self._counter, self._counts.count)
            except RuntimeError:  # it is closed
                return self._counted
        counting = self._counting
        await asyncio.wait({counting}, timeout=READ_TIMEOUT_S)
        if counting.done() and counting is self._counting:
            self._counting = None
            try:
                self._counted = counting.result()
            except Exception:
                logger.exception("Counting what is in the cache's file failed")
        return self._counted

    async def _in_reader(self, work: Callable[[], T]) -> T | None:
        """What `work` returns, or None where that takes too long."""
        try:
            reading = asyncio.get_running_loop().run_in_executor(self._reader, work)
            try:
                # not wait_for, which before Python 3.12 may swallow a cancellation
                await asyncio.wait({reading}, timeout=READ_TIMEOUT_S)
                if reading.done():
                    return reading.result()
            finally:
                reading.cancel()
            self._reads.rest(f"it takes more than {READ_TIMEOUT_S:g} s to answer")
        except Exception:
            logger.exception("Reading the cache's file failed")
        return None

    def _write_loop(self) -> None:
        while (taken := self._queue.take()) is not None:
            is_written = False
            try:
                is_written = self._writes.write(taken.batch, self._clock(), self._ttl_s)
            except Exception:
                logger.exception("Writing the cache's file failed")
            if not is_written:
                self._n_failed += len(taken.batch.entries)
            self._queue.done(taken, is_written=is_written)
        self._writes.close()


@dataclass(slots=True)
class _Taken:
    batch: Batch
    clears: dict[str | None, int]
    flushes: "list[Future[None]]"


class _Queue:
    """What waits to be written. All but `take` may be called in any thread and do not wait."""

    def __init__(self, file: CacheFile) -> None:
        self.n_dropped = 0
        self._max_rows = file.max_rows
        self._max_bytes = file.share_bytes
        self._line: deque[bytes | Future[None]] = deque()  # keys, and who waits for those before
        self._waiting: dict[bytes, Stored] = {}
        self._n_bytes = 0  # of these
        self._n_futures = 0  # in the line
        self._taken: Mapping[bytes, Stored] = {}  # are being written
        self._uses: dict[bytes, float] = {}
        self._broken: list[bytes] = []
        self._clears: dict[str | None, int] = {}  # kinds that are to be cleared, and which time
        self._n_clears = 0
        self._is_closed = False
        self._changed = threading.Condition()

    def put(self, key: bytes, stored: Stored) -> None:
        with self._changed:
            n_bytes = self._n_bytes + _size(stored)
            if key in self._waiting:
                n_bytes -= _size(self._waiting[key])
            is_full = self._n_bytes and n_bytes > MAX_QUEUED_BYTES
            if is_full or self._is_closed or len(stored.value) > self._max_bytes:
                self.n_dropped += 1
                return
            is_first = not self._line
            self._n_bytes = n_bytes
            self._waiting[key] = stored
            self._line.append(key)
            if is_first or n_bytes > self._max_bytes:
                self._changed.notify()

    def get_many(self, keys: Iterable[bytes]) -> dict[bytes, Stored]:
        """Those that are not written yet: the file may have older ones."""
        with self._changed:
            found = ((key, self._waiting.get(key) or self._taken.get(key)) for key in keys)
            return {key: stored for key, stored in found if stored is not None}

    def touch(self, keys: Iterable[bytes], now: float) -> None:
        with self._changed:
            for key in keys:
                if len(self._uses) < self._max_rows or key in self._uses:
                    self._uses[key] = now

    def remove(self, keys: list[bytes]) -> None:
        with self._changed:
            self._broken = (self._broken + keys)[: self._max_rows]  # others are found again
            self._changed.notify()

    def clear(self, kind: str | None) -> "Future[None]":
        """Done after the next batch, which clears first."""
        with self._changed:
            kept = {k: s for k, s in self._waiting.items() if kind not in (None, s.kind)}
            self._waiting = kept
            self._n_bytes = sum(map(_size, kept.values()))
            self._n_clears += 1
            self._clears[kind] = self._n_clears
            return self._join(self._line.appendleft)

    def is_clearing(self, kind: str) -> bool:
        return bool(self._clears) and (None in self._clears or kind in self._clears)

    def flush(self) -> "Future[None]":
        """Done after what waits now."""
        with self._changed:
            return self._join(self._line.append)

    def _join(self, add: "Callable[[Future[None]], None]") -> "Future[None]":
        future: Future[None] = Future()
        if self._is_closed:
            future.set_result(None)
        else:
            add(future)
            self._n_futures += 1
            self._changed.notify()
        return future

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify()

    def take(self) -> _Taken | None:
        """What is to be written next, or None after the last. Waits for it, or for so long that the
        file should be looked after."""
        with self._changed:
            if not (self._line or self._broken or self._is_closed):
                self._changed.wait(IDLE_S)
            self._changed.wait_for(self._is_urgent, GATHER_S)
            if self._is_closed and not (self._line or self._broken or self._uses):
                return None
            entries: dict[bytes, Stored] = {}
            flushes = []
            n_bytes = 0
            while self._line:
                item = self._line[0]
                if isinstance(item, Future):
                    flushes.append(item)
                    self._n_futures -= 1
                elif (stored := self._waiting.get(item)) is not None:  # and not cleared, or taken
                    n_bytes += len(stored.value) + ROW_LOG_BYTES
                    if entries and n_bytes > self._max_bytes:
                        break
                    self._n_bytes -= _size(stored)
                    entries[item] = self._waiting.pop(item)
                self._line.popleft()
            batch = Batch([*self._clears], self._broken, self._uses, entries)
            self._broken, self._uses, self._taken = [], {}, entries
            return _Taken(batch, self._clears.copy(), flushes)

    def _is_urgent(self) -> bool:
        """Somebody waits for it, or there is more than one write takes."""
        return self._is_closed or self._n_futures > 0 or self._n_bytes > self._max_bytes

    def done(self, taken: _Taken, *, is_written: bool) -> None:
        with self._changed:
            self._taken = {}
            for kind, time_ in taken.clears.items():
                if is_written and self._clears.get(kind) == time_:
                    del self._clears[kind]
        for future in taken.flushes:
            if future.set_running_or_notify_cancel():
                future.set_result(None)


def _size(stored: Stored) -> int:
    return len(stored.value) + ROW_BYTES
