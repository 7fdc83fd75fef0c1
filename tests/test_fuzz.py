"""Bodies that nobody would send, against the whole service: each is answered or refused, nothing
breaks, and nothing is left behind."""

import json
import math
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.client import launch_process
from settings import TierSettings
from tests.engines import needs_mlx
from tests.serving import Service, fake, in_threads, named_events, script, serving, wait_until
from tests.serving import settings as service_settings

ODD: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.sampled_from([2**31, 2**63, 2**64, -(2**63), 10**400, 0.5, -0.0, 1e308, math.nan, math.inf]),
    st.text(max_size=8),
    st.sampled_from(["\ud800", "\0", "<|end|>", "light", "auto", "a" * 3000]),
    st.lists(st.integers(-1, 300), max_size=4),
    st.lists(st.text(max_size=3), max_size=3),
    st.dictionaries(st.text(max_size=5), st.integers(-200, 200), max_size=3),
)
PART = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image_url", "x"])}, optional={"text": st.text(max_size=9)}
)
MESSAGE = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "assistant", "system", "developer", "tool", "robot"]),
        "content": st.one_of(st.text(max_size=30), st.lists(PART, max_size=3), st.none(), ODD),
    },
    optional={"name": ODD, "tool_calls": ODD, "tool_call_id": ODD, "reasoning_content": ODD},
)
SCHEMA = st.sampled_from(
    [{"type": "object"}, {"enum": ["a", "b"]}, {"not": {}}, {"type": "frob"}, {"minProperties": 1}]
)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "max_tokens": st.integers(0, 4),
    "max_completion_tokens": st.integers(0, 4),
    "temperature": st.floats(-0.5, 2.5),
    "top_p": st.floats(-0.1, 1.1),
    "top_k": st.integers(-2, 50),
    "min_p": st.floats(-0.1, 1.1),
    "repeat_penalty": st.floats(-0.1, 3),
    "frequency_penalty": st.floats(-3, 3),
    "presence_penalty": st.floats(-3, 3),
    "typical_p": st.floats(-0.1, 1.1),
    "repeat_last_n": st.integers(-2, 99),
    "min_tokens": st.integers(-1, 9),
    "ignore_eos": st.booleans(),
    "seed": st.integers(-(2**64), 2**65),
    "stop": st.one_of(st.text(max_size=3), st.lists(st.text(max_size=3), max_size=3)),
    "n": st.integers(0, 5),
    "best_of": st.integers(0, 5),
    "logprobs": st.one_of(st.booleans(), st.integers(0, 6)),
    "top_logprobs": st.integers(0, 21),
    "logit_bias": st.dictionaries(
        st.sampled_from(["0", "65", "263", "264", "-1", "x"]), st.floats(-101, 101)
    ),
    "stream": st.booleans(),
    "stream_options": st.dictionaries(st.sampled_from(["include_usage", "x"]), st.booleans()),
    "response_format": st.one_of(
        st.fixed_dictionaries({"type": st.sampled_from(["text", "json_object", "json_schema"])}),
        st.builds(lambda s: {"type": "json_object", "schema": s}, SCHEMA),
        st.builds(lambda s: {"type": "json_schema", "json_schema": {"schema": s}}, SCHEMA),
    ),
    "grammar": st.sampled_from(['root ::= "a" | "b"', "start: /[ab]+/", "nonsense", ""]),
    "chat_template_kwargs": st.dictionaries(st.sampled_from(["a", "messages", "tools"]), ODD),
    "tools": st.lists(
        st.builds(
            lambda name, schema, strict: {
                "type": "function",
                "function": {"name": name, "parameters": schema, "strict": strict},
            },
            st.sampled_from(["f", "get_weather", "é.b-c", "", "a b"]),
            SCHEMA,
            st.booleans(),
        ),
        max_size=3,
    ),
    "tool_choice": st.sampled_from(
        ["none", "auto", "required", {"type": "function", "function": {"name": "f"}},
         {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}]
    ),
    "parallel_tool_calls": st.booleans(),
    "reasoning_effort": st.sampled_from(["none", "low", "high", "much"]),
    "thinking_budget_tokens": st.integers(-1, 5),
    "continue_final_message": st.booleans(),
    "add_generation_prompt": st.booleans(),
    "truncate": st.sampled_from(["middle", "end", None]),
    "timings": st.booleans(),
    "user": ODD,
    "xtc_probability": st.floats(-0.1, 1.1),
    "xtc_threshold": st.floats(-0.1, 1.1),
    "mirostat": st.integers(-1, 3),
    "dry_multiplier": st.floats(-0.1, 3),
    "dry_sequence_breakers": st.lists(st.text(max_size=3), max_size=3),
    "echo": st.booleans(),
    "suffix": st.text(max_size=5),
    "store": ODD,
    "metadata": ODD,
    "priority": st.integers(-101, 101),
    "service_tier": st.sampled_from(["auto", "default", "flex", "priority", "scale"]),
    "frob": ODD,
}  # fmt: skip
GOOD_MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "system", "assistant"]), "content": st.text(max_size=30)}
)


@st.composite
def bodies(draw: st.DrawFn) -> dict[str, Any]:
    """Mostly right, with a few fields of any kind: all odd ones would only test the first check."""
    is_odd = draw(st.integers(0, 3)) == 0
    body = {
        "model": draw(ODD) if is_odd and draw(st.booleans()) else "light",
        "messages": draw(st.lists(MESSAGE if is_odd else GOOD_MESSAGE, min_size=1, max_size=4)),
        "prompt": draw(
            st.one_of(st.text(min_size=1), st.lists(st.integers(0, 255), min_size=1), ODD)
            if is_odd
            else st.text(min_size=1, max_size=30)
        ),
    }
    for name in draw(st.lists(st.sampled_from(sorted(FIELDS)), max_size=4, unique=True)):
        body[name] = draw(st.one_of(FIELDS[name], ODD) if is_odd else FIELDS[name])
    return body


BACKENDS = [
    "fake",
    pytest.param("tiny", marks=pytest.mark.real),
    pytest.param(
        "tiny_mlx",
        marks=[
            pytest.mark.real,
            needs_mlx,
            pytest.mark.skipif(settings().max_examples <= 100, reason="long: the profile deep"),
        ],
    ),
]


@pytest.fixture(scope="module", params=BACKENDS)
def service(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("fuzz")
    if request.param == "fake":
        tier = fake(script(folder), n_ctx=512, max_tokens=4)
        launch = in_threads
    else:
        path = str(request.getfixturevalue(request.param))
        tier = TierSettings(model_path=path, n_ctx=512, max_tokens=4)
        launch = launch_process  # that it lives at the end is what the test is about
    with serving(service_settings(light=tier), launch=launch) as service:
        yield service


N_BODIES = 3 * settings().max_examples  # 300, or 10,000 with --hypothesis-profile=deep
ANY_NUMBER = settings(
    max_examples=N_BODIES,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@ANY_NUMBER
@given(body=bodies(), path=st.sampled_from(["/v1/chat/completions", "/v1/completions"]))
def test_any_body_is_answered_or_refused(service: Service, body: Any, path: str) -> None:
    content = json.dumps(body)
    reply = service.http.post(path, content=content, headers={"Content-Type": "application/json"})
    check(reply)
    if reply.status_code != 200:
        assert reply.json()["error"]["type"] == "invalid_request_error"
    elif not reply.headers["content-type"].startswith("text/event-stream"):
        assert reply.json()["choices"]


KIND = st.sampled_from(["input_text", "output_text", "reasoning_text", "text", "image", "x"])
PIECES = st.lists(st.fixed_dictionaries({"type": KIND}, optional={"text": ODD}), max_size=3)
TEXT = st.one_of(st.text(max_size=9), PIECES, ODD)
ITEM = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(
            ["message", "reasoning", "function_call", "function_call_output", "item_reference",
             "thinking", "tool_use", "tool_result", "text"]
        ),
        "role": st.sampled_from(["user", "assistant", "developer", "robot"]),
        "content": TEXT, "summary": PIECES, "output": TEXT, "thinking": ODD, "text": ODD,
        "call_id": st.just("1"), "tool_use_id": st.just("1"), "id": ODD, "name": ODD,
        "arguments": st.sampled_from(["{}", "[", "5", '{"a": 1}']), "input": ODD, "is_error": ODD,
    },
)  # fmt: skip
SCHEMAS = st.one_of(SCHEMA, ODD)
TOOL = st.fixed_dictionaries(
    {"type": st.sampled_from(["function", "custom", "web_search"]), "name": st.sampled_from("fg")},
    optional={"parameters": SCHEMAS, "input_schema": SCHEMAS, "strict": ODD, "description": ODD},
)
CHOICE = st.fixed_dictionaries(
    {"type": st.sampled_from(["auto", "any", "tool", "function", "allowed_tools", "mcp"])},
    optional={"name": st.sampled_from("fg"), "mode": st.just("auto"), "tools": ODD},
)
OTHER_FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "instructions": TEXT, "system": TEXT, "max_output_tokens": st.integers(0, 4),
    "temperature": st.floats(-0.5, 2.5), "top_logprobs": st.integers(0, 21), "stream": ODD,
    "include": st.lists(st.sampled_from(["message.output_text.logprobs", "x"]), max_size=2),
    "tools": st.lists(TOOL, max_size=2), "tool_choice": st.one_of(CHOICE, ODD),
    "text": st.fixed_dictionaries({"format": st.one_of(ODD, st.fixed_dictionaries(
        {"type": st.just("json_schema"), "name": st.just("x"), "schema": SCHEMAS}))}),
    "output_config": st.fixed_dictionaries({}, optional={"effort": ODD, "format":
        st.fixed_dictionaries({"type": st.just("json_schema"), "schema": SCHEMAS})}),
    "reasoning": st.fixed_dictionaries({"effort": st.sampled_from(["none", "high", "max", "x"])}),
    "thinking": st.fixed_dictionaries(
        {"type": st.sampled_from(["enabled", "disabled", "adaptive"])},
        optional={"budget_tokens": st.integers(-1, 9)}),
    "stop_sequences": TEXT, "store": st.booleans(), "metadata": ODD, "user": ODD, "frob": ODD,
    "parallel_tool_calls": ODD, "service_tier": ODD, "truncation": ODD, "top_k": ODD,
}  # fmt: skip


@st.composite
def other_bodies(draw: st.DrawFn) -> dict[str, Any]:
    """Of the endpoints that translate their fields into a chat's."""
    message = st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant"]),
         "content": st.one_of(st.text(max_size=30), st.lists(ITEM, max_size=3))}
    )  # fmt: skip
    body = {
        "model": "light",
        "max_tokens": draw(st.integers(0, 4)),
        "input": draw(st.one_of(st.text(max_size=30), st.lists(ITEM, max_size=4))),
        "messages": draw(st.lists(message, min_size=1, max_size=3)),
    }
    for name in draw(st.lists(st.sampled_from(sorted(OTHER_FIELDS)), max_size=4, unique=True)):
        body[name] = draw(OTHER_FIELDS[name])
    return body


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages", "/v1/messages/count_tokens"])
@ANY_NUMBER
@given(body=other_bodies())
def test_any_body_of_another_form_is_answered_or_refused(
    service: Service, body: Any, path: str
) -> None:
    content = json.dumps(body)
    reply = service.http.post(path, content=content, headers={"Content-Type": "application/json"})
    check(reply)
    if reply.status_code != 200:
        assert reply.json()["error"]["type"] == "invalid_request_error"


def check(reply: httpx.Response) -> None:
    """Answered or refused, and a stream has come to its end."""
    assert reply.status_code in (200, 400, 404), reply.text
    if reply.status_code != 200:
        assert reply.json()["error"]["message"]
    elif reply.text.startswith("event: "):
        last = named_events(reply)[-1]["type"]
        assert last in ("message_stop", "response.completed", "response.incomplete")
    elif reply.headers["content-type"].startswith("text/event-stream"):
        assert reply.text.endswith("data: [DONE]\n\n")
        assert '"error"' not in reply.text


def test_what_the_openapi_document_allows_is_answered_or_refused(service: Service) -> None:
    document = service.http.get("/openapi.json").json()
    schema = schemathesis.openapi.from_dict(document)
    paths = [path for path, methods in document["paths"].items() if "post" in methods]
    operations = [schema[path]["POST"].as_strategy() for path in paths]

    @settings(ANY_NUMBER, max_examples=N_BODIES // 3)
    @given(case=st.one_of(operations))
    def any_case(case: schemathesis.Case) -> None:
        body = case.body
        if isinstance(body, dict):
            body = body | {"model": "light"}
        reply = service.http.post(case.path, content=json.dumps(body, default=str))
        check(reply)

    any_case()


def test_nothing_is_left_behind(service: Service) -> None:
    tier = service.manager.tiers["light"]
    wait_until(lambda: not tier._running and not tier._waiting and not tier._n_leases)
    assert service.chat().status_code == 200
    assert tier.life.status() == ("ready", None)
