"""The servers that are compared, on the same model file with the same threads, slots and cells."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import httpx

from bench.own_service import ROOT, IsReady, free_port, is_healthy, running, service

OURS = "quintet"
LLAMA_SERVER = "llama-server"
LLAMA_CPP_PYTHON = "llama-cpp-python"


@dataclass(frozen=True, slots=True)
class Setup:
    """What all of them get."""

    model: Path | None  # None: our backend without weights, alone
    n_threads: int
    n_slots: int = 16
    n_cells: int = 16384


def llama_server_binary(folder: Path) -> Path | None:
    """What bench/peers/build_llama_server.sh has built of the installed release."""
    path = folder / f"llama-{version('llama-cpp-python')}" / "bin" / "llama-server"
    return path if path.exists() else None


@contextmanager
def serving(setup: Setup, binary: Path | None) -> Iterator[dict[str, str]]:
    """The URLs of all that there are, by name, ready and with the model loaded."""
    with ExitStack() as stack:
        urls = {OURS: stack.enter_context(service(own_settings(setup)))[0]}
        if setup.model is not None:
            if binary is None:
                print(f"without {LLAMA_SERVER}: bench/peers/build_llama_server.sh makes it",
                      file=sys.stderr)  # fmt: skip
            else:
                urls[LLAMA_SERVER] = stack.enter_context(llama_server(binary, setup))
            if importlib.util.find_spec("sse_starlette") is None:
                what = "pip install sse-starlette starlette-context"
                print(f"without {LLAMA_CPP_PYTHON}'s own server: {what}", file=sys.stderr)
            else:
                urls[LLAMA_CPP_PYTHON] = stack.enter_context(_llama_cpp_python(setup))
        yield urls


def own_settings(setup: Setup, *, preload: bool = True) -> dict[str, str]:
    settings = {
        "LIGHT_PRELOAD": str(preload).lower(), "LIGHT_N_PARALLEL": str(setup.n_slots),
        "LIGHT_KV_TOKENS": str(setup.n_cells), "LIGHT_N_CTX": str(setup.n_cells),
        "LIGHT_N_THREADS": str(setup.n_threads), "RECEIVE_TIMEOUT_S": "600",
    }  # fmt: skip
    if setup.model is None:
        return settings | {"LIGHT_BACKEND": "fake"}
    return settings | {"LIGHT_MODEL_PATH": str(setup.model.resolve())}


@contextmanager
def llama_server(
    binary: Path, setup: Setup, *more: str, is_ready: IsReady = is_healthy
) -> Iterator[str]:
    """Its URL. The cells are unified, as ours and as its own default is: else a slot would have a
    sixteenth of them, and no long prompt room."""
    port = free_port()
    command = [
        str(binary.resolve()), "-m", str(setup.model), "--port", str(port), "--kv-unified",
        "-c", str(setup.n_cells), "-np", str(setup.n_slots), "-t", str(setup.n_threads),
        "-tb", str(setup.n_threads), *more,
    ]  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    with running(command, url, is_ready):
        yield url


@contextmanager
def _llama_cpp_python(setup: Setup) -> Iterator[str]:
    """Its URL. It has one slot, and answers one request at a time."""
    port = free_port()
    command = [
        sys.executable, "-m", "llama_cpp.server", "--model", str(setup.model), "--port", str(port),
        "--n_ctx", str(setup.n_cells // 4), "--n_threads", str(setup.n_threads),
        "--n_threads_batch", str(setup.n_threads), "--cache", "true",
        # without it a request that comes ends the one that runs
        "--interrupt_requests", "false",
    ]  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    with running(command, url, _lists_models):
        yield url


def _lists_models(url: str) -> bool:
    return httpx.get(f"{url}/v1/models").status_code == 200


def versions() -> dict[str, str]:
    """Of what computes and what serves."""
    names = ("llama-cpp-python", "fastapi", "uvicorn", "uvloop", "httptools")
    return {"python": sys.version.split()[0]} | {name: version(name) for name in names}


def default_binary() -> Path | None:
    return llama_server_binary(ROOT / ".peers")
