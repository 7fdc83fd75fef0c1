"""A tier's model on disk: what its header says, and what tells it from another."""

import hashlib
import os
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec

from engine.chat_folder import read_chat_folder
from engine.file_names import HEAD_FILES
from engine.model_file import Kind, ModelFile, name_of, read_model_file
from engine.model_folder import read_model_folder
from errors import ModelLoadFailed
from hub import Hub
from hub_model import FOLDER_BACKENDS
from settings import ENCODER_TIERS, ServerSettings, TierName, TierSettings
from worker_spec import worker_spec

Signature = tuple[int, int]  # when a file was written, in ns; its size, or a directory's digest
LIBRARIES = {  # that compute
    "llamacpp": ["llama-cpp-python"],
    "mlx": ["mlx", "mlx-lm"],
    "onnx": ["onnxruntime", "onnx"],
    "flag": ["torch", "transformers", "FlagEmbedding"],
}
RESULTS = 8  # of our own code: another number where it makes others of the same model and request
HEADER_BYTES = 1 << 20  # of a model's file, that are compared byte for byte
# Of what a worker is told: how fast and for how many it answers, not what.
NOT_DECISIVE = {
    "name", "log_level", "log_format", "n_parallel", "kv_tokens", "lane_tokens", "n_threads",
    "max_stall_s", "prefix_cache_bytes",
}  # fmt: skip


class ModelSource:
    """Where a tier's model is. The header is read when somebody asks, and again once the file has
    another signature."""

    def __init__(self, tier: TierName, settings: TierSettings, hub: Hub) -> None:
        self._tier = tier
        self._settings = settings
        self._path = settings.path  # which takes a while to make, and is asked for each request
        self._hub = hub
        self._is_here = settings.hub_model is None
        self._model: ModelFile | None = None
        self._signature: Signature = 0, 0
        self._heads: list[tuple[str, Signature]] = []
        self._identity = ""

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

    @property
    def fault(self) -> str | None:
        """Why the model is not here and is not fetched either."""
        model = self._settings.hub_model
        return None if model is None or self.is_here() else self._hub.refuses(model)

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
            self._path = self._settings.path

    def signature(self) -> Signature:
        """The file's, as it is now."""
        return _signature(self._path) if self._settings.model_path else (0, 0)

    def read(self, *, is_loaded: bool) -> ModelFile:
        """The header; of a model that is loaded the one with which it was. Raises
        ModelLoadFailed."""
        if not self.is_here():
            raise ModelLoadFailed(f"{self._settings.model_path} is not downloaded yet.")
        if self._model is None or not is_loaded:
            signature, heads = self.signature(), _heads(self._tier, self._settings, self._path)
            if self._model is None or (signature, heads) != (self._signature, self._heads):
                model = _read_model(self._tier, self._settings)
                self._signature, self._heads = signature, heads
                self._identity = _identity(self._settings, model, signature, heads)
                self._model = model
        return self._model

    def is_unchanged(self) -> bool:
        """What is on disk is what was read."""
        heads = _heads(self._tier, self._settings, self._path)
        return self.is_known and (self.signature(), heads) == (self._signature, self._heads)

    def was_loaded(self) -> None:
        """A worker has just loaded it. If it was replaced since it was read nobody knows which of
        the two that is: neither, then."""
        if not self.is_unchanged():
            self._signature = self._signature[0], -1
            self._identity += " or another"

    @property
    def is_known(self) -> bool:
        """The header could be read before."""
        return self._model is not None

    @property
    def created(self) -> int:
        """When the file that was read was written, in seconds since 1970."""
        return self._signature[0] // 10**9 if self._settings.model_path else 0

    @property
    def identity(self) -> str:
        """Of what was read: stands for all of the model, its library and its settings that decides
        what a request for it is answered."""
        return self._identity


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
            f"{name_of(model.path)} is a model for {_PURPOSES[model.kind]} and not for "
            f"{_PURPOSES[wanted]}."
        )
    return model


_PURPOSES: dict[Kind, str] = {"chat": "chat", "embedding": "embeddings", "reranker": "reranking"}


def _identity(
    settings: TierSettings,
    model: ModelFile,
    signature: Signature,
    heads: Sequence[tuple[str, Signature]],
) -> str:
    told = msgspec.structs.asdict(
        worker_spec("", settings, model, ServerSettings.model_construct())
    )
    decisive = sorted((name, told[name]) for name in told.keys() - NOT_DECISIVE)
    header = _begin(settings.path) if settings.model_path else b""
    releases = [RESULTS, *_release(settings)]
    parts = (signature, sorted(asdict(model).items()), header, heads, releases, decisive)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _release(settings: TierSettings) -> list[str]:
    releases = []
    for name in LIBRARIES.get(settings.backend, ()):
        with suppress(PackageNotFoundError):
            releases.append(version(name))
    return releases


def _begin(path: Path) -> bytes:
    """The beginning of a file; of a directory nothing, whose signature has all that is in it."""
    with suppress(OSError), path.open("rb") as file:
        return file.read(HEADER_BYTES)
    return b""


def _heads(tier: TierName, settings: TierSettings, model: Path) -> list[tuple[str, Signature]]:
    """The files with the heads of an encoder, where there are any. Asked for each request."""
    if tier not in ENCODER_TIERS or not settings.model_path:
        return []
    named = {settings.head_path(settings.sparse_head_path)}
    named.add(settings.head_path(settings.colbert_head_path))
    folder = str(model if os.path.isdir(model) else model.parent)
    with suppress(OSError):
        files = filter(HEAD_FILES.fullmatch, os.listdir(folder))
        named.update(f"{folder}/{name}" for name in files)
    return [(path, _signature(Path(path))) for path in sorted(named) if path]


def _signature(path: Path) -> Signature:
    """Of a directory those of the files in it and one level below together, as 1_Pooling has one:
    the last time, and a digest of all."""
    try:
        status = path.stat()
        if not stat.S_ISDIR(status.st_mode):
            return status.st_mtime_ns, status.st_size
        found = (file for pattern in ("*", "[!.]*/*") for file in path.glob(pattern))
        files = [(str(file), file.stat()) for file in found if file.is_file()]
    except OSError:
        return 0, 0
    each = sorted((name, file.st_mtime_ns, file.st_size) for name, file in files)
    written_at = max((file.st_mtime_ns for _, file in files), default=status.st_mtime_ns)
    return written_at, int.from_bytes(hashlib.sha256(repr(each).encode()).digest()[:8], "big")
