"""The cache's file: entries in SQLite, within a size; what goes wrong with it is a miss.

1. In WAL mode a commit is an append to the log, without fsync, that ends with a checksum: a process
   that is killed at any time loses only what it had not committed, since the system has the rest.
   With synchronous=NORMAL a checkpoint does sync, in the thread that writes, so a power failure too
   costs the last commits and not the file; OFF would save those syncs and nothing else.
2. A file that is damaged, or of another schema, is removed. The next one has a new name, and of
   several the one with the greatest name counts. So a process that still has the old one open
   writes into remains, until it sees that the name is gone, and never into another's file.
3. A disk that fails, is full or may not be written is left alone for a while.
4. The size counts the log. Of its 32 shares 27 are for entries, one for pages that a transaction
   needs beyond its estimate, and four for the log: a transaction adds about one, and begins only
   while there are no more than two.
5. Least recently used entries go first. One that nobody has used for as long as entries live has
   expired, whenever it was made.
"""

import logging
import os
import secrets
import sqlite3
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")

VERSION = 1  # of the schema
SCHEMA = [
    "CREATE TABLE entries (key BLOB NOT NULL PRIMARY KEY, kind BLOB NOT NULL, "
    "created_at REAL NOT NULL, used_at REAL NOT NULL, size INTEGER NOT NULL, "
    "checksum BLOB NOT NULL, value BLOB NOT NULL)",
    # all that evicting and counting need, so these read no values
    "CREATE INDEX by_use ON entries (used_at, kind, size)",
]
NAMES = "quintet-cache-*.sqlite"
NEW = ".new"  # at the end of the name while it is being made
NEW_S = 60.0  # one that is that old is nobody's any more
COMPANIONS = ("-wal", "-shm")
SHARES = 32
MIN_BYTES = 4 << 20  # with less there is no room for the log
PAGE_BYTES = 4096
ROW_BYTES = 256  # an entry without its value, with its part of the indices
# what it adds to the log beside its value: at worst a page of the table and one of each index
ROW_LOG_BYTES = 3 * PAGE_BYTES
MAX_SKEW_S = 60.0  # that a clock may be set back before what it dated is from the future
TOUCH_S = 60.0  # a use is written when the last one that was is that old
BUSY_S = 10.0  # that another process may hold the file
CHECKPOINT_S = 0.01  # until another one's work on the log is looked at again
# Faults of the disk, or of who else uses the file, by SQLite's texts: Python 3.10 tells no codes.
# All others are the file's own, such as "unsupported file format".
FAULTS = (
    "access permission denied", "attempt to write a readonly database", "database is locked",
    "database or disk is full", "database table is locked", "disk I/O error", "locking protocol",
    "unable to open database file",
)  # fmt: skip


class Stored(NamedTuple):
    """An entry, in memory or in the file."""

    kind: str
    value: bytes
    created_at: float  # seconds since 1970


@dataclass(slots=True)
class Batch:
    """What is written at once: first what is cleared and removed, then the rest."""

    kinds: Sequence[str | None] = ()  # to be cleared; None: all
    broken: Sequence[bytes] = ()  # keys of entries to be removed
    uses: Mapping[bytes, float] = field(default_factory=dict)  # times by key
    entries: Mapping[bytes, Stored] = field(default_factory=dict)


class Damaged(Exception):
    """The file is not what this module writes."""


class Unusable(Exception):
    """The file may be whole, but not here or not now."""


class CacheFile:
    """One thread's way to the newest file of a folder. It opens at the first use; where there is no
    file, and while the disk rests after a fault, every method returns what stands for that."""

    def __init__(self, folder: Path, *, max_bytes: int, retry_s: float, makes: bool = True) -> None:
        self.share_bytes = max(max_bytes, MIN_BYTES) // SHARES  # a batch has no more than one
        self.max_rows = self.share_bytes // ROW_LOG_BYTES  # of a batch
        self.evictions: Counter[str] = Counter()  # by kind
        self._folder = folder
        self._retry_s = retry_s
        self._makes = makes  # a file, where there is none
        self._retry_at = 0.0  # by the monotonic clock
        self._has_warned = False
        self._path = folder
        self._connection: sqlite3.Connection | None = None

    @property
    def is_resting(self) -> bool:
        return time.monotonic() < self._retry_at

    @property
    def size_bytes(self) -> int:
        """Of the file that is open, with its log."""
        return sum(_size(self._path, suffix) for suffix in ("", *COMPANIONS))

    def select(self, keys: Sequence[bytes]) -> dict[bytes, Stored | None]:
        """Those that are there; None for what is damaged."""

        def work(connection: sqlite3.Connection) -> dict[bytes, Stored | None]:
            found = {}
            for key in keys:  # one SELECT for many takes as long
                row = connection.execute(
                    "SELECT kind, value, created_at, checksum FROM entries WHERE key = ?", (key,)
                ).fetchone()
                if row is not None:
                    found[key] = _read(key, *row)
            return found

        return self._run(work, {})

    def write(self, batch: Batch, now: float, ttl_s: float | None) -> bool:
        """Whether it was written; the entries all or none of them. Before that, what has expired or
        is from the future goes, and what else there is no room for; so also with an empty batch."""

        def work(connection: sqlite3.Connection) -> bool:
            for kind in batch.kinds:
                where = ("?", 1) if kind is None else ("kind = ?", kind.encode())
                self._delete(connection, *where)
            if ttl_s is not None:
                self._delete(connection, "used_at < ?", now - ttl_s)
            self._delete(connection, "used_at > ?", now + MAX_SKEW_S)
            self._evict(connection, sum(_room(entry) for entry in batch.entries.values()))
            with self._transaction(connection):
                connection.executemany(
                    "DELETE FROM entries WHERE key = ?", [(key,) for key in batch.broken]
                )
            with self._transaction(connection):
                connection.executemany(
                    "UPDATE entries SET used_at = ? WHERE key = ? AND used_at < ?",
                    [(at, key, at - TOUCH_S) for key, at in batch.uses.items()],
                )
            with self._transaction(connection):
                connection.executemany(
                    "INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?, ?, ?, ?)",
                    [_row(key, entry, now) for key, entry in batch.entries.items()],
                )
            self._shrink(connection, 0 if batch.kinds else 4 * self.share_bytes)
            return True

        return self._run(work, False)

    def count(self) -> dict[str, tuple[int, int]]:
        """Entries and the bytes of their values, by kind."""

        def work(connection: sqlite3.Connection) -> dict[str, tuple[int, int]]:
            rows = connection.execute(
                "SELECT kind, count(*), CAST(total(size) AS INTEGER) FROM entries GROUP BY kind"
            )
            return {_name(kind): (n, size) for kind, n, size in rows}

        return self._run(work, {})

    def rest(self, reason: str) -> None:
        """Leave the disk alone for a while. May be called in any thread."""
        self._retry_at = time.monotonic() + self._retry_s
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "The cache goes on without its file in %s (CACHE_DIR), and tries again every %g s: "
                "%s. Look for a full, failing or read-only disk.",
                self._folder, self._retry_s, reason,
            )  # fmt: skip

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(sqlite3.Error):  # there is nothing left that could be lost
                connection.close()

    def _run(self, work: Callable[[sqlite3.Connection], T], otherwise: T, n_tries: int = 3) -> T:
        if self.is_resting:
            return otherwise
        try:
            connection = self._open()
            result = otherwise if connection is None else work(connection)
        except (Damaged, Unusable, sqlite3.DatabaseError, OSError) as error:
            self.close()
            if n_tries > 1 and self._is_replaced(error):
                return self._run(work, otherwise, n_tries - 1)
            self.rest(str(error))
            return otherwise
        except BaseException:
            self.close()  # and so roll back
            raise
        self._has_warned = False
        return result

    def _is_replaced(self, error: Exception) -> bool:
        """Whether there is, or can be, another file to try it with. A damaged one is removed."""
        if isinstance(error, OSError | Unusable):
            return False
        if not os.path.exists(self._path):  # unlike Path.exists it never raises
            return True
        if str(error).startswith(FAULTS):
            return False
        logger.warning("The cache's file is damaged and begins anew: %s", error)
        try:
            _remove(self._path)
        except OSError:
            return False
        return True

    def _open(self) -> sqlite3.Connection | None:
        if self._connection is not None and self._path.exists():
            return self._connection
        self.close()
        path = _newest(self._folder)
        if path is None and self._makes:
            _make(self._folder)
            path = _newest(self._folder)
        if path is None:
            return None
        self._path = path
        # mode=rw: a file that has just been removed is not made again under its name
        uri = f"{path.as_uri()}?mode=rw"
        connection = sqlite3.connect(uri, uri=True, timeout=BUSY_S, isolation_level=None)
        self._connection = connection
        connection.text_factory = bytes  # damaged text is no text
        _pragma(connection, "synchronous = NORMAL")
        _pragma(connection, f"wal_autocheckpoint = {self.share_bytes // PAGE_BYTES}")
        _pragma(connection, f"max_page_count = {28 * self.share_bytes // PAGE_BYTES}")
        _pragma(connection, "cell_size_check = ON")
        _pragma(connection, "trusted_schema = OFF")
        rows = connection.execute("SELECT sql FROM sqlite_master WHERE sql NOT NULL")
        schema = [_name(sql) for (sql,) in rows]
        is_log = _pragma(connection, "journal_mode") == b"wal"
        if not is_log or _pragma(connection, "user_version") != VERSION or schema != SCHEMA:
            raise Damaged(f"it is not of version {VERSION}")
        return connection

    @contextmanager
    def _transaction(self, connection: sqlite3.Connection) -> Iterator[None]:
        """One that its caller keeps within a share. If it fails, closing rolls it back."""
        give_up_at = time.monotonic() + BUSY_S
        connection.execute("BEGIN IMMEDIATE")
        while _size(self._path, "-wal") > 2 * self.share_bytes:
            connection.execute("ROLLBACK")
            if time.monotonic() > give_up_at:
                raise Unusable("readers keep the log in use")
            if _pragma(connection, "wal_checkpoint(TRUNCATE)"):  # readers, or another who does it
                time.sleep(CHECKPOINT_S)
            connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("COMMIT")

    def _delete(self, connection: sqlite3.Connection, where: str, value: float | bytes) -> None:
        rows = f"SELECT rowid FROM entries WHERE {where} LIMIT {self.max_rows}"
        n_deleted = self.max_rows
        while n_deleted == self.max_rows:
            with self._transaction(connection):
                cursor = connection.execute(
                    f"DELETE FROM entries WHERE rowid IN ({rows})", (value,)
                )
                n_deleted = cursor.rowcount

    def _evict(self, connection: sqlite3.Connection, need_bytes: int) -> None:
        """Make room; pages that become free are used again."""
        while True:
            n_pages, n_free = _pages(connection)
            over_bytes = (n_pages - n_free) * PAGE_BYTES + need_bytes - 27 * self.share_bytes
            if over_bytes <= 0:
                return
            with self._transaction(connection):
                leaving = []
                for rowid, kind, size in connection.execute(
                    f"SELECT rowid, kind, size FROM entries ORDER BY used_at LIMIT {self.max_rows}"
                ).fetchall():
                    if not isinstance(size, int):
                        raise Damaged("a size is none")
                    leaving.append((rowid,))
                    self.evictions[_name(kind)] += 1
                    over_bytes -= size + ROW_BYTES
                    if over_bytes <= 0:
                        break
                cursor = connection.executemany("DELETE FROM entries WHERE rowid = ?", leaving)
                if cursor.rowcount != len(leaving) or not leaving:
                    raise Damaged("what its index lists is not there")

    def _shrink(self, connection: sqlite3.Connection, max_free_bytes: int) -> None:
        """Give pages back where more are free, or where an earlier limit was higher."""
        n_pages, n_free = _pages(connection)
        while n_free and (
            n_free * PAGE_BYTES > max_free_bytes or n_pages * PAGE_BYTES > 28 * self.share_bytes
        ):
            with self._transaction(connection):
                # it works by the row; what is in them depends on Python's version
                connection.execute(f"PRAGMA incremental_vacuum({self.max_rows})").fetchall()
            n_before, (n_pages, n_free) = n_pages, _pages(connection)
            if n_pages == n_before:
                raise Damaged("its free pages cannot be given back")


def _newest(folder: Path) -> Path | None:
    """The file that counts; the others are remains. Raises OSError."""
    found = sorted(folder.glob(NAMES))
    for path in found[:-1]:
        _remove(path)
    return found[-1] if found else None


def _make(folder: Path) -> None:
    """A file that nobody sees before it is whole. Raises OSError, Unusable."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for path in folder.glob(f"{NAMES}{NEW}*"):
        with suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > NEW_S:
                path.unlink()
    path = folder / NAMES.replace("*", f"{time.time_ns():016x}{secrets.token_hex(2)}")
    new = path.with_name(path.name + NEW)
    os.close(os.open(new, os.O_CREAT | os.O_EXCL, 0o600))  # the log gets the same mode
    try:
        with closing(sqlite3.connect(new, isolation_level=None)) as connection:
            _pragma(connection, "auto_vacuum = INCREMENTAL")
            if _pragma(connection, "journal_mode = WAL") != "wal":
                raise Unusable("this file system has no memory that processes share")
            for sql in SCHEMA:
                connection.execute(sql)
            _pragma(connection, f"user_version = {VERSION}")
        if _newest(folder) is None:  # else another process was faster
            new.rename(path)
    finally:
        new.unlink(missing_ok=True)


def _remove(path: Path) -> None:
    """The file first: without it nobody reads its log. Raises OSError."""
    for suffix in ("", *COMPANIONS):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def _size(path: Path, suffix: str) -> int:
    try:
        return path.with_name(path.name + suffix).stat().st_size
    except OSError:
        return 0


def _pragma(connection: sqlite3.Connection, pragma: str) -> int | str | bytes | None:
    rows = connection.execute(f"PRAGMA {pragma}").fetchall()
    return rows[0][0] if rows else None


def _pages(connection: sqlite3.Connection) -> tuple[int, int]:
    """How many the file has, and how many of them are free."""
    n_pages, n_free = _pragma(connection, "page_count"), _pragma(connection, "freelist_count")
    assert isinstance(n_pages, int)
    assert isinstance(n_free, int)
    return n_pages, n_free


def _room(entry: Stored) -> int:
    """What an entry takes in the file, at most."""
    size = len(entry.value)
    return size + ROW_BYTES + (PAGE_BYTES if size > PAGE_BYTES // 4 else 0)


def _row(key: bytes, entry: Stored, now: float) -> tuple[object, ...]:
    kind, value, created_at = entry
    checksum = _checksum(key, kind.encode(), value, created_at)
    return key, kind.encode(), created_at, now, len(value), checksum, value


def _read(
    key: bytes, kind: object, value: object, created_at: object, checksum: object
) -> Stored | None:
    """An entry, unless it is damaged."""
    if (
        isinstance(kind, bytes)
        and isinstance(value, bytes)
        and isinstance(created_at, float)
        and checksum == _checksum(key, kind, value, created_at)
    ):
        return Stored(kind.decode(), value, created_at)
    return None


def _checksum(key: bytes, kind: bytes, value: bytes, created_at: float) -> bytes:
    head = struct.pack("<dII", created_at, len(key), len(kind))
    digest = blake2b(head + key + kind, digest_size=8)
    digest.update(value)
    return digest.digest()


def _name(of: object) -> str:
    return of.decode(errors="replace") if isinstance(of, bytes) else "?"
