"""Where everything meets: the application, and the command that serves it.

`python server.py` serves at HOST and PORT; `uvicorn server:app` is the same application.
"""

import asyncio
import logging
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from api import (
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
from api.middleware import MAX_HEADER_BYTES, Faults, Gate, RequestLog, is_loopback
from engine.client import Launcher, launch_process
from errors import ModelLoadFailed
from model_manager import ModelManager, Tier
from settings import CHAT_TIERS, LOCAL_ORIGINS, ServerSettings, Settings, SettingsError

EXIT_USAGE = 2
EXPOSED_HEADERS = [
    "X-Request-Id",
    "Request-Id",
    "X-Ignored-Params",
    "X-Seed",
    "X-Truncated-Messages",
    "X-Queue-Time-Ms",
    "X-Prompt-Time-Ms",
    "X-Generation-Time-Ms",
    "Retry-After",
]


def create_app(settings: Settings, *, launch: Launcher = launch_process) -> FastAPI:
    """The application. Its tiers live from the start of its lifespan to the end."""
    manager = ModelManager(settings, launch=launch)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, ServerSettings]]:
        room = {"max_connections": descriptors.room_for(settings.server.max_connections)}
        async with manager:
            with descriptors.Spare():
                yield {"settings": settings.server.model_copy(update=room)}  # for Connection

    app = FastAPI(
        title="Quintet",
        description="Five local models behind one OpenAI-compatible endpoint",
        lifespan=lifespan,
        redirect_slashes=False,  # a redirect is no error envelope
        docs_url=None,  # these pages load scripts from another server
        redoc_url=None,
        middleware=[
            Middleware(RequestLog),
            Middleware(CORSMiddleware, **_cors(settings.server)),
            Middleware(Faults),
            Middleware(Gate, settings=settings.server),
        ],
    )
    app.state.services = Services(settings, manager)
    errors.install(app)
    for part in (
        chat, responses, messages, completions, embeddings, rerank, tei, tokens, models,
    ):  # fmt: skip
        app.include_router(part.router)
    return app


def _cors(settings: ServerSettings) -> dict[str, Any]:
    origins: dict[str, Any] = {"allow_origins": settings.cors_origins}
    if not settings.cors_origins:
        origins = {"allow_origin_regex": LOCAL_ORIGINS}
    return origins | {
        "allow_methods": ["GET", "POST"],
        "allow_headers": ["*"],
        "expose_headers": EXPOSED_HEADERS,
    }


def __getattr__(name: str) -> Any:
    """`server:app`, made when somebody asks for it: importing this module does nothing."""
    if name != "app":
        raise AttributeError(f"module 'server' has no attribute '{name}'")
    try:
        settings = Settings.load()
    except SettingsError as error:
        sys.exit(f"The settings cannot be used:\n{error}")
    configure_logging(settings.server.log_level)
    app = globals()["app"] = create_app(settings)
    return app


def configure_logging(level: str) -> None:
    logging.basicConfig(
        level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S"
    )
    logging.getLogger("asyncio").setLevel(logging.WARNING)


class Server(uvicorn.Server):
    """Prints the banner once it serves, and ends what is still running before connections are
    cut, so that a stream's client is told and does not take half an answer for a whole one."""

    def __init__(self, config: uvicorn.Config, services: Services) -> None:
        super().__init__(config)
        self._services = services

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            for listener in self.servers[0].sockets:
                descriptors.lengthen_queue(listener.fileno())
            port = self.servers[0].sockets[0].getsockname()[1]
            print(banner(self._services, self.config.host, port), flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        grace_s = self._services.settings.server.shutdown_grace_s
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
    key = " -H 'Authorization: Bearer YOUR_KEY'" if services.settings.server.api_keys else ""
    lines += [
        "",
        f"  curl {base}/v1/chat/completions{key} -H 'Content-Type: application/json' \\",
        f'''    -d '{{"model": "{chat[0]}", '''
        """"messages": [{"role": "user", "content": "Hello!"}]}\'""",
        "",
    ]
    return "\n".join(lines)


def _tier_line(tier: Tier) -> str:
    try:
        about = f"{tier.model().name}, {tier.n_ctx:,} tokens of context"
    except ModelLoadFailed as error:
        about = error.message
    state = "loads now" if tier.settings.preload else "loads at its first request"
    return f"  {tier.name:10} {tier.settings.backend:9} {about} · {state}"


def main() -> None:
    if len(sys.argv) > 1:
        print("server.py takes no arguments: HOST, PORT and the rest are read from the environment"
              " and from .env.", file=sys.stderr)  # fmt: skip
        sys.exit(EXIT_USAGE)
    try:
        settings = Settings.load()
    except SettingsError as error:
        print(f"The settings cannot be used:\n{error}", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    server = settings.server
    configure_logging(server.log_level)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)  # the banner says it better
    if not (server.api_keys or server.allow_insecure or is_loopback(server.host)):
        print(
            f"HOST={server.host} serves other machines too: set API_KEYS, "
            "or ALLOW_INSECURE=true if everybody there may use the models.",
            file=sys.stderr,
        )
        sys.exit(EXIT_USAGE)
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        host=server.host,
        port=server.port,
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=1,  # of the event loop; the kernel's is longer
        http=Connection,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        ws="none",
        timeout_graceful_shutdown=int(server.shutdown_grace_s) + 2,
    )
    with suppress(KeyboardInterrupt):  # uvicorn raises it again once everything has ended
        Server(config, app.state.services).run()


if __name__ == "__main__":
    main()
