"""The bytes of one file of the hub: they come over HTTP, go on where they broke off, are checked.

The library of the hub has a download too, which begins anew in each call and checks nothing but
sizes.
"""

import hashlib
import os
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from errors import ModelLoadFailed

TIMEOUT_S = 10.0  # without a byte
RETRY_PAUSES_S = (0.0, 1.0, 2.0, 4.0, 8.0)  # before tries that follow a fruitless one
_TRANSIENT = frozenset({408, 429, 500, 502, 503, 504})


@dataclass(frozen=True, slots=True)
class HubFile:
    name: str
    size_bytes: int
    hash: str  # SHA-256 of what is in it, or git's SHA-1 where it is no LFS file

    def digest(self) -> "hashlib._Hash":
        if len(self.hash) == 64:
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self.size_bytes, usedforsecurity=False)


class Progress:
    """How much of a model is here, and whether anybody still wants it."""

    def __init__(
        self,
        repo: str,
        n_total: int,
        report: Callable[[float], None],
        is_wanted: Callable[[], bool],
    ) -> None:
        self.repo = repo
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
        n_bytes = n_bytes_of(path)
        self.add(n_bytes)
        self._n_bytes -= n_bytes

    def go_on(self) -> None:
        if not self._is_wanted():
            raise ModelLoadFailed(
                f"The download of {self.repo} was stopped at {self.percent} %; the next request "
                "goes on from there."
            )

    def pause(self, for_s: float) -> None:
        ends_at = time.monotonic() + for_s
        while (left_s := ends_at - time.monotonic()) > 0:
            self.go_on()
            time.sleep(min(left_s, 0.1))


class Part:
    """The beginning of a file, and the hash of it."""

    def __init__(self, path: Path, file: HubFile, progress: Progress) -> None:
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

    def __enter__(self) -> "Part":
        return self

    def __exit__(self, *_: object) -> None:
        with self._out:
            self._out.flush()
            os.fsync(self._out.fileno())  # before it gets a name that says that it is whole


def download(
    url: str, headers: dict[str, str], file: HubFile, path: Path, progress: Progress
) -> None:
    """All that a file still lacks, at `path`, where its beginning may be.

    Raises ModelLoadFailed where nobody wants it any more, where no connection brings more of it, or
    where its hash is not right; httpx.HTTPStatusError for an answer that no repetition mends.
    """
    with Part(path, file, progress) as part:
        _receive(url, headers, part, progress)
    if not part.is_right:
        path.unlink()
        raise ModelLoadFailed(
            f"{file.name} of {progress.repo} came damaged: it has not the hash that the hub names. "
            "It has been deleted; try again."
        )


def _receive(url: str, headers: dict[str, str], part: Part, progress: Progress) -> None:
    """A connection that breaks is followed by another."""
    import httpx

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
                f"The download of {progress.repo} broke off at {progress.percent} % and cannot be "
                f"taken up ({reason(cause)}); the next request goes on from there."
            )
        else:
            progress.pause(RETRY_PAUSES_S[n_fruitless])
            n_fruitless += 1


def _stream(url: str, headers: dict[str, str], part: Part) -> None:
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


def n_bytes_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def reason(error: Exception | None) -> str:
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
