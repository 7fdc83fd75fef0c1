"""From a request for text to what the tier says about it; both text endpoints build on this."""

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import Request

from answers import Begun, Items
from api.deps import Services, while_connected
from api.sampling import GenerationFields
from caching import Caching
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
    """The choices that come of requests, one for each prompt: those of the first prompt, then those
    of the second. Close `outs` to cancel them."""

    def __init__(self, n_choices: int, items: Items, caching: Caching, watch: Watch) -> None:
        self._watch = watch
        self._caching = caching
        self.n_choices = n_choices
        self.begun = Begun(0, 0, 0)
        self.n_guessed = self.n_right = 0  # tokens of the answers; those that were right
        # by the monotonic clock; of several prompts the last time counts
        caching.queued_at = caching.handed_at = self.first_at = self.last_at = time.monotonic()
        self.outs: Outs = self._read(items)

    async def _read(self, items: Items) -> Outs:
        async with aclosing(items):
            async for item in items:
                if isinstance(item, Begun):
                    self.begun, caching = item, self._caching
                    caching.n_before = item.n_before
                    caching.handed_at = max(caching.queued_at, item.handed_at)
                    self.first_at = self.last_at = caching.handed_at
                    yield -1, wire.TokenOut(0, "")  # the handshake that `start` waits for
                    self.first_at = 0.0
                elif isinstance(item, Generation):
                    self._watch.generation = item
                else:
                    self.last_at = time.monotonic()
                    self.first_at = self.first_at or self.last_at
                    if done := item[1].done:
                        self.n_guessed += done.n_guessed
                        self.n_right += done.n_right
                    yield item

    def headers(self) -> dict[str, str]:
        """Its seed, how long it waited for its place, and whether it was remembered."""
        return {"X-Seed": str(self.begun.seed)} | self._caching.headers()

    def whole_headers(self) -> dict[str, str]:
        """All times, once it is whole."""
        return self.headers() | {
            "X-Prompt-Time-Ms": f"{1e3 * self._prompt_s():.1f}",
            "X-Generation-Time-Ms": f"{1e3 * (self.last_at - self.first_at):.1f}",
        }

    def timings(self, n_completion: int) -> dict[str, float]:
        """What llama-server says of a whole answer. Of the first token only the prompt is timed."""
        n_cached, n_predicted = self.begun.n_cached, max(n_completion - 1, 0)
        return {
            "cache_n": n_cached,
            **_rates("prompt", self.begun.n_prompt - n_cached, self._prompt_s()),
            **_rates("predicted", n_predicted, self.last_at - self.first_at),
            "draft_n": self.n_guessed,
            "draft_n_accepted": self.n_right,
        }

    def _prompt_s(self) -> float:
        return self.first_at - self._caching.handed_at


def _rates(kind: str, n: int, seconds: float) -> dict[str, float]:
    return {
        f"{kind}_n": n,
        f"{kind}_ms": round(1e3 * seconds, 3),
        f"{kind}_per_token_ms": round(1e3 * seconds / max(n, 1), 3),
        f"{kind}_per_second": round(n / seconds, 3) if seconds > 0 else 0.0,
    }


def head(prefix: str, kind: str, tier: Tier, service_tier: str | None) -> dict[str, Any]:
    """What the reply and each of its chunks begin with, and what is known before it begins."""
    more = {"service_tier": served_as(service_tier)} if service_tier else {}
    return {
        "id": new_id(f"{prefix}-"),
        "object": kind,
        "created": int(time.time()),
        "model": tier.name,
    } | more


def served_as(service_tier: str) -> str:
    return {"auto": "default", "scale": "default", "fast": "priority"}.get(
        service_tier, service_tier
    )


def new_id(prefix: str) -> str:
    return prefix + uuid.uuid4().hex


async def start(
    request: Request,
    services: Services,
    tier: Tier,
    body: GenerationFields,
    asked: Sequence[wire.Generate],
    watch: Watch,
) -> Answer:
    """Ask for answers and wait until all have begun: from here on nothing that is wrong with the
    request can come up. Raises ClientLeft or ServiceError."""
    caching = services.caching(request)
    items = services.answers.to(
        asked, tier, priority=body.effective_priority, is_seeded=body.seed is not None,
        caching=caching,
    )  # fmt: skip
    answer = Answer(sum(one.n for one in asked), items, caching, watch)
    await while_connected(request.receive, anext(answer.outs))
    tier.keep_alive(body.keep_alive)
    return answer


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
    begun = answer.begun
    return {
        "prompt_tokens": begun.n_prompt,
        "completion_tokens": n_completion,
        "total_tokens": begun.n_prompt + n_completion,
        "prompt_tokens_details": {"cached_tokens": begun.n_cached},
    }


def logprobs(tokens: Sequence[wire.TokenLogprob]) -> list[dict[str, Any]]:
    """Log probabilities in OpenAI's form. The tokens are those of the text: of a character that
    took several the last is all of it, and those before are empty."""

    def entry(token: bytes, text: str, logprob: float | None) -> dict[str, Any]:
        return {"token": text, "logprob": logprob, "bytes": list(token)}

    def others(top: Sequence[tuple[bytes, float]]) -> list[dict[str, Any]]:
        return [entry(token, token.decode(errors="replace"), logprob) for token, logprob in top]

    return [
        entry(token.token, token.text, token.logprob) | {"top_logprobs": others(token.top)}
        for token in tokens
    ]
