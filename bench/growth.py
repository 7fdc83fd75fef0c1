"""How what a request costs grows: with its prompt, with the streams at once, and with the prompts
that are remembered. Each has a service of its own."""

import asyncio
import struct
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import psutil

from bench.own_service import service
from bench.plain_client import Client, Reply
from bench.scenarios import asking
from bench.servers import Setup, own_settings
from engine.model_file import read_model_file

N_ANSWER = 32
N_PROBES = 3
N_AROUND = 96  # tokens of a template and an answer beside the prompt, at most

AXES = {
    "prompt": "tokens of the prompt, about",
    "streams": "streams at once",
    "remembered": "prompts remembered, of some 100 tokens",
}
KINDS = {
    "first_token_s": "seconds to the first token",
    "tokens_per_s": "tokens/s after it, together",
    "memory_mb": "memory of the worker, MB",
}


@dataclass(frozen=True, slots=True)
class Steps:
    prompt: tuple[int, ...] = (128, 512, 1024, 2048, 4096, 7500, 15500)
    streams: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    remembered: tuple[int, ...] = (0, 25, 50, 100, 200)


QUICK = Steps((16, 32), (1, 2), (0, 2))

Costs = AsyncIterator[tuple[int, list[Reply]]]  # the replies at each step
Axis = Callable[[Client, str, Sequence[int]], Costs]


async def by_prompt(client: Client, seed: str, steps: Sequence[int]) -> Costs:
    for n in steps:
        yield n, [await client.chat(asking(f"{seed}/{n}", n), N_ANSWER)]


async def by_streams(client: Client, seed: str, steps: Sequence[int]) -> Costs:
    for n in steps:
        prompts = [asking(f"{seed}/{n}/{i}", 24) for i in range(n)]
        yield n, await asyncio.gather(*(client.chat(prompt, N_ANSWER) for prompt in prompts))


async def by_remembered(client: Client, seed: str, steps: Sequence[int]) -> Costs:
    n_remembered = 0
    for n in steps:
        for number in range(n_remembered, n):
            await client.chat(asking(f"{seed}/{number}", 80), 1)
        n_remembered = n
        probes = [
            await client.chat(asking(f"{seed}/{n}/{i}", 80), N_ANSWER) for i in range(N_PROBES)
        ]
        yield n, [sorted(probes, key=lambda reply: reply.first_token_s)[N_PROBES // 2]]


def measure(setup: Setup, seed: str, steps: Steps) -> dict[str, float]:
    """`growth_AXIS_KIND_STEP` for all of AXES and KINDS."""
    many = replace(setup, n_slots=max(steps.streams))
    forgets = {"LIGHT_PREFIX_CACHE_MB": "0"}
    with tempfile.TemporaryDirectory() as folder:
        model = setup.model and for_longer_prompts(setup.model, setup.n_cells, Path(folder))
        long = own_settings(replace(setup, model=model)) | forgets
        fitting = [n for n in steps.prompt if n + N_AROUND <= setup.n_cells]
        found = _along("prompt", by_prompt, long, seed, fitting)
    return {
        **found,
        **_along("streams", by_streams, own_settings(many) | forgets, seed, steps.streams),
        **_along("remembered", by_remembered, own_settings(setup), seed, steps.remembered),
    }


def for_longer_prompts(model: Path, n_ctx: int, folder: Path) -> Path:
    """A copy that says it was trained on so many tokens, so that it is given so many. What it
    answers beyond its own number is noise, at the same cost."""
    data = bytearray(model.read_bytes())
    key = f"{read_model_file(model).architecture}.context_length".encode()
    struct.pack_into("<I", data, data.index(key) + len(key) + 4, n_ctx)  # behind its type
    copy = folder / model.name
    copy.write_bytes(data)
    return copy


def _along(
    axis: str, run: Axis, settings: dict[str, str], seed: str, steps: Sequence[int]
) -> dict[str, float]:
    found: dict[str, float] = {}

    async def ask(client: Client, server: psutil.Process) -> None:
        await client.chat(asking("warm-up", 8), 4)
        (worker,) = server.children()
        async for n, replies in run(client, f"{seed}/{axis}", steps):
            costs = {
                "first_token_s": median(reply.first_token_s for reply in replies),
                "tokens_per_s": sum(_speed(reply) for reply in replies),
                "memory_mb": worker.memory_info().rss / 1e6,
            }
            found.update({f"growth_{axis}_{kind}_{n}": costs[kind] for kind in KINDS})

    with service(settings) as (url, process):
        asyncio.run(ask(Client(url), psutil.Process(process.pid)))
    return found


def _speed(reply: Reply) -> float:
    """Tokens/s between its first text and its last."""
    seconds = reply.text_at_s[-1] - reply.first_token_s
    return (reply.n_tokens - 1) / seconds if seconds > 0 else 0.0
