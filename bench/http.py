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
import random
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np

NOT_FINISHED = "not finished within --timeout"
WORDS = (
    "river stone lamp bird cloud letter garden winter bridge coffee paper train window music "
    "forest silver market island candle mirror story engine summer shadow painter doctor ocean "
    "bread clock horse violin tower desert flower kitchen sailor valley thunder ladder blanket"
).split()


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
    requests: int = 32  # of a level, at least as many as its concurrency
    max_tokens: int = 40
    prompt_words: int = 32
    shared_words: int = 0
    intruder_words: int = 0  # of one more prompt, once all streams of a level run; not counted
    seed: int = 0
    timeout_s: float = 300.0  # of one level on one target


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
    count = max(load.requests, level)
    return [_body(load, model, f"{load.seed}/{level}/{index}") for index in range(count)]


def intruder_body(load: Load, level: int, model: str) -> dict[str, Any] | None:
    """The request that disturbs a level, if one is wanted."""
    if not load.intruder_words:
        return None
    load = replace(load, prompt_words=load.intruder_words, shared_words=0, max_tokens=1)
    return _body(load, model, f"{load.seed}/{level}/intruder")


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
    }


class SSEParser:
    """Bytes as they arrive → the data of whole events, however the bytes were cut."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> list[bytes]:
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]


@dataclass(slots=True)
class Trace:
    """What one request showed. It counts as failed until its end is seen."""

    sent_at: float = 0.0
    text_at: list[float] = field(default_factory=list)  # when each piece of text came
    counted_tokens: int = 0  # by the server; where it does not, the pieces of text count
    finished: bool = False
    error: str | None = NOT_FINISHED

    def observe(self, payload: bytes, now: float) -> None:
        """Take in one event. ValueError: it is not what this API sends."""
        if payload == b"[DONE]":
            self.finished = True
            return
        event = json.loads(payload)
        if not isinstance(event, dict) or event.get("error"):
            raise ValueError(f"error event: {payload[:300].decode(errors='replace')}")
        usage = event.get("usage") or {}
        self.counted_tokens = usage.get("completion_tokens") or self.counted_tokens
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or {}
            if any(delta.get(name) for name in ("content", "reasoning_content", "reasoning")):
                self.text_at.append(now)
            self.finished = self.finished or bool(choice.get("finish_reason"))


def percentile(samples: Sequence[float], percent: float) -> float | None:
    """Linear between the two nearest ranks; None where nothing was measured."""
    return float(np.percentile(samples, percent)) if samples else None


@dataclass(frozen=True, slots=True)
class LevelReport:
    """One target at one concurrency. The metrics are of the requests that succeeded."""

    target: str
    concurrency: int
    requests: int
    completion_tokens: int
    wall_s: float
    metrics: dict[str, float | None]
    errors: int
    first_error: str | None


def summarise(target: str, concurrency: int, traces: Sequence[Trace], wall_s: float) -> LevelReport:
    good = [trace for trace in traces if trace.error is None]
    errors = [trace.error for trace in traces if trace.error is not None]
    tokens = sum(trace.counted_tokens or len(trace.text_at) for trace in good)
    first_ms = [(trace.text_at[0] - trace.sent_at) * 1000 for trace in good if trace.text_at]
    gaps_ms = [(b - a) * 1000 for trace in good for a, b in pairwise(trace.text_at)]
    metrics = {
        "tokens_per_s": tokens / wall_s,
        "first_token_p50_ms": percentile(first_ms, 50),
        "first_token_p99_ms": percentile(first_ms, 99),
        "gap_p50_ms": percentile(gaps_ms, 50),
        "gap_p99_ms": percentile(gaps_ms, 99),
    }
    return LevelReport(
        target=target,
        concurrency=concurrency,
        requests=len(traces),
        completion_tokens=tokens,
        wall_s=wall_s,
        metrics=metrics,
        errors=len(errors),
        # What the server said tells more than that time ran out.
        first_error=min(errors, key=lambda error: error == NOT_FINISHED, default=None),
    )


def ratio(reports: Sequence[LevelReport]) -> dict[str, float | None] | None:
    """Of two targets, ours over the peer's: more is better for the rate, less for the times."""
    if len(reports) != 2:
        return None
    ours, peer = (report.metrics for report in reports)
    pairs = {name: (ours[name], peer[name]) for name in ours}
    return {name: a / b if a is not None and b else None for name, (a, b) in pairs.items()}


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
            intruder = intruder_body(load, level, target.model)
            reports[target] = await run_level(target, level, bodies, load.timeout_s, intruder)
        order.reverse()  # neither is always the one that finds the machine warmed up
        yield [reports[target] for target in targets]


async def run_level(
    target: Target,
    concurrency: int,
    bodies: Sequence[dict[str, Any]],
    timeout_s: float,
    intruder: dict[str, Any] | None = None,
) -> LevelReport:
    """Serve all bodies, `concurrency` at a time; what `timeout_s` leaves undone is an error."""
    traces = [Trace() for _ in bodies]
    disturbance = Trace()
    work = iter(zip(bodies, traces, strict=True))
    headers = {"accept-encoding": "identity"}  # no compressor that waits for more text
    if target.api_key:
        headers["authorization"] = f"Bearer {target.api_key}"
    # One client a level: a connection that idled during a peer's turn may be closed by its server.
    async with httpx.AsyncClient(
        headers=headers,
        timeout=httpx.Timeout(None, connect=10),
        limits=httpx.Limits(max_connections=concurrency + 1),
        trust_env=False,  # no proxy between the clock and the server
    ) as client:
        started = time.perf_counter()
        tasks = [_lane(client, target.url, work) for _ in range(concurrency)]
        if intruder:
            first = traces[:concurrency]
            tasks.append(_intrude(client, target.url, intruder, first, disturbance))
        lanes = asyncio.gather(*tasks)
        # Another class than the built-in TimeoutError in Python 3.10. What is open then says so.
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(lanes, timeout_s)
        wall_s = time.perf_counter() - started
    if intruder and disturbance.error:
        traces.append(disturbance)
    return summarise(target.label, concurrency, traces, wall_s)


async def _intrude(
    client: httpx.AsyncClient,
    url: str,
    body: dict[str, Any],
    streams: Sequence[Trace],
    trace: Trace,
) -> None:
    while not all(len(stream.text_at) > 1 for stream in streams):  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    await _lane(client, url, iter([(body, trace)]))


async def _lane(
    client: httpx.AsyncClient, url: str, work: Iterator[tuple[dict[str, Any], Trace]]
) -> None:
    for body, trace in work:
        trace.sent_at = time.perf_counter()
        try:
            async with client.stream("POST", url, json=body) as response:
                await _read_stream(response, trace)
            trace.error = None
        # Whatever goes wrong is the request's error and not the run's; the last two: odd JSON.
        except (httpx.HTTPError, ValueError, AttributeError, TypeError) as fault:
            trace.error = f"{type(fault).__name__}: {fault}"


async def _read_stream(response: httpx.Response, trace: Trace) -> None:
    if response.status_code != 200:
        said = (await response.aread()).decode(errors="replace")
        raise ValueError(f"HTTP {response.status_code}: {' '.join(said.split())[:300]}")
    parser = SSEParser()
    async for chunk in response.aiter_bytes():
        now = time.perf_counter()
        for payload in parser.feed(chunk):
            trace.observe(payload, now)
    if not trace.finished:
        raise ValueError("the stream ended without finish_reason or [DONE]")


HEAD = "conc      tok/s  first p50     p99 ms    gap p50     p99 ms  errors  target"


def table_rows(reports: Sequence[LevelReport]) -> Iterator[str]:
    """A line for each target; then the ratio of the two, and what went wrong."""
    for report in reports:
        cells = _cells(report.metrics, ".1f")
        yield f"{report.concurrency:>4} {cells} {report.errors:>7}  {report.target}"
    if ours_to_peer := ratio(reports):
        yield f"{'':4} {_cells(ours_to_peer, '.2f')} {'':7}  ours / peer"
    for report in reports:
        if report.errors:
            failed = f"{report.errors} of {report.requests} requests failed"
            yield f"     {report.target}: {failed}, first: {report.first_error}"


def _cells(metrics: dict[str, float | None], form: str) -> str:
    return " ".join(f"{'-' if x is None else format(x, form):>10}" for x in metrics.values())


async def measure(load: Load, targets: Sequence[Target], *, as_json: bool) -> int:
    """Run and print; the number of failed requests."""
    levels = []
    if not as_json:
        print(", ".join(f"{name} {value}" for name, value in asdict(load).items()))
        print(HEAD, flush=True)
    async for reports in run(load, targets):
        levels.append(reports)
        if not as_json:
            print(*table_rows(reports), sep="\n", flush=True)
    if as_json:
        parts = [{"runs": list(map(asdict, level)), "ratio": ratio(level)} for level in levels]
        print(json.dumps({"load": asdict(load), "levels": parts}, indent=2))
    return sum(report.errors for level in levels for report in level)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(_count(part) for part in text.split(","))


def _count(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number of at least 1 is needed, not {text!r}")
    return int(text)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("url", help="server root, its /v1, or the chat completions URL in full")
    add("--model", default="light")
    add("--api-key", help="sent to URL only")
    add("--concurrency", type=_counts, default=(1, 4, 8, 16), metavar="N,N", help="levels in order")
    add("--requests", type=_count, default=32, metavar="N", help="of a level, at least its N")
    add("--max-tokens", type=_count, default=40, metavar="N")
    add("--prompt-words", type=_count, default=32, metavar="N", help="about one token each")
    add("--shared-words", type=_count, default=0, metavar="N", help="a system message for all")
    add("--intruder-words", type=_count, default=0, metavar="N", help="a prompt amid the streams")
    add("--peer", metavar="URL", help="a second server, measured level by level in turns")
    add("--peer-model", metavar="NAME", help="default: that of --model")
    add("--peer-api-key", metavar="KEY")
    add("--seed", type=int, help="of the prompts; default: a new one, so a second run is no rerun")
    add("--timeout", type=_count, default=300, metavar="S", help="of one level on one target")
    add("--allow-remote", action="store_true", help="targets that are not on this machine")
    add("--json", action="store_true", help="one JSON object in place of the table")
    args = parser.parse_args(argv)
    for url in filter(None, (args.url, args.peer)):
        if not args.allow_remote and not is_loopback(url):
            parser.error(f"{url} is not on this machine; --allow-remote loads it all the same")
    same = args.peer and chat_url(args.peer) == chat_url(args.url)
    if same and args.peer_model in (None, args.model):
        parser.error("--peer is the same model of the same server: its cache would answer")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 1 where a request failed or a target is down (2 is argparse's)."""
    args = parse_args(argv)
    load = Load(
        levels=args.concurrency,
        requests=args.requests,
        max_tokens=args.max_tokens,
        prompt_words=args.prompt_words,
        shared_words=args.shared_words,
        intruder_words=args.intruder_words,
        seed=random.SystemRandom().randrange(1_000_000) if args.seed is None else args.seed,
        timeout_s=args.timeout,
    )
    targets = [Target(chat_url(args.url), args.model, args.api_key)]
    if args.peer:
        peer_model = args.peer_model or args.model
        targets.append(Target(chat_url(args.peer), peer_model, args.peer_api_key))
    try:
        return 1 if asyncio.run(measure(load, targets, as_json=args.json)) else 0
    except TargetDown as fault:
        print(f"no measurement: {fault}", file=sys.stderr)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
