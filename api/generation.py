"""From a request for text to what the tier says about it; both text endpoints build on this."""

import asyncio
import itertools
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.types import Receive

from api.deps import while_connected
from engine import wire
from generating import Generation
from tier import Tier

Outs = AsyncGenerator[tuple[int, wire.TokenOut], None]  # with the index of the choice


class Watch:
    """What a request waits for."""

    def __init__(self, tier: Tier) -> None:
        self._tier = tier
        self.generation: Generation | None = None  # once it is in the queue

    def __call__(self) -> str:
        return self._tier.waits_for(self.generation)


class Answer:
    """Requests, one for each prompt, and the choices that come of them: those of the first prompt,
    then those of the second. Close `outs` to cancel them."""

    def __init__(
        self,
        tier: Tier,
        requests: Sequence[wire.Generate],
        priority: int,
        watch: Watch | None = None,
    ) -> None:
        self._watch = watch
        self.n_choices = sum(request.n for request in requests)
        self.n_before = 0  # requests that were to be served before it when it came
        self.n_prompt = 0
        self.n_cached = 0  # of these tokens
        self.n_guessed = self.n_right = 0  # tokens of the answers; those that were right
        # by the monotonic clock; of several prompts the last time counts
        self.queued_at = self.handed_at = self.first_at = self.last_at = time.monotonic()
        self.outs: Outs = self._generate(tier, requests, priority)

    async def _generate(self, tier: Tier, requests: Sequence[wire.Generate], priority: int) -> Outs:
        with ExitStack() as stack:
            stack.enter_context(tier.lease())
            generations = [
                stack.enter_context(tier.submit(request, priority=priority)) for request in requests
            ]
            if self._watch is not None:
                self._watch.generation = generations[-1]
            self.n_before = max(generation.n_before for generation in generations)
            for generation in generations:
                started = await generation.started()
                self.n_prompt += started.prompt_tokens
                self.n_cached += started.cached_tokens
                self.handed_at = max(self.handed_at, generation.handed_at)
            yield -1, wire.TokenOut(0, "")  # the handshake that `start` waits for
            self.first_at = 0.0
            outs = _interleave(generations) if len(generations) > 1 else _indexed(*generations)
            async with aclosing(outs):
                async for index, out in outs:
                    self.last_at = time.monotonic()
                    self.first_at = self.first_at or self.last_at
                    if out.done:
                        self.n_guessed += out.done.n_guessed
                        self.n_right += out.done.n_right
                    yield index, out

    def headers(self) -> dict[str, str]:
        """How long it waited for its place."""
        return queue_headers(self)

    def whole_headers(self) -> dict[str, str]:
        """All times, once it is whole."""
        return self.headers() | {
            "X-Prompt-Time-Ms": f"{1e3 * (self.first_at - self.handed_at):.1f}",
            "X-Generation-Time-Ms": f"{1e3 * (self.last_at - self.first_at):.1f}",
        }

    def timings(self, n_completion: int) -> dict[str, float]:
        """What llama-server says of a whole answer. Of the first token only the prompt is timed."""
        n_prompt, n_predicted = self.n_prompt - self.n_cached, max(n_completion - 1, 0)
        return {
            "cache_n": self.n_cached,
            **_rates("prompt", n_prompt, self.first_at - self.handed_at),
            **_rates("predicted", n_predicted, self.last_at - self.first_at),
            "draft_n": self.n_guessed,
            "draft_n_accepted": self.n_right,
        }


class Waiter(Protocol):
    """A request that has been in a queue; times by the monotonic clock."""

    n_before: int  # requests that were to be served before it when it came
    queued_at: float
    handed_at: float


def queue_headers(of: Waiter) -> dict[str, str]:
    """How long it waited for its place."""
    return {
        "X-Queue-Position": str(of.n_before),
        "X-Queue-Time-Ms": f"{1e3 * (of.handed_at - of.queued_at):.1f}",
    }


def _rates(kind: str, n: int, seconds: float) -> dict[str, float]:
    return {
        f"{kind}_n": n,
        f"{kind}_ms": round(1e3 * seconds, 3),
        f"{kind}_per_token_ms": round(1e3 * seconds / max(n, 1), 3),
        f"{kind}_per_second": round(n / seconds, 3) if seconds > 0 else 0.0,
    }


def head(prefix: str, kind: str, tier: Tier, service_tier: str | None) -> dict[str, Any]:
    """What the reply and each of its chunks begin with."""
    more = {"service_tier": served_as(service_tier)} if service_tier else {}
    return {
        "id": new_id(f"{prefix}-"),
        "object": kind,
        "created": int(time.time()),
        "model": tier.name,
        "system_fingerprint": tier.fingerprint,
    } | more


def served_as(service_tier: str) -> str:
    return "default" if service_tier == "auto" else service_tier


def new_id(prefix: str) -> str:
    return prefix + uuid.uuid4().hex


async def start(
    receive: Receive,
    tier: Tier,
    requests: Sequence[wire.Generate],
    *,
    priority: int,
    watch: Watch | None = None,
) -> Answer:
    """Submit requests and wait until all have started: from here on nothing that is wrong with
    them can come up. Raises ClientLeft or ServiceError."""
    answer = Answer(tier, requests, priority, watch)
    await while_connected(receive, anext(answer.outs))
    return answer


async def _indexed(generation: Generation) -> Outs:
    async for out in generation:
        yield out.index, out


async def _interleave(generations: Sequence[Generation]) -> Outs:
    """What several generations say, in the order in which they say it."""
    queue: asyncio.Queue[tuple[int, wire.TokenOut] | BaseException] = asyncio.Queue()

    async def feed(first: int, generation: Generation) -> None:
        try:
            async for out in generation:
                queue.put_nowait((first + out.index, out))
        except Exception as error:
            queue.put_nowait(error)

    n_choices = [generation.request.n for generation in generations]
    firsts = [0, *itertools.accumulate(n_choices)]
    tasks = [
        asyncio.create_task(feed(first, generation))
        for first, generation in zip(firsts, generations, strict=False)
    ]
    try:
        n_open = sum(n_choices)
        while n_open:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            n_open -= item[1].done is not None
            yield item
    finally:
        for task in tasks:
            task.cancel()


@dataclass(frozen=True, slots=True)
class Choice:
    """A whole answer."""

    text: str
    done: wire.Done
    logprobs: list[wire.TokenLogprob]


async def fold(answer: Answer) -> list[Choice]:
    """The whole answers, by choice."""
    texts: list[list[str]] = [[] for _ in range(answer.n_choices)]
    logprobs: list[list[wire.TokenLogprob]] = [[] for _ in range(answer.n_choices)]
    dones: dict[int, wire.Done] = {}
    async with aclosing(answer.outs) as outs:
        async for index, out in outs:
            texts[index].append(out.text)
            logprobs[index] += out.logprobs
            if out.done:
                dones[index] = out.done
    return [
        Choice("".join(text), dones[index], logprobs[index]) for index, text in enumerate(texts)
    ]


def usage(answer: Answer, n_completion: int) -> dict[str, Any]:
    """OpenAI's usage object. A prompt counts once for all its choices; of it `cached_tokens`
    needed no prefill."""
    return {
        "prompt_tokens": answer.n_prompt,
        "completion_tokens": n_completion,
        "total_tokens": answer.n_prompt + n_completion,
        "prompt_tokens_details": {"cached_tokens": answer.n_cached},
    }


def logprobs(tokens: Sequence[wire.TokenLogprob]) -> list[dict[str, Any]]:
    """Log probabilities in OpenAI's form."""

    def entry(token: bytes, logprob: float) -> dict[str, Any]:
        text = token.decode(errors="replace")
        return {"token": text, "logprob": logprob, "bytes": list(token)}

    return [
        entry(token.token, token.logprob) | {"top_logprobs": [entry(*top) for top in token.top]}
        for token in tokens
    ]
