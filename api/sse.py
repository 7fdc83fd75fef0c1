"""Server-sent events: how they look, and a response that ends its work with its client."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from api.connections import CUT
from api.deps import ClientLeft, while_connected
from api.errors import as_service_error, envelope
from errors import ServiceError

DONE = b"data: [DONE]\n\n"
LEAST_SILENCE_S = 0.01
WAIT_SAID_S = 2.0  # until it is said again what a request waits for
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

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

    def add(self, **fields: Any) -> None:
        """What all say from now on."""
        head = self._before.removesuffix(b',"choices":[')
        self._before = head + b"," + _encode(fields)[1:-1] + b',"choices":['

    def of(self, choice: Mapping[str, Any], **more: Any) -> bytes:
        """A choice, and fields that only this event has."""
        after = self._after
        if more:
            after = b"]," + _encode(more)[1:-1] + after[1:]
        return self._before + _encode(choice) + after

    def usage(self, usage: Mapping[str, Any]) -> bytes:
        """The event after all choices."""
        return self._before + b'],"usage":' + _encode(usage) + b"}\n\n"


@dataclass(frozen=True, slots=True)
class Form:
    """What an API's streams say beside their answers. No comments: some clients take these for
    events without data, and fail."""

    pause: Callable[..., bytes]  # an event that says nothing but the fields that it is given
    failed: Callable[[ServiceError], bytes] | None = None  # of what breaks off; None: the envelope
    last: bytes = b""  # what ends a whole stream

    async def fail(self, exception: Exception, scope: Scope, send: Send) -> None:
        """The end of a stream that breaks off. Where whole ones have a last event it is cut off
        without: some clients pass over errors, and take what came for the whole."""
        error = as_service_error(exception, scope["request_id"])
        body = self.failed(error) if self.failed else event(envelope(error, scope))
        cut = scope.get("state", {}).get(CUT) if self.last else None
        await send({"type": "http.response.body", "body": body, "more_body": bool(cut)})
        if cut:
            cut()


Started = tuple[AsyncGenerator[bytes, None], Mapping[str, str]]  # events, and the reply's headers


async def begun(
    starting: Coroutine[Any, Any, Started],
    form: Form,
    *,
    waits_for: Callable[[], str],
    headers: Mapping[str, str],
    comment_after_s: float,
) -> Response:
    """The stream, once it has started. What goes wrong until `comment_after_s` are over is an HTTP
    status; from then on the client hears what its request waits for, and has the `headers` that
    are known by then, the others in an event."""
    task = asyncio.ensure_future(starting)
    try:
        await asyncio.wait({task}, timeout=comment_after_s)
    except BaseException:
        task.cancel()
        raise
    known = task.result()[1] if task.done() else headers
    return EventStream(task, form, waits_for, known, silence_s=comment_after_s)


class EventStream(Response):
    """Sends events as they come, then the form's last one; until there are any, pauses that say
    what it waits for. Its status and `headers` are sent before: what goes wrong later is an event,
    and headers that are known only later are in one more pause.

    The generator is closed when the client has left, so what it holds is released at once.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        starting: "asyncio.Future[Started]",
        form: Form,
        waits_for: Callable[[], str],
        headers: Mapping[str, str],
        *,
        silence_s: float,
    ) -> None:
        """Where no event comes for `silence_s`, as while a long prompt is computed, there is a
        pause: proxies and clients take a stream that says nothing for a dead one."""
        super().__init__(headers=HEADERS | dict(headers))
        del self.headers["content-length"]
        self._starting = starting
        self._form = form
        self._waits_for = waits_for
        self._said = dict(headers)  # beside those of all streams
        self._silence_s = silence_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def pause(**fields: Any) -> None:
            body = self._form.pause(**fields)
            await send({"type": "http.response.body", "body": body, "more_body": True})

        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        try:
            await send(start)
            while not self._starting.done():
                await pause(waiting=self._waits_for())
                await asyncio.wait({self._starting}, timeout=WAIT_SAID_S)
            events, headers = self._starting.result()
            async with aclosing(events):
                late = {n: value for n, value in headers.items() if self._said.get(n) != value}
                if late:
                    await pause(headers=late)
                async with aclosing(_Beating(send, self._form.pause, self._silence_s)) as beating:
                    await while_connected(receive, self._send_all(events, beating))
        except ClientLeft:
            scope["client_left"] = True  # for the access log: the status is sent already
        except Exception as exception:  # also of the end of its time
            await self._form.fail(exception, scope, send)
        finally:
            self._starting.cancel()

    async def _send_all(self, events: AsyncGenerator[bytes, None], send: Send) -> None:
        async for data in events:
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": self._form.last, "more_body": False})


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

    def _left_s(self) -> float:
        """Until a beat is due."""
        return self._sent_at + self._silence_s - self._loop.time()

    def _listen(self) -> None:
        left_s = self._left_s()
        if left_s <= 0:
            left_s = self._silence_s
            if self._beating is None or self._beating.done():
                self._beating = self._loop.create_task(self._say())
        self._timer = self._loop.call_later(left_s, self._listen)

    async def _say(self) -> None:
        if self._lock.locked():  # somebody speaks, and the pause would be numbered behind that
            return
        async with self._lock:
            if not self._is_over and self._left_s() <= 0:  # still: events came meanwhile, perhaps
                body = self._beat()
                await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def aclose(self) -> None:
        self._timer.cancel()
        if self._beating:
            await asyncio.wait({self._beating})
            self._beating.exception()  # the client has left: whoever sends next hears it too
