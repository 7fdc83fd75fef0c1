"""One stream while other programs compute beside it, and after they have ended."""

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.own_service import service
from bench.plain_client import Client
from bench.scenarios import asking
from bench.servers import LLAMA_SERVER, OURS, Setup, llama_server, own_settings

ONE_THREAD = "one thread"  # ours with N_THREADS=1, which nobody can slow down more than his share
N_BUSY = 2
MOST_TOKENS = 4000
SLICE_S = 0.5  # over which a speed is told
FULL = 0.9  # of the last speed is full speed again
BUSY = "import time\nend = time.monotonic() + {}\nwhile time.monotonic() < end: pass"


@dataclass(frozen=True, slots=True)
class Phases:
    """Seconds of one stream: by itself, beside the others, and after they have ended."""

    quiet: float = 4.0
    busy: float = 8.0
    after: float = 7.0


@contextmanager
def busy_processes(n: int, seconds: float) -> Iterator[None]:
    """So many that compute, each on one core. They end by themselves after `seconds`, if nobody
    ends them before."""
    command = [sys.executable, "-c", BUSY.format(seconds)]
    processes = [subprocess.Popen(command) for _ in range(n)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


async def watch(client: Client, seed: str, phases: Phases) -> dict[str, float]:
    """What one stream is like in each phase."""
    is_over, runs = asyncio.Event(), asyncio.Event()
    started_at = time.perf_counter()
    stream = asyncio.create_task(
        client.chat(asking(seed, 24), MOST_TOKENS, on_text=runs.set, until=is_over)
    )
    running = asyncio.create_task(runs.wait())
    await asyncio.wait({stream, running}, return_when=asyncio.FIRST_COMPLETED)
    if not running.done():  # it was refused
        running.cancel()
        await stream
    quiet_s = time.perf_counter() - started_at
    await asyncio.sleep(phases.quiet)
    with busy_processes(N_BUSY, phases.busy + 60):
        busy_s = time.perf_counter() - started_at
        await asyncio.sleep(phases.busy)
    after_s = time.perf_counter() - started_at
    await asyncio.sleep(phases.after)
    is_over.set()
    times_s = (await stream).text_at_s
    end_s = time.perf_counter() - started_at
    beside = [at_s for at_s in times_s if busy_s <= at_s < after_s]
    gaps_s = [b - a for a, b in zip([busy_s, *beside], [*beside, after_s], strict=True)]
    return {
        "busy_quiet_tokens_per_s": _speed(times_s, quiet_s, busy_s),
        "busy_tokens_per_s": _speed(times_s, busy_s, after_s),
        "busy_worst_gap_ms": 1e3 * max(gaps_s),
        "busy_recovery_s": recovery_s(times_s, after_s, end_s),
    }


def recovery_s(times_s: Sequence[float], start_s: float, end_s: float) -> float:
    """Until a stream whose texts came at `times_s` is as fast as at its end."""
    full = FULL * _speed(times_s, (start_s + end_s) / 2, end_s)
    for at_s in (at_s for at_s in times_s if at_s >= start_s):
        if _speed(times_s, at_s, at_s + SLICE_S) >= full:
            return at_s - start_s
    return end_s - start_s


def _speed(times_s: Sequence[float], start_s: float, end_s: float) -> float:
    return sum(start_s <= at_s < end_s for at_s in times_s) / (end_s - start_s)


def measure(
    setup: Setup, binary: Path | None, seed: str, is_backwards: bool, phases: Phases
) -> dict[str, dict[str, float]]:
    """By server. Without guesses, which would gain more than the threads where the answer repeats
    itself."""
    with ExitStack() as stack:
        urls = {}
        for server, n_threads in ((OURS, setup.n_threads), (ONE_THREAD, 1)):
            settings = own_settings(setup) | {
                "LIGHT_N_THREADS": str(n_threads), "LIGHT_SPECULATION": "false",
            }  # fmt: skip
            urls[server] = stack.enter_context(service(settings))[0]
        if binary is not None and setup.model is not None:
            urls[LLAMA_SERVER] = stack.enter_context(llama_server(binary, setup))
        found = {}
        for server in list(urls)[:: -1 if is_backwards else 1]:
            found[server] = asyncio.run(watch(Client(urls[server]), seed, phases))
    for server in found.keys() - {OURS}:
        del found[server]["busy_recovery_s"]  # it has a bound of its own
    pinned = found[ONE_THREAD]["busy_tokens_per_s"]
    found[OURS]["busy_of_one_thread"] = found[OURS]["busy_tokens_per_s"] / pinned
    return found
