"""POST /v1/chat/completions"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from api import generation, turn
from api.chat_request import ChatRequest
from api.deps import ServicesDep, while_connected
from api.fields import accepted
from api.sampling import CONSTRAINTS, validity
from api.sampling import INSTEAD as OF_CONSTRAINTS
from api.sse import DONE, Chunks, Form, Started, begun
from chat.events import CallBegin, Event, Reasoning, Text
from engine import wire
from settings import ReasoningField

router = APIRouter()

# fields that this version does not have, with the values that ask for nothing
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "verbosity": ("medium",),
    "web_search_options": (),
    **CONSTRAINTS,
}
INSTEAD = OF_CONSTRAINTS | {
    "function_call": "send `tool_choice`",
    "functions": "send `tools`",
}


@router.post("/v1/chat/completions")
async def create_chat_completion(
    body: ChatRequest, request: Request, services: ServicesDep
) -> Response:
    tier = services.chat_tier(body.model)
    headers = accepted(body, request, services, UNSUPPORTED, INSTEAD)
    server = services.settings.server
    watch = generation.Watch(tier)
    starting = turn.start(request, services, tier, body, watch)
    kind = "chat.completion.chunk" if body.stream else "chat.completion"
    head = generation.head("chatcmpl", kind, tier, body.service_tier)
    if body.stream:
        chunks = Chunks(head, include_usage=body.include_usage)
        deltas = [_Deltas(server.reasoning_field) for _ in range(body.n)]

        def pause(**fields: Any) -> bytes:
            """Of the first choice that goes on."""
            index = next((n for n, of_choice in enumerate(deltas) if not of_choice.are_over), 0)
            return chunks.of(_choice(index, deltas[index].nothing()), **fields)

        async def stream() -> Started:
            started = await starting
            chunks.add(system_fingerprint=tier.fingerprint)
            return _events(started, chunks, body, deltas), started.headers(headers)

        return await begun(
            stream(), Form(pause, last=DONE), waits_for=watch, headers=headers,
            comment_after_s=server.comment_after_s,
        )  # fmt: skip
    started = await starting
    head["system_fingerprint"] = tier.fingerprint
    choices = await while_connected(request.receive, started.fold())
    replies = [
        {
            "index": index,
            "message": _message(choice, server.reasoning_field),
            "logprobs": _logprobs(choice.logprobs) if body.logprobs else None,
            "finish_reason": choice.end.finish,
            **validity(choice.end.is_valid),
        }
        for index, choice in enumerate(choices)
    ]
    usage = started.usage(choice.end for choice in choices)
    reply = head | {"choices": replies, "usage": usage}
    if body.timings:
        reply["timings"] = started.answer.timings(usage["completion_tokens"])
    return JSONResponse(reply, headers=started.whole_headers(headers))


def _message(choice: turn.Choice, field: ReasoningField) -> dict[str, Any]:
    said = choice.message
    message: dict[str, Any] = {"role": "assistant", "content": said.text, "refusal": None}
    if said.reasoning:
        message |= _reasoning(said.reasoning, field)
    if said.calls:
        message["content"] = said.text or None
        message["tool_calls"] = [
            {
                "id": generation.new_id("call_"),
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in said.calls
        ]
    return message


def _reasoning(text: str, field: ReasoningField) -> dict[str, str]:
    names = ("reasoning_content", "reasoning") if field == "both" else (field,)
    return dict.fromkeys(names, text)


class _Deltas:
    """The deltas of one choice."""

    def __init__(self, field: ReasoningField) -> None:
        self.are_over = False
        self._field = field
        self._n_calls = 0
        self._last: Event | None = None

    def nothing(self) -> dict[str, Any]:
        """No more of what is open. Without a call in it, Go's SDK takes a call for whole."""
        if isinstance(self._last, Text | Reasoning):
            return self._said(type(self._last)(""))
        return self._call(function={"arguments": ""}) if self._last else {}

    def of(self, event: Event) -> dict[str, Any]:
        self._last = event
        return self._said(event)

    def _said(self, event: Event) -> dict[str, Any]:
        if isinstance(event, Text):
            return {"content": event.text}
        if isinstance(event, Reasoning):
            return _reasoning(event.text, self._field)
        if isinstance(event, CallBegin):
            self._n_calls += 1
            function = {"name": event.name, "arguments": ""}
            return self._call(id=generation.new_id("call_"), type="function", function=function)
        return self._call(function={"arguments": event.text})

    def _call(self, **fields: Any) -> dict[str, Any]:
        return {"tool_calls": [{"index": self._n_calls - 1, **fields}]}


async def _events(
    started: turn.Turn, chunks: Chunks, body: ChatRequest, deltas: Sequence[_Deltas]
) -> AsyncGenerator[bytes, None]:
    ends = []
    async with aclosing(started.outs()) as outs:
        for index in range(started.answer.n_choices):
            yield chunks.of(_choice(index, {"role": "assistant", "content": ""}))
        async for out in outs:
            logprobs = _logprobs(out.logprobs) if out.logprobs else None
            for said in out.events:
                delta = deltas[out.index].of(said)
                of_text = None
                if "content" in delta:  # all of them with the first text
                    of_text, logprobs = logprobs, None
                yield chunks.of(_choice(out.index, delta, of_text))
            if out.end:
                ends.append(out.end)
                deltas[out.index].are_over = True
                more: dict[str, Any] = {}
                if body.timings and len(ends) == started.answer.n_choices:
                    n_completion = sum(end.n_tokens for end in ends)
                    more = {"timings": started.answer.timings(n_completion)}
                end = _choice(out.index, {}, finish=out.end.finish) | validity(out.end.is_valid)
                yield chunks.of(end, **more)
    if body.include_usage:
        yield chunks.usage(started.usage(ends))


def _choice(
    index: int,
    delta: dict[str, Any],
    logprobs: dict[str, Any] | None = None,
    finish: turn.FinishReason | None = None,
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}


def _logprobs(tokens: Sequence[wire.TokenLogprob]) -> dict[str, Any]:
    return {"content": generation.logprobs(tokens), "refusal": None}
