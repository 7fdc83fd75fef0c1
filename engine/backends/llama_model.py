"""Models of llama.cpp: how they are loaded, and what it says meanwhile."""

import ctypes
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import llama_cpp as lib
import numpy.typing as npt

from engine.backends.base import ReportProgress
from engine.wire import WorkerSpec
from errors import ModelLoadFailed

logger = logging.getLogger("llama.cpp")


class Error(Exception):
    """A call into llama.cpp failed."""


def load_model(
    spec: WorkerSpec, progress: ReportProgress, log: "LlamaLog", metadata: Mapping[str, bool] = {}
) -> Any:
    """A model; `metadata` is read in place of what the file says."""
    params = lib.llama_model_default_params()
    params.n_gpu_layers = spec.n_gpu_layers
    overrides = (lib.llama_model_kv_override * (len(metadata) + 1))()  # an empty key ends it
    for override, (key, value) in zip(overrides, metadata.items(), strict=False):
        override.tag = lib.LLAMA_KV_OVERRIDE_TYPE_BOOL
        override.key = key.encode()
        override.value.val_bool = value
    if metadata:
        params.kv_overrides = overrides

    @lib.llama_progress_callback  # type: ignore[untyped-decorator]
    def go_on(fraction: float, _: Any) -> bool:
        progress(fraction)
        return True

    params.progress_callback = go_on
    model = lib.llama_model_load_from_file(spec.model_path.encode(), params)
    if not model:
        raise ModelLoadFailed(f"llama.cpp cannot load {name_of(spec)}: {reason_of(spec, log)}.")
    where = "with a GPU" if has_gpu(spec) else "on the CPU"
    logger.info("%s is computed %s", name_of(spec), where)
    return model


def meta_text(model: Any, key: str) -> str:
    """What the file says; nothing where it does not."""
    buffer = ctypes.create_string_buffer(64)
    lib.llama_model_meta_val_str(model, key.encode(), buffer, len(buffer))
    return buffer.value.decode(errors="replace")


def has_gpu(spec: WorkerSpec) -> bool:
    return spec.n_gpu_layers != 0 and lib.llama_supports_gpu_offload()


def name_of(spec: WorkerSpec) -> str:
    return Path(spec.model_path).name


def reason_of(spec: WorkerSpec, log: "LlamaLog") -> str:
    """Why llama.cpp failed, without the folder of the file: clients read it."""
    return (log.reason or "it gives no reason").replace(spec.model_path, name_of(spec))


class LlamaLog:
    """Sends llama.cpp's log to `logging`, and remembers the reason of a failure."""

    # ggml.h: 1 debug, 2 info, 3 warning, 4 error, 5 goes on with the line before
    LEVELS: ClassVar = {3: logging.WARNING, 4: logging.ERROR}  # its info is chatter: DEBUG
    KNOWN = (
        "possible training context overflow",  # cells are for all; we bound each one's length
        "model default pooling_type is",  # we pool ourselves
        "model vocab missing newline token",  # encoders need none
        "failed to find a memory slot",  # then there are less tokens, or fewer sequences
        # of a step that is broken off
        "removing memory module entries",
        "graph_compute_async failed with error 1",
        "compute status: 1",
        "failed to decode, ret = 2",
    )

    _in_use: ClassVar[Any] = None  # of the process: llama.cpp may call it at any time from now on

    def __init__(self) -> None:
        self.is_muted = False  # while what it says is of our doing
        self.reason: str | None = None  # the first error; the later ones only say that it failed
        LlamaLog._in_use = lib.llama_log_callback(self._write)
        lib.llama_log_set(LlamaLog._in_use, ctypes.c_void_p(0))

    def _write(self, level: int, text: bytes, _: Any) -> None:
        line = text.decode(errors="replace").rstrip()
        if not line.strip("."):
            return
        if self.is_muted or any(known in line for known in self.KNOWN):
            level = 2
        logger.log(self.LEVELS.get(level, logging.DEBUG), line)
        if level == 4 and self.reason is None:
            self.reason = line.rpartition("error loading model: ")[2]


def pointer(array: "npt.NDArray[Any]", field: str) -> Any:
    return array.ctypes.data_as(dict(lib.llama_batch._fields_)[field])
