"""What holds for every route: errors, request ids, keys, hosts, CORS, limits, models and health."""

import asyncio
import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from api.middleware import Gate
from errors import ServiceError
from settings import ServerSettings, TierSettings
from tests.serving import Service, fake, script, serving, settings, wait_until
from tier import Tier


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with serving(settings({"max_body_bytes": 5000}, light=fake(aliases=["small"]))) as service:
        yield service


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    if "type" not in response.json():  # that is Anthropic's
        assert {"message", "type", "param", "code"} <= error.keys()
    return error


CHAT = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}


def test_an_unknown_route_is_a_404(service: Service) -> None:
    assert error_of(service.http.get("/v2/nothing"), 404)["code"] == "route_not_found"


@pytest.mark.parametrize(
    ("method", "asked", "meant"),
    [
        ("POST", "/chat/completions", CHAT),
        ("POST", "/v1/chat/completions/", CHAT),
        ("POST", "//v1//chat/completions", CHAT),
        ("POST", "//chat/completions/", CHAT),
        ("POST", "/embeddings", "/v1/embeddings"),
        ("POST", "/embed/", "/embed"),
        ("POST", "/messages", "/v1/messages"),
        ("POST", "/models/light/load", "/v1/models/light/load"),
        ("GET", "/models", "/v1/models"),
        ("GET", "//v1/models", "/v1/models"),
        ("GET", "/v1/models/", "/v1/models"),
        ("GET", "/v1/models//", "/v1/models"),
        ("GET", "/models/light", "/v1/models/light"),
        ("GET", "/health/", "/health"),
        ("POST", "/v1/v1/messages", "/v1/messages"),  # of Anthropic's SDK, with /v1 in its base_url
    ],
)
def test_a_404_names_the_path_that_was_meant(
    service: Service, method: str, asked: str, meant: str
) -> None:
    error = error_of(service.http.request(method, f"{service.url}{asked}"), 404)
    assert error["message"] == f"There is no {method} {asked} here; did you mean {meant}?"
    assert error["code"] == "route_not_found"


@pytest.mark.parametrize(
    ("method", "asked"),
    [
        ("PUT", "/v1/"), ("GET", "//"), ("GET", "/v1"), ("GET", "/chat/completions"),
        ("POST", "/chat"), ("POST", "/v1/v3/rerank"), ("DELETE", "/v2/cache/"),
    ],
)  # fmt: skip
def test_a_404_does_not_guess(service: Service, method: str, asked: str) -> None:
    error = error_of(service.http.request(method, f"{service.url}{asked}"), 404)
    assert error["message"] == f"There is no {method} {asked} here."


def test_a_wrong_method_is_a_405_that_names_the_right_one(service: Service) -> None:
    response = service.http.get(CHAT)
    assert error_of(response, 405)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("HEAD", CHAT, "POST"),
        ("POST", "/v1/models", "GET, HEAD"),
        ("PUT", "/v1/models/light", "GET, HEAD"),
        ("POST", "/openapi.json", "GET, HEAD"),
        ("POST", "/v1/cache", "DELETE, GET, HEAD"),
    ],
)
def test_a_405_names_all_that_is_possible(
    service: Service, method: str, path: str, allowed: str
) -> None:
    response = service.http.request(method, path)
    assert response.status_code == 405
    assert response.headers["allow"] == allowed


@pytest.mark.parametrize(
    "path",
    [
        "/health", "/ready", "/v1/models", "/v1/models/light", "/v1/models/none", "/v1/cache",
        "/metrics", "/info", "/openapi.json", "/v2/nothing",
    ],
)  # fmt: skip
def test_head_is_get_without_the_body(
    service: Service, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "quintet.access"):
        get, head = service.http.get(path), service.http.head(path)
        wait_until(lambda: f"HEAD {path}" in caplog.text)
    records = [r for r in caplog.records if f" {path} " in r.getMessage()]
    first, second = (record.__dict__["fields"] for record in records)
    assert (first["method"], second["method"]) == ("GET", "HEAD")
    assert first["route"] == second["route"]
    assert (head.status_code, head.content) == (get.status_code, b"")
    names = ["content-type", "content-length"]
    if path == "/metrics":  # they have grown
        names.pop()
    assert [head.headers[name] for name in names] == [get.headers[name] for name in names]
    assert service.chat().status_code == 200  # on the same connection


def test_the_openapi_document_has_each_operation_once(service: Service) -> None:
    paths = service.http.get("/openapi.json").json()["paths"]
    assert {method for path in paths.values() for method in path} == {"get", "post", "delete"}


@pytest.mark.parametrize("content", [b"", b"{", b"{'a': 1}", b"\xff\xfe", b"[" * 4000])
def test_a_body_that_is_not_json_is_a_400(service: Service, content: bytes) -> None:
    error = error_of(service.http.post(CHAT, content=content, headers=JSON), 400)
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("content", [b"[]", b"5", b'"x"', b"null"])
def test_a_body_that_is_not_an_object_is_a_400(service: Service, content: bytes) -> None:
    error = error_of(service.http.post(CHAT, content=content, headers=JSON), 400)
    assert error["message"] == "The body must be a JSON object."


def test_a_body_of_another_type_is_told_which_to_send(service: Service) -> None:
    body = '{"model": "light", "messages": [{"role": "user", "content": "x"}]}'
    for headers in ({}, {"Content-Type": "text/plain"}):
        error = error_of(service.http.post(CHAT, content=body, headers=headers), 400)
        assert "Content-Type: application/json" in error["message"]


def test_a_compressed_body_is_a_415_that_asks_for_a_plain_one(service: Service) -> None:
    body = b'{"model": "light", "messages": [{"role": "user", "content": "x"}]}'
    for encoding, content in (
        ("gzip", gzip.compress(body)),
        ("Deflate", zlib.compress(body)),
        ("identity, gzip", gzip.compress(body)),
        ("zstd", b"x" * 400),
    ):
        headers = JSON | {"Content-Encoding": encoding}
        response = service.http.post(CHAT, content=content, headers=headers)
        error = error_of(response, 415)
        assert error["code"] == "unsupported_encoding"
        assert "Content-Encoding; send it plain" in error["message"]
        assert response.headers["accept-encoding"] == "identity"


@pytest.mark.parametrize("encoding", ["identity", "Identity", "", "utf-8", "UTF8"])
def test_a_plain_body_may_say_so(service: Service, encoding: str) -> None:
    body = b'{"model": "light", "messages": [{"role": "user", "content": "x"}]}'
    headers = JSON | {"Content-Encoding": encoding}
    assert service.http.post(CHAT, content=body, headers=headers).status_code == 200


def test_what_has_no_body_may_say_how_its_bodies_are_encoded(service: Service) -> None:
    assert service.http.get("/health", headers={"Content-Encoding": "gzip"}).status_code == 200


def test_a_body_that_is_too_large_is_a_413_whether_it_says_so_or_not(service: Service) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(10):
            yield b" " * 1000

    for content in (b" " * 6000, chunks()):
        error = error_of(service.http.post(CHAT, content=content, headers=JSON), 413)
        assert error["code"] == "body_too_large"
        assert "MAX_BODY_BYTES" in error["message"]


BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"model": "light", "messages": [{"role": "user", "content": "Hi"}]},
    "/v1/completions": {"model": "light", "prompt": "Hi"},
    "/v1/responses": {"model": "light", "input": "Hi"},
    "/v1/messages": {
        "model": "light",
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 50,
    },
    "/v1/messages/count_tokens": {
        "model": "light",
        "messages": [{"role": "user", "content": "Hi"}],
    },
    "/tokenize": {"content": "Hi"},
    "/detokenize": {"tokens": [72]},
    "/apply-template": {"messages": [{"role": "user", "content": "Hi"}]},
    "/v1/embeddings": {"model": "embedding", "input": "Hi"},
    "/embed": {"inputs": "Hi"},
    "/embed_sparse": {"inputs": "Hi"},
    "/v1/rerank": {"query": "Hi", "documents": ["Hi"]},
    "/v1/score": {"text_1": "Hi", "text_2": "Hi"},
}
SPELT_OTHERWISE = {
    "/v1/responses": "text.format",
    "/v1/messages": "output_config.format",
    "/v1/messages/count_tokens": "output_config.format",
}
OF_OTHERS: dict[str, Any] = {  # fields that some of them know, and all are sent
    "stream_options": {"include_usage": True},
    "response_format": {"type": "json_object"},
    "mirostat": 2,
    "tools": [],
    "reasoning": {},
    "text": {},
    "frob": 1,
}


@pytest.fixture(scope="module")
def whole() -> Iterator[Service]:
    with serving(settings(light=fake(), embedding=fake(), reranker=fake())) as service:
        yield service


@pytest.mark.parametrize("field", OF_OTHERS)
@pytest.mark.parametrize("path", BODIES)
def test_a_field_of_another_endpoint_is_named(whole: Service, path: str, field: str) -> None:
    response = whole.http.post(path, json={**BODIES[path], field: OF_OTHERS[field]})
    document = whole.http.get("/openapi.json").json()
    (content,) = document["paths"][path]["post"]["requestBody"]["content"].values()
    schema = document["components"]["schemas"][content["schema"]["$ref"].rpartition("/")[2]]
    if field == "response_format" and path in SPELT_OTHERWISE:
        error = error_of(response, 400)  # it would be taken for kept
        assert "'response_format'" in error["message"]
        assert f"send `{SPELT_OTHERWISE[path]}`" in error["message"]
    elif field in schema["properties"]:
        assert response.status_code == 200 or response.json()["error"]["param"] == field
        assert field not in response.headers.get("X-Ignored-Params", "")
    else:
        assert response.status_code == 200, response.text
        assert field in response.headers["X-Ignored-Params"].split(",")


def test_a_fault_of_ours_is_a_500_under_the_requests_id(
    service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: Tier, request: object, **_: object) -> None:
        raise RuntimeError("secret detail")

    with monkeypatch.context() as patch:
        patch.setattr(Tier, "submit", fail)
        response = service.http.post(
            CHAT,
            json={"model": "light", "messages": [{"role": "user", "content": "x"}]},
            headers={"X-Request-Id": "mine-1", "Origin": "http://localhost:5173"},
        )
    error = error_of(response, 500)
    assert error["code"] == "internal_error"
    assert "secret" not in response.text
    assert response.headers["x-request-id"] == "mine-1"
    assert response.headers["access-control-allow-origin"] == "http://localhost:5173"
    assert "secret detail" in caplog.text
    assert "mine-1" in caplog.text
    assert service.chat().status_code == 200


@pytest.mark.parametrize("given", [None, "a b", "x" * 200, "ü".encode().decode("latin-1")])
def test_every_reply_has_a_request_id(service: Service, given: str | None) -> None:
    headers = {} if given is None else {"X-Request-Id": given.encode("latin-1")}
    for path in ("/health", "/v2/nothing"):
        assert service.http.get(path, headers=headers).headers["x-request-id"].startswith("req-")


def test_a_path_cannot_forge_a_line_of_the_log(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "quintet.access"):
        service.http.get("/%0aFORGED%1b[31m")
        wait_until(lambda: "FORGED" in caplog.text)
    (line,) = [r.getMessage() for r in caplog.records if r.name == "quintet.access"]
    assert r"\nFORGED\x1b[31m" in line


def test_a_slash_too_many_is_a_404_in_the_envelope(service: Service) -> None:
    assert error_of(service.http.post(f"{CHAT}/", json={}), 404)["code"] == "route_not_found"


# CORS


def test_a_browser_on_localhost_may_ask(service: Service) -> None:
    origin = {"Origin": "http://localhost:3000"}
    wish = {"Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type"}  # fmt: skip
    reading = {"Access-Control-Request-Method": "HEAD"}
    assert service.http.options("/v1/models", headers=origin | reading).status_code == 200
    preflight = service.http.options(CHAT, headers=origin | wish)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "http://localhost:3000"
    assert "authorization" in preflight.headers["access-control-allow-headers"]
    assert "access-control-allow-credentials" not in preflight.headers
    reply = service.http.get("/v1/models", headers=origin)
    assert reply.headers["access-control-allow-origin"] == "http://localhost:3000"
    assert "X-Request-Id" in reply.headers["access-control-expose-headers"]


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "http://localhost.evil.example", "null", "http://127.0.0.12"]
)
def test_a_page_from_elsewhere_may_not(service: Service, origin: str) -> None:
    reply = service.http.get("/v1/models", headers={"Origin": origin})
    assert "access-control-allow-origin" not in reply.headers


def test_cors_origins_replace_localhost() -> None:
    with serving(settings({"cors_origins": ["https://app.example"]})) as service:
        for origin, allowed in (("https://app.example", True), ("http://localhost:1", False)):
            reply = service.http.get("/v1/models", headers={"Origin": origin})
            assert ("access-control-allow-origin" in reply.headers) is allowed


# keys and hosts


def test_with_keys_every_route_but_health_needs_one() -> None:
    with serving(settings({"api_keys": ["one", "two"]})) as service:
        for headers in (
            {"Authorization": "Bearer one"}, {"Authorization": "bearer two"}, {"x-api-key": "two"},
        ):  # fmt: skip
            assert service.http.get("/v1/models", headers=headers).status_code == 200
        for headers in ({}, {"Authorization": "Bearer three"}, {"Authorization": "Basic one"},
                        {"x-api-key": ""}, {"Authorization": "Bearer"}):  # fmt: skip
            reply = service.http.get(
                "/v1/models", headers=headers | {"Origin": "http://localhost:1"}
            )
            assert error_of(reply, 401)["code"] == "invalid_api_key"
            assert "access-control-allow-origin" in reply.headers
        assert service.http.get("/health").status_code == 200
        wish = {"Origin": "http://localhost:1", "Access-Control-Request-Method": "POST"}
        assert service.http.options(CHAT, headers=wish).status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost", 200), ("localhost:8000", 200), ("127.0.0.1:1", 200), ("[::1]:80", 200),
     ("app.localhost", 200), ("192.168.1.5", 200), ("evil.example", 403), ("localhost.evil", 403)],
)  # fmt: skip
def test_a_rebound_host_is_refused(service: Service, host: str, status: int) -> None:
    assert service.http.get("/v1/models", headers={"Host": host}).status_code == status


def test_allowed_hosts_are_served() -> None:
    with serving(settings({"allowed_hosts": ["Box.lan"]})) as service:
        assert service.http.get("/health", headers={"Host": "box.lan:80"}).status_code == 200


@pytest.mark.parametrize(
    ("server", "address", "is_served"),
    [
        ({}, "127.0.0.1", True),
        ({}, "::1", True),
        ({}, "192.168.1.5", False),
        ({"allow_insecure": True}, "192.168.1.5", True),
        ({"api_keys": ["k"]}, "192.168.1.5", True),
    ],
)
def test_other_machines_are_served_only_with_keys_or_by_decision(
    server: dict[str, Any], address: str, is_served: bool
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    statuses = []

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    scope = {"type": "http", "path": "/x", "method": "GET", "server": (address, 8000),
             "headers": [(b"host", b"localhost"), (b"x-api-key", b"k")]}  # fmt: skip
    asyncio.run(Gate(app, ServerSettings(**server))(scope, None, send))  # type: ignore[arg-type]
    assert statuses == [200 if is_served else 403]


# models and health


def test_models_are_described_without_being_loaded() -> None:
    tiers = {"light": fake(aliases=["small"]), "heavy": fake(n_ctx=1000)}
    with serving(settings(**tiers)) as service:
        body = service.http.get("/v1/models").json()
        assert body.keys() == {"object", "data"}
        assert body["object"] == "list"
        assert [model["id"] for model in body["data"]] == ["light", "heavy"]
        assert body["data"][1] == {
            "id": "heavy", "object": "model", "created": 0, "owned_by": "quintet",
            "tier": "heavy", "path": None, "backend": "fake", "context_length": 1000,
            "capabilities": ["chat", "completion"], "aliases": [], "state": "stopped",
            "memory": {"estimated_bytes": 42 << 20},
        }  # fmt: skip
        assert service.http.get("/v1/models/small").json() == body["data"][0]
        assert error_of(service.http.get("/v1/models/nope"), 404)["code"] == "model_not_found"
        service.chat()
        states = service.http.get("/health").json()["tiers"]
        assert states == {"light": {"state": "ready"}, "heavy": {"state": "stopped"}}


def test_models_are_described_to_anthropics_clients_in_their_words() -> None:
    with serving(settings(light=fake(), embedding=fake())) as service:  # which also scores
        plain = service.http.get("/v1/models").json()
        headers = {"anthropic-version": "2023-06-01"}
        body = service.http.get("/v1/models", headers=headers).json()
        assert body.pop("data") == [
            about | {"type": "model", "display_name": about["id"],
                     "created_at": "1970-01-01T00:00:00+00:00"}
            for about in plain.pop("data")
        ]  # fmt: skip
        assert body == plain | {"has_more": False, "first_id": "light", "last_id": "reranker"}
        one = service.http.get("/v1/models/reranker", headers=headers).json()
        assert one["display_name"] == "reranker"
        assert "type" not in service.http.get("/v1/models/reranker").json()


def test_a_model_that_cannot_be_read_says_why_and_the_rest_serves(tmp_path: Any) -> None:
    (tmp_path / "letter.gguf").write_text("This is not a model.")
    tiers = {
        "light": fake(),
        "medium": TierSettings(model_path=str(tmp_path / "absent.gguf")),
        "heavy": TierSettings(model_path=str(tmp_path / "letter.gguf")),
    }
    with serving(settings(**tiers)) as service:
        for name, why in (("medium", "absent.gguf cannot be read"), ("heavy", "not a GGUF")):
            response = service.chat(model=name)
            error = error_of(response, 500)
            assert error["code"] == "model_load_failed"
            assert why in error["message"]
            assert str(tmp_path) not in response.text
            assert response.headers["x-should-retry"] == "false"
            assert why in service.http.get(f"/v1/models/{name}").json()["reason"]
            assert why in service.http.get("/health").json()["tiers"][name]["reason"]
        assert service.http.get("/health").status_code == 200
        assert service.chat().status_code == 200


def test_a_file_that_goes_while_its_model_is_loaded_takes_nothing_down(tmp_path: Any) -> None:
    path = script(tmp_path)
    with serving(settings(light=fake(path))) as service:
        assert service.chat().status_code == 200
        Path(path).unlink()
        (model,) = service.http.get("/v1/models").json()["data"]
        assert (model["state"], model["context_length"]) == ("ready", 8192)
        assert model["created"] > 0
        assert service.chat().status_code == 200


def test_health_is_503_when_a_preloaded_tier_failed(tmp_path: Any) -> None:
    tiers = {"light": fake(), "heavy": fake(script(tmp_path, fault="load"), preload=True)}
    with serving(settings(**tiers)) as service:
        wait_until(lambda: service.manager.tiers["heavy"].state == "failed")
        reply = service.http.get("/health")
        assert reply.status_code == 503
        assert reply.json()["tiers"]["heavy"] == {
            "state": "failed", "reason": "The fake backend was told to fail.",
        }  # fmt: skip
        assert service.chat().status_code == 200


def test_a_preloaded_tier_is_tried_until_it_can_be_loaded_and_health_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("worker_life.MAX_BACK_OFF_S", 0.02)
    path = tmp_path / "late.json"

    def put(script: str) -> None:  # whole, as it may be read at any moment
        (tmp_path / "new.json").write_text(script)
        (tmp_path / "new.json").replace(path)

    with serving(settings(heavy=fake(str(path), preload=True))) as service:
        tier = service.manager.tiers["heavy"]
        wait_until(lambda: tier._n_preloads_failed > 2)
        for _ in range(20):
            assert service.http.get("/health").status_code == 503, "in the midst of a try too"
        put('{"fault": "load"}')
        wait_until(lambda: "told to fail" in str(tier.life.reason))
        n_failed = tier._n_preloads_failed
        wait_until(lambda: tier._n_preloads_failed > n_failed + 2)
        for _ in range(20):
            assert service.http.get("/health").status_code == 503
        put("{}")
        wait_until(lambda: tier.state == "ready")
        assert service.http.get("/health").status_code == 200
    assert sum("cannot be loaded" in line for line in caplog.messages) == 2, "each reason once"


def test_a_preloaded_tier_that_is_loaded_by_a_request_meanwhile_is_not_loaded_again(
    tmp_path: Path,
) -> None:
    path = tmp_path / "late.json"
    with serving(settings(light=fake(str(path), preload=True, idle_ttl_s=0))) as service:
        tier = service.manager.tiers["light"]
        wait_until(lambda: tier._loads_at is not None)
        path.write_text("{}")
        assert service.chat().status_code == 200
        wait_until(lambda: tier.state == "stopped")
        assert tier._loads_at is None
        assert service.http.get("/health").status_code == 200


def test_every_error_class_has_its_own_code() -> None:
    classes = [ServiceError]
    for error_class in classes:
        classes += error_class.__subclasses__()
    codes = [c.code for c in classes if c.code]
    assert len(codes) == len(set(codes))
