"""POST /v1/completions: raw prompts, OpenAI's legacy form."""

import asyncio
import itertools
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Request
from pydantic import Discriminator, Field, Tag
from starlette.responses import Response

from api import generation
from api.deps import ServicesDep, fetched, while_connected
from api.fields import Switch, Tokens, WholeText, accepted, each_text, kind_of_texts
from api.sampling import (
    CONSTRAINTS,
    INSTEAD,
    MAX_TOP_LOGPROBS,
    ChoiceCount,
    GenerationFields,
    OneChoice,
    answer_part,
    generate_request,
    validity,
)
from api.sse import DONE, Chunks, Form, Started, begun
from chat.infill import Marks, infill, marks_of
from engine import wire
from errors import BadRequest, UnsupportedParameter
from tier import Tier

router = APIRouter()

MAX_PROMPTS = 2048
MAX_SCORED = 1 << 16  # log probabilities of the prompts in one reply, with those of other tokens

Prompt = Annotated[
    Annotated[WholeText, Tag("<text>")]
    | Annotated[
        list[WholeText], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True), Tag("<texts>")
    ]
    | Annotated[Tokens, Tag("<tokens>")]
    | Annotated[
        list[Tokens], Field(max_length=MAX_PROMPTS, fail_fast=True), Tag("<lists of tokens>")
    ],
    Discriminator(kind_of_texts),
]


class CompletionRequest(GenerationFields):
    prompt: Prompt
    suffix: WholeText | None = None  # what stands behind the answer
    echo: Switch = False  # the prompt's text before the answer
    n: OneChoice = 1
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    best_of: ChoiceCount | None = None  # how many are sampled, of which the n likeliest are given


@router.post("/v1/completions")
async def create_completion(
    body: CompletionRequest, request: Request, services: ServicesDep
) -> Response:
    tier = services.chat_tier(body.model)
    headers = accepted(body, request, services, CONSTRAINTS, INSTEAD)
    body.check_stream_options()
    is_scored = body.echo and body.logprobs is not None
    if is_scored and body.suffix:
        raise UnsupportedParameter(
            "With a `suffix` the prompt has no log probabilities: no `echo`, or no `logprobs`.",
            param="suffix",
        )
    prompts = each_text(body.prompt)
    if len(prompts) > tier.settings.queue_size:
        raise BadRequest(
            f"One request may have {tier.settings.queue_size} prompts "
            f"({tier.name.upper()}_QUEUE_SIZE); this one has {len(prompts)}.",
            param="prompt",
        )
    n_sampled = _n_sampled(body)
    n_logprobs = 0 if body.logprobs is None and n_sampled > body.n else body.logprobs
    part = answer_part(body)
    asked = generate_request(
        body,
        tier.settings,
        limits=[body.max_tokens],
        n=n_sampled,
        n_logprobs=n_logprobs,
        grammar=wire.Grammar((part,)) if part else None,
    )
    if is_scored:
        sampling = msgspec.structs.replace(asked.sampling, prompt_logprobs=body.logprobs)
        # several answers go on from the first
        reuse = asked.reuse and n_sampled == 1
        asked = msgspec.structs.replace(asked, sampling=sampling, reuse=reuse)
        _check_scored(body, n_sampled, sum(len(p) for p in prompts if isinstance(p, list)))
    if body.suffix:
        await fetched(request.receive, tier)
    marks = await asyncio.to_thread(_marks, tier) if body.suffix else None
    requests = [
        msgspec.structs.replace(asked, prompt=_segments(prompt, body.suffix or "", marks))
        for prompt in prompts
    ]
    watch = generation.Watch(tier)

    async def start() -> generation.Answer:
        await fetched(request.receive, tier)
        answer = await generation.start(request, services, tier, body, requests, watch)
        if body.echo:
            caching = services.caching(request)

            async def text_of(prompt: str | list[int]) -> str:
                if isinstance(prompt, str):
                    return prompt
                return await services.answers.text(prompt, tier, caching)

            answer.outs = _echoed(
                answer.outs, answer.n_choices, prompts, text_of, is_scored=is_scored
            )
            if is_scored:
                try:
                    _check_scored(body, n_sampled, answer.begun.n_prompt)
                except BadRequest:
                    await answer.outs.aclose()
                    raise
        headers.update(answer.headers())
        return answer

    head = generation.head("cmpl", "text_completion", tier, body.service_tier)
    if body.stream:
        chunks = Chunks(head, include_usage=body.include_usage)
        going_on = [*range(len(prompts) * body.n)]

        def pause(**fields: Any) -> bytes:
            index = going_on[0] if going_on else 0
            return chunks.of(_choice(index, "", None, None), **fields)

        async def stream() -> Started:
            answer = await start()
            chunks.add(system_fingerprint=tier.fingerprint)
            return _events(answer, chunks, body, going_on), headers

        return await begun(
            stream(), Form(pause, last=DONE), waits_for=watch, headers=headers,
            comment_after_s=services.settings.server.comment_after_s,
        )  # fmt: skip
    answer = await start()
    head["system_fingerprint"] = tier.fingerprint
    sampled = await while_connected(request.receive, generation.fold(answer))
    usage = generation.usage(answer, sum(choice.done.n_tokens for choice in sampled))
    reply = head | {"choices": [], "usage": usage}
    if body.timings:
        reply["timings"] = answer.timings(usage["completion_tokens"])

    def encode() -> bytes:
        choices = [
            _choice(index, choice.text, choice.done, _logprobs(choice.logprobs, 0, body.logprobs))
            for index, choice in enumerate(_best(sampled, body.n, n_sampled))
        ]
        return msgspec.json.encode(reply | {"choices": choices})

    content = await asyncio.to_thread(encode) if is_scored else encode()
    headers |= answer.whole_headers()
    return Response(content, media_type="application/json", headers=headers)


def _check_scored(body: CompletionRequest, n_sampled: int, n_tokens: int) -> None:
    """Raises BadRequest where prompts with so many tokens have too many log probabilities."""
    n_scored = n_tokens * n_sampled * (1 + (body.logprobs or 0))
    if n_scored > MAX_SCORED:
        raise BadRequest(
            f"One reply has up to {MAX_SCORED:,} log probabilities of prompts; this one would have "
            f"{n_scored:,} (tokens, times 1 + `logprobs`, times `n`).",
            param="logprobs",
        )


def _n_sampled(body: CompletionRequest) -> int:
    if body.best_of is None:
        return body.n
    if body.best_of < body.n:
        raise BadRequest("'best_of' must not be less than 'n'.", param="best_of")
    if body.best_of > body.n and body.stream:
        raise BadRequest("The best are known only at the end: no `stream`.", param="best_of")
    return body.best_of


def _best(sampled: Sequence[generation.Choice], n: int, n_sampled: int) -> list[generation.Choice]:
    """The `n` likeliest by token of each prompt's choices, best first; all in order if n of n."""
    if n == n_sampled:
        return list(sampled)
    chosen: list[generation.Choice] = []
    for first in range(0, len(sampled), n_sampled):
        group = sampled[first : first + n_sampled]
        chosen += sorted(group, key=lambda choice: -(choice.done.mean_logprob or 0.0))[:n]
    return chosen


def _choice(
    index: int, text: str, done: wire.Done | None, logprobs: dict[str, Any] | None
) -> dict[str, Any]:
    finish = done.finish if done else None
    choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
    return choice | validity(done.is_valid if done else None)


def _logprobs(
    tokens: Sequence[wire.TokenLogprob], offset: int, asked: int | None
) -> dict[str, Any] | None:
    """OpenAI's legacy form: lists side by side; `offset` is where the text of these begins."""
    if asked is None:
        return None
    texts = [token.text for token in tokens]
    lengths = itertools.accumulate(map(len, texts), initial=offset)
    tops = [_by_text(token.top) if token.logprob is not None else None for token in tokens]
    return {
        "tokens": texts,
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": tops if asked else None,
        "text_offset": [start for start, _ in zip(lengths, texts, strict=False)],
    }


def _by_text(top: Sequence[tuple[bytes, float]]) -> dict[str, float]:
    """The likeliest tokens; of several with one text, such as parts of characters, the first."""
    found: dict[str, float] = {}
    for token, logprob in top:
        found.setdefault(token.decode(errors="replace"), logprob)
    return found


async def _events(
    answer: generation.Answer, chunks: Chunks, body: CompletionRequest, going_on: list[int]
) -> AsyncGenerator[bytes, None]:
    n_completion = 0
    offsets = [0] * answer.n_choices
    async with aclosing(answer.outs) as outs:
        async for index, out in outs:
            more: dict[str, Any] = {}
            if out.done:
                going_on.remove(index)
                n_completion += out.done.n_tokens
                if body.timings and not going_on:
                    more = {"timings": answer.timings(n_completion)}
            if out.text or out.done or out.logprobs:
                logprobs = _logprobs(out.logprobs, offsets[index], body.logprobs)
                offsets[index] += sum(len(token.text) for token in out.logprobs)
                choice = _choice(index, out.text, out.done, logprobs)
                yield chunks.of(choice, **more)
    if body.include_usage:
        yield chunks.usage(generation.usage(answer, n_completion))


def _marks(tier: Tier) -> Marks:
    """What marks the parts of a prompt with a suffix. Raises UnsupportedParameter."""
    marks = marks_of(tier.model().control_tokens)
    if marks is None:
        raise UnsupportedParameter(
            f"The model of tier '{tier.name}' has no tokens to fill in a middle; leave `suffix` "
            "out.",
            param="suffix",
        )
    return marks


def _segments(
    prompt: str | list[int], suffix: str, marks: Marks | None
) -> list[wire.Segment | int]:
    """A prompt as the worker takes it: segments of text, or token ids.

    A raw prompt is the client's own: control tokens in it are obeyed, unless there is a suffix.
    """
    if isinstance(prompt, list):
        if marks is not None:
            raise BadRequest("With a `suffix` the prompt must be text.", param="suffix")
        return [*prompt]
    if marks is not None:
        return [*infill(prompt, suffix, marks)]
    if not prompt:
        raise BadRequest("A prompt must not be empty.", param="prompt")
    return [wire.Segment(prompt, parse_special=True)]


async def _echoed(
    answer: generation.Outs,
    n_choices: int,
    prompts: Sequence[str | list[int]],
    text_of: Callable[[str | list[int]], Awaitable[str]],
    *,
    is_scored: bool,
) -> generation.Outs:
    """What an answer says, each choice after the text of its prompt: at once, or where it is scored
    when it is, before any choice says something."""
    n = n_choices // len(prompts)
    async with aclosing(answer) as outs:
        texts = [await text_of(prompt) for prompt in prompts]
        if not is_scored:
            for index in range(n_choices):
                yield index, wire.TokenOut(0, texts[index // n])
        async for index, out in outs:
            if not out.prompt:
                yield index, out
                continue
            text, texts[index // n] = texts[index // n], ""
            for choice in range(index, index + n):
                yield choice, wire.TokenOut(0, text, logprobs=out.prompt)
