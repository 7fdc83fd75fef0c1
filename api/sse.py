"""Server-sent events: how they look, and a response that ends its work with its client."""

from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from api.deps import ClientLeft, while_connected
from api.errors import as_service_error, envelope
from errors import ServiceError

DONE = b"data: [DONE]\n\n"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

_encode = msgspec.json.Encoder().encode


def event(data: Mapping[str, Any]) -> bytes:
    """Data that has a type is an event of that name."""
    name = f"event: {data['type']}\n" if "type" in data else ""
    return name.encode() + b"data: " + _encode(data) + b"\n\n"


class EventStream(Response):
    """Sends events as they come, then `last`. An error is an event of its envelope, or what
    `failed` makes of it.

    The generator is closed when the client has left, so what it holds is released at once.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        headers: dict[str, str] | None = None,
        *,
        failed: Callable[[ServiceError], bytes] | None = None,
        last: bytes = DONE,
    ) -> None:
        super().__init__(headers=HEADERS | (headers or {}))
        del self.headers["content-length"]
        self._events = events
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
