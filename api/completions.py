"""POST /v1/completions: raw prompts, OpenAI's legacy form."""

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Request
from pydantic import Discriminator, Field, Tag
from starlette.responses import JSONResponse, Response

from api import generation
from api.deps import ServicesDep, while_connected
from api.sampling import (
    ChoiceCount,
    GenerationFields,
    OneChoice,
    grammar,
    grammar_field,
    ignored_params,
    max_tokens,
    refuse,
    sampling_params,
    validity,
)
from api.sse import EventStream, event
from engine import wire
from errors import BadRequest

router = APIRouter()

# OpenAI's fields that this version does not have, with the values that ask for nothing
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "echo": (False,),
    "logit_bias": ({},),
    "logprobs": (),
    "suffix": ("",),
}

Token = Annotated[int, Field(ge=0, lt=2**31)]
Tokens = Annotated[list[Token], Field(min_length=1, fail_fast=True)]


def _prompt_kind(value: Any) -> str:
    first = value[0] if isinstance(value, list) and value else None
    if isinstance(first, list):
        return "<lists of tokens>"
    if isinstance(first, int):
        return "<tokens>"
    return "<texts>" if isinstance(value, list) else "<text>"


Prompt = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[str], Field(min_length=1, fail_fast=True), Tag("<texts>")]
    | Annotated[Tokens, Tag("<tokens>")]
    | Annotated[list[Tokens], Field(fail_fast=True), Tag("<lists of tokens>")],
    Discriminator(_prompt_kind),
]


class CompletionRequest(GenerationFields):
    prompt: Prompt
    n: OneChoice = 1
    best_of: ChoiceCount | None = None  # how many are sampled, of which the n likeliest are given


@router.post("/v1/completions")
async def create_completion(
    body: CompletionRequest, request: Request, services: ServicesDep
) -> Response:
    tier = services.chat_tier(body.model)
    refuse(body, UNSUPPORTED)
    headers = ignored_params(body, UNSUPPORTED, strict=services.settings.server.strict_params)
    body.check_stream_options()
    prompts = _prompts(body.prompt)
    if len(prompts) > tier.settings.queue_size:
        raise BadRequest(
            f"One request may have {tier.settings.queue_size} prompts "
            f"({tier.name.upper()}_QUEUE_SIZE); this one has {len(prompts)}.",
            param="prompt",
        )
    n_sampled = _n_sampled(body)
    sampling = sampling_params(body, tier.settings)
    if n_sampled > body.n:
        sampling = msgspec.structs.replace(sampling, wants_logprob=True)
    answer = await generation.start(
        request.receive,
        tier,
        [
            wire.Generate(
                prompt=prompt,
                add_bos=True,
                sampling=sampling,
                stop=body.stop or [],
                grammar=grammar(body),
                max_tokens=max_tokens(tier.settings, body.max_tokens),
                n=n_sampled,
            )
            for prompt in prompts
        ],
        fields={"grammar": grammar_field(body)},
    )
    head = {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": tier.name,
    }
    if body.stream:
        return EventStream(_events(answer, head, include_usage=body.include_usage), headers)
    texts, dones = await while_connected(request.receive, generation.fold(answer))
    usage = generation.usage(answer, dones)
    chosen = _best(dones, body.n, n_sampled)
    choices = [_choice(index, texts[i], dones[i]) for index, i in enumerate(chosen)]
    return JSONResponse(head | {"choices": choices, "usage": usage}, headers=headers)


def _n_sampled(body: CompletionRequest) -> int:
    if body.best_of is None:
        return body.n
    if body.best_of < body.n:
        raise BadRequest("'best_of' must not be less than 'n'.", param="best_of")
    if body.best_of > body.n and body.stream:
        raise BadRequest("The best are known only at the end: no `stream`.", param="best_of")
    return body.best_of


def _best(dones: Sequence[wire.Done], n: int, n_sampled: int) -> list[int]:
    """The `n` likeliest by token of each prompt's choices, best first; all in order if n of n."""
    chosen = []
    for first in range(0, len(dones), n_sampled):
        group = range(first, first + n_sampled)
        best = sorted(group, key=lambda i: -(dones[i].mean_logprob or 0.0))
        chosen += best[:n]
    return chosen


def _choice(index: int, text: str, done: wire.Done | None) -> dict[str, Any]:
    finish = done.finish if done else None
    choice = {"index": index, "text": text, "logprobs": None, "finish_reason": finish}
    return choice | validity(done)


async def _events(
    answer: generation.Answer, head: dict[str, Any], *, include_usage: bool
) -> AsyncGenerator[bytes, None]:
    more = {"usage": None} if include_usage else {}
    dones = []
    async with aclosing(answer.outs) as outs:
        async for index, out in outs:
            if out.text or out.done:
                yield event(head | {"choices": [_choice(index, out.text, out.done)]} | more)
            if out.done:
                dones.append(out.done)
    if include_usage:
        yield event(head | {"choices": [], "usage": generation.usage(answer, dones)})


def _prompts(prompt: str | list[str] | list[int] | list[list[int]]) -> list[list[Any]]:
    """Each prompt as the worker takes it: segments of text, or token ids.

    A raw prompt is the client's own: control tokens in it are obeyed.
    """
    if isinstance(prompt, str):
        prompt = [prompt]
    if isinstance(prompt[0], int):
        return [list(prompt)]
    return [[_segment(item)] if isinstance(item, str) else list(item) for item in prompt]


def _segment(text: str) -> wire.Segment:
    if not text:
        raise BadRequest("A prompt must not be empty.", param="prompt")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRequest("A prompt has half of a surrogate pair.", param="prompt") from None
    return wire.Segment(text, parse_special=True)
