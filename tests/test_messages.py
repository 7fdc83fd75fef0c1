"""POST /v1/messages and /v1/messages/count_tokens over HTTP, on the fake backend."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic.types
import httpx
import pydantic
import pytest

from api.errors import envelope
from api.messages_request import MessagesRequest
from api.transcript import packed_thoughts
from errors import (
    InternalError,
    ModelLoadFailed,
    QueueFull,
    RequestTimeout,
    ServiceError,
    TierUnavailable,
    UnsupportedParameter,
)
from tests.serving import (
    THINKING_TEMPLATE,
    Service,
    fake,
    named_events,
    script,
    serving,
    settings,
)

EVENT: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(anthropic.types.RawMessageStreamEvent)
WEATHER = {
    "name": "get_weather",
    "description": "Of a city",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
SEARCH = {"type": "web_search_20250305", "name": "web_search"}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
RULES = (
    {"match": "weather", "answer": f"<think>\nHm.\n</think>\n\nLet me look.\n{CALL}"},
    {"match": "think", "answer": "<think>\nWell.\n</think>\n\nDone."},
    {"match": "counting", "answer": "one two three four"},
    {"match": "break", "answer": "half of it", "fault": "step", "after": 4},
    {"match": "as json", "answer": '{"city": "Paris"}'},
    {
        "match": "odd",
        "answer": '<tool_call>\n{"name": "get_weather", "arguments": '
        '{"n": 1e999, "of": 12345678901234567890123}}\n</tool_call>',
    },
)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("messages")
    tiers = {
        "light": fake(script(folder, *RULES, template=THINKING_TEMPLATE)),
        "heavy": fake(script(folder, *RULES), n_ctx=512),  # does not think
    }
    with serving(settings({"max_body_bytes": 50_000}, **tiers)) as service:
        yield service


def body_of(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


def text_of(response: httpx.Response) -> str:
    (text,) = [block["text"] for block in body_of(response)["content"] if block["type"] == "text"]
    assert isinstance(text, str)
    return text


def error_of(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert body.keys() == {"type", "error", "request_id"}
    assert body["type"] == "error"
    assert body["request_id"] == response.headers["request-id"]
    error: dict[str, Any] = body["error"]
    assert error.keys() == {"type", "message"}
    return error


def test_a_message_has_anthropics_shape(service: Service) -> None:
    body = body_of(service.message("Grüße"))
    assert body.pop("id").startswith("msg_")
    assert body == {
        "type": "message",
        "role": "assistant",
        "model": "light",
        "content": [{"type": "text", "text": "You said: Grüße"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": len("Grüße".encode()) + 3,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": len("You said: Grüße".encode()) + 1,
            "output_tokens_details": {"thinking_tokens": 0},
        },
    }


def test_what_was_computed_before_is_no_input(service: Service) -> None:
    first = body_of(service.message("a question of many words"))["usage"]
    again = body_of(service.message("a question of many words"))["usage"]
    n_prompt = first["input_tokens"] + first["cache_read_input_tokens"]
    assert again["cache_read_input_tokens"] == n_prompt - 1
    assert again["input_tokens"] == 1


def test_thoughts_text_and_calls_are_blocks_in_their_order(service: Service) -> None:
    body = body_of(service.message("weather", tools=[WEATHER]))
    assert body["content"][2].pop("id").startswith("toolu_")
    assert body["content"] == [
        {"type": "thinking", "thinking": "Hm.", "signature": packed_thoughts("")},
        {"type": "text", "text": "Let me look."},
        {"type": "tool_use", "name": "get_weather", "input": {"city": "Paris"}},
    ]
    assert body["stop_reason"] == "tool_use"
    assert body["usage"]["output_tokens_details"]["thinking_tokens"] > 3


def test_a_stream_tells_how_the_message_grows(service: Service) -> None:
    whole = body_of(service.message("weather", tools=[WEATHER]))
    told = named_events(service.message("weather", tools=[WEATHER], stream=True))
    for data in told:
        EVENT.validate_python(data)
    assert list(dict.fromkeys(data["type"] for data in told)) == [
        "message_start", "content_block_start", "content_block_delta", "content_block_stop",
        "message_delta", "message_stop",
    ]  # fmt: skip
    begun = told[0]["message"]
    assert (begun["content"], begun["stop_reason"]) == ([], None)
    assert begun["usage"]["output_tokens"] == 0
    for index, block in enumerate(whole["content"]):
        start, *deltas, stop = [data for data in told if data.get("index") == index]
        assert (start["type"], stop["type"]) == ("content_block_start", "content_block_stop")
        kind, field = {
            "thinking": ("thinking_delta", "thinking"),
            "text": ("text_delta", "text"),
            "tool_use": ("input_json_delta", "partial_json"),
        }[block["type"]]
        assert start["content_block"]["type"] == block["type"]
        assert not start["content_block"].get(field)
        if block["type"] == "thinking":
            signed = deltas.pop()["delta"]
            assert signed == {"type": "signature_delta", "signature": block["signature"]}
        assert {data["delta"]["type"] for data in deltas} == {kind}
        said = "".join(data["delta"][field] for data in deltas)
        assert (json.loads(said) if "input" in block else said) == block.get(
            "input", block.get(field)
        )
    assert told[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert told[-2]["usage"]["output_tokens"] == whole["usage"]["output_tokens"]


@pytest.mark.parametrize(
    ("fields", "text", "reason", "stop"),
    [
        ({}, "one two three four", "end_turn", None),
        ({"max_tokens": 5}, "one t", "max_tokens", None),
        ({"stop_sequences": ["zzz", " three"]}, "one two", "stop_sequence", " three"),
        ({"stop_sequences": ["two three", "o t"]}, "one tw", "stop_sequence", "o t"),
        ({"stop_sequences": ["zzz"]}, "one two three four", "end_turn", None),
        ({"max_tokens": 6, "stop_sequences": ["two thr"]}, "one tw", "max_tokens", None),
    ],
)
def test_a_message_says_why_it_ended(
    service: Service, fields: dict[str, Any], text: str, reason: str, stop: str | None
) -> None:
    body = body_of(service.message("counting", **fields))
    assert "".join(block["text"] for block in body["content"]) == text
    assert (body["stop_reason"], body["stop_sequence"]) == (reason, stop)
    *_, delta, _ = named_events(service.message("counting", stream=True, **fields))
    assert delta["delta"] == {"stop_reason": reason, "stop_sequence": stop}


@pytest.mark.parametrize("stop", ["Paris", "}", "\n", "<"])
def test_a_stop_sequence_cuts_no_call(service: Service, stop: str) -> None:
    fields = {"tools": [WEATHER], "stop_sequences": [stop]}
    body = body_of(service.message("weather", **fields))
    _, text, call = body["content"]
    assert (text["text"], call["input"]) == ("Let me look.", {"city": "Paris"})
    assert (body["stop_reason"], body["stop_sequence"]) == ("tool_use", None)
    told = named_events(service.message("weather", stream=True, **fields))
    said = "".join(data["delta"].get("partial_json", "") for data in told if "index" in data
                   and "delta" in data)  # fmt: skip
    assert json.loads(said) == {"city": "Paris"}
    assert told[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}


def test_a_call_that_is_cut_has_no_input(service: Service) -> None:
    fields = {"tools": [WEATHER], "tool_choice": {"type": "any"}, "max_tokens": 60}
    body = body_of(service.message("Hi", thinking={"type": "disabled"}, **fields))
    (call,) = body["content"]
    assert (call["type"], call["input"], body["stop_reason"]) == ("tool_use", {}, "max_tokens")


def test_a_limit_of_zero_computes_the_prompt_and_says_nothing(service: Service) -> None:
    body = body_of(service.message("Hi", max_tokens=0))
    assert (body["content"], body["stop_reason"]) == ([], "max_tokens")


def test_the_assistants_last_message_is_continued(service: Service) -> None:
    begun = {"role": "assistant", "content": "You said: oh, "}
    usage = body_of(service.message("Hi", begun))["usage"]
    n_in = usage["input_tokens"] + usage["cache_read_input_tokens"]
    assert n_in == len("Hi" + begun["content"]) + 3


def test_a_stream_that_breaks_ends_with_an_error_event(service: Service) -> None:
    *told, last = named_events(service.message("break", stream=True))
    text = "".join(d["delta"]["text"] for d in told if d["type"] == "content_block_delta")
    assert text == "half"
    assert (last["type"], last["error"]["type"]) == ("error", "api_error")
    assert last["request_id"].startswith("req-")
    assert "message_stop" not in [data["type"] for data in told]


# thinking and form


def thoughts(response: httpx.Response) -> list[str]:
    return [b["thinking"] for b in body_of(response)["content"] if b["type"] == "thinking"]


def test_thoughts_take_no_more_than_their_budget(service: Service) -> None:
    enabled = {"type": "enabled", "budget_tokens": 2}
    assert thoughts(service.message("think", thinking=enabled)) == ["W"]
    assert thoughts(service.message("think", thinking={"type": "adaptive"})) == ["Well."]
    assert thoughts(service.message("Hi", thinking={"type": "disabled"})) == []


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_that_does_not_think_leaves_thinking_out_and_says_so(
    service: Service, stream: bool
) -> None:
    enabled = {"type": "enabled", "budget_tokens": 1024}
    for effort in ({}, {"output_config": {"effort": "high"}}):
        fields = {"model": "heavy", "thinking": enabled, "stream": stream, **effort}
        response = service.message("Hi", **fields, frob=1)
        assert response.status_code == 200
        asked = "output_config.effort" if effort else "thinking"
        named = [asked, "thinking.budget_tokens", "frob"]
        assert response.headers["x-ignored-params"].split(",") == named
    for kind in ("disabled", "adaptive"):
        response = service.message("Hi", model="heavy", thinking={"type": kind})
        assert text_of(response)
        assert "x-ignored-params" not in response.headers
    response = service.message("think", thinking=enabled)
    assert "x-ignored-params" not in response.headers


def test_where_all_must_be_known_a_model_that_does_not_think_is_not_asked_to(
    tmp_path: Path,
) -> None:
    enabled = {"type": "enabled", "budget_tokens": 1024}
    tiers = {"heavy": fake(script(tmp_path, *RULES))}
    with serving(settings({"strict_params": True}, **tiers)) as strict:
        error = error_of(strict.message("Hi", model="heavy", thinking=enabled))
        assert error["message"] == "thinking.budget_tokens: This model does not think."
        effort = {"output_config": {"effort": "high"}}
        response = strict.message("Hi", model="heavy", **effort)
        assert response.headers["x-ignored-params"] == "output_config.effort"


def test_thoughts_may_be_left_out(service: Service) -> None:
    hidden = {"type": "adaptive", "display": "omitted"}
    assert thoughts(service.message("think", thinking=hidden)) == [""]
    told = named_events(service.message("think", thinking=hidden, stream=True))
    kinds = [
        event["delta"]["type"] for event in told if "delta" in event and "type" in event["delta"]
    ]
    assert "text_delta" in kinds
    assert "thinking_delta" not in kinds


@pytest.mark.parametrize("display", ["omitted", None])
def test_thoughts_come_back_to_the_model_whether_they_were_shown_or_not(
    service: Service, display: str | None
) -> None:
    asked = {"type": "adaptive"} | ({"display": display} if display else {})
    body = body_of(service.message("think", thinking=asked))
    assert bool(body["content"][0]["thinking"]) == (display is None)
    assert body["content"][0]["signature"]
    request = chat(
        {"role": "user", "content": "think"}, {"role": "assistant", "content": body["content"]},
        {"role": "user", "content": "Go on."},
    )  # fmt: skip
    assert request["messages"][1]["reasoning_content"] == "Well."
    others = [{"type": "thinking", "thinking": "", "signature": "EqQBCgIYAhIM"}, text("Hi")]
    past = chat({"role": "user", "content": "Hi"}, {"role": "assistant", "content": others})
    assert past["messages"][1] == {"role": "assistant", "reasoning_content": "", "content": "Hi"}


@pytest.mark.parametrize("stream", [False, True])
def test_an_effort_is_a_hint_where_no_thoughts_are_asked_for(
    service: Service, stream: bool
) -> None:
    fields = {"output_config": {"effort": "high"}, "model": "heavy", "stream": stream, "frob": 1}
    for thinking in ({}, {"thinking": {"type": "adaptive"}}):
        response = service.message("Hi", **fields, **thinking)
        assert response.status_code == 200
        assert response.headers["x-ignored-params"] == "output_config.effort,frob"
    body = {"model": "heavy", "messages": [{"role": "user", "content": "Hi"}]}
    body["output_config"] = {"effort": "low"}
    counted = service.http.post("/v1/messages/count_tokens", json=body)
    assert counted.status_code == 200
    assert counted.headers["x-ignored-params"] == "output_config.effort"
    response = service.message("think", output_config={"effort": "high"})
    assert "x-ignored-params" not in response.headers


def test_a_text_has_the_form_that_is_asked_for(service: Service) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    wanted = {"type": "json_schema", "schema": schema}
    for fields in ({"output_config": {"format": wanted}}, {"output_format": wanted}):
        response = service.message("as json", **fields)
        assert json.loads(text_of(response)) == {"city": "Paris"}
        assert body_of(response)["schema_valid"] is True
        assert "x-ignored-params" not in response.headers


# what a chat's messages come to be


def chat(*messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    body = {"model": "light", "max_tokens": 9, "messages": list(messages)} | fields
    request = MessagesRequest.model_validate(body).chat()
    return request.model_dump(exclude_unset=True)


def text(content: str) -> dict[str, Any]:
    return {"type": "text", "text": content, "cache_control": {"type": "ephemeral"}}


def test_the_line_that_differs_in_each_request_is_left_out() -> None:
    billing = text("x-anthropic-billing-header: cc_version=2.1; cch=0a1b2;")
    request = chat({"role": "user", "content": "Hi"}, system=[billing, text("Be brief.")])
    assert request["messages"][0] == {"role": "system", "content": "Be brief."}
    request = chat({"role": "user", "content": "Hi"}, system=[billing])
    assert request["messages"] == [{"role": "user", "content": "Hi"}]
    with pytest.raises(UnsupportedParameter) as caught:
        chat({"role": "user", "content": "Hi"}, system=[billing, {"type": "image"}])
    assert caught.value.param == "system[1].type"


def test_a_conversation_comes_back_as_it_was() -> None:
    def use(call_id: str, city: str) -> dict[str, Any]:
        return {"type": "tool_use", "id": call_id, "name": "get_weather", "input": {"city": city}}

    def call(call_id: str, city: str) -> dict[str, Any]:
        return {"id": call_id, "function": {"name": "get_weather", "arguments": {"city": city}}}

    def result(call_id: str, content: Any, **fields: Any) -> dict[str, Any]:
        return {"type": "tool_result", "tool_use_id": call_id, "content": content, **fields}

    thinking = {"type": "thinking", "thinking": "Hm.", "signature": ""}
    request = chat(
        {"role": "user", "content": [text("Weather"), text("?")]},
        {"role": "user", "content": "Please."},
        {"role": "assistant",
         "content": [thinking, text("Let me look."), use("1", "Paris"), use("2", "Rome")]},
        {"role": "user", "content": [
            result("1", "12C"), result("2", [text("No such"), text("city")], is_error=True),
            text("Well?")]},
        system=[text("Be "), text("brief.")],
    )  # fmt: skip
    assert request["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather?\n\nPlease."},
        {
            "role": "assistant",
            "reasoning_content": "Hm.",
            "content": "Let me look.",
            "tool_calls": [call("1", "Paris"), call("2", "Rome")],
        },
        {"role": "tool", "tool_call_id": "1", "content": "12C"},
        {"role": "tool", "tool_call_id": "2", "content": "Error: No such\ncity"},
        {"role": "user", "content": "Well?"},
    ]
    assert request["continue_final_message"] is False


HI = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    ("choice", "expected", "is_parallel"),
    [
        ({"type": "auto"}, "auto", True),
        ({"type": "any", "disable_parallel_tool_use": True}, "required", False),
        ({"type": "none"}, "none", True),
        ({"type": "tool", "name": "f"}, {"type": "function", "function": {"name": "f"}}, True),
    ],
)
def test_a_choice_of_tools_is_that_of_a_chat(
    choice: dict[str, Any], expected: Any, is_parallel: bool
) -> None:
    request = chat(HI, tools=[WEATHER], tool_choice=choice)
    assert (request["tool_choice"], request["parallel_tool_calls"]) == (expected, is_parallel)
    assert request["tools"][0]["function"]["parameters"] == WEATHER["input_schema"]


@pytest.mark.parametrize(
    ("fields", "effort", "budget"),
    [
        ({}, None, None),
        ({"thinking": {"type": "disabled"}}, "none", None),
        ({"thinking": {"type": "adaptive"}}, None, None),
        ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, "medium", 2000),
        ({"output_config": {"effort": "max"}}, "max", None),
        ({"thinking": {"type": "enabled", "budget_tokens": 9}, "output_config": {"effort": "low"}},
         "low", 9),
    ],
)  # fmt: skip
def test_thinking_is_an_effort_and_a_budget(
    fields: dict[str, Any], effort: str | None, budget: int | None
) -> None:
    request = chat(HI, **fields)
    told = (request.get("reasoning_effort"), request.get("thinking_budget_tokens"))
    assert told == (effort, budget)


# counting


def test_tokens_are_counted_as_a_message_would_count_them(service: Service) -> None:
    body = {"model": "light", "messages": [HI], "system": "Be brief.", "tools": [WEATHER]}
    n_counted = body_of(service.http.post("/v1/messages/count_tokens", json=body))
    usage = body_of(service.http.post("/v1/messages", json=body | {"max_tokens": 1}))["usage"]
    assert n_counted == {"input_tokens": usage["input_tokens"] + usage["cache_read_input_tokens"]}


def test_no_more_is_counted_than_holds_up_nobody(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.messages.MAX_LENGTH", 1000)
    body = {"model": "light", "messages": [{"role": "user", "content": "a" * 1000}]}
    error = error_of(service.http.post("/v1/messages/count_tokens", json=body))
    assert error["message"] == "messages: There may be 1,000 characters in all."


def test_what_cannot_be_read_cannot_be_counted(service: Service) -> None:
    body = {"model": "light", "messages": [{"role": "user", "content": [{"type": "image"}]}]}
    error = error_of(service.http.post("/v1/messages/count_tokens", json=body))
    assert error["message"].startswith("messages[0].content[0].type: ")


# what is not there


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0]"),
        ({"tools": [SEARCH, WEATHER | {"input_schema": {"not": {}}, "strict": True}]},
         "tools[1].input_schema"),
        ({"tools": [SEARCH, WEATHER, WEATHER]}, "tools[2].name"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
        ({"container": "x"}, "container"),
        ({"speed": "fast"}, "speed"),
        ({"thinking": {"type": "between_tools"}}, "thinking.type"),
        ({"thinking": {"type": "adaptive", "display": "full"}}, "thinking.display"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
        ({"temperature": 1.5}, "temperature"),
        ({"top_k": -5}, "top_k"),
        ({"max_tokens": None}, "max_tokens"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
        ({"system": [{"type": "image"}]}, "system[0].type"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"tools": [WEATHER, WEATHER]}, "tools[1].name"),
        ({"tools": [WEATHER | {"name": "a b"}]}, "tools[0].name"),
        ({"tools": [WEATHER | {"input_schema": {"not": {}}, "strict": True}]},
         "tools[0].input_schema"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": {"type": "must"}}, "tool_choice.type"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"not": {}}}}},
         "output_config.format"),
        ({"output_format": {"type": "json_schema", "schema": {"not": {}}}}, "output_format"),
        ({"output_format": {"type": "json_schema", "schema": {}},
          "output_config": {"format": {"type": "json_schema", "schema": {}}}}, "output_format"),
        ({"service_tier": "flex"}, "service_tier"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_refused_by_name(
    service: Service, fields: dict[str, Any], place: str
) -> None:
    error = error_of(service.message("Hi", **fields))
    assert error["type"] == "invalid_request_error"
    assert place in error["message"]
    assert "response_format" not in error["message"]
    assert "function" not in error["message"] or "functions" in error["message"]


def test_tools_that_are_not_there_are_left_out_beside_others_and_named(service: Service) -> None:
    response = service.message("weather", tools=[SEARCH, WEATHER])
    assert body_of(response)["content"][-1]["name"] == "get_weather"
    assert response.headers["x-ignored-params"] == "tools[0]"
    choice = {"type": "tool", "name": "web_search"}
    error = error_of(service.message("Hi", tools=[SEARCH, WEATHER], tool_choice=choice))
    assert error["message"].startswith("tool_choice: There is no function 'web_search'")


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_that_means_nothing_is_named_as_here(service: Service, stream: bool) -> None:
    odd = {"name": "odd", "input_schema": {"properties": {"a": {"type": "float"}}}}
    response = service.message("Hi", tools=[SEARCH, odd, WEATHER], stream=stream)
    assert response.headers["x-ignored-params"] == "tools[1].input_schema,tools[0]"


def test_arguments_are_told_as_they_were_written(service: Service) -> None:
    body = service.message("odd", tools=[WEATHER | {"input_schema": {"type": "object"}}])
    assert '"input":{"n": 1e999, "of": 12345678901234567890123}' in body.text


@pytest.mark.parametrize(
    ("message", "place"),
    [
        ({"role": "user", "content": [text("x"), {"type": "image", "source": {}}]}, "content[1]"),
        ({"role": "user", "content": [{"type": "document", "source": {}}]}, "content[0]"),
    ],
)  # fmt: skip
def test_a_block_that_cannot_be_read_is_refused_by_its_place(
    service: Service, message: dict[str, Any], place: str
) -> None:
    error = error_of(service.message("Hi", message))
    assert error["message"].startswith(f"messages[1].{place}.type: Content of type")
    assert "model 'light' reads text only" in error["message"]


def test_an_image_that_a_tool_found_is_a_note(service: Service) -> None:
    use = {"type": "tool_use", "id": "1", "name": "shoot", "input": {}}
    found = [text("Here."), {"type": "image", "source": {}}]
    result = {"type": "tool_result", "tool_use_id": "1", "content": found}
    turns = [{"role": "assistant", "content": [use]}, {"role": "user", "content": [result]}]
    response = service.message("Go", *turns)
    assert response.status_code == 200
    assert response.headers["x-ignored-params"] == "messages[2].content[0].content[1]"
    told = chat({"role": "user", "content": "Go"}, *turns)["messages"][-1]["content"]
    assert told.startswith("Here.\n[Content of type 'image' is left out")


def test_what_a_model_goes_without_is_named_before_the_many_fields_that_nobody_knows(
    service: Service,
) -> None:
    noise = [{"type": "text", "text": "Hi", "citations": []} for _ in range(60)]
    found = {"type": "tool_result", "tool_use_id": "1", "content": [{"type": ""}]}
    turns = [{"role": "user", "content": noise}, {"role": "user", "content": [found]}]
    response = service.message(*turns, model="heavy", output_config={"effort": "high"})
    named = response.headers["x-ignored-params"].split(",")
    assert named[:2] == ["output_config.effort", "messages[1].content[0].content[0]"]
    assert 20 < len(named) < 60
    assert named[-1].endswith(".citations")


def test_where_all_must_be_known_an_image_is_refused_as_such(tmp_path: Path) -> None:
    image = {"type": "image", "source": {"type": "url", "url": "x"}}
    with serving(settings({"strict_params": True}, light=fake())) as strict:
        error = error_of(strict.message({"role": "user", "content": [image]}))
        assert error["message"].startswith("messages[0].content[0].type: Content of type 'image'")


def test_thoughts_that_nobody_can_read_are_left_out_and_named(service: Service) -> None:
    redacted = {"type": "redacted_thinking", "data": "x"}
    past = {"role": "assistant", "content": [redacted, text("Yes.")]}
    response = service.message("Really?", past, "think")
    assert text_of(response) == "Done."
    assert response.headers["x-ignored-params"] == "messages[1].content[0]"
    assert service.message(
        "Really?", {"role": "assistant", "content": [redacted]}, "think"
    ).is_success
    for system in (None, "Be brief."):
        unread = {"role": "assistant", "content": [redacted]}
        error = error_of(service.message(unread, system=system))
        assert error["message"].startswith("messages: ")
    assert service.message("").is_success, "nothing was said, and could be read"
    error = error_of(service.message("Hi", past, "Hi", tools=[SEARCH]))
    assert error["message"].startswith("tools[0].type: ")


def test_an_unanswered_call_at_the_end_is_refused(service: Service) -> None:
    use = {"type": "tool_use", "id": "1", "name": "f", "input": {}}
    error = error_of(service.message("Hi", {"role": "assistant", "content": [use]}))
    assert error["message"].startswith("messages: ")


def test_values_that_ask_for_nothing_are_fine(service: Service) -> None:
    neutral = {
        "metadata": None, "service_tier": "auto", "tools": [], "stream": False,
        "cache_control": {"type": "ephemeral"}, "mcp_servers": [], "speed": "standard",
        "temperature": None, "stop_sequences": [], "system": "", "thinking": None,
        "tool_choice": None, "output_config": None,
    }  # fmt: skip
    response = service.message("Hi", **neutral)
    assert text_of(response) == "You said: Hi"
    assert "x-ignored-params" not in response.headers


def test_what_is_ignored_is_named_in_a_header(service: Service) -> None:
    fields = {
        "tools": [WEATHER | {"input_examples": []}],
        "context_management": {"edits": []},
        "metadata": {"user_id": "me"},
    }
    for stream in (False, True):
        response = service.message("Hi", stream=stream, **fields)
        assert response.headers["x-ignored-params"] == (
            "metadata,context_management,tools[0].input_examples"
        )


def test_unknown_fields_in_messages_are_named_and_what_a_reply_has_is_not(service: Service) -> None:
    said = body_of(service.message("weather", tools=[WEATHER]))
    assert [block["type"] for block in said["content"]] == ["thinking", "text", "tool_use"]
    for block in said["content"]:  # as the SDK writes them
        block |= {"citations": None, "caller": None, "cache_control": {"type": "ephemeral"}}
    call_id = said["content"][-1]["id"]
    result = {"type": "tool_result", "tool_use_id": call_id, "content": [text("12C")],
              "cache_control": {"type": "ephemeral"}}  # fmt: skip
    past = [
        {"role": "assistant", "content": said["content"]},
        {"role": "user", "content": [result]},
    ]
    system = [text("Be brief.") | {"cache_control": {"type": "ephemeral"}}]
    quiet = service.message("weather", *past, system=system)
    assert quiet.is_success
    assert "x-ignored-params" not in quiet.headers

    odd = {"frob": 1}
    cited = text("Yes.") | {"citations": [{"type": "char_location"}]}
    response = service.message(
        {"role": "user", "content": [cited], **odd},
        past[0],
        {"role": "user", "content": [result | odd | {"content": [text("12C") | odd]}]},
        system=[text("Be brief.") | odd],
    )
    assert response.headers["x-ignored-params"] == (
        "system[0].frob,messages[0].frob,messages[0].content[0].citations,"
        "messages[2].content[0].frob,messages[2].content[0].content[0].frob"
    )


def test_with_strict_params_nothing_is_left_out() -> None:
    redacted = {"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}]}
    with serving(settings({"strict_params": True})) as service:
        for reply, place, kind in (
            (service.message("Hi", tools=[WEATHER, SEARCH]), "tools[1]", SEARCH["type"]),
            (service.message("a", redacted, "b"), "messages[1].content[0]", "redacted_thinking"),
        ):
            message = error_of(reply)["message"]
            assert message.startswith(f"'{place}' is of type '{kind}', which is not supported")
            assert message.endswith("STRICT_PARAMS is on.")


# errors


@pytest.mark.parametrize(
    ("path", "body", "status", "kind"),
    [
        ("/v1/messages", b"{", 400, "invalid_request_error"),
        ("/v1/messages", b"{}", 400, "invalid_request_error"),
        ("/v1/messages", b" " * 60_000, 413, "request_too_large"),
        ("/v1/messages/nothing", b"{}", 404, "not_found_error"),
        ("/v1/messages/count_tokens", b"{}", 400, "invalid_request_error"),
    ],
)
def test_every_error_is_in_anthropics_envelope(
    service: Service, path: str, body: bytes, status: int, kind: str
) -> None:
    headers = {"Content-Type": "application/json"}
    response = service.http.post(path, content=body, headers=headers)
    assert error_of(response, status)["type"] == kind


def test_errors_of_the_model_are_too(service: Service) -> None:
    assert error_of(service.message("Hi", model="gpt-9"), 404)["type"] == "not_found_error"
    assert error_of(service.http.get("/v1/messages"), 405)["type"] == "invalid_request_error"
    too_long = error_of(service.message("x" * 600, model="heavy"))["message"]
    assert too_long.startswith("prompt is too long: 603 tokens > 512 maximum.")  # as agents know it
    assert "N_CTX" in too_long


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (QueueFull("Full.", retry_after_s=3), "rate_limit_error"),
        (TierUnavailable("Later."), "overloaded_error"),
        (RequestTimeout("Too long."), "timeout_error"),
        (ModelLoadFailed("Broken."), "api_error"),
        (InternalError("Oh."), "api_error"),
    ],
)
def test_faults_have_anthropics_types(error: ServiceError, kind: str) -> None:
    scope = {"path": "/v1/messages", "request_id": "req-1"}
    assert envelope(error, scope) == {
        "type": "error",
        "error": {"type": kind, "message": error.message},
        "request_id": "req-1",
    }


def test_a_key_may_come_in_either_header() -> None:
    with serving(settings({"api_keys": ["secret"]})) as service:
        assert error_of(service.message("Hi"), 401)["type"] == "authentication_error"
        for headers in ({"x-api-key": "secret"}, {"Authorization": "Bearer secret"}):
            service.http.headers = httpx.Headers(headers)
            assert text_of(service.message("Hi")) == "You said: Hi"
    with serving() as service:
        error = error_of(service.http.post("/v1/messages", headers={"Host": "evil.example"}), 403)
        assert error["type"] == "permission_error"
