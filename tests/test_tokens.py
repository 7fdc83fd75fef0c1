"""POST /tokenize, /detokenize and /apply-template over HTTP, on the fake backend."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from engine.backends.fake import FakeTokenizer
from errors import BadRequest
from tests.serving import Service, fake, script, serving, settings, wait_until


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with serving(settings(medium=fake(), embedding=fake())) as service:
        yield service


def post(service: Service, path: str, **body: Any) -> Any:
    response = service.http.post(path, json=body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    return response.json()


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/tokenize", {"content": "frob"}, "content"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "frob"}]}, "messages"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "frob"}] * 3, "truncate": "middle"},
            "messages",
        ),
        (
            "/v1/messages/count_tokens",
            {"messages": [{"role": "user", "content": "frob"}]},
            "messages",
        ),
    ],
)
def test_a_text_that_the_tokenizer_refuses_is_named_as_it_was_sent(
    service: Service, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any], field: str
) -> None:
    tokenize = FakeTokenizer.tokenize

    def refuse(tokenizer: FakeTokenizer, text: str, **how: bool) -> list[int]:
        if "frob" in text:
            raise BadRequest("The text cannot be taken.")
        return tokenize(tokenizer, text, **how)

    monkeypatch.setattr(FakeTokenizer, "tokenize", refuse)
    error = error_of(service.http.post(path, json={"model": "medium", **body}), 400)
    assert field in (error.get("param"), error["message"].partition(":")[0])


def test_a_text_becomes_tokens_and_the_same_text_again(service: Service) -> None:
    text = "Grüße, 世界! 🎉"
    body = post(service, "/tokenize", model="medium", content=text)
    assert body == {"tokens": list(text.encode())}
    assert post(service, "/detokenize", model="medium", **body) == {"content": text}
    assert post(service, "/tokenize", content="") == {"tokens": []}
    assert post(service, "/detokenize", tokens=[]) == {"content": ""}


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({}, [256, 97]),
        ({"parse_special": None}, [256, 97]),
        ({"parse_special": True}, [256, 97]),
        ({"parse_special": False}, [*b"<|end|>a"]),
    ],
)
def test_control_tokens_are_obeyed_unless_that_is_turned_off(
    service: Service, fields: dict[str, Any], tokens: list[int]
) -> None:
    assert post(service, "/tokenize", content="<|end|>a", **fields) == {"tokens": tokens}


def test_pieces_are_text_or_the_bytes_of_half_a_character(service: Service) -> None:
    body = post(service, "/tokenize", content="aé<|end|>", with_pieces=True)
    assert body == {
        "tokens": [
            {"id": 97, "piece": "a"},
            {"id": 0xC3, "piece": [0xC3]},
            {"id": 0xA9, "piece": [0xA9]},
            {"id": 256, "piece": "<|end|>"},
        ]
    }


def test_tokens_of_half_a_character_and_control_tokens_have_a_text_too(service: Service) -> None:
    assert post(service, "/detokenize", tokens=[97, 0xC3, 256]) == {"content": "a\ufffd<|end|>"}


def test_a_template_is_applied_without_loading_the_model() -> None:
    with serving(settings(light=fake())) as service:
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        ]
        body = post(service, "/apply-template", messages=messages, chat_template_kwargs={"x": 1})
        prompt = "<|system|>Be brief.<|end|><|user|>Hi<|end|><|assistant|>"
        assert body == {"prompt": prompt}
        assert service.manager.tiers["light"].state == "stopped"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "content"),
        ("/tokenize", {"content": 5}, "content"),
        ("/tokenize", {"content": ["a"]}, "content"),
        ("/tokenize", {"content": "\ud800"}, "content"),
        ("/tokenize", {"content": "x" * ((1 << 20) + 1)}, "content"),
        ("/tokenize", {"content": "a", "with_pieces": 7}, "with_pieces"),
        ("/tokenize", {"content": "a", "parse_special": "maybe"}, "parse_special"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
        ("/detokenize", {"tokens": [1, True]}, "tokens[1]"),
        ("/detokenize", {"tokens": [1, -1]}, "tokens[1]"),
        ("/detokenize", {"tokens": [1, 100_000]}, "tokens"),
        ("/detokenize", {"tokens": [2**40]}, "tokens[0]"),
        ("/detokenize", {"tokens": [1] * ((1 << 20) + 1)}, "tokens"),
        ("/apply-template", {}, "messages"),
        ("/apply-template", {"messages": []}, "messages"),
        ("/apply-template", {"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
        ("/apply-template",
         {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
         "messages[0].content[0].type"),
        ("/apply-template",
         {"messages": [{"role": "user"}], "chat_template_kwargs": {"messages": 1}},
         "chat_template_kwargs.messages"),
        ("/tokenize", {"content": "a", "model": "embedding"}, "model"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_what_makes_no_sense_is_a_400_that_names_the_field(
    service: Service, path: str, body: dict[str, Any], param: str
) -> None:
    headers = {"Content-Type": "application/json"}
    response = service.http.post(path, content=json.dumps(body), headers=headers)
    assert error_of(response, 400)["param"] == param


def test_the_model_may_be_left_out_where_only_one_tier_generates_text() -> None:
    both = settings(light=fake(), heavy=fake())
    routes: dict[str, dict[str, Any]] = {
        "/tokenize": {"content": "a"},
        "/detokenize": {"tokens": [97]},
        "/apply-template": {"messages": [{"role": "user", "content": "a"}]},
    }
    with serving(both) as service:
        for path, body in routes.items():
            for unnamed in (body, body | {"model": None}):
                error = error_of(service.http.post(path, json=unnamed), 400)
                assert error["param"] == "model"
                assert "light, heavy" in error["message"]
            post(service, path, model="heavy", **body)
            unknown = service.http.post(path, json=body | {"model": "nope"})
            assert error_of(unknown, 404)["code"] == "model_not_found"


def test_fields_that_nobody_knows_are_named_in_a_header(service: Service) -> None:
    for path, body in (
        ("/tokenize", {"content": "a"}),
        ("/detokenize", {"tokens": [97]}),
        ("/apply-template", {"messages": [{"role": "user", "content": "a"}]}),
    ):
        response = service.http.post(path, json=body | {"frob": 1})
        assert response.headers["x-ignored-params"] == "frob"


def test_a_model_that_cannot_be_loaded_is_a_500_and_then_a_503(tmp_path: Any) -> None:
    with serving(settings(light=fake(script(tmp_path, fault="load")))) as service:
        response = service.http.post("/tokenize", json={"content": "a"})
        assert error_of(response, 500)["code"] == "model_load_failed"
        response = service.http.post("/detokenize", json={"tokens": [97]})
        assert error_of(response, 503)["code"] == "model_unavailable"
        assert int(response.headers["retry-after"]) >= 1


def test_tokens_come_while_a_long_answer_runs_and_another_waits(tmp_path: Any) -> None:
    path = script(tmp_path, {"match": "long", "answer": "x" * 5000}, step_ms=1)
    with (
        serving(settings(light=fake(path, n_parallel=1))) as service,
        ThreadPoolExecutor(2) as pool,
    ):
        tier = service.manager.tiers["light"]
        answers = [pool.submit(service.chat, "long", max_tokens=400) for _ in range(2)]
        wait_until(lambda: tier._running and tier._waiting)
        assert post(service, "/tokenize", content="Hi") == {"tokens": [72, 105]}
        assert not any(answer.done() for answer in answers)
        for answer in answers:
            assert answer.result().status_code == 200


def test_a_client_that_leaves_before_the_model_is_loaded_is_forgotten(tmp_path: Any) -> None:
    with serving(settings(light=fake(script(tmp_path, load_s=1.0)))) as service:
        with pytest.raises(httpx.ReadTimeout):
            service.http.post("/tokenize", json={"content": "a"}, timeout=0.2)
        tier = service.manager.tiers["light"]
        wait_until(lambda: not tier._conversions and not tier._n_leases)
        assert post(service, "/tokenize", content="Hi") == {"tokens": [72, 105]}
