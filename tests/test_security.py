"""Attacks: on the keys, on the names that a page can rebind, from pages, and by odd paths."""

import socket
from collections.abc import Iterator
from typing import Annotated

import pytest
from fastapi import Request

from api.deps import ADMIN_ONLY
from api.middleware import key_of
from server import create_app
from tests.serving import Service, fake, serving, settings

CHAT = "/v1/chat/completions"
EVIL = "https://evil.example"
BODY = '{"model": "light", "messages": [{"role": "user", "content": "x"}]}'
KEY = "a-key-of-some-length"

Reply = Annotated[str, "the status line and all that follows"]


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    """As it comes: no keys, this machine only."""
    with serving() as service:
        yield service


@pytest.fixture(scope="module")
def locked() -> Iterator[Service]:
    with serving(settings({"api_keys": [KEY, "another"]})) as service:
        yield service


def raw(service: Service, *lines: str, body: str = "") -> tuple[int, str]:
    """Status and text of the reply to a request that no client library would send."""
    host, port = service.url.removeprefix("http://").split(":")
    request = "\r\n".join([*lines, "Connection: close", f"Content-Length: {len(body)}", "", body])
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(request.encode("latin-1"))
        reply = b""
        while part := connection.recv(1 << 16):
            reply += part
    return int(reply.split(b" ", 2)[1]), reply.decode("latin-1")


# hosts


@pytest.mark.parametrize(
    "host",
    [
        "evil.example:8000",
        "EVIL.EXAMPLE",
        "evil.example.",
        "",
        " ",
        ":8000",
        ".",
        # looks like a name that is served
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "evil-localhost",
        "evillocalhost",
        "localhost.",
        "app.localhost.",
        "localhost evil.example",
        "localhost,evil.example",
        "localhost/evil.example",
        "localhost\x85",
        "*",
        # userinfo
        "localhost@evil.example",
        "evil.example@localhost",
        "localhost:80@evil.example",
        # ports that are none
        "localhost:evil.example",
        "localhost:80:80",
        "localhost:+80",
        # IPv6
        "[::1].evil.example",
        "[::1]evil.example",
        "[::1",
        "::1]",
        "[evil.example]",
        "[::1%evil.example]",
        "[[::1]]",
        # addresses that only some resolvers take for one; a name may look like that
        "0x7f000001",
        "2130706433",
        "127.1",
        "127.0.0.1.",
    ],
)
def test_a_host_that_is_not_ours_is_refused(service: Service, host: str) -> None:
    status, reply = raw(service, "GET /v1/models HTTP/1.1", f"Host: {host}")
    assert status == 403, reply
    assert raw(service, f"POST {CHAT} HTTP/1.1", f"Host: {host}", body=BODY)[0] == 403


@pytest.mark.parametrize(
    "host", ["LOCALHOST:80", "[::1]", "[::FFFF:127.0.0.1]:8000", "127.0.0.1:", "a.b.localhost:1"]
)
def test_our_own_names_are_served_in_every_spelling(service: Service, host: str) -> None:
    assert raw(service, "GET /v1/models HTTP/1.1", f"Host: {host}")[0] == 200


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["GET /v1/models HTTP/1.1", "Host: localhost", "Host: evil.example"], 400),
        (["GET /v1/models HTTP/1.1", "Host: evil.example", "Host: localhost"], 400),
        (["GET /v1/models HTTP/1.1", "Host: localhost", " .evil.example"], 400),
        (["GET /v1/models HTTP/1.1", "Host : localhost"], 400),
        (["GET /v1/models HTTP/1.1"], 403),
        (["GET /v1/models HTTP/1.0"], 403),
        # the form that proxies are asked in does not stand in for the Host
        (["GET http://localhost/v1/models HTTP/1.1", "Host: evil.example"], 403),
        (["GET http://evil.example/v1/models HTTP/1.1", "Host: evil.example"], 403),
        # nor does what proxies add
        (["GET /v1/models HTTP/1.1", "Host: evil.example", "X-Forwarded-Host: localhost"], 403),
        (["GET /v1/models HTTP/1.1", "Host: evil.example", "Forwarded: host=localhost"], 403),
        (["GET /v1/models HTTP/1.1", "Host: evil.example", "X-Forwarded-For: 127.0.0.1"], 403),
        (["GET /v1/models HTTP/1.1", "Host: localhost", "X-Forwarded-Host: evil.example"], 200),
        (["GET /health HTTP/1.1", "Host: evil.example"], 403),
        (["CONNECT localhost:80 HTTP/1.1", "Host: localhost"], 400),
    ],
)
def test_only_the_one_host_header_counts(service: Service, lines: list[str], expected: int) -> None:
    assert raw(service, *lines)[0] == expected


# keys


@pytest.mark.parametrize(
    "lines",
    [
        [],
        ["Authorization: "],
        ["Authorization: Bearer"],
        ["Authorization: Bearer "],
        [f"Authorization: {KEY}"],
        [f"Authorization: Basic {KEY}"],
        ["Authorization: Basic eDphLWtleS1vZi1zb21lLWxlbmd0aA=="],  # x:KEY
        [f"Authorization: Token {KEY}"],
        [f"Authorization: BearerX {KEY}"],
        [f"Authorization: Bearer\t{KEY}"],
        [f"Authorization: Bearer {KEY[:-1]}"],
        [f"Authorization: Bearer {KEY[1:]}"],
        [f"Authorization: Bearer {KEY}x"],
        [f"Authorization: Bearer {KEY} {KEY}"],
        [f"Authorization: Bearer {KEY},another"],
        [f"Authorization: Bearer {KEY.upper()}"],
        [f"Authorization: Bearer {KEY}\xa0"],
        [f"Authorization: Bearer {KEY}\x85"],
        ["Authorization: Bearer \xff\xfe\x80"],
        ["Authorization: Bearer ключ".encode().decode("latin-1")],
        [f"Authorization: Bearer {'x' * 30_000}"],
        [f"Authorization: Bearer {KEY * 1000}"],
        ["Authorization: Bearer wrong", f"Authorization: Bearer {KEY}"],
        ["Authorization: Bearer wrong", f"x-api-key: {KEY}"],
        ["x-api-key: "],
        ["x-api-key: *"],
        [f"x-api-key: Bearer {KEY}"],
        [f"api-key: {KEY}"],
        [f"Proxy-Authorization: Bearer {KEY}"],
        [f"Cookie: Authorization=Bearer {KEY}; x-api-key={KEY}"],
    ],
)
def test_what_is_not_a_key_does_not_open(locked: Service, lines: list[str]) -> None:
    host = ["Host: localhost"]
    for request in ("GET /v1/models HTTP/1.1", f"GET /v1/models?key={KEY}&api_key={KEY} HTTP/1.1"):
        status, reply = raw(locked, request, *host, *lines)
        assert status == 401, reply
        assert KEY not in reply
    form = ["Content-Type: application/x-www-form-urlencoded"]
    assert raw(locked, f"POST {CHAT} HTTP/1.1", *host, *form, *lines, body=f"key={KEY}")[0] == 401


@pytest.mark.parametrize(
    "line",
    [f"Authorization: Bearer {KEY}", f"AUTHORIZATION: BEARER   {KEY}  ", f"x-api-key:\t{KEY}\t"],
)
def test_a_key_opens_in_every_spelling_of_its_header(locked: Service, line: str) -> None:
    assert raw(locked, "GET /v1/models HTTP/1.1", "Host: localhost", line)[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models", "//v1/models", "/./v1/models", "/v1/./models", "/v1//models", "/V1/models",
        "/health/../v1/models", "/health/..%2fv1/models", "/health%2f..%2fv1/models",
        "/health/%2e%2e/v1/models", "/health%2f%2e%2e%2fv1%2fmodels", "/%2e%2e/v1/models",
        "/v1/models/../../health", "/health/", "//health", "/./health", "/HEALTH", "/health;x",
        "/health;/../v1/models", "/health%00", "/health%3f", "/health%23", "/health%20", "/healthz",
        "/health\\..\\v1\\models", "/v1/models?/health", "/v1/models#/health", "/", "*",
        "/openapi.json", "/docs", "http://localhost/v1/models", "http://x/health/../v1/models",
        "http://localhost/health@/v1/models", "/v1/models%2fhealth",
    ],
)  # fmt: skip
def test_no_spelling_of_a_path_does_without_a_key(locked: Service, path: str) -> None:
    for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
        status, reply = raw(locked, f"{method} {path} HTTP/1.1", "Host: localhost")
        assert status in (400, 401), f"{method}: {reply}"  # 400: what is no HTTP


@pytest.mark.parametrize("path", ["/health", "/health?x=/v1/models", "/%68ealth", "/health#x"])
def test_what_needs_no_key_is_health_and_nothing_else(locked: Service, path: str) -> None:
    status, reply = raw(locked, f"GET {path} HTTP/1.1", "Host: localhost")
    assert status == 200
    assert '{"status":"ok","tiers":' in reply


# who asks, and who may change the service


@pytest.fixture(scope="module")
def governed() -> Iterator[Service]:
    with serving(settings({"api_keys": ["user-1"], "admin_api_keys": ["admin-1"]})) as service:
        yield with_probes(service)


def with_probes(service: Service) -> Service:
    """With a route that tells who asks, and one that changes the service."""

    @service.app.get("/who")
    def who(request: Request) -> dict[str, object]:
        return {name: request.scope[name] for name in ("key_id", "is_admin")}

    @service.app.post("/change", dependencies=[ADMIN_ONLY])
    def change() -> str:
        return "changed"

    return service


def test_only_admins_keys_change_the_service(governed: Service) -> None:
    for key, expected in (("user-1", 403), ("admin-1", 200), ("nobody", 401)):
        for headers in ({"Authorization": f"Bearer {key}"}, {"x-api-key": key}):
            reply = governed.http.post("/change", headers=headers)
            assert reply.status_code == expected, key
    assert governed.http.post("/change").status_code == 401
    both = {"Authorization": "Bearer user-1", "x-api-key": "admin-1"}
    refused = governed.http.post("/change", headers=both)
    assert refused.status_code == 403
    assert refused.json()["error"]["code"] == "forbidden"
    assert "ADMIN_API_KEYS" in refused.json()["error"]["message"]


def test_an_admins_key_is_an_ordinary_key_too(governed: Service) -> None:
    for key in ("user-1", "admin-1"):
        assert governed.http.get("/v1/models", headers={"x-api-key": key}).status_code == 200


def test_a_request_knows_whose_it_is_but_not_the_key(governed: Service) -> None:
    of = {
        key: governed.http.get("/who", headers={"x-api-key": key}).json()
        for key in ("user-1", "admin-1")
    }
    assert [about["is_admin"] for about in of.values()] == [False, True]
    ids = [about["key_id"] for about in of.values()]
    assert ids == [key_of(key, is_admin=False).id for key in of]
    assert ids[0] == "6a87d24ca960", "it is the same for ever, since caches on disk know it"
    assert len(set(ids)) == 2
    assert "user-1" not in repr(key_of("user-1", is_admin=False))


@pytest.mark.parametrize(
    ("server", "headers", "changes"),
    [
        ({}, {}, 200),
        ({}, {"x-api-key": "whatever"}, 200),
        ({"api_keys": ["user-1"]}, {"x-api-key": "user-1"}, 200),
        ({"api_keys": ["user-1"]}, {}, 401),
        ({"admin_api_keys": ["admin-1"]}, {"x-api-key": "admin-1"}, 200),
        ({"admin_api_keys": ["admin-1"]}, {}, 401),
        ({"api_keys": ["k"], "admin_api_keys": ["k"]}, {"x-api-key": "k"}, 200),
    ],
)
def test_without_admins_keys_whoever_may_ask_may_change(
    server: dict[str, list[str]], headers: dict[str, str], changes: int
) -> None:
    with serving(settings(server)) as service:
        reply = with_probes(service).http.post("/change", headers=headers)
        assert reply.status_code == changes
        if changes == 401:
            assert service.http.get("/v1/models").status_code == 401


def test_every_route_that_changes_the_service_is_for_admins() -> None:
    """By what such routes are called here: a new one is easily forgotten."""
    from fastapi.routing import iter_route_contexts

    app = create_app(settings(light=fake()))
    app.add_api_route("/v1/open/load", lambda: None, methods=["POST"])
    app.add_api_route("/v1/shut/load", lambda: None, methods=["POST"], dependencies=[ADMIN_ONLY])
    forgotten = [
        context.path
        for context in iter_route_contexts(app.routes)
        if context.methods
        and (context.methods & {"DELETE", "PUT", "PATCH"} or "load" in str(context.path))
        and ADMIN_ONLY not in context.dependencies
    ]
    assert forgotten == ["/v1/open/load"]


# web pages

ORIGINS = [
    EVIL,
    "null",
    "http://localhost.evil.com",
    "http://127.0.0.1.evil.com",
    "http://evil.com:80#http://localhost",
    "http://localhost@evil.com",
    "http://localhost:80@evil.com",
    "http://evillocalhost",
    "http://evil.com/http://localhost",
    "http://localhost:evil.com",
    "http://localhost:1.evil.com",
    "http://localhost\x85",
    "http://[::1].evil.com",
    "http://127.0.0.12",
    "http://127x0x0x1",
    "file://",
    "ftp://localhost",
    "http://localhost, https://evil.example",
    "",
]


@pytest.mark.parametrize("origin", ORIGINS)
def test_a_page_from_elsewhere_is_not_allowed_to_ask(service: Service, origin: str) -> None:
    for wish in ("POST", "DELETE"):
        status, reply = raw(
            service,
            f"OPTIONS {CHAT} HTTP/1.1",
            "Host: localhost",
            f"Origin: {origin}",
            f"Access-Control-Request-Method: {wish}",
            "Access-Control-Request-Headers: content-type,authorization",
        )
        assert status == 400, reply
        assert "access-control-allow-origin" not in reply
    assert "access-control-allow-credentials" not in reply


@pytest.mark.parametrize("origin", ORIGINS)
@pytest.mark.parametrize(
    "kind",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x",
     "application/json", "text/plain;application/json", None],
)  # fmt: skip
def test_a_page_that_does_not_ask_first_runs_nothing(
    service: Service, origin: str, kind: str | None
) -> None:
    """What browsers send without a preflight: forms, fetch without CORS, beacons."""
    lines = [] if kind is None else [f"Content-Type: {kind}"]
    status, reply = raw(
        service, f"POST {CHAT} HTTP/1.1", "Host: localhost", f"Origin: {origin}", *lines, body=BODY
    )
    assert status == 403, reply
    assert "access-control-allow-origin" not in reply


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", None])
def test_a_body_that_browsers_send_unasked_is_not_read(service: Service, kind: str | None) -> None:
    """Also without an Origin, as old browsers send forms."""
    lines = [] if kind is None else [f"Content-Type: {kind}"]
    for path in (CHAT, "/v1/completions", "/v1/messages", "/v1/responses", "/tokenize", "/embed"):
        request = [f"POST {path} HTTP/1.1", "Host: localhost", *lines]
        status, reply = raw(service, *request, body=BODY)
        assert status == 400, reply
        assert "application/json" in reply


def test_a_page_from_elsewhere_changes_nothing_without_a_body_either() -> None:
    with serving() as service:
        with_probes(service)
        for origin, expected in ((EVIL, 403), ("null", 403), ("http://localhost:3000", 200)):
            reply = service.http.post("/change", headers={"Origin": origin})
            assert reply.status_code == expected, origin
        assert "CORS_ORIGINS" in service.http.post("/change", headers={"Origin": EVIL}).text
        own = {"Host": "192.168.1.5:8000"}
        for origin, expected in (("http://192.168.1.5:8000", 200), ("http://192.168.1.6", 403)):
            reply = service.http.post("/change", headers=own | {"Origin": origin})
            assert reply.status_code == expected, "a page of the service itself"


def test_a_page_from_elsewhere_cannot_read(service: Service) -> None:
    for path in ("/v1/models", "/health", "/openapi.json"):
        reply = service.http.get(path, headers={"Origin": EVIL, "Cookie": "session=1"})
        assert "access-control-allow-origin" not in reply.headers
        assert "access-control-allow-credentials" not in reply.headers


def test_a_page_that_is_allowed_runs_the_model() -> None:
    for origins in ([EVIL], ["*"]):
        with serving(settings({"cors_origins": origins})) as service:
            headers = {"Origin": EVIL, "Content-Type": "application/json"}
            reply = service.http.post(CHAT, content=BODY, headers=headers)
            assert reply.status_code == 200
            assert reply.headers["access-control-allow-origin"] in (EVIL, "*")


def test_whoever_has_a_key_may_call_us_by_any_name(locked: Service) -> None:
    """A page whose name was pointed at this machine has none."""
    lines = ["GET /v1/models HTTP/1.1", "Host: host.docker.internal:8000"]
    assert raw(locked, *lines, f"X-Api-Key: {KEY}")[0] == 200
    assert raw(locked, *lines, "X-Api-Key: wrong")[0] == 401, "the host is not what is wrong"
    assert raw(locked, *lines)[0] == 401
    assert raw(locked, "GET /health HTTP/1.1", lines[1])[0] == 403, "it wants no key"
    assert raw(locked, *lines, "Host: localhost", f"X-Api-Key: {KEY}")[0] == 400


def test_whoever_has_a_key_needs_no_origin(locked: Service) -> None:
    """Browsers add no keys of themselves, and applications that are none send odd origins."""
    headers = {"Origin": "app://notes", "Content-Type": "application/json"}
    reply = locked.http.post(CHAT, content=BODY, headers=headers | {"x-api-key": KEY})
    assert reply.status_code == 200
    assert locked.http.post(CHAT, content=BODY, headers=headers).status_code in (401, 403)
