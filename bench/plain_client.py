"""Streamed chats over plain sockets. An HTTP library costs as much CPU as the server that it
measures, on the same cores; so here what comes is kept with its time, and read afterwards."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

import msgspec

Message = dict[str, str]
# before a server's turn: threads of the one before still look for work, for some ms
REST_S = 0.1


class NoMeasurement(Exception):
    """A server refused, or said what nobody can read."""


@dataclass(slots=True)
class Reply:
    """What one request got. Times are seconds since it was sent."""

    text: str = ""
    text_at_s: list[float] = field(default_factory=list)
    n_tokens: int = 0  # of the answer
    n_prompt: int = 0
    n_cached: int = 0  # of these

    @property
    def first_token_s(self) -> float:
        if not self.text_at_s:
            raise NoMeasurement("an answer has no text")
        return self.text_at_s[0]

    def gaps_s(self, since_s: float = 0.0) -> list[float]:
        """Between two pieces of text, of which the second came after `since_s`."""
        return [b - a for a, b in pairwise(self.text_at_s) if b > since_s]

    def read(self, pieces: Sequence[tuple[float, bytes]]) -> "Reply":
        """Take in what came, in events of OpenAI's form."""
        rest = b""
        for at_s, data in pieces:
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                if line.startswith(b"data: {"):
                    self._observe(msgspec.json.decode(line[6:]), at_s)
        self.n_tokens = self.n_tokens or len(self.text_at_s)  # not every server counts
        return self

    def _observe(self, event: dict[str, Any], at_s: float) -> None:
        if "error" in event:
            raise NoMeasurement(str(event["error"]))
        for choice in event.get("choices") or ():
            if text := choice["delta"].get("content"):
                self.text += text
                self.text_at_s.append(at_s)
        if usage := event.get("usage"):
            self.n_tokens, self.n_prompt = usage["completion_tokens"], usage["prompt_tokens"]
            self.n_cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        if timings := event.get("timings"):  # llama-server's
            self.n_cached = max(self.n_cached, timings.get("cache_n", 0))


class Client:
    """Asks one server, each time on a connection of its own."""

    def __init__(self, url: str) -> None:
        self._host, self._port = urlsplit(url).hostname, urlsplit(url).port

    async def chat(
        self,
        messages: Sequence[Message],
        max_tokens: int,
        on_text: Callable[[], None] = lambda: None,
        until: asyncio.Event | None = None,
    ) -> Reply:
        """A chat of exactly so many tokens, greedy. It is left as soon as `until` is set; `on_text`
        is called whenever something has come. Raises NoMeasurement."""
        body = {
            "model": "light", "messages": messages, "max_tokens": max_tokens, "temperature": 0,
            "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        pieces: list[tuple[float, bytes]] = []
        asked_at = time.perf_counter()
        reader, writer = await asyncio.open_connection(self._host, self._port, limit=1 << 20)
        try:
            writer.write(post("/v1/chat/completions", body))
            reading = asyncio.create_task(self._read(reader, pieces, asked_at, on_text))
            leaving = asyncio.create_task((until or asyncio.Event()).wait())
            await asyncio.wait({reading, leaving}, return_when=asyncio.FIRST_COMPLETED)
            leaving.cancel()
            if not reading.done():
                reading.cancel()
            with suppress(asyncio.CancelledError):
                await reading
        finally:
            writer.close()
        head = pieces[0][1] if pieces else b""
        if b" 200 " not in head.partition(b"\r\n")[0]:
            said = b"".join(data for _, data in pieces)
            raise NoMeasurement(said[:400].decode(errors="replace") or "no reply")
        return Reply().read(pieces)

    @staticmethod
    async def _read(
        reader: asyncio.StreamReader,
        pieces: list[tuple[float, bytes]],
        asked_at: float,
        on_text: Callable[[], None],
    ) -> None:
        while data := await reader.read(1 << 16):
            pieces.append((time.perf_counter() - asked_at, data))
            if b'"content":"' in data:
                on_text()


def post(path: str, body: Mapping[str, Any]) -> bytes:
    """The bytes of a request whose connection ends with its reply."""
    content = msgspec.json.encode(body)
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    ).encode() + content
