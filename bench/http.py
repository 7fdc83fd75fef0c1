"""Load of streamed chat completions against any OpenAI-compatible URL, measured at the client.

    python bench/http.py http://127.0.0.1:8000 --model light --concurrency 1,4,8,16
    python bench/http.py http://127.0.0.1:8000 --peer http://127.0.0.1:8080 --peer-model any

A level keeps `concurrency` requests open until its requests are used up or its time is. With a
peer the two take turns at each level. Every prompt is new and follows from the seed, so no cache
answers in place of the engine.
"""

import os
import sys

if __name__ == "__main__":
    # A script's own directory comes first on the import path; there this file would stand in for
    # the standard library's `http` package, which asyncio's and httpx's imports need.
    _here = os.path.dirname(os.path.realpath(__file__))
    sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry) != _here]

import argparse
import asyncio
import contextlib
import ipaddress
import json
import math
import random
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx

NOT_FINISHED = "not finished within --timeout"
TEXT_FIELDS = ("content", "reasoning_content", "reasoning", "tool_calls")
_WORDS = (
    "river stone lamp bird cloud letter garden winter bridge coffee paper train window music "
    "forest silver market island candle mirror story engine summer shadow painter doctor ocean "
    "bread clock horse violin tower desert flower kitchen sailor valley thunder ladder blanket "
    "orange pocket whisper copper basket castle feather harbor lantern meadow needle pepper "
    "rocket saddle temple velvet wagon yellow anchor button circle dragon"
)
WORDS = _WORDS.split()


# --- what is asked for ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Target:
    """One server to be measured."""

    url: str  # of its chat completions
    model: str
    api_key: str | None = None

    @property
    def label(self) -> str:
        return f"{self.model}@{urlsplit(self.url).netloc.rpartition('@')[2]}"


@dataclass(frozen=True, slots=True)
class Load:
    """What every target has to serve."""

    levels: tuple[int, ...] = (1, 4, 8, 16)
    requests_per_level: int = 32
    max_tokens: int = 40
    prompt_words: int = 32
    shared_words: int = 0
    seed: int = 0
    timeout_s: float = 300.0
    extra: dict[str, Any] = field(default_factory=dict)  # further fields of each request body


def chat_url(url: str) -> str:
    """The chat completions URL of a server named by its root, its `/v1`, or in full."""
    base = url.rstrip("/").removesuffix("/chat/completions").removesuffix("/v1")
    return f"{base}/v1/chat/completions"


def is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def request_bodies(load: Load, level: int, model: str) -> list[dict[str, Any]]:
    """The requests of one level: the same for every target, no two alike, none met before."""
    count = max(load.requests_per_level, level)
    return [_body(load, model, f"{load.seed}/{level}/{index}") for index in range(count)]


def _body(load: Load, model: str, name: str) -> dict[str, Any]:
    # The random words lead, or the engine would reuse the common beginning of all prompts.
    words = " ".join(random.Random(name).choices(WORDS, k=load.prompt_words))
    messages = [{"role": "user", "content": f"{words}. Tell a long story with all these words."}]
    if load.shared_words:
        shared = random.Random(f"{load.seed}/shared").choices(WORDS, k=load.shared_words)
        messages.insert(0, {"role": "system", "content": " ".join(shared)})
    return {
        "model": model,
        "messages": messages,
        "max_tokens": load.max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    } | load.extra


# --- what comes back -----------------------------------------------------------------------------


class SSEParser:
    """Bytes as they arrive → payloads of whole events, however the bytes were cut."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, chunk: bytes) -> list[bytes]:
        lines = (self._rest + chunk).splitlines(keepends=True)
        # A line that ends in \r alone may be the first half of \r\n: it waits as well.
        self._rest = lines.pop() if lines and not lines[-1].endswith(b"\n") else b""
        payloads: list[bytes] = []
        for line in lines:
            name, _, value = line.rstrip(b"\r\n").partition(b":")
            if name == b"data":
                self._data.append(value.removeprefix(b" "))
            elif not line.strip(b"\r\n") and self._data:
                payloads.append(b"\n".join(self._data))
                self._data.clear()
        return payloads


@dataclass(slots=True)
class Trace:
    """What one request showed. It counts as failed until its end is seen."""

    sent_at: float = 0.0
    first_token_s: float | None = None
    gaps_s: list[float] = field(default_factory=list)
    chunks: int = 0
    usage: dict[str, Any] = field(default_factory=dict)
    finished: bool = False
    error: str | None = NOT_FINISHED
    _last_at: float = 0.0

    def observe(self, payload: bytes, now: float) -> None:
        """Take in one event. ValueError: it is not what this API sends."""
        if payload == b"[DONE]":
            self.finished = True
            return
        try:
            event = json.loads(payload)
        except ValueError:
            raise ValueError(f"event is not JSON: {payload[:80]!r}") from None
        if not isinstance(event, dict):
            raise ValueError(f"event is no object: {payload[:80]!r}")
        if event.get("error"):
            raise ValueError(f"error event: {error_message(event)}")
        self.usage = event.get("usage") or self.usage
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or {}
            if any(delta.get(name) for name in TEXT_FIELDS):
                self._text_at(now)
            self.finished = self.finished or bool(choice.get("finish_reason"))

    def _text_at(self, now: float) -> None:
        if self.first_token_s is None:
            self.first_token_s = now - self.sent_at
        else:
            self.gaps_s.append(now - self._last_at)
        self._last_at = now
        self.chunks += 1

    @property
    def completion_tokens(self) -> int:
        """As the server counts them; where it does not, the chunks that carried text."""
        return int(self.usage.get("completion_tokens") or self.chunks)

    @property
    def prompt_tokens(self) -> int:
        return int(self.usage.get("prompt_tokens") or 0)

    @property
    def cached_tokens(self) -> int:
        details = self.usage.get("prompt_tokens_details") or {}
        return int(details.get("cached_tokens") or 0)


def error_message(body: Any) -> str:
    """The words of an error body, in OpenAI's envelope or one of the shapes other servers use."""
    error = body.get("error") or body.get("detail") or body if isinstance(body, dict) else body
    message = error.get("message", error) if isinstance(error, dict) else error
    return " ".join(str(message).split())[:300]


# --- statistics ----------------------------------------------------------------------------------


def percentile(samples: Sequence[float], percent: float) -> float | None:
    """Linear between the two nearest ranks; None where nothing was measured."""
    if not samples:
        return None
    ordered = sorted(samples)
    rank = (len(ordered) - 1) * percent / 100
    low, high = math.floor(rank), math.ceil(rank)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


@dataclass(frozen=True, slots=True)
class LevelReport:
    """One target at one concurrency. Rates and latencies are of the requests that succeeded."""

    target: str
    concurrency: int
    requests: int
    wall_s: float
    completion_tokens: int
    tokens_per_s: float
    requests_per_s: float
    first_token_p50_s: float | None
    first_token_p99_s: float | None
    gap_p50_s: float | None
    gap_p99_s: float | None
    cached_share: float | None  # of the prompt tokens; None: the server does not count them
    client_cpu: float  # of one core; near 1 the client is what was measured
    errors: int
    first_error: str | None


def summarise(
    target: str, concurrency: int, traces: Sequence[Trace], wall_s: float, cpu_s: float
) -> LevelReport:
    good = [trace for trace in traces if trace.error is None]
    errors = [trace.error for trace in traces if trace.error is not None]
    tokens = sum(trace.completion_tokens for trace in good)
    first = [trace.first_token_s for trace in good if trace.first_token_s is not None]
    gaps = [gap for trace in good for gap in trace.gaps_s]
    prompt_tokens = sum(trace.prompt_tokens for trace in good)
    return LevelReport(
        target=target,
        concurrency=concurrency,
        requests=len(traces),
        wall_s=wall_s,
        completion_tokens=tokens,
        tokens_per_s=tokens / wall_s,
        requests_per_s=len(good) / wall_s,
        first_token_p50_s=percentile(first, 50),
        first_token_p99_s=percentile(first, 99),
        gap_p50_s=percentile(gaps, 50),
        gap_p99_s=percentile(gaps, 99),
        cached_share=(
            sum(trace.cached_tokens for trace in good) / prompt_tokens if prompt_tokens else None
        ),
        client_cpu=cpu_s / wall_s,
        errors=len(errors),
        # What the server said tells more than that time ran out.
        first_error=min(errors, key=lambda error: error == NOT_FINISHED, default=None),
    )


RATIOS = (
    "tokens_per_s",
    "requests_per_s",
    "first_token_p50_s",
    "first_token_p99_s",
    "gap_p50_s",
    "gap_p99_s",
)


def ratios(ours: LevelReport, peer: LevelReport) -> dict[str, float | None]:
    """Ours over the peer's, by metric: more is better for rates, less for latencies."""
    pairs = {name: (getattr(ours, name), getattr(peer, name)) for name in RATIOS}
    return {name: a / b if a is not None and b else None for name, (a, b) in pairs.items()}


# --- the run -------------------------------------------------------------------------------------


class TargetDown(Exception):
    """A target did not even answer the warm-up request."""


async def run(load: Load, targets: Sequence[Target]) -> AsyncIterator[list[LevelReport]]:
    """Each level in turn on every target; yields a level's reports in the order of `targets`."""
    for target in targets:  # the first request may have to load the model: not measured
        report = await run_level(target, 1, [_body(load, target.model, "warm-up")], load.timeout_s)
        if report.first_error:
            raise TargetDown(f"{target.label} ({target.url}): {report.first_error}")
    order = list(targets)
    for level in load.levels:
        reports = {}
        for target in order:
            bodies = request_bodies(load, level, target.model)
            reports[target] = await run_level(target, level, bodies, load.timeout_s)
        order.reverse()  # neither is always the one that finds the machine warmed up
        yield [reports[target] for target in targets]


async def run_level(
    target: Target, concurrency: int, bodies: Sequence[dict[str, Any]], timeout_s: float
) -> LevelReport:
    """Serve all bodies, `concurrency` at a time; what `timeout_s` leaves undone is an error."""
    traces = [Trace() for _ in bodies]
    work = iter(zip(bodies, traces, strict=True))
    headers = {"accept-encoding": "identity"}
    if target.api_key:
        headers["authorization"] = f"Bearer {target.api_key}"
    # One client a level: a connection that idled during a peer's turn may be closed by its server.
    async with httpx.AsyncClient(
        headers=headers,
        timeout=httpx.Timeout(None, connect=10),
        limits=httpx.Limits(max_connections=concurrency),
        trust_env=False,  # no proxy between the clock and the server
    ) as client:
        started, cpu = time.perf_counter(), time.process_time()
        lanes = asyncio.gather(*(_lane(client, target.url, work) for _ in range(concurrency)))
        # Another class than the built-in TimeoutError in Python 3.10. What is open then says so.
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(lanes, timeout_s)
        wall_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu
    return summarise(target.label, concurrency, traces, wall_s, cpu_s)


async def _lane(
    client: httpx.AsyncClient, url: str, work: Iterator[tuple[dict[str, Any], Trace]]
) -> None:
    for body, trace in work:
        await _request(client, url, json.dumps(body).encode(), trace)


async def _request(client: httpx.AsyncClient, url: str, content: bytes, trace: Trace) -> None:
    """One request to its end; whatever goes wrong in it is its trace's error, not the run's."""
    trace.sent_at = time.perf_counter()
    try:
        async with client.stream(
            "POST", url, content=content, headers={"content-type": "application/json"}
        ) as response:
            await _read_stream(response, trace)
        trace.error = None
    except ValueError as fault:
        trace.error = str(fault)
    except (httpx.HTTPError, AttributeError, TypeError) as fault:  # the last two: odd JSON
        trace.error = f"{type(fault).__name__}: {fault}"


async def _read_stream(response: httpx.Response, trace: Trace) -> None:
    if response.status_code != 200:
        raise ValueError(f"HTTP {response.status_code}: {_words(await response.aread())}")
    parser = SSEParser()
    async for chunk in response.aiter_raw():
        now = time.perf_counter()
        for payload in parser.feed(chunk):
            trace.observe(payload, now)
    if not trace.finished:
        kind = response.headers.get("content-type", "no content type")
        raise ValueError(f"the stream ended without finish_reason or [DONE] ({kind})")


def _words(body: bytes) -> str:
    try:
        return error_message(json.loads(body))
    except ValueError:
        return error_message(body.decode(errors="replace"))


# --- printing ------------------------------------------------------------------------------------

HEAD = (
    f"{'conc':>4} {'tok/s':>8} {'req/s':>7} {'first p50':>10} {'p99 ms':>8} "
    f"{'gap p50':>8} {'p99 ms':>8} {'reused':>6} {'client':>6} {'errors':>6}"
)


def table_rows(reports: Sequence[LevelReport]) -> Iterator[str]:
    """One line a target, the first with its ratios to the second; then what went wrong."""
    for index, report in enumerate(reports):
        row = (
            f"{report.concurrency:>4} {report.tokens_per_s:>8.1f} {report.requests_per_s:>7.2f} "
            f"{_ms(report.first_token_p50_s):>10} {_ms(report.first_token_p99_s):>8} "
            f"{_ms(report.gap_p50_s):>8} {_ms(report.gap_p99_s):>8} "
            f"{_percent(report.cached_share):>6} {_percent(report.client_cpu):>6} "
            f"{report.errors:>6}"
        )
        if len(reports) == 2:
            ratio = ratios(*reports) if index == 0 else {}
            row += f" {_times(ratio.get('tokens_per_s')):>8}"
            row += f" {_times(ratio.get('first_token_p50_s')):>8}"
        yield f"{row}  {report.target}"
    for report in reports:
        if report.errors:
            yield (
                f"     {report.target}: {report.errors} of {report.requests} requests failed, "
                f"first: {report.first_error}"
            )


def table_head(n_targets: int) -> str:
    return HEAD + (f" {'x tok/s':>8} {'x first':>8}" if n_targets == 2 else "") + "  target"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.1f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


def as_json(load: Load, levels: Iterable[Sequence[LevelReport]]) -> str:
    return json.dumps(
        {
            "load": asdict(load),
            "levels": [
                {
                    "concurrency": reports[0].concurrency,
                    "runs": [asdict(report) for report in reports],
                    "ratio": ratios(*reports) if len(reports) == 2 else None,
                }
                for reports in levels
            ],
        },
        indent=2,
    )


# --- the command ---------------------------------------------------------------------------------


def _levels(text: str) -> tuple[int, ...]:
    return tuple(_count(part) for part in text.split(","))


def _count(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number of at least 1 is needed, not {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:  # a run that ends by itself needs an end
        raise argparse.ArgumentTypeError(f"a positive number of seconds is needed, not {text!r}")
    return value


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as fault:
        raise argparse.ArgumentTypeError(f"not JSON: {fault}") from fault
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("a JSON object is needed")
    return value


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench/http.py", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    add("url", help="server root, its /v1, or the chat completions URL in full")
    add("--model", default="light")
    add("--api-key", help="sent to URL only")
    add(
        "--concurrency", type=_levels, default=(1, 4, 8, 16), metavar="N,N", help="levels, in order"
    )
    add("--requests-per-level", type=_count, default=32, metavar="N", help="at least the level's N")
    add("--max-tokens", type=_count, default=40, metavar="N")
    add("--prompt-tokens", type=_count, default=32, metavar="N", help="about N: words of one token")
    add("--shared-prefix", type=_count, default=0, metavar="N", help="a system message for all")
    add("--peer", metavar="URL", help="a second server, measured level by level in turns")
    add("--peer-model", metavar="NAME", help="default: that of --model")
    add("--peer-api-key", metavar="KEY")
    add("--extra", type=_json_object, default={}, metavar="JSON", help="further request fields")
    add(
        "--seed",
        type=int,
        help="of the prompts; default: a new one, so a second run meets no cache",
    )
    add("--timeout", type=_seconds, default=300.0, metavar="S", help="of one level on one target")
    add("--allow-remote", action="store_true", help="targets that are not on this machine")
    add("--json", action="store_true", help="one JSON object in place of the table")
    args = parser.parse_args(argv)
    for url in filter(None, (args.url, args.peer)):
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
            parser.error(f"{url!r} is no http:// or https:// URL")
        if not args.allow_remote and not is_loopback(url):
            parser.error(
                f"{url} is not on this machine; --allow-remote puts load on it all the same"
            )
    same = args.peer and chat_url(args.peer) == chat_url(args.url)
    if same and args.peer_model in (None, args.model):
        parser.error("--peer is the same model of the same server: its cache would answer")
    return args


async def measure(load: Load, targets: Sequence[Target], *, json_only: bool) -> int:
    """Run and print; the number of failed requests."""
    levels = []
    if not json_only:
        print(
            f"{load.requests_per_level} requests a level, {load.prompt_words}"
            f"{f' + {load.shared_words} shared' if load.shared_words else ''} prompt words, "
            f"at most {load.max_tokens} tokens, seed {load.seed}"
        )
        print(table_head(len(targets)), flush=True)
    async for reports in run(load, targets):
        levels.append(reports)
        if not json_only:
            print(*table_rows(reports), sep="\n", flush=True)
    if json_only:
        print(as_json(load, levels))
    return sum(report.errors for reports in levels for report in reports)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 1 where a request failed or a target is down (2 is argparse's)."""
    args = parse_args(argv)
    load = Load(
        levels=args.concurrency,
        requests_per_level=args.requests_per_level,
        max_tokens=args.max_tokens,
        prompt_words=args.prompt_tokens,
        shared_words=args.shared_prefix,
        seed=random.SystemRandom().randrange(1_000_000) if args.seed is None else args.seed,
        timeout_s=args.timeout,
        extra=args.extra,
    )
    targets = [Target(chat_url(args.url), args.model, args.api_key)]
    if args.peer:
        peer_model = args.peer_model or args.model
        targets.append(Target(chat_url(args.peer), peer_model, args.peer_api_key))
    try:
        return 1 if asyncio.run(measure(load, targets, json_only=args.json)) else 0
    except TargetDown as fault:
        print(f"no measurement: {fault}", file=sys.stderr)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
