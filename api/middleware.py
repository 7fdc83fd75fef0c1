"""What stands before every route, as plain ASGI: request ids, access log, keys and limits."""

import asyncio
import hmac
import ipaddress
import logging
import re
import time
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import as_service_error, response
from errors import (
    BodyTooLarge,
    Forbidden,
    HeadTooLarge,
    InvalidApiKey,
    ServiceError,
    UrlTooLong,
)
from settings import ServerSettings

logger = logging.getLogger("quintet.access")

_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
MAX_URL_BYTES = 8 << 10
MAX_HEADERS = 100
MAX_HEADER_BYTES = 64 << 10  # of all; cookies of everything that runs on localhost come along
PUBLIC_PATHS = ("/health",)  # without a key, so that a supervisor can ask


class HttpMiddleware:
    """Lets everything but HTTP requests pass, such as the lifespan."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        serve = self.serve if scope["type"] == "http" else self._app
        await serve(scope, receive, send)

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise NotImplementedError


class RequestLog(HttpMiddleware):
    """Gives each request an id, in the client's words where it sent one, and a line in the log; and
    each reply what all have."""

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"
        scope["request_id"] = request_id
        started_at = time.perf_counter()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = headers["Request-Id"] = (
                    request_id  # OpenAI's, Anthropic's
                )
                # browsers are not to take JSON for a page or a script; nothing here is HTML
                headers["X-Content-Type-Options"] = "nosniff"
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            left = " (client left)" if scope.get("client_left") else ""
            logger.info(
                "%s %s %s %d%s %.0f ms %s",
                scope["client"][0] if scope.get("client") else "-",
                scope["method"],
                ascii(scope["path"])[1:-1],  # it may hold line ends
                status,
                left,
                (time.perf_counter() - started_at) * 1e3,
                request_id,
            )


class Faults(HttpMiddleware):
    """Answers a fault of ours in the envelope, inside CORS so that browsers may read it."""

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_started = False

        async def watch(message: Message) -> None:
            nonlocal has_started
            has_started = True
            await send(message)

        try:
            await self._app(scope, receive, watch)
        except Exception as error:
            reply = response(as_service_error(error, scope["request_id"]), scope)
            if has_started:
                raise  # the server closes the connection: half a reply must not look whole
            await reply(scope, receive, send)


class Gate(HttpMiddleware):
    """Refuses before any work is done: strangers, rebound hosts, heads and bodies that are too
    large, bodies that do not come."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        super().__init__(app)
        self._settings = settings
        self._keys = [key.encode() for key in settings.api_keys]
        self._hosts = {"localhost", settings.host.lower()}
        self._hosts |= {host.lower() for host in settings.allowed_hosts}

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        try:
            _check_head(scope)
            self._check_host(headers.get("host", ""))
            self._check_network(scope.get("server"))
            if scope["path"] not in PUBLIC_PATHS:
                self._check_key(headers)
            self._check_length(headers.get("content-length", ""))
        except ServiceError as error:
            await response(error, scope)(scope, receive, send)
            return
        await self._app(scope, self._limited(receive), send)

    def _check_host(self, host: str) -> None:
        """A web page can point a name of its own at this machine (DNS rebinding); then the
        browser's Host gives it away. Addresses cannot be rebound."""
        name = _host_name(host)
        if "*" in self._hosts or name in self._hosts or name.endswith(".localhost"):
            return
        if not _is_address(name):
            raise Forbidden(f"The host '{name}' is not served; add it to ALLOWED_HOSTS.")

    def _check_network(self, server: Sequence[object] | None) -> None:
        if self._keys or self._settings.allow_insecure or not server or server[1] is None:
            return
        if not is_loopback(str(server[0])):
            raise Forbidden(
                "Without keys only this machine is served; set API_KEYS, or ALLOW_INSECURE=true."
            )

    def _check_key(self, headers: Headers) -> None:
        if not self._keys:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = headers.get("x-api-key", "")
        # all are compared, each in constant time: how long it takes says nothing
        matches = [hmac.compare_digest(given.strip().encode(), key) for key in self._keys]
        if not any(matches):
            raise InvalidApiKey(
                "The API key is wrong." if given else
                "An API key is needed: send `Authorization: Bearer KEY`."
            )  # fmt: skip

    def _check_length(self, length: str) -> None:
        if length.isdecimal() and int(length) > self._settings.max_body_bytes:
            raise BodyTooLarge(self._too_large())

    def _too_large(self) -> str:
        return f"The body is over {self._settings.max_body_bytes:,} bytes (MAX_BODY_BYTES)."

    def _limited(self, receive: Receive) -> Receive:
        n_bytes = 0
        is_whole = False

        async def limited() -> Message:
            nonlocal n_bytes, is_whole
            if is_whole:  # the next thing is that the client leaves, for which it may take its time
                return await receive()
            timeout_s = self._settings.receive_timeout_s
            try:
                message = await asyncio.wait_for(receive(), timeout_s)
            except asyncio.TimeoutError:  # another class than the built-in one in Python 3.10
                raise HTTPException(
                    408, f"Nothing of the body came for {timeout_s:g} s (RECEIVE_TIMEOUT_S)."
                ) from None
            is_whole = not message.get("more_body", False)
            n_bytes += len(message.get("body", b""))
            if n_bytes > self._settings.max_body_bytes:
                raise HTTPException(413, self._too_large())  # FastAPI lets only this kind through
            return message

        return limited


def _check_head(scope: Scope) -> None:
    """Connection bounds what it keeps of a head; this is the same for whole heads on any server."""
    if len(scope.get("raw_path", b"")) + len(scope.get("query_string", b"")) > MAX_URL_BYTES:
        raise UrlTooLong(f"The URL is over {MAX_URL_BYTES:,} bytes.")
    if len(scope["headers"]) > MAX_HEADERS:
        raise HeadTooLarge(f"The request has over {MAX_HEADERS} headers.")
    if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADER_BYTES:
        raise HeadTooLarge(f"The headers are over {MAX_HEADER_BYTES:,} bytes.")


def is_loopback(host: str) -> bool:
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _host_name(host: str) -> str:
    """The Host header without its port, and an IPv6 address without brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()
