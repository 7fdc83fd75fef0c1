"""How fast and how small the service starts, beside llama-server's own load and prefill."""

import asyncio
import http.client
import time
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from bench.own_service import service
from bench.plain_client import Client
from bench.scenarios import asking
from bench.servers import LLAMA_SERVER, OURS, Setup, llama_server, own_settings


def is_up(url: str) -> bool:
    """Asked often: a start is to be timed more exactly than by the tenth of a second."""
    at = urlsplit(url)
    ends_at = time.monotonic() + 1
    while time.monotonic() < ends_at:
        connection = http.client.HTTPConnection(at.hostname or "", at.port, timeout=1)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return True  # else it loads
        except OSError:
            pass  # it does not listen yet
        finally:
            connection.close()
        time.sleep(0.01)
    return False


def first_token_s(url: str, seed: str) -> float:
    reply = asyncio.run(Client(url).chat(asking(seed, 24), 4))
    return reply.first_token_s


def measure(setup: Setup, binary: Path | None, seed: str) -> dict[str, dict[str, float]]:
    """By server: ours is up before it loads a model, and loads it for its first request;
    llama-server is started when that request comes."""
    started_at = time.perf_counter()
    with service(own_settings(setup, preload=False), is_up) as (url, process):
        ready_s = time.perf_counter() - started_at
        memory_bytes = psutil.Process(process.pid).memory_info().rss
        found = {
            OURS: {
                "start_ready_s": ready_s,
                "start_memory_mb": memory_bytes / 1e6,
                "start_first_token_s": first_token_s(url, seed),
            }
        }
    if binary is not None and setup.model is not None:
        started_at = time.perf_counter()
        with llama_server(binary, setup, "--no-warmup", is_ready=is_up) as url:
            first_token_s(url, seed)
            found[LLAMA_SERVER] = {"start_first_token_s": time.perf_counter() - started_at}
    return found
