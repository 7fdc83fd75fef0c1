"""Keys, and a cache of memory and disk beside a plain dict."""

import asyncio
import math
import shutil
import sys
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from bench.cache import size_of
from cache import ENTRY_BYTES, Cache, Entry, MemoryStore, key
from cache_disk import DiskStore
from cache_file import MAX_SKEW_S, MIN_BYTES, Stored

T = TypeVar("T")


def run(main: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(main)


class Clock:
    def __init__(self, now: float = 1e9) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


# keys

ATOMS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=4)
    | st.binary(max_size=4)
)
DATA = st.recursive(
    ATOMS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=6,
)
PARTS = st.lists(DATA, max_size=3)


def spelled(value: object) -> str:
    """What a value is, with its types; the order of a dict is not part of it."""
    if isinstance(value, list):
        return f"[{','.join(map(spelled, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(sorted(f'{k!r}:{spelled(v)}' for k, v in value.items()))}}}"
    return f"{type(value).__name__} {value!r}"


@given(st.text(max_size=2), PARTS, st.text(max_size=2), PARTS)
def test_two_inputs_have_one_key_only_if_they_are_the_same(
    a_kind: str, a: list[Any], b_kind: str, b: list[Any]
) -> None:
    is_same = (a_kind, spelled(a)) == (b_kind, spelled(b))
    assert (key(a_kind, *a) == key(b_kind, *b)) is is_same


@given(st.dictionaries(st.text(max_size=3), DATA))
def test_the_order_of_a_dict_does_not_matter(value: dict[str, Any]) -> None:
    assert key("k", value) == key("k", dict(reversed(value.items())))


def test_pieces_that_join_to_the_same_have_keys_of_their_own() -> None:
    pieces: list[tuple[Any, ...]] = [
        ("ab", "c"), ("a", "bc"), ("abc",), (["ab", "c"],), (["a", "bc"],), (("ab",), "c"),
        ("abc", None), ("abc", ""), (b"abc",), (1,), (1.0,), (True,), ("1",), (0.0,), (-0.0,),
        ({"1": 2},), ([["1", 2]],),
    ]  # fmt: skip
    assert len({key("k", *parts) for parts in pieces}) == len(pieces)
    assert key("k", 1) != key("l", 1)
    assert len(key("k")) == 32
    with pytest.raises(TypeError):
        key("k", {1: 2})


class Sampling(msgspec.Struct):
    temperature: float
    top_k: int


def test_structs_are_told_apart_by_their_fields() -> None:
    assert key("k", Sampling(0.5, 1)) == key("k", Sampling(0.5, 1))
    assert key("k", Sampling(0.5, 1)) != key("k", Sampling(0.5, 2))
    assert key("k", Sampling(0.5, 1)) != key("k", [0.5, 1])


# memory


def store(n_entries: float, size: int = 100) -> MemoryStore:
    return MemoryStore(int(n_entries * (size + ENTRY_BYTES)))


def of(size: int, created_at: float = 0.0, kind: str = "k") -> Stored:
    return Stored(kind, b"x" * size, created_at)


def test_the_least_recently_used_goes_first() -> None:
    memory = store(2)
    memory.put(b"a", of(100))
    memory.put(b"b", of(100))
    assert memory.get(b"a")
    memory.put(b"c", of(100))
    assert [memory.get(name) is not None for name in (b"a", b"b", b"c")] == [True, False, True]
    assert memory.of_kind("k").evictions == 1


def test_what_is_larger_than_the_room_does_not_drive_out_the_rest() -> None:
    memory = store(2)
    memory.put(b"a", of(100))
    memory.put(b"b", of(5000))
    assert memory.get(b"a")
    assert not memory.get(b"b")


def test_an_entry_that_is_replaced_counts_once() -> None:
    memory = store(2)
    for size in (10, 100, 50):
        memory.put(b"a", of(size))
    kinds = memory.stats()
    assert (kinds["k"].entries, kinds["k"].size_bytes) == (1, 50 + ENTRY_BYTES)


def test_what_nobody_used_until_it_expired_makes_room() -> None:
    memory = store(9)
    for n, name in enumerate((b"a", b"b", b"c")):
        memory.put(name, of(100, created_at=n))
    memory.drop_expired(before=2)
    assert memory.stats()["k"].entries == 1
    assert memory.get(b"c")


# both


def test_an_entry_has_its_age_and_is_a_miss_when_that_is_too_much() -> None:
    async def main() -> None:
        clock = Clock()
        cache = Cache(max_bytes=10_000, ttl_s=10, clock=clock)
        cache.put("k", b"a", b"1")
        clock.now += 4
        assert await cache.get("k", b"a") == Entry(b"1", 4)
        assert await cache.get("k", b"a", max_age_s=4) is None
        assert await cache.get("k", b"a", max_age_s=5) == Entry(b"1", 4)
        assert await cache.get("k", b"a", max_age_s=0) is None
        clock.now += 6
        assert await cache.get("k", b"a", max_age_s=math.inf) is None
        stats = (await cache.stats()).kinds["k"]
        assert (stats.entries, stats.hits, stats.misses) == (0, 2, 3)

    run(main())


def test_what_the_disk_has_is_as_old_as_it_was_and_comes_to_memory_unless_it_has_expired(
    tmp_path: Path,
) -> None:
    clock = Clock()

    def cache(max_bytes: int) -> Cache:
        disk = DiskStore(tmp_path, max_bytes=MIN_BYTES, clock=clock)
        return Cache(max_bytes=max_bytes, ttl_s=60, disk=disk, clock=clock)

    async def main() -> None:
        async with cache(0) as before:
            before.put("k", b"a", b"1")
        clock.now += 50
        async with cache(10_000) as after:
            assert await after.get("k", b"a", max_age_s=50) is None
            assert (await after.stats()).kinds["k"].entries == 1
            assert await after.get("k", b"a", max_age_s=51) == Entry(b"1", 50)
        clock.now += 10
        async with cache(10_000) as late:
            assert await late.get("k", b"a") is None
            assert (await late.stats()).kinds["k"].entries == 0

    run(main())


def test_what_is_put_while_the_disk_is_asked_is_not_replaced_by_what_it_had(tmp_path: Path) -> None:
    async def main() -> None:
        async with Cache(max_bytes=0, disk=DiskStore(tmp_path, max_bytes=MIN_BYTES)) as before:
            before.put("k", b"a", b"old")
        disk = DiskStore(tmp_path, max_bytes=MIN_BYTES)
        async with Cache(max_bytes=10_000, disk=disk) as cache:
            reading = asyncio.create_task(cache.get("k", b"a"))
            await asyncio.sleep(0)  # it is on its way
            cache.put("k", b"a", b"new")
            await reading
            found = await cache.get("k", b"a")
            assert found
            assert found.value == b"new"

    run(main())


def test_the_disk_hears_of_each_use_also_of_what_memory_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        disk = DiskStore(tmp_path, max_bytes=MIN_BYTES)
        used: list[bytes] = []
        monkeypatch.setattr(disk, "touch", used.extend)
        async with Cache(max_bytes=10_000, disk=disk) as cache:
            cache.put("k", b"a", b"1")
            await cache.get_many("k", [b"a", b"b"])
        assert used == [b"a"]

    run(main())


def test_an_entry_from_the_future_is_a_miss_and_a_small_step_back_does_no_harm() -> None:
    async def main() -> None:
        for ttl_s in (None, 0, 1000):
            clock = Clock()
            cache = Cache(max_bytes=10_000, ttl_s=ttl_s, clock=clock)
            cache.put("k", b"a", b"1")
            clock.now -= MAX_SKEW_S
            assert await cache.get("k", b"a") == Entry(b"1", 0)
            clock.now -= 1
            assert await cache.get("k", b"a") is None
            cache.put("k", b"a", b"2")
            assert await cache.get("k", b"a") == Entry(b"2", 0)

    run(main())


def test_a_hit_in_memory_does_not_wait() -> None:
    async def main(cache: Cache) -> None:
        with pytest.raises(StopIteration, match=r"b.1."):
            cache.get("k", b"a").send(None)

    cache = Cache(max_bytes=10_000)
    cache.put("k", b"a", b"1")
    run(main(cache))


def test_a_key_of_another_kind_is_a_miss() -> None:
    async def main() -> None:
        cache = Cache(max_bytes=10_000)
        cache.put("k", b"a", b"1")
        assert await cache.get("l", b"a") is None

    run(main())


def test_one_kind_is_cleared_or_all() -> None:
    async def main(folder: Path) -> None:
        disk = DiskStore(folder, max_bytes=MIN_BYTES)
        async with Cache(max_bytes=100_000, disk=disk) as cache:
            for kind, name in (("k", b"a"), ("k", b"b"), ("l", b"c")):
                cache.put(kind, name, b"1")
            await cache.clear("k")
            assert await cache.get_many("k", [b"a", b"b"]) == {}
            assert (await cache.get_many("l", [b"c"])).keys() == {b"c"}
            await cache.clear()
            assert await cache.get_many("l", [b"c"]) == {}
            stats = await cache.stats()
            assert stats.disk
            assert not stats.disk.kinds
            assert {kind.entries for kind in stats.kinds.values()} == {0}

    with tempfile.TemporaryDirectory() as folder:
        run(main(Path(folder)))


def test_what_was_read_before_a_clear_does_not_come_back_after_it() -> None:
    async def main(folder: Path) -> None:
        async with Cache(max_bytes=0, disk=DiskStore(folder, max_bytes=MIN_BYTES)) as before:
            before.put("k", b"a", b"1")
        async with Cache(max_bytes=10_000, disk=DiskStore(folder, max_bytes=MIN_BYTES)) as cache:
            reading = asyncio.create_task(cache.get("k", b"a"))
            await asyncio.sleep(0)  # it is on its way
            await cache.clear("k")
            assert await reading is None
            assert await cache.get("k", b"a") is None

    with tempfile.TemporaryDirectory() as folder:
        run(main(Path(folder)))


def test_the_memory_of_many_small_entries_is_what_they_are_counted_for() -> None:
    """Everything that is new and only theirs, by the size that Python tells."""
    memory = MemoryStore(1 << 30)
    n = 20_000
    for at in range(n):
        memory.put(key("k", at), Stored("k", at.to_bytes(16, "little"), 1e9 + at))
    table = sys.getsizeof(memory._entries)  # with the list of their order
    parts = sum(
        sys.getsizeof(name) + sys.getsizeof(s) + sys.getsizeof(s.value) + sys.getsizeof(1.0)
        for name, s in memory._entries.items()
    )
    counted = memory.stats()["k"].size_bytes
    assert 0.5 * counted < table + parts < counted


KINDS = st.sampled_from(["generation", "vector"])
NAMES = st.integers(0, 5)
SIZES = st.sampled_from([0, 1, 16, 4096, 60_000])
TTL_S = 1000.0


class CacheMachine(RuleBasedStateMachine):
    """A value that is found is the last that was put under its key, and of its true age. One that
    must be there is found: where there is room, and the clock was not set back."""

    @initialize(is_roomy=st.booleans(), has_disk=st.booleans())
    def begin(self, is_roomy: bool, has_disk: bool) -> None:
        self.loop = asyncio.new_event_loop()
        self.clock = Clock()
        self.has_disk = has_disk
        self.is_complete = is_roomy
        self.memory_bytes = 4 << 20 if is_roomy else 5000
        self.disk_bytes = (64 if is_roomy else 1) * MIN_BYTES
        self.folder = Path(tempfile.mkdtemp())
        self.model: dict[tuple[str, int], tuple[bytes, float]] = {}
        self.n_puts = 0
        self.open()

    def open(self) -> None:
        disk = DiskStore(self.folder, max_bytes=self.disk_bytes, ttl_s=TTL_S, clock=self.clock)
        self.cache = Cache(
            max_bytes=self.memory_bytes,
            ttl_s=TTL_S,
            disk=disk if self.has_disk else None,
            clock=self.clock,
        )
        self.loop.run_until_complete(self.cache.__aenter__())

    def close(self) -> None:
        self.loop.run_until_complete(self.cache.__aexit__())

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            self.close()
            self.loop.close()
            shutil.rmtree(self.folder)

    @rule(kind=KINDS, names=st.lists(NAMES, max_size=3), size=SIZES)
    def put(self, kind: str, names: list[int], size: int) -> None:
        for name in names:
            self.n_puts += 1
            value = self.n_puts.to_bytes(4, "little") + bytes(size)
            self.model[kind, name] = value, self.clock.now
            self.cache.put(kind, key(kind, name), value)

    @rule(n=st.integers(1, 10))
    def put_others(self, n: int) -> None:
        """They need room."""
        self.n_puts += n
        for at in range(n):
            self.cache.put("o", key("o", self.n_puts + at), bytes(100_000))
        if self.n_puts > 300:  # then there is none left
            self.is_complete = False

    @rule(
        kind=KINDS,
        names=st.lists(NAMES, max_size=4),
        max_age_s=st.none() | st.sampled_from([0.0, 5.0, 100.0, 1e9]),
    )
    def get(self, kind: str, names: list[int], max_age_s: float | None) -> None:
        found = self.loop.run_until_complete(
            self.cache.get_many(kind, [key(kind, name) for name in names], max_age_s)
        )
        limit_s = TTL_S if max_age_s is None else min(max_age_s, TTL_S)
        expected = {}
        for name in names:
            if (kind, name) in self.model:
                value, created_at = self.model[kind, name]
                age_s = self.clock.now - created_at
                if age_s >= -MAX_SKEW_S and max(age_s, 0) < limit_s:
                    expected[key(kind, name)] = Entry(value, max(age_s, 0))
        assert found.items() <= expected.items()
        if self.is_complete:
            assert found == expected

    @rule(by_s=st.sampled_from([0.5, 3.0, 50.0, 300.0, 999.0, 5000.0]))
    def wait(self, by_s: float) -> None:
        self.clock.now += by_s

    @rule(by_s=st.sampled_from([1.0, 50.0, 70.0, 2000.0, 1e8]))
    def set_the_clock_back(self, by_s: float) -> None:
        self.clock.now -= by_s
        self.is_complete = False

    @rule(kind=st.none() | KINDS)
    def clear(self, kind: str | None) -> None:
        self.loop.run_until_complete(self.cache.clear(kind))
        self.model = {name: v for name, v in self.model.items() if kind not in (None, name[0])}

    @rule()
    def restart(self) -> None:
        self.close()
        self.open()
        if not self.has_disk:
            self.model = {}

    @invariant()
    def is_within_its_limits(self) -> None:
        if hasattr(self, "cache"):
            size = sum(s.size_bytes for s in self.cache._memory.stats().values())
            assert size <= self.memory_bytes
            assert size_of(self.folder) <= self.disk_bytes


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(
    max_examples=2 * settings().max_examples, stateful_step_count=14
)
