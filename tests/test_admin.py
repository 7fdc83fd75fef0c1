"""What tells how the service is, and what changes it: over HTTP, on the fake backend."""

import asyncio
import itertools
import json
import re
import time
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send

from api.middleware import Gate
from api.sse import Form, Started, begun
from model_manager import ModelManager
from server import banner, check_config
from settings import ServerSettings, TierSettings
from tests import encoder_fixtures, gguf_fixtures
from tests.hub_imitation import Repo, hub_imitation
from tests.serving import (
    Held,
    Service,
    cut_off,
    events,
    fake,
    script,
    serving,
    settings,
    wait_until,
)
from tests.test_model_manager import Launches

WAYS = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}]},
    "/v1/completions": {"prompt": "Hi"},
    "/v1/responses": {"input": "Hi"},
    "/v1/messages": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 50},
}

CHAT = "/v1/chat/completions"


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    path = script(tmp_path, {"match": "long", "answer": "x" * 400}, step_ms=5)
    tiers = {"light": fake(path, n_parallel=1, queue_size=1), "embedding": fake()}
    with serving(settings(**tiers)) as service:
        yield service


def state(service: Service, tier: str = "light") -> str:
    return str(service.http.get(f"/v1/models/{tier}").json()["state"])


def samples(service: Service) -> dict[str, float]:
    lines = service.http.get("/metrics").text.splitlines()
    return {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
        for line in lines
        if not line.startswith("#")
    }


def wait_for_state(service: Service, wanted: str) -> None:
    for _ in range(1000):
        if state(service) == wanted:
            return
        time.sleep(0.005)
    raise AssertionError(f"it never was {wanted}")


def test_a_model_is_loaded_and_unloaded_when_somebody_says_so(service: Service) -> None:
    reply = service.http.post("/v1/models/light/load")
    assert (reply.status_code, reply.json()["state"]) == (200, "ready")
    reply = service.http.post("/v1/models/light/unload")
    assert (reply.status_code, reply.json()["state"]) == (200, "stopped")
    assert service.http.post("/v1/models/nobody/load").status_code == 404
    assert service.http.post("/v1/models/light/unload", json={"force": "x"}).status_code == 400


def test_only_models_that_make_way_for_others_count_as_evicted() -> None:
    with serving(settings({"memory_limit": "50M"}, light=fake(), heavy=fake())) as service:
        name = 'quintet_model_evictions_total{tier="light"}'
        assert service.chat().status_code == 200
        assert service.http.post("/v1/models/light/unload").status_code == 200
        assert samples(service)[name] == 0
        assert service.chat().status_code == service.chat(model="heavy").status_code == 200
        assert samples(service)[name] == 1


def test_only_admins_may_do_that_where_there_are_any() -> None:
    server = {"api_keys": ["user"], "admin_api_keys": ["admin"]}
    with serving(settings(server)) as service:
        for key, status in (("user", 403), ("admin", 200)):
            reply = service.http.post(
                "/v1/models/light/load", headers={"Authorization": f"Bearer {key}"}
            )
            assert reply.status_code == status


def test_ready_says_which_tier_is_not(tmp_path: Path) -> None:
    with serving(settings(light=fake(), heavy=fake("/no/such/file"))) as service:
        reply = service.http.get("/ready")
        assert (reply.status_code, reply.json()["status"]) == (503, "not ready")
        assert reply.json()["tiers"]["heavy"]["state"] == "failed"
        assert service.http.get("/ready", params={"tier": "light"}).status_code == 200
        assert service.http.get("/ready", params={"tier": "heavy"}).status_code == 503
        assert service.http.get("/ready", params={"tier": "x"}).status_code == 404


def test_ready_again_when_the_next_request_would_load_what_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(script(tmp_path, fault="load"))
    with serving(settings(light=fake(str(path)))) as service:
        assert service.chat().status_code == 500
        reply = service.http.get("/ready")
        assert (reply.status_code, reply.json()["tiers"]["light"]["state"]) == (503, "failed")
        clock = time.monotonic
        monkeypatch.setattr(time, "monotonic", lambda: clock() + 60)
        reply = service.http.get("/ready")
        assert (reply.status_code, reply.json()["tiers"]["light"]["state"]) == (200, "failed")
        monkeypatch.undo()
        assert service.http.get("/ready").status_code == 503
        path.write_text('{"load_s": 0}')
        assert service.http.get("/ready").status_code == 200
        assert service.chat().status_code == 200


@pytest.mark.parametrize("value", [0, "0", "0s", "1ms", "0.001"])
def test_a_model_leaves_as_soon_as_the_request_says(service: Service, value: object) -> None:
    assert service.chat(keep_alive=value).status_code == 200
    wait_for_state(service, "stopped")


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
def test_other_forms_of_a_chat_say_so_too(service: Service, path: str) -> None:
    reply = service.http.post(path, json={"model": "light", "keep_alive": 0, **WAYS[path]})
    assert reply.status_code == 200
    assert "keep_alive" not in reply.headers.get("X-Ignored-Params", "")
    wait_for_state(service, "stopped")
    reply = service.http.post(path, json={"model": "light", "keep_alive": "soon", **WAYS[path]})
    assert reply.status_code == 400
    assert "keep_alive" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "fault"),
    [
        ("/v1/completions", {"prompt": "Hi", "suffix": "a", "echo": True, "logprobs": 1}),
        ("/v1/completions", {"prompt": "x" * 9000}),
        ("/v1/chat/completions", {**WAYS["/v1/chat/completions"], "grammar": "start: ("}),
        ("/v1/responses", {"input": "x" * 9000}),
        ("/v1/embeddings", {"model": "embedding", "input": "Hi", "dimensions": 3}),
        ("/v1/embeddings", {"model": "embedding", "input": "x " * 9000}),
        (
            "/v1/rerank",
            {"model": "reranker", "query": "x " * 9000, "documents": ["Hi"], "truncate": "none"},
        ),
    ],
)
def test_a_request_that_is_refused_does_not_say_how_long_a_model_stays(
    service: Service, path: str, fault: dict[str, object]
) -> None:
    def use() -> None:
        assert service.chat().status_code == service.embed().status_code == 200

    use()
    reply = service.http.post(path, json={"model": "light", "keep_alive": 0} | fault)
    assert reply.status_code == 400
    use()
    use()
    loads = {name: n for name, n in samples(service).items() if "model_loads_total{" in name}
    assert list(loads.values()) == [1, 1]


def test_a_model_stays_as_long_as_the_request_says() -> None:
    with serving(settings(light=fake(idle_ttl_s=0))) as service:
        assert service.chat(keep_alive="1h30m").status_code == 200
        assert service.chat().status_code == 200
        assert state(service) == "ready"
        assert service.chat(keep_alive=-1).status_code == 200
        assert state(service) == "ready"


@pytest.mark.parametrize(
    "value",
    ["soon", "5 m", "1h-2m", "nan", [], {}, "1" * 50_000, f"1{'0' * 308}s" * 2],
    ids=lambda value: str(value)[:9],
)
def test_what_is_no_duration_is_refused(service: Service, value: object) -> None:
    reply = service.chat(keep_alive=value)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "keep_alive"


def test_metrics_count_what_was_done(service: Service) -> None:
    before = samples(service)
    assert before['quintet_model_loaded{tier="light"}'] == 0
    service.chat()
    events(service.chat(stream=True))
    service.chat(temperature="hot")
    service.embed(["a", "b"])
    after = samples(service)
    route = 'route="/v1/chat/completions"'
    assert after[f'quintet_requests_total{{{route},status="200",tier="light"}}'] == 2
    assert after[f'quintet_requests_total{{{route},status="400",tier=""}}'] == 1
    assert after['quintet_model_loaded{tier="light"}'] == 1
    assert after['quintet_model_loads_total{tier="light"}'] == 1
    assert after['quintet_first_token_seconds_count{tier="light"}'] == 2
    assert after['quintet_queue_seconds_count{tier="light"}'] == 2
    assert after['quintet_generated_tokens_total{tier="light"}'] > 10
    assert after['quintet_prompt_tokens_total{tier="light"}'] >= 10
    assert after['quintet_batch_size_sum{tier="embedding"}'] == 2
    assert after["quintet_memory_limit_bytes"] > 0


def test_unknown_paths_are_one_route_in_the_metrics(service: Service) -> None:
    for n in range(3):
        service.http.get(f"/nothing/{n}")
    assert samples(service)['quintet_requests_total{route="none",status="404",tier=""}'] == 3


def test_the_openai_sdk_tries_again_when_the_queue_is_full_and_is_answered(
    tmp_path: Path,
) -> None:
    path = script(tmp_path, {"match": "long", "answer": "x" * 100}, step_ms=3)
    with serving(settings(light=fake(path, n_parallel=1, queue_size=1))) as service:
        with httpx.Client() as http, openai.OpenAI(
            base_url=f"{service.url}/v1", api_key="any", max_retries=3, http_client=http
        ) as client:  # fmt: skip

            def ask(n: int) -> str | None:
                asked = [{"role": "user", "content": f"long {n}"}]
                reply = client.chat.completions.create(model="light", messages=asked)  # type: ignore[arg-type]
                return reply.choices[0].message.content

            with ThreadPoolExecutor(4) as pool:
                assert list(pool.map(ask, range(4))) == ["x" * 100] * 4
        counted = samples(service)
        route = 'route="/v1/chat/completions"'
        assert counted[f'quintet_requests_total{{{route},status="429",tier="light"}}'] >= 1


def test_a_request_that_takes_too_long_is_ended_and_its_place_is_free(tmp_path: Path) -> None:
    path = script(tmp_path, {"match": "long", "answer": "x" * 9000}, step_ms=5)
    server = {"request_timeout_s": 2}
    with serving(settings(server, light=fake(path, n_parallel=1))) as service:
        reply = service.chat("long")
        assert reply.status_code == 504
        assert reply.json()["error"]["code"] == "request_timeout"
        assert reply.headers["x-should-retry"] == "false"
        last = service.breaking(CHAT, messages=[{"role": "user", "content": "long"}])[-1]
        assert last["error"]["code"] == "request_timeout"
        assert service.chat("Hi").json()["choices"][0]["message"]["content"] == "You said: Hi"


def test_a_timer_that_is_a_little_early_does_not_make_it_a_client_that_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def early(work: Any, timeout_s: float) -> None:
        work.close()
        raise asyncio.TimeoutError

    async def receive() -> Message:
        raise AssertionError("nobody waits for it")

    async def send(message: Message) -> None: ...

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        monkeypatch.setattr(asyncio, "wait_for", early)
        with pytest.raises(HTTPException, match="REQUEST_TIMEOUT_S") as caught:
            await receive()
        assert caught.value.status_code == 504
        asked.append(1)

    asked: list[int] = []
    scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"host", b"localhost")]}
    gate = Gate(app, ServerSettings(request_timeout_s=20, receive_timeout_s=30))
    asyncio.run(gate(scope, receive, send))
    assert asked


def test_how_many_were_before_it_is_told(service: Service) -> None:
    assert service.chat().headers["x-queue-position"] == "0"


def test_so_it_is_with_vectors_and_scores() -> None:
    launcher = Held()
    served = serving(settings(embedding=fake()), launch=launcher)
    with served as service, ThreadPoolExecutor(3) as pool:
        asked: list[Future[httpx.Response]] = []
        for ask in (
            service.embed,
            lambda: service.rerank("a", ["b"]),
            lambda: service.http.post("/v1/score", json={"text_1": "a", "text_2": "c"}),
        ):
            asked.append(pool.submit(ask))
            wait_until(lambda: service.manager.tiers["embedding"].n_waiting == len(asked))
        time.sleep(0.01)
        launcher.go_on()
        replies = [reply.result() for reply in asked]
        assert [reply.headers["x-queue-position"] for reply in replies] == ["0", "1", "2"]
        waited_ms = [float(reply.headers["x-queue-time-ms"]) for reply in replies]
        assert waited_ms == sorted(waited_ms, reverse=True)
        assert 10 <= min(waited_ms) < max(waited_ms) < 30_000


def test_the_configuration_is_checked_without_loading_anything(tmp_path: Path) -> None:
    launches = Launches()
    tiers = {"light": fake(), "heavy": fake("/no/such/file")}
    report, is_well = check_config(ModelManager(settings(**tiers), launch=launches))
    assert not is_well
    assert "heavy      The fake backend cannot read the script file" in report
    assert "light      fake: 42 MB (42 MB process)" in report
    small = settings({"memory_limit": "50M"}, light=fake(), medium=fake())
    report, is_well = check_config(ModelManager(small, launch=launches))
    assert is_well
    assert "84 MB of 50 (MEMORY_LIMIT): not all at once" in report
    report, is_well = check_config(ModelManager(settings({"memory_limit": "1M"}), launch=launches))
    assert not is_well
    assert "DOES NOT FIT" in report
    server = {"hf_hub_cache": str(tmp_path)}
    far = settings(server, light=fake(), heavy=TierSettings(model_path="hf:owner/nowhere"))
    report, is_well = check_config(ModelManager(far, launch=launches))
    assert is_well
    assert "all fit together, without heavy, of which nothing is known before" in report
    assert launches.handles == []


def test_a_backend_that_is_not_installed_is_a_fault_with_what_to_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiers = {
        "light": TierSettings(model_path="hf:owner/one", backend="mlx"),
        "embedding": TierSettings(model_path="hf:owner/two", backend="flag"),
        "reranker": TierSettings(model_path="hf:owner/three", backend="onnx"),
    }
    monkeypatch.setattr("server.find_spec", lambda name: None if name != "torch" else "there")
    report, is_well = check_config(ModelManager(settings(**tiers)))
    assert not is_well
    for tier, said in (
        ("light", "needs mlx and mlx_lm and tokenizers: run `./setup.sh --mlx`, or"),
        ("embedding", "needs FlagEmbedding: run `./setup.sh --flag`, or"),
        ("reranker", "needs onnxruntime and onnx and tokenizers: run `./setup.sh --onnx`, or"),
    ):
        assert re.search(rf"{tier} +The backend \w+ {re.escape(said)} `pip install -r ", report)
    monkeypatch.setattr("server.find_spec", lambda _: "there")
    assert check_config(ModelManager(settings(**tiers)))[1]


def test_a_model_that_is_not_in_the_cache_of_a_hub_that_is_not_asked_is_a_fault(
    tmp_path: Path,
) -> None:
    server = {"hf_hub_cache": str(tmp_path), "hf_hub_offline": True}
    light = TierSettings(model_path="hf:owner/nowhere", preload=True)
    report, is_well = check_config(ModelManager(settings(server, light=light)))
    assert not is_well
    assert "owner/nowhere is not in the hub's cache, or not all of it, and HF_HUB_O" in report
    with serving(settings(server, light=light)) as service:
        assert service.http.get("/ready").status_code == 503
        about = service.http.get("/health")
        assert about.status_code == 503
        assert "HF_HUB_OFFLINE" in about.json()["tiers"]["light"]["reason"]
        assert "HF_HUB_OFFLINE" in banner(service.app.state.services, "localhost", 8000)


@pytest.mark.parametrize(
    ("limit", "n_bytes"),
    [
        ("50%", 500),
        ("0.5%", 5),
        ("3000000", 3000000),
        ("2048K", 2 << 20),
        ("1.5GB", 3 << 29),
        ("3MiB", 3 << 20),
        ("4194304B", 4 << 20),
        ("2t", 2 << 40),
    ],
)
def test_a_limit_is_a_share_or_a_size(limit: str, n_bytes: int) -> None:
    assert ServerSettings(memory_limit=limit).memory_limit_bytes(1000) == n_bytes


@pytest.mark.real
def test_a_model_comes_from_the_hub_at_its_first_request(tmp_path: Path) -> None:
    content = gguf_fixtures.write_tiny_spm(tmp_path / "spm.gguf").read_bytes()
    with hub_imitation() as hub:
        hub.repos["me/Tiny-GGUF"] = Repo({"tiny-Q8_0.gguf": content})
        server = {"hf_endpoint": hub.endpoint, "hf_hub_cache": str(tmp_path / "cache")}
        light = TierSettings(model_path="hf:me/Tiny-GGUF:Q8_0", n_threads=1)
        with serving(settings(server, light=light)) as service:
            about = service.http.get("/v1/models/light").json()
            assert (about["state"], about["context_length"]) == ("stopped", None)
            assert "Tiny" in about["aliases"]
            assert service.http.get("/ready").status_code == 200
            assert not hub.requests, "nobody has asked for it"
            with ThreadPoolExecutor(3) as pool:
                replies = [
                    pool.submit(service.chat, max_tokens=3, model=model)
                    for model in ("light", "Tiny", "me/Tiny-GGUF:Q8_0")
                ]
                assert [reply.result().status_code for reply in replies] == [200] * 3
            assert len([r for r in hub.contents() if r.method == "GET"]) == 1
            about = service.http.get("/v1/models/tiny-Q8_0").json()
            assert about["context_length"], "once the file is here it is a name too"
            assert about["aliases"] == ["me/Tiny-GGUF:Q8_0", "Tiny", "tiny-Q8_0"]
        hub.requests.clear()
        with serving(settings(server | {"hf_hub_offline": True}, light=light)) as service:
            assert service.chat(max_tokens=3).status_code == 200
        assert not hub.requests
        missing = TierSettings(model_path="hf:me/nothing")
        with serving(settings(server, light=missing)) as service:
            reply = service.chat()
            assert reply.status_code == 500
            assert "me/nothing" in reply.json()["error"]["message"]
            assert service.http.get("/health").status_code == 200


EMBED = {"model": "embedding", "input": "Hi"}
RERANK = {"model": "reranker", "query": "Hi", "documents": ["Hi"]}


@pytest.mark.real
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", EMBED),
        ("/embed", {"inputs": "Hi"}),
        ("/v1/rerank", RERANK),
        ("/v1/score", {"text_1": "Hi", "text_2": "Hi"}),
        ("/info", None),
    ],
)
def test_a_model_comes_from_the_hub_whichever_route_is_asked_first(
    tmp_path: Path, path: str, body: Any
) -> None:
    content = encoder_fixtures.write_bert(tmp_path / "bert.gguf").read_bytes()
    with hub_imitation() as hub:
        hub.repos["me/Bert-GGUF"] = Repo({"bert-F32.gguf": content})
        server = {"hf_endpoint": hub.endpoint, "hf_hub_cache": str(tmp_path / "cache")}
        embedding = TierSettings(model_path="hf:me/Bert-GGUF", n_threads=1)
        with serving(settings(server, embedding=embedding)) as service:
            reply = service.http.request("POST" if body else "GET", path, json=body)
            assert reply.status_code == 200, reply.text


def test_how_long_a_model_stays_is_for_admins_where_there_are_some() -> None:
    keys = {"api_keys": ["user-1"], "admin_api_keys": ["admin-1"]}
    bodies = {path: {"model": "light", **body} for path, body in WAYS.items()}
    bodies |= {"/v1/embeddings": EMBED, "/v1/rerank": RERANK}
    with serving(settings(keys, light=fake(), embedding=fake())) as service:
        for key, is_kept in (("user-1", False), ("admin-1", True)):
            for path, body in bodies.items():
                headers = {"x-api-key": key}
                reply = service.http.post(path, json=body | {"keep_alive": -1}, headers=headers)
                assert reply.status_code == 200
                assert ("keep_alive" in reply.headers.get("x-ignored-params", "")) != is_kept
                tier = service.manager.tiers["light" if body["model"] == "light" else "embedding"]
                assert (tier._keep_alive_s == -1) == is_kept
                tier.keep_alive(60)


# a regular expression of what an event that says nothing has
PAUSES = {
    "/v1/chat/completions": r'"delta":{("content":"")?},"logprobs":null,"finish_reason":null}\]',
    "/v1/completions": r'"text":"","logprobs":null,"finish_reason":null}\]',
    "/v1/responses": r'{"type":"keepalive",',
    "/v1/messages": r'{"type":"ping"',
}


@pytest.mark.parametrize("path", WAYS)
def test_a_stream_that_computes_for_long_says_that_it_lives(tmp_path: Path, path: str) -> None:
    light = fake(script(tmp_path, step_ms=60))
    body = {"model": "light", "stream": True, **WAYS[path]}
    with serving(settings({"comment_after_s": 0.02}, light=light)) as service:
        assert service.chat().status_code == 200
        whole = service.http.post(path, json=body).text
    begins = "event: response.created", "event: response.in_progress"  # in pauses as well
    parts = [part for part in whole.split("\n\n")[:-1] if not part.startswith(begins)]
    are_pauses = [bool(re.search(PAUSES[path], part)) for part in parts]
    assert any(are_pauses[are_pauses.index(False) :]), "since it had begun"
    assert re.search(r"\[DONE\]|message_stop|response\.completed", parts[-1]), (
        "nothing comes behind"
    )
    assert not re.search("^:", whole, re.MULTILINE), "some clients fail on comments"
    numbers = [int(n) for n in re.findall(r'"sequence_number":(\d+)', whole)]
    assert numbers == list(range(len(numbers)))
    assert whole.endswith("\n\n")


def test_a_pause_overtakes_no_event_that_has_its_number_already() -> None:
    numbers = itertools.count()
    told = b""

    def numbered(**_: Any) -> bytes:
        return b"%d " % next(numbers)

    async def events() -> AsyncGenerator[bytes, None]:
        for _ in range(3):
            yield numbered()

    async def send(message: Message) -> None:
        nonlocal told
        if message["type"] == "http.response.body":
            if not told:  # a slow reader: several pauses are due meanwhile
                await asyncio.wait({asyncio.ensure_future(receive())}, timeout=0.05)
            told += message["body"]

    async def receive() -> Message:
        return await asyncio.Event().wait() and {}

    async def started() -> Started:
        return events(), {}

    async def run() -> None:
        form = Form(numbered)
        stream = await begun(started(), form, waits_for=str, headers={}, comment_after_s=0.01)
        await stream({"request_id": "r"}, receive, send)

    asyncio.run(run())
    assert told.split()[:3] == [b"0", b"1", b"2"]


@pytest.mark.parametrize("path", WAYS)
def test_a_stream_that_waits_says_for_what(path: str) -> None:
    body = {"model": "light", "stream": True, "frob": 1, **WAYS[path]}
    launcher = Held()

    def n_events(text: str) -> int:
        return sum(not re.search(PAUSES[path], part) for part in text.split("\n\n"))

    with serving(settings({"comment_after_s": 0.05}), launch=launcher) as service:
        with service.http.stream("POST", path, json=body) as reply:
            assert reply.headers["x-ignored-params"] == "frob"
            pieces = reply.iter_text()
            text = ""
            while '"waiting":"loading light ' not in text:
                text += next(pieces)
            launcher.go_on()
            text += "".join(pieces)
        again = service.http.post(path, json=body).text
        assert n_events(text) == n_events(again) > 3, "all came"
        assert '"waiting":"loading' not in again
        assert not re.search("^:", text + again, re.MULTILINE), "some clients fail on comments"


LATE = ("X-Truncated-Messages", "X-Seed", "X-Cache", "X-Queue-Position", "X-Queue-Time-Ms")


@pytest.mark.parametrize("path", WAYS)
def test_headers_that_come_too_late_are_in_an_event(path: str) -> None:
    body = {"model": "light", "stream": True, "frob": 1, **WAYS[path]}
    launcher = Held()
    with serving(settings({"comment_after_s": 0.05}), launch=launcher) as service:
        with service.http.stream("POST", path, json=body) as reply:
            pieces = reply.iter_text()
            text = next(pieces)
            launcher.go_on()
            text += "".join(pieces)
        assert not {name.lower() for name in LATE} & reply.headers.keys()
        (late,) = late_headers(text)
        assert late.keys() == {*LATE[1:]}
        assert not late_headers(service.http.post(path, json=body).text), "they are headers in time"


def late_headers(text: str) -> list[dict[str, str]]:
    told = [json.loads(data) for data in re.findall("^data: ({.*)", text, re.MULTILINE)]
    return [data["headers"] for data in told if "headers" in data]


TURNS: list[Any] = [
    {"role": role, "content": "What was that?" * 2} for role in ("user", "assistant") * 20
] + [{"role": "user", "content": "Hi"}]


def test_a_late_stream_says_that_turns_were_left_out() -> None:
    body = {"model": "light", "stream": True, "messages": TURNS, "truncate": "middle"}
    with serving(settings(light=fake(n_ctx=512))) as service:
        n_left_out = service.http.post(CHAT, json=body).headers["x-truncated-messages"]
    launcher, server = Held(), settings({"comment_after_s": 0.05}, light=fake(n_ctx=512))
    with (
        serving(server, launch=launcher) as service,
        service.http.stream("POST", CHAT, json=body) as reply,
    ):
        assert "x-truncated-messages" not in reply.headers
        launcher.go_on()
        (late,) = late_headers(reply.read().decode())
        assert late["X-Truncated-Messages"] == n_left_out


def test_sdks_read_over_the_pauses_of_a_late_stream() -> None:
    launcher = Held()
    with (
        serving(settings({"comment_after_s": 0.05}), launch=launcher) as service,
        openai.OpenAI(base_url=f"{service.url}/v1", api_key="none") as client,
        anthropic.Anthropic(base_url=service.url, api_key="none") as other,
        client.chat.completions.create(
            model="light", messages=[{"role": "user", "content": "Hi"}], stream=True
        ) as stream,
        other.messages.create(
            model="light", messages=[{"role": "user", "content": "Hi"}], stream=True, max_tokens=50
        ) as messages,
    ):
        assert "x-seed" not in {*stream.response.headers, *messages.response.headers}
        launcher.go_on()
        chunks = [chunk.choices[0].delta.content or "" for chunk in stream]
        assert "".join(chunks) == "You said: Hi"
        types = [message.type for message in messages]
        assert (types[0], types[-1]) == ("message_start", "message_stop")


def test_openais_sdk_adds_up_a_late_stream() -> None:
    launcher = Held()
    asked: Any = {"model": "light", "messages": [{"role": "user", "content": "Hi"}]}
    with (
        serving(settings({"comment_after_s": 0.05}), launch=launcher) as service,
        openai.OpenAI(base_url=f"{service.url}/v1", api_key="none") as client,
        client.chat.completions.stream(**asked) as chat,
        client.responses.stream(model="light", input="Hi") as response,
    ):
        launcher.go_on()
        choice = chat.get_final_completion().choices[0]
        assert (choice.message.role, choice.message.content) == ("assistant", "You said: Hi")
        assert choice.finish_reason == "stop"
        response.until_done()
        assert response.get_final_response().output_text == "You said: Hi"


def test_openais_sdk_raises_a_fault_after_a_pause(tmp_path: Path) -> None:
    light = fake(script(tmp_path, fault="load"))
    launcher = Held()
    with (
        serving(settings({"comment_after_s": 0.05}, light=light), launch=launcher) as service,
        openai.OpenAI(base_url=f"{service.url}/v1", api_key="none") as client,
        client.responses.stream(model="light", input="Hi") as stream,
    ):
        launcher.go_on()  # now that the stream has begun
        types = [next(stream).type for _ in range(2)]
        assert types == ["response.created", "response.in_progress"]
        while (kind := next(stream).type) == "keepalive":
            pass
        assert kind == "response.failed"
        with pytest.raises(openai.APIError, match="told to fail"):
            next(stream)


def test_a_place_in_the_queue_is_said(tmp_path: Path) -> None:
    path = script(tmp_path, {"match": "long", "answer": "x" * 9000}, step_ms=6)
    light = fake(path, n_parallel=1)
    body = {"model": "light", "stream": True, "prompt": "long"}
    with serving(settings({"comment_after_s": 0.05}, light=light)) as service, ExitStack() as stack:
        assert service.chat().status_code == 200

        def ask() -> Iterator[str]:
            reply = stack.enter_context(service.http.stream("POST", "/v1/completions", json=body))
            return reply.iter_lines()  # whose end would end the request

        first = ask()
        assert any('"text":"x' in line for line in first), "it has begun"
        second, third = ask(), ask()
        waits = [json.loads(next(lines).removeprefix("data: ")) for lines in (second, third)]
        assert [data["waiting"] for data in waits] == ["queue 1/1", "queue 2/2"]
        assert waits[0]["object"] == "text_completion"


@pytest.mark.parametrize("path", WAYS)
def test_a_fault_of_a_late_stream_is_an_event(tmp_path: Path, path: str) -> None:
    light = fake(script(tmp_path, fault="load"))
    body = {"model": "light", "stream": True, **WAYS[path]}
    launcher, limits = Held(), {"comment_after_s": 0.05}
    with (
        serving(settings(limits, light=light), launch=launcher) as service,
        service.http.stream("POST", path, json=body) as reply,
    ):
        assert reply.status_code == 200
        pieces = reply.iter_text()
        assert '"waiting":' in next(pieces)
        launcher.go_on()
        if "completions" in path:
            assert "error" in cut_off(pieces)[-1]
        else:
            *_, last, end = "".join(pieces).split("\n\n")
            assert (last.partition("\n")[0], end) == ("event: error", "")
    with serving(settings(light=light)) as service:
        assert service.http.post(path, json=body).status_code == 500, "in time it is a status"
