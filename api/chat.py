"""POST /v1/chat/completions"""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import aclosing
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag
from starlette.responses import JSONResponse, Response

from api import generation
from api.deps import Services, ServicesDep, while_connected
from api.sampling import (
    GenerationFields,
    OneChoice,
    TokenLimit,
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
from errors import BadRequest, UnsupportedParameter
from model_manager import Tier

router = APIRouter()

# OpenAI's fields that this version does not have, with the values that ask for nothing
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "reasoning_effort": (),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
}


class ContentPart(BaseModel):
    model_config = ConfigDict(extra="allow")

    type: str
    text: str | None = None


def _content_kind(value: Any) -> str:
    return "<parts>" if isinstance(value, list) else "<text>"


Content = Annotated[
    Annotated[str | None, Tag("<text>")]
    | Annotated[list[ContentPart], Field(fail_fast=True), Tag("<parts>")],
    Discriminator(_content_kind),
]


class ChatMessage(BaseModel):
    """Other fields (name, tool_calls, tool_call_id …) go to the model's template as they are."""

    model_config = ConfigDict(extra="allow")

    role: Literal["developer", "system", "user", "assistant", "tool"]
    content: Content = None


class ChatRequest(GenerationFields):
    # fail_fast: a million bad items must not become a million errors
    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: TokenLimit | None = None
    n: OneChoice = 1


@router.post("/v1/chat/completions")
async def create_chat_completion(
    body: ChatRequest, request: Request, services: ServicesDep
) -> Response:
    tier = services.chat_tier(body.model)
    refuse(body, UNSUPPORTED)
    parts = list(_parts(body.messages))
    _check_parts(parts)
    headers = ignored_params(
        body, UNSUPPORTED, strict=services.settings.server.strict_params, parts=parts
    )
    body.check_stream_options()
    prompt = await asyncio.to_thread(_render, services, tier, body.messages)
    answer = await generation.start(
        request.receive,
        tier,
        [
            wire.Generate(
                prompt=prompt,
                add_bos=True,
                sampling=sampling_params(body, tier.settings),
                stop=body.stop or [],
                grammar=grammar(body),
                max_tokens=max_tokens(tier.settings, body.max_tokens, body.max_completion_tokens),
                n=body.n,
            )
        ],
        fields={"prompt": "messages", "grammar": grammar_field(body)},
    )
    head = {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion.chunk" if body.stream else "chat.completion",
        "created": int(time.time()),
        "model": tier.name,
    }
    if body.stream:
        return EventStream(_events(answer, head, include_usage=body.include_usage), headers)
    texts, dones = await while_connected(request.receive, generation.fold(answer))
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": None,
            "finish_reason": done.finish,
            **validity(done),
        }
        for index, (text, done) in enumerate(zip(texts, dones, strict=True))
    ]
    usage = generation.usage(answer, dones)
    return JSONResponse(head | {"choices": choices, "usage": usage}, headers=headers)


async def _events(
    answer: generation.Answer, head: dict[str, Any], *, include_usage: bool
) -> AsyncGenerator[bytes, None]:
    more = {"usage": None} if include_usage else {}
    dones = []

    def chunk(index: int, delta: dict[str, str], done: wire.Done | None = None) -> bytes:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": None,
            "finish_reason": done.finish if done else None,
            **validity(done),
        }
        return event(head | {"choices": [choice]} | more)

    async with aclosing(answer.outs) as outs:
        for index in range(answer.n_choices):
            yield chunk(index, {"role": "assistant", "content": ""})
        async for index, out in outs:
            if out.text:
                yield chunk(index, {"content": out.text})
            if out.done:
                dones.append(out.done)
                yield chunk(index, {}, out.done)
    if include_usage:
        yield event(head | {"choices": [], "usage": generation.usage(answer, dones)})


def _render(
    services: Services, tier: Tier, messages: Sequence[ChatMessage]
) -> list[wire.Segment | int]:
    template = services.template(tier)
    dumped = [message.model_dump(exclude_unset=True) for message in messages]
    return [*template.render(dumped, now=datetime.now())]


def _parts(messages: Sequence[ChatMessage]) -> Iterator[tuple[str, ContentPart]]:
    """Each part of a content that is a list, with its place."""
    for m, message in enumerate(messages):
        if isinstance(message.content, list):
            for p, part in enumerate(message.content):
                yield f"messages[{m}].content[{p}]", part


def _check_parts(parts: Iterable[tuple[str, ContentPart]]) -> None:
    for place, part in parts:
        if part.type != "text":
            raise UnsupportedParameter(
                f"Content of type '{part.type}' is not supported; send text.", param=f"{place}.type"
            )
        if part.text is None:
            raise BadRequest(f"'{place}.text' is required.", param=f"{place}.text")
