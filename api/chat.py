"""POST /v1/chat/completions"""

import asyncio
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag
from starlette.responses import JSONResponse, Response

from api import generation
from api.deps import Services, ServicesDep, while_connected
from api.sampling import (
    MAX_TOP_LOGPROBS,
    GenerationFields,
    OneChoice,
    Switch,
    TokenLimit,
    generate_request,
    grammar_field,
    ignored_params,
    refuse,
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
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "reasoning_effort": (),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
# what a template gets from us
RESERVED_KWARGS = {"messages", "now", "add_generation_prompt", "self"}


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
    chat_template_kwargs: dict[str, Any] | None = None  # such as enable_thinking
    logprobs: Switch = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None

    @property
    def n_logprobs(self) -> int | None:
        if self.logprobs:
            return self.top_logprobs or 0
        if self.top_logprobs:
            raise BadRequest("It is only for `logprobs: true`.", param="top_logprobs")
        return None


@router.post("/v1/chat/completions")
async def create_chat_completion(
    body: ChatRequest, request: Request, services: ServicesDep
) -> Response:
    tier = services.chat_tier(body.model)
    refuse(body, UNSUPPORTED)
    parts = list(_parts(body.messages))
    headers = ignored_params(
        body, UNSUPPORTED, strict=services.settings.server.strict_params, parts=parts
    )
    body.check_stream_options()
    prompt = await asyncio.to_thread(
        render, services, tier, body.messages, body.chat_template_kwargs
    )
    answer = await generation.start(
        request.receive,
        tier,
        [
            generate_request(
                body,
                tier.settings,
                prompt=prompt,
                limits=(body.max_tokens, body.max_completion_tokens),
                n=body.n,
                n_logprobs=body.n_logprobs,
            )
        ],
        priority=body.effective_priority,
        fields={"prompt": "messages", "grammar": grammar_field(body)},
    )
    kind = "chat.completion.chunk" if body.stream else "chat.completion"
    head = generation.head("chatcmpl", kind, tier, body.service_tier)
    if body.stream:
        return EventStream(_events(answer, head, include_usage=body.include_usage), headers)
    choices = await while_connected(request.receive, generation.fold(answer))
    replies = [
        {
            "index": index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": _logprobs(choice.logprobs) if body.logprobs else None,
            "finish_reason": choice.done.finish,
            **validity(choice.done),
        }
        for index, choice in enumerate(choices)
    ]
    usage = generation.usage(answer, [choice.done for choice in choices])
    return JSONResponse(head | {"choices": replies, "usage": usage}, headers=headers)


async def _events(
    answer: generation.Answer, head: dict[str, Any], *, include_usage: bool
) -> AsyncGenerator[bytes, None]:
    more = {"usage": None} if include_usage else {}
    dones = []

    def chunk(index: int, delta: dict[str, str], **fields: Any) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None} | fields
        return event(head | {"choices": [choice]} | more)

    async with aclosing(answer.outs) as outs:
        for index in range(answer.n_choices):
            yield chunk(index, {"role": "assistant", "content": ""})
        async for index, out in outs:
            if out.text:
                logprobs = _logprobs(out.logprobs) if out.logprobs else None
                yield chunk(index, {"content": out.text}, logprobs=logprobs)
            if out.done:
                dones.append(out.done)
                yield chunk(index, {}, finish_reason=out.done.finish, **validity(out.done))
    if include_usage:
        yield event(head | {"choices": [], "usage": generation.usage(answer, dones)})


def _logprobs(tokens: Sequence[wire.TokenLogprob]) -> dict[str, Any]:
    def entry(token: bytes, logprob: float) -> dict[str, Any]:
        text = token.decode(errors="replace")
        return {"token": text, "logprob": logprob, "bytes": list(token)}

    content = [
        entry(token.token, token.logprob) | {"top_logprobs": [entry(*top) for top in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def render(
    services: Services,
    tier: Tier,
    messages: Sequence[ChatMessage],
    kwargs: Mapping[str, Any] | None,
) -> list[wire.Segment]:
    """The prompt of a conversation, by the model's template. Raises BadRequest, ModelLoadFailed."""
    _check_parts(_parts(messages))
    for name in RESERVED_KWARGS & (kwargs or {}).keys():
        raise BadRequest(f"'{name}' is not for clients.", param=f"chat_template_kwargs.{name}")
    dumped = [message.model_dump(exclude_unset=True) for message in messages]
    return services.template(tier).render(dumped, now=datetime.now(), **(kwargs or {}))


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
