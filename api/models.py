"""GET /v1/models, GET /v1/models/{id} and GET /health: what is configured, and how it is."""

from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timezone
from typing import Any

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from api.deps import ServicesDep
from errors import ModelLoadFailed
from settings import CHAT_TIERS, TierName
from tier import Tier

router = APIRouter()

CAPABILITIES: dict[TierName, list[str]] = {
    **{name: ["chat", "completion"] for name in CHAT_TIERS},
    "embedding": ["embedding"],
    "reranker": ["rerank"],
}


@router.get("/v1/models")
def list_models(request: Request, services: ServicesDep) -> Response:
    manager = services.manager
    models = [describe(tier) for tier in manager.tiers.values()]
    if (stand_in := manager.stand_in) is not None:
        models.append(_stand_in(stand_in, manager.stand_in_aliases))
    listed = {"object": "list", "data": [_told(model, request) for model in models]}
    ends = {"first_id": models[0]["id"], "last_id": models[-1]["id"]} if models else {}
    more = {"has_more": False, **ends} if _is_anthropics(request) else {}
    return JSONResponse(listed | more)


@router.get("/v1/models/{model:path}")
def retrieve_model(model: str, request: Request, services: ServicesDep) -> Response:
    if not model.strip("/"):
        raise HTTPException(404)  # a slash too many behind /v1/models
    manager = services.manager
    tier = manager.resolve(model)
    if tier is manager.stand_in and manager.means_reranker(model):
        about = _stand_in(tier, manager.stand_in_aliases)
    else:
        about = describe(tier)
    return JSONResponse(_told(about, request))


@router.get("/health")
def health(services: ServicesDep) -> Response:
    """503 while a tier that was to be loaded at start cannot be; else 200."""
    tiers = services.manager.tiers.values()
    states = {tier.name: state_of(tier) for tier in tiers}
    failed = any(
        t.settings.preload and (states[t.name]["state"] == "failed" or t.has_failed_to_preload)
        for t in tiers
    )
    body = {"status": "failed" if failed else "ok", "tiers": states}
    return JSONResponse(body, status_code=503 if failed else 200)


def describe(tier: Tier) -> dict[str, Any]:
    """The model object; what it says of the model comes from the file's header."""
    about: dict[str, Any] = {
        "id": tier.name,
        "object": "model",
        "created": 0,
        "owned_by": "quintet",
        "tier": tier.name,
        "path": tier.settings.path.name if tier.settings.model_path else None,
        "backend": tier.settings.backend,
        "context_length": None,
        "capabilities": CAPABILITIES[tier.name],
        "aliases": tier.aliases,
    }
    with suppress(ModelLoadFailed):  # the state says so
        about |= {"context_length": tier.n_ctx, "created": tier.created}
    if (encoder := tier.encoder) is not None:  # known once it has been loaded
        about |= {"vectors": encoder.outputs, "methods": encoder.methods}
        about |= {"dimensions": encoder.n_embd} if encoder.outputs else {}
    with suppress(ModelLoadFailed):
        about["memory"] = {"estimated_bytes": tier.life.footprint().loaded} | (
            {} if (measured := tier.life.memory_bytes) is None else {"measured_bytes": measured}
        )
    return about | state_of(tier)


def _stand_in(tier: Tier, aliases: Sequence[str]) -> dict[str, Any]:
    """`reranker` where it has no model of its own."""
    names: dict[str, Any] = {
        "id": "reranker",
        "tier": "reranker",
        "served_by": tier.name,
        "aliases": aliases,
    }
    return describe(tier) | names | {"capabilities": CAPABILITIES["reranker"]}


def _is_anthropics(request: Request) -> bool:
    """It comes from a client of Anthropic's API, all of which say a version."""
    return "anthropic-version" in request.headers


def _told(about: dict[str, Any], request: Request) -> dict[str, Any]:
    """The model object as the client knows it. To others `type` says other things: LobeChat shows
    no model but those of type `chat`, or of none."""
    if not _is_anthropics(request):
        return about
    created_at = datetime.fromtimestamp(about["created"], timezone.utc).isoformat()
    return about | {"type": "model", "display_name": about["id"], "created_at": created_at}


def state_of(tier: Tier) -> dict[str, Any]:
    state, reason = tier.life.status()
    about: dict[str, Any] = {"state": state}
    if state in ("starting", "downloading"):
        about["progress"] = round(tier.life.progress, 2)
    if reason is not None:
        about["reason"] = reason
    return about
