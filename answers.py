"""Answers to requests for text: remembered, shared with who asked the same before, or generated.

1. An answer that another try would not repeat, or for a client that wants no cache, is generated
   for its request alone. So is one for a client that wants it new, and then it is remembered.
2. An identical request is on its way: its answer is read from the beginning, and then as it comes.
3. It is remembered: it is read back as it was said, piece by piece.
4. It is generated, and remembered when it is whole.

What is remembered is what the model said, before it is split into thoughts, text and calls: that
says all of it again for every form of reply, whole or streamed.
"""

import asyncio
import itertools
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, TypeVar

import msgspec

from cache import Cache, Entry, key
from caching import Caching
from engine import wire
from flights import MAX_ITEMS, Flights, Reader, Tell
from generating import Generation
from tier import Tier

KIND = "answer"
CONVERSION = "conversion"
LARGE_BYTES = 1 << 18  # what is more is not hashed or decoded on the event loop
BREATH_ITEMS = 64  # that are read before others have their turn
T = TypeVar("T", int, str)
Policy = Literal["off", "repeatable", "all"]


@dataclass(frozen=True, slots=True)
class Begun:
    """All requests have passed every check and have their places."""

    n_prompt: int
    n_cached: int  # of these tokens
    seed: int
    n_before: int = 0  # requests that were to be served before the last one when it came
    handed_at: float = 0.0  # to the worker, by the monotonic clock
    age_s: float | None = None  # of what is remembered
    unenforced: tuple[str, ...] = ()  # params of schemas of which no more than a type can be used


# A generation, so that one sees what it waits for; then once that all have begun; then what each
# choice says
Item = Generation | Begun | tuple[int, wire.TokenOut]
Items = AsyncGenerator[Item, None]


class _Kept(msgspec.Struct, array_like=True, frozen=True):
    """An answer in the cache."""

    n_prompt: int
    n_cached: int
    seed: int
    outs: list[tuple[int, wire.TokenOut]]
    unenforced: tuple[str, ...] = ()


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Kept).decode


class Answers:
    """Belongs to one event loop. Without a cache every answer is generated for its request."""

    def __init__(self, cache: Cache | None, policy: Policy) -> None:
        self._cache = cache
        self._policy = policy
        self._flights: Flights[Item] = Flights()

    async def to(
        self,
        requests: Sequence[wire.Generate],
        tier: Tier,
        *,
        priority: int,
        is_seeded: bool,
        caching: Caching,
    ) -> Items:
        """Answers to requests with one way of sampling; `is_seeded`: by the client. Says in
        `caching` what it had. Closing it ends what nobody else waits for. Raises ServiceError."""
        cache = self._cache
        if cache is None or not caching.writes or not self._may_keep(requests, is_seeded):
            flight = self._flights.alone(lambda tell: generate(requests, tier, priority, tell))
        else:
            asked = _Asked(requests, tier, priority, tier.identity)
            name = await _key(asked, is_seeded, caching.owner)
            caching.outcome = "MISS"
            flight = self._flight(asked, cache, name, caching)
        with flight as reader:
            async for item in reader:
                if isinstance(item, Begun):
                    if item.age_s is not None:
                        caching.outcome, caching.age_s = "HIT", item.age_s
                    elif reader.is_joined and cache is not None:
                        caching.outcome = "JOIN"
                        cache.joined(KIND)
                if reader.n_read % BREATH_ITEMS == 0:
                    await asyncio.sleep(0)
                yield item

    def _flight(self, asked: "_Asked", cache: Cache, name: bytes, caching: Caching) -> Reader[Item]:
        if not caching.reads:
            return self._flights.alone(lambda tell: _keep(asked, cache, name, tell))
        # who is more urgent does not wait in the place of who is less, nor for what is too old
        max_age_s = caching.max_age_s
        flight = key("flight", name, asked.priority, max_age_s)
        return self._flights.join(
            flight, lambda tell: _find_or_keep(asked, cache, name, max_age_s, tell)
        )

    async def n_tokens(self, prompt: Sequence[wire.Segment], tier: Tier, caching: Caching) -> int:
        """How many tokens a prompt has, remembered too: who needs it to find an answer is not to
        need the model for that. Raises ServiceError."""

        async def count() -> int:
            return len((await tier.tokenize(prompt, add_bos=True)).ids)

        return await self._converted("length", prompt, tier, caching, count, int)

    async def text(self, ids: Sequence[int], tier: Tier, caching: Caching) -> str:
        """The text of tokens, in the same way."""
        return await self._converted("text", ids, tier, caching, lambda: tier.detokenize(ids), str)

    async def _converted(
        self,
        what: str,
        of: Sequence[wire.Segment | int],
        tier: Tier,
        caching: Caching,
        convert: Callable[[], Awaitable[T]],
        type_: type[T],
    ) -> T:
        cache, identity = self._cache, tier.identity
        if cache is None or not caching.writes:
            return await convert()
        name = await asyncio.to_thread(key, CONVERSION, identity, caching.owner, what, of)
        entry = None
        if caching.reads:
            entry = await cache.get(CONVERSION, name, caching.max_age_s)
        if entry is not None:
            with suppress(msgspec.MsgspecError):
                return msgspec.msgpack.decode(entry.value, type=type_)
        value = await convert()
        if tier.is_still(identity):
            cache.put(CONVERSION, name, _encode(value))
        return value

    def _may_keep(self, requests: Sequence[wire.Generate], is_seeded: bool) -> bool:
        """Another try would give the same, or it does not matter."""
        if self._policy == "all" or is_seeded:
            return True
        return all(
            request.n == 1
            and request.sampling.is_greedy
            and request.sampling.xtc_probability == 0  # which draws also where nothing else does
            for request in requests
        )


@dataclass(frozen=True, slots=True)
class _Asked:
    requests: Sequence[wire.Generate]
    tier: Tier
    priority: int
    identity: str  # of the tier's model when it was asked


async def _key(asked: _Asked, is_seeded: bool, owner: str | None) -> bytes:
    requests = asked.requests
    n_chars = sum(
        len(piece.text) if isinstance(piece, wire.Segment) else 1
        for request in requests
        for piece in request.prompt
    )
    if n_chars > LARGE_BYTES:
        return await asyncio.to_thread(answer_key, requests, asked.identity, is_seeded, owner)
    return answer_key(requests, asked.identity, is_seeded, owner)


def answer_key(
    requests: Sequence[wire.Generate], identity: str, is_seeded: bool, owner: str | None
) -> bytes:
    """Made of all that decides the answer, so of all fields but whose turn it is. A seed that we
    have drawn is not asked for."""
    plain = []
    for request in requests:
        sampling = request.sampling
        if not is_seeded:
            sampling = msgspec.structs.replace(sampling, seed=0)
        # of two biases for one token the later one holds, and keys sort what has names
        bias = [*request.logit_bias.items()]
        bare = msgspec.structs.replace(request, job=0, rank=0.0, sampling=sampling, logit_bias={})
        plain.append((bare, bias))
    return key(KIND, identity, owner, is_seeded, plain)


async def _find_or_keep(
    asked: _Asked, cache: Cache, name: bytes, max_age_s: float | None, tell: Tell[Item]
) -> None:
    entry = await cache.get(KIND, name, max_age_s)
    kept = await _read(entry) if entry is not None else None
    if entry is None or kept is None:
        await _keep(asked, cache, name, tell)
        return
    begun = Begun(kept.n_prompt, kept.n_cached, kept.seed, unenforced=kept.unenforced)
    tell(replace(begun, age_s=entry.age_s))
    for out in kept.outs:
        tell(out)


async def _read(entry: Entry) -> _Kept | None:
    """None where it is no answer."""
    try:
        if len(entry.value) > LARGE_BYTES:
            return await asyncio.to_thread(_decode, entry.value)
        return _decode(entry.value)
    except msgspec.MsgspecError:
        return None


async def _keep(asked: _Asked, cache: Cache, name: bytes, tell: Tell[Item]) -> None:
    """What is generated, which the cache has once it is whole."""
    begun = Begun(0, 0, 0)
    outs: list[tuple[int, wire.TokenOut]] = []
    is_good = True

    def keep(item: Item) -> None:
        nonlocal begun, is_good
        if isinstance(item, tuple):
            done = item[1].done
            is_good &= done is None or done.is_valid is not False
            if len(outs) < MAX_ITEMS:  # longer ones are not worth the room
                outs.append(item)
            else:
                is_good = False
        elif isinstance(item, Begun):
            begun = item
        tell(item)

    await generate(asked.requests, asked.tier, asked.priority, keep)
    if is_good and asked.tier.is_still(asked.identity):
        kept = _Kept(begun.n_prompt, begun.n_cached, begun.seed, outs, begun.unenforced)
        cache.put(KIND, name, _encode(kept))


async def generate(
    requests: Sequence[wire.Generate], tier: Tier, priority: int, tell: Tell[Item]
) -> None:
    """A new answer of the tier's model. Raises ServiceError."""
    with ExitStack() as stack:
        stack.enter_context(tier.lease())
        generations = [
            stack.enter_context(tier.submit(request, priority=priority)) for request in requests
        ]
        tell(generations[-1])
        begun = Begun(0, 0, requests[0].sampling.seed, max(g.n_before for g in generations))
        for generation in generations:
            started = await generation.started()
            begun = replace(
                begun,
                n_prompt=begun.n_prompt + started.prompt_tokens,
                n_cached=begun.n_cached + started.cached_tokens,
                handed_at=max(begun.handed_at, generation.handed_at),
                unenforced=begun.unenforced + started.unenforced,
            )
        tell(begun)
        firsts = itertools.accumulate((request.n for request in requests), initial=0)
        works = [
            asyncio.ensure_future(generation.tell(partial(_tell_one, tell, first)))
            for generation, first in zip(generations, firsts, strict=False)
        ]
        try:
            await asyncio.gather(*works)
        finally:
            for work in works:
                work.cancel()


def _tell_one(tell: Tell[Item], first: int, out: wire.TokenOut) -> None:
    """Each answer by its number among those of all."""
    tell((first + out.index, out))
