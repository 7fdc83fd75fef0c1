"""Smoke test of a running service: `python test_api.py [URL]`, one line for each endpoint.

`--fake` boots a server of its own on the weightless `fake` backend and ends it again. The exit code
is 0 only if all that is configured works. Needs httpx and the standard library.
"""

import argparse
import json
import math
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx

Check = Callable[[httpx.Client], object]  # returns a remark, raises Failed or Skipped
FINISH_REASONS = ("stop", "length", "tool_calls", "content_filter", "function_call")
GENERATION_COUNTS = ("prompt_tokens", "completion_tokens", "total_tokens")


class Failed(Exception):
    """The service answered, and the answer is wrong."""


class Skipped(Exception):
    """Nothing is wrong: this installation does not have it."""


def expect(is_right: object, fault: str) -> None:
    if not is_right:
        raise Failed(fault)


# What a right answer looks like: pure functions.


def sse_events(chunks: Iterable[bytes]) -> Iterator[str]:
    """The `data` of each event. Cuts bytes, not text: a chunk may end inside a character."""
    rest = b""
    for chunk in chunks:
        *events, rest = (rest + chunk).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in events:
            lines = [line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:")]
            if lines:  # a comment has none
                yield b"\n".join(lines).decode()


def is_usage(usage: Any, counts: Sequence[str]) -> bool:
    """Whether the counts are whole numbers, the last of them the sum of the others."""
    values = [usage.get(name) for name in counts] if isinstance(usage, dict) else [None]
    return all(type(value) is int for value in values) and sum(values[:-1]) == values[-1]


def text_of(choice: dict[str, Any]) -> str:
    """The text of a choice: of a message, of a delta, or in the legacy form."""
    part = choice.get("message") or choice.get("delta") or choice
    return part.get("content") or part.get("reasoning_content") or part.get("text") or ""


def stream_faults(events: Sequence[str], *, chat: bool, include_usage: bool) -> list[str]:
    """What is wrong with the events of one streamed answer; empty if nothing is."""
    if not events or events[-1] != "[DONE]":
        return ["the last event is not [DONE]"]
    try:
        chunks = [json.loads(event) for event in events[:-1]]
    except ValueError:
        return ["an event before the last is not JSON"]
    for chunk in chunks:
        if not isinstance(chunk, dict) or "error" in chunk:
            return [f"an event is no chunk: {chunk}"]
    choices = [chunk["choices"][0] for chunk in chunks if chunk.get("choices")]
    if not choices:
        return ["no chunk has choices"]
    kind = "chat.completion.chunk" if chat else "text_completion"
    finish = [choice.get("finish_reason", "absent") for choice in choices]
    delta = [choice.get("delta", {}) for choice in choices]
    usage = [chunk.get("usage", "absent") for chunk in chunks]
    rules = {
        f"object is not always {kind}": all(chunk.get("object") == kind for chunk in chunks),
        "the first chunk gives no role": not chat or delta[0].get("role") == "assistant",
        "no chunk carries text": any(map(text_of, choices)),
        "finish_reason is not null before the last choice": set(finish[:-1]) <= {None},
        "the last choice has no finish_reason": finish[-1] in FINISH_REASONS,
        "the chunk with finish_reason has a delta": delta[-1] == {},
    }
    for name in ("id", "created", "model"):
        values = {str(chunk.get(name)) for chunk in chunks}
        rules[f"{name} is missing or changes"] = len(values) == 1 and values != {"None"}
    if include_usage:
        is_last = len(chunks) == len(choices) + 1 and chunks[-1].get("choices") == []
        rules["not exactly the last chunk has no choices"] = is_last
        rules["the last chunk has no usage"] = is_usage(usage[-1], GENERATION_COUNTS)
        rules["usage is not null before the last chunk"] = usage[:-1] == [None] * len(choices)
    else:
        rules["a chunk without choices, not asked for"] = len(chunks) == len(choices)
        rules["usage that was not asked for"] = all(value in ("absent", None) for value in usage)
    return [fault for fault, is_right in rules.items() if not is_right]


# One function for each kind of line in the report.


def answer(response: httpx.Response) -> Any:
    expect(response.status_code == 200, f"HTTP {response.status_code}: {response.text[:300]}")
    return response.json()


def error(response: httpx.Response, *statuses: int) -> Any:
    """The error of a reply that must be one, in OpenAI's envelope."""
    expect(response.status_code in statuses, f"HTTP {response.status_code}, not {statuses[0]}")
    fields = response.json().get("error") or {}
    expect(fields.keys() >= {"message", "type", "param", "code"}, f"no error envelope: {fields}")
    return fields


def check_health(client: httpx.Client) -> object:
    return answer(client.get("/health")).get("status", "")


def check_model(client: httpx.Client, model: str) -> object:
    body = answer(client.get(f"/v1/models/{model}"))
    expect((body["id"], body["object"]) == (model, "model"), f"another object: {body}")
    return f"{body['path']} on {body['backend']}, {body['state']}, {body['context_length']} tokens"


def generation(model: str, *, chat: bool, **more: object) -> tuple[str, dict[str, Any]]:
    """Path and body of a request; the random seed keeps a cache from answering it."""
    text = "Say hello and name three colours."
    body = {"model": model, "max_tokens": 24, "seed": random.randrange(2**31)} | more
    if chat:
        return "/v1/chat/completions", body | {"messages": [{"role": "user", "content": text}]}
    return "/v1/completions", body | {"prompt": text}


def check_whole(client: httpx.Client, model: str, *, chat: bool) -> object:
    path, request = generation(model, chat=chat)
    body = answer(client.post(path, json=request))
    expect(body["object"] == ("chat.completion" if chat else "text_completion"), body["object"])
    (choice,) = body["choices"]
    expect(not chat or choice["message"]["role"] == "assistant", "the role is not assistant")
    expect(choice["finish_reason"] in FINISH_REASONS, f"finish {choice['finish_reason']!r}")
    expect(is_usage(body["usage"], GENERATION_COUNTS), f"usage {body['usage']}")
    expect(text_of(choice), "the answer is empty")
    return " ".join(text_of(choice).split())[:50]


def check_stream(client: httpx.Client, model: str, *, chat: bool) -> object:
    """Without usage, because many clients index choices[0] in every chunk; then with it."""
    for options in ({}, {"stream_options": {"include_usage": True}}):
        path, request = generation(model, chat=chat, stream=True, **options)
        started = time.perf_counter()
        with client.stream("POST", path, json=request) as response:
            if response.status_code != 200:
                response.read()
                answer(response)
            expect("text/event-stream" in response.headers["content-type"], "no event stream")
            events = list(sse_events(response.iter_raw()))
        seconds = time.perf_counter() - started
        faults = stream_faults(events, chat=chat, include_usage=bool(options))
        expect(not faults, "; ".join(faults))
    tokens = json.loads(events[-2])["usage"]["completion_tokens"]
    return f"{tokens} tokens in {len(events)} events, {tokens / seconds:.1f} tokens/s"


def check_embeddings(client: httpx.Client, model: str) -> object:
    request = {"model": model, "input": ["A cat.", "A dog."], "encoding_format": "float"}
    body = answer(client.post("/v1/embeddings", json=request))
    expect([item["index"] for item in body["data"]] == [0, 1], "not the inputs in their order")
    one, two = (item["embedding"] for item in body["data"])
    expect(len(one) == len(two) and any(one) and any(two), "empty, zero or unequal vectors")
    expect(all(map(math.isfinite, one + two)), "a value is not finite")
    expect(is_usage(body["usage"], ("prompt_tokens", "total_tokens")), f"usage {body['usage']}")
    return f"{len(one)} dimensions"


def check_rerank(client: httpx.Client, model: str) -> object:
    documents = ["Bread is baked.", "Paris is the capital of France.", "Cats sleep."]
    request = {"model": model, "query": "What is the capital of France?", "documents": documents}
    results = answer(client.post("/v1/rerank", json=request))["results"]
    expect(sorted(item["index"] for item in results) == [0, 1, 2], "not one result a document")
    scores = [item["relevance_score"] for item in results]
    expect(all(map(math.isfinite, scores)), "a score is not finite")
    expect(scores == sorted(scores, reverse=True), "results are not sorted by score")
    return f"best: {documents[results[0]['index']]} ({scores[0]:.3f})"


def check_absent(client: httpx.Client, path: str, model: str) -> object:
    """No tier lists the capability, and the service has to say so."""
    body = {"model": model, "input": "Hello", "query": "Hello", "documents": ["Hello"]}
    code = error(client.post(path, json=body), 400, 404)["code"]
    expect(code in ("unsupported_parameter", "model_not_found"), f"error.code is {code!r}")
    raise Skipped("not in this version" if code == "unsupported_parameter" else "no tier for it")


def check_refusal(client: httpx.Client, status: int, body: object, **expected: str) -> object:
    fields = error(client.post("/v1/chat/completions", json=body), status)
    for name, value in expected.items():
        expect(str(fields[name]).startswith(value), f"error.{name} is {fields[name]!r}")
    return fields["message"]


def plan(models: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str, Check]]:
    """(endpoint, tier, check) for everything that the configured models have to do."""

    def able(capability: str) -> list[str]:
        return [model["id"] for model in models if capability in model["capabilities"]]

    for model in models:
        yield "GET /v1/models/{id}", model["id"], partial(check_model, model=model["id"])
    for path, tiers, chat in (
        ("/v1/chat/completions", able("chat"), True),
        ("/v1/completions", able("chat"), False),
    ):
        for tier in tiers:
            yield f"POST {path}", tier, partial(check_whole, model=tier, chat=chat)
            yield f"POST {path} stream", tier, partial(check_stream, model=tier, chat=chat)
    for path, tiers, name, check in (
        ("/v1/embeddings", able("embedding"), "embedding", check_embeddings),
        ("/v1/rerank", able("rerank"), "reranker", check_rerank),
    ):
        for tier in tiers:
            yield f"POST {path}", tier, partial(check, model=tier)
        if not tiers:
            yield f"POST {path}", "", partial(check_absent, path=path, model=name)
    unknown = {"model": "no-such-model", "messages": [{"role": "user", "content": "Hello"}]}
    refusal = partial(check_refusal, status=404, body=unknown, code="model_not_found")
    yield "error: unknown model", "", refusal
    body = {"model": (able("chat") or ["light"])[0], "messages": "not a list"}
    yield "error: bad body", "", partial(check_refusal, status=400, body=body, param="messages")


def passes(client: httpx.Client, endpoint: str, tier: str, check: Check) -> bool:
    """Run one check and print its line."""
    started = time.perf_counter()
    try:
        verdict, remark = "ok", check(client)
    except Skipped as reason:
        verdict, remark = "skip", reason
    except Failed as fault:
        verdict, remark = "FAIL", fault
    except Exception as fault:  # a reply of another shape than the check reads is its failure too
        verdict, remark = "FAIL", f"{type(fault).__name__}: {fault}"
    ms = (time.perf_counter() - started) * 1000
    print(f"{verdict:4}  {endpoint:32} {tier:10} {ms:7.0f} ms  {remark}", flush=True)
    return verdict != "FAIL"


def run(client: httpx.Client) -> int:
    """Number of failed lines."""
    models: list[dict[str, Any]] = []

    def check_models(client: httpx.Client) -> object:
        models.extend(answer(client.get("/v1/models"))["data"])
        expect(models, "no tier is configured")
        return ", ".join(model["id"] for model in models)

    first = [("GET /health", "", check_health), ("GET /v1/models", "", check_models)]
    results = [passes(client, *line) for line in first]
    results += [passes(client, *line) for line in plan(models)]
    return results.count(False)


@contextmanager
def fake_server(key: str) -> Iterator[str]:
    """The URL of a server on the fake backend, which does not outlive the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    here = Path(__file__).resolve().parent
    own = {"LIGHT_BACKEND": "fake", "HOST": "127.0.0.1", "PORT": str(port), "API_KEYS": key}
    with tempfile.TemporaryFile() as log:
        command = [sys.executable, "server.py"]
        server = subprocess.Popen(
            command, cwd=here, env=os.environ | own, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            url, give_up_at = f"http://127.0.0.1:{port}", time.monotonic() + 60
            while not is_up(url):
                if server.poll() is not None or time.monotonic() > give_up_at:
                    log.seek(0)
                    sys.exit(f"the server did not start:\n{log.read().decode()[-2000:]}")
                time.sleep(0.1)
            yield url
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def is_up(url: str) -> bool:
    try:
        httpx.get(f"{url}/health", trust_env=False)
    except httpx.HTTPError:
        return False
    return True


def main() -> int: ...
