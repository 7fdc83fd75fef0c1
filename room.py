"""Who may have memory: makes room for a model by stopping others."""

import asyncio
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from errors import InsufficientMemory


@dataclass(frozen=True, slots=True)
class Occupant:
    """A model in memory, or on its way there."""

    name: str
    n_bytes: int
    is_pinned: bool
    is_wanted: bool  # somebody waits for it, or is in it
    used_at: float  # for the last time
    stays_until: float  # whoever has just been loaded stays for a while; inf during the load


@dataclass(frozen=True, slots=True)
class Go:
    """There is room."""


@dataclass(frozen=True, slots=True)
class Stop:
    """There is, once these have been stopped."""

    names: Sequence[str]


@dataclass(frozen=True, slots=True)
class Wait:
    """There may be, when something has changed or at this time."""

    until: float


@dataclass(frozen=True, slots=True)
class Never:
    """There is none, whoever goes: so much is left beside those that stay."""

    n_bytes: int


def decide(
    needed: int, limit: int, occupants: Sequence[Occupant], *, now: float, impatient_at: float
) -> Go | Stop | Wait | Never:
    """Whether a model of `needed` bytes may be loaded.

    1. It fits beside all others: go.
    2. It would not, if all went that are not pinned: never.
    3. One that is being loaded, or has been loaded for less time than that took, stays, so that at
       most half of the time goes into loads.
    4. Of the others those that nobody wants are stopped, least recently used first.
    5. From `impatient_at` on those that are wanted go as well: they finish what is in them, and
       their next requests wait for their turn. So what waits for a loaded model is served first,
       but not for ever.
    6. Else it waits.
    """
    excess = sum(occupant.n_bytes for occupant in occupants) + needed - limit
    if excess <= 0:
        return Go()
    movable = [occupant for occupant in occupants if not occupant.is_pinned]
    if excess > sum(occupant.n_bytes for occupant in movable):
        return Never(limit - sum(o.n_bytes for o in occupants if o.is_pinned))
    movable.sort(key=lambda occupant: (occupant.is_wanted, occupant.used_at))

    def leaves_at(occupant: Occupant) -> float:
        return max(occupant.stays_until, impatient_at if occupant.is_wanted else 0.0)

    may_go = [occupant for occupant in movable if now >= leaves_at(occupant)]
    chosen = []
    for occupant in may_go:
        if excess <= 0:
            break
        chosen.append(occupant.name)
        excess -= occupant.n_bytes
    if excess <= 0:
        return Stop(chosen)
    return Wait(min(at for o in movable if (at := leaves_at(o)) > now))


class Tenant(Protocol):
    """A tier, as far as room is concerned."""

    @property
    def name(self) -> str: ...

    @property
    def is_wanted(self) -> bool:
        """Somebody waits for the model, or is in it."""

    @property
    def wanted_until(self) -> float:
        """When that was so for the last time; inf while it is."""

    def occupant(self) -> Occupant | None:
        """What it has of the memory; None: nothing."""

    async def make_way(self) -> None:
        """Returns when its model has finished what was in it, and its memory is free."""


class Room:
    """The memory that all models share."""

    def __init__(self, limit_bytes: int, *, patience_s: float) -> None:
        self.limit_bytes = limit_bytes
        self._patience_s = patience_s
        self._tenants: dict[str, Tenant] = {}
        self._line: list[Tenant] = []  # who waits; the first may have others go
        self._coming = 0  # bytes of the one for whom others are going
        self._leaving: set[str] = set()  # of these, who has not gone yet
        self._changed = asyncio.Event()

    def enter(self, tenant: Tenant) -> None:
        self._tenants[tenant.name] = tenant

    def changed(self) -> None:
        """Somebody has left, is wanted no more, or has just been loaded."""
        self._changed.set()
        self._changed = asyncio.Event()  # several wait, so none of them may clear it

    async def wait_for(self, tenant: Tenant, needed: int) -> bool:
        """True as soon as there is room for the tenant's model: what it has from now on must be
        in its `occupant`. False when nobody wants it any more. Raises InsufficientMemory when
        waiting would not help."""
        impatient_at = time.monotonic() + self._patience_s
        self._line.append(tenant)
        try:
            while tenant.is_wanted:
                if self._fits_beside_all(tenant, needed):
                    return True
                changed, until = self._changed, math.inf
                if self._line[0] is tenant:
                    decision = self._decide(tenant, needed, impatient_at)
                    if isinstance(decision, Stop):
                        await self._stop(decision.names, tenant, needed)
                        continue
                    assert isinstance(decision, Wait)  # who fits has gone
                    until = decision.until
                with suppress(asyncio.TimeoutError):  # it may be time for somebody to go
                    timeout_s = max(until - time.monotonic(), 0.001)
                    await asyncio.wait_for(changed.wait(), timeout_s)
        finally:
            self._line.remove(tenant)
            self.changed()
        return False

    def check(self, tenant: Tenant, needed: int) -> None:
        """Raises InsufficientMemory where `wait_for` would do so now."""
        self._decide(tenant, needed, math.inf)

    def _fits_beside_all(self, tenant: Tenant, needed: int) -> bool:
        """Also beside the one for whom others are going."""
        others = self._occupants(tenant)
        n_now = sum(occupant.n_bytes for occupant in others)
        n_leaving = sum(o.n_bytes for o in others if o.name in self._leaving)
        first = self._line[0]
        n_coming = (
            max(self._coming - n_leaving, 0) if first is not tenant and first.is_wanted else 0
        )
        return needed + n_now + n_coming <= self.limit_bytes

    async def _stop(self, names: Sequence[str], tenant: Tenant, needed: int) -> None:
        """Stop these for the tenant, for as long as it does not fit, and has not been unwanted for
        our patience: a client whose own is at an end mostly comes again, and would find those that
        go with new long jobs."""

        async def leave(name: str) -> None:
            await self._tenants[name].make_way()
            self._leaving.discard(name)

        self._coming, self._leaving = needed, set(names)
        leaving = [asyncio.create_task(leave(name)) for name in names]
        for task in leaving:
            task.add_done_callback(lambda _: self.changed())
        try:
            while not self._fits_beside_all(tenant, needed):
                if all(task.done() for task in leaving):
                    for task in leaving:
                        task.result()  # raises what it failed with
                    return
                left_s = tenant.wanted_until + self._patience_s - time.monotonic()
                if left_s <= 0:
                    return
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), left_s)
        finally:
            for task in leaving:
                task.cancel()
            self._coming, self._leaving = 0, set()

    def insufficient(
        self, needed: int, available: int, *, retry_after_s: int | None = None
    ) -> InsufficientMemory:
        hint = "Lower N_CTX, KV_TOKENS or PREFIX_CACHE_MB, take a smaller model, or unpin another"
        if retry_after_s is not None:
            hint = "Others are using it. Try again later"
        return InsufficientMemory(
            f"The model needs about {needed:,} bytes of memory, and {available:,} of "
            f"{self.limit_bytes:,} (MEMORY_LIMIT) can be had. {hint}.",
            retry_after_s=retry_after_s,
            needed_bytes=needed,
            available_bytes=available,
            limit_bytes=self.limit_bytes,
        )

    @property
    def free_bytes(self) -> int:
        return self.limit_bytes - sum(o.n_bytes for o in self._occupants(None))

    def _decide(self, tenant: Tenant, needed: int, impatient_at: float) -> Go | Stop | Wait:
        others = self._occupants(tenant)
        now = time.monotonic()
        decision = decide(needed, self.limit_bytes, others, now=now, impatient_at=impatient_at)
        if isinstance(decision, Never):
            raise self.insufficient(needed, decision.n_bytes)
        return decision

    def _occupants(self, but: Tenant | None) -> list[Occupant]:
        tenants = (tenant for tenant in self._tenants.values() if tenant is not but)
        return [occupant for tenant in tenants if (occupant := tenant.occupant()) is not None]
