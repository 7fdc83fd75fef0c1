"""The cache's file: killed writers, damage, faults of the disk, limits, several processes."""

import asyncio
import logging
import os
import random
import select
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import hypothesis
import pytest

import cache_disk
import cache_file
from cache import key
from cache_disk import DiskStore
from cache_file import (
    MAX_SKEW_S,
    MIN_BYTES,
    NAMES,
    PAGE_BYTES,
    TOUCH_S,
    Batch,
    CacheFile,
    Stored,
)
from settings import ROOT

T = TypeVar("T")
Open = Callable[..., CacheFile]
NOW = 1e9


@pytest.fixture
def open_file(tmp_path: Path) -> Iterator[Open]:
    files: list[CacheFile] = []

    def open_one(folder: Path = tmp_path, max_bytes: int = MIN_BYTES) -> CacheFile:
        files.append(CacheFile(folder, max_bytes=max_bytes, retry_s=3600))
        return files[-1]

    yield open_one
    for file in files:
        file.close()


def entry(n: int, size: int = 1000, kind: str = "k") -> tuple[bytes, Stored]:
    """The same for the same number."""
    value = (sha256(b"%d" % n).digest() * (size // 32 + 1))[:size]
    return key(kind, n), Stored(kind, value, NOW + n)


def entries(numbers: range, size: int = 1000) -> dict[bytes, Stored]:
    return dict(entry(n, size) for n in numbers)


def put(store: DiskStore, entries: dict[bytes, Stored]) -> None:
    for name, stored in entries.items():
        store.put(name, stored)


def batch(numbers: range, size: int = 1000) -> Batch:
    return Batch(entries=entries(numbers, size))


def write(file: CacheFile, numbers: range, size: int = 1000, now: float = NOW) -> None:
    """In batches of one share at most."""
    for n in numbers:
        assert file.write(batch(range(n, n + 1), size), now + n, None)


def the_file(folder: Path) -> Path:
    (path,) = folder.glob(NAMES)
    return path


def connection_of(file: CacheFile) -> sqlite3.Connection:
    connection = file._open()
    assert connection
    return connection


# as it should be


def test_what_was_written_is_there_after_it_was_closed(open_file: Open) -> None:
    file = open_file()
    assert file.write(batch(range(9)), NOW, None)
    file.close()
    assert open_file().select([*entries(range(12))]) == entries(range(9))


def test_the_file_and_its_log_are_private(open_file: Open, tmp_path: Path) -> None:
    file = open_file(tmp_path / "made" / "for it")
    file.write(batch(range(9)), NOW, None)
    paths = [*(tmp_path / "made" / "for it").iterdir()]
    assert len(paths) == 3  # with the log and its index
    assert {path.stat().st_mode & 0o777 for path in paths} == {0o600}
    assert (tmp_path / "made" / "for it").stat().st_mode & 0o777 == 0o700


def test_two_see_what_the_other_has_written(open_file: Open) -> None:
    one, other = open_file(), open_file()
    assert one.write(batch(range(5)), NOW, None)
    assert other.write(batch(range(5, 9)), NOW, None)
    assert one.select([*entries(range(9))]) == other.select([*entries(range(9))])
    assert len(one.select([*entries(range(9))])) == 9


def test_what_was_used_last_stays(open_file: Open) -> None:
    file = open_file()
    write(file, range(50), 60_000)
    kept = dict.fromkeys(entries(range(5)), NOW + 50 + TOUCH_S)
    assert file.write(Batch(uses=kept), NOW, None)
    write(file, range(50, 100), 60_000)
    found = file.select([*entries(range(100), 60_000)])
    numbers = {n for n in range(100) if entry(n)[0] in found}
    assert numbers >= {0, 1, 2, 3, 4, *range(70, 100)}
    assert not numbers & {*range(5, 30)}
    assert file.evictions["k"] == 100 - len(found)


def test_a_use_is_written_only_when_the_last_one_is_old(open_file: Open) -> None:
    file = open_file()
    write(file, range(1))
    used_at = "SELECT used_at FROM entries"
    assert file.write(Batch(uses={entry(0)[0]: NOW + TOUCH_S}), NOW, None)
    assert connection_of(file).execute(used_at).fetchone() == (NOW,)
    assert file.write(Batch(uses={entry(0)[0]: NOW + TOUCH_S + 1}), NOW + TOUCH_S, None)
    assert connection_of(file).execute(used_at).fetchone() == (NOW + TOUCH_S + 1,)


def test_what_nobody_uses_goes_when_it_expires_and_so_does_what_is_from_the_future(
    open_file: Open,
) -> None:
    file = open_file()
    write(file, range(0, 200, 10))  # used at NOW + n
    assert file.write(Batch(), NOW + 150, 100.0)
    assert sorted(file.select([*entries(range(200))])) == sorted(
        entry(n)[0] for n in range(50, 200, 10)
    )
    assert file.write(Batch(), NOW + 50, 100.0)
    latest = 50 + int(MAX_SKEW_S)
    assert sorted(file.select([*entries(range(200))])) == sorted(
        entry(n)[0] for n in range(50, latest + 1, 10)
    )


@pytest.mark.parametrize("size", [16, 4096, 50_000])
def test_it_stays_within_its_size_at_every_moment(
    open_file: Open, tmp_path: Path, size: int
) -> None:
    file, reader = open_file(), open_file()
    step = max(1, min(file.max_rows, file.share_bytes // (size + 3 * PAGE_BYTES)))
    n_entries = min(2 * MIN_BYTES // size, 3000)
    for n in range(0, n_entries, step):
        assert file.write(batch(range(n, n + step), size), NOW + n, None)
        if n % (7 * step) == 0:
            assert reader.select([entry(n, size)[0]]) == entries(range(n, n + 1), size)
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= MIN_BYTES
    if size >= 4096:
        assert file.evictions["k"] > 0
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) > 0.7 * MIN_BYTES


def test_a_reader_that_never_ends_costs_writes_and_not_the_size(
    open_file: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_file, "BUSY_S", 0.01)
    file, reader = open_file(), open_file()
    file._retry_s = 0
    write(file, range(9))
    connection = connection_of(reader)
    connection.execute("BEGIN")
    connection.execute("SELECT * FROM entries").fetchall()
    written = [file.write(batch(range(n, n + 1), 50_000), NOW + n, None) for n in range(9, 60)]
    assert not all(written)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= MIN_BYTES
    connection.execute("COMMIT")
    assert file.write(batch(range(100, 101)), NOW + 100, None)


def test_under_a_lower_limit_it_shrinks(open_file: Open, tmp_path: Path) -> None:
    file = open_file(max_bytes=4 * MIN_BYTES)
    write(file, range(200), 60_000)
    file.close()
    assert the_file(tmp_path).stat().st_size > 2 * MIN_BYTES
    file = open_file()
    assert file.write(Batch(), NOW + 200, None)
    assert entry(199)[0] in file.select([entry(199)[0]])
    file.close()
    assert the_file(tmp_path).stat().st_size <= MIN_BYTES


def test_a_clear_gives_the_space_back(open_file: Open, tmp_path: Path) -> None:
    file = open_file()
    write(file, range(50), 60_000)
    other, stored = entry(1, kind="other")
    assert file.write(Batch(entries={other: stored}), NOW + 50, None)
    assert file.write(Batch(kinds=["k"]), NOW + 50, None)
    assert file.count() == {"other": (1, 1000)}
    file.close()
    assert the_file(tmp_path).stat().st_size < 20 * PAGE_BYTES
    assert open_file().select([other]) == {other: stored}


# killed


N_TOGETHER = 7
WRITER = f"""
import asyncio, sys
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from cache import key
from cache_disk import DiskStore, Stored

def entry(n):  # as above
    value = (sha256(b"%d" % n).digest() * (3000 // 32 + 1))[:3000]
    return key("k", n), Stored("k", value, {NOW} + n)

async def main(folder, first):
    store = DiskStore(Path(folder), max_bytes=64 << 20)
    store.start()
    for n in range(first, first + 10_000, {N_TOGETHER}):
        for at in range({N_TOGETHER}):
            store.put(*entry(n + at))
        await store.flush()
        print(n, flush=True)
    sys.stdin.read()  # until the test ends it, or has ended

asyncio.run(main(sys.argv[1], int(sys.argv[2])))
"""


def start_writer(folder: Path, first: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", WRITER, str(folder), str(first)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True)


def test_a_writer_that_is_killed_at_any_time_loses_nothing_that_was_written(
    open_file: Open, tmp_path: Path
) -> None:
    """Two at a time, on one file."""
    rng = random.Random()
    written: list[int] = []
    for n_round in range(hypothesis.settings().max_examples // 12):
        writers = [start_writer(tmp_path, 20_000 * n_round + at) for at in (0, 10_000)]
        for writer in writers:
            assert writer.stdout
            assert select.select([writer.stdout], [], [], 60)[0]  # it has begun
        time.sleep(0.1 * rng.random())  # at any time
        for writer in writers:
            os.kill(writer.pid, signal.SIGKILL)
        for writer in writers:
            said, _ = writer.communicate()
            whole = [line for line in said.splitlines(keepends=True) if line.endswith("\n")]
            assert whole
            written += map(int, whole)
        file = open_file(max_bytes=64 << 20)
        for n in written if n_round % 10 == 7 else written[-50:]:
            expected = entries(range(n, n + N_TOGETHER), 3000)
            assert file.select([*expected]) == expected
        last = 20_000 * n_round + 19_000
        assert file.write(batch(range(last, last + 1), 100), time.time(), None)
        assert connection_of(file).execute("PRAGMA quick_check").fetchall() == [(b"ok",)]
        written = written[-500:]  # before there is no room for older ones
        file.close()


def test_several_processes_share_one_file(tmp_path: Path) -> None:
    writers = [start_writer(tmp_path, 10_000 * n) for n in range(3)]
    for writer in writers:
        assert writer.stdout
        for _ in range(10):
            assert writer.stdout.readline()
        assert writer.poll() is None
    for writer in writers:
        writer.terminate()
        writer.communicate()
    assert len([*tmp_path.glob(NAMES)]) == 1


# damaged


@pytest.fixture
def whole(tmp_path: Path, open_file: Open) -> Path:
    """A folder with a file, and one with a log that is not in the file yet."""
    for name in ("closed", "open"):
        file = open_file(tmp_path / name, 64 << 20)
        for n in range(0, 60, 6):
            assert file.write(batch(range(n, n + 6), 100 if n % 12 else 5000), NOW + n, None)
        if name == "closed":
            file.close()
    assert the_file(tmp_path / "open").stat().st_size < 10 * PAGE_BYTES
    return tmp_path


def check_damaged(folder: Path, *, reads_first: bool) -> int:
    """What is found is right, and the file works on. How many were found."""
    expected = {}
    for n in range(0, 60, 6):
        expected |= entries(range(n, n + 6), 100 if n % 12 else 5000)
    file = CacheFile(folder, max_bytes=64 << 20, retry_s=3600)
    new, stored = entry(1000)
    if reads_first:
        found = file.select([*expected])
        assert file.write(Batch(entries={new: stored}), NOW + 100, None)
    else:
        assert file.write(Batch(entries={new: stored}), NOW + 100, 1e9)
        found = file.select([*expected])
    assert {k: v for k, v in found.items() if v is not None}.items() <= expected.items()
    file.write(Batch(broken=[k for k, v in found.items() if v is None]), NOW + 100, None)
    file.count()
    for _ in range(5):  # each may find another damage
        assert file.write(Batch(entries={new: stored}), NOW + 100, None)
        if is_well := file.select([new]) == {new: stored}:
            break
    assert is_well
    assert file.write(Batch(kinds=["k"]), NOW + 100, None)
    assert file.select([*expected, new]) == {}
    assert file.write(batch(range(3)), NOW + 100, None)
    assert file.select([*entries(range(3))]) == entries(range(3))
    assert not file.is_resting
    file.close()
    return len([v for v in found.values() if v is not None])


def copy_of(whole: Path, name: str, to: Path) -> Path:
    """The log's index stays behind: it is memory that processes share."""
    to.mkdir()
    for path in (whole / name).iterdir():
        if not path.name.endswith("-shm"):
            shutil.copy(path, to)
    return to


@pytest.mark.parametrize("name", ["closed", "open"])
def test_a_file_that_is_cut_anywhere_is_a_miss(whole: Path, name: str) -> None:
    suffix = "-wal" if name == "open" else ""
    path = the_file(whole / name)
    size = path.with_name(path.name + suffix).stat().st_size
    rng = random.Random(3)
    found = []
    for n in range(30):
        to = copy_of(whole, name, whole / f"cut {n}")
        at = [0, 1, 99, 100, 511, PAGE_BYTES, size - 1, size][n] if n < 8 else rng.randrange(size)
        os.truncate(to / (path.name + suffix), at)
        found.append(check_damaged(to, reads_first=n % 2 == 0))
    assert found[0] == 0
    assert found[7] == 60
    assert len({*found}) > 2 or name == "closed"  # SQLite refuses a file that is too short


@pytest.mark.parametrize("name", ["closed", "open"])
def test_garbage_anywhere_in_the_file_is_a_miss(whole: Path, name: str) -> None:
    path = the_file(whole / name)
    rng = random.Random(5)
    found = []
    for n in range(30):
        to = copy_of(whole, name, whole / f"garbage {n}")
        for damaged in sorted(to.iterdir()):
            data = bytearray(damaged.read_bytes())
            for _ in range(rng.choice([1, 5, 100])):
                at = rng.randrange(100 if rng.random() < 0.1 else len(data))
                piece = rng.randbytes(rng.choice([1, 8, 300]))
                data[at : at + len(piece)] = piece
            damaged.write_bytes(data)
        found.append(check_damaged(to, reads_first=n % 2 == 0))
    assert path.exists()
    assert 0 in found
    assert len({*found}) > 2


@pytest.mark.parametrize("content", [b"", b"\0" * 9000, b"garbage" * 2000])
def test_a_file_of_something_else_begins_anew(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / NAMES.replace("*", "0")
    path.write_bytes(content)
    check_damaged(tmp_path, reads_first=True)


@pytest.mark.parametrize(
    "sql",
    [
        "PRAGMA user_version = 2",
        "PRAGMA user_version = 0",
        "DROP INDEX by_use",
        "ALTER TABLE entries RENAME TO others",
        "CREATE TABLE more (a)",
    ],
)
def test_a_file_of_another_schema_begins_anew(
    whole: Path, sql: str, caplog: pytest.LogCaptureFixture
) -> None:
    connection = sqlite3.connect(the_file(whole / "closed"))
    connection.execute(sql)
    connection.close()
    assert check_damaged(whole / "closed", reads_first=True) == 0
    assert "damaged and begins anew" in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        "value = zeroblob(1000)",
        "value = substr(value, 1, 999)",
        "value = 7",
        "kind = 'l'",
        "created_at = created_at + 1",
        "checksum = ''",
    ],
)
def test_an_entry_whose_checksum_is_wrong_is_a_miss_and_is_removed(
    tmp_path: Path, open_file: Open, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = open_file()
    write(file, range(3))
    connection_of(file).execute(f"UPDATE entries SET {change} WHERE key = ?", (entry(1)[0],))

    async def main(store: DiskStore) -> None:
        expected = entries(range(0, 3, 2))
        assert await store.get_many("k", [*entries(range(3))]) == expected
        await store.flush()

    with_store(tmp_path, main)
    assert sorted(file.select([*entries(range(3))])) == sorted(entries(range(0, 3, 2)))
    assert "1 damaged entries are removed" in caplog.text


def test_a_value_under_a_foreign_key_is_a_miss(open_file: Open) -> None:
    file = open_file()
    write(file, range(1))
    connection_of(file).execute("UPDATE entries SET key = ?", (entry(1)[0],))
    assert file.select([entry(1)[0]]) == {entry(1)[0]: None}


def test_who_has_a_removed_file_open_goes_to_the_new_one(open_file: Open, tmp_path: Path) -> None:
    one, other = open_file(), open_file()
    write(one, range(3))
    assert other.select([entry(1)[0]])
    connection_of(one).execute("PRAGMA wal_checkpoint(TRUNCATE)")
    old = the_file(tmp_path)
    with old.open("r+b") as data:
        data.write(b"garbage" * 20)
    one.close()  # so it reads the file again
    assert one.select([entry(1)[0]]) == {}
    assert the_file(tmp_path) != old
    assert one.write(batch(range(5, 6)), NOW, None)
    assert other.select([entry(5)[0]]) == entries(range(5, 6))
    assert other.write(batch(range(6, 7)), NOW, None)
    assert one.select([entry(6)[0]]) == entries(range(6, 7))


def test_a_folder_that_somebody_empties_is_filled_again(open_file: Open, tmp_path: Path) -> None:
    file = open_file(tmp_path / "cache")
    write(file, range(3))
    shutil.rmtree(tmp_path / "cache")
    assert file.select([entry(1)[0]]) == {}
    write(file, range(3))
    assert file.select([entry(1)[0]])


def test_of_several_files_the_newest_counts(open_file: Open, tmp_path: Path) -> None:
    (tmp_path / "other.sqlite").write_bytes(b"not ours")
    file = open_file()
    write(file, range(3))
    file.close()
    newer = the_file(tmp_path).rename(tmp_path / NAMES.replace("*", "2"))
    (tmp_path / NAMES.replace("*", "1")).write_bytes(b"old")
    assert open_file().select([*entries(range(9))]) == entries(range(3))
    assert the_file(tmp_path) == newer
    assert (tmp_path / "other.sqlite").read_bytes() == b"not ours"


def test_all_who_come_at_once_to_an_empty_folder_find_a_file(tmp_path: Path) -> None:
    for n_round in range(20):
        folder = tmp_path / str(n_round)
        together = threading.Barrier(4)

        def begin(n: int, folder: Path = folder, together: threading.Barrier = together) -> bool:
            file = CacheFile(folder, max_bytes=MIN_BYTES, retry_s=3600, makes=n > 0)
            together.wait()
            file.select([*entries(range(9))])
            is_written = file.write(batch(range(n, n + 1)), NOW, None)
            file.close()
            return is_written and not file.is_resting

        with ThreadPoolExecutor(4) as pool:
            assert all([*pool.map(begin, range(4))][1:])
        assert len([*folder.glob(NAMES)]) == 1


def test_a_file_that_was_never_finished_is_cleared_away(open_file: Open, tmp_path: Path) -> None:
    old, new = (tmp_path / (NAMES.replace("*", name) + ".new") for name in "ab")
    old.touch()
    new.touch()
    os.utime(old, (1, 1))
    write(open_file(), range(1))
    assert not old.exists()
    assert new.exists()


def test_an_index_that_lists_what_is_not_there_does_not_hold_up_the_writer(
    open_file: Open,
) -> None:
    for damage in ("UPDATE entries SET size = 'x'", "UPDATE entries SET size = -1, kind = 7"):
        file = open_file()
        write(file, range(90), 50_000)
        connection_of(file).execute(damage)
        write(file, range(90, 120), 50_000)
        assert not file.is_resting
        assert connection_of(file).execute("DELETE FROM entries").rowcount > 0


# faults of the disk


def with_store(
    folder: Path, main: Callable[[DiskStore], Coroutine[Any, Any, T]], retry_s: float = 3600
) -> T:
    async def opened() -> T:
        store = DiskStore(folder, max_bytes=MIN_BYTES, retry_s=retry_s, clock=lambda: NOW)
        store.start()
        try:
            return await main(store)
        finally:
            await store.close()

    return asyncio.run(opened())


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.message for r in caplog.records if r.levelno >= logging.WARNING]


def test_a_place_where_nothing_can_be_written_costs_the_cache_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()

    async def main(store: DiskStore) -> None:
        for _ in range(3):
            put(store, entries(range(5)))
            await store.flush()
            assert await store.get_many("k", [*entries(range(5))]) == {}
        stats = await store.stats()
        assert (stats.dropped, stats.is_resting, stats.file_bytes) == (15, True, 0)
        await store.clear(None)

    with_store(tmp_path / "file" / "cache", main)
    (warning,) = warnings(caplog)
    assert "CACHE_DIR" in warning


FAULTS = [
    "database or disk is full",
    "attempt to write a readonly database",
    "disk I/O error",
    "unable to open database file",
    "database is locked",
]


@pytest.mark.parametrize("message", FAULTS)
def test_a_disk_that_fails_is_tried_again_and_warned_of_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    message: str,
) -> None:
    n_tries = 0

    def fail(self: CacheFile) -> sqlite3.Connection:
        nonlocal n_tries
        n_tries += 1
        raise sqlite3.OperationalError(message)

    async def main(store: DiskStore) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(CacheFile, "_open", fail)
            for n in range(3):
                put(store, entries(range(n, n + 1)))
                await store.flush()
        put(store, entries(range(5, 6)))
        await store.flush()
        assert await store.get_many("k", [*entries(range(9))]) == entries(range(5, 6))

    with_store(tmp_path, main, retry_s=0)
    assert n_tries >= 3
    assert len(warnings(caplog)) == 1
    assert message in warnings(caplog)[0]


def test_while_it_rests_the_disk_is_not_touched(
    open_file: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = open_file()
    write(file, range(1))
    file.rest("a test")
    monkeypatch.setattr(CacheFile, "_open", None)
    assert file.select([entry(0)[0]]) == {}
    assert not file.write(batch(range(1)), NOW, None)
    assert file.count() == {}


def test_a_full_disk_and_a_read_only_one_leave_what_is_there(open_file: Open) -> None:
    for pragma in ("max_page_count = 20", "query_only = ON"):
        file = open_file()
        write(file, range(3))
        connection_of(file).execute(f"PRAGMA {pragma}")
        assert not file.write(batch(range(10, 12), 60_000), NOW, None)
        assert file.is_resting
        file._retry_at = 0
        assert len(file.select([*entries(range(3))])) == 3
        assert file.write(batch(range(10, 12), 60_000), NOW, None)


def test_a_disk_that_does_not_answer_is_a_miss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_disk, "READ_TIMEOUT_S", 0.05)
    goes_on = threading.Event()

    def hang(self: CacheFile, keys: object) -> dict[bytes, Stored | None]:
        goes_on.wait()
        return {}

    monkeypatch.setattr(CacheFile, "select", hang)

    async def main(store: DiskStore) -> None:
        assert await store.get_many("k", [b"a"]) == {}
        assert await store.get_many("k", [b"a"]) == {}  # at once
        assert (await store.stats()).is_resting
        goes_on.set()

    with_store(tmp_path, main)


def test_one_that_leaves_when_the_disk_answers_has_left(tmp_path: Path) -> None:
    class Held(ThreadPoolExecutor):
        """Answers when it is told to."""

        def submit(self, *_: Any) -> "Future[Any]":  # type: ignore[override]
            self.answer: Future[Any] = Future()
            return self.answer

    async def main(store: DiskStore) -> None:
        reader, store._reader = store._reader, (held := Held())
        reading = asyncio.create_task(store.get_many("k", [b"a"]))
        await asyncio.sleep(0)
        held.answer.set_result({})
        asyncio.get_running_loop().call_soon(reading.cancel)  # when it is known, and not yet read
        with pytest.raises(asyncio.CancelledError):
            await reading
        store._reader = reader

    with_store(tmp_path, main)


def test_what_takes_long_to_count_holds_up_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on = threading.Event()
    count = CacheFile.count

    def slow(self: CacheFile) -> dict[str, tuple[int, int]]:
        goes_on.wait()
        return count(self)

    async def main(store: DiskStore) -> None:
        put(store, entries(range(5)))
        await store.flush()
        assert (await store.stats()).kinds["k"].entries == 5
        monkeypatch.setattr(cache_disk, "READ_TIMEOUT_S", 0.05)
        monkeypatch.setattr(CacheFile, "count", slow)
        put(store, entries(range(5, 8)))
        await store.flush()
        for _ in range(2):
            stats = await store.stats()
            assert (stats.kinds["k"].entries, stats.is_resting) == (5, False), "as it was"
        monkeypatch.undo()
        assert len(await store.get_many("k", [*entries(range(8))])) == 8
        goes_on.set()
        assert (await store.stats()).kinds["k"].entries == 8

    with_store(tmp_path, main)


# the queue


def test_what_finds_no_room_in_the_queue_is_dropped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_disk, "MAX_QUEUED_BYTES", 10_000)

    async def main() -> None:
        store = DiskStore(tmp_path, max_bytes=MIN_BYTES)
        put(store, entries(range(20)))  # nobody writes yet
        put(store, entries(range(20, 21), MIN_BYTES))  # never has room
        store.start()
        await store.flush()
        found = await store.get_many("k", [*entries(range(20))])
        assert found == entries(range(7))
        assert (await store.stats()).dropped == 14
        await store.close()

    asyncio.run(main())


def test_what_waits_is_found_and_not_what_it_replaces(tmp_path: Path) -> None:
    (name, old), (_, new) = entry(1), entry(2)

    async def main(store: DiskStore) -> None:
        store.put(name, old)
        await store.flush()
        with store._queue._changed:  # nothing is taken out
            store.put(name, old)
            store.put(name, new)
            assert store._queue.get_many([name, b"other"]) == {name: new}
        assert await store.get_many("k", [name]) == {name: new}
        await store.flush()
        assert await store.get_many("k", [name]) == {name: new}
        assert store._queue._n_bytes == 0

    with_store(tmp_path, main)


def test_what_waits_is_written_at_the_end_and_later_nothing(tmp_path: Path) -> None:
    async def write_some(store: DiskStore) -> DiskStore:
        put(store, entries(range(100)))
        return store

    closed = with_store(tmp_path, write_some)

    async def after() -> None:
        put(closed, entries(range(1)))
        closed.touch([b"a"])
        await closed.flush()
        await closed.clear(None)
        assert await closed.get_many("k", [b"a"]) == {}

    asyncio.run(after())

    async def read(store: DiskStore) -> dict[bytes, Stored]:
        return await store.get_many("k", [*entries(range(100))])

    assert with_store(tmp_path, read) == entries(range(100))


def test_a_clear_that_the_disk_does_not_take_holds_until_it_does(tmp_path: Path) -> None:
    async def main(store: DiskStore) -> None:
        keys = [*entries(range(3))]
        put(store, entries(range(3)))
        await store.flush()
        store._writes.rest("a test")
        await store.clear("k")
        assert await store.get_many("k", keys) == {}
        store._writes._retry_at = 0
        put(store, entries(range(1)))
        await store.flush()
        assert await store.get_many("k", keys) == entries(range(1))

    with_store(tmp_path, main)


def test_a_fault_in_our_own_code_ends_neither_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("a bug")

    async def main(store: DiskStore) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(CacheFile, "_run", fail)
            put(store, entries(range(1)))
            await store.flush()
            assert await store.get_many("k", [*entries(range(1))]) == {}
        put(store, entries(range(1)))
        await store.flush()
        assert await store.get_many("k", [*entries(range(1))]) == entries(range(1))

    with_store(tmp_path, main)
    assert "a bug" in caplog.text


def test_uses_are_written_with_the_next_batch(tmp_path: Path, open_file: Open) -> None:
    file = open_file()
    write(file, range(2), now=NOW - 2 * TOUCH_S)

    async def main(store: DiskStore) -> None:
        store.touch([entry(0)[0]])

    with_store(tmp_path, main)
    used = dict(connection_of(file).execute("SELECT key, used_at FROM entries").fetchall())
    assert used == {entry(0)[0]: NOW, entry(1)[0]: NOW - 2 * TOUCH_S + 1}


def test_the_writer_ends_with_the_store(tmp_path: Path) -> None:
    async def main(store: DiskStore) -> threading.Thread:
        return store._writer

    writer = with_store(tmp_path, main)
    writer.join(10)
    assert not writer.is_alive()
