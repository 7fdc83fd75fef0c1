"""A server of a benchmark's own on a free port, which ends with the benchmark."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parent.parent
PATIENCE_S = 120.0  # until it is ready
END_S = 30.0  # for its end: llama-server hangs there at times

IsReady = Callable[[str], bool]  # of a URL; an httpx.HTTPError is a no
Process = subprocess.Popen[bytes]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def is_healthy(url: str) -> bool:
    return httpx.get(f"{url}/health", trust_env=False).status_code == 200


@contextmanager
def running(
    command: Sequence[str],
    url: str,
    is_ready: IsReady,
    *,
    environment: Mapping[str, str] | None = None,
    is_quiet: bool = True,
) -> Iterator[Process]:
    """The process of a command that serves `url`, once it is ready. Raises SystemExit when it does
    not get so far."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | (environment or {}), stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL if is_quiet else None,
    )  # fmt: skip
    try:
        _wait(url, process, is_ready)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:  # so that what was measured is not lost
            print(f"{command[0]} does not end, and is killed", file=sys.stderr)
            process.kill()
            process.wait()


@contextmanager
def service(
    environment: Mapping[str, str], is_ready: IsReady = is_healthy, *, is_quiet: bool = False
) -> Iterator[tuple[str, Process]]:
    """The URL and the process of ours, with these settings."""
    port = free_port()
    own = {"HOST": "127.0.0.1", "PORT": str(port), "API_KEYS": "", "LOG_LEVEL": "ERROR"}
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "server.py"]
    settings = own | dict(environment)
    with running(command, url, is_ready, environment=settings, is_quiet=is_quiet) as process:
        yield url, process


def _wait(url: str, process: Process, is_ready: IsReady) -> None:
    ends_at = time.monotonic() + PATIENCE_S
    while process.poll() is None and time.monotonic() < ends_at:
        with suppress(httpx.HTTPError):
            if is_ready(url):
                return
        time.sleep(0.1)
    raise SystemExit("no measurement: the service did not start")
