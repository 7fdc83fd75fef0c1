"""The cache as clients see it, on the fake backend: what is a hit, and what it looks like."""

import asyncio
import itertools
import json
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

import answers
import lookups
import model_source
from api.vectors import Cut, shortened
from bench import own_service
from caching import Caching
from engine.client import Handle
from settings import Settings
from tests.serving import (
    THINKING_TEMPLATE,
    Service,
    events,
    fake,
    in_threads,
    named_events,
    remembering,
    script,
    serving,
    wait_until,
)

RULES = (
    {"match": "long", "answer": "0123456789" * 60},
    {"match": "endless", "answer": "0123456789" * 3000},
    {"match": "object", "answer": '{"a": 1}'},
    {"match": "dice", "answer": ["one", "two", "three", "four", "five"]},
    {"match": "break", "answer": "half of it", "fault": "step", "after": 4},
    {
        "match": "weather",
        "answer": "<think>Ask.</think>So: <tool_call>"
        '{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>',
    },
)
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return script(tmp_path_factory.mktemp("cached"), *RULES, step_ms=1, template=THINKING_TEMPLATE)


@pytest.fixture(scope="module")
def service(path: str) -> Iterator[Service]:
    tiers = {"light": fake(path), "medium": fake(path, temperature=0), "embedding": fake()}
    with serving(remembering(reranker=fake(), **tiers)) as service:
        yield service


@pytest.fixture(autouse=True)
def nothing_is_known(request: pytest.FixtureRequest) -> None:
    if "service" in request.fixturenames:
        service: Service = request.getfixturevalue("service")
        assert service.http.delete("/v1/cache").status_code == 200


def outcome(reply: httpx.Response) -> str:
    assert reply.status_code == 200, reply.text
    found = reply.headers["x-cache"]
    assert (found == "HIT") == ("age" in reply.headers)
    return found


def n_jobs(service: Service, tier: str = "light") -> float:
    """Requests that its worker has had."""
    text = service.http.get("/metrics").text
    found = re.search(rf'^quintet_queue_seconds_count{{tier="{tier}"}} (.+)$', text, re.M)
    return float(found[1]) if found else 0.0


def same(reply: Any) -> Any:
    """A reply without what is new in each."""
    if isinstance(reply, list):
        return [same(part) for part in reply]
    if not isinstance(reply, dict):
        return reply
    new = {"id", "item_id", "call_id", "created", "created_at", "completed_at"}
    return {name: same(value) for name, value in reply.items() if name not in new}


# what a hit looks like

ASKS: dict[str, Callable[..., httpx.Response]] = {
    "chat": lambda s, **f: s.chat("weather?", tools=[TOOL], logprobs=True, top_logprobs=2, **f),
    "completions": lambda s, **f: s.complete(["weather?", "Hi"], logprobs=2, n=2, seed=1, **f),
    "responses": lambda s, **f: s.respond(
        "weather?", tools=[{"type": "function", **TOOL["function"]}], **f
    ),
    "messages": lambda s, **f: s.message(
        "weather?", tools=[{"name": "weather", "input_schema": {"type": "object"}}], **f
    ),
}


@pytest.mark.parametrize("form", ASKS)
def test_a_hit_says_the_same_as_the_first_reply(service: Service, form: str) -> None:
    ask = ASKS[form]
    first = ask(service, temperature=0)
    n = n_jobs(service)
    again = ask(service, temperature=0)
    assert (outcome(first), outcome(again)) == ("MISS", "HIT")
    assert same(again.json()) == same(first.json())
    assert again.json()["id"] != first.json()["id"]
    assert again.headers.get("x-seed") == first.headers.get("x-seed")
    assert n_jobs(service) == n


def test_a_hit_names_the_schemas_that_were_not_enforced(service: Service) -> None:
    schema = {"properties": {"city": {"type": "any"}}}
    tools = [{"type": "function", "function": {"name": "weather", "parameters": schema}}]
    for found in ("MISS", "HIT"):
        reply = service.chat("Hi", tools=tools, temperature=0)
        assert outcome(reply) == found
        assert reply.headers["x-ignored-params"] == "tools[0].function.parameters"


@pytest.mark.parametrize("form", ASKS)
@pytest.mark.parametrize("is_stored_by_stream", [True, False])
def test_a_streamed_hit_has_all_events_of_a_stream(
    service: Service, form: str, is_stored_by_stream: bool
) -> None:
    ask = ASKS[form]
    more: dict[str, Any] = {}
    if form in ("chat", "completions"):
        more["stream_options"] = {"include_usage": True}
    read = events if more else named_events
    new = {"Cache-Control": "no-store"}
    service.http.headers.update(new)
    try:
        plain = ask(service, temperature=0, stream=True, **more)
    finally:
        del service.http.headers["Cache-Control"]
    assert outcome(plain) == "BYPASS"
    stored = {"stream": True, **more} if is_stored_by_stream else {}
    assert outcome(ask(service, temperature=0, **stored)) == "MISS"
    again = ask(service, temperature=0, stream=True, **more)
    assert outcome(again) == "HIT"
    assert joined(in_order(same(read(again)))) == joined(in_order(same(read(plain))))
    if more:
        assert read(again)[-1]["usage"] == read(plain)[-1]["usage"] | {
            "prompt_tokens_details": read(again)[-1]["usage"]["prompt_tokens_details"]
        }


def in_order(told: list[Any]) -> list[Any]:
    """Events of several choices by choice: which of them comes first is chance."""
    return sorted(told, key=lambda data: [choice["index"] for choice in data.get("choices", ())])


def joined(told: Any) -> Any:
    """Events without what depends on what was computed before: prompt tokens reused."""
    text = json.dumps(told)
    return re.sub(r'"(cached_tokens|cache_read_input_tokens|input_tokens)": \d+', "", text)


def test_what_one_endpoint_has_had_made_another_finds(service: Service) -> None:
    assert outcome(service.chat("Hi", temperature=0, max_tokens=50)) == "MISS"
    assert outcome(service.respond("Hi", temperature=0, max_output_tokens=50)) == "HIT"
    assert outcome(service.message("Hi", temperature=0, max_tokens=50)) == "HIT"
    assert outcome(service.chat("Hi", temperature=0, max_completion_tokens=50)) == "HIT"


# which answers


def test_only_answers_that_another_try_would_repeat_are_remembered(service: Service) -> None:
    for fields, expected in [
        ({"temperature": 0.7}, "BYPASS"),
        ({}, "BYPASS"),
        ({"temperature": 0.7, "seed": 3}, "HIT"),
        ({"temperature": 0}, "HIT"),
        ({"temperature": 0.7, "top_k": 1}, "HIT"),
        ({"temperature": 0, "xtc_probability": 0.5}, "BYPASS"),
        ({"temperature": 0, "n": 2}, "BYPASS"),
        ({"temperature": 0, "n": 2, "seed": 4}, "HIT"),
        ({"temperature": 0, "model": "medium"}, "HIT"),
        ({"model": "medium"}, "HIT"),
    ]:
        service.chat("Hello", **fields)
        assert outcome(service.chat("Hello", **fields)) == expected, fields


def test_by_the_policy_all_what_was_drawn_is_remembered_with_its_seed(path: str) -> None:
    with serving(remembering({"cache_policy": "all"}, light=fake(path))) as service:
        first, again = service.chat("dice"), service.chat("dice")
        assert (outcome(first), outcome(again)) == ("MISS", "HIT")
        assert first.headers["x-seed"] == again.headers["x-seed"]
        assert same(first.json()) == same(again.json())
        seeded = service.chat("dice", seed=int(first.headers["x-seed"]))
        assert outcome(seeded) == "MISS"
        assert same(first.json()) == same(seeded.json()) | {"usage": first.json()["usage"]}


@pytest.mark.parametrize("of", [{"cache_policy": "off"}, {"cache_max_mb": 0}])
def test_without_a_cache_everything_is_made_for_its_request(of: dict[str, Any]) -> None:
    with serving(remembering(of, light=fake(), embedding=fake())) as service:
        for _ in range(2):
            assert outcome(service.chat(temperature=0)) == "BYPASS"
            assert outcome(service.embed()) == "BYPASS"
        assert n_jobs(service) == 2
        assert service.http.get("/v1/cache").json() == {"object": "cache", "enabled": False}
        assert service.http.delete("/v1/cache").status_code == 200
        assert "quintet_cache_" not in service.http.get("/metrics").text


def test_an_answer_that_breaks_off_is_not_remembered(service: Service) -> None:
    for _ in range(2):
        assert service.chat("break", temperature=0).status_code == 500
    assert service.http.get("/v1/cache").json()["kinds"]["answer"]["entries"] == 0


def test_an_answer_that_its_limit_cuts_is_that_of_the_limit(service: Service) -> None:
    for n, expected in [(5, "MISS"), (6, "MISS"), (5, "HIT"), (-1, "MISS")]:
        reply = service.chat("Hello", temperature=0, max_tokens=n)
        assert outcome(reply) == expected
        assert reply.json()["usage"]["completion_tokens"] == (n if n > 0 else 16)


def test_what_is_large_is_remembered_like_the_rest_but_for_very_long_answers(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "LARGE_BYTES", 10)
    first, second = (service.chat("a text of some length", temperature=0) for _ in range(2))
    assert (outcome(first), outcome(second)) == ("MISS", "HIT")
    assert same(first.json()) == same(second.json())
    monkeypatch.setattr(answers, "MAX_ITEMS", 10)
    assert [outcome(service.chat("Hello", temperature=0)) for _ in range(2)] == ["MISS", "MISS"]


def test_half_a_json_is_not_remembered(service: Service) -> None:
    form = {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}
    for n, expected in [(1, "MISS"), (1, "MISS"), (500, "MISS"), (500, "HIT")]:
        reply = service.chat("object", temperature=0, max_tokens=n, response_format=form)
        assert outcome(reply) == expected
        assert reply.json()["choices"][0]["schema_valid"] is (n == 500)


# what clients want of it


@pytest.mark.parametrize(
    "ask",
    [
        lambda s: s.chat(temperature=0),
        lambda s: s.embed(),
        lambda s: s.complete([65, 66], temperature=0, echo=True),
    ],
)
def test_cache_control_is_obeyed(service: Service, ask: Callable[..., httpx.Response]) -> None:
    def asked(control: str | None = None) -> str:
        headers = {"Cache-Control": control} if control else {}
        with httpx.Client(base_url=service.url, headers=headers, trust_env=False) as http:
            return outcome(ask(Service(service.url, http, service.manager, service.app)))

    assert asked("no-store") == "BYPASS"
    assert asked() == "MISS"
    assert asked() == "HIT"
    assert asked("no-store") == "BYPASS"
    assert asked("No-Cache") == "MISS"
    assert asked("max-age=3600, no-transform") == "HIT"
    assert asked("max-age=0") == "MISS"
    assert asked("max-age=soon") == "MISS"
    assert asked("max-age=00007") == "HIT"


def test_an_age_may_be_quoted_and_other_digits_than_ours_are_no_number() -> None:
    assert Caching.of('max-age="5"', None).max_age_s == 5
    assert Caching.of("max-age=²", None).max_age_s == 0


def test_a_hit_without_a_model_does_not_say_how_long_the_next_one_stays(service: Service) -> None:
    tiers = service.manager.tiers
    for ask, name in (
        (lambda **f: service.chat(seed=1, **f), "light"),
        (service.embed, "embedding"),
    ):
        assert outcome(ask()) == "MISS"
        assert service.http.post(f"/v1/models/{name}/unload").status_code == 200
        assert outcome(ask(keep_alive=0)) == "HIT"
        assert tiers[name]._keep_alive_s is None


@pytest.mark.parametrize("large", [0, 1 << 18])  # more is hashed elsewhere
def test_clients_with_different_keys_have_results_of_their_own(
    large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "LARGE_BYTES", large)
    monkeypatch.setattr(lookups, "LARGE_CHARS", large)
    for is_shared, expected in [(False, "MISS"), (True, "HIT")]:
        of = {"api_keys": "one,two", "cache_shared": is_shared}
        with serving(remembering(of, light=fake(), embedding=fake(), reranker=fake())) as service:
            for ask in (
                lambda s: s.chat(temperature=0),
                lambda s: s.embed(),
                lambda s: s.rerank("a", ["b"]),
            ):
                for key, found in [("one", "MISS"), ("one", "HIT"), ("two", expected)]:
                    service.http.headers["Authorization"] = f"Bearer {key}"
                    assert outcome(ask(service)) == found


def test_a_page_may_read_what_the_cache_says(service: Service) -> None:
    origin = {"Origin": "http://localhost:3000"}
    exposed = service.http.get("/health", headers=origin).headers["access-control-expose-headers"]
    assert {"X-Cache", "Age", "X-Cached-Inputs"} <= {*exposed.split(", ")}
    asked = {"Access-Control-Request-Method": "DELETE"}
    assert service.http.options("/v1/cache", headers=origin | asked).status_code == 200


# /v1/cache


def test_what_there_is_is_counted_by_kind(service: Service) -> None:
    def counted(kind: str) -> dict[str, int]:
        kinds = service.http.get("/v1/cache").json()["kinds"]
        return kinds.get(kind, dict.fromkeys(("hits", "misses", "joins", "evictions"), 0))

    before = {kind: counted(kind) for kind in ("answer", "dense", "sparse", "score")}
    for _ in range(2):
        service.chat(temperature=0)
        service.embed(["a", "b", "a"], return_sparse=True)
        service.rerank("a", ["b", "c"])
    for kind, n in [("answer", 1), ("dense", 2), ("sparse", 2), ("score", 2)]:
        now = counted(kind)
        assert now["entries"] == n
        assert now["size_bytes"] > 0
        assert [now[name] - before[kind][name] for name in ("hits", "misses")] == [n, n]
    text = service.http.get("/metrics").text
    for kind in before:
        now = counted(kind)
        assert f'quintet_cache_hits_total{{kind="{kind}"}} {now["hits"]}.0' in text
        entries = f'quintet_cache_entries{{kind="{kind}",store="memory"}} {now["entries"]}.0'
        assert entries in text


def test_a_kind_alone_can_be_forgotten(service: Service) -> None:
    service.chat(temperature=0)
    service.embed("a")
    kinds = service.http.delete("/v1/cache", params={"kind": "dense"}).json()["kinds"]
    assert (kinds["dense"]["entries"], kinds["answer"]["entries"]) == (0, 1)
    assert outcome(service.embed("a")) == "MISS"
    assert outcome(service.chat(temperature=0)) == "HIT"
    reply = service.http.delete("/v1/cache", params={"kind": "vectors"})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "kind")


def test_who_may_not_change_the_service_may_not_clear_it() -> None:
    with serving(remembering({"api_keys": "user", "admin_api_keys": "admin"})) as service:
        for key, status in [("user", 403), ("admin", 200)]:
            headers = {"Authorization": f"Bearer {key}"}
            assert service.http.delete("/v1/cache", headers=headers).status_code == status
            assert service.http.get("/v1/cache", headers=headers).status_code == 200


# vectors and scores


def texts(n: int) -> list[str]:
    return [f"text {i}" for i in range(n)]


def test_of_100_texts_of_which_97_are_known_3_are_computed(service: Service) -> None:
    service.embed(texts(97))
    seen = batches(service)
    reply = service.embed(texts(100))
    assert (outcome(reply), reply.headers["x-cached-inputs"]) == ("MISS", "97")
    assert batches(service) - seen == 3
    assert [item["index"] for item in reply.json()["data"]] == list(range(100))
    service.http.delete("/v1/cache")
    alone = service.embed(texts(100))
    assert alone.json()["usage"] == reply.json()["usage"]
    for found, made in zip(reply.json()["data"], alone.json()["data"], strict=True):
        assert found["embedding"] == pytest.approx(made["embedding"], abs=1e-6)


def batches(service: Service) -> float:
    """Texts that the worker of `embedding` has computed."""
    text = service.http.get("/metrics").text
    found = re.search(r'^quintet_batch_size_sum{tier="embedding"} (.+)$', text, re.M)
    return float(found[1]) if found else 0.0


def test_what_is_alike_in_a_request_is_computed_once_and_counted_each_time(
    service: Service,
) -> None:
    seen = batches(service)
    reply = service.embed(["a", "b b", "a", "a"])
    assert batches(service) - seen == 2
    assert reply.json()["usage"]["prompt_tokens"] == 3 + 4 + 3 + 3
    vectors = [item["embedding"] for item in reply.json()["data"]]
    assert vectors[0] == vectors[2] == vectors[3] != vectors[1]


def test_forms_of_a_vector_share_what_is_remembered(path: str) -> None:
    tier = fake(path, matryoshka=True, query_prefix="ask: ")
    with serving(remembering(embedding=tier)) as service:
        everything = {"return_sparse": True, "return_colbert": True, "return_tokens": True}
        (first,) = service.embed("a b", **everything).json()["data"]
        for fields in (
            {"encoding_format": "base64"}, {"dimensions": 4}, {"return_sparse": True},
            {"embedding_type": "colbert", "colbert_dtype": "float16"}, {"truncate": "end"},
            {"return_tokens": True}, {"user": "me"},
        ):  # fmt: skip
            assert outcome(service.embed("a b", **fields)) == "HIT", fields
        (short,) = service.embed("a b", dimensions=4).json()["data"]
        whole = np.array(first["embedding"], np.float32)
        assert short["embedding"] == pytest.approx(shortened(whole, Cut(4)).tolist())
        (again,) = service.embed("a b", **everything).json()["data"]
        assert again == first
        assert outcome(service.embed("a b", input_type="query")) == "MISS"
        assert outcome(service.http.post("/embed", json={"inputs": "a b"})) == "HIT"
        reply = service.http.post("/embed_sparse", json={"inputs": ["a b", "c"]})
        assert (outcome(reply), reply.headers["x-cached-inputs"]) == ("MISS", "1")


def test_a_fault_names_the_place_that_the_client_knows(service: Service) -> None:
    service.embed(["a", "b"])
    known = service.embed(["a", "b", "a", "word " * 9000])
    service.http.delete("/v1/cache")
    plain = service.embed(["a", "b", "a", "word " * 9000])
    assert known.status_code == plain.status_code == 400
    assert known.json() == plain.json()
    assert known.json()["error"]["index"] == 3


def test_a_document_of_blanks_is_like_nothing_by_vectors_that_are_known(service: Service) -> None:
    service.embed("fog", input_type="query")
    service.embed([" \n", "fog"], input_type="document")
    asked = {"model": "embedding", "text_1": "fog", "text_2": [" \n", "fog"], "method": "dense"}
    reply = service.http.post("/v1/score", json=asked)
    assert (outcome(reply), reply.headers["x-cached-inputs"]) == ("HIT", "2")
    low, high = (item["score"] for item in reply.json()["data"])
    assert low == 0.0 < high


def test_a_pair_of_which_one_vector_alone_is_known_is_computed(service: Service) -> None:
    service.embed("fog", input_type="query")
    service.embed("a", input_type="document")
    asked = {"model": "embedding", "text_1": "fog", "text_2": ["a", "b"], "method": "dense"}
    reply = service.http.post("/v1/score", json=asked)
    assert (outcome(reply), reply.headers["x-cached-inputs"]) == ("MISS", "1")


def test_each_pair_of_a_rerank_is_remembered(service: Service) -> None:
    first = service.rerank("a b", ["a", "b c", "a b"], top_n=1, return_documents=True)
    again = service.rerank("a b", ["new", "a b", "a"], raw_scores=True)
    assert (outcome(first), outcome(again)) == ("MISS", "MISS")
    assert again.headers["x-cached-inputs"] == "2"
    assert outcome(service.rerank("a b", ["a"], method="cross-encoder")) == "HIT"
    assert outcome(service.rerank("a b", ["a"], max_tokens_per_doc=5)) == "MISS"
    asked = {"text_1": "a b", "text_2": ["a b", "new"]}
    assert outcome(service.http.post("/v1/score", json=asked)) == "HIT"
    service.http.delete("/v1/cache")
    plain = service.rerank("a b", ["new", "a b", "a"], raw_scores=True)
    assert same(plain.json()) == same(again.json())


@pytest.mark.parametrize("method", ["dense", "sparse", "colbert", "hybrid"])
def test_vectors_that_are_known_score_without_a_computation(service: Service, method: str) -> None:
    asked = {"queries": ["a b", "b"], "documents": ["a c", "b b", "a c"], "method": method}
    plain = service.http.post("/v1/score", json=asked)
    assert outcome(plain) == "MISS"
    service.http.delete("/v1/cache")
    everything = {"return_sparse": True, "return_colbert": True}
    service.embed(["a b", "b"], input_type="query", **everything)
    service.embed(["a c", "b b"], input_type="document", **everything)
    n = n_jobs(service, "embedding")
    found = service.http.post("/v1/score", json=asked)
    assert outcome(found) == "HIT"
    assert n_jobs(service, "embedding") == n
    scores = [item.pop("score") for item in found.json()["data"]]
    assert scores == pytest.approx([item["score"] for item in plain.json()["data"]], abs=1e-6)
    for part in ("usage", "method", "score_type"):
        assert found.json()[part] == plain.json()[part]
    wrong = asked | {"method": "dense", "weights": [1, 1, 1]}
    assert service.http.post("/v1/score", json=wrong).status_code == 400


def test_a_vector_of_a_text_that_was_cut_elsewhere_scores_nothing() -> None:
    long = " ".join(f"w{i}" for i in range(100))
    asked = {"method": "dense", "max_tokens_per_doc": 50, "truncation_direction": "Left"}
    with serving(remembering(embedding=fake(n_ctx=32))) as service:
        plain = service.rerank("w95", [long], **asked)
        service.http.delete("/v1/cache")
        service.embed("w95", input_type="query", truncate="start")
        service.embed(long, input_type="document", truncate="start")
        reply = service.rerank("w95", [long], **asked)
        assert reply.json()["results"] == plain.json()["results"]


def test_a_prompt_that_is_scored_is_remembered_with_it(service: Service) -> None:
    asked = {"echo": True, "logprobs": 1, "max_tokens": 2, "temperature": 0}
    first, second = (service.complete("remember me", **asked) for _ in range(2))
    assert [first.headers["X-Cache"], second.headers["X-Cache"]] == ["MISS", "HIT"]
    assert first.json()["choices"] == second.json()["choices"]
    plain = service.complete("remember me", **asked | {"echo": False})
    assert plain.headers["X-Cache"] == "MISS"
    assert len(plain.json()["choices"][0]["logprobs"]["tokens"]) == 2


# over restarts


async def no_worker(sock: socket.socket) -> Handle:
    raise AssertionError("a model was loaded")


ALL: list[Callable[[Service], httpx.Response]] = [
    lambda s: s.chat("weather?", tools=[TOOL], temperature=0),
    lambda s: s.chat("weather?", tools=[TOOL], temperature=0, stream=True),
    lambda s: s.complete(["a", "b"], seed=1),
    lambda s: s.complete([65, 66], seed=1, echo=True),
    lambda s: s.complete("a", temperature=0, echo=True, logprobs=2),
    lambda s: s.respond("Hello", temperature=0),
    lambda s: s.message("Hello there", temperature=0),
    lambda s: s.chat(
        messages=[{"role": role, "content": "word " * 2000} for role in ("user", "assistant")] * 3
        + [{"role": "user", "content": "Hi"}],
        temperature=0,
        truncate="middle",
    ),
    lambda s: s.embed(["a", "b", "a"], return_sparse=True, return_colbert=True, return_tokens=True),
    lambda s: s.http.post("/embed", json={"inputs": "a"}),
    lambda s: s.rerank("a", ["b", "c"]),
    lambda s: s.rerank("a", ["b", "c"], method="hybrid"),
]


def on_disk(folder: Path, path: str = "", **server: Any) -> Settings:
    of = {"cache_dir": str(folder), **server}
    return remembering(of, light=fake(path), embedding=fake(), reranker=fake())


def test_a_hit_after_a_restart_needs_no_model(tmp_path: Path, path: str) -> None:
    with serving(on_disk(tmp_path, path)) as service:
        first = [ask(service) for ask in ALL]
        assert {outcome(reply) for reply in first[2:]} == {"MISS", "HIT"}
    with serving(on_disk(tmp_path, path), launch=no_worker) as service:
        for ask, before in zip(ALL, first, strict=True):
            reply = ask(service)
            assert outcome(reply) == "HIT"
            if "json" in reply.headers["content-type"]:
                assert same(reply.json()) == same(before.json())
        tiers = service.http.get("/v1/models").json()["data"]
        assert {tier["state"] for tier in tiers} == {"stopped"}
        assert service.http.get("/v1/cache").json()["kinds"]["answer"]["disk_hits"] > 0


def touched(path: Path) -> None:
    os.utime(path, ns=(1, 1))


def grown(path: Path) -> None:
    path.write_text(path.read_text() + " ")


def with_another_header(path: Path) -> None:
    """The size and the time are the same."""
    status = path.stat()
    path.write_text(path.read_text().replace('"Yes"', '"Yea"'))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def with_another_template(path: Path) -> None:
    told = json.loads(path.read_text())
    path.write_text(json.dumps(told | {"template": THINKING_TEMPLATE}))


def nothing(path: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "tier", "release", "expected"),
    [
        (nothing, {}, "1", "HIT"),
        (touched, {}, "1", "MISS"),
        (grown, {}, "1", "MISS"),
        (with_another_header, {}, "1", "MISS"),
        (with_another_template, {}, "1", "MISS"),
        (nothing, {"temperature": 0.1}, "1", "MISS"),
        (nothing, {"min_p": 0.2}, "1", "MISS"),
        (nothing, {"max_tokens": 99}, "1", "MISS"),
        (nothing, {"n_ctx": 4096}, "1", "MISS"),
        (nothing, {"n_gpu_layers": 1}, "1", "MISS"),
        (nothing, {"flash_attention": False}, "1", "MISS"),
        (nothing, {"n_parallel": 3, "n_threads": 1, "idle_ttl_s": 5, "queue_size": 9}, "1", "HIT"),
        (nothing, {}, "2", "MISS"),
    ],
)
def test_what_would_change_answers_makes_a_miss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], None], tier: dict[str, Any], release: str, expected: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(model_source, "LIBRARIES", {"fake": ["numpy"]})
    monkeypatch.setattr(model_source, "version", lambda _: "1")
    file = tmp_path / "model.json"
    file.write_text(json.dumps({"rules": [{"match": "", "answer": "Yes"}]}))

    def of(**tier: Any) -> Settings:
        return remembering({"cache_dir": str(tmp_path / "cache")}, light=fake(str(file), **tier))

    with serving(of()) as service:
        assert outcome(service.chat(seed=1)) == "MISS"
    change(file)
    monkeypatch.setattr(model_source, "version", lambda _: release)
    with serving(of(**tier)) as service:
        assert outcome(service.chat(seed=1)) == expected


def test_what_was_answered_wrongly_before_a_fix_is_not_given_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = remembering({"cache_dir": str(tmp_path / "cache")}, light=fake())
    for results, expected in ((1, "MISS"), (1, "HIT"), (2, "MISS")):
        monkeypatch.setattr(model_source, "RESULTS", results)
        with serving(of) as service:
            assert outcome(service.chat(seed=1)) == expected


def test_a_model_file_that_changes_under_the_service_is_another_model(tmp_path: Path) -> None:
    file = tmp_path / "model.json"
    file.write_text(json.dumps({"rules": [{"match": "", "answer": "old"}]}))
    with serving(remembering(light=fake(str(file)))) as service:
        for answer in ("old", "newer"):
            file.write_text(json.dumps({"rules": [{"match": "", "answer": answer}]}))
            service.http.post("/v1/models/light/unload")
            for expected in ("MISS", "HIT"):
                reply = service.chat(temperature=0)
                assert outcome(reply) == expected
                assert reply.json()["choices"][0]["message"]["content"] == answer


def test_what_another_file_than_the_keys_has_answered_is_not_remembered(tmp_path: Path) -> None:
    """It is put in place after its header was read and before it is loaded."""
    file = tmp_path / "model.json"
    file.write_text(json.dumps({"rules": [{"match": "", "answer": "old"}]}))

    async def replace_and_launch(sock: socket.socket) -> Handle:
        file.write_text(json.dumps({"rules": [{"match": "", "answer": "newer"}]}))
        return await in_threads(sock)

    of = remembering(light=fake(str(file)), embedding=fake(str(file)))
    with serving(of, launch=replace_and_launch) as service:
        for ask in (lambda: service.chat(temperature=0), service.embed):
            assert outcome(ask()) == "MISS"
        kinds = service.http.get("/v1/cache").json()["kinds"]
        assert kinds["answer"]["entries"] == kinds["dense"]["entries"] == 0


def test_what_is_remembered_is_not_mixed_with_what_another_file_makes(tmp_path: Path) -> None:
    """It is put in place after the look-up, for a reply of which a part is known."""
    file = tmp_path / "model.json"
    file.write_text("{}")
    is_replaced = False

    async def replace_and_launch(sock: socket.socket) -> Handle:
        if is_replaced:
            file.write_text(" " + file.read_text())
        return await in_threads(sock)

    with serving(remembering(embedding=fake(str(file))), launch=replace_and_launch) as service:
        for ask in (service.embed, lambda texts: service.rerank("a", texts)):
            for is_to_be_another, n_cached in ((False, "3"), (True, "0")):
                service.http.delete("/v1/cache")
                assert outcome(ask(["a", "b"])) == "MISS"
                service.http.post("/v1/models/embedding/unload")
                is_replaced = is_to_be_another
                reply = ask(["b", "new", "b", "a"])
                is_replaced = False
                assert outcome(reply) == "MISS"
                assert reply.headers["x-cached-inputs"] == n_cached
                service.http.post("/v1/models/embedding/unload")


def test_a_file_that_is_touched_under_its_model_makes_nothing_be_computed_twice(
    tmp_path: Path,
) -> None:
    file = tmp_path / "model.json"
    file.write_text("{}")
    with serving(remembering(embedding=fake(str(file)))) as service:
        assert outcome(service.embed(["a", "b"])) == "MISS"
        os.utime(file, ns=(1, 1))
        for _ in range(2):
            seen = batches(service)
            assert service.embed(["a", "new", "b"]).headers["x-cached-inputs"] == "2"
            assert batches(service) - seen == 1


def damage(folder: Path, data: bytes | None) -> None:
    for file in folder.glob("*.sqlite*"):
        if data is None:
            os.truncate(file, file.stat().st_size // 2)
        else:
            file.write_bytes(data)


@pytest.mark.parametrize("data", [None, b"", b"no database at all" * 1000])
def test_a_damaged_file_is_rebuilt_and_no_client_sees_it(
    tmp_path: Path, data: bytes | None
) -> None:
    with serving(on_disk(tmp_path)) as service:
        for i in range(20):
            assert outcome(service.chat(f"Hello {i}", temperature=0)) == "MISS"
    damage(tmp_path, data)
    with serving(on_disk(tmp_path)) as service:
        for i in range(20):
            assert outcome(service.chat(f"Hello {i}", temperature=0)) in ("MISS", "HIT")
            assert outcome(service.chat(f"Hello {i}", temperature=0)) == "HIT"
    with serving(on_disk(tmp_path)) as service:
        assert outcome(service.chat("Hello 1", temperature=0)) == "HIT"


def test_a_service_that_is_killed_while_it_writes_has_what_was_written(tmp_path: Path) -> None:
    environment = {"LIGHT_BACKEND": "fake", "CACHE_DIR": str(tmp_path)}

    def ask(url: str, n: int) -> str:
        body = {"model": "light", "temperature": 0, "prompt": f"number {n}"}
        return outcome(httpx.post(f"{url}/v1/completions", json=body, timeout=30))

    def on_disk() -> int:
        kinds = httpx.get(f"{url}/v1/cache").json()["kinds"]
        return int(kinds["answer"]["disk"]["entries"])

    with own_service.service(environment) as (url, process):
        for n in range(20):
            assert ask(url, n) == "MISS"
        wait_until(lambda: on_disk() == 20)
        threading.Timer(0.1, process.kill).start()
        with suppress(httpx.HTTPError):
            for n in itertools.count(20):
                ask(url, n)
        process.wait()
    with serving(remembering({"cache_dir": str(tmp_path)}, light=fake())) as service:
        assert [ask(service.url, n) for n in range(20)] == ["HIT"] * 20
        assert ask(service.url, -1) == "MISS"


# joined


def streams(
    service: Service, n: int, text: str, stay: Callable[[int], bool]
) -> list[tuple[str, list[Any]]]:
    """Ask so often at once. When all have text those leave that do not stay; of the others how
    their replies were made, and their chunks."""
    body = {
        "model": "light", "messages": [{"role": "user", "content": text}], "temperature": 0,
        "stream": True,
    }  # fmt: skip
    n_begun = 0
    all_have_text = asyncio.Event()

    async def ask(http: httpx.AsyncClient, number: int) -> tuple[str, list[Any]] | None:
        nonlocal n_begun
        async with http.stream("POST", "/v1/chat/completions", json=body) as reply:
            told: list[str] = []
            async for line in reply.aiter_lines():
                if '"content":"0"' in line and len(told) < 5:
                    n_begun += 1
                    if n_begun == n:
                        all_have_text.set()
                    await all_have_text.wait()
                    if not stay(number):
                        return None
                if line:
                    told.append(line.removeprefix("data: "))
        assert told.pop() == "[DONE]"
        return reply.headers["x-cache"], [json.loads(data) for data in told]

    async def main() -> list[tuple[str, list[Any]]]:
        limits = httpx.Limits(max_connections=n)
        async with httpx.AsyncClient(
            base_url=service.url, timeout=30, trust_env=False, limits=limits
        ) as http:
            found = await asyncio.gather(*(ask(http, number) for number in range(n)))
        return [reply for reply in found if reply is not None]

    return asyncio.run(main())


def test_32_identical_streams_are_one_generation(service: Service) -> None:
    n = n_jobs(service)
    replies = streams(service, 32, "long", lambda _: True)
    assert n_jobs(service) - n == 1
    assert sorted(outcome for outcome, _ in replies) == ["JOIN"] * 31 + ["MISS"]
    assert len({chunks[0]["id"] for _, chunks in replies}) == 32
    first = same(replies[0][1])
    assert all(same(chunks) == first for _, chunks in replies)
    told = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in first)
    assert told == "0123456789" * 60


@pytest.mark.parametrize("last", [0, 31])
def test_31_that_leave_do_not_disturb_the_last(service: Service, last: int) -> None:
    n = n_jobs(service)
    ((_, chunks),) = streams(service, 32, "long", lambda number: number == last)
    told = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert told == "0123456789" * 60
    assert n_jobs(service) - n == 1
    assert outcome(service.chat("long", temperature=0)) == "HIT"


def test_the_last_to_leave_ends_the_work(service: Service) -> None:
    assert streams(service, 3, "endless", lambda _: False) == []
    wait_until(lambda: service.manager.tiers["light"].n_running == 0, timeout_s=5)
    assert service.http.get("/v1/cache").json()["kinds"]["answer"]["entries"] == 0


def kinds(service: Service) -> dict[str, Any]:
    found: dict[str, Any] = service.http.get("/v1/cache").json()["kinds"]
    return found


def test_what_has_come_is_remembered_though_the_rest_fails(tmp_path: Path) -> None:
    path = script(tmp_path, {"match": "stuck", "fault": "stall"})
    texts = ["fine " * 25, "stuck " * 20]  # each is a batch, and the longest is the first
    embedding = fake(path, n_ctx=32, batch_tokens=32)
    with serving(remembering(embedding=embedding)) as service, ThreadPoolExecutor(1) as pool:
        service.embed("warm")
        asked = pool.submit(service.embed, texts)
        wait_until(lambda: kinds(service)["dense"]["entries"] == 2)
        service.http.post("/v1/models/embedding/unload", json={"force": True})
        assert asked.result().status_code == 503
        assert outcome(service.embed(texts[0])) == "HIT"


def test_a_fault_is_not_remembered(tmp_path: Path) -> None:
    path = script(tmp_path, {"match": "poison", "fault": "nan"})
    with serving(remembering(reranker=fake(path))) as service:
        for n in (1, 2):
            assert service.rerank("a", ["poison"]).status_code == 500
            assert n_jobs(service, "reranker") == n


def test_identical_vectors_on_their_way_are_computed_once(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    slow = fake(script(tmp_path_factory.mktemp("slow"), step_ms=500))
    with serving(remembering(embedding=slow)) as service:
        service.embed("warm")
        seen = batches(service)

        async def main() -> list[httpx.Response]:
            async with httpx.AsyncClient(base_url=service.url, timeout=30, trust_env=False) as http:
                body = {"model": "embedding", "input": ["a", "b", "a", "warm"]}
                asks = (http.post("/v1/embeddings", json=body) for _ in range(8))
                return await asyncio.gather(*asks)

        replies = asyncio.run(main())
        assert batches(service) - seen == 2
        assert sorted(map(outcome, replies)) == ["JOIN"] * 7 + ["MISS"]
        assert len({reply.text for reply in replies}) == 1
        assert {reply.headers["x-cached-inputs"] for reply in replies} == {"1"}
