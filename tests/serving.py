"""A service on a free port and the fake backend, with its workers in threads unless told."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

import worker
from api.connections import Connection
from engine.client import Handle, Launcher
from model_manager import ModelManager
from server import create_app
from settings import ServerSettings, Settings, TierSettings


class Thread:
    """A worker in this process (Handle): the same frames, the same loop."""

    pid = 0

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._code = 0
        self._ended = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            self._code = worker.serve(self._sock)
        finally:
            self.kill()  # closing alone does not wake a thread that receives
            self._sock.close()
            self._ended.set()

    async def wait(self) -> str:
        await asyncio.to_thread(self._ended.wait)
        return f"exit code {self._code}"

    def kill(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)


async def in_threads(sock: socket.socket) -> Handle:
    """A launcher of workers in threads."""
    return Thread(sock.dup())


class Held:
    """A launcher of workers in threads that waits until it may go on."""

    def __init__(self) -> None:
        self._may_go_on = threading.Event()

    def go_on(self) -> None:
        self._may_go_on.set()

    async def __call__(self, sock: socket.socket) -> Handle:
        await asyncio.to_thread(self._may_go_on.wait, 30)
        return await in_threads(sock)


# of a model that thinks and calls tools; their results are turns of the user, as with Qwen
THINKING_TEMPLATE = (
    "{% for m in messages %}<|{{ 'user' if m.role == 'tool' else m.role }}|>"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}"
    "</tool_call>{% endfor %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    "{% endif %}"
)


@dataclass
class Service:
    url: str
    http: httpx.Client
    manager: ModelManager
    app: Any

    def chat(self, text: str = "Hi", **fields: Any) -> httpx.Response:
        messages = [{"role": "user", "content": text}]
        body = {"model": "light", "messages": messages} | fields
        return self.http.post("/v1/chat/completions", json=body)

    def breaking(self, path: str, **body: Any) -> list[Any]:
        """The events of a stream that is cut off."""
        body = {"model": "light", "stream": True} | body
        with self.http.stream("POST", path, json=body) as response:
            assert response.status_code == 200
            return cut_off(response.iter_text())

    def respond(self, asked: Any = "Hi", **fields: Any) -> httpx.Response:
        return self.http.post("/v1/responses", json={"model": "light", "input": asked} | fields)

    def message(self, *messages: Any, **fields: Any) -> httpx.Response:
        turns = [{"role": "user", "content": m} if isinstance(m, str) else m for m in messages]
        body = {"model": "light", "max_tokens": 500, "messages": turns} | fields
        return self.http.post("/v1/messages", json=body)

    def complete(self, prompt: Any = "Hi", **fields: Any) -> httpx.Response:
        body = {"model": "light", "prompt": prompt} | fields
        return self.http.post("/v1/completions", json=body)

    def embed(self, asked: Any = "Hi", **fields: Any) -> httpx.Response:
        body = {"model": "embedding", "input": asked} | fields
        return self.http.post("/v1/embeddings", json=body)

    def rerank(
        self, query: Any, documents: Any, path: str = "/v1/rerank", **fields: Any
    ) -> httpx.Response:
        body = {"model": "reranker", "query": query, "documents": documents} | fields
        return self.http.post(path, json=body)


def script(folder: Path, *rules: dict[str, Any], **values: Any) -> str:
    """A script for the fake backend; its path."""
    path = folder / f"script{len(list(folder.iterdir()))}.json"
    path.write_text(json.dumps({"rules": rules, **values}))
    return str(path)


def fake(model_path: str = "", **values: Any) -> TierSettings:
    return TierSettings(backend="fake", model_path=model_path, **values)


def settings(server: dict[str, Any] | None = None, **tiers: TierSettings) -> Settings:
    """Nothing is remembered unless the test says so: what is asked twice is made twice."""
    of = ServerSettings(**{"cache_policy": "off"} | (server or {}))
    return Settings(of, tiers or {"light": fake()})  # type: ignore[arg-type]


def remembering(server: dict[str, Any] | None = None, **tiers: TierSettings) -> Settings:
    """The same with the cache as it is by default."""
    return settings({"cache_policy": "repeatable"} | (server or {}), **tiers)


@contextmanager
def serving(
    of: Settings | None = None,
    *,
    launch: Launcher = in_threads,
    http: type[asyncio.Protocol] = Connection,
) -> Iterator[Service]:
    app = create_app(of or settings(), launch=launch)
    config = uvicorn.Config(
        app, port=0, log_config=None, access_log=False, http=http, ws="none",
        timeout_graceful_shutdown=2,
    )  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            thread.join(0.005)
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        with httpx.Client(base_url=url, timeout=30, trust_env=False) as http:
            yield Service(url, http, app.state.services.manager, app)
    finally:
        server.should_exit = True
        thread.join(20)
    assert not thread.is_alive(), "the server did not end"


def events(response: httpx.Response) -> list[Any]:
    """The events of a stream; the last must be [DONE], which is left out."""
    assert response.headers["content-type"].startswith("text/event-stream")
    parts = response.text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""], parts[-3:]
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def cut_off(pieces: Iterator[str]) -> list[Any]:
    """The events of a stream that is cut off, of which the last is an error."""
    told: list[str] = []
    with pytest.raises(httpx.RemoteProtocolError):
        told.extend(pieces)
    *parts, last = "".join(told).split("\n\n")
    assert last == ""
    return [json.loads(part.removeprefix("data: ")) for part in parts]


def named_events(response: httpx.Response) -> list[Any]:
    """The events of a stream in which each is named by its type."""
    assert response.headers["content-type"].startswith("text/event-stream"), response.text
    *parts, last = response.text.split("\n\n")
    assert last == ""
    found = []
    for part in parts:
        name, data = part.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def wait_until(holds: Callable[[], object], timeout_s: float = 10) -> None:
    give_up_at = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < give_up_at, "it never came true"
        time.sleep(0.005)
