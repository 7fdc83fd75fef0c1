"""Smoke test of a running service: `python test_api.py [URL]`, one line for each endpoint.

`--fake` boots a server of its own on the weightless `fake` backend and ends it again. The exit code
is 0 only if all that is configured works. Needs httpx and the standard library.
"""

import argparse
import base64
import json
import math
import os
import random
import secrets
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx

Check = Callable[[httpx.Client], object]  # returns a remark
FINISH_REASONS = ("stop", "length")
STORY = "Once upon a time there was a little"  # few models have nothing to add to that
HELLO = {"role": "user", "content": "Say hello and name three colours."}


class Failed(Exception):
    """The service answered, and the answer is wrong."""


def expect(is_right: object, fault: object) -> None:
    if not is_right:
        raise Failed(fault)


def expect_usage(usage: dict[str, int]) -> None:
    counted = usage["prompt_tokens"] + usage.get("completion_tokens", 0)
    expect(0 < counted == usage["total_tokens"], f"usage {usage}")


def text_of(choice: dict[str, Any]) -> str:
    """The text of a choice: of a message, of a delta, or in the legacy form."""
    part = choice.get("message") or choice.get("delta") or choice
    return part.get("content") or part.get("reasoning_content") or part.get("text") or ""


def answer(response: httpx.Response) -> Any:
    expect(response.status_code == 200, f"HTTP {response.status_code}: {response.text[:300]}")
    return response.json()


def check_health(client: httpx.Client) -> object:
    return answer(client.get("/health")).get("status", "")


def check_models(client: httpx.Client) -> object:
    models = answer(client.get("/v1/models"))["data"]
    expect(models, "no tier is configured")
    return ", ".join(model["id"] for model in models)


def check_model(client: httpx.Client, model: str) -> object:
    body = answer(client.get(f"/v1/models/{model}"))
    expect((body["id"], body["object"]) == (model, "model"), f"another object: {body}")
    expect(body["state"] != "failed", body.get("reason"))
    expect(body["capabilities"], "this version can do nothing with it")
    return f"{body['path']} on {body['backend']}, {body['context_length']} tokens, {body['state']}"


def generation(model: str, *, chat: bool, **more: object) -> tuple[str, dict[str, Any]]:
    """Path and body of a request; the random seed keeps a cache from answering it."""
    body = {"model": model, "max_tokens": 24, "seed": random.randrange(2**31)} | more
    if chat:
        return "/v1/chat/completions", body | {"messages": [HELLO]}
    return "/v1/completions", body | {"prompt": STORY}


def check_whole(client: httpx.Client, model: str, *, chat: bool) -> object:
    path, request = generation(model, chat=chat)
    body = answer(client.post(path, json=request))
    expect(body["object"] == ("chat.completion" if chat else "text_completion"), body["object"])
    (choice,) = body["choices"]
    expect(not chat or choice["message"]["role"] == "assistant", "the role is not assistant")
    expect(choice["finish_reason"] in FINISH_REASONS, f"finish {choice['finish_reason']!r}")
    expect_usage(body["usage"])
    expect(text_of(choice), "the answer is empty")
    return " ".join(text_of(choice).split())[:50]


def check_response(client: httpx.Client, model: str) -> object:
    request = {"model": model, "input": HELLO["content"], "max_output_tokens": 24}
    body = answer(client.post("/v1/responses", json=request))
    expect(body["status"] in ("completed", "incomplete"), f"status {body['status']!r}")
    parts = [part for item in body["output"] for part in item.get("content", ())]
    text = " ".join(part["text"] for part in parts)
    expect(text, "the answer is empty")
    return " ".join(text.split())[:50]


def check_message(client: httpx.Client, model: str) -> object:
    """The tokens are those that were counted before."""
    request = {"model": model, "messages": [HELLO]}
    counted = answer(client.post("/v1/messages/count_tokens", json=request))["input_tokens"]
    body = answer(client.post("/v1/messages", json=request | {"max_tokens": 24}))
    usage = body["usage"]
    expect(usage["input_tokens"] + usage["cache_read_input_tokens"] == counted, f"usage {usage}")
    text = " ".join(b.get("text") or b.get("thinking") or "" for b in body["content"])
    expect(text, "the answer is empty")
    return " ".join(text.split())[:50]


def check_stream(client: httpx.Client, model: str, *, chat: bool) -> object:
    """Without usage, because many clients index choices[0] in every chunk; then with it."""
    expect_stream(client, model, chat=chat, include_usage=False)
    started = time.perf_counter()
    tokens = expect_stream(client, model, chat=chat, include_usage=True)
    return f"{tokens / (time.perf_counter() - started):.1f} tokens/s"


def expect_stream(client: httpx.Client, model: str, *, chat: bool, include_usage: bool) -> int:
    """The number of tokens of one streamed answer, all of whose events are right."""
    options = {"stream_options": {"include_usage": True}} if include_usage else {}
    path, request = generation(model, chat=chat, stream=True, **options)
    response = client.post(path, json=request)
    expect(response.status_code == 200, f"HTTP {response.status_code}: {response.text[:300]}")
    expect("text/event-stream" in response.headers["content-type"], "not an event stream")
    lines = response.content.split(b"\n")  # not splitlines(): text may hold other line ends
    events = [line[5:].strip() for line in lines if line.startswith(b"data:")]
    expect(events[-1:] == [b"[DONE]"], "the last event is not [DONE]")
    chunks = [json.loads(event) for event in events[:-1]]
    for chunk in chunks:
        expect("error" not in chunk, f"error event: {chunk}")
        kind = "chat.completion.chunk" if chat else "text_completion"
        expect(chunk["object"] == kind, f"object is {chunk['object']!r}")
        same = [chunk[name] == chunks[0][name] for name in ("id", "created", "model")]
        expect(all(same), "id, created or model changes")
    chunks = [chunk for chunk in chunks if not {"waiting", "headers"} & chunk.keys()]
    usage = {"completion_tokens": 0}
    if include_usage:
        expect(chunks[-1]["choices"] == [], "the last chunk has choices")
        usage = chunks.pop()["usage"]
        expect_usage(usage)
    expect(not any(chunk.get("usage") for chunk in chunks), "usage before the last chunk")
    choices = [chunk["choices"][0] for chunk in chunks]
    expect(any(map(text_of, choices)), "the answer is empty")
    if chat:
        expect(choices[0]["delta"].get("role") == "assistant", "the first chunk gives no role")
        expect(choices[-1]["delta"] == {}, "the chunk with finish_reason has a delta")
    finish = [choice["finish_reason"] for choice in choices]
    expect(finish[-1] in FINISH_REASONS, f"the last finish_reason is {finish[-1]!r}")
    expect(set(finish[:-1]) <= {None}, "a finish_reason before the last choice")
    return usage["completion_tokens"]


def check_tool(client: httpx.Client, model: str) -> object:
    """A call that must come, with arguments by their schema."""
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
    }
    function = {"name": "get_weather", "parameters": schema}
    tools = {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}
    path, request = generation(model, chat=True, max_tokens=200, **tools)
    (choice,) = answer(client.post(path, json=request))["choices"]
    expect(choice["finish_reason"] == "tool_calls", f"finish {choice['finish_reason']!r}")
    call = choice["message"]["tool_calls"][0]["function"]
    city = json.loads(call["arguments"])["city"]
    expect(city in ("Paris", "Rome"), f"{city!r} is not in the schema")
    return f"{call['name']}({call['arguments']})"


def check_schema(client: httpx.Client, model: str) -> object:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "verdict", "schema": schema}}
    path, request = generation(model, chat=True, response_format=form)
    (choice,) = answer(client.post(path, json=request))["choices"]
    said = json.loads(choice["message"]["content"])
    expect(said.keys() == {"ok"} and isinstance(said["ok"], bool), f"{said} is not by the schema")
    expect(choice["schema_valid"] is True, "schema_valid is not true")
    return choice["message"]["content"]


def check_tokens(client: httpx.Client, model: str) -> object:
    request = {"model": model, "content": STORY}
    tokens = answer(client.post("/tokenize", json=request))["tokens"]
    expect(tokens, "a text without tokens")
    body = answer(client.post("/detokenize", json={"model": model, "tokens": tokens}))
    expect(body["content"].strip() == STORY, f"another text: {body['content']!r}")
    return f"{len(tokens)} tokens"


def check_template(client: httpx.Client, model: str) -> object:
    request = {"model": model, "messages": [HELLO]}
    prompt = answer(client.post("/apply-template", json=request))["prompt"]
    expect(HELLO["content"] in prompt, f"another prompt: {prompt!r}")
    return f"{len(prompt)} characters"


def check_embeddings(client: httpx.Client, model: str) -> object:
    request = {"model": model, "input": ["A cat.", "A dog."], "encoding_format": "float"}
    body = answer(client.post("/v1/embeddings", json=request))
    expect([item["index"] for item in body["data"]] == [0, 1], "not the inputs in their order")
    one, two = (item["embedding"] for item in body["data"])
    expect(len(one) == len(two) and any(one) and any(two), "empty, zero or unequal vectors")
    expect(all(map(math.isfinite, one + two)), "a value is not finite")
    expect_usage(body["usage"])
    return f"{len(one)} dimensions"


def check_packed(client: httpx.Client, model: str) -> object:
    """Every kind of vector that the model makes, as SDKs ask for them."""
    kinds = answer(client.get(f"/v1/models/{model}"))["vectors"]
    request = {"model": model, "input": "A cat.", "embedding_type": kinds}
    whole = answer(client.post("/v1/embeddings", json=request | {"encoding_format": "float"}))
    packed = answer(client.post("/v1/embeddings", json=request | {"encoding_format": "base64"}))
    (item,), (other,) = whole["data"], packed["data"]
    if "dense" in kinds:
        dense = unpacked(other["embedding"])
        expect(abs(math.hypot(*dense) - 1) < 1e-3, "a dense vector's length is not 1")
        expect(math.dist(dense, item["embedding"]) < 1e-2, "base64 has other numbers")
    if "sparse" in kinds:
        sparse = item["sparse_embedding"]
        expect(min(sparse["values"], default=1) > 0, f"weights {sparse['values']}")
        known = {str(i): w for i, w in zip(sparse["indices"], sparse["values"], strict=True)}
        expect(item["lexical_weights"] == known, "lexical_weights are others")
    if "colbert" in kinds:
        n_rows, n_numbers = other["colbert_embedding"]["shape"]
        numbers = unpacked(other["colbert_embedding"]["data"])
        expect(len(numbers) == n_rows * n_numbers, "ColBERT's shape is not that of its data")
        expect(len(item["colbert_vecs"]) == n_rows, "base64 has other rows")
    return ", ".join(kinds)


def unpacked(data: str) -> tuple[float, ...]:
    raw = base64.b64decode(data)
    return struct.unpack(f"<{len(raw) // 4}f", raw)


def check_rerank(client: httpx.Client, model: str) -> object:
    documents = ["Bread is baked.", "Paris is the capital of France.", "Cats sleep."]
    request = {"model": model, "query": "What is the capital of France?", "documents": documents}
    results = answer(client.post("/v1/rerank", json=request))["results"]
    expect(sorted(item["index"] for item in results) == [0, 1, 2], "not one result a document")
    scores = [item["relevance_score"] for item in results]
    expect(all(map(math.isfinite, scores)), "a score is not finite")
    expect(scores == sorted(scores, reverse=True), "results are not sorted by score")
    return f"best: {documents[results[0]['index']]} ({scores[0]:.3f})"


def check_score(client: httpx.Client, model: str) -> object:
    texts = ["A cat sleeps.", "Stocks fell."]
    request = {"model": model, "text_1": "Cats sleep a lot.", "text_2": texts}
    body = answer(client.post("/v1/score", json=request))
    scores = [item["score"] for item in body["data"]]
    expect(len(scores) == len(texts) and all(map(math.isfinite, scores)), f"scores {scores}")
    return f"{body['method']}, {body['score_type']}"


def check_refusal(
    client: httpx.Client, path: str, body: object, allowed: set[tuple[int, str]]
) -> object:
    """The error has OpenAI's envelope and one of the (status, code or param) that are allowed."""
    response = client.post(path, json=body)
    expect(response.status_code != 200, "HTTP 200, and an error was due")
    error = response.json()["error"]
    expect(error.keys() >= {"message", "type", "param", "code"}, f"no error envelope: {error}")
    reason = (response.status_code, error["code"] or error["param"])
    expect(reason in allowed, f"another error than expected: {reason}")
    return error["message"]


def plan(models: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str, Check]]:
    """(endpoint, tier, check) for everything that the configured models have to do."""

    def able(capability: str) -> list[str]:
        return [model["id"] for model in models if capability in model["capabilities"]]

    for model in models:
        yield "GET /v1/models/{id}", model["id"], partial(check_model, model=model["id"])
    for path, chat in (("/v1/chat/completions", True), ("/v1/completions", False)):
        for tier in able("chat"):
            yield f"POST {path}", tier, partial(check_whole, model=tier, chat=chat)
            yield f"POST {path} stream", tier, partial(check_stream, model=tier, chat=chat)
    for tier in able("chat"):
        yield "POST /v1/chat/completions tools", tier, partial(check_tool, model=tier)
        yield "POST /v1/chat/completions schema", tier, partial(check_schema, model=tier)
        yield "POST /v1/responses", tier, partial(check_response, model=tier)
        yield "POST /v1/messages", tier, partial(check_message, model=tier)
        yield "POST /tokenize, /detokenize", tier, partial(check_tokens, model=tier)
        yield "POST /apply-template", tier, partial(check_template, model=tier)
    for tier in able("embedding"):
        yield "POST /v1/embeddings", tier, partial(check_embeddings, model=tier)
        yield "POST /v1/embeddings all kinds", tier, partial(check_packed, model=tier)
    for tier in able("rerank"):
        yield "POST /v1/rerank", tier, partial(check_rerank, model=tier)
        yield "POST /v1/score", tier, partial(check_score, model=tier)

    absent = {(404, "model_not_found"), (400, "unsupported_parameter")}
    bad = {"model": (able("chat") or ["light"])[0], "messages": "not a list"}
    unknown = {"model": "no-such-model", "messages": [HELLO]}
    refusals: list[tuple[str, str, object, set[tuple[int, str]]]] = [
        ("unknown model", "/v1/chat/completions", unknown, {(404, "model_not_found")}),
        ("bad messages", "/v1/chat/completions", bad, {(400, "messages")}),
    ]
    if not able("embedding"):
        body: object = {"model": "embedding", "input": "Hello"}
        refusals.append(("no embedding tier", "/v1/embeddings", body, absent))
    if not able("rerank"):
        body = {"model": "reranker", "query": "Hello", "documents": ["Hello"]}
        refusals.append(("no reranker tier", "/v1/rerank", body, absent))
    for name, path, body, allowed in refusals:
        check = partial(check_refusal, path=path, body=body, allowed=allowed)
        yield f"error: {name}", "", check


def passes(client: httpx.Client, endpoint: str, tier: str, check: Check) -> bool:
    """Run one check and print its line."""
    started = time.perf_counter()
    try:
        verdict, remark = "ok", check(client)
    except Failed as fault:
        verdict, remark = "FAIL", fault
    except Exception as fault:  # a reply of another shape than the check reads is its failure too
        verdict, remark = "FAIL", f"{type(fault).__name__}: {fault}"
    ms = (time.perf_counter() - started) * 1000
    print(f"{verdict:4}  {endpoint:32} {tier:10} {ms:7.0f} ms  {remark}", flush=True)
    return verdict != "FAIL"


def run(url: str, key: str) -> int:
    """Check the service and print the report; the exit code."""
    if not is_up(url):
        print(f"Nothing answers at {url}: start the service with ./start_service.sh")
        return 1
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    # The timeout leaves a model time to load; without trust_env there is no proxy in between.
    with httpx.Client(base_url=url, headers=headers, timeout=300, trust_env=False) as client:
        results = [passes(client, "GET /health", "", check_health)]
        results += [passes(client, "GET /v1/models", "", check_models)]
        if results[-1]:
            models = client.get("/v1/models").json()["data"]
            results += [passes(client, *line) for line in plan(models)]
    print(f"{results.count(False)} of {len(results)} failed")
    return 0 if all(results) else 1


@contextmanager
def fake_server(key: str) -> Iterator[str]:
    """The URL of a server on the fake backend, which does not outlive the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    here = Path(__file__).resolve().parent
    with tempfile.TemporaryDirectory() as folder:
        log, script = Path(folder, "log"), Path(folder, "script.json")
        script.write_text("{}")
        own = {"HOST": "127.0.0.1", "PORT": str(port), "API_KEYS": key}
        for tier in (
            "LIGHT",
            "MEDIUM",
            "HEAVY",
            "EMBEDDING",
            "RERANKER",
        ):  # a .env may give each of them a real model
            own |= {f"{tier}_BACKEND": "fake", f"{tier}_MODEL_PATH": str(script)}
        own["EMBEDDING_EMBEDDING_DIMENSION"] = "32"  # all that its vectors have
        with log.open("wb") as out:
            command = [sys.executable, "server.py"]
            server = subprocess.Popen(
                command, cwd=here, env=os.environ | own, stdout=out, stderr=subprocess.STDOUT
            )
        try:
            give_up_at = time.monotonic() + 60
            while not is_up(url):
                if server.poll() is not None or time.monotonic() > give_up_at:
                    sys.exit(f"the server did not start:\n{log.read_text()[-2000:]}")
                time.sleep(0.1)
            yield url
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()


def is_up(url: str) -> bool:
    try:
        httpx.get(f"{url}/health", timeout=10, trust_env=False)
    except (httpx.HTTPError, httpx.InvalidURL):
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:8000")
    parser.add_argument("--fake", action="store_true", help="of an own server without a model")
    parser.add_argument("--key", default=os.environ.get("API_KEY", ""), help="default: $API_KEY")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that finally ends the fake server
    if args.fake:
        key = secrets.token_hex(16)
        with fake_server(key) as url:
            return run(url, key)
    return run(args.url.rstrip("/").removesuffix("/v1"), args.key)


if __name__ == "__main__":
    sys.exit(main())
