"""A hub on loopback: the few routes of the Hugging Face hub that a download uses."""

import hashlib
import json
import re
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

INFO = re.compile(
    r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/revision/(?P<revision>[^?]+))?\?blobs=(?i:true)"
)
RESOLVE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)")
CONTENT = re.compile(r"/content/(?P<hash>\w+)")


@dataclass
class Repo:
    """Files by name; those of `in_git` are none of Git LFS."""

    files: dict[str, bytes]
    in_git: frozenset[str] = frozenset({"config.json", "tokenizer.json"})
    commit: str = "c0" * 20
    revisions: frozenset[str] = frozenset({"main"})
    gate: tuple[int, str] | None = None  # status and code of a refusal without the right token
    hides_listing: bool = False  # behind the gate too, as those of private repos are

    def hash(self, name: str) -> str:
        content = self.files[name]
        if name in self.in_git:
            return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return hashlib.sha256(content).hexdigest()

    def info(self) -> dict[str, Any]:
        siblings = []
        for name, content in self.files.items():
            sibling = {"rfilename": name, "size": len(content), "blobId": self.hash(name)}
            if name not in self.in_git:
                sibling["blobId"] = "b1" * 20
                sibling["lfs"] = {
                    "size": len(content), "sha256": self.hash(name), "pointerSize": 130,
                }  # fmt: skip
            siblings.append(sibling)
        return {"id": "owner/repo", "sha": self.commit, "siblings": siblings}


@dataclass
class Request:
    method: str
    path: str
    range: str | None
    token: str | None


@dataclass
class HubImitation:
    """What it has, what it was asked, and what goes wrong."""

    endpoint: str
    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    token: str = "hf_right"
    cut_after: list[int] = field(default_factory=list)  # bytes of the next contents, then a break
    spoil: set[str] = field(default_factory=set)  # names whose bytes come wrong
    ignores_ranges: bool = False
    storage: str = ""  # another address, to which files of Git LFS are redirected
    busy: int = 0  # so many of the next contents are refused with a 503
    on_content: Callable[[], None] = lambda: None  # before the bytes of a file

    def contents(self) -> list[Request]:
        """The requests for bytes of files."""
        return [request for request in self.requests if "/resolve/" in request.path]


@contextmanager
def hub_imitation(certificate: Path | None = None) -> Iterator[HubImitation]:
    """One that speaks HTTP, or with a certificate and its key in one file HTTPS."""
    hub = HubImitation("")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
            path = unquote(self.path)
            hub.requests.append(Request("GET", path, self.headers.get("Range"), token))
            if match := INFO.fullmatch(path):
                self.info(match["repo"], match["revision"] or "main", token)
            elif match := RESOLVE.fullmatch(path):
                self.resolve(match["repo"], match["revision"], match["name"], token)
            elif match := CONTENT.fullmatch(path):
                every = [(repo, name) for repo in hub.repos.values() for name in repo.files]
                self.content(
                    *next(file for file in every if file[0].hash(file[1]) == match["hash"])
                )
            else:
                self.refuse(404, "")

        def info(self, name: str, revision: str, token: str | None) -> None:
            repo = hub.repos.get(name)
            if repo is None:
                self.refuse(401, "RepoNotFound")
            elif revision not in repo.revisions | {repo.commit}:
                self.refuse(404, "RevisionNotFound")
            elif repo.gate and repo.hides_listing and token != hub.token:
                self.refuse(*repo.gate)
            else:
                self.answer(200, json.dumps(repo.info()).encode())

        def resolve(self, name: str, revision: str, file: str, token: str | None) -> None:
            repo = hub.repos[name]
            if repo.gate and token != hub.token:
                self.refuse(*repo.gate)
            elif revision != repo.commit or file not in repo.files:
                self.refuse(404, "EntryNotFound")
            elif hub.busy:
                hub.busy -= 1
                self.refuse(503, "")
            elif hub.storage and file not in repo.in_git:
                self.send_response(302)
                self.send_header("Location", f"{hub.storage}/content/{repo.hash(file)}")
                self.send_header("X-Linked-Etag", f'"{repo.hash(file)}"')
                self.send_header("X-Xet-Hash", "0" * 64)  # offered, and not taken
                self.send_header("Content-Length", "0")
                self.end_headers()
            else:
                self.content(repo, file)

        def content(self, repo: Repo, name: str) -> None:
            hub.on_content()
            whole = repo.files[name]
            if name in hub.spoil:
                whole = bytes(byte ^ 1 for byte in whole)
            start = 0
            if (wanted := self.headers.get("Range")) and not hub.ignores_ranges:
                start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            rest = whole[start:]
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(whole) - 1}/{len(whole)}")
            self.send_header("Content-Length", str(len(rest)))
            self.end_headers()
            n_sent = hub.cut_after.pop(0) if hub.cut_after else len(rest)
            self.wfile.write(rest[:n_sent])
            self.wfile.flush()
            self.close_connection = n_sent < len(rest)

        def refuse(self, status: int, code: str) -> None:
            self.answer(status, b'{"error": "no"}', {"X-Error-Code": code} if code else {})

        def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    if certificate is not None:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(certificate)
        server.socket = tls.wrap_socket(server.socket, server_side=True)
        hub.endpoint = hub.endpoint.replace("http:", "https:")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
