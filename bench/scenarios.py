"""What the servers are asked, and what is measured of each."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import numpy as np

from bench.http import WORDS
from bench.plain_client import Client, Message, Reply

Found = dict[str, float]  # by the metric's name
LEVELS = (1, 4, 8, 16)  # of streams at once, and of sequences
UNEVEN = (3, 7, 15)  # of which kernels take some rows one by one
Run = Callable[[Client, str, "Sizes"], Awaitable[Found]]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Words are about as many tokens."""

    n_answer: int = 40
    n_long_answer: int = 200
    n_cold_words: int = 600
    n_prefix_words: int = 450
    n_users: int = 6
    n_turns: int = 4
    n_intruder_words: int = 2900
    n_watched: int = 4
    n_passage_words: int = 850
    n_passage_answer: int = 60


# for a test: everything once, on whatever model, in no time
QUICK = Sizes(n_answer=8, n_long_answer=8, n_cold_words=20, n_prefix_words=20, n_users=2, n_turns=2,
              n_intruder_words=40, n_watched=2, n_passage_words=20, n_passage_answer=8)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Metric:
    """`goal`: what ours may be of llama-server's at most, or must be at least where more is
    better; without a peer it is a figure of its own."""

    about: str
    goal: float | None = None
    more_is_better: bool = False
    digits: int = 0


@dataclass(frozen=True, slots=True)
class Scenario:
    """Of each server. The servers take turns after each of `runs`: the shorter a turn is, the more
    alike is what else the machine does meanwhile."""

    runs: tuple[Run, ...]
    metrics: dict[str, Metric]


def words(seed: str, n: int) -> str:
    """So many, which no other seed has in this order."""
    return " ".join(random.Random(seed).choices(WORDS, k=n))


def asking(seed: str, n: int, system: str = "") -> list[Message]:
    messages = [{"role": "system", "content": system}] if system else []
    return [*messages, {"role": "user", "content": f"{words(seed, n)}. Tell a story of it."}]


def streams(name: str, n: int, *, is_long: bool = False) -> Run:
    """So many short prompts at once, and short or long answers."""

    async def run(client: Client, seed: str, sizes: Sizes) -> Found:
        n_answer = sizes.n_long_answer if is_long else sizes.n_answer
        return {f"{name}_{n}": await _tokens_per_s(client, f"{seed}/{n}", n, n_answer)}

    return run


async def _tokens_per_s(client: Client, seed: str, n: int, n_answer: int) -> float:
    """From the first request to the last token."""
    replies, wall_s = await _at_once(client, seed, n, 24, n_answer)
    return sum(reply.n_tokens for reply in replies) / wall_s


async def _at_once(
    client: Client, seed: str, n: int, n_words: int, n_answer: int, system: str = ""
) -> tuple[list[Reply], float]:
    """So many requests, and the seconds until the last is answered."""
    started_at = time.perf_counter()
    replies = await asyncio.gather(
        *(client.chat(asking(f"{seed}/{i}", n_words, system), n_answer) for i in range(n))
    )
    return replies, time.perf_counter() - started_at


def _gap_p99_ms(replies: Sequence[Reply], since_s: float = 0.0) -> float:
    gaps_s = [gap_s for reply in replies for gap_s in reply.gaps_s(since_s)]
    return 1e3 * float(np.percentile(gaps_s or [0.0], 99))


async def cold(client: Client, seed: str, sizes: Sizes) -> Found:
    """A prompt of which nothing is known, alone."""
    reply = await client.chat(asking(seed, sizes.n_cold_words), 4)
    return {"cold_first_token_ms": 1e3 * reply.first_token_s}


async def prefix(client: Client, seed: str, sizes: Sizes) -> Found:
    """Eight at once with a common beginning that has been seen once."""
    system = words(f"{seed}/system", sizes.n_prefix_words)
    await client.chat(asking(f"{seed}/before", 12, system), 4)
    replies, wall_s = await _at_once(client, seed, 8, 12, 16, system)
    first_s = [reply.first_token_s for reply in replies]
    return {"prefix_wall_s": wall_s, "prefix_first_token_ms": 1e3 * float(np.median(first_s))}


async def passages(client: Client, seed: str, sizes: Sizes) -> Found:
    """Eight at once that each ask about passages of their own, as after a search."""
    replies, wall_s = await _at_once(client, seed, 8, sizes.n_passage_words, sizes.n_passage_answer)
    return {
        "passages_wall_s": wall_s,
        "passages_first_token_s": float(np.median([reply.first_token_s for reply in replies])),
        "passages_gap_p99_ms": _gap_p99_ms(replies),
    }


async def conversations(client: Client, seed: str, sizes: Sizes) -> Found:
    """Users who take turns, each with a conversation that grows. Counted from the second turn on,
    when there is something to reuse."""
    users: list[list[Message]] = [[] for _ in range(sizes.n_users)]
    later: list[Reply] = []
    for turn in range(sizes.n_turns):
        for number, messages in enumerate(users):
            messages += asking(f"{seed}/{number}/{turn}", 24)
            reply = await client.chat(messages, 16)
            messages.append({"role": "assistant", "content": reply.text})
            if turn:
                later.append(reply)
    first_s = [reply.first_token_s for reply in later]
    found = {"turns_first_token_ms": 1e3 * float(np.median(first_s))}
    if n_prompt := sum(reply.n_prompt for reply in later):  # not every server counts
        n_cached = sum(reply.n_cached for reply in later)
        found["turns_reused_percent"] = 100 * n_cached / n_prompt
    return found


async def gap(client: Client, seed: str, sizes: Sizes) -> Found:
    """Streams that run while a long prompt arrives: gaps between their tokens until it has its
    first."""
    is_over = asyncio.Event()
    n_texts = 0
    all_run = asyncio.Event()

    def heard() -> None:
        nonlocal n_texts
        n_texts += 1
        if n_texts >= 4 * sizes.n_watched:
            all_run.set()

    started_at = time.perf_counter()
    watched = [
        asyncio.create_task(client.chat(asking(f"{seed}/{i}", 12), 2000, heard, is_over))
        for i in range(sizes.n_watched)
    ]
    await all_run.wait()
    since_s = time.perf_counter() - started_at
    # the first token alone may be half a letter
    intruder = await client.chat(asking(f"{seed}/long", sizes.n_intruder_words), 4)
    is_over.set()
    replies = await asyncio.gather(*watched)
    return {
        "gap_p99_ms": _gap_p99_ms(replies, since_s),
        "gap_intruder_first_token_ms": 1e3 * intruder.first_token_s,
    }


_GOALS = {1: 0.97, 4: 1.05}  # of more streams it is 1.1
SCENARIOS = {
    "streams": Scenario(
        tuple(streams("streams", n) for n in LEVELS),
        {
            f"streams_{n}": Metric(
                f"{n} stream{'s' if n > 1 else ''}, tokens/s", _GOALS.get(n, 1.1), True, 1
            )
            for n in LEVELS
        },
    ),
    "answers": Scenario(
        (streams("answers", 16, is_long=True),),
        {"answers_16": Metric("16 streams of 200 tokens each, tokens/s", 1.1, True, 1)},
    ),
    "uneven": Scenario(
        tuple(streams("uneven", n, is_long=True) for n in UNEVEN),
        {
            f"uneven_{n}": Metric(f"{n} streams of 200 tokens each, tokens/s", None, True, 1)
            for n in UNEVEN
        },
    ),
    "cold": Scenario(
        (cold,), {"cold_first_token_ms": Metric("600-token prompt, first token, ms", 1.05)}
    ),
    "prefix": Scenario(
        (prefix,),
        {
            "prefix_wall_s": Metric("8 requests with one prefix, wall, s", 0.15, digits=2),
            "prefix_first_token_ms": Metric("8 requests with one prefix, first token, ms", 0.15),
        },
    ),
    "passages": Scenario(
        (passages,),
        {
            "passages_wall_s": Metric("8 requests with 900 tokens of their own, wall, s", digits=1),
            "passages_first_token_s": Metric(
                "8 requests with 900 tokens of their own, first token, s", digits=1
            ),
            "passages_gap_p99_ms": Metric("gap between tokens meanwhile, p99, ms"),
        },
    ),
    "conversations": Scenario(
        (conversations,),
        {
            "turns_first_token_ms": Metric("4-turn conversations of 6 users, first token, ms", 1.0),
            "turns_reused_percent": Metric(
                "4-turn conversations of 6 users, prompt tokens reused, %", 1.0, True, 1
            ),
        },
    ),
    "gap": Scenario(
        (gap,),
        {
            "gap_p99_ms": Metric(
                "gap between tokens while a 3,000-token prompt arrives, p99, ms", 0.3
            ),
            "gap_intruder_first_token_ms": Metric("that prompt's first token, ms"),
        },
    ),
}  # fmt: skip


# what only the service is asked, or what it is not asked over HTTP
FIGURES: dict[str, dict[str, Metric]] = {
    "engine": {
        f"engine_share_{n}": Metric(
            f"share of a step inside llama_decode, {n} sequence{'s' if n > 1 else ''}",
            0.985,
            True,
            3,
        )
        for n in LEVELS
    }
    | {
        f"engine_drawn_share_{n}": Metric(
            f"the same where tokens are drawn, {n} sequence{'s' if n > 1 else ''}",
            more_is_better=True,
            digits=3,
        )
        for n in LEVELS
    },
    "api": {
        "core_share_at_1000": Metric(
            "share of a core that the server takes at 1,000 tokens/s of 64 streams", 0.3, digits=3
        ),
        "us_per_token": Metric("its CPU for a token of these, µs"),
        "most_tokens_per_s": Metric("most tokens/s through 64 streams", more_is_better=True),
        "us_per_token_at_most": Metric("its CPU for a token at that rate, µs"),
        "us_per_request": Metric("its CPU for a request of one token on a new connection, µs"),
    },
    "start": {
        "start_ready_s": Metric("server ready, s", 1.5, digits=2),
        "start_memory_mb": Metric("memory of the server alone, MB", 100),
        "start_first_token_s": Metric("cold request to first token, s", 1.3, digits=2),
    },
    "busy": {
        "busy_quiet_tokens_per_s": Metric("1 stream, tokens/s", 0.97, True, 1),
        "busy_tokens_per_s": Metric("with two busy processes beside, tokens/s", 4, True, 1),
        "busy_of_one_thread": Metric("this, of what one thread gives there", 0.9, True, 2),
        "busy_worst_gap_ms": Metric("with them, worst gap between tokens, ms", 0.1),
        "busy_recovery_s": Metric("after their end until full speed, s", 5, digits=1),
    },
    "growth": {},  # is pictures
}  # fmt: skip
