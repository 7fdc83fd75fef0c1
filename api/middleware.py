"""What stands before every route, as plain ASGI: request ids, access log, keys and limits."""

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import re
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.deps import tier_of_request
from api.errors import CLIENT_LEFT, as_service_error, response
from errors import (
    BadRequest,
    BodyTooLarge,
    Forbidden,
    HeadTooLarge,
    InvalidApiKey,
    RequestTimeout,
    ServiceError,
    UnsupportedEncoding,
    UrlTooLong,
)
from metrics import Metrics
from settings import LOCAL_ORIGINS, ServerSettings

logger = logging.getLogger("quintet.access")

_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
MAX_URL_BYTES = 8 << 10
MAX_HEADERS = 100
MAX_HEADER_BYTES = 64 << 10  # of all; cookies of everything that runs on localhost come along
_HOST = re.compile(r"(?:\[(?P<ipv6>[0-9a-f:.]+)\]|(?P<name>[\w.-]+))(:\d*)?", re.ASCII | re.I)
PUBLIC_PATHS = ("/health", "/ready")  # without a key, so that a supervisor can ask
# what a reply's headers say of its times, and the fields of the log for them
TIMES = {
    "x-queue-time-ms": "queue_ms",
    "x-prompt-time-ms": "prompt_ms",
    "x-generation-time-ms": "generation_ms",
}
READING = ("GET", "HEAD", "OPTIONS")  # methods that neither run a model nor change anything
PLAIN = ("", "identity", "utf-8", "utf8")  # of Content-Encoding; some clients mean the charset


@dataclass(frozen=True, slots=True)
class Key:
    """One that opens the service. `id` stands for it in logs and caches: it is always the same,
    and does not say what the key is."""

    secret: bytes = field(repr=False)
    id: str
    is_admin: bool


def key_of(secret: str, *, is_admin: bool) -> Key:
    digest = hashlib.sha256(b"quintet:" + secret.encode()).hexdigest()
    return Key(secret.encode(), digest[:12], is_admin)


def new_request_id() -> str:
    return f"req-{uuid.uuid4().hex}"


def common_headers(request_id: str) -> dict[str, str]:
    """What every reply has."""
    return {
        "X-Request-Id": request_id,  # OpenAI's
        "Request-Id": request_id,  # Anthropic's
        # browsers are not to take JSON for a page or a script; nothing here is HTML
        "X-Content-Type-Options": "nosniff",
    }


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
    """Gives each request an id, in the client's words where it sent one, a line in the log, and
    counts it; and each reply what all have."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        super().__init__(app)
        self._metrics = metrics

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else new_request_id()
        scope["request_id"] = request_id
        started_at = time.perf_counter()
        status = 0
        times: dict[str, float] = {}

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers.update(common_headers(request_id))
                known = {field: headers.get(name) for name, field in TIMES.items()}
                times.update((field, float(ms)) for field, ms in known.items() if ms)
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            seconds = time.perf_counter() - started_at
            has_left = bool(scope.get("client_left")) or not status
            route = getattr(scope.get("route"), "path", "none")  # as in the code: not what was sent
            code = str(CLIENT_LEFT if has_left else status)
            self._metrics.requests.labels(route, tier_of_request(), code).inc()
            self._metrics.request_seconds.labels(route).observe(seconds)
            left = " (client left)" if scope.get("client_left") else ""
            logger.info(
                "%s %s %s %d%s %s%.0f ms %s",
                _client(scope),
                scope["method"],
                ascii(scope["path"])[1:-1],  # it may hold line ends
                status,
                left,
                f"{tier} " if (tier := tier_of_request()) else "",
                seconds * 1e3,
                request_id,
                extra={
                    "fields": {
                        "request_id": request_id,
                        "client": _client(scope),
                        "method": scope["method"],
                        "route": route,
                        "status": int(code),
                        "tier": tier_of_request() or None,
                        "key_id": scope.get("key_id"),
                        "duration_ms": round(seconds * 1e3, 1),
                        **times,
                    }
                },
            )


class ReplyCutShort(Exception):
    """A fault of ours in the midst of a reply. The log has said what it was."""


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
            if has_started:  # the server closes the connection: half a reply must not look whole
                raise ReplyCutShort from None  # it has been logged, and the server would quote it
            await reply(scope, receive, send)


class Gate(HttpMiddleware):
    """Refuses before any work is done: strangers, rebound hosts, web pages from elsewhere, heads
    and bodies that are too large, bodies that are compressed or do not come. Says in the scope
    whose request it is: `key_id`, which is None without a key, and `is_admin`."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        super().__init__(app)
        self._settings = settings
        admins = {key.get_secret_value() for key in settings.admin_api_keys}
        # where there are none, whoever may ask may also change the service
        self._keys = [
            key_of(secret, is_admin=secret in admins or not admins)
            for secret in dict.fromkeys(key.get_secret_value() for key in settings.keys)
        ]
        self._hosts = {"localhost", settings.host.lower()}
        self._hosts |= {host.lower() for host in settings.allowed_hosts}

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        try:
            _check_head(scope)
            self._check_network(scope.get("server"))
            key = self._key(headers)
            if key is None:  # which no browser adds of itself
                if self._keys and scope["path"] not in PUBLIC_PATHS:
                    raise InvalidApiKey(
                        "The API key is wrong." if _given_key(headers) else
                        "An API key is needed: send `Authorization: Bearer KEY`."
                    )  # fmt: skip
                self._check_host(headers.get("host", ""))
                self._check_origin(scope["method"], headers)
            self._check_length(headers.get("content-length", ""))
            if scope["method"] not in READING:
                _check_encoding(headers)
        except ServiceError as error:
            await response(error, scope)(scope, receive, send)
            return
        scope["key_id"] = key.id if key else None
        scope["is_admin"] = key.is_admin if key else not self._keys
        await self._app(scope, self._limited(receive, scope), send)

    def _check_host(self, host: str) -> None:
        """A web page can point a name of its own at this machine (DNS rebinding); then the
        browser's Host gives it away. Addresses cannot be rebound."""
        name = _host_name(host)
        if "*" in self._hosts or name in self._hosts or name.endswith(".localhost"):
            return
        if not _is_address(name):
            raise Forbidden(f"The host '{name or host}' is not served; add it to ALLOWED_HOSTS.")

    def _check_origin(self, method: str, headers: Headers) -> None:
        """Browsers send some requests of any page without asking first (a form, a POST without a
        body); that the page cannot read the answer comes too late. They name the page's origin."""
        origin, allowed = headers.get("origin"), self._settings.cors_origins
        if method in READING or origin is None or "*" in allowed or origin in allowed:
            return
        if not allowed and re.fullmatch(LOCAL_ORIGINS, origin):
            return
        host = headers.get("host")
        if origin not in (f"http://{host}", f"https://{host}"):  # a page of our own
            raise Forbidden(f"Pages from '{origin}' may not ask; add it to CORS_ORIGINS.")

    def _check_network(self, server: Sequence[object] | None) -> None:
        if self._keys or self._settings.allow_insecure or not server or server[1] is None:
            return
        if not is_loopback(str(server[0])):
            raise Forbidden(
                "Without keys only this machine is served; set API_KEYS, or ALLOW_INSECURE=true."
            )

    def _key(self, headers: Headers) -> Key | None:
        """Which of our keys was given. All are compared, each in constant time: how long it takes
        says nothing."""
        given = _given_key(headers)
        found = [key for key in self._keys if hmac.compare_digest(given, key.secret)]
        return found[0] if found else None

    def _check_length(self, length: str) -> None:
        if length.isdecimal() and int(length) > self._settings.max_body_bytes:
            raise BodyTooLarge(self._too_large())

    def _too_large(self) -> str:
        return f"The body is over {self._settings.max_body_bytes:,} bytes (MAX_BODY_BYTES)."

    def _limited(self, receive: Receive, scope: Scope) -> Receive:
        n_bytes = 0
        is_whole = False
        ends_at = time.monotonic() + self._settings.request_timeout_s

        async def limited() -> Message:
            nonlocal n_bytes, is_whole
            left_s = timeout_s = max(ends_at - time.monotonic(), 0)
            if not is_whole:  # after it the next thing is that the client leaves
                timeout_s = min(timeout_s, self._settings.receive_timeout_s)
            try:
                message = await asyncio.wait_for(receive(), timeout_s)
            except asyncio.TimeoutError:  # another class than the built-in one in Python 3.10
                if timeout_s < left_s:  # not by the clock: a timer may be a little early
                    raise HTTPException(
                        408, f"Nothing of the body came for {timeout_s:g} s (RECEIVE_TIMEOUT_S)."
                    ) from None
                error = RequestTimeout(
                    f"The request has taken {self._settings.request_timeout_s:g} s, and may take "
                    "no more (REQUEST_TIMEOUT_S)."
                )
                if is_whole:
                    raise error from None
                rest_may_come = {"Connection": "close"}
                raise HTTPException(error.status, error.message, rest_may_come) from None
            if not is_whole and message["type"] == "http.disconnect":
                scope["client_left"] = True
            is_whole = not message.get("more_body", False)
            n_bytes += len(message.get("body", b""))
            if n_bytes > self._settings.max_body_bytes:
                raise HTTPException(413, self._too_large())  # FastAPI lets only this kind through
            return message

        return limited


class HeadAsGet(HttpMiddleware):
    """Has HEAD answered as GET. The body is left out by the server, whose scope still says HEAD."""

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return
        asked = {**scope, "method": "GET"}
        try:
            await self._app(asked, receive, send)
        finally:
            scope["route"] = asked.get("route")  # for the log


def _client(scope: Scope) -> str:
    """The client's address. It may come from a proxy's header, where anything can stand."""
    address = scope["client"][0].partition("%")[0] if scope.get("client") else ""
    return address if _is_address(address) else "-"


def _check_head(scope: Scope) -> None:
    """Connection bounds what it keeps of a head; this is the same for whole heads on any server."""
    if len(scope.get("raw_path", b"")) + len(scope.get("query_string", b"")) > MAX_URL_BYTES:
        raise UrlTooLong(f"The URL is over {MAX_URL_BYTES:,} bytes.")
    if len(scope["headers"]) > MAX_HEADERS:
        raise HeadTooLarge(f"The request has over {MAX_HEADERS} headers.")
    if sum(name == b"host" for name, _ in scope["headers"]) > 1:
        raise BadRequest("A request has one Host header, not several.")
    if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADER_BYTES:
        raise HeadTooLarge(f"The headers are over {MAX_HEADER_BYTES:,} bytes.")


def _check_encoding(headers: Headers) -> None:
    given = ",".join(headers.getlist("content-encoding"))
    if not all(encoding.strip().lower() in PLAIN for encoding in given.split(",")):
        raise UnsupportedEncoding(
            "The body is not read with this Content-Encoding; send it plain, without that header."
        )


@lru_cache(maxsize=256)
def is_loopback(host: str) -> bool:
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


@lru_cache(maxsize=256)  # for each request, and nearly always the same
def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _host_name(host: str) -> str:
    """The Host header without its port, and an IPv6 address without brackets; empty where it is
    none."""
    found = _HOST.fullmatch(host)
    return (found["ipv6"] or found["name"]).lower() if found else ""


def _given_key(headers: Headers) -> bytes:
    scheme, _, given = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        given = headers.get("x-api-key", "")
    return given.strip(" \t").encode("latin-1")
