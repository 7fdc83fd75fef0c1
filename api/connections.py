"""One HTTP connection: how long its client may take to send and to read, and how much it may send
before anything is made of it.

`python server.py` serves with it; so does `uvicorn server:app --http api.connections:Connection`.
The limits come from the lifespan's state.
"""

import asyncio
import logging
import socket
import struct
import sys
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any, cast

from httptools import HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from api.errors import response
from api.middleware import MAX_HEADER_BYTES, common_headers, new_request_id
from errors import BadRequest, HeadTooLarge, ServiceError, TooManyConnections
from settings import ServerSettings

logger = logging.getLogger("quintet.access")

NOTSENT = "TCP_NOTSENT_LOWAT"  # Linux and macOS have it
KERNEL_BYTES = 32 << 10  # that the kernel takes before they can be on their way
CUT = "cut"  # where a request's state has what ends its connection short of a whole reply
RESET = struct.pack("ii", 1, 0)  # of SO_LINGER: closing drops what the kernel has not sent


class HttpOnly(HttpToolsProtocol):
    """Ignores wishes for another protocol, which is all right (RFC 9110, 7.8): JDK's HttpClient has
    one in each request. What follows such a head is no HTTP to httptools, not even the body; so it
    gets the head once more without the wish, and then the rest."""

    _unread: memoryview  # what follows the head of a wish
    _again = b""  # that head without it

    def data_received(self, data: bytes) -> None:
        self._unread = memoryview(data)
        super().data_received(data)
        while self._again:
            head, self._again = self._again, b""
            super().data_received(head)
            super().data_received(cast(bytes, self._unread))
        del self._unread  # nobody needs the packet any more

    def _should_upgrade(self) -> bool:
        return True  # so uvicorn makes nothing of such a head, and calls the next

    def handle_websocket_upgrade(self) -> None:
        method = self.parser.get_method()
        if super()._should_upgrade():  # an application with WebSockets is served with this
            super().handle_websocket_upgrade()
        elif method == b"CONNECT":  # which is one by itself
            self.send_400_response("")
        else:
            wish = cast(HttpParserUpgrade, sys.exc_info()[1])
            self._unread = self._unread[wish.args[0] :]
            version = self.parser.get_http_version().encode()
            kept = [field for field in self.headers if field[0] != b"upgrade"]
            self._again = _head(b"%s %s HTTP/%s" % (method, self.url, version), kept)
            # this one would pass over all that follows a `Connection: close`
            self.parser = HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's


class Connection(HttpOnly):
    """A timer looks at it several times within its limits."""

    _running: RequestResponseCycle | None = None  # of the request that is answered

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app_state = self.app_state | {CUT: self._cut_short}
        self._settings: ServerSettings = self.app_state["settings"]
        sock = transport.get_extra_info("socket")
        if sock.family in (socket.AF_INET, socket.AF_INET6) and hasattr(socket, NOTSENT):
            # what else lies in the kernel, megabytes of it, hides whether anybody reads
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, NOTSENT), KERNEL_BYTES)
        self.timeout_keep_alive = self._settings.receive_timeout_s
        self._n_head = 0  # bytes of a head that is not complete
        self._n_unsent = 0  # bytes, when the timer last looked
        self._asked_at = self._read_at = self.loop.time()  # since when we wait for a head; it read
        self._period_s = min(
            self._settings.send_timeout_s / 4, self._settings.receive_timeout_s / 4, 1
        )
        self._timer = self.loop.call_later(self._period_s, self._watch)
        if len(self.connections) > self._settings.max_connections:
            self._refuse(
                TooManyConnections(
                    "The service has as many connections as it takes (MAX_CONNECTIONS).",
                    retry_after_s=1,
                )
            )

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        # uvicorn tells the newest request only, which may still wait for this one
        if self._running and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        cycle = self.cycle
        if not self._n_head:
            self._asked_at = self.loop.time()
        self._n_head += len(data)
        super().data_received(data)
        if self.cycle is not cycle:
            self._n_head = 0
        elif self._n_head > MAX_HEADER_BYTES:
            # httptools keeps all of a head, of trailers and of chunks' extensions
            error = HeadTooLarge(f"The head of the request is over {MAX_HEADER_BYTES:,} bytes.")
            self._refuse(error)

    def on_body(self, body: bytes) -> None:
        self._n_head = 0
        super().on_body(body)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        self._n_head = 0
        self._asked_at = self.loop.time()
        super().on_response_complete()

    def resume_writing(self) -> None:
        self._read_at = self.loop.time()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """What uvicorn says of a request that is not HTTP, in our words."""
        self._refuse(BadRequest("The request is not valid HTTP."))

    def _is_busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _watch(self) -> None:
        """Is it time to give up on the client?

        1. It has read something, or has nothing to read, or what it has not read can still grow
           (then uvicorn stops writing at its high-water mark): it may go on.
        2. It has read nothing for SEND_TIMEOUT_S: cut.
        3. Everything is answered and the next head is not complete after RECEIVE_TIMEOUT_S: closed.
        """
        now = self.loop.time()
        n_unsent = self.transport.get_write_buffer_size()
        is_writing = self._is_busy() and not self.transport.is_closing()
        can_grow = is_writing and not self.flow.write_paused
        if not n_unsent or n_unsent < self._n_unsent or can_grow:
            self._read_at = now
        self._n_unsent = n_unsent
        self._timer = self.loop.call_later(self._period_s, self._watch)
        if now - self._read_at > self._settings.send_timeout_s:
            self._cut("reads nothing")
        elif self._is_busy() or n_unsent:
            pass
        elif now - self._asked_at > self._settings.receive_timeout_s:
            self.transport.close()

    def _cut_short(self) -> None:
        """Close it behind what was written of a reply that has no end."""
        assert self._running is not None
        self._running.response_complete = True  # no more is written, nor missed
        self.transport.close()

    def _cut(self, why: str) -> None:
        """End it at once, with all that is not sent, so that nobody takes it for a whole reply."""
        client = self.transport.get_extra_info("peername")
        logger.info("%s is cut off: it %s", client[0] if client else "-", why)
        self.transport.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, RESET
        )
        self.transport.abort()

    def _refuse(self, error: ServiceError) -> None:
        """Answer what never becomes a request, and close."""
        if self.transport.is_closing():
            return
        if self._is_busy() and self.cycle.response_started:
            self._cut("sends what is no request")
            return
        request_id = new_request_id()
        fields = {"request_id": request_id, "status": error.status, "code": error.code}
        said = error.status, error.code, request_id
        logger.info("- - - %d %s %s", *said, extra={"fields": fields})
        reply = response(error, {"path": ""})
        reply.headers["Connection"] = "close"
        reply.headers.update(common_headers(request_id))
        status = f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}".encode()
        self.transport.write(_head(status, reply.raw_headers) + cast(bytes, reply.body))
        self.transport.close()


def _head(line: bytes, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    return b"\r\n".join([line, *(b"%s: %s" % header for header in headers), b"", b""])
