"""GET and DELETE /v1/cache; and what /metrics says of it."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, Literal

from fastapi import APIRouter
from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.responses import JSONResponse, Response

from api.deps import ADMIN_ONLY, Services, ServicesDep
from cache import Cache, CacheStats

router = APIRouter()

Kind = Literal["answer", "dense", "sparse", "colbert", "tokens", "score", "conversion"]


@router.get("/v1/cache")
async def show(services: ServicesDep) -> Response:
    return JSONResponse(await _described(services))


@router.delete("/v1/cache", dependencies=[ADMIN_ONLY])
async def clear(services: ServicesDep, kind: Kind | None = None) -> Response:
    """Forget everything, or all of a kind. Answered when that is so."""
    if services.cache is not None:
        await services.cache.clear(kind)
    return JSONResponse(await _described(services))


async def _described(services: Services) -> dict[str, Any]:
    server = services.settings.server
    body: dict[str, Any] = {"object": "cache", "enabled": services.cache is not None}
    if services.cache is None:
        return body
    stats = await services.cache.stats()
    disk = None
    if stats.disk is not None:
        disk = {
            "max_bytes": server.cache_disk_max_mb << 20,
            "size_bytes": stats.disk.file_bytes,
            "dropped": stats.disk.dropped,
            "is_resting": stats.disk.is_resting,
        }
    return body | {
        "policy": server.cache_policy,
        "max_bytes": server.cache_max_mb << 20,
        "size_bytes": sum(kind.size_bytes for kind in stats.kinds.values()),
        "ttl_s": server.cache_ttl_s,
        "kinds": {kind: asdict(of_kind) for kind, of_kind in sorted(stats.kinds.items())},
        "disk": disk,
    }


async def metrics_text(cache: Cache | None) -> bytes:
    """Its part of /metrics."""
    return b"" if cache is None else generate_latest(_Counted(await cache.stats()))


class _Counted(Collector):
    """Statistics as Prometheus reads them."""

    def __init__(self, stats: CacheStats) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        kinds = self._stats.kinds.items()
        for name, about in (
            ("hits", "Results that were remembered"),
            ("disk_hits", "Of them: on disk"),
            ("misses", "Results that were looked up in vain"),
            ("joins", "Results that were shared with another request while they were made"),
            ("evictions", "Results that left the memory for others"),
        ):
            counter = CounterMetricFamily(f"quintet_cache_{name}", about, labels=["kind"])
            for kind, of_kind in kinds:
                counter.add_metric([kind], getattr(of_kind, name))
            yield counter
        disk = CounterMetricFamily(
            "quintet_cache_disk_evictions", "Results that left the disk", labels=["kind"]
        )
        for kind, of_kind in kinds:
            disk.add_metric([kind], of_kind.disk.evictions)
        yield disk
        for name, about in (
            ("entries", "Results that are remembered"),
            ("size_bytes", "What they take"),
        ):
            gauge = GaugeMetricFamily(f"quintet_cache_{name}", about, labels=["kind", "store"])
            for kind, of_kind in kinds:
                gauge.add_metric([kind, "memory"], getattr(of_kind, name))
                gauge.add_metric([kind, "disk"], getattr(of_kind.disk, name))
            yield gauge
        if (store := self._stats.disk) is not None:
            about = "Results that were not written to the disk"
            yield CounterMetricFamily("quintet_cache_dropped_writes", about, store.dropped)
            about = "The cache's file, with its log"
            yield GaugeMetricFamily("quintet_cache_file_bytes", about, store.file_bytes)
