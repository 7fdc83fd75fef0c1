"""Time to first token of clients beside others that read slowly, on the fake backend.

    python -m bench.connections

Starts a service, and measures the same clients twice: alone, then beside `--slow` connections, each
of which has asked for a long stream and reads one kilobyte a second of it. Prints JSON; exit code
1 where a request failed.
"""

import argparse
import asyncio
import json
import re
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from bench.own_service import service

TOKEN = re.compile(rb'"content":"[^"]')
END = b"data: [DONE]"
Address = tuple[str, int]


@contextmanager
def serving(n_connections: int, step_ms: float) -> Iterator[Address]:
    """Where a service of its own listens."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "script.json")
        rules = [{"match": "long", "answer": "0123456789" * 60}]
        script.write_text(json.dumps({"step_ms": step_ms, "rules": rules}))
        settings = {
            "MAX_CONNECTIONS": str(n_connections + 10),
            "LIGHT_BACKEND": "fake", "LIGHT_MODEL_PATH": str(script), "LIGHT_PRELOAD": "true",
            "LIGHT_N_PARALLEL": "255", "LIGHT_N_CTX": "1024", "LIGHT_KV_TOKENS": str(1024 * 255),
            "LIGHT_QUEUE_SIZE": str(n_connections),
        }  # fmt: skip
        with service(settings) as (url, _):
            at = urlsplit(url)
            yield at.hostname or "", at.port or 0


def request(text: str, **fields: object) -> bytes:
    messages = [{"role": "user", "content": text}]
    body = {"model": "light", "messages": messages, "stream": True} | fields
    content = json.dumps(body).encode()
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(content)
    ) + content


class Client:
    """One connection."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._is_done = False

    @classmethod
    async def dial(
        cls, stack: AsyncExitStack, address: Address, room: int | None = None
    ) -> "Client":
        """Connects; with `room` bytes in the kernel for what is not read."""
        sock = stack.enter_context(socket.socket())
        sock.setblocking(False)
        if room is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
        await asyncio.get_running_loop().sock_connect(sock, address)
        return cls(sock)

    async def first_token_s(self, asked: bytes, n_bytes: int = 1 << 16) -> float:
        """How long it took; what came with it stays unread beyond `n_bytes`."""
        started_at = time.perf_counter()
        await self._loop.sock_sendall(self._sock, asked)
        data = b""
        while not TOKEN.search(data):
            data += await self._piece(n_bytes)
        took_s = time.perf_counter() - started_at
        self._is_done = END in data
        return took_s

    async def read_to_end(self) -> None:
        data = b""
        while not self._is_done:
            data = data[-len(END) :] + await self._piece(1 << 16)
            self._is_done = END in data

    async def read_slowly(self) -> None:
        while not self._is_done:
            await asyncio.sleep(1)
            self._is_done = END in await self._piece(1024)

    async def _piece(self, n_bytes: int) -> bytes:
        data = await self._loop.sock_recv(self._sock, n_bytes)
        if not data:
            raise ConnectionError("The service closed a connection.")
        return data


async def first_tokens_ms(address: Address, n_clients: int, gap_s: float) -> list[float]:
    """One request on each of so many connections, which are all open from beginning to end."""

    async def ask(n: int, client: Client) -> float:
        await asyncio.sleep(n * gap_s)
        took_s = await client.first_token_s(request(f"Say {n}", max_tokens=16))
        await client.read_to_end()
        return 1e3 * took_s

    async with AsyncExitStack() as stack:
        clients = [await Client.dial(stack, address) for _ in range(n_clients)]
        return await asyncio.gather(*(ask(n, client) for n, client in enumerate(clients)))


async def measure(address: Address, n: int, n_slow: int, gap_s: float) -> dict[str, object]:
    async with AsyncExitStack() as stack:
        await first_tokens_ms(address, n, gap_s / 2)  # warm-up
        quiet_ms = await first_tokens_ms(address, n, gap_s)
        slow = [await Client.dial(stack, address, room=4096) for _ in range(n_slow)]
        asked = request("a long one")
        await asyncio.gather(*(client.first_token_s(asked, 1024) for client in slow))
        readers = [asyncio.create_task(client.read_slowly()) for client in slow]
        beside_ms = await first_tokens_ms(address, n, gap_s)
        n_reading = sum(not reader.done() for reader in readers)
        failed = [reader for reader in readers if reader.done() and reader.exception()]
        for reader in readers:
            reader.cancel()
        await asyncio.wait(readers)
    percentiles = {
        name: {"p50": np.percentile(times, 50), "p95": np.percentile(times, 95)}
        for name, times in (("quiet_ms", quiet_ms), ("beside_slow_readers_ms", beside_ms))
    }
    quiet, beside = percentiles.values()
    return {
        "connections": n + n_slow,
        "slow_readers": n_slow,
        "slow_readers_at_the_end": n_reading,
        "slow_readers_cut": len(failed),
        **percentiles,
        "ratio": {name: beside[name] / quiet[name] for name in quiet},
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--clients", type=int, default=200, metavar="N", help="whose first tokens are timed")
    add("--slow", type=int, default=300, metavar="N", help="that read one kilobyte a second")
    add("--gap-ms", type=float, default=40, metavar="MS", help="between two clients' requests")
    add("--step-ms", type=float, default=10, metavar="MS", help="of the fake model")
    args = parser.parse_args(argv)
    with serving(args.clients + args.slow, args.step_ms) as address:
        report = asyncio.run(measure(address, args.clients, args.slow, args.gap_ms / 1e3))
    print(json.dumps(vars(args) | report, indent=2))
    return 1 if report["slow_readers_cut"] else 0


if __name__ == "__main__":
    sys.exit(main())
