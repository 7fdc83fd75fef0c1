"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's Messages."""

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from api import generation, turn
from api.blocks import BlockReply, Data
from api.deps import ServicesDep, fetched, while_connected
from api.errors import client_name, client_names
from api.fields import accepted, with_ignored
from api.messages_request import MessagesRequest, PromptRequest
from api.prompt import prompt_of
from api.sampling import ALL_CONSTRAINTS, validity
from api.sse import Form, event
from api.tokens import MAX_LENGTH
from api.transcript import packed_thoughts
from chat.events import CallBegin, Event, Reasoning
from chat.tools.parameters import read_json
from engine import wire
from errors import BadRequest

router = APIRouter()

# Anthropic's fields that this version does not have, with the values that ask for nothing
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    **ALL_CONSTRAINTS,
    "container": (),
    "mcp_servers": ([],),
    "speed": ("standard",),
}
INSTEAD = dict.fromkeys(ALL_CONSTRAINTS, "send `output_config.format`")
# the deltas of the kinds of blocks, and the field of each that grows
DELTAS = {
    "text": ("text_delta", "text"),
    "thinking": ("thinking_delta", "thinking"),
    "tool_use": ("input_json_delta", "partial_json"),
}
STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


@router.post("/v1/messages")
async def create_message(
    body: MessagesRequest, request: Request, services: ServicesDep
) -> Response:
    tier = services.chat_tier(body.model)
    headers = accepted(body, request, services, UNSUPPORTED, INSTEAD)
    reply = _Reply(tier.name, hides_thoughts=body.hides_thoughts)
    return await reply.answer(body, request, services, tier, headers, Form(_ping))


@router.post("/v1/messages/count_tokens")
async def count_tokens(body: PromptRequest, request: Request, services: ServicesDep) -> Response:
    tier = services.chat_tier(body.model)
    headers = accepted(body, request, services, UNSUPPORTED, INSTEAD)
    with client_names(body.names):
        chat = body.chat()
        await fetched(request.receive, tier)
        prompt = await asyncio.to_thread(prompt_of, services, tier, chat)
    headers = with_ignored(headers, (client_name(param, body.names) for param in prompt.idle))
    if sum(len(segment.text) for segment in prompt.segments) > MAX_LENGTH:
        raise BadRequest(f"There may be {MAX_LENGTH:,} characters in all.", param="messages")
    work = tier.tokenize(prompt.segments, add_bos=True)
    with client_names({"^prompt$": "messages"}):
        tokens = await while_connected(request.receive, work)
    return JSONResponse({"input_tokens": len(tokens.ids)}, headers=headers)


def _ping(**fields: Any) -> bytes:
    return event({"type": "ping", **fields})


class _Reply(BlockReply):
    """A message."""

    def __init__(self, model: str, *, hides_thoughts: bool) -> None:
        self._hides_thoughts = hides_thoughts
        self._content: list[dict[str, Any]] = []
        self._arguments = ""  # of the open call
        self._thoughts = ""  # that are open and hidden
        message = {
            "id": generation.new_id("msg_"),
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": self._content,
            "stop_reason": None,
            "stop_sequence": None,
        }
        super().__init__(message)

    def begin(self) -> Iterable[Data]:
        self.whole["usage"] = self._usage(turn.End("stop", 0, 0, None))
        yield {"type": "message_start", "message": self.whole}

    def open(self, first: Event) -> Iterable[Data]:
        if isinstance(first, CallBegin):
            self._arguments = ""
            call_id = generation.new_id("toolu_")
            block = {"type": "tool_use", "id": call_id, "name": first.name, "input": {}}
        elif isinstance(first, Reasoning):
            block = {"type": "thinking", "thinking": "", "signature": ""}
        else:
            block = {"type": "text", "text": ""}
        self._content.append(block)
        yield self._event("content_block_start", content_block=block)

    def add(self, text: str, logprobs: Sequence[wire.TokenLogprob]) -> Iterable[Data]:
        block = self._content[-1]
        if block["type"] == "thinking" and self._hides_thoughts:
            self._thoughts += text
            return
        delta, field = DELTAS[block["type"]]
        if block["type"] == "tool_use":
            self._arguments += text
        else:
            block[field] += text
        yield self._event("content_block_delta", delta={"type": delta, field: text})

    def close(self, *, is_whole: bool) -> Iterable[Data]:
        block = self._content[-1]
        if block["type"] == "tool_use":
            block["input"] = msgspec.Raw(_object(self._arguments).encode())
        if block["type"] == "thinking":  # some clients send back only those that have a signature
            block["signature"], self._thoughts = packed_thoughts(self._thoughts), ""
            delta = {"type": "signature_delta", "signature": block["signature"]}
            yield self._event("content_block_delta", delta=delta)
        yield self._event("content_block_stop")

    def end(self, end: turn.End) -> Iterable[Data]:
        is_stopped = end.finish == "stop" and end.stop is not None
        delta = {
            "stop_reason": "stop_sequence" if is_stopped else STOP_REASONS[end.finish],
            "stop_sequence": end.stop if is_stopped else None,
            **validity(end.is_valid),
        }
        usage = self._usage(end)
        self.whole |= delta | {"usage": usage}
        yield {"type": "message_delta", "delta": delta, "usage": usage}
        yield {"type": "message_stop"}

    def _event(self, kind: str, **fields: Any) -> Data:
        return {"type": kind, "index": len(self._content) - 1, **fields}

    def _usage(self, end: turn.End) -> dict[str, Any]:
        usage = self._started.usage([end])
        n_cached = usage["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": usage["prompt_tokens"] - n_cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": n_cached,
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"thinking_tokens": end.n_reasoning},
        }


def _object(arguments: str) -> str:
    """The arguments as they were written, since no number in them is to lose digits; none where
    they were cut."""
    try:
        is_object = isinstance(read_json(arguments), dict)
    except (ValueError, RecursionError):
        is_object = False
    return arguments if is_object else "{}"
