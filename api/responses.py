"""POST /v1/responses, without a memory: each request brings the whole conversation."""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from api import generation, turn
from api.blocks import BlockReply, Data
from api.deps import ServicesDep
from api.fields import accepted
from api.responses_request import ResponsesRequest
from api.sampling import ALL_CONSTRAINTS, validity
from api.sse import Form, event
from api.transcript import packed_thoughts
from chat.events import CallBegin, Event, Reasoning
from engine import wire
from errors import BadRequest, ContextLengthExceeded, QueueFull, ServiceError
from tier import Tier

router = APIRouter()

# OpenAI's fields that this version does not have, with the values that ask for nothing
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    **ALL_CONSTRAINTS,
    "access_programs": (),
    "background": (False,),
    "background_options": (),
    "context_management": ([],),
    "conversation": (),
    "image": (),
    "moderation": (),
    "previous_response_id": (),
    "prompt": (),
}
INSTEAD = dict.fromkeys(ALL_CONSTRAINTS, "send `text.format`") | (
    dict.fromkeys(
        ("conversation", "previous_response_id"),
        "nothing is kept here: send the whole conversation (`store: false`)",
    )
)


@router.post("/v1/responses")
async def create_response(
    body: ResponsesRequest, request: Request, services: ServicesDep
) -> Response:
    tier = services.chat_tier(body.model)
    headers = accepted(body, request, services, UNSUPPORTED, INSTEAD)
    reply = _Reply(_head(body, tier), body.namespaces, packs_thoughts=body.packs_thoughts)
    form = Form(reply.pause, reply.failed)
    return await reply.answer(body, request, services, tier, headers, form)


def _head(body: ResponsesRequest, tier: Tier) -> dict[str, Any]:
    """What is known of the response before it begins."""
    chosen = body.tool_choice or "auto"
    wanted = body.format and body.format.model_dump(by_alias=True, exclude_unset=True)
    head = {
        "id": generation.new_id("resp_"),
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata or {},
        "model": tier.name,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": body.reasoning and body.reasoning.effort, "summary": None},
        "service_tier": generation.served_as(body.service_tier or "default"),
        "store": False,
        "temperature": _or(body.temperature, tier.settings.temperature),
        "text": {"format": wanted or {"type": "text"}, "verbosity": "medium"},
        "tool_choice": chosen if isinstance(chosen, str) else chosen.model_dump(exclude_unset=True),
        "tools": [tool.model_dump() for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": _or(body.top_p, tier.settings.top_p),
        "truncation": body.truncation or "disabled",
        "usage": None,
    }
    # of what clients wrote, halves of surrogate pairs and NaN are no JSON
    try:
        text = json.dumps(head, ensure_ascii=False).encode(errors="replace")
    except RecursionError:
        raise BadRequest("A schema is nested too deeply.", param="tools") from None
    known: dict[str, Any] = json.loads(text, parse_constant=lambda _: None)
    return known


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


class _Reply(BlockReply):
    """A Response; its output items are the blocks."""

    def __init__(
        self,
        head: dict[str, Any],
        namespaces: Mapping[str, tuple[str, str]],
        *,
        packs_thoughts: bool,
    ) -> None:
        super().__init__(head)
        self._namespaces = namespaces
        self._packs_thoughts = packs_thoughts
        self._output: list[dict[str, Any]] = head["output"]
        self._n_events = 0
        self._key = generation.new_id("")  # of the items' ids, by which clients may sort them

    def begin(self) -> Iterable[Data]:
        if not self._n_events:  # no pause has told of it
            yield self._event("response.created", response=self.whole)
            yield self._event("response.in_progress", response=self.whole)

    def open(self, first: Event) -> Iterable[Data]:
        if isinstance(first, CallBegin):
            call_id = generation.new_id("call_")
            named = {"name": first.name}
            if first.name in self._namespaces:
                named = dict(zip(("namespace", "name"), self._namespaces[first.name], strict=True))
            yield self._open("function_call", "fc_", call_id=call_id, **named, arguments="")
        elif isinstance(first, Reasoning):
            yield self._open("reasoning", "rs_", summary=[], content=[])
            yield self._open_part("reasoning_text")
        else:
            yield self._open("message", "msg_", role="assistant", content=[])
            yield self._open_part("output_text", annotations=[], logprobs=[])

    def _open(self, kind: str, prefix: str, **fields: Any) -> Data:
        item_id = f"{prefix}{self._key}{len(self._output):04}"
        self._output.append({"id": item_id, "type": kind, "status": "in_progress", **fields})
        return self._item_event("response.output_item.added")

    def _open_part(self, kind: str, **fields: Any) -> Data:
        part = {"type": kind, "text": "", **fields}
        self._output[-1]["content"].append(part)
        return self._part_event("response.content_part.added", part=part)

    def add(self, text: str, logprobs: Sequence[wire.TokenLogprob]) -> Iterable[Data]:
        item = self._output[-1]
        if item["type"] == "function_call":
            item["arguments"] += text
            yield self._delta_event("response.function_call_arguments.delta", delta=text)
            return
        (part,) = item["content"]
        part["text"] += text
        more = {}
        if "logprobs" in part:
            more["logprobs"] = generation.logprobs(logprobs)
            part["logprobs"] += more["logprobs"]
        yield self._part_event(f"response.{part['type']}.delta", delta=text, **more)

    def close(self, *, is_whole: bool) -> Iterable[Data]:
        item = self._output[-1]
        if item["type"] == "function_call":
            call = {name: item[name] for name in ("name", "arguments")}
            yield self._delta_event("response.function_call_arguments.done", **call)
        else:
            (part,) = item["content"]
            told = {name: part[name] for name in ("text", "logprobs") if name in part}
            yield self._part_event(f"response.{part['type']}.done", **told)
            yield self._part_event("response.content_part.done", part=part)
        if item["type"] == "reasoning" and self._packs_thoughts:
            item["encrypted_content"] = packed_thoughts(item["content"][0]["text"])
        item["status"] = _status(is_whole)
        yield self._item_event("response.output_item.done")

    def end(self, end: turn.End) -> Iterable[Data]:
        is_whole = end.finish != "length"
        self.whole |= {
            "status": _status(is_whole),
            "incomplete_details": None if is_whole else {"reason": "max_output_tokens"},
            "completed_at": int(time.time()) if is_whole else None,
            "usage": self._usage(end),
            **validity(end.is_valid),
        }
        yield self._event(f"response.{_status(is_whole)}", response=self.whole)

    def pause(self, **fields: Any) -> bytes:
        """Events that say nothing, of which the first there is must be that of a beginning."""
        return b"".join(map(event, [*self.begin(), self._event("keepalive", **fields)]))

    def failed(self, error: ServiceError) -> bytes:
        """The events of a reply that breaks off: OpenAI's last one, and one that its SDK raises."""
        begin = b"".join(map(event, self.begin()))
        self.whole |= {
            "status": "failed",
            "error": {"code": _code(error), "message": error.message},
        }
        last = self._event("response.failed", response=self.whole)
        fault = error.body()["error"]
        told = {name: fault[name] for name in ("code", "message", "param")}
        return begin + event(last) + event(self._event("error", **told, error=fault))

    def _usage(self, end: turn.End) -> dict[str, Any]:
        usage = self._started.usage([end])
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"] | {"cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": usage["completion_tokens_details"],
            "total_tokens": usage["total_tokens"],
        }

    def _event(self, kind: str, **fields: Any) -> Data:
        self._n_events += 1
        return {"type": kind, "sequence_number": self._n_events - 1, **fields}

    def _item_event(self, kind: str) -> Data:
        return self._event(kind, output_index=len(self._output) - 1, item=self._output[-1])

    def _delta_event(self, kind: str, **fields: Any) -> Data:
        item_id = self._output[-1]["id"]
        return self._event(kind, output_index=len(self._output) - 1, item_id=item_id, **fields)

    def _part_event(self, kind: str, **fields: Any) -> Data:
        return self._delta_event(kind, content_index=0, **fields)


def _code(error: ServiceError) -> str:
    """Of those that OpenAI has for a response, and the one that Codex looks for: by them agents
    know whether to try again."""
    if isinstance(error, ContextLengthExceeded):
        return "context_length_exceeded"
    if isinstance(error, BadRequest):
        return "invalid_prompt"
    return "rate_limit_exceeded" if isinstance(error, QueueFull) else "server_error"


def _status(is_whole: bool) -> str:
    return "completed" if is_whole else "incomplete"
