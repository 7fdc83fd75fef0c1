"""The configured tiers, the memory that they share, and which of them a request means."""

import asyncio
import sys
from collections.abc import Mapping

from engine.client import Launcher, launch_process
from engine.machine import total_bytes
from engine.types import Method
from errors import BadRequest, ModelNotFound
from metrics import Metrics
from progress import ProgressLine, ProgressLog
from room import Room
from settings import ENCODER_TIERS, ServerSettings, Settings, TierName
from tier import Tier, stopping


class ModelManager:
    """The configured tiers, by name. Use it as `async with`: no worker outlives the block."""

    def __init__(self, settings: Settings, *, launch: Launcher = launch_process) -> None:
        server = settings.server
        self.metrics = Metrics()
        self.room = Room(server.memory_limit_bytes(total_bytes()), patience_s=server.swap_wait_s)
        progress = _progress(server)
        self.tiers: Mapping[TierName, Tier] = {
            name: Tier(
                name,
                tier,
                server,
                room=self.room,
                metrics=self.metrics,
                launch=launch,
                progress_log=progress,
            )
            for name, tier in settings.tiers.items()
        }
        for tier in self.tiers.values():
            self.room.enter(tier)
        self.stand_in_aliases = settings.reranker_aliases

    def resolve(self, model: str) -> Tier:
        """The tier that a request names: by tier, alias or file stem, in this order. Without a
        model of its own `reranker` is the embedding tier. Raises ModelNotFound."""
        for tier in self.tiers.values():
            if tier.name == model:
                return tier
        if self.stand_in is not None and self.means_reranker(model):
            return self.stand_in
        for tier in self.tiers.values():
            if model in tier.aliases:
                return tier
        names = [n for t in self.tiers.values() for n in (t.name, *t.aliases)]
        names += ["reranker", *self.stand_in_aliases] if self.stand_in is not None else []
        known = ", ".join(dict.fromkeys(names))
        raise ModelNotFound(
            f"The model '{model}' does not exist here. Known: {known}.", param="model"
        )

    def means_reranker(self, model: str) -> bool:
        """Whether a request that names this wants `reranker`, also where another stands in."""
        is_alias = model in self.stand_in_aliases and model not in self.tiers
        return model == "reranker" or is_alias

    @property
    def stand_in(self) -> Tier | None:
        """The tier that scores for `reranker`, which has no model of its own."""
        return None if "reranker" in self.tiers else self.tiers.get("embedding")

    def scorer(self, model: str, method: Method | None) -> Tier:
        """The tier that scores for a request: the one that it names, unless only the embedding
        tier knows the method. Raises ModelNotFound or BadRequest."""
        tier = self.resolve(model)
        if tier.name == "reranker" and method not in (None, "cross-encoder"):
            if "embedding" not in self.tiers:
                raise BadRequest(
                    f"The method '{method}' needs an embedding model (EMBEDDING_MODEL_PATH).",
                    param="method",
                )
            return self.tiers["embedding"]
        if tier.name not in ENCODER_TIERS:
            raise BadRequest(f"The model '{model}' does not score documents.", param="model")
        if tier.name == "embedding" and method == "cross-encoder":
            raise BadRequest(
                "The method 'cross-encoder' needs a reranker (RERANKER_MODEL_PATH).",
                param="method",
            )
        return tier

    def refuse(self) -> None:
        """Take no more requests; those that are here go on."""
        for tier in self.tiers.values():
            tier.refuse()

    def abandon(self) -> None:
        """End all requests with an error."""
        for tier in self.tiers.values():
            tier.abandon(stopping())

    async def __aenter__(self) -> "ModelManager":
        for tier in self.tiers.values():
            tier.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*(tier.close() for tier in self.tiers.values()))


def _progress(server: ServerSettings) -> ProgressLog:
    """People who look on see a line that moves; logs are not for that."""
    is_watched = server.log_format == "text" and server.log_level in ("DEBUG", "INFO")
    return ProgressLine(sys.stderr) if is_watched and sys.stderr.isatty() else ProgressLog()
