"""Embeddings in the form of text-embeddings-inference: POST /embed, which is POST / too, POST
/embed_sparse and GET /info. It knows one model: here the embedding tier."""

from typing import Annotated

import msgspec
from fastapi import APIRouter, Request
from pydantic import BeforeValidator, Field
from starlette.responses import JSONResponse, Response

from api.deps import Services, ServicesDep, fetched, while_connected
from api.embeddings import MAX_INPUTS, OneOrMore, cut_of, role_of
from api.errors import client_names
from api.fields import Direction, Extensible, accepted, read_truncate
from api.vectors import as_pooled, encoded, of_length_1, sparse, truncated_header
from engine import wire
from engine.types import Output
from settings import InputType
from tier import Tier

router = APIRouter()

TIER = "embedding"


class SparseRequest(Extensible):
    inputs: OneOrMore
    truncate: bool | None = None
    truncation_direction: Direction | None = None
    prompt_name: InputType | None = None  # by which the model's own prompts are called


class EmbedRequest(SparseRequest):
    normalize: Annotated[bool, BeforeValidator(lambda v: True if v is None else v)] = True
    dimensions: Annotated[int, Field(ge=1, lt=2**31)] | None = None


@router.post("/")
@router.post("/embed")
async def embed(body: EmbedRequest, request: Request, services: ServicesDep) -> Response:
    tier = services.embedding_tier(TIER)
    headers = accepted(body, request, services)
    await fetched(request.receive, tier)
    cut = cut_of(tier, body.dimensions, ["dense"])
    vectors = await _vectors(services, tier, body, "dense", request, headers)

    def content() -> bytes:
        made = of_length_1 if body.normalize else as_pooled
        rows = [msgspec.json.encode(made(vector, cut).tolist()) for vector in vectors]
        return b"[" + b",".join(rows) + b"]"

    packed = await encoded(vectors, content)
    return Response(packed, media_type="application/json", headers=headers)


@router.post("/embed_sparse")
async def embed_sparse(body: SparseRequest, request: Request, services: ServicesDep) -> Response:
    tier = services.embedding_tier(TIER)
    headers = accepted(body, request, services)
    await fetched(request.receive, tier)
    vectors = await _vectors(services, tier, body, "sparse", request, headers)

    def content() -> bytes:
        pairs = (zip(*sparse(vector), strict=True) for vector in vectors)
        return msgspec.json.encode([[{"index": i, "value": w} for i, w in of] for of in pairs])

    packed = await encoded(vectors, content)
    return Response(packed, media_type="application/json", headers=headers)


@router.get("/info")
async def info(request: Request, services: ServicesDep) -> Response:
    tier = services.embedding_tier(TIER)
    await fetched(request.receive, tier)
    return JSONResponse(
        {
            "model_id": tier.model().name or tier.model().path.stem,
            "max_input_length": tier.n_ctx,
            "max_batch_tokens": tier.settings.batch_tokens,
            "max_client_batch_size": MAX_INPUTS,
        }
    )


async def _vectors(
    services: Services,
    tier: Tier,
    body: SparseRequest,
    output: Output,
    request: Request,
    headers: dict[str, str],
) -> list[wire.Vector]:
    """The vectors of the request; adds to its headers what was cut and what the cache had."""
    asked = wire.Embed(
        inputs=[*body.inputs],
        outputs=[output],
        truncate=read_truncate(body.truncate, body.truncation_direction, tier.settings.truncate),
        role=role_of(tier, body.prompt_name),
    )
    names = {r"^input$": "inputs", r"^return_sparse$": "inputs"}
    caching = services.caching(request)
    with client_names(names):
        work = services.lookups.vectors(tier, asked, caching)
        found = await while_connected(request.receive, work)
    vectors = [vector.item for vector in found]
    headers |= caching.headers()
    headers |= truncated_header((str(vector.index), vector.n_cut) for vector in vectors)
    return vectors
