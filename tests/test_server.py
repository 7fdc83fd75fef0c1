"""The commands that people type, as processes: start, banner, refusal, end."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil
import pytest

from tests.serving import cut_off, script, wait_until

ROOT = Path(__file__).parent.parent
SLOW = {"match": "slow", "answer": "0123456789" * 1000}


@contextmanager
def command(*arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    environment = {"LIGHT_BACKEND": "fake", "PORT": "0", **environment}
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout
        process.stdout.close()


def url_in(process: subprocess.Popen[str], pattern: str = r"serves (http://\S+)/v1") -> str:
    assert process.stdout
    for line in process.stdout:
        if found := re.search(pattern, line):
            return found[1]
    raise AssertionError("the server did not say where it serves")


def stream(client: httpx.Client, text: str, model: str = "light") -> httpx.Response:
    body = {"model": model, "stream": True, "messages": [{"role": "user", "content": text}]}
    return client.send(client.build_request("POST", "/v1/chat/completions", json=body), stream=True)


def workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(process.pid).children():
        with suppress(psutil.NoSuchProcess):  # it has ended since it was listed
            found += [child] * ("worker" in child.cmdline())
    return found


def has_ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE  # until init has looked at it
    except psutil.NoSuchProcess:
        return True


def test_the_banner_says_what_is_served_and_what_to_try() -> None:
    with command("server.py", HEAVY_BACKEND="fake", HEAVY_PRELOAD="true") as process:
        assert process.stdout
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "-d '" in line:
                break
        text = "".join(lines)
        url = re.search(r"serves (http://127\.0\.0\.1:\d+)/v1", text)
        assert url
        assert re.search(r"light +fake +fake, 8,192 tokens of context · loads at its first", text)
        assert re.search(r"heavy +fake +fake, 8,192 tokens of context · loads now", text)
        body = json.loads(lines[-1].strip().removeprefix("-d '").removesuffix("'"))
        reply = httpx.post(f"{url[1]}/v1/chat/completions", json=body, timeout=30)
        assert reply.status_code == 200


def test_the_server_alone_is_small() -> None:
    with command("server.py") as process:
        url_in(process)
        assert psutil.Process(process.pid).memory_info().rss < 90e6


@pytest.mark.parametrize("more", [[], ["--http", "api.connections:Connection"]])
def test_uvicorn_serves_the_same_application(more: list[str]) -> None:
    with command("-m", "uvicorn", "server:app", "--port", "0", *more) as process:
        url = url_in(process, r"running on (http://\S+)")
        assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "light"


@pytest.mark.parametrize("arguments", [[], ["--check-config"]])
def test_it_does_not_serve_other_machines_without_keys(arguments: list[str]) -> None:
    with command("server.py", *arguments, HOST="0.0.0.0") as process:
        output, _ = process.communicate(timeout=20)
    assert process.returncode == 2
    assert "API_KEYS" in output
    assert "Traceback" not in output


def test_settings_that_cannot_be_used_are_named() -> None:
    with command("server.py", LIGHT_N_CTX="many", PORT="99999") as process:
        output, _ = process.communicate(timeout=20)
    assert process.returncode == 2
    assert "PORT: " in output
    assert "LIGHT_N_CTX: " in output
    assert "Traceback" not in output


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_it_leaves_no_process_behind(tmp_path: Path, ending: signal.Signals) -> None:
    path = script(tmp_path, SLOW, step_ms=2)
    with (
        command("server.py", LIGHT_MODEL_PATH=path, SHUTDOWN_GRACE_S="0") as process,
        httpx.Client(base_url=url_in(process), timeout=30) as client,
    ):
        response = stream(client, "slow")
        next(response.iter_raw())
        (worker,) = workers(process)
        process.send_signal(ending)
        output, _ = process.communicate(timeout=20)
        response.close()
        wait_until(lambda: has_ended(worker))
        assert process.returncode == (-ending if ending == signal.SIGKILL else 0)
        assert "Traceback" not in output


def test_a_worker_that_loads_does_not_outlive_a_killed_server(tmp_path: Path) -> None:
    path = script(tmp_path, load_s=60)
    with command("server.py", LIGHT_MODEL_PATH=path, LIGHT_PRELOAD="true") as process:
        url_in(process)
        wait_until(lambda: workers(process))
        (worker,) = workers(process)
        process.kill()
        wait_until(lambda: has_ended(worker))


def test_a_stream_that_the_end_of_the_service_cuts_is_told_so(tmp_path: Path) -> None:
    path = script(tmp_path, SLOW, step_ms=2)
    with (
        command("server.py", LIGHT_MODEL_PATH=path, SHUTDOWN_GRACE_S="0.2") as process,
        httpx.Client(base_url=url_in(process), timeout=30) as client,
    ):
        response = stream(client, "slow")
        chunks = response.iter_text()
        next(chunks)
        process.terminate()
        assert cut_off(chunks)[-1]["error"]["code"] == "model_unavailable"


def test_a_stream_may_end_during_the_grace(tmp_path: Path) -> None:
    path = script(tmp_path, {"match": "short", "answer": "0123456789" * 10}, step_ms=2)
    with (
        command("server.py", LIGHT_MODEL_PATH=path) as process,
        httpx.Client(base_url=url_in(process), timeout=30) as client,
    ):
        response = stream(client, "short")
        chunks = response.iter_text()
        text = next(chunks)
        process.terminate()
        text += "".join(chunks)
        assert '"finish_reason":"stop"' in text
        assert process.wait(timeout=20) == 0


def test_killing_a_worker_ends_its_stream_and_nothing_else(tmp_path: Path) -> None:
    path = script(tmp_path, SLOW, step_ms=2)
    tiers = {"LIGHT_MODEL_PATH": path, "LIGHT_N_PARALLEL": "1",
             "HEAVY_MODEL_PATH": path, "HEAVY_BACKEND": "fake"}  # fmt: skip
    with command("server.py", **tiers) as process:
        url = url_in(process)
        with (
            httpx.Client(base_url=url, timeout=30) as one,
            httpx.Client(base_url=url, timeout=30) as two,
            httpx.Client(base_url=url, timeout=30) as three,
        ):
            doomed = stream(one, "slow")
            chunks = doomed.iter_text()
            next(chunks)
            (worker,) = workers(process)
            other = stream(two, "hello " * 20, model="heavy")
            worker.kill()
            body = {"model": "light", "messages": [{"role": "user", "content": "next"}]}
            queued = three.post("/v1/chat/completions", json=body)
            assert cut_off(chunks)[-1]["error"]["code"] == "worker_crashed"
            assert queued.json()["choices"][0]["message"]["content"] == "You said: next"
            assert other.read().count(b"hello") == 0  # it comes in single characters
            assert b'"finish_reason":"stop"' in other.content


def test_the_smoke_test_passes_on_its_own_server() -> None:
    with command("test_api.py", "--fake", EMBEDDING_EMBEDDING_DIMENSION="1024") as process:
        assert process.stdout
        report = process.stdout.read()
        assert process.wait() == 0, report
    assert "POST /v1/embeddings all kinds" in report
    assert "POST /v1/score" in report
