"""POST /tokenize, /detokenize and /apply-template: what the models read, in llama-server's form."""

import asyncio
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from api.chat_request import Conversation
from api.deps import ServicesDep, fetched, while_connected
from api.errors import client_names
from api.fields import Extensible, Switch, Token, WholeText, accepted, with_ignored
from api.prompt import prompt_of
from engine import wire

router = APIRouter()

MAX_LENGTH = 1 << 20  # characters of a text, ids of a list: it holds up those who ask after it


class ModelFields(Extensible):
    model: str | None = None  # may be left out where one tier generates text


class TokenizeRequest(ModelFields):
    content: Annotated[WholeText, Field(max_length=MAX_LENGTH)]
    add_special: Switch = False  # begin with BOS, if the model wants one
    parse_special: bool | None = None  # false: control tokens are plain text
    with_pieces: Switch = False


class DetokenizeRequest(ModelFields):
    tokens: Annotated[list[Token], Field(max_length=MAX_LENGTH, fail_fast=True)]


class ApplyTemplateRequest(Conversation, ModelFields):
    pass


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, request: Request, services: ServicesDep) -> Response:
    tier = services.chat_tier(body.model)
    headers = accepted(body, request, services)
    segment = wire.Segment(body.content, parse_special=body.parse_special is not False)
    work = tier.tokenize([segment], add_bos=body.add_special)
    with client_names({"^prompt$": "content"}):
        tokens = await while_connected(request.receive, work)
    if not body.with_pieces:
        return _reply({"tokens": tokens.ids}, headers)
    pieces = await asyncio.to_thread(_with_pieces, tokens)
    return _reply({"tokens": pieces}, headers)


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, request: Request, services: ServicesDep) -> Response:
    tier = services.chat_tier(body.model)
    headers = accepted(body, request, services)
    text = await while_connected(request.receive, tier.detokenize(body.tokens))
    return _reply({"content": text}, headers)


@router.post("/apply-template")
async def apply_template(
    body: ApplyTemplateRequest, request: Request, services: ServicesDep
) -> Response:
    tier = services.chat_tier(body.model)
    await fetched(request.receive, tier)
    headers = accepted(body, request, services)
    prompt = await asyncio.to_thread(prompt_of, services, tier, body)
    headers = with_ignored(headers, prompt.idle)
    return _reply({"prompt": "".join(segment.text for segment in prompt.segments)}, headers)


def _with_pieces(tokens: wire.Tokens) -> list[dict[str, Any]]:
    return [
        {"id": token, "piece": _piece(piece)}
        for token, piece in zip(tokens.ids, tokens.pieces, strict=True)
    ]


def _piece(piece: bytes) -> str | list[int]:
    """The text, or the values of the bytes where they are no whole characters."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return list(piece)


def _reply(body: dict[str, Any], headers: dict[str, str]) -> Response:
    return Response(msgspec.json.encode(body), media_type="application/json", headers=headers)
