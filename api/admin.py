"""GET /ready and /metrics, and what changes the service: POST /v1/models/{id}/load and /unload."""

import asyncio
from collections.abc import Iterator

from fastapi import APIRouter, Request
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from pydantic import BaseModel
from starlette.responses import JSONResponse, Response

from api.cache import metrics_text
from api.deps import ADMIN_ONLY, ServicesDep, while_connected
from api.models import describe, state_of
from metrics import CONTENT_TYPE, gauge
from model_manager import ModelManager

router = APIRouter()


class UnloadRequest(BaseModel):
    force: bool = False  # end the requests that are in the model


@router.get("/ready")
def ready(services: ServicesDep, tier: str | None = None) -> Response:
    """200 when every tier (or the one that is asked for) is loaded or can be tried; else 503."""
    manager = services.manager
    tiers = manager.tiers.values() if tier is None else [manager.resolve(tier)]
    states = {tier.name: state_of(tier) for tier in tiers}
    is_ready = all(tier.life.can_be_tried for tier in tiers)
    body = {"status": "ready" if is_ready else "not ready", "tiers": states}
    return JSONResponse(body, status_code=200 if is_ready else 503)


@router.post("/v1/models/{model:path}/load", dependencies=[ADMIN_ONLY])
async def load(model: str, request: Request, services: ServicesDep) -> Response:
    """Answered when the model is loaded."""
    tier = services.manager.resolve(model)
    await while_connected(request.receive, tier.load())
    return JSONResponse(await asyncio.to_thread(describe, tier))


@router.post("/v1/models/{model:path}/unload", dependencies=[ADMIN_ONLY])
async def unload(
    model: str, request: Request, services: ServicesDep, body: UnloadRequest | None = None
) -> Response:
    """Answered when its memory is free."""
    tier = services.manager.resolve(model)
    work = tier.unload(force=body is not None and body.force)
    await while_connected(request.receive, work)
    return JSONResponse(await asyncio.to_thread(describe, tier))


@router.get("/metrics")
async def metrics(services: ServicesDep) -> Response:
    text = await asyncio.to_thread(services.manager.metrics.text)
    text += await metrics_text(services.cache)
    return Response(text, media_type=CONTENT_TYPE)


class TierGauges(Collector):
    """How the tiers are at the moment of asking."""

    def __init__(self, manager: ModelManager) -> None:
        self._manager = manager

    def collect(self) -> Iterator[GaugeMetricFamily]:
        tiers = list(self._manager.tiers.values())
        yield gauge("queue_depth", "Requests that wait", ((t.name, t.n_waiting) for t in tiers))
        yield gauge(
            "running_requests", "Requests in the model", ((t.name, t.n_running) for t in tiers)
        )
        yield gauge("model_loaded", "1: loaded", ((t.name, t.state == "ready") for t in tiers))
        yield gauge(
            "model_failed", "1: cannot be loaded",
            ((t.name, t.life.status()[0] == "failed") for t in tiers),
        )  # fmt: skip
        yield gauge(
            "worker_memory_bytes", "Memory of the worker as measured",
            ((t.name, t.life.memory_bytes or 0) for t in tiers),
        )  # fmt: skip
        yield gauge(
            "worker_memory_estimated_bytes", "Memory set aside for it, as estimated at its start",
            ((t.name, occupant.n_bytes if (occupant := t.occupant()) else 0) for t in tiers),
        )  # fmt: skip
        n_bytes = self._manager.room.limit_bytes
        yield GaugeMetricFamily("quintet_memory_limit_bytes", "MEMORY_LIMIT", n_bytes)
