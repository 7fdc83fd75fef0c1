"""A tier's model on disk: what its header says, and what tells it from another."""

import hashlib
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from engine.chat_folder import read_chat_folder
from engine.model_file import Kind, ModelFile, read_model_file
from engine.model_folder import read_model_folder
from errors import ModelLoadFailed
from hub import Hub
from hub_model import FOLDER_BACKENDS
from settings import TierName, TierSettings
from worker_spec import effective_n_ctx

Signature = tuple[int, int]  # when a file was written, in ns, and its size


class ModelSource:
    """Where a tier's model is. The header is read when somebody asks, and again once the file has
    another signature."""

    def __init__(self, tier: TierName, settings: TierSettings, hub: Hub) -> None:
        self._tier = tier
        self._settings = settings
        self._hub = hub
        self._is_here = settings.hub_model is None
        self._model: ModelFile | None = None
        self._signature: Signature = 0, 0
        self._fingerprint = ""

    @property
    def settings(self) -> TierSettings:
        """The tier's, with the path of the file; of a model from the hub once it is here."""
        return self._settings

    def is_here(self) -> bool:
        """False while the model is still to be fetched from the hub."""
        if not self._is_here:
            model = self._settings.hub_model
            assert model is not None
            self._found(self._hub.cached(model, self._settings.backend))
        return self._is_here

    def fetch(self, on_progress: Callable[[float], None], is_wanted: Callable[[], bool]) -> None:
        """Download the model, if it is not here. Blocks; both functions are called in the thread
        that calls this. Raises ModelLoadFailed."""
        if not self.is_here():
            model = self._settings.hub_model
            assert model is not None
            self._found(self._hub.fetch(model, self._settings.backend, on_progress, is_wanted))

    def _found(self, path: Path | None) -> None:
        if path is not None:
            self._settings, self._is_here = self._settings.at(path), True

    def signature(self) -> Signature:
        """The file's, as it is now."""
        return _signature(self._settings.path)

    def read(self, *, is_loaded: bool) -> ModelFile:
        """The header; of a model that is loaded the one with which it was. Raises
        ModelLoadFailed."""
        if not self.is_here():
            raise ModelLoadFailed(f"{self._settings.model_path} is not downloaded yet.")
        if self._model is None or not is_loaded:
            signature = self.signature()
            if self._model is None or signature != self._signature:
                self._model = _read_model(self._tier, self._settings)
                self._signature = signature
                self._fingerprint = _fingerprint(self._settings, self._model, signature)
        return self._model

    @property
    def is_known(self) -> bool:
        """The header could be read before."""
        return self._model is not None

    @property
    def created(self) -> int:
        """When the file that was read was written, in seconds since 1970."""
        return self._signature[0] // 10**9 if self._settings.model_path else 0

    @property
    def fingerprint(self) -> str:
        """Of what was read: changes with all that changes answers (file, template, backend)."""
        return self._fingerprint


def _read_model(name: TierName, settings: TierSettings) -> ModelFile:
    wanted: Kind = "embedding" if name == "embedding" else "chat"
    wanted = "reranker" if name == "reranker" else wanted
    if settings.backend == "fake":
        from engine.backends import fake

        return fake.model_file(settings.model_path and settings.path, wanted)
    if settings.backend == "mlx" and wanted == "chat":
        return read_chat_folder(settings.path)
    is_folder = settings.backend in FOLDER_BACKENDS
    model = read_model_folder(settings.path) if is_folder else read_model_file(settings.path)
    is_told = settings.embedding_mode or settings.pooling != "auto"
    if wanted == "embedding" and model.kind == "chat" and is_told:
        return replace(model, kind="embedding")  # its file does not say so
    if model.kind != wanted:
        raise ModelLoadFailed(
            f"{model.path.name} is a model for {_PURPOSES[model.kind]} and not for "
            f"{_PURPOSES[wanted]}."
        )
    return model


_PURPOSES: dict[Kind, str] = {"chat": "chat", "embedding": "embeddings", "reranker": "reranking"}


def _fingerprint(settings: TierSettings, model: ModelFile, signature: object) -> str:
    library = {"llamacpp": "llama-cpp-python", "mlx": "mlx", "flag": "torch"}.get(
        settings.backend, ""
    )
    release = ""
    with suppress(PackageNotFoundError):
        release = version(library) if library else ""
    parts = [model.path.name, signature, model.chat_template, settings.backend, release]
    if model.kind != "chat":
        parts += (effective_n_ctx(settings, model), settings.pooling)
        parts += (settings.query_prefix, settings.passage_prefix)
        paths = {settings.head_path(settings.sparse_head_path)}
        paths.add(settings.head_path(settings.colbert_head_path))
        heads = [Path(path) for path in paths if path]
        for pattern in ("sparse_linear.*", "colbert_linear.*", "*.heads.safetensors"):
            folder = model.path if model.path.is_dir() else model.path.parent
            heads += folder.glob(pattern)
        parts += ((str(path), _signature(path)) for path in sorted(heads))
    return f"fp_{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}"


def _signature(path: Path) -> Signature:
    """Of a directory those of the files in it together."""
    try:
        status = path.stat()
        if not stat.S_ISDIR(status.st_mode):
            return status.st_mtime_ns, status.st_size
        files = [file.stat() for file in path.iterdir() if file.is_file()]
    except OSError:
        return 0, 0
    written_at = max((file.st_mtime_ns for file in files), default=status.st_mtime_ns)
    return written_at, sum(file.st_size for file in files)
