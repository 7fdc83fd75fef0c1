"""Where everything meets: the application, and the command that serves it.

`python server.py` serves at HOST and PORT; `uvicorn server:app` is the same application.
"""

import asyncio
import gc
import logging
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext, suppress
from importlib.util import find_spec
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

import logs
from answers import Answers
from api import (
    admin,
    cache,
    chat,
    completions,
    descriptors,
    embeddings,
    errors,
    messages,
    models,
    rerank,
    responses,
    tei,
    tokens,
)
from api.connections import Connection
from api.deps import Services
from api.middleware import Faults, Gate, HeadAsGet, RequestLog, is_loopback
from cache import Cache
from cache_disk import DiskStore
from engine.backends.base import install
from engine.client import Launcher, launch_process
from errors import ModelLoadFailed
from lookups import Lookups
from model_manager import ModelManager
from settings import CHAT_TIERS, LOCAL_ORIGINS, ServerSettings, Settings, SettingsError
from tier import Tier

logger = logging.getLogger("quintet")

EXIT_FAULTY, EXIT_USAGE = 1, 2
PACKAGES = {  # of the backends that are extras
    "mlx": ["mlx", "mlx_lm", "tokenizers"],
    "onnx": ["onnxruntime", "onnx", "tokenizers"],
    "flag": ["torch", "FlagEmbedding"],
}
EXPOSED_HEADERS = [
    "X-Request-Id",
    "Request-Id",
    "X-Ignored-Params",
    "X-Should-Retry",
    "X-Seed",
    "X-Truncated-Inputs",
    "X-Truncated-Messages",
    "X-Queue-Position",
    "X-Queue-Time-Ms",
    "X-Prompt-Time-Ms",
    "X-Generation-Time-Ms",
    "X-Cache",
    "X-Cached-Inputs",
    "Age",
    "Retry-After",
]


def create_app(settings: Settings, *, launch: Launcher = launch_process) -> FastAPI:
    """The application. Its tiers live from the start of its lifespan to the end."""
    manager = ModelManager(settings, launch=launch)
    results = _cache(settings.server)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, ServerSettings]]:
        room = {"max_connections": descriptors.room_for(settings.server.max_connections)}
        async with results or nullcontext(), manager:
            _warn(manager)
            yield {"settings": settings.server.model_copy(update=room)}  # for Connection

    app = FastAPI(
        title="Quintet",
        description="Five local models behind one OpenAI-compatible endpoint",
        lifespan=lifespan,
        redirect_slashes=False,  # a redirect is no error envelope
        docs_url=None,  # these pages load scripts from another server
        redoc_url=None,
        middleware=[
            Middleware(RequestLog, metrics=manager.metrics),
            Middleware(CORSMiddleware, **_cors(settings.server)),
            Middleware(Faults),
            Middleware(Gate, settings=settings.server),
            Middleware(HeadAsGet),
        ],
    )
    answers = Answers(results, settings.server.cache_policy)
    app.state.services = Services(settings, manager, results, answers, Lookups(results))
    manager.metrics.add(admin.TierGauges(manager))
    errors.install(app)
    for part in (
        chat, responses, messages, completions, embeddings, rerank, tei, tokens, admin, models,
        cache,
    ):  # fmt: skip
        # include_router would match each request twice against the routes of each part
        app.router.routes.extend(part.router.routes)
    return app


def _warn(manager: ModelManager) -> None:
    """Of settings that do not fit a model, where that is here."""
    for tier in manager.tiers.values():
        with suppress(ModelLoadFailed):
            if tier.is_downloaded and (fault := embeddings.fault_of_dimension(tier)):
                logger.warning("Tier %s: %s", tier.name, fault)


def _cache(settings: ServerSettings) -> Cache | None:
    if settings.cache_policy == "off" or not settings.cache_max_mb:
        return None
    disk = None
    if settings.cache_path is not None:
        max_bytes = settings.cache_disk_max_mb << 20
        disk = DiskStore(settings.cache_path, max_bytes=max_bytes, ttl_s=settings.cache_ttl_s)
    return Cache(max_bytes=settings.cache_max_mb << 20, ttl_s=settings.cache_ttl_s, disk=disk)


def _cors(settings: ServerSettings) -> dict[str, Any]:
    origins: dict[str, Any] = {"allow_origins": settings.cors_origins}
    if not settings.cors_origins:
        origins = {"allow_origin_regex": LOCAL_ORIGINS}
    return origins | {
        "allow_methods": ["GET", "HEAD", "POST", "DELETE"],
        "allow_headers": ["*"],
        "expose_headers": EXPOSED_HEADERS,
    }


def __getattr__(name: str) -> Any:
    """`server:app`, made when somebody asks for it: importing this module does nothing."""
    if name != "app":
        raise AttributeError(f"module 'server' has no attribute '{name}'")
    try:
        settings = load_settings()
    except SettingsError as error:
        sys.exit(f"The settings cannot be used:\n{error}")
    app = globals()["app"] = create_app(settings)
    return app


def load_settings() -> Settings:
    """All settings; the log is from now on as they say. Raises SettingsError."""
    with logs.held():
        settings = Settings.load()
        configure_logging(settings.server)
    return settings


def configure_logging(server: ServerSettings) -> None:
    line = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logs.configure(server.log_level, line, server.log_format)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    for client in ("httpx", "httpx2"):  # addresses from which the hub's storage gives files to all
        logging.getLogger(client).setLevel(logging.WARNING)
    # its lines hold queries; quintet.access says the rest, and the request's id
    logging.getLogger("uvicorn.access").setLevel(logging.WARNING)


class Server(uvicorn.Server):
    """Prints the banner once it serves, and ends what is still running before connections are
    cut, so that a stream's client is told and does not take half an answer for a whole one."""

    def __init__(self, config: uvicorn.Config, services: Services) -> None:
        super().__init__(config)
        self._services = services

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            # what is there now stays: a look at all of it for garbage stops every stream for 75 ms
            gc.freeze()
            port = self.servers[0].sockets[0].getsockname()[1]
            if self._services.settings.server.log_format == "json":
                logger.info("Serving", extra={"fields": {"host": self.config.host, "port": port}})
                return
            with suppress(OSError):  # a full disk behind it is no reason not to serve
                print(banner(self._services, self.config.host, port), flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        grace_s = self._services.settings.server.shutdown_grace_s
        self._services.manager.refuse()
        asyncio.get_running_loop().call_later(grace_s, self._services.manager.abandon)
        await super().shutdown(sockets)


def banner(services: Services, host: str, port: int) -> str:
    if ":" in host:
        host = f"[{host}]"
    base = f"http://{'localhost' if host in ('0.0.0.0', '[::]') else host}:{port}"
    tiers = list(services.manager.tiers.values())
    lines = ["", f"Quintet serves {base}/v1", ""]
    lines += [_tier_line(tier) for tier in tiers]
    chat = [tier.name for tier in tiers if tier.name in CHAT_TIERS]
    if not chat:
        return "\n".join([*lines, ""])
    key = " -H 'Authorization: Bearer YOUR_KEY'" if services.settings.server.keys else ""
    lines += [
        "",
        f"  curl {base}/v1/chat/completions{key} -H 'Content-Type: application/json' \\",
        f'''    -d '{{"model": "{chat[0]}", '''
        """"messages": [{"role": "user", "content": "Hello!"}]}\'""",
        "",
    ]
    return "\n".join(lines)


def _tier_line(tier: Tier) -> str:
    if fault := tier.life.source.fault:
        return f"  {tier.name:10} {tier.settings.backend:9} {fault}"
    if not tier.is_downloaded:
        state = "is downloaded now" if tier.settings.preload else "downloaded at its first request"
        return f"  {tier.name:10} {tier.settings.backend:9} {tier.settings.model_path} · {state}"
    try:
        about = f"{tier.model().name}, {tier.n_ctx:,} tokens of context"
    except ModelLoadFailed as error:
        about = error.message
    state = "loads now" if tier.settings.preload else "loads at its first request"
    return f"  {tier.name:10} {tier.settings.backend:9} {about} · {state}"


def check_config(manager: ModelManager) -> tuple[str, bool]:
    """What each tier costs and what is missing, in lines for people, and whether all is well.
    Nothing is loaded."""
    limit = manager.room.limit_bytes
    lines, is_well, costs, unknown = [], True, [], []
    for tier in manager.tiers.values():
        if fault := _not_installed(tier.settings.backend) or tier.life.source.fault:
            lines.append(f"  {tier.name:10} {fault}")
            is_well = False
            continue
        if tier.is_downloaded:
            try:
                footprint = tier.life.footprint()
                fault = embeddings.fault_of_dimension(tier)
            except ModelLoadFailed as error:
                lines.append(f"  {tier.name:10} {error.message}")
                is_well = False
                continue
            costs.append(footprint.most)
            parts = [
                f"{bytes_ >> 20:,} MB {what}"
                for bytes_, what in (
                    (footprint.weights, "weights"), (footprint.kv, "cells"),
                    (footprint.compute, "batches"), (footprint.process, "process"),
                    (footprint.lanes, "cells apart, with several answers at once"),
                    (footprint.prefix_cache, "prompts seen before, at most"),
                )
                if bytes_ >> 20
            ]  # fmt: skip
            note = ""
            if footprint.most > limit:
                note, is_well = " · DOES NOT FIT", False
            if fault is not None:
                note, is_well = f"{note} · {fault}", False
            about = f"{tier.model().name}: {footprint.most >> 20:,} MB ({', '.join(parts)}){note}"
        else:
            about = f"{tier.settings.model_path}: downloaded at its first request"
            unknown.append(tier.name)
        lines.append(f"  {tier.name:10} {about}")
    total = sum(costs)
    fits = "all fit together" if total <= limit else "not all at once: they make way for each other"
    if unknown:
        fits += f", without {' and '.join(unknown)}, of which nothing is known before"
    lines.append(f"  {'together':10} {total >> 20:,} MB of {limit >> 20:,} (MEMORY_LIMIT): {fits}")
    return "\n".join(lines), is_well


def _not_installed(backend: str) -> str | None:
    """What a backend needs and is not there, and what to run for it. Nothing is imported."""
    missing = [name for name in PACKAGES.get(backend, ()) if find_spec(name) is None]
    if not missing:
        return None
    return f"The backend {backend} needs {' and '.join(missing)}: {install(backend)}."


def main() -> None:
    arguments = sys.argv[1:]
    if arguments not in ([], ["--check-config"]):
        print("server.py takes no arguments but --check-config: HOST, PORT and the rest are read "
              "from the environment and from .env.", file=sys.stderr)  # fmt: skip
        sys.exit(EXIT_USAGE)
    try:
        settings = load_settings()
    except SettingsError as error:
        print(f"The settings cannot be used:\n{error}", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    server = settings.server
    if not (server.keys or server.allow_insecure or is_loopback(server.host)):
        print(
            f"HOST={server.host} serves other machines too: set API_KEYS, "
            "or ALLOW_INSECURE=true if everybody there may use the models.",
            file=sys.stderr,
        )
        sys.exit(EXIT_USAGE)
    if arguments:
        report, is_well = check_config(ModelManager(settings))
        print(report)
        sys.exit(0 if is_well else EXIT_FAULTY)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)  # the banner says it better
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        host=server.host,
        port=server.port,
        log_config=None,
        access_log=False,
        server_header=False,
        loop="uvloop",
        http=Connection,
        ws="none",
        timeout_graceful_shutdown=int(server.shutdown_grace_s) + 2,
    )
    # uvicorn sends itself the signal again once everything has ended: that is a good end
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with suppress(KeyboardInterrupt):
        Server(config, app.state.services).run()


if __name__ == "__main__":
    main()
