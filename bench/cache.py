"""The cache alone: what a hit and a miss cost, and what many entries take of memory and disk.

python -m bench.cache [--entries 100000]
"""

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import psutil

from cache import Cache, key
from cache_disk import DiskStore

MB = 1 << 20
VECTOR_BYTES = 4096


async def median_us(ask: Callable[[int], Awaitable[object]], n: int = 1000) -> float:
    times = []
    for i in range(n):
        start = time.perf_counter()
        await ask(i)
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times)


async def speed(folder: Path) -> None:
    disk = DiskStore(folder, max_bytes=1024 * MB)
    async with Cache(max_bytes=256 * MB, ttl_s=86400, disk=disk) as cache:
        answers = [key("answer", i) for i in range(1000)]
        absent = [key("absent", i) for i in range(1000)]
        cache.put_many("answer", dict.fromkeys(answers, b"x" * 3000))
        await disk.flush()
        print(
            f"a hit in memory: {await median_us(lambda i: cache.get('answer', answers[i])):.1f} µs"
        )
        print(
            f"a miss, disk too: {await median_us(lambda i: cache.get('answer', absent[i])):.0f} µs"
        )

        start = time.process_time()
        for i in range(1000):
            name = key("new", i)
            await cache.get("new", name)
            cache.put("new", name, b"x" * 3000)
        await disk.flush()
        print(f"a miss, put and written: {1e3 * (time.process_time() - start):.0f} µs of CPU")

        vectors = {key("vector", i): os.urandom(VECTOR_BYTES) for i in range(1000)}
        cache.put_many("vector", vectors)
        await disk.flush()
        us = await median_us(lambda _: cache.get_many("vector", vectors), 9)
        print(f"1,000 vectors from memory: {us / 1e3:.1f} ms")
    disk = DiskStore(folder, max_bytes=1024 * MB)
    async with Cache(max_bytes=0, ttl_s=86400, disk=disk) as cache:
        us = await median_us(lambda _: cache.get_many("vector", vectors), 9)
        print(f"1,000 vectors from disk: {us / 1e3:.1f} ms")


async def limits(folder: Path, n_entries: int, value_bytes: int, memory: int, on_disk: int) -> None:
    process = psutil.Process()
    disk = DiskStore(folder, max_bytes=on_disk * MB)
    async with Cache(max_bytes=memory * MB, ttl_s=86400, disk=disk) as cache:
        before = process.memory_info().rss
        most_on_disk = 0
        for first in range(0, n_entries, 100):
            names = [key("entry", n) for n in range(first, first + 100)]
            cache.put_many("entry", {name: os.urandom(value_bytes) for name in names})
            await disk.flush()
            most_on_disk = max(most_on_disk, size_of(folder))
        grown = process.memory_info().rss - before
        kind = (await cache.stats()).kinds["entry"]
        print(
            f"{n_entries} entries of {value_bytes} bytes: {kind.entries} in {memory} MB, counted "
            f"as {kind.size_bytes / MB:.1f}, the process grew by {grown / MB:.1f} MB; "
            f"{kind.disk.entries} in {on_disk} MB of disk, at most {most_on_disk / MB:.1f} MB"
        )


def size_of(folder: Path) -> int:
    size = 0
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # logs come and go
            size += path.stat().st_size
    return size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entries", type=int, default=100_000)
    entries = parser.parse_args().entries
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(speed(Path(folder)))
    for value_bytes, memory, on_disk in ((16, 64, 16), (VECTOR_BYTES, 64, 128)):
        with tempfile.TemporaryDirectory() as folder:
            asyncio.run(limits(Path(folder), entries, value_bytes, memory, on_disk))


if __name__ == "__main__":
    main()
