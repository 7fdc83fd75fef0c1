"""Clients that are slow, silent, too many or not speaking HTTP."""

import asyncio
import json
import logging
import re
import resource
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from http.client import parse_headers
from itertools import pairwise
from typing import Any, cast

import httpx
import psutil
import pytest
import uvicorn

import bench.connections as bench
from api.connections import Connection
from api.descriptors import room_for
from api.middleware import MAX_HEADER_BYTES, MAX_HEADERS, MAX_URL_BYTES
from tests.serving import Service, fake, script, serving, settings, wait_until
from tests.test_server import command, url_in

QUICK = {"send_timeout_s": 0.25, "receive_timeout_s": 0.25}
VECTORS: dict[str, Any] = {
    "model": "embedding", "input": ["word " * 250] * 20, "embedding_type": "colbert"
}  # fmt: skip
BREAKING = {"match": "break", "answer": "half", "fault": "step", "after": 4}
LONG_BREAKING = {"match": "long break", "answer": "x" * 300, "fault": "step", "after": 250}
LONG = {"match": "long", "answer": "0123456789" * 3000}


@pytest.fixture(scope="module")
def service(tmp_path_factory: Any) -> Iterator[Service]:
    path = script(tmp_path_factory.mktemp("script"), LONG_BREAKING, LONG, BREAKING, step_ms=1)
    tiers = {"light": fake(path, n_parallel=1, n_ctx=32000), "embedding": fake()}
    with serving(settings(QUICK, **tiers)) as service:
        assert service.chat().status_code == 200
        yield service


def dial(service: Service) -> socket.socket:
    """A connection of which the kernel keeps little."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.settimeout(10)
    url = httpx.URL(service.url)
    sock.connect((url.host, url.port))
    return sock


def post(path: str, **body: Any) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


def chat(text: str, **fields: Any) -> bytes:
    messages = [{"role": "user", "content": text}]
    return post("/v1/chat/completions", model="light", messages=messages, **fields)


def long_stream(**fields: Any) -> bytes:
    """Large events, of which few fill all buffers."""
    return chat("long", stream=True, logprobs=True, top_logprobs=20, **fields)


def read_all(sock: socket.socket) -> bytes:
    """All until the server closes."""
    data = b""
    while piece := sock.recv(1 << 16):
        data += piece
    return data


def refusal(sock: socket.socket, status: int) -> dict[str, Any]:
    """The error that the server says before it closes."""
    head, _, body = read_all(sock).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), head
    headers = head.decode().lower()
    assert "\r\nconnection: close" in headers
    assert "\r\nx-request-id: req-" in headers
    assert "\r\nx-content-type-options: nosniff" in headers
    error: dict[str, Any] = json.loads(body)["error"]
    assert {"message", "type", "param", "code"} <= error.keys()
    return error


def n_held(service: Service) -> int:
    """Descriptors that the server has of connections."""
    port = httpx.URL(service.url).port
    held = psutil.Process().net_connections()
    return sum(c.laddr.port == port and c.status != psutil.CONN_LISTEN for c in held)


def is_idle(service: Service) -> bool:
    return not any(tier._running or tier._n_leases for tier in service.manager.tiers.values())


def undisturbed(client: Callable[[list[float]], None]) -> None:
    """What a client finds that notes when it takes its steps: where the machine held one up for so
    long that a limit may have been over, it counts what another try finds."""
    failure: Exception
    for _ in range(5):
        steps_at = [time.monotonic()]
        try:
            return client(steps_at)
        except (AssertionError, OSError) as error:
            failure = error
        steps_at.append(time.monotonic())
        if max(b - a for a, b in pairwise(steps_at)) < min(QUICK.values()) / 2:
            break
    raise failure


# who does not read


def test_a_stream_that_nobody_reads_is_cut_and_its_sequence_freed(service: Service) -> None:
    with dial(service) as sock:
        sock.sendall(long_stream())
        assert sock.recv(100).startswith(b"HTTP/1.1 200")
        assert not is_idle(service)
        assert n_held(service)
        wait_until(lambda: is_idle(service))
        wait_until(lambda: not n_held(service))
        with pytest.raises(ConnectionResetError):  # and no end that looks like one
            read_all(sock)
    assert service.chat().status_code == 200  # there is one sequence only


def test_a_broken_stream_that_nobody_reads_is_cut_with_what_was_asked_behind_it(
    service: Service,
) -> None:
    with dial(service) as sock:
        sock.sendall(chat("long break", stream=True) + chat("Hi"))
        assert sock.recv(100).startswith(b"HTTP/1.1 200")
        wait_until(lambda: not n_held(service))
    assert service.chat().status_code == 200


def test_a_whole_reply_that_nobody_reads_is_cut(service: Service) -> None:
    with dial(service) as sock:
        sock.sendall(post("/v1/embeddings", **VECTORS))
        assert sock.recv(100).startswith(b"HTTP/1.1 200")
        assert n_held(service)
        wait_until(lambda: not n_held(service))
        with pytest.raises(ConnectionResetError):
            read_all(sock)


def test_who_reads_slowly_gets_everything(service: Service) -> None:
    def read_slowly(steps_at: list[float]) -> None:
        with dial(service) as sock:
            sock.sendall(post("/v1/embeddings", **VECTORS))
            started_at = time.monotonic()
            data = sock.recv(1 << 16)
            while time.monotonic() - started_at < 3 * QUICK["send_timeout_s"]:
                steps_at.append(time.monotonic())
                time.sleep(0.05)  # as a slow reader does
                data += sock.recv(1 << 16)
            steps_at.append(time.monotonic())
            data += read_all(sock)
        head, _, body = data.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")
        assert len(json.loads(body)["data"]) == len(VECTORS["input"])

    undisturbed(read_slowly)


def test_a_stream_goes_on_when_its_reader_does(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    pause, has_paused = Connection.pause_writing, threading.Event()
    paused_at = 0.0

    def told(connection: Connection) -> None:
        nonlocal paused_at
        pause(connection)
        paused_at = time.monotonic()
        has_paused.set()

    monkeypatch.setattr(Connection, "pause_writing", told)

    def read_late(steps_at: list[float]) -> None:
        has_paused.clear()
        with dial(service) as sock:
            sock.sendall(long_stream(max_tokens=400))
            assert has_paused.wait(10)
            steps_at[:] = [paused_at, time.monotonic()]
            data = sock.recv(1 << 16)
            while b"data: [DONE]" not in data[-100:]:
                steps_at.append(time.monotonic())
                piece = sock.recv(1 << 16)
                assert piece
                data += piece

    undisturbed(read_late)


# who does not send


def test_a_stream_that_breaks_has_no_end(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    said = [{"role": "user", "content": "break"}]
    assert "error" in service.breaking("/v1/chat/completions", messages=said)[-1]
    assert service.chat().status_code == 200
    assert not [one for one in caplog.records if one.name == "uvicorn.error"]


@pytest.mark.parametrize("begun", [b"", b"GET /health HTTP/1.1\r\nHost: local"])
def test_a_head_that_does_not_come_ends_the_connection(service: Service, begun: bytes) -> None:
    with dial(service) as sock:
        sock.sendall(begun)
        assert read_all(sock) == b""


def test_a_head_that_drips_in_ends_the_connection(service: Service) -> None:
    with dial(service) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nX: ")
        sock.settimeout(0.02)
        started_at = time.monotonic()
        while time.monotonic() - started_at < 10:
            try:
                assert sock.recv(1) == b""
                break
            except TimeoutError:
                with suppress(OSError):  # what was reset meanwhile says so at the next recv
                    sock.sendall(b"x")
            except ConnectionResetError:  # of bytes that nobody has read
                break
        assert time.monotonic() - started_at < 5


def test_a_body_that_does_not_come_is_a_408(service: Service) -> None:
    with dial(service) as sock:
        sock.sendall(chat("Hi")[:-1])
        error = refusal(sock, 408)
    assert error["code"] == "body_too_slow"
    assert "RECEIVE_TIMEOUT_S" in error["message"]


def test_a_request_whose_time_is_over_before_its_body_has_come_is_a_504() -> None:
    hasty = settings({"request_timeout_s": 0.2})
    with serving(hasty) as service, dial(service) as sock:
        sock.sendall(chat("Hi")[:-1])
        error = refusal(sock, 504)
    assert "REQUEST_TIMEOUT_S" in error["message"]


def test_a_client_that_leaves_before_its_body_has_come_is_told_as_such(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "quintet.access")
    with dial(service) as sock:
        sock.sendall(chat("Hi")[:-1])
        sock.shutdown(socket.SHUT_WR)
        sock.close()
        wait_until(lambda: "(client left)" in caplog.text)


def test_a_body_may_take_its_time_as_long_as_it_comes(service: Service) -> None:
    whole = chat("Hi" * 30)

    def send_slowly(steps_at: list[float]) -> None:
        with dial(service) as sock:
            started_at = time.monotonic()
            sock.sendall(whole[:-30])
            for byte in whole[-30:]:
                steps_at.append(time.monotonic())
                time.sleep(0.02)  # as a slow sender does
                sock.sendall(bytes([byte]))
            steps_at.append(time.monotonic())
            assert time.monotonic() - started_at > 2 * QUICK["receive_timeout_s"]
            assert sock.recv(100).startswith(b"HTTP/1.1 200")

    undisturbed(send_slowly)


def test_an_answer_may_take_longer_than_any_limit_of_the_clients(service: Service) -> None:
    reply = service.chat("long", max_tokens=700)  # a millisecond each
    assert reply.elapsed.total_seconds() > 2 * QUICK["send_timeout_s"]
    assert reply.status_code == 200


# who sends too much


def test_too_many_headers_are_a_431(service: Service) -> None:
    headers = {f"x-{n}": "x" for n in range(MAX_HEADERS)}
    reply = service.http.get("/health", headers=headers)
    assert reply.status_code == 431
    assert reply.json()["error"]["code"] == "head_too_large"


def test_a_url_that_is_too_long_is_a_414(service: Service) -> None:
    for path in ("/" + "x" * MAX_URL_BYTES, "/health?" + "x" * MAX_URL_BYTES):
        reply = service.http.get(path)
        assert reply.status_code == 414
        assert reply.json()["error"]["code"] == "url_too_long"


@pytest.mark.parametrize(
    "begun", [b"GET /", b"GET / HTTP/1.1\r\nX: ", b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 20000]
)
def test_a_head_without_end_is_a_431(service: Service, begun: bytes) -> None:
    with dial(service) as sock:
        with suppress(OSError):  # it may be refused before all is sent
            sock.sendall(begun + b"x" * 10 * MAX_HEADER_BYTES)
        try:
            reply = sock.recv(1 << 16)
        except ConnectionResetError:
            return  # the refusal was lost behind what was still coming
    assert reply.startswith(b"HTTP/1.1 431")


@pytest.mark.parametrize("endless", [b"5;x=", b"0\r\nx: "])
def test_a_chunk_or_trailer_without_end_ends_the_connection(
    service: Service, endless: bytes
) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
    sent = 0
    with dial(service) as sock, suppress(OSError):
        sock.sendall(head + b"\r\n" + endless)
        while sent < 100 * MAX_HEADER_BYTES:
            sent += sock.send(b"x" * MAX_HEADER_BYTES)
    assert sent < 100 * MAX_HEADER_BYTES


@pytest.mark.parametrize("nonsense", [b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"HELO you\r\n\r\n"])
def test_what_is_not_http_is_a_400_in_the_envelope(service: Service, nonsense: bytes) -> None:
    with dial(service) as sock:
        sock.sendall(nonsense + b"\r\n\r\n")
        assert refusal(sock, 400)["message"] == "The request is not valid HTTP."


def test_nonsense_behind_a_request_does_not_get_into_its_stream(service: Service) -> None:
    with dial(service) as sock:
        sock.sendall(chat("long", stream=True, max_tokens=100) + b"\x00\x01\x02\r\n\r\n")
        data = b""
        with suppress(ConnectionResetError):
            while piece := sock.recv(1 << 16):
                data += piece
    stream, *rest = data.split(b"HTTP/1.1 400")
    assert not rest or not stream or stream.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    wait_until(lambda: is_idle(service))


def test_a_client_that_leaves_ends_the_request_before_the_one_it_sent_last(
    service: Service,
) -> None:
    with dial(service) as sock:
        sock.sendall(chat("long") + chat("and then"))
        wait_until(lambda: not is_idle(service))
    wait_until(lambda: is_idle(service), timeout_s=5)


def test_every_reply_says_that_its_type_is_what_it_says(service: Service) -> None:
    with dial(service) as sock:
        sock.sendall(b"nonsense\r\n\r\n")
        refusal(sock, 400)
    for reply in (
        service.http.get("/health"),
        service.http.get("/nothing"),
        service.http.post("/v1/chat/completions"),
        service.http.get("/health", headers={"Host": "evil.example"}),
        service.chat(stream=True),
        service.http.get("/openapi.json"),
    ):
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert "html" not in reply.headers["content-type"]


# who would rather speak something else, as JDK's HttpClient does in its requests

H2C = (
    b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
    b"HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA\r\n"
)
WEBSOCKET = (
    b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)
MODELS = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX-Empty:\r\n\r\n"


def having(fields: bytes, request: bytes) -> bytes:
    """The request with these fields in its head."""
    return request.replace(b"\r\n", b"\r\n" + fields, 1)


def chunked(request: bytes) -> bytes:
    """The request with its body in two chunks."""
    head, _, body = request.partition(b"\r\n\r\n")
    head = re.sub(rb"Content-Length: \d+", b"Transfer-Encoding: chunked", head)
    pieces = (b"%x\r\n%s\r\n" % (len(piece), piece) for piece in (body[:9], body[9:], b""))
    return head + b"\r\n\r\n" + b"".join(pieces)


def replies(sock: socket.socket, n: int) -> list[tuple[int, Any]]:
    """The next ones: status, and what the JSON says."""
    found = []
    with sock.makefile("rb") as reader:
        for _ in range(n):
            status = int(reader.readline().split()[1])
            length = int(parse_headers(reader)["content-length"])
            found.append((status, json.loads(reader.read(length))))
    return found


@pytest.fixture(scope="module", params=[1, 100, 1 << 20])
def pieces(request: Any) -> Iterator[Service]:
    """A service that gets what is sent in pieces of so many bytes."""

    class Cut(Connection):
        def data_received(self, data: bytes) -> None:
            for start in range(0, len(data), request.param):
                super().data_received(data[start : start + request.param])

    with serving(settings(light=fake(n_parallel=1)), http=Cut) as service:
        yield service


@pytest.mark.parametrize("wish", [H2C, WEBSOCKET])
@pytest.mark.parametrize("framed", [bytes, chunked])
def test_a_wish_for_another_protocol_is_ignored_and_the_body_is_read(
    pieces: Service, framed: Callable[[bytes], bytes], wish: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = (having(wish, framed(chat(text, max_tokens=3))) for text in ("one", "two"))
    with dial(pieces) as sock:
        sock.sendall(having(wish, MODELS))
        ((status, models),) = replies(sock, 1)
        assert (status, models["data"][0]["id"]) == (200, "light")
        sock.sendall(first)
        assert [status for status, _ in replies(sock, 1)] == [200]
        sock.sendall(chat("plain") + second + having(wish, MODELS) + first + MODELS)  # at once
        assert [status for status, _ in replies(sock, 5)] == [200] * 5
        sock.sendall(having(b"Expect: 100-continue\r\n", first).partition(b"{")[0])
        assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(b"{" + first.partition(b"{")[2])
        assert [status for status, _ in replies(sock, 1)] == [200]
        sock.sendall(having(b"Connection: close\r\n", second))
        assert [status for status, _ in replies(sock, 1)] == [200]
        assert read_all(sock) == b""
    assert "upgrade" not in caplog.text
    assert "WebSocket" not in caplog.text


def test_a_wish_for_another_protocol_lifts_no_limit(service: Service) -> None:
    with dial(service) as sock:
        sock.sendall(having(H2C, chat("Hi"))[:-1])
        assert refusal(sock, 408)["code"] == "body_too_slow"
    with dial(service) as sock:
        sock.sendall(having(H2C + b"Transfer-Encoding: gzip\r\n", MODELS))
        assert refusal(sock, 400)["message"] == "The request is not valid HTTP."
    with dial(service) as sock:
        sock.sendall(having(H2C + b"".join(b"x-%d: x\r\n" % n for n in range(MAX_HEADERS)), MODELS))
        ((status, said),) = replies(sock, 1)
        assert (status, said["error"]["code"]) == (431, "head_too_large")
    endless = having(H2C, b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n")
    sent = 0
    with dial(service) as sock, suppress(OSError):
        sock.sendall(endless + b"\r\n5;x=")
        while sent < 100 * MAX_HEADER_BYTES:
            sent += sock.send(b"x" * MAX_HEADER_BYTES)
    assert sent < 100 * MAX_HEADER_BYTES


def test_a_wish_for_another_protocol_allows_no_larger_body() -> None:
    with serving(settings({"max_body_bytes": 5000})) as service:
        for framed in (bytes, chunked):
            with dial(service) as sock:
                sock.sendall(having(H2C, framed(chat("x" * 6000))))
                assert [status for status, _ in replies(sock, 1)] == [413]


class Chosen(asyncio.Protocol):
    """Where uvicorn hands WebSockets to: says the head that it is given."""

    def __init__(self, **_: Any) -> None:
        pass

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)
        self.transport.close()


def test_websockets_go_where_uvicorn_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(uvicorn.config.WS_PROTOCOLS, "none", f"{__name__}:Chosen")
    with serving() as service, dial(service) as sock:
        sock.sendall(MODELS + having(H2C, MODELS))
        assert [status for status, _ in replies(sock, 2)] == [200, 200]
        sock.sendall(having(WEBSOCKET, MODELS))
        head = read_all(sock)
    assert head.startswith(b"GET /v1/models HTTP/1.1\r\n")
    assert b"\r\nupgrade: websocket\r\n" in head


def test_a_tunnel_to_elsewhere_is_refused(service: Service) -> None:
    for fields in (b"", b"Content-Length: 2\r\n", H2C):
        with dial(service) as sock:
            sock.sendall(
                having(fields, b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\n\r\n")
            )
            assert sock.recv(100).startswith((b"HTTP/1.1 404", b"HTTP/1.1 400"))


# too many


def test_a_connection_too_many_is_a_503_and_the_others_go_on() -> None:
    with serving(settings({"max_connections": 3})) as service:
        with dial(service), dial(service):
            assert service.http.get("/health").status_code == 200
            with dial(service) as fourth:
                error = refusal(fourth, 503)
            assert error["code"] == "too_many_connections"
            assert service.chat().status_code == 200
        wait_until(lambda: httpx.get(f"{service.url}/health").status_code == 200)


@pytest.mark.parametrize(
    ("wanted", "limits", "room", "raised"),
    [
        (1000, (8192, 8192), 1000, None),
        (1000, (1024, 8192), 1000, 1100),
        (1000, (1024, 1024), 924, None),
        (1000, (256, resource.RLIM_INFINITY), 1000, 1100),
        (1000, (100, 300), 200, 300),
        (1000, (64, 64), 32, None),
        (1000, (resource.RLIM_INFINITY, resource.RLIM_INFINITY), 1000, None),
    ],
)
def test_there_are_as_many_connections_as_files_allow(
    wanted: int, limits: Any, room: int, raised: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    was_set = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _, to: was_set.append(to))
    assert room_for(wanted) == room
    assert was_set == ([] if raised is None else [(raised, limits[1])])


def test_a_system_may_allow_less_than_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS says that there is no limit, and has one."""

    def refuses(_: int, to: tuple[int, int]) -> None:
        raise ValueError("current limit exceeds maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, resource.RLIM_INFINITY))
    monkeypatch.setattr(resource, "setrlimit", refuses)
    assert room_for(100_000) == 156


# a process that may open few files
START = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
import server
server.main()
"""
BODY = {"model": "light", "messages": [{"role": "user", "content": "Hi"}]}


@contextmanager
def crowd(url: str, n: int) -> Iterator[list[socket.socket]]:
    """So many connections that ask for nothing."""
    at = httpx.URL(url)
    with ExitStack() as stack:
        yield [
            stack.enter_context(socket.create_connection((at.host, at.port or 0), timeout=10))
            for _ in range(n)
        ]


def answers(url: str) -> bool:
    try:
        return httpx.post(f"{url}/v1/chat/completions", json=BODY).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="no other system has prlimit")
def test_running_out_of_files_ends_nothing() -> None:
    with command("-c", START) as process:
        url, about = url_in(process), psutil.Process(process.pid)
        with crowd(url, 200) as (first, *_):  # connections alone cannot use them up
            wait_until(lambda: about.num_fds() > 64)
            wait_until(lambda: about.num_fds() < 100)
            first.sendall(chat("Hi"))  # starts a worker, which needs some
            assert first.recv(100).startswith(b"HTTP/1.1 200")
        wait_until(lambda: answers(url))

        wait_until(lambda: about.num_fds() < 40)  # the crowd has gone
        limit = about.num_fds() + 10
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (limit, 128))
        with crowd(url, 100) as (*_, last):  # now they can
            wait_until(lambda: about.num_fds() >= limit)
            with suppress(ConnectionResetError):
                assert last.recv(1) == b""  # it is told at once that nobody serves it
            before_s = sum(about.cpu_times()[:2])
            time.sleep(0.5)  # in which it could compute a lot
            assert sum(about.cpu_times()[:2]) - before_s < 0.2
        wait_until(lambda: answers(url))

        process.terminate()
        output, _ = process.communicate(timeout=20)
        assert "Traceback" not in output


def test_clients_that_read_slowly_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--clients", "3", "--slow", "3", "--gap-ms", "1", "--step-ms", "1"]
    assert bench.main(few) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["slow_readers_at_the_end"] == 3
    assert report["ratio"]["p50"] > 0
