"""What a worker is told: the settings of a tier, with what depends on model and machine decided."""

import os

import psutil

from engine import wire
from engine.llama_limits import CELLS, LEAST_IN_LANES, LEAST_IN_PLAIN_LANES
from engine.machine import n_cores, total_bytes
from engine.model_file import ModelFile
from settings import ServerSettings, TierSettings

DEFAULT_N_CTX = 8192
KV_SHARE_OF_MEMORY = 1 / 64  # for one tier; each cell is cleared at the start, which takes time
# Nanoseconds on a core with AVX2: to look whether a cell is a sequence's own, and a byte of the
# weights for a token in a batch.
LOOK_NS, BYTE_NS = 6, 0.12
LANES_GAIN = 0.25  # of a token's time, where all cells are in use
PREFIX_CACHE_SHARE_OF_MEMORY = 1 / 32  # where PREFIX_CACHE_MB is not set


def worker_spec(
    name: str, settings: TierSettings, model: ModelFile, server: ServerSettings
) -> wire.WorkerSpec:
    """What a worker is told, with the values that depend on the model and the machine decided."""
    n_ctx = effective_n_ctx(settings, model)
    kv_tokens = settings.kv_tokens or default_kv_tokens(n_ctx, settings.n_parallel, model)
    n_short = model.n_ctx_short // CELLS * CELLS  # llama.cpp rounds cells up to these
    if n_ctx <= n_short:  # or memory and N_PARALLEL would decide the numbers of all requests
        kv_tokens = min(kv_tokens, n_short)
    least = LEAST_IN_LANES if settings.flash_attention else LEAST_IN_PLAIN_LANES
    encoder = None
    if model.kind != "chat":
        encoder = wire.EncoderSpec(
            kind=model.kind,
            batch_tokens=settings.batch_tokens,
            pooling=None if settings.pooling == "auto" else settings.pooling,
            query_prefix=settings.query_prefix,
            passage_prefix=settings.passage_prefix,
            sparse_head_path=settings.head_path(settings.sparse_head_path),
            colbert_head_path=settings.head_path(settings.colbert_head_path),
        )
    return wire.WorkerSpec(
        name=name,
        backend=settings.backend,
        model_path=str(settings.path) if settings.model_path else "",
        n_ctx=n_ctx,
        n_parallel=settings.n_parallel,
        kv_tokens=kv_tokens,
        lane_tokens=lane_tokens(n_ctx, settings.n_parallel, kv_tokens, model)
        if settings.backend == "llamacpp" and model.kind == "chat" and settings.n_parallel >= least
        else 0,
        n_batch=settings.n_batch,
        n_threads=settings.n_threads or default_n_threads(),
        n_gpu_layers=settings.n_gpu_layers,
        max_stall_s=None if settings.max_stall_ms is None else settings.max_stall_ms / 1e3,
        prefix_cache_bytes=int(total_bytes() * PREFIX_CACHE_SHARE_OF_MEMORY)
        if settings.prefix_cache_mb is None
        else settings.prefix_cache_mb << 20,
        speculates=settings.speculation and encoder is None,
        flash_attention=settings.flash_attention or encoder is not None,
        log_level=server.log_level,
        log_format=server.log_format,
        encoder=encoder,
    )


def effective_n_ctx(settings: TierSettings, model: ModelFile) -> int:
    """Most tokens of one request: what is set, or else what the model allows and, where text is
    generated, the cells."""
    n_cells = settings.kv_tokens if model.kind == "chat" else None
    n_ctx = settings.n_ctx or min(DEFAULT_N_CTX, n_cells or DEFAULT_N_CTX)
    return min(n_ctx, model.n_ctx_train)


def default_kv_tokens(n_ctx: int, n_parallel: int, model: ModelFile) -> int:
    """Room for every sequence to be full, less where that is much of the memory."""
    affordable = total_bytes() * KV_SHARE_OF_MEMORY
    affordable /= max(model.kv_bytes_per_token, 1)
    return max(n_ctx, min(n_ctx * n_parallel, int(affordable)))


def lane_tokens(n_ctx: int, n_parallel: int, kv_tokens: int, model: ModelFile) -> int:
    """Cells apart for each sequence, where attention would look for them among those of all for a
    good part of its time: in small models with many cells. 0 elsewhere."""
    look_ns = LOOK_NS * model.n_layer * model.n_head * kv_tokens
    if not model.has_plain_cells or look_ns < LANES_GAIN * BYTE_NS * model.size_bytes:
        return 0
    n_ctx = -(-n_ctx // CELLS) * CELLS
    return min(n_ctx, kv_tokens // n_parallel // CELLS * CELLS)


def default_n_threads() -> int:
    """Physical cores that this process may use; their second threads only get in the way."""
    n_physical = psutil.cpu_count(logical=False) or os.cpu_count() or 1  # not every system tells
    return max(1, min(n_physical, int(n_cores())))
