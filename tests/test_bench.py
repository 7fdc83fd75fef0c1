"""The load benchmark: what it reads, what it counts, and what it says of a server that fails."""

import asyncio
import importlib.util
import json
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

# By its path and under another name: as `http` it would stand in for the standard library's.
FILE = Path(__file__).resolve().parent.parent / "bench" / "http.py"


def load_bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_http", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_http"] = module  # where its dataclasses look for their names
    spec.loader.exec_module(module)
    return module


bench: Any = load_bench()

Answer = Callable[[dict[str, Any]], tuple[int, bytes]]


class FakeServer(ThreadingHTTPServer):
    """Answers each POST with `answer(body)` and remembers what it was asked."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, answer: Answer) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer = answer
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that left is no news; the traceback would stand in another test's output."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        self.server.keys.append(self.headers["Authorization"])
        status, content = self.server.answer(body)
        self.send_response(status)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        """Says nothing."""


@contextmanager
def serving(answer: Answer) -> Iterator[FakeServer]:
    with FakeServer(answer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def sse(*payloads: object, done: bool = True) -> bytes:
    events = [f"data: {json.dumps(payload, ensure_ascii=False)}\n\n" for payload in payloads]
    return "".join([*events, "data: [DONE]\n\n" if done else ""]).encode()


def delta(finish_reason: str | None = None, **fields: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": finish_reason}]}


USAGE = {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 5, "total_tokens": 14}}
GOOD = sse(delta(role="assistant", content=""), delta(content="a"), delta(content="b"),
           delta("stop"), USAGE)  # fmt: skip


def always(status: int, content: bytes) -> Answer:
    return lambda body: (status, content)


def report_of(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, dict[str, Any]]:
    code = bench.main([*argv, "--json"])
    return code, json.loads(capsys.readouterr().out)


def observed(*payloads: object) -> Any:
    """A trace that took in an event each second, sent at second 10."""
    trace = bench.Trace(sent_at=10.0)
    for second, payload in enumerate(payloads, 11):
        trace.observe(json.dumps(payload).encode(), float(second))
    return trace


# Reading.


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_are_whole_however_their_bytes_are_cut(size: int) -> None:
    text = "é 日本 \u2028 \x85 data: x"
    stream = b": heartbeat\n\n" + sse(delta(content=text)) + b"data: no line end yet"
    parser = bench.SSEParser()
    pieces = [stream[i : i + size] for i in range(0, len(stream), size)]
    first, last = [payload for piece in pieces for payload in parser.feed(piece)]
    assert json.loads(first) == delta(content=text)
    assert last == b"[DONE]"


def test_carriage_returns_and_a_missing_space_are_legal() -> None:
    assert bench.SSEParser().feed(b"event: x\r\ndata:{}\r\n\r\ndata: 1\r\n\r\n") == [b"{}", b"1"]


def test_the_first_token_is_the_first_text_and_not_the_role() -> None:
    trace = observed(delta(role="assistant", content=""), delta(content="a"), delta(content="b"))
    assert trace.text_at == [12.0, 13.0]
    assert not trace.finished


def test_thoughts_are_tokens_too() -> None:
    trace = observed(delta(reasoning_content="a"), delta(reasoning="b"))
    assert trace.text_at == [11.0, 12.0]


def test_finish_reason_or_done_ends_an_answer() -> None:
    assert observed(delta("length")).finished
    done = bench.Trace()
    done.observe(b"[DONE]", 1.0)
    assert done.finished


@pytest.mark.parametrize("payload", [b"{", b"[]", b'{"error": {"message": "no"}}', b"\xff"])
def test_what_is_no_chunk_is_an_error(payload: bytes) -> None:
    with pytest.raises(ValueError, match=r"error event|Expecting|codec"):
        bench.Trace().observe(payload, 1.0)


# Counting.


def test_percentiles_lie_between_ranks() -> None:
    assert bench.percentile([3.0, 1.0, 2.0, 4.0], 50) == 2.5
    assert bench.percentile(list(range(101)), 99) == 99
    assert bench.percentile([7.0], 99) == 7.0
    assert bench.percentile([], 50) is None


def test_a_report_counts_only_what_succeeded() -> None:
    good = observed(delta(content="a"), delta(content="b"), delta(content="c"), USAGE)
    uncounted = observed(delta(content="a"), delta(content="b"))
    good.error = uncounted.error = None
    bad = observed(delta(content="a"), USAGE)
    bad.error = "HTTP 500: no"
    report = bench.summarise("it", 4, [bench.Trace(), good, uncounted, bad], wall_s=2.0)
    assert (report.requests, report.errors, report.completion_tokens) == (4, 2, 5 + 2)
    assert report.first_error == "HTTP 500: no"  # rather than that one did not finish
    assert report.metrics == {
        "tokens_per_s": 3.5,
        "first_token_p50_ms": 1000.0,
        "first_token_p99_ms": 1000.0,
        "gap_p50_ms": 1000.0,
        "gap_p99_ms": 1000.0,
    }


def test_prompts_are_unique_and_follow_from_the_seed() -> None:
    load = bench.Load(levels=(1, 4), requests=8, seed=1)
    texts = [
        body["messages"][0]["content"]
        for level in load.levels
        for body in bench.request_bodies(load, level, "m")
    ]
    assert len(set(texts)) == 16
    again = bench.request_bodies(bench.Load(requests=8, seed=1), 1, "m")
    assert [body["messages"][0]["content"] for body in again] == texts[:8]
    other = bench.request_bodies(bench.Load(requests=8, seed=2), 1, "m")
    assert not {body["messages"][0]["content"] for body in other} & set(texts)


def test_shared_words_are_one_system_message_for_all() -> None:
    bodies = bench.request_bodies(bench.Load(requests=3, shared_words=20), 1, "m")
    (shared,) = {body["messages"][0]["content"] for body in bodies}
    assert len(shared.split()) == 20
    assert [message["role"] for message in bodies[0]["messages"]] == ["system", "user"]


# Running.


def test_two_levels_are_run_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(always(200, GOOD)) as server:
        code, report = report_of(
            capsys, server.url, "--concurrency", "1,4", "--requests", "3", "--max-tokens", "7",
            "--model", "m", "--api-key", "secret", "--seed", "5",
        )  # fmt: skip
    assert code == 0
    assert report["load"]["seed"] == 5
    runs = [level["runs"][0] for level in report["levels"]]
    assert [(run["concurrency"], run["requests"], run["errors"]) for run in runs] == [
        (1, 3, 0),
        (4, 4, 0),  # never fewer requests than are open at once
    ]
    assert [run["completion_tokens"] for run in runs] == [15, 20]
    assert all(value is not None for run in runs for value in run["metrics"].values())
    assert len(server.bodies) == 1 + 3 + 4  # the warm-up is not counted
    assert len({json.dumps(body["messages"]) for body in server.bodies}) == 8
    assert {(body["model"], body["max_tokens"]) for body in server.bodies} == {("m", 7)}
    assert set(server.keys) == {"Bearer secret"}


def test_a_peer_gets_the_same_prompts_and_the_ratios_are_given(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with serving(always(200, GOOD)) as ours, serving(always(200, GOOD)) as peer:
        code, report = report_of(
            capsys, ours.url, "--peer", peer.url + "/v1/", "--peer-model", "other",
            "--api-key", "secret", "--concurrency", "2", "--requests", "2",
        )  # fmt: skip
    assert code == 0
    (level,) = report["levels"]
    mine, theirs = (run["metrics"]["tokens_per_s"] for run in level["runs"])
    assert level["ratio"]["tokens_per_s"] == pytest.approx(mine / theirs)
    prompts = [sorted(str(b["messages"]) for b in server.bodies) for server in (ours, peer)]
    assert prompts[0] == prompts[1]
    assert {body["model"] for body in peer.bodies} == {"other"}
    assert set(peer.keys) == {None}  # our key is not for others


def test_the_table_has_a_line_for_each_level_and_target(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(always(200, GOOD)) as server:
        peer = ["--peer", server.url, "--peer-model", "other"]
        assert bench.main([server.url, *peer, "--concurrency", "1,2", "--requests", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.endswith(server.url.removeprefix("http://")) for line in lines) == 4
    assert sum(line.endswith("ours / peer") for line in lines) == 2


def failing_after_warm_up(status: int, content: bytes) -> Answer:
    calls = iter([(200, GOOD)])
    return lambda body: next(calls, (status, content))


@pytest.mark.parametrize(
    ("status", "content", "said"),
    [
        (429, b'{"error": {"message": "queue is full"}}', "HTTP 429: .*queue is full"),
        (500, b"\xff<html>\n oops", "HTTP 500: .*<html> oops"),
        (200, sse(delta(content="a"), {"error": {"message": "worker died"}}), "worker died"),
        (200, sse(delta(content="a"), done=False), "ended without finish_reason"),
        (200, b"data: {not json\n\n", "JSONDecodeError"),
        (200, sse({"choices": ["odd"]}), "AttributeError"),
        (200, b"", "ended without finish_reason"),
    ],
)
def test_an_erring_server_is_reported(
    status: int, content: bytes, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(failing_after_warm_up(status, content)) as server:
        code, report = report_of(capsys, server.url, "--concurrency", "2", "--requests", "3")
    assert code == 1
    (run,) = report["levels"][0]["runs"]
    assert (run["errors"], run["completion_tokens"]) == (3, 0)
    assert run["metrics"]["first_token_p50_ms"] is None
    assert re.search(said, run["first_error"])


def test_a_level_that_does_not_end_is_ended() -> None:
    released = threading.Event()
    first = iter([(200, GOOD)])

    def answer(body: dict[str, Any]) -> tuple[int, bytes]:
        reply = next(first, None)
        if reply is None:
            released.wait(30)
        return reply or (500, b"")

    with serving(answer) as server:
        target = bench.Target(bench.chat_url(server.url), "m")
        bodies = bench.request_bodies(bench.Load(requests=3), 1, "m")
        try:
            report = asyncio.run(bench.run_level(target, 1, bodies, timeout_s=0.3))
        finally:
            released.set()
    assert (report.requests, report.errors, report.completion_tokens) == (3, 2, 5)
    assert report.first_error == bench.NOT_FINISHED


def test_a_server_that_is_down_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:  # bound and not listening: nobody else can get the port
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert bench.main([f"http://{address}", "--json"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"no measurement: light@{address} ")
    assert err.count("\n") == 1


# The command line.


@pytest.mark.parametrize("url", ["http://h:1", "http://h:1/v1/", "http://h:1/v1/chat/completions"])
def test_a_server_may_be_named_by_its_root_or_in_full(url: str) -> None:
    assert bench.chat_url(url) == "http://h:1/v1/chat/completions"


@pytest.mark.parametrize(
    "option", [["http://example.com"], ["http://[::1]:1", "--peer", "http://10.0.0.1"]]
)
def test_other_machines_need_a_flag(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.parse_args(option)
    assert "--allow-remote" in capsys.readouterr().err
    assert bench.parse_args([*option, "--allow-remote"]).url == option[0]


def test_a_target_is_not_its_own_peer(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.parse_args(["http://localhost:1", "--peer", "http://localhost:1/v1"])
    assert "same model of the same server" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0", "1,x", "", "-1", "1.5"])
def test_levels_are_whole_numbers(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.parse_args(["http://localhost", f"--concurrency={text}"])
    assert "whole number" in capsys.readouterr().err


def test_the_script_does_not_shadow_the_standard_library() -> None:
    """Run as a script, whose own directory would come first on the import path."""
    done = subprocess.run([sys.executable, FILE, "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
