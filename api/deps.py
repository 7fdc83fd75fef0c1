"""What a handler needs: the services, and to stop working when its client has left."""

import asyncio
from collections.abc import Coroutine
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request
from starlette.types import Receive

from answers import Answers
from cache import Cache
from caching import Caching
from chat.format import ChatFormat
from engine.model_file import ModelFile
from engine.types import Method
from errors import BadRequest, Forbidden, ServiceError
from lookups import Lookups
from model_manager import ModelManager
from settings import CHAT_TIERS, Settings, TierName
from tier import Tier

T = TypeVar("T")

_tier_of_request: ContextVar[str] = ContextVar("tier", default="")


def tier_of_request() -> str:
    """The tier that the request of this context has come to, for its line in the log."""
    return _tier_of_request.get()


@dataclass(slots=True)
class Services:
    """Everything that outlives a request."""

    settings: Settings
    manager: ModelManager
    cache: Cache | None
    answers: Answers
    lookups: Lookups
    _formats: dict[TierName, tuple[ModelFile, ChatFormat]] = field(default_factory=dict)

    def chat_tier(self, model: str | None) -> Tier:
        """The tier that a request for text names; with None the only one that there is. Raises
        ModelNotFound or BadRequest."""
        if model is None:
            names = [name for name in self.manager.tiers if name in CHAT_TIERS]
            if len(names) != 1:
                known = ", ".join(names) or "none"
                raise BadRequest(f"'model' is required. Tiers for text: {known}.", param="model")
            model = names[0]
        tier = self.manager.resolve(model)
        if tier.name not in CHAT_TIERS:
            raise BadRequest(f"The model '{model}' does not generate text.", param="model")
        _tier_of_request.set(tier.name)
        return tier

    def embedding_tier(self, model: str) -> Tier:
        """The tier that a request for vectors names. Raises ModelNotFound or BadRequest."""
        tier = self.manager.resolve(model)
        if tier.name != "embedding" or self.manager.means_reranker(model):
            raise BadRequest(f"The model '{model}' makes no vectors.", param="model")
        _tier_of_request.set(tier.name)
        return tier

    def scoring_tier(self, model: str, method: Method | None) -> Tier:
        """The tier that scores for a request. Raises ModelNotFound or BadRequest."""
        tier = self.manager.scorer(model, method)
        _tier_of_request.set(tier.name)
        return tier

    def chat_format(self, tier: Tier) -> ChatFormat:
        """How the tier's model chats. Raises ModelLoadFailed."""
        model = tier.model()
        known = self._formats.get(tier.name)
        if known is None or known[0] is not model:
            known = model, ChatFormat(model, tier.settings.tool_format)
            self._formats[tier.name] = known
        return known[1]

    def caching(self, request: Request) -> Caching:
        """What the client wants of the cache. It has the results of its key, unless all share
        theirs."""
        owner = None if self.settings.server.cache_shared else request.scope["key_id"]
        return Caching.of(",".join(request.headers.getlist("cache-control")), owner)


async def _services(request: Request) -> Services:  # a plain function would run in a thread
    services: Services = request.app.state.services
    return services


ServicesDep = Annotated[Services, Depends(_services)]


async def _admin(request: Request) -> None:
    if not request.scope["is_admin"]:
        raise Forbidden("This changes the service, and wants one of ADMIN_API_KEYS.")


ADMIN_ONLY = Depends(_admin)  # of routes that change the service: `dependencies=[ADMIN_ONLY]`


SOON_S = 0.02  # what is done by then costs no look at the client


class ClientLeft(Exception):
    """Nobody is there to read the answer."""


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client leaves. Raises ClientLeft.

    The request's body must have been read: what comes after it is the disconnect.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task}, timeout=SOON_S)
        if not task.done():
            await _until_left(receive, task)
        return task.result()
    finally:
        task.cancel()
        await asyncio.wait({task})


async def _until_left(receive: Receive, task: "asyncio.Task[Any]") -> None:
    """Until the task is done. Raises ClientLeft, or a ServiceError where its time is over."""
    left = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({task, left}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return
        if isinstance(error := left.exception(), ServiceError):
            raise error
        raise ClientLeft
    finally:
        left.cancel()
        await asyncio.wait({left})
        if not left.cancelled():
            left.exception()  # a server that fails in receive() has lost the client too


async def fetched(receive: Receive, tier: Tier) -> None:
    """Wait until the tier's model is on this machine, which takes long only for one from the hub
    that nobody has asked for yet. Raises ClientLeft or ServiceError."""
    if not tier.is_downloaded:
        await while_connected(receive, tier.fetched())


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
