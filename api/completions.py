"""POST /v1/completions: raw prompts, OpenAI's legacy form."""

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Discriminator, Field, Tag
from starlette.responses import JSONResponse, Response

from api import generation
from api.deps import ServicesDep, while_connected
from api.sampling import GenerationFields, ignored_params, max_tokens, refuse, sampling_params
from api.sse import EventStream, event
from engine import wire
from errors import BadRequest

router = APIRouter()

# OpenAI's fields that this version does not have, with the values that ask for nothing
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "grammar": ("",),
    "logit_bias": ({},),
    "logprobs": (),
    "n": (1,),
    "response_format": ({"type": "text"},),
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
    sampling = sampling_params(body, tier.settings)
    outs = await generation.start(
        request.receive,
        tier,
        [
            wire.Generate(
                prompt=prompt,
                add_bos=True,
                sampling=sampling,
                stop=body.stop or [],
                max_tokens=max_tokens(tier.settings, body.max_tokens),
            )
            for prompt in prompts
        ],
        prompt_field="prompt",
    )
    head = {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": tier.name,
    }
    if body.stream:
        return EventStream(_events(outs, head, include_usage=body.include_usage), headers)
    texts, dones = await while_connected(request.receive, generation.fold(outs, len(prompts)))
    choices = [
        _choice(index, text, done.finish)
        for index, (text, done) in enumerate(zip(texts, dones, strict=True))
    ]
    return JSONResponse(
        head | {"choices": choices, "usage": generation.usage(dones)}, headers=headers
    )


def _choice(index: int, text: str, finish: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish}


async def _events(
    outs: generation.Outs, head: dict[str, Any], *, include_usage: bool
) -> AsyncGenerator[bytes, None]:
    more = {"usage": None} if include_usage else {}
    dones = []
    async with aclosing(outs):
        async for index, out in outs:
            if out.text or out.done:
                finish = out.done.finish if out.done else None
                yield event(head | {"choices": [_choice(index, out.text, finish)]} | more)
            if out.done:
                dones.append(out.done)
    if include_usage:
        yield event(head | {"choices": [], "usage": generation.usage(dones)})


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
