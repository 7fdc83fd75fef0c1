"""What remembering gains and costs: the cache alone, and through the service.

python -m bench.cache [--entries 100000] [--core]

Prints JSON. Times through the service are a client's on this machine; those that are compared are
measured in one run. The default models must be there, and no other configuration.
"""

import argparse
import asyncio
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil

from bench.own_service import service
from cache import Cache, key
from cache_disk import DiskStore

MB = 1 << 20
VECTOR_BYTES = 4096
Figures = dict[str, float]
WORDS = "river stone lamp bird cloud letter garden winter bridge coffee paper train window".split()


async def median_us(ask: Callable[[int], Awaitable[object]], n: int = 1000) -> float:
    times = []
    for i in range(n):
        start = time.perf_counter()
        await ask(i)
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times)


async def speed(folder: Path) -> Figures:
    """Of the cache alone."""
    figures = {}
    disk = DiskStore(folder, max_bytes=1024 * MB)
    async with Cache(max_bytes=256 * MB, ttl_s=86400, disk=disk) as cache:
        answers = [key("answer", i) for i in range(1000)]
        absent = [key("absent", i) for i in range(1000)]
        for name in answers:
            cache.put("answer", name, b"x" * 3000)
        await disk.flush()
        figures["hit_in_memory_us"] = await median_us(lambda i: cache.get("answer", answers[i]))
        figures["miss_of_disk_too_us"] = await median_us(lambda i: cache.get("answer", absent[i]))

        start = time.process_time()
        for i in range(1000):
            name = key("new", i)
            await cache.get("new", name)
            cache.put("new", name, b"x" * 3000)
        await disk.flush()
        figures["miss_put_and_written_cpu_us"] = 1e3 * (time.process_time() - start)

        vectors = {key("vector", i): os.urandom(VECTOR_BYTES) for i in range(1000)}
        for name, value in vectors.items():
            cache.put("vector", name, value)
        await disk.flush()
        us = await median_us(lambda _: cache.get_many("vector", vectors), 9)
        figures["1000_vectors_from_memory_ms"] = us / 1e3
    disk = DiskStore(folder, max_bytes=1024 * MB)
    async with Cache(max_bytes=0, ttl_s=86400, disk=disk) as cache:
        us = await median_us(lambda _: cache.get_many("vector", vectors), 9)
        figures["1000_vectors_from_disk_ms"] = us / 1e3
    return figures


async def limits(
    folder: Path, n_entries: int, value_bytes: int, memory: int, on_disk: int
) -> Figures:
    """What many entries take; the limits are in MB."""
    process = psutil.Process()
    disk = DiskStore(folder, max_bytes=on_disk * MB)
    async with Cache(max_bytes=memory * MB, ttl_s=86400, disk=disk) as cache:
        before = process.memory_info().rss
        most_on_disk = 0
        for first in range(0, n_entries, 100):
            for n in range(first, first + 100):
                cache.put("entry", key("entry", n), os.urandom(value_bytes))
            await disk.flush()
            most_on_disk = max(most_on_disk, size_of(folder))
        grown = process.memory_info().rss - before
        kind = (await cache.stats()).kinds["entry"]
    return {
        "entries": n_entries,
        "value_bytes": value_bytes,
        "memory_limit_mb": memory,
        "kept": kind.entries,
        "counted_mb": kind.size_bytes / MB,
        "grown_mb": grown / MB,
        "disk_limit_mb": on_disk,
        "kept_on_disk": kind.disk.entries,
        "most_on_disk_mb": most_on_disk / MB,
    }


def size_of(folder: Path) -> int:
    size = 0
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # logs come and go
            size += path.stat().st_size
    return size


# through the service


class Client:
    """Asks, and measures how long it takes: by the plainest client there is, on one connection. An
    HTTP library takes as long for a request as the service does."""

    def __init__(self, url: str) -> None:
        self._http = HTTPConnection(urlsplit(url).netloc, timeout=600)

    def ms(self, path: str, body: Any = None, expected: str | None = None, **headers: str) -> float:
        """Ask once. Raises AssertionError where the cache did not do what is measured."""
        content = None if body is None else json.dumps(body).encode()
        start = time.perf_counter()
        self._http.request(
            "GET" if content is None else "POST",
            path,
            content,
            {"Content-Type": "application/json"} | headers,
        )
        reply = self._http.getresponse()
        text = reply.read()
        seconds = time.perf_counter() - start
        assert reply.status == 200, text
        assert expected in (None, reply.headers["x-cache"]), reply.headers
        return 1e3 * seconds

    def disk_entries(self) -> int:
        self._http.request("GET", "/v1/cache")
        kinds = json.loads(self._http.getresponse().read())["kinds"]
        return sum(kind["disk"]["entries"] for kind in kinds.values())


def chat(n: int) -> dict[str, Any]:
    """64 tokens by the default model, of a prompt of its own."""
    message = {"role": "user", "content": f"Tell me about {WORDS[n % len(WORDS)]} number {n}."}
    return {
        "model": "light", "messages": [message], "temperature": 0, "max_tokens": 64,
        "ignore_eos": True,
    }  # fmt: skip


def vectors(n: int) -> dict[str, Any]:
    texts = [" ".join(words) for words in itertools.islice(itertools.product(WORDS, repeat=3), n)]
    return {"model": "embedding", "input": texts, "encoding_format": "base64"}


def chats_and_vectors(folder: Path) -> Figures:
    """By the default models."""
    environment = {"CACHE_DIR": str(folder)}
    with service(environment) as (url, _):
        client = Client(url)
        client.ms("/v1/chat/completions", chat(-1))  # loads the model
        misses = [client.ms("/v1/chat/completions", chat(n), "MISS") for n in range(7)]
        health, hits = [], []
        for n in range(300):  # in turn, so that both see the same machine
            health.append(client.ms("/health"))
            hits.append(client.ms("/v1/chat/completions", chat(n % 7), "HIT"))
        client.ms("/v1/embeddings", {"model": "embedding", "input": "to load it"})
        computed = client.ms("/v1/embeddings", vectors(1000), "MISS")
        memory = [client.ms("/v1/embeddings", vectors(1000), "HIT") for _ in range(7)]
        while client.disk_entries() < 1009:
            time.sleep(0.1)
    from_disk = []
    for _ in range(3):
        with service(environment) as (url, _):
            client = Client(url)
            client.ms("/v1/embeddings", {"model": "embedding", "input": "to load it"}, "HIT")
            from_disk.append(client.ms("/v1/embeddings", vectors(1000), "HIT"))
    miss, hit = statistics.median(misses), statistics.median(hits)
    in_memory, on_disk = statistics.median(memory), statistics.median(from_disk)
    return {
        "chat_miss_ms": miss,
        "chat_hit_ms": hit,
        "chat_miss_per_hit": miss / hit,
        "health_ms": statistics.median(health),
        "chat_hit_per_health": hit / statistics.median(health),
        "1000_vectors_computed_ms": computed,
        "1000_vectors_from_memory_ms": in_memory,
        "1000_vectors_from_disk_ms": on_disk,
        "vectors_computed_per_memory": computed / in_memory,
        "vectors_computed_per_disk": computed / on_disk,
    }


def cpu_of_a_miss(folder: Path, n: int = 200) -> Figures:
    """The server's CPU time for a miss, beyond the same answer without a cache: for one that is
    looked up, put and written, and for each token that comes through what requests share."""
    environment = {"LIGHT_BACKEND": "fake", "CACHE_DIR": str(folder)}
    without_cache = {"Cache-Control": "no-store"}
    numbers = itertools.count()
    with service(environment) as (url, process):
        client, server = Client(url), psutil.Process(process.pid)

        def cpu_ms(n_tokens: int, **headers: str) -> float:
            before = sum(server.cpu_times()[:2])
            for _ in range(n):
                body = chat(next(numbers)) | {"max_tokens": n_tokens}
                client.ms("/v1/chat/completions", body, **headers)
            if not headers:
                time.sleep(0.3)  # what is written after the reply counts
            return 1e3 * (sum(server.cpu_times()[:2]) - before) / n

        def miss_ms(n_tokens: int) -> float:
            """In turn, so that both see the same machine."""
            pairs = [(cpu_ms(n_tokens, **without_cache), cpu_ms(n_tokens)) for _ in range(5)]
            return statistics.median(miss - without for without, miss in pairs)

        cpu_ms(1, **without_cache)
        short, long = miss_ms(1), miss_ms(64)
    return {"miss_cpu_ms": short, "shared_token_cpu_us": 1e3 * (long - short) / 63}


def many_through_the_service(folder: Path, n_entries: int) -> Figures:
    """Vectors of many texts on the fake backend: what the server and its directory grow to."""
    memory, on_disk, n_batch = 32, 16, 1000
    environment = {
        "EMBEDDING_BACKEND": "fake", "CACHE_DIR": str(folder), "CACHE_MAX_MB": str(memory),
        "CACHE_DISK_MAX_MB": str(on_disk),
    }  # fmt: skip
    with service(environment) as (url, process):
        client, server = Client(url), psutil.Process(process.pid)

        def ask(first: int, **headers: str) -> None:
            texts = [f"text {n}" for n in range(first, first + n_batch)]
            body = {"model": "embedding", "input": texts, "encoding_format": "base64"}
            client.ms("/v1/embeddings", body, "BYPASS" if headers else "MISS", **headers)

        for _ in range(10):  # what it takes without
            ask(0, **{"Cache-Control": "no-store"})
        before, most_on_disk = server.memory_info().rss, 0
        for first in range(0, n_entries, n_batch):
            ask(first)
            most_on_disk = max(most_on_disk, size_of(folder))
        grown = server.memory_info().rss - before
        kind = httpx.get(f"{url}/v1/cache").json()["kinds"]["dense"]
    return {
        "entries": n_entries,
        "memory_limit_mb": memory,
        "kept": kind["entries"],
        "counted_mb": kind["size_bytes"] / MB,
        "grown_mb": grown / MB,
        "disk_limit_mb": on_disk,
        "kept_on_disk": kind["disk"]["entries"],
        "most_on_disk_mb": most_on_disk / MB,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entries", type=int, default=100_000)
    parser.add_argument("--core", action="store_true", help="the cache alone")
    arguments = parser.parse_args()

    def measured(measure: Callable[[Path], Figures]) -> Figures:
        with tempfile.TemporaryDirectory() as folder:
            return {name: round(value, 3) for name, value in measure(Path(folder)).items()}

    n = arguments.entries
    figures: dict[str, Any] = {
        "core": measured(lambda folder: asyncio.run(speed(folder))),
        "core_limits": [
            measured(lambda folder: asyncio.run(limits(folder, n, 16, 64, 16))),
            measured(lambda folder: asyncio.run(limits(folder, n, VECTOR_BYTES, 64, 128))),
        ],
    }
    if not arguments.core:
        figures["service"] = measured(chats_and_vectors)
        figures["service_miss"] = measured(cpu_of_a_miss)
        figures["service_limits"] = measured(lambda folder: many_through_the_service(folder, n))
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
