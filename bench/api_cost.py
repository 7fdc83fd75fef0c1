"""What the server process costs beside the model: CPU of a token and of a request, on the backend
`fake`, whose tokens cost next to nothing.

    python -m bench.api_cost

1. `--streams` at once at some 1,000 tokens/s together: the share of a core that the server process
   takes (without its worker).
2. The same with a model that takes no time: how many tokens/s go through at most.
3. Short requests one after the other: CPU of one.

Prints JSON. It starts a service of its own for each part of each round.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

import psutil

from bench.own_service import service
from bench.plain_client import NoMeasurement, post

TOKEN = b'"delta":{"content":"'
PATH = "/v1/chat/completions"


@contextmanager
def serving(n_streams: int, step_ms: float) -> Iterator[tuple[str, psutil.Process]]:
    """The URL and the process of a service with a model that takes `step_ms` a step."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "script.json")
        script.write_text(json.dumps({"step_ms": step_ms}))
        settings = {
            "LIGHT_BACKEND": "fake", "LIGHT_MODEL_PATH": str(script), "LIGHT_PRELOAD": "true",
            # each token is to take its step, and each request its way
            "LIGHT_SPECULATION": "false", "CACHE_MAX_MB": "0",
            "LIGHT_N_PARALLEL": str(n_streams), "LIGHT_N_CTX": "4096",
            "LIGHT_KV_TOKENS": str(4096 * n_streams),
        }  # fmt: skip
        with service(settings) as (url, process):
            yield url, psutil.Process(process.pid)


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


class Streams:
    """Long answers to short prompts, of whose tokens only the number is kept."""

    def __init__(self, url: str, n: int) -> None:
        self._at = urlsplit(url)
        self._n = n
        self.n_tokens = 0
        self._begun: set[int] = set()  # who has had a token
        self._all_run = asyncio.Event()

    async def measure(self, process: psutil.Process, seconds: float) -> tuple[float, float]:
        """Tokens/s, and seconds of CPU that the process takes a token."""
        tasks = [asyncio.create_task(self._read(number)) for number in range(self._n)]
        try:
            begun = asyncio.create_task(self._all_run.wait())
            await asyncio.wait({begun, *tasks}, return_when=asyncio.FIRST_COMPLETED)
            begun.cancel()
            await asyncio.sleep(0.3 * seconds)  # until they run evenly
            n_before, cpu_before, started_at = self.n_tokens, cpu_s(process), time.perf_counter()
            await asyncio.sleep(seconds)
            wall_s = time.perf_counter() - started_at
            n, used_s = self.n_tokens - n_before, cpu_s(process) - cpu_before
        finally:
            for task in tasks:
                task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, Exception):
                raise result
        if not n:
            raise NoMeasurement("no tokens came")
        return n / wall_s, used_s / n

    async def _read(self, number: int) -> None:
        body = {
            "model": "light", "stream": True, "max_tokens": 2000, "ignore_eos": True,
            "messages": [{"role": "user", "content": f"Go on, {number}"}],
        }  # fmt: skip
        while True:
            reader, writer = await asyncio.open_connection(self._at.hostname, self._at.port)
            try:
                writer.write(post(PATH, body))
                status = await reader.readline()
                if b" 200 " not in status:
                    raise NoMeasurement(status.decode(errors="replace"))
                while data := await reader.read(1 << 16):
                    if n := data.count(TOKEN):
                        self.n_tokens += n
                        self._begun.add(number)
                        if len(self._begun) == self._n:
                            self._all_run.set()
            finally:
                writer.close()


async def request_cpu_s(url: str, process: psutil.Process, n: int) -> float:
    """Seconds of CPU that the process takes for a whole answer of one token."""
    at = urlsplit(url)

    async def ask(number: int) -> None:
        messages = [{"role": "user", "content": f"Say {number}"}]
        reader, writer = await asyncio.open_connection(at.hostname, at.port)
        writer.write(post(PATH, {"model": "light", "messages": messages, "max_tokens": 1}))
        data = await reader.read()
        writer.close()
        if b" 200 " not in data.partition(b"\r\n")[0]:
            raise NoMeasurement(data[:400].decode(errors="replace"))

    for number in range(20):
        await ask(number)
    before_s = cpu_s(process)
    for number in range(n):
        await ask(20 + number)
    return (cpu_s(process) - before_s) / n


def measure(n_streams: int, seconds: float, n_requests: int) -> dict[str, float]:
    """One round."""
    found: dict[str, float] = {}
    with serving(n_streams, step_ms=n_streams) as (url, process):  # a token each: 1,000 a second
        rate, token_s = asyncio.run(Streams(url, n_streams).measure(process, seconds))
        found |= {"tokens_per_s": rate, "us_per_token": 1e6 * token_s}
        # what it takes at exactly the rate that was meant
        found["core_share_at_1000"] = 1000 * token_s
    with serving(n_streams, step_ms=0) as (url, process):
        rate, token_s = asyncio.run(Streams(url, n_streams).measure(process, seconds))
        found |= {"most_tokens_per_s": rate, "us_per_token_at_most": 1e6 * token_s}
        found["us_per_request"] = 1e6 * asyncio.run(request_cpu_s(url, process, n_requests))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--streams", type=int, default=64, metavar="N")
    add("--seconds", type=float, default=5, metavar="S", help="of a part")
    add("--requests", type=int, default=300, metavar="N")
    add("--rounds", type=int, default=3, metavar="N")
    args = parser.parse_args(argv)
    rounds = [measure(args.streams, args.seconds, args.requests) for _ in range(args.rounds)]
    report: dict[str, Any] = {name: median(r[name] for r in rounds) for name in rounds[0]}
    print(json.dumps(vars(args) | {"median": report, "rounds": rounds}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
