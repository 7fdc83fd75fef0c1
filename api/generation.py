"""From a request for text to what the tier says about it; both text endpoints build on this."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from contextlib import ExitStack, aclosing
from typing import Any

from starlette.types import Receive

from api.deps import while_connected
from engine import wire
from errors import BadRequest
from model_manager import Generation, Tier

Outs = AsyncGenerator[tuple[int, wire.TokenOut], None]  # with the index of the choice


async def start(
    receive: Receive, tier: Tier, requests: Sequence[wire.Generate], *, prompt_field: str
) -> Outs:
    """Submit one request for each choice and wait until all have started: from here on nothing
    that is wrong with them can come up. Close the generator to cancel them.

    Raises ServiceError, which names `prompt_field` where the prompt is at fault, or ClientLeft.
    """
    outs = _generate(tier, requests)
    try:
        await while_connected(receive, anext(outs))
    except BadRequest as error:
        if error.param == "prompt":
            error.param = prompt_field
        raise
    return outs


async def _generate(tier: Tier, requests: Sequence[wire.Generate]) -> Outs:
    with ExitStack() as stack:
        stack.enter_context(tier.lease())
        generations = [stack.enter_context(tier.submit(request)) for request in requests]
        for generation in generations:
            await generation.started()
        yield -1, wire.TokenOut(0, "")  # the handshake that `start` waits for
        if len(generations) == 1:
            async for out in generations[0]:
                yield 0, out
        else:
            async with aclosing(_interleave(generations)) as outs:
                async for indexed in outs:
                    yield indexed


async def _interleave(generations: Sequence[Generation]) -> Outs:
    """What several generations say, in the order in which they say it."""
    queue: asyncio.Queue[tuple[int, wire.TokenOut] | BaseException] = asyncio.Queue()

    async def feed(index: int, generation: AsyncIterator[wire.TokenOut]) -> None:
        try:
            async for out in generation:
                queue.put_nowait((index, out))
        except Exception as error:
            queue.put_nowait(error)

    tasks = [
        asyncio.create_task(feed(index, aiter(generation)))
        for index, generation in enumerate(generations)
    ]
    try:
        n_open = len(tasks)
        while n_open:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            n_open -= item[1].done is not None
            yield item
    finally:
        for task in tasks:
            task.cancel()


async def fold(outs: Outs, n_choices: int) -> tuple[list[str], list[wire.Done]]:
    """The whole texts and how they ended, by choice."""
    texts: list[list[str]] = [[] for _ in range(n_choices)]
    dones: dict[int, wire.Done] = {}
    async with aclosing(outs):
        async for index, out in outs:
            texts[index].append(out.text)
            if out.done:
                dones[index] = out.done
    return ["".join(text) for text in texts], [dones[index] for index in range(n_choices)]


def usage(dones: Iterable[wire.Done]) -> dict[str, Any]:
    """OpenAI's usage object, summed over choices. `cached_tokens` needed no prefill."""
    parts = [done.usage for done in dones]
    n_prompt = sum(part.prompt_tokens for part in parts)
    n_completion = sum(part.completion_tokens for part in parts)
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_completion,
        "total_tokens": n_prompt + n_completion,
        "prompt_tokens_details": {"cached_tokens": sum(part.cached_tokens for part in parts)},
    }
