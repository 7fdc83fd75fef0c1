"""The Hugging Face hub, and how the files of a model come here from it.

They lie in the hub's own cache, which other programs share:

    models--owner--repo/blobs/<hash>             files, named by the hash of what is in them
    models--owner--repo/blobs/<hash>.incomplete  the beginning of one
    models--owner--repo/snapshots/<commit>/…     links to them, under their names
    models--owner--repo/refs/main                which commit that is
    models--owner--repo/quintet/<commit>.json    ours: the names of all files that the hub has of it

huggingface_hub asks the hub what there is, and knows the token. The bytes are read here, because
its own download begins anew in each call and checks nothing but sizes. Links are made last, when
every file of a model is there and has its hash: what has a name is whole. Other programs fetch what
they have a use for, and no more; so of what they left the hub is asked once what else there is.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import ssl
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from errno import EDQUOT, ENOSPC
from pathlib import Path
from typing import Any
from uuid import uuid4

from errors import ModelLoadFailed
from hub_model import FOLDER_BACKENDS, HubModel, is_inside, pick

logger = logging.getLogger(__name__)

DISK_MARGIN_BYTES = 256 << 20  # that stay free
TIMEOUT_S = 10.0  # without a byte
RETRY_PAUSES_S = (0.0, 1.0, 2.0, 4.0, 8.0)  # before tries that follow a fruitless one
LOCK_POLL_S = 0.2
MOST_HTTP_BYTES = 50 * 10**9  # of a file; a larger one comes by a protocol of the hub's own
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_TRANSIENT = frozenset({408, 429, 500, 502, 503, 504})


@dataclass(frozen=True, slots=True)
class _File:
    name: str
    size_bytes: int
    hash: str  # SHA-256 of what is in it, or git's SHA-1 where it is no LFS file

    def digest(self) -> "hashlib._Hash":
        if len(self.hash) == 64:
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self.size_bytes, usedforsecurity=False)


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
        if self.is_offline:
            raise ModelLoadFailed(
                f"{model.repo} is not in the hub's cache, or not all of it, and HF_HUB_OFFLINE is "
                "set; download it, or unset that."
            )
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
            progress = _Progress(
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

    def _blob(self, model: HubModel, file: _File) -> Path:
        return self._repo(model) / "blobs" / file.hash

    def _listing(self, model: HubModel) -> tuple[str, dict[str, _File]]:
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
                files[sibling.rfilename] = _File(sibling.rfilename, size, hash_)
        return commit, files

    def _check_sizes(self, model: HubModel, missing: Collection[_File]) -> None:
        for file in missing:
            if file.size_bytes > MOST_HTTP_BYTES:
                raise ModelLoadFailed(
                    f"{file.name} has {_size(file.size_bytes)}, and the hub sends so large files "
                    f"only to its own program: run `hf download {model.repo} {file.name}`."
                )
        parts = (_n_bytes(_incomplete(self._blob(model, file))) for file in missing)
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

    def _fetch_file(self, model: HubModel, commit: str, file: _File, progress: "_Progress") -> None:
        blob = self._blob(model, file)
        blob.parent.mkdir(parents=True, exist_ok=True)
        lock = self.cache / ".locks" / self._repo(model).name / f"{file.hash}.lock"
        with _locked(lock, lambda: progress.beside(_incomplete(blob))):
            if blob.is_file():  # another tier has fetched it meanwhile
                progress.add(file.size_bytes)
                return
            logger.info("Downloading %s of %s, %s", file.name, model.repo, _size(file.size_bytes))
            with _Part(_incomplete(blob), file, progress) as part:
                self._receive(model, commit, part, progress)
            if not part.is_right:
                part.path.unlink()
                raise ModelLoadFailed(
                    f"{file.name} of {model.repo} came damaged: it has not the hash that the hub "
                    "names. It has been deleted; try again."
                )
            part.path.replace(blob)

    def _receive(self, model: HubModel, commit: str, part: "_Part", progress: "_Progress") -> None:
        """All that a file still lacks; a connection that breaks is followed by another."""
        import httpx
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        url = hf_hub_url(model.repo, part.file.name, revision=commit, endpoint=self.endpoint)
        headers = build_hf_headers(token=self.token, library_name="quintet")
        n_fruitless = 0
        cause: Exception | None = None
        while part.n_bytes < part.file.size_bytes:
            progress.go_on()
            n_before = part.n_bytes
            try:
                _stream(url, headers, part)
            except httpx.TransportError as error:
                cause = error
            except httpx.HTTPStatusError as error:
                if error.response.status_code not in _TRANSIENT:
                    raise
                cause = error
            if part.n_bytes > n_before:
                n_fruitless = 0
            elif n_fruitless == len(RETRY_PAUSES_S):
                raise ModelLoadFailed(
                    f"The download of {model.repo} broke off at {progress.percent} % and cannot be "
                    f"taken up ({_reason(cause)}); the next request goes on from there."
                )
            else:
                progress.pause(RETRY_PAUSES_S[n_fruitless])
                n_fruitless += 1

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
                f"({error.strerror or _reason(error)}); set HF_HOME or HF_HUB_CACHE to a folder "
                "that can be written."
            ) from None


class _Progress:
    """How much of a model is here, and whether anybody still wants it."""

    def __init__(
        self,
        repo: str,
        n_total: int,
        report: Callable[[float], None],
        is_wanted: Callable[[], bool],
    ) -> None:
        self._repo = repo
        self._n_total = max(n_total, 1)
        self._n_bytes = 0
        self._report = report
        self._is_wanted = is_wanted
        report(0.0)

    @property
    def percent(self) -> int:
        return 100 * self._n_bytes // self._n_total

    def add(self, n_bytes: int) -> None:
        """So many bytes more are here. Raises ModelLoadFailed where nobody wants more."""
        self._n_bytes += n_bytes
        self._report(min(max(self._n_bytes / self._n_total, 0.0), 1.0))
        self.go_on()

    def beside(self, path: Path) -> None:
        """Somebody else writes this file; it counts, but is not done."""
        n_bytes = _n_bytes(path)
        self.add(n_bytes)
        self._n_bytes -= n_bytes

    def go_on(self) -> None:
        if not self._is_wanted():
            raise ModelLoadFailed(
                f"The download of {self._repo} was stopped at {self.percent} %; the next request "
                "goes on from there."
            )

    def pause(self, for_s: float) -> None:
        ends_at = time.monotonic() + for_s
        while (left_s := ends_at - time.monotonic()) > 0:
            self.go_on()
            time.sleep(min(left_s, 0.1))


class _Part:
    """The beginning of a file, and the hash of it."""

    def __init__(self, path: Path, file: _File, progress: _Progress) -> None:
        self.path = path
        self.file = file
        self.n_bytes = 0
        self._progress = progress
        self._digest = file.digest()
        self._out = path.open("ab")
        try:
            with path.open("rb") as there:
                while chunk := there.read(1 << 20):
                    self._count(chunk)
        except BaseException:
            self._out.close()
            raise
        if self.n_bytes > file.size_bytes:
            self.restart()

    @property
    def is_right(self) -> bool:
        return self._digest.hexdigest() == self.file.hash

    def write(self, chunk: bytes) -> None:
        self._out.write(chunk)
        self._count(chunk)

    def restart(self) -> None:
        self._out.truncate(0)
        self._digest = self.file.digest()
        n_bytes, self.n_bytes = self.n_bytes, 0
        self._progress.add(-n_bytes)

    def _count(self, chunk: bytes) -> None:
        self._digest.update(chunk)
        self.n_bytes += len(chunk)
        self._progress.add(len(chunk))

    def __enter__(self) -> "_Part":
        return self

    def __exit__(self, *_: object) -> None:
        with self._out:
            self._out.flush()
            os.fsync(self._out.fileno())  # before it gets a name that says that it is whole


def _stream(url: str, headers: dict[str, str], part: _Part) -> None:
    """One answer's worth of a file. The token goes to the hub and not where it redirects to."""
    import httpx

    headers = headers | {"Accept-Encoding": "identity"}
    if part.n_bytes:
        headers["Range"] = f"bytes={part.n_bytes}-"
    with httpx.stream(
        "GET", url, headers=headers, timeout=TIMEOUT_S, follow_redirects=True, verify=_trust()
    ) as response:
        response.raise_for_status()
        if part.n_bytes and response.status_code != 206:
            part.restart()  # all of it comes again
        for chunk in response.iter_bytes():
            part.write(chunk)
            if part.n_bytes > part.file.size_bytes:
                return  # its hash will be wrong


def _trust() -> ssl.SSLContext:
    """The certificates that the system trusts, such as a proxy's that reads along: the library asks
    by these, so the bytes come by them too."""
    import httpx
    import truststore

    if os.environ.get("SSL_CERT_FILE") or os.environ.get("SSL_CERT_DIR"):
        return httpx.create_ssl_context()  # by that alone
    return truststore.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


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


def _n_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:,.1f} GB" if n_bytes >= 10**9 else f"{n_bytes / 1e6:,.1f} MB"


def _reason(error: Exception | None) -> str:
    """What happened, in a word: messages of libraries hold addresses."""
    if error is None:
        return "the hub sends nothing"
    if isinstance(error, ImportError) and "SOCKS" in str(error):
        return "a SOCKS proxy is set, which wants `.venv/bin/pip install socksio`"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return (
                f"its certificate is not trusted: {cause.verify_message}; behind a proxy that "
                "reads along, SSL_CERT_FILE may name a file with those to trust"
            )
        cause = cause.__cause__ or cause.__context__
    response = getattr(error, "response", None)
    return type(error).__name__ if response is None else f"status {response.status_code}"


def _unreachable(model: HubModel, error: Exception) -> ModelLoadFailed:
    return ModelLoadFailed(
        f"The hub cannot be reached to fetch {model.repo} ({_reason(error)}); check the network "
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
