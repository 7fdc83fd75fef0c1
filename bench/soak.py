"""A service of its own under mixed traffic and faults: nothing is lost, held or leaked.

    python -m bench.soak                  twenty minutes
    python -m bench.soak --seconds 60

Five tiers of the fake backend, of which three fit into memory, are asked for chats, completions,
vectors and scores, whole and streamed, some again and again. Meanwhile clients leave, workers are
killed, and now and then a model cannot be loaded, or the cache's disk be written. Every answer must
be right or a documented error, none may take longer than its limit; at the end nothing is held.
Prints JSON; exit status 1 when something was not so. Memory is watched from the end of the warm-up
on.
"""

import argparse
import asyncio
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import linear_regression
from typing import Any

import httpx
import psutil

from bench.own_service import service

CHAT_TIERS = ("light", "medium", "heavy")
TIERS = (*CHAT_TIERS, "embedding", "reranker")
# codes of errors that faults explain
DOCUMENTED = {
    "queue_full", "queue_timeout", "worker_crashed", "model_unavailable", "model_load_failed",
    "insufficient_memory", "request_timeout", "internal_error",
}  # fmt: skip
LIMIT_S = 60.0  # of a request
N_CLIENTS = 16
MB = 1 << 20
FINE = {"step_ms": 1}  # of the fake backend


@dataclass
class Tally:
    """What became of the requests."""

    answers: int = 0
    left: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    kills: int = 0
    bad_loads: int = 0
    full_disks: int = 0


class Client:
    """Asks one thing after the other until the time is over."""

    def __init__(self, http: httpx.AsyncClient, tally: Tally, dice: random.Random) -> None:
        self._http = http
        self._tally = tally
        self._dice = dice

    async def run(self, ends_at: float) -> None:
        ways = [self._chat, self._stream, self._complete, self._embed, self._rerank]
        while time.monotonic() < ends_at:
            word = f"{self._dice.randrange(self._dice.choice((20, 10**6)))}"
            way = self._dice.choice(ways)
            try:
                await asyncio.wait_for(way(word), LIMIT_S)
            except asyncio.TimeoutError:
                self._tally.wrong.append(f"{way.__name__}: no answer in {LIMIT_S:g} s")
            except httpx.HTTPError as error:
                self._tally.wrong.append(f"{way.__name__}: {type(error).__name__}: {error}")

    async def _chat(self, word: str) -> None:
        body = self._chat_body(word)
        if self._dice.random() < 0.1:  # a client that leaves
            try:
                await self._http.post("/v1/chat/completions", json=body, timeout=0.02)
            except httpx.TimeoutException:
                self._tally.left += 1
            return
        reply = await self._http.post("/v1/chat/completions", json=body)
        if self._is_answer(reply):
            text = reply.json()["choices"][0]["message"]["content"]
            self._check(text == f"You said: {word}", f"chat {word}: {text!r}")

    async def _stream(self, word: str) -> None:
        body = self._chat_body(word) | {"stream": True}
        leaves = self._dice.random() < 0.2
        text, is_done, error = "", False, None
        async with self._http.stream("POST", "/v1/chat/completions", json=body) as reply:
            if reply.status_code != 200:
                await reply.aread()
                self._is_answer(reply)
                return
            is_cut = False
            try:
                async for line in reply.aiter_lines():
                    if leaves and text:
                        self._tally.left += 1
                        return
                    if line == "data: [DONE]":
                        is_done = True
                    elif line.startswith("data: "):
                        event = json.loads(line.removeprefix("data: "))
                        error = event.get("error", error)
                        for choice in event.get("choices", ()):
                            text += choice["delta"].get("content", "")
            except httpx.RemoteProtocolError:
                is_cut = True
                if error is None:
                    raise
        if error is not None:
            self._check(is_cut, f"stream {word}: an error, and a regular end")
            self._count_error(error.get("code"), "stream")
        else:
            self._check(is_done and text == f"You said: {word}", f"stream {word}: {text!r}")

    async def _complete(self, word: str) -> None:
        body = {"model": self._dice.choice(CHAT_TIERS), "prompt": word}
        reply = await self._http.post("/v1/completions", json=body)
        if self._is_answer(reply):
            text = reply.json()["choices"][0]["text"]
            self._check(word in text, f"completion {word}: {text!r}")

    async def _embed(self, word: str) -> None:
        texts = [f"{word} {n}" for n in range(self._dice.choice((1, 1, 5, 50)))]
        body = {"model": "embedding", "input": texts}
        reply = await self._http.post("/v1/embeddings", json=body)
        if self._is_answer(reply):
            found = [item["index"] for item in reply.json()["data"]]
            self._check(found == list(range(len(texts))), f"embeddings {word}: {found}")

    async def _rerank(self, word: str) -> None:
        documents = [f"{word} {n}" for n in range(self._dice.choice((2, 10)))]
        body = {"model": "reranker", "query": word, "documents": documents}
        reply = await self._http.post("/v1/rerank", json=body)
        if self._is_answer(reply):
            found = sorted(item["index"] for item in reply.json()["results"])
            self._check(found == list(range(len(documents))), f"rerank {word}: {found}")

    def _chat_body(self, word: str) -> dict[str, Any]:
        return {
            "model": self._dice.choice(CHAT_TIERS),
            "messages": [{"role": "user", "content": word}],
            "service_tier": self._dice.choice(("default", "flex", "priority")),
            "temperature": self._dice.choice((0, 1)),  # the first are remembered
        }

    def _is_answer(self, reply: httpx.Response) -> bool:
        if reply.status_code == 200:
            return True
        self._count_error(reply.json()["error"]["code"], f"HTTP {reply.status_code}")
        return False

    def _count_error(self, code: str | None, where: str) -> None:
        self._tally.errors[str(code)] += 1
        if code not in DOCUMENTED:
            self._tally.wrong.append(f"{where}: {code}")

    def _check(self, is_right: bool, what: str) -> None:
        self._tally.answers += is_right
        if not is_right:
            self._tally.wrong.append(what)


class Breaker:
    """Breaks one thing after the other. A further kind of fault is a further method, in `run`."""

    def __init__(
        self, server: psutil.Process, script: Path, tally: Tally, dice: random.Random
    ) -> None:
        self._server = server
        self._script = script
        self._tally = tally
        self._dice = dice

    async def run(self, ends_at: float) -> None:
        faults = [self.kill_worker] * 6 + [self.spoil_loads] * 2 + [self.fill_disk] * 2
        while time.monotonic() < ends_at:
            await asyncio.sleep(self._dice.uniform(0.5, 3))
            await self._dice.choice(faults)()

    async def kill_worker(self) -> None:
        if workers := self._server.children():
            try:
                self._dice.choice(workers).send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:  # made room for another tier since it was listed
                return
            self._tally.kills += 1

    async def spoil_loads(self) -> None:
        """For a moment no model of a tier can be loaded."""
        self._tally.bad_loads += 1
        await asyncio.to_thread(self._script.write_text, json.dumps({"fault": "load"}))
        await asyncio.sleep(0.3)
        await asyncio.to_thread(self._script.write_text, json.dumps(FINE))

    async def fill_disk(self) -> None:
        """For a moment the server can write no file: to its cache."""
        self._tally.full_disks += 1
        before = self._server.rlimit(psutil.RLIMIT_FSIZE)
        self._server.rlimit(psutil.RLIMIT_FSIZE, (0, before[1]))
        await asyncio.sleep(1)
        self._server.rlimit(psutil.RLIMIT_FSIZE, before)


async def watch(server: psutil.Process, seconds: list[float], sizes: list[float]) -> None:
    started_at = time.monotonic()
    while True:
        seconds.append(time.monotonic() - started_at)
        sizes.append(server.memory_info().rss / MB)
        await asyncio.sleep(1)


def connections(url: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=url, timeout=None, limits=limits, trust_env=False)


async def held(url: str) -> dict[str, float]:
    """What the service says that it holds, once it has had time to let go."""
    found: dict[str, float] = {}
    async with connections(url) as http:
        for _ in range(100):
            text = (await http.get("/metrics")).text
            found = {
                line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
                for line in text.splitlines()
                if line.startswith(("quintet_queue_depth{", "quintet_running_requests{"))
            }
            if not any(found.values()):
                break
            await asyncio.sleep(0.1)
    return {name: value for name, value in found.items() if value}


async def n_descriptors(server: psutil.Process) -> int:
    """Its file descriptors without those of workers, the fewest of a second: connections may be
    about to be closed, and workers come and go."""
    found = []
    for _ in range(10):
        found.append(server.num_fds() - len(server.children()))
        await asyncio.sleep(0.1)
    return min(found)


async def soak(url: str, server: psutil.Process, script: Path, seconds: float, seed: int) -> dict[
    str, Any
]:  # fmt: skip
    tally = Tally()
    warm_up_s = min(seconds / 4, 120)
    times: list[float] = []
    sizes: list[float] = []

    async def traffic(for_s: float) -> None:
        ends_at = time.monotonic() + for_s
        breaker = Breaker(server, script, tally, random.Random(seed))
        async with connections(url) as http:
            clients = [Client(http, tally, random.Random(seed + n)) for n in range(N_CLIENTS)]
            await asyncio.gather(
                breaker.run(ends_at),
                *(client.run(ends_at) for client in clients),
            )

    await traffic(warm_up_s)
    still = await held(url)
    n_before = await n_descriptors(server)
    watching = asyncio.create_task(watch(server, times, sizes))
    await traffic(seconds - warm_up_s)
    watching.cancel()
    still |= await held(url)
    more = await n_descriptors(server) - n_before
    async with connections(url) as http:
        kinds = (await http.get("/v1/cache")).json()["kinds"]
    slope = linear_regression(times, sizes).slope * 60
    return {
        "answers": tally.answers,
        "clients_left": tally.left,
        "errors": dict(tally.errors),
        "wrong": tally.wrong[:20],
        "n_wrong": len(tally.wrong),
        "workers_killed": tally.kills,
        "loads_spoiled": tally.bad_loads,
        "disks_full": tally.full_disks,
        "cache_hits": sum(kind["hits"] for kind in kinds.values()),
        "cache_joins": sum(kind["joins"] for kind in kinds.values()),
        "held_at_the_end": still,
        "more_file_descriptors": more,
        "memory_mb": round(sizes[-1], 1),
        "memory_mb_a_minute": round(slope, 2),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=1200)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "script.json"
        script.write_text(json.dumps(FINE), encoding="utf-8")
        environment = {"MEMORY_LIMIT": "150M", "SWAP_WAIT_S": "1"}
        environment |= {"CACHE_DIR": str(Path(folder) / "cache"), "CACHE_MAX_MB": "1"}
        for tier in TIERS:
            environment[f"{tier.upper()}_BACKEND"] = "fake"
            environment[f"{tier.upper()}_MODEL_PATH"] = str(script)
        with service(environment, is_quiet=True) as (url, process):
            found = asyncio.run(
                soak(url, psutil.Process(process.pid), script, options.seconds, options.seed)
            )
    found_code = process.returncode
    found["exit_code"] = found_code
    print(json.dumps(found, indent=2))
    is_long = options.seconds >= 600  # a shorter one has no slope to speak of
    is_well = (
        found["answers"] > 0
        and not found["n_wrong"]
        and not found["held_at_the_end"]
        and found["more_file_descriptors"] <= 8
        and (not is_long or found["memory_mb_a_minute"] < 1)
        and found_code == 0
    )
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main())
