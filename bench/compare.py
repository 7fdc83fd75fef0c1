"""The service beside llama-server and llama-cpp-python's own server, on one model file.

    python -m bench.compare
    python -m bench.compare --only streams,cold --rounds 5 --write
    python -m bench.compare --quick

All servers run at once and take turns in each round, forwards and backwards, with texts that no
round had before and that all get alike. What counts is the median of the rounds, and of the ratios
within a round. Prints JSON; `--write` also puts it into docs/performance.json, in place of what was
measured of the same scenarios before, and makes the tables and pictures of docs/performance.md.

llama-server is built by bench/peers/build_llama_server.sh; without it, or without
`pip install sse-starlette starlette-context`, the others are measured. They run as they come.
"""

import argparse
import asyncio
import itertools
import json
import platform
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import psutil

from bench import api_cost, busy, engine, growth, performance_page, start
from bench.plain_client import REST_S, Client, NoMeasurement
from bench.scenarios import FIGURES, LEVELS, QUICK, SCENARIOS, Sizes, asking
from bench.servers import OURS, Setup, default_binary, serving, versions
from settings import DEFAULT_CHAT_MODEL, ROOT
from worker_spec import default_n_threads

VECTORS = {"avx512f": "AVX-512", "avx2": "AVX2"}  # which kernels there are is up to them
Round = dict[str, dict[str, float]]  # by server, then by metric


def over_http(
    names: Sequence[str], setup: Setup, binary: Path | None, sizes: Sizes, seeds: Sequence[str]
) -> Iterator[tuple[str, list[Round]]]:
    """Each scenario's rounds, with all servers there are."""
    with serving(setup, binary) as urls:
        clients = {server: Client(url) for server, url in urls.items()}

        async def measure(name: str) -> list[Round]:
            rounds = []
            for client in clients.values():
                await client.chat(asking("warm-up", 8), 4)
            for number, seed in enumerate(seeds):
                found: Round = {server: {} for server in clients}
                for run in SCENARIOS[name].runs:
                    for server in list(clients)[:: -1 if number % 2 else 1]:
                        await asyncio.sleep(REST_S)
                        found[server] |= await run(clients[server], f"{seed}/{name}", sizes)
                print(f"{number + 1} {name} {found}", file=sys.stderr)
                rounds.append(found)
            return rounds

        for name in names:
            yield name, asyncio.run(measure(name))


def engine_round(setup: Setup) -> Round:
    """Of the time of a step, how much is llama_decode."""
    found = {}
    kinds = (("engine_share", engine.GREEDY), ("engine_drawn_share", engine.DRAWN))
    for n, (name, sampling) in itertools.product(LEVELS, kinds):
        bench = engine.Bench(str(setup.model), setup.n_threads)
        _, found[f"{name}_{n}"] = bench.decode_tokens(n, 48, sampling=sampling)
        bench.engine.close()
    return {OURS: found}


def alone(
    name: str, setup: Setup, binary: Path | None, sizes: Sizes, seeds: Sequence[str]
) -> list[Round]:
    """The rounds of what starts its servers itself."""
    n_streams, seconds, n_requests = (4, 0.5, 20) if sizes is QUICK else (64, 5.0, 300)
    steps = growth.QUICK if sizes is QUICK else growth.Steps()
    phases = busy.Phases(0.2, 0.2, 0.5) if sizes is QUICK else busy.Phases()
    rounds: list[Round] = []
    turns: dict[str, Callable[[str], Round]] = {
        "engine": lambda _: engine_round(setup),
        "api": lambda _: {OURS: api_cost.measure(n_streams, seconds, n_requests)},
        "start": lambda seed: start.measure(setup, binary, seed),
        "growth": lambda seed: {OURS: growth.measure(setup, seed, steps)},
        "busy": lambda seed: busy.measure(setup, binary, seed, len(rounds) % 2 == 1, phases),
    }
    for number, seed in enumerate(seeds):
        rounds.append(turns[name](seed))
        print(f"{number + 1} {name} {rounds[-1]}", file=sys.stderr)
    return rounds


def machine() -> dict[str, Any]:
    return {
        "cpu": _cpu("model name") or platform.processor() or platform.machine(),
        "vectors": next((name for flag, name in VECTORS.items() if flag in _cpu("flags")), ""),
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpu(field: str) -> str:
    """What Linux says of the first core."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # another system
        return ""
    fields = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in fields if name.strip() == field), "")


def measured(
    names: Sequence[str],
    setup: Setup,
    binary: Path | None,
    sizes: Sizes,
    seeds: Sequence[str],
) -> Iterator[tuple[str, list[Round]]]:
    if asked := [name for name in names if name in SCENARIOS]:
        yield from over_http(asked, setup, binary, sizes, seeds)
    for name in names:
        if name in FIGURES and (name != "engine" or setup.model is not None):
            yield name, alone(name, setup, binary, sizes, seeds)


def main(argv: Sequence[str] | None = None) -> int:
    known = [*SCENARIOS, *FIGURES]
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("model", nargs="?", type=Path, default=ROOT / DEFAULT_CHAT_MODEL)
    add("--only", default=",".join(known), metavar="NAME,NAME", help=f"of {', '.join(known)}")
    add("--rounds", type=int, default=3, metavar="N")
    add("--threads", type=int, default=default_n_threads(), metavar="N")
    add("--llama-server", type=Path, default=default_binary(), metavar="FILE", help="the binary")
    add("--quick", action="store_true", help="one round of little, on the backend fake, no peers")
    add("--write", action="store_true", help="docs/performance.json, .md and their pictures")
    args = parser.parse_args(argv)
    names = args.only.split(",")
    if unknown := set(names) - set(known):
        parser.error(f"--only knows no {', '.join(sorted(unknown))}: {', '.join(known)}")
    setup = Setup(None if args.quick else args.model, args.threads)
    run = random.SystemRandom().randrange(1_000_000)  # so that a second run is no rerun
    seeds = [f"{run}/{number}" for number in range(1 if args.quick else args.rounds)]
    about = {
        "date": date.today().isoformat(), "machine": machine(), "versions": versions(),
        "model": args.model.name, "threads": setup.n_threads, "slots": setup.n_slots,
        "cells": setup.n_cells,
    }  # fmt: skip
    report = {}
    sizes = QUICK if args.quick else Sizes()
    try:
        for name, rounds in measured(names, setup, args.llama_server, sizes, seeds):
            report[name] = {"about": about, "rounds": rounds}
            if args.write:  # each at once: the others may take long
                performance_page.write(ROOT / "docs", {name: report[name]})
    except NoMeasurement as fault:
        print(f"no measurement: {fault}", file=sys.stderr)
        return 1
    print(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
