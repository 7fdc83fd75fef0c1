"""What a machine does to a service: each test makes it happen, and the service answers after it."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

import hub_download
from bench.own_service import free_port
from engine.client import launch_process
from settings import ROOT, TierSettings
from tests.hub_imitation import HubImitation, Repo, hub_imitation
from tests.serving import Service, fake, script, serving, settings, wait_until

DAY_S = 86_400.0


def answers(url: str, text: str = "Hi") -> bool:
    body = {"model": "light", "messages": [{"role": "user", "content": text}]}
    try:
        return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=20).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="no other system has /dev/full")
def test_a_log_on_a_full_disk_costs_no_answer(tmp_path: Path) -> None:
    path = script(tmp_path, {"match": "fails", "fault": "step"})
    port = free_port()
    own = {"PORT": str(port), "LIGHT_BACKEND": "fake", "LIGHT_MODEL_PATH": path}
    with open("/dev/full", "w") as full:
        process = subprocess.Popen(
            [sys.executable, "server.py"], cwd=ROOT, env=os.environ | own, stdout=full, stderr=full
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: process.poll() is not None or answers(url), 60)
        assert not answers(url, "fails"), "which the worker and the server would log"
        assert answers(url)
        process.terminate()
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()


@contextmanager
def with_a_model_on_the_hub(folder: Path) -> Iterator[tuple[Service, HubImitation]]:
    """`heavy` is on the hub and no whole model, so a load of it fails; `light` is there."""
    with hub_imitation() as hub:
        hub.repos["me/Small-GGUF"] = Repo({"small-Q8_0.gguf": b"GGUF" + bytes(3 << 20)})
        server = {"hf_endpoint": hub.endpoint, "hf_hub_cache": str(folder / "cache")}
        tiers = {"light": fake(), "heavy": TierSettings(model_path="hf:me/Small-GGUF")}
        with serving(settings(server, **tiers)) as service:
            yield service, hub


def refusal(service: Service) -> str:
    reply = service.chat(model="heavy")
    assert reply.status_code == 500
    assert service.chat(model="light").status_code == 200, "the others go on"
    return str(reply.json()["error"]["message"])


def test_a_disk_that_is_full_ends_a_download_which_goes_on_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = hub_download.Part.write

    def write_on_a_full_disk(part: Any, chunk: bytes) -> None:
        if part.n_bytes > 1 << 20:
            raise OSError(28, "No space left on device")
        write(part, chunk)

    with with_a_model_on_the_hub(tmp_path) as (service, hub):
        monkeypatch.setattr(hub_download.Part, "write", write_on_a_full_disk)
        assert "The disk is full" in refusal(service)
        monkeypatch.setattr(hub_download.Part, "write", write)
        assert "small-Q8_0.gguf" in refusal(service), "it is here, and no model"
        first, second = hub.contents()
        assert first.range is None
        assert second.range is not None
        assert int(second.range[6:-1]) > 1 << 20


def test_a_cache_that_cannot_be_written_is_named_and_used_once_it_can(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    if os.geteuid() == 0:  # whom no permission stops
        cache.write_text("a file in its place")
    else:
        cache.mkdir(mode=0o500)
    with with_a_model_on_the_hub(tmp_path) as (service, hub):
        assert "set HF_HOME or HF_HUB_CACHE to a folder that can be written" in refusal(service)
        assert not hub.contents()
        cache.unlink() if cache.is_file() else cache.chmod(0o700)
        assert "small-Q8_0.gguf" in refusal(service), "it is here, and no model"


@pytest.mark.parametrize("jump_s", [DAY_S, -DAY_S])
def test_a_clock_that_jumps_changes_no_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump_s: float
) -> None:
    clock, jumped_s = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: clock() + sum(jumped_s))
    path = script(tmp_path, {"match": "long", "answer": "x" * 300}, step_ms=2)
    limits = {"queue_timeout_s": 60, "request_timeout_s": 60, "watchdog_s": 60}
    with serving(settings(limits, light=fake(path, n_parallel=1))) as service:
        tier = service.manager.tiers["light"]
        with ThreadPoolExecutor(2) as pool:
            replies = [pool.submit(service.complete, "long") for _ in range(2)]
            wait_until(lambda: tier.n_running and tier.n_waiting)
            jumped_s.append(jump_s)
            waited_ms = [float(r.result().headers["X-Queue-Time-Ms"]) for r in replies]
        assert 0 < max(waited_ms) < 60_000
        assert tier.state == "ready", "IDLE_TTL_S is not over"
        assert service.chat(keep_alive=0.2).status_code == 200
        jumped_s.append(jump_s)
        wait_until(lambda: tier.state == "stopped")
        assert service.chat().status_code == 200


def test_a_worker_that_is_killed_for_memory_is_told_so_and_the_next_request_works(
    tmp_path: Path,
) -> None:
    path = script(tmp_path, {"match": "large", "fault": "crash"})  # SIGKILL, as the kernel sends
    with serving(settings(light=fake(path)), launch=launch_process) as service:
        reply = service.chat("large")
        assert reply.status_code == 500
        error = reply.json()["error"]
        assert error["code"] == "worker_crashed"
        assert reply.headers["x-should-retry"] == "false", "it has been tried twice"
        assert "SIGKILL, probably because memory ran out: see MEMORY_LIMIT" in error["message"]
        assert "memory" in service.http.get("/v1/models/light").json()["reason"]
        assert service.chat().status_code == 200


def test_a_model_whose_load_is_killed_for_memory_is_told_so(tmp_path: Path) -> None:
    path = script(tmp_path, fault="load_crash")
    with serving(settings(light=fake(path), heavy=fake()), launch=launch_process) as service:
        error = service.chat().json()["error"]
        assert error["code"] == "model_load_failed"
        assert "while it loaded the model: killed by SIGKILL, probably" in error["message"]
        assert service.chat(model="heavy").status_code == 200
