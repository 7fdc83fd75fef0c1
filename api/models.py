"""GET /v1/models, GET /v1/models/{id} and GET /health: what is configured, and how it is."""

from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timezone
from typing import Any

from fastapi import APIRouter
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
def list_models(services: ServicesDep) -> Response:
    manager = services.manager
    models = [describe(tier) for tier in manager.tiers.values()]
    if (stand_in := manager.stand_in) is not None:
        models.append(_stand_in(stand_in, manager.stand_in_aliases))
    ends = {"first_id": models[0]["id"], "last_id": models[-1]["id"]} if models else {}
    return JSONResponse({"object": "list", "data": models, "has_more": False, **ends})


@router.get("/v1/models/{model:path}")
def retrieve_model(model: str, services: ServicesDep) -> Response:
    if not model.strip("/"):
        raise HTTPException(404)  # a slash too many behind /v1/models
    manager = services.manager
    tier = manager.resolve(model)
    if tier is manager.stand_in and manager.means_reranker(model):
        return JSONResponse(_stand_in(tier, manager.stand_in_aliases))
    return JSONResponse(describe(tier))


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
    created_at = datetime.fromtimestamp(about["created"], timezone.utc).isoformat()
    in_anthropics_form = {"type": "model", "display_name": about["id"], "created_at": created_at}
    return about | in_anthropics_form | state_of(tier)


def _stand_in(tier: Tier, aliases: Sequence[str]) -> dict[str, Any]:
    """`reranker` where it has no model of its own."""
    names: dict[str, Any] = {
        "id": "reranker",
        "display_name": "reranker",
        "tier": "reranker",
        "served_by": tier.name,
        "aliases": aliases,
    }
    return describe(tier) | names | {"capabilities": CAPABILITIES["reranker"]}


def state_of(tier: Tier) -> dict[str, Any]:
    state, reason = tier.life.status()
    about: dict[str, Any] = {"state": state}
    if state in ("starting", "downloading"):
        about["progress"] = round(tier.life.progress, 2)
    if reason is not None:
        about["reason"] = reason
    return about
