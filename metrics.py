"""Counters and timings of one service, in the form that Prometheus reads."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SHORT_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
LONG_S = (*SHORT_S, 120, 300, 600, 1800)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """One registry for each service, so that several in a process do not add up."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        tier = ["tier"]
        self.requests = Counter(
            "quintet_requests_total", "Requests by route, tier and HTTP status (499: client left)",
            ["route", "tier", "status"], registry=self.registry,
        )  # fmt: skip
        self.request_seconds = self._histogram(
            "request_seconds", "From a request's head to the end of its reply", ["route"], LONG_S
        )
        self.queue_seconds = self._histogram(
            "queue_seconds", "Time that requests waited for their place", tier, LONG_S
        )
        self.first_token_seconds = self._histogram(
            "first_token_seconds", "From a request's place to its first token", tier, LONG_S
        )
        self.token_gap_seconds = self._histogram(
            "token_gap_seconds", "Between two steps that gave an answer text", tier, SHORT_S
        )
        self.batch_size = self._histogram(
            "batch_size", "Texts of one request that were computed together", tier, SIZES
        )  # fmt: skip
        self.prompt_tokens = self._counter("prompt_tokens_total", "Tokens of prompts")
        self.cached_tokens = self._counter("cached_tokens_total", "Of prompts: not computed again")
        self.generated_tokens = self._counter("generated_tokens_total", "Tokens of answers")
        self.guessed_tokens = self._counter(
            "draft_tokens_total", "Computed before they were chosen, in answers that ended"
        )
        self.right_tokens = self._counter("draft_tokens_accepted_total", "Of these: chosen")
        self.loads = self._counter("model_loads_total", "Workers that were started")
        self.deaths = self._counter("worker_deaths_total", "Workers that died")
        self.evictions = self._counter("model_evictions_total", "Models that made way for others")

    def of(self, tier: str) -> "TierMetrics":
        return TierMetrics(self, tier)

    def add(self, collector: Collector) -> None:
        self.registry.register(collector)

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def _counter(self, name: str, about: str) -> Counter:
        return Counter(f"quintet_{name}", about, ["tier"], registry=self.registry)

    def _histogram(
        self, name: str, about: str, labels: Iterable[str], buckets: Iterable[float]
    ) -> Histogram:
        return Histogram(
            f"quintet_{name}", about, list(labels), buckets=tuple(buckets), registry=self.registry
        )


class TierMetrics:
    """Those of one tier, looked up once: some are counted for every token."""

    def __init__(self, metrics: Metrics, tier: str) -> None:
        self.queue_seconds = metrics.queue_seconds.labels(tier)
        self.batch_size = metrics.batch_size.labels(tier)
        self.loads = metrics.loads.labels(tier)
        self.deaths = metrics.deaths.labels(tier)
        self.evictions = metrics.evictions.labels(tier)
        self._first_token_seconds = metrics.first_token_seconds.labels(tier)
        self._token_gap_seconds = metrics.token_gap_seconds.labels(tier)
        self._prompt_tokens = metrics.prompt_tokens.labels(tier)
        self._cached_tokens = metrics.cached_tokens.labels(tier)
        self._generated_tokens = metrics.generated_tokens.labels(tier)
        self._guessed_tokens = metrics.guessed_tokens.labels(tier)
        self._right_tokens = metrics.right_tokens.labels(tier)

    def started(self, n_prompt: int, n_cached: int) -> None:
        """A request has got its place; of its prompt so many tokens are not computed again."""
        self._prompt_tokens.inc(n_prompt)
        self._cached_tokens.inc(n_cached)

    def answered(self, seconds: float, n_tokens: int, *, is_first: bool) -> None:
        """An answer has got text, so long after its place or after its last text."""
        kind = self._first_token_seconds if is_first else self._token_gap_seconds
        kind.observe(seconds)
        self._generated_tokens.inc(n_tokens)

    def guessed(self, n_tokens: int, n_right: int) -> None:
        """An answer has ended for which so many tokens were guessed."""
        self._guessed_tokens.inc(n_tokens)
        self._right_tokens.inc(n_right)


def gauge(name: str, about: str, values: Iterable[tuple[str, float]]) -> GaugeMetricFamily:
    """A value of each tier, as it is now."""
    family = GaugeMetricFamily(f"quintet_{name}", about, labels=["tier"])
    for tier, value in values:
        family.add_metric([tier], value)
    return family
