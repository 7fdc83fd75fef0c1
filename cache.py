"""Results that are remembered: of generations whole, of vectors and scores each for itself.

Entries are bytes, whose meaning is their users' own, under the digest of all that decides them.
They are in memory, least recently used first to go, and on disk where there is a store for that.

1. An entry in memory that is fresh is the answer, without a wait.
2. The disk is asked for the rest, all at once; what it has comes into memory, with its age.
3. An entry that has expired is a miss. So is one from the future: after a clock was set back nobody
   knows how old that is.
"""

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any, NamedTuple

import msgspec

from cache_disk import DiskKind, DiskStats, DiskStore
from cache_file import MAX_SKEW_S, Stored

FORM = 1  # of keys and values: with another one nothing that is stored is found
ENTRY_BYTES = 448  # of an entry in memory, beside its value: measured, with the tables' growth

_encoder = msgspec.msgpack.Encoder(order="deterministic")


def key(kind: str, *parts: Any) -> bytes:
    """The digest of what decides a result: plain data and structs, told apart by type and by place.
    Raises TypeError and OverflowError for what msgpack cannot say."""
    return sha256(_encoder.encode((FORM, kind, parts))).digest()


class Entry(NamedTuple):
    value: bytes
    age_s: float


@dataclass(slots=True)
class KindStats:
    """What there is of one kind, and what was asked since the start."""

    entries: int = 0  # in memory
    size_bytes: int = 0  # of them, with what they cost beside their values
    hits: int = 0
    disk_hits: int = 0  # of them
    misses: int = 0
    joins: int = 0
    evictions: int = 0  # out of memory, for room
    disk: DiskKind = field(default_factory=DiskKind)


@dataclass(slots=True)
class CacheStats:
    kinds: dict[str, KindStats]
    disk: DiskStats | None


class Cache:
    """A context manager around its use. Belongs to one event loop."""

    def __init__(
        self,
        *,
        max_bytes: int,  # of memory
        ttl_s: float | None = None,  # None or 0: entries do not expire
        disk: DiskStore | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._memory = MemoryStore(max_bytes)
        self._ttl_s = ttl_s or math.inf
        self._disk = disk
        self._clock = clock
        self._n_clears = 0

    async def __aenter__(self) -> "Cache":
        if self._disk is not None:
            self._disk.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._disk is not None:
            await self._disk.close()

    async def get(self, kind: str, key: bytes, max_age_s: float | None = None) -> Entry | None:
        """As `get_many`."""
        return (await self.get_many(kind, (key,), max_age_s)).get(key)

    async def get_many(
        self, kind: str, keys: Iterable[bytes], max_age_s: float | None = None
    ) -> dict[bytes, Entry]:
        """Those that are known, and younger than asked for. Waits for nothing but the disk."""
        max_age_s = self._ttl_s if max_age_s is None else min(max_age_s, self._ttl_s)
        stats = self._memory.of_kind(kind)
        now = self._clock()
        found: dict[bytes, Entry] = {}
        missing = []
        asked = dict.fromkeys(keys)
        for wanted in asked:
            stored = self._memory.get(wanted)
            if stored is not None:
                age_s = _age_s(stored, now)
                if age_s < max_age_s and stored.kind == kind:
                    found[wanted] = Entry(stored.value, age_s)
                    continue
                if age_s >= self._ttl_s:
                    self._memory.remove(wanted)
            missing.append(wanted)
        if missing and self._disk is not None:
            for wanted, stored in (await self._from_disk(kind, missing)).items():
                age_s = _age_s(stored, now)
                if age_s < max_age_s:
                    found[wanted] = Entry(stored.value, age_s)
                    stats.disk_hits += 1
        if found and self._disk is not None:
            self._disk.touch(found)
        stats.hits += len(found)
        stats.misses += len(asked) - len(found)
        return found

    def put(self, kind: str, key: bytes, value: bytes) -> None:
        """Remember a result. Does not wait."""
        stored = Stored(kind, value, self._clock())
        self._memory.drop_expired(stored.created_at - self._ttl_s)
        self._memory.put(key, stored)
        if self._disk is not None:
            self._disk.put(key, stored)

    async def clear(self, kind: str | None = None) -> None:
        """Forget a kind, or all: from here on nothing that was put before is found."""
        self._n_clears += 1
        self._memory.clear(kind)
        if self._disk is not None:
            await self._disk.clear(kind)

    def joined(self, kind: str) -> None:
        """A request shares the work of another one; for the statistics."""
        self._memory.of_kind(kind).joins += 1

    async def stats(self) -> CacheStats:
        disk = None if self._disk is None else await self._disk.stats()
        kinds = self._memory.stats()
        if disk is not None:
            for kind, of_kind in disk.kinds.items():
                kinds.setdefault(kind, KindStats()).disk = of_kind
        return CacheStats(kinds, disk)

    async def _from_disk(self, kind: str, keys: Sequence[bytes]) -> dict[bytes, Stored]:
        """What the disk has, which comes into memory unless it has expired."""
        assert self._disk is not None
        n_clears = self._n_clears
        found = await self._disk.get_many(kind, keys)
        if self._n_clears != n_clears:  # meanwhile, so these may be what was cleared
            return {}
        now = self._clock()
        for key, stored in found.items():
            known = self._memory.get(key)  # put meanwhile
            if known is None and _age_s(stored, now) < self._ttl_s:
                self._memory.put(key, stored)
        return found


def _age_s(stored: Stored, now: float) -> float:
    """Infinite for what is from the future."""
    age_s = now - stored.created_at
    return max(age_s, 0.0) if age_s >= -MAX_SKEW_S else math.inf


class MemoryStore:
    """Entries in the order of their last use, up to a size in bytes. An OrderedDict and no library:
    one of the usual kind takes 40 to 60 % more beside the values, three times as long, and does not
    show who goes next."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._size_bytes = 0
        self._entries: OrderedDict[bytes, Stored] = OrderedDict()
        self._kinds: dict[str, KindStats] = {}

    def of_kind(self, kind: str) -> KindStats:
        return self._kinds.setdefault(kind, KindStats())

    def stats(self) -> dict[str, KindStats]:
        return {kind: replace(stats) for kind, stats in self._kinds.items()}

    def get(self, key: bytes) -> Stored | None:
        stored = self._entries.get(key)
        if stored is not None:
            self._entries.move_to_end(key)
        return stored

    def put(self, key: bytes, stored: Stored) -> None:
        """Others leave for it; one that is larger than all of the room does not come in."""
        self.remove(key)
        size = len(stored.value) + ENTRY_BYTES
        if size > self._max_bytes:
            return
        while self._size_bytes + size > self._max_bytes:
            unused = next(iter(self._entries))
            self.of_kind(self._entries[unused].kind).evictions += 1
            self.remove(unused)
        self._entries[key] = stored
        self._count(stored, 1)

    def remove(self, key: bytes) -> None:
        stored = self._entries.pop(key, None)
        if stored is not None:
            self._count(stored, -1)

    def drop_expired(self, before: float) -> None:
        """Of what was put before that, all that has not been used since then."""
        while self._entries:
            unused, stored = next(iter(self._entries.items()))
            if stored.created_at >= before:
                return
            self.remove(unused)

    def clear(self, kind: str | None) -> None:
        for key in [k for k, stored in self._entries.items() if kind in (None, stored.kind)]:
            self.remove(key)

    def _count(self, stored: Stored, n: int) -> None:
        size = n * (len(stored.value) + ENTRY_BYTES)
        of_kind = self.of_kind(stored.kind)
        of_kind.entries += n
        of_kind.size_bytes += size
        self._size_bytes += size
