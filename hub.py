"""The Hugging Face hub, and how the files of a model come here from it.

They lie in the hub's own cache, which other programs share:

    models--owner--repo/blobs/<hash>             files, named by the hash of what is in them
    models--owner--repo/blobs/<hash>.incomplete  the beginning of one
    models--owner--repo/snapshots/<commit>/…     links to them, under their names
    models--owner--repo/refs/main                which commit that is
    models--owner--repo/quintet/<commit>.json    ours: the names of all files that the hub has of it

huggingface_hub asks the hub what there is, and knows the token; the bytes are read by ourselves.
Links are made last, when every file of a model is there and has its hash: what has a name is whole.
Other programs fetch what they have a use for, and no more; so of what they left the hub is asked
once what else there is.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from errno import EDQUOT, ENOSPC
from pathlib import Path
from typing import Any
from uuid import uuid4

from errors import ModelLoadFailed
from hub_download import TIMEOUT_S, HubFile, Progress, download, n_bytes_of, reason
from hub_model import FOLDER_BACKENDS, HubModel, is_inside, pick

logger = logging.getLogger(__name__)

DISK_MARGIN_BYTES = 256 << 20  # that stay free
LOCK_POLL_S = 0.2
MOST_HTTP_BYTES = 50 * 10**9  # of a file; a larger one comes by a protocol of the hub's own
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class _Here:
    """What the cache has of a model, with all that no such model can do without."""

    model: HubModel  # by its commit, and by the name of its GGUF
    place: Path
    names: set[str]  # of all files of that commit that are here


@dataclass(frozen=True, slots=True)
class Hub:
    """A hub and the cache of what came from it. Its methods block: call them in a thread."""

    endpoint: str
    cache: Path
    token: str | None = field(default=None, repr=False)  # None: whom `hf auth login` has logged in
    is_offline: bool = False

    def cached(self, model: HubModel, backend: str) -> Path | None:
        """Where the model is, as far as that is known without asking anybody: its GGUF or its
        directory. None where any part of it is missing, or may be for all that is known."""
        here = self._here(model, backend)
        if here is None:
            return None
        if self.is_offline:
            return here.place
        try:
            listed = json.loads(self._names_file(here.model).read_text())
            is_whole = here.names.issuperset(pick(here.model, backend, listed))
        except (OSError, ValueError, TypeError, AttributeError, ModelLoadFailed):
            return None
        return here.place if is_whole else None

    def refuses(self, model: HubModel) -> str | None:
        """Why the model does not come here if it is not in the cache; None: it may."""
        if not self.is_offline:
            return None
        return (
            f"{model.repo} is not in the hub's cache, or not all of it, and HF_HUB_OFFLINE is "
            "set; download it, or unset that."
        )

    def fetch(
        self,
        model: HubModel,
        backend: str,
        on_progress: Callable[[float], None] = lambda fraction: None,
        is_wanted: Callable[[], bool] = lambda: True,
    ) -> Path:
        """Where the model is, downloaded unless it is there.

        `on_progress` gets the part of its bytes that is here, 0…1. When `is_wanted` no longer holds
        the download stops; that, or a broken connection, costs nothing that has come.

        Raises ModelLoadFailed with one sentence that says what to do.
        """
        if found := self.cached(model, backend):
            return found
        if reason := self.refuses(model):
            raise ModelLoadFailed(reason)
        here = self._here(model, backend)
        model = here.model if here else model  # the rest is to be of the same commit
        try:
            return self._fetched(model, backend, on_progress, is_wanted)
        except ModelLoadFailed as error:
            if here is None or not is_wanted():
                raise
            logger.warning("%s is taken to be all in the cache: %s", model.repo, error.message)
            return here.place

    def _fetched(
        self,
        model: HubModel,
        backend: str,
        on_progress: Callable[[float], None],
        is_wanted: Callable[[], bool],
    ) -> Path:
        with self._explaining(model):
            commit, files = self._listing(model)
            chosen = [files[name] for name in pick(model, backend, files)]
            snapshot = self._repo(model) / "snapshots" / commit
            missing = {
                file.hash: file for file in chosen
                if not self._blob(model, file).is_file() and not (snapshot / file.name).is_file()
            }  # fmt: skip
            self._check_sizes(model, missing.values())
            progress = Progress(
                model.repo,
                sum(file.size_bytes for file in missing.values()),
                on_progress,
                is_wanted,
            )
            for file in missing.values():
                self._fetch_file(model, commit, file, progress)
            for file in reversed(chosen):
                _link(self._blob(model, file), snapshot / file.name)
            self._remember(model, commit, files)
        return _place(snapshot, [file.name for file in chosen], backend)

    def _here(self, model: HubModel, backend: str) -> _Here | None:
        repo = self._repo(model)
        commit = model.revision or "main"
        if not _COMMIT.fullmatch(commit):
            try:
                commit = (repo / "refs" / commit).read_text().strip()
            except OSError:
                return None
        snapshot = repo / "snapshots" / commit
        files = (path for path in snapshot.rglob("*") if path.is_file())
        names = {path.relative_to(snapshot).as_posix() for path in files}
        try:
            chosen = pick(model, backend, names)
        except ModelLoadFailed:  # which only says that it is not among these
            return None
        what = None if backend in FOLDER_BACKENDS else chosen[0]
        known = replace(model, what=what, revision=commit)
        return _Here(known, _place(snapshot, chosen, backend), names)

    def _repo(self, model: HubModel) -> Path:
        return self.cache / f"models--{model.repo.replace('/', '--')}"

    def _names_file(self, model: HubModel) -> Path:
        return self._repo(model) / "quintet" / f"{model.revision}.json"

    def _blob(self, model: HubModel, file: HubFile) -> Path:
        return self._repo(model) / "blobs" / file.hash

    def _listing(self, model: HubModel) -> tuple[str, dict[str, HubFile]]:
        """The commit, and the files of it by name."""
        # else it asks huggingface.co, at its first request, what kind of program this is
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        from huggingface_hub import HfApi

        api = HfApi(self.endpoint, self.token, library_name="quintet")
        try:
            info = api.model_info(
                model.repo, revision=model.revision, files_metadata=True, timeout=TIMEOUT_S
            )
        except (KeyError, TypeError, ValueError):  # what came is not what a hub says
            commit, siblings = "", []
        except Exception as error:  # of a client that is another in each major release
            logger.debug("No list of the files of %s", model.repo, exc_info=True)
            if getattr(error, "response", None) is None:
                raise _unreachable(model, error) from None
            raise _refusal(model, error.response) from None  # type: ignore[attr-defined]
        else:
            commit, siblings = info.sha or "", info.siblings or []
        if not _COMMIT.fullmatch(commit):
            raise ModelLoadFailed(
                f"What answers in the hub's place does not know {model.repo} as a hub does; check "
                "HF_ENDPOINT, and proxies."
            )
        files = {}
        for sibling in siblings:
            hash_ = (sibling.lfs.sha256 if sibling.lfs else sibling.blob_id) or ""
            size = sibling.lfs.size if sibling.lfs else sibling.size
            # these become names of files here
            if _HASH.fullmatch(hash_) and is_inside(sibling.rfilename) and size is not None:
                files[sibling.rfilename] = HubFile(sibling.rfilename, size, hash_)
        return commit, files

    def _check_sizes(self, model: HubModel, missing: Collection[HubFile]) -> None:
        for file in missing:
            if file.size_bytes > MOST_HTTP_BYTES:
                raise ModelLoadFailed(
                    f"{file.name} has {_size(file.size_bytes)}, and the hub sends so large files "
                    f"only to its own program: run `hf download {model.repo} {file.name}`."
                )
        parts = (n_bytes_of(_incomplete(self._blob(model, file))) for file in missing)
        n_bytes = sum(file.size_bytes for file in missing) - sum(parts)
        free = shutil.disk_usage(
            next(p for p in (self.cache, *self.cache.parents) if p.exists())
        ).free
        if missing and n_bytes + DISK_MARGIN_BYTES > free:
            raise ModelLoadFailed(
                f"{model.repo} needs {_size(n_bytes)} more in the hub's cache and "
                f"{_size(DISK_MARGIN_BYTES)} to spare, and {_size(free)} are free; make room, or "
                "set HF_HUB_CACHE to a larger disk."
            )

    def _fetch_file(self, model: HubModel, commit: str, file: HubFile, progress: Progress) -> None:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        blob = self._blob(model, file)
        blob.parent.mkdir(parents=True, exist_ok=True)
        lock = self.cache / ".locks" / self._repo(model).name / f"{file.hash}.lock"
        with _locked(lock, lambda: progress.beside(_incomplete(blob))):
            if blob.is_file():  # another tier has fetched it meanwhile
                progress.add(file.size_bytes)
                return
            logger.info("Downloading %s of %s, %s", file.name, model.repo, _size(file.size_bytes))
            url = hf_hub_url(model.repo, file.name, revision=commit, endpoint=self.endpoint)
            headers = build_hf_headers(token=self.token, library_name="quintet")
            download(url, headers, file, _incomplete(blob), progress)
            _incomplete(blob).replace(blob)

    def _remember(self, model: HubModel, commit: str, names: Collection[str]) -> None:
        revision = model.revision or "main"
        if not _COMMIT.fullmatch(revision):
            _write(self._repo(model) / "refs" / revision, commit)
        try:
            _write(self._names_file(replace(model, revision=commit)), json.dumps(sorted(names)))
        except OSError as error:  # a cache that others fill, and we only read
            logger.warning(
                "%s is asked for again at the next start: %s", model.repo, error.strerror
            )

    @contextmanager
    def _explaining(self, model: HubModel) -> Iterator[None]:
        """Turn what the network and the disk raise into errors that say what to do."""
        import httpx

        try:
            yield
        except httpx.HTTPStatusError as error:
            raise _refusal(model, error.response) from None
        except (httpx.HTTPError, httpx.InvalidURL, ImportError) as error:
            raise _unreachable(model, error) from None
        except OSError as error:
            if error.errno in (ENOSPC, EDQUOT):
                raise ModelLoadFailed(
                    f"The disk is full, with {model.repo} half downloaded; make room, and the next "
                    "request goes on from there."
                ) from None
            raise ModelLoadFailed(
                f"The hub's cache cannot be used for {model.repo} "
                f"({error.strerror or reason(error)}); set HF_HOME or HF_HUB_CACHE to a folder "
                "that can be written."
            ) from None


@contextmanager
def _locked(path: Path, while_waiting: Callable[[], None]) -> Iterator[None]:
    """The library's lock, which its other users take too."""
    from filelock import Timeout
    from huggingface_hub.utils import WeakFileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(WeakFileLock(path, timeout=LOCK_POLL_S))
                break
            except Timeout:
                while_waiting()
        yield


def _link(blob: Path, pointer: Path) -> None:
    """Give a file its name, unless it has it."""
    if pointer.is_file():
        return
    pointer.parent.mkdir(parents=True, exist_ok=True)
    link = _beside(pointer)
    try:
        link.symlink_to(os.path.relpath(blob, pointer.parent))
    except OSError:  # a file system without links: the library moves the file too
        blob.replace(pointer)
    else:
        link.replace(pointer)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = _beside(path)
    new.write_text(text)
    new.replace(path)


def _place(snapshot: Path, names: list[str], backend: str) -> Path:
    return snapshot if backend in FOLDER_BACKENDS else snapshot / names[0]


def _incomplete(blob: Path) -> Path:
    return blob.with_name(f"{blob.name}.incomplete")


def _beside(path: Path) -> Path:
    return path.with_name(f".{uuid4().hex}.new")


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:,.1f} GB" if n_bytes >= 10**9 else f"{n_bytes / 1e6:,.1f} MB"


def _unreachable(model: HubModel, error: Exception) -> ModelLoadFailed:
    return ModelLoadFailed(
        f"The hub cannot be reached to fetch {model.repo} ({reason(error)}); check the network "
        "and HF_ENDPOINT, or put the model into the hub's cache by other means."
    )


def _refusal(model: HubModel, response: Any) -> ModelLoadFailed:
    """What an answer means that is none; the response is of any of the usual HTTP clients."""
    status, code = response.status_code, response.headers.get("X-Error-Code")
    has_token = "authorization" in response.request.headers
    if code == "GatedRepo" or status == 403:
        wants = "an HF_TOKEN whose account may read it" if has_token else "your HF_TOKEN"
        return ModelLoadFailed(
            f"{model.repo} is gated, or not for everybody: accept its conditions on its page on "
            f"the hub; then it wants {wants}."
        )
    if code == "RevisionNotFound":
        return ModelLoadFailed(
            f"{model.repo} has no revision '{model.revision or 'main'}' on the hub; give another."
        )
    if code == "EntryNotFound":
        return ModelLoadFailed(
            f"The hub lists a file of {model.repo} that it does not have; try again later."
        )
    if status in (401, 404):
        then = "check whether HF_TOKEN is right" if has_token else "set HF_TOKEN"
        return ModelLoadFailed(
            f"{model.repo} is not on the hub, or private: check its name, and if it is private, "
            f"{then}."
        )
    return ModelLoadFailed(
        f"The hub answers with status {status} for {model.repo}; try again later."
    )
