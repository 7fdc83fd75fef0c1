"""Server-sent events: how they look, and a response that ends its work with its client."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from api.deps import ClientLeft, while_connected
from api.errors import as_service_error, envelope
from errors import ServiceError

DONE = b"data: [DONE]\n\n"
COMMENT = b": still computing\n\n"
LEAST_SILENCE_S = 0.01
WAIT_SAID_S = 2.0  # until it is said again what a request waits for
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

Failed = Callable[[ServiceError], bytes]  # the events of a stream that breaks off

_encode = msgspec.json.Encoder().encode


def event(data: Mapping[str, Any]) -> bytes:
    """Data that has a type is an event of that name."""
    name = f"event: {data['type']}\n" if "type" in data else ""
    return name.encode() + b"data: " + _encode(data) + b"\n\n"


class Chunks:
    """The events of one stream in OpenAI's form. What all of them say is encoded once."""

    def __init__(self, head: Mapping[str, Any], *, include_usage: bool) -> None:
        self._before = b"data: " + _encode(head)[:-1] + b',"choices":['
        self._after = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"

    def of(self, choice: Mapping[str, Any], **more: Any) -> bytes:
        """A choice, and fields that only this event has."""
        after = self._after
        if more:
            after = b"]," + _encode(more)[1:-1] + after[1:]
        return self._before + _encode(choice) + after

    def usage(self, usage: Mapping[str, Any]) -> bytes:
        """The event after all choices."""
        return self._before + b'],"usage":' + _encode(usage) + b"}\n\n"


class LateStream(Response):
    """The reply to a stream that takes long to start: comments that say what it waits for, then its
    events. Its status and `headers` are sent already: what goes wrong now is an event, or what
    `failed` makes of it, and `last`; and headers that are known only now are comments."""

    media_type = "text/event-stream"

    def __init__(
        self,
        starting: "asyncio.Future[EventStream]",
        waits_for: Callable[[], str],
        headers: Mapping[str, str],
        failed: Failed | None,
        last: bytes,
    ) -> None:
        super().__init__(headers=HEADERS | dict(headers))
        del self.headers["content-length"]
        self._said = dict(headers)
        self._starting = starting
        self._waits_for = waits_for
        self._failed = failed
        self._last = last

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        try:
            await send(start)
            while not self._starting.done():
                body = f": {self._waits_for()}\n\n".encode()
                await send({"type": "http.response.body", "body": body, "more_body": True})
                await asyncio.wait({self._starting}, timeout=WAIT_SAID_S)
            stream = self._starting.result()
            if body := self._late(stream.said):
                await send({"type": "http.response.body", "body": body, "more_body": True})
            await stream.send_events(scope, receive, send)
        except ClientLeft:
            scope["client_left"] = True
        except Exception as exception:
            error = as_service_error(exception, scope["request_id"])
            told = self._failed(error) if self._failed else event(envelope(error, scope))
            body = told + self._last
            await send({"type": "http.response.body", "body": body, "more_body": False})
        finally:
            self._starting.cancel()

    def _late(self, headers: Mapping[str, str]) -> bytes:
        """What of these came too late to be a header, in comments, a line each."""
        lines = [f": {name}: {value}\n" for name, value in headers.items()
                 if self._said.get(name) != value]  # fmt: skip
        return "".join([*lines, "\n"]).encode("latin-1") if lines else b""


async def begun(
    starting: Coroutine[Any, Any, "EventStream"],
    *,
    waits_for: Callable[[], str],
    patience_s: float,
    headers: Mapping[str, str],
    failed: Failed | None = None,
    last: bytes = DONE,
) -> Response:
    """The stream, once it has started. What goes wrong until `patience_s` are over is an HTTP
    status; from then on the client hears what its request waits for, and has the `headers` that
    are known by then, the others as comments."""
    task = asyncio.ensure_future(starting)
    try:
        done, _ = await asyncio.wait({task}, timeout=patience_s)
    except BaseException:
        task.cancel()
        raise
    if done:
        return task.result()
    return LateStream(task, waits_for, headers, failed, last)


class EventStream(Response):
    """Sends events as they come, then `last`. An error is an event of its envelope, or what
    `failed` makes of it.

    The generator is closed when the client has left, so what it holds is released at once.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        headers: Mapping[str, str],
        *,
        silence_s: float,
        beat: Callable[[], bytes] = lambda: COMMENT,
        failed: Failed | None = None,
        last: bytes = DONE,
    ) -> None:
        """Where no event comes for `silence_s`, as while a long prompt is computed, there is a
        `beat`: proxies and clients take a stream that says nothing for a dead one."""
        super().__init__(headers=HEADERS | dict(headers))
        del self.headers["content-length"]
        self.said = headers  # beside those of all streams
        self._events = events
        self._silence_s = silence_s
        self._beat = beat
        self._failed = failed
        self._last = last

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {
            "type": "http.response.start",
            "status": self.status_code,
            "headers": self.raw_headers,
        }
        async with aclosing(self._events):
            await send(start)
            await self.send_events(scope, receive, send)

    async def send_events(self, scope: Scope, receive: Receive, send: Send) -> None:
        """All but the head."""
        send = _Beating(send, self._beat, self._silence_s)
        async with aclosing(self._events), aclosing(send):
            try:
                await while_connected(receive, self._send_all(send, scope))
            except ClientLeft:
                scope["client_left"] = True  # for the access log: the status is sent already
            except ServiceError as error:  # its time is over
                await self._send_last(send, scope, error)

    async def _send_all(self, send: Send, scope: Scope) -> None:
        try:
            async for data in self._events:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        except Exception as exception:
            error = as_service_error(exception, scope["request_id"])
            await self._send_last(send, scope, error)
        else:
            await self._send_last(send, scope)

    async def _send_last(self, send: Send, scope: Scope, error: ServiceError | None = None) -> None:
        data = b""
        if error is not None:
            data = self._failed(error) if self._failed else event(envelope(error, scope))
        await send({"type": "http.response.body", "body": data + self._last, "more_body": False})


class _Beating:
    """Sends what it is given and, where that is nothing for a while, a beat."""

    def __init__(self, send: Send, beat: Callable[[], bytes], silence_s: float) -> None:
        self._send = send
        self._beat = beat
        self._silence_s = max(silence_s, LEAST_SILENCE_S)
        self._loop = asyncio.get_running_loop()
        self._sent_at = self._loop.time()
        self._timer = self._loop.call_later(self._silence_s, self._listen)
        self._lock = asyncio.Lock()  # events are numbered: none overtakes another
        self._is_over = False
        self._beating: asyncio.Task[None] | None = None

    async def __call__(self, message: Message) -> None:
        async with self._lock:
            self._is_over = not message["more_body"]
            await self._send(message)
        self._sent_at = self._loop.time()

    def _listen(self) -> None:
        left_s = self._sent_at + self._silence_s - self._loop.time()
        if left_s <= 0:
            left_s = self._silence_s
            if self._beating is None or self._beating.done():
                self._beating = self._loop.create_task(self._say())
        self._timer = self._loop.call_later(left_s, self._listen)

    async def _say(self) -> None:
        async with self._lock:
            if not self._is_over:
                body = self._beat()
                await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def aclose(self) -> None:
        self._timer.cancel()
        if self._beating:
            await asyncio.wait({self._beating})
            self._beating.exception()  # the client has left: whoever sends next hears it too
