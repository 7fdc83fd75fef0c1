"""What a request may have of the cache and leave there, what it had, and how the rest waited."""

from dataclasses import dataclass
from typing import Literal

Outcome = Literal["HIT", "MISS", "JOIN", "BYPASS"]


@dataclass(slots=True)
class Caching:
    """One request's. It joins no work that is on its way unless it reads what is remembered: who
    wants something new is not to get what was begun for others."""

    owner: str | None = None  # whose results it may have, where they are not shared
    reads: bool = True
    writes: bool = True
    max_age_s: float | None = None
    outcome: Outcome = "BYPASS"
    age_s: float = 0.0  # of a hit; of several results the oldest
    n_cached: int | None = None  # of the results, where there are several
    n_before: int = 0  # requests that were to be served before it when it came
    queued_at: float = 0.0  # by the monotonic clock, as the next
    handed_at: float = 0.0  # to the worker, where something had to be computed for it

    @classmethod
    def of(cls, cache_control: str, owner: str | None) -> "Caching":
        """By a request's header Cache-Control (RFC 9111, 5.2.1). Other directives are not known; an
        age that is no number allows none."""
        caching = cls(owner)
        for directive in cache_control.lower().split(","):
            name, _, value = (part.strip() for part in directive.partition("="))
            if name == "no-store":
                caching.reads = caching.writes = False
            elif name == "no-cache":
                caching.reads = False
            elif name == "max-age":
                value = value.strip('"')
                is_number = value.isascii() and value.isdigit() and len(value) < 12
                caching.max_age_s = float(value) if is_number else 0.0
                caching.reads &= caching.max_age_s > 0
        return caching

    def headers(self) -> dict[str, str]:
        """What the reply says of it, and of the wait for its place."""
        headers: dict[str, str] = {"X-Cache": self.outcome}
        if self.outcome == "HIT":
            headers["Age"] = str(int(self.age_s))
        if self.n_cached is not None:
            headers["X-Cached-Inputs"] = str(self.n_cached)
        queue_ms = 1e3 * (self.handed_at - self.queued_at)
        return headers | {
            "X-Queue-Position": str(self.n_before),
            "X-Queue-Time-Ms": f"{queue_ms:.1f}",
        }
