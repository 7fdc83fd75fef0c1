"""POST /v1/responses over HTTP, on the fake backend."""

import contextlib
import json
import re
from collections.abc import Iterator
from typing import Any, get_args

import httpx
import pydantic
import pytest
from openai.types import responses as types

from api.responses import _Reply
from api.responses_request import ResponsesRequest
from errors import QueueFull, ServiceError, TierUnavailable, UnsupportedParameter
from tests.serving import (
    THINKING_TEMPLATE,
    Held,
    Service,
    fake,
    named_events,
    script,
    serving,
    settings,
    wait_until,
)

EVENT: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(types.ResponseStreamEvent)
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "Of a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
RULES = (
    {"match": "sky", "answer": CALL.replace("get_weather", "mcp__sky__get_weather")},
    {"match": "weather", "answer": f"<think>\nHm.\n</think>\n\nLet me look.\n{CALL}"},
    {"match": "think", "answer": "<think>\nWell.\n</think>\n\nDone."},
    {"match": "break", "answer": "half of it", "fault": "step", "after": 4},
    {"match": "fail", "fault": "step"},
    {"match": "slow", "answer": "abcdefgh" * 2000},
    {"match": "twelve", "answer": "\n".join([CALL] * 12)},
    {"match": "umlaut", "answer": "über"},
    {"match": "as json", "answer": '{"city": "Paris"}'},
)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("responses")
    tiers = {
        "light": fake(script(folder, *RULES, template=THINKING_TEMPLATE), temperature=0.5),
        "heavy": fake(script(folder, *RULES), n_ctx=64),  # does not think
    }
    tiers["medium"] = fake(script(folder, *RULES, step_ms=5))
    with serving(settings(**tiers)) as service:
        yield service


def body_of(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


def text_of(response: httpx.Response) -> str:
    (message,) = [i for i in body_of(response)["output"] if i["type"] == "message"]
    (part,) = message["content"]
    text: str = part["text"]
    return text


def error_of(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


def test_a_response_has_openais_shape(service: Service) -> None:
    body = body_of(service.respond("Grüße"))
    assert body["id"].startswith("resp_")
    message = body["output"][0]
    assert message.pop("id").startswith("msg_")
    assert body["output"] == [
        {
            "type": "message",
            "status": "completed",
            "role": "assistant",
            "content": [
                {
                    "type": "output_text",
                    "text": "You said: Grüße",
                    "annotations": [],
                    "logprobs": [],
                }
            ],
        }
    ]
    n_in, n_out = len("Grüße".encode()) + 3, len("You said: Grüße".encode()) + 1
    assert body["usage"] == {
        "input_tokens": n_in,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": n_out,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": n_in + n_out,
    }
    assert body["object"] == "response"
    assert (body["status"], body["error"], body["incomplete_details"]) == ("completed", None, None)
    assert body["completed_at"] >= body["created_at"]


def test_the_settings_of_a_response_are_told_with_the_tiers_own(service: Service) -> None:
    body = body_of(service.respond())
    told = {
        "instructions": None, "max_output_tokens": None, "metadata": {}, "model": "light",
        "parallel_tool_calls": True, "previous_response_id": None, "service_tier": "default",
        "store": False, "temperature": 0.5, "tool_choice": "auto", "tools": [], "top_p": 0.95,
        "text": {"format": {"type": "text"}, "verbosity": "medium"}, "truncation": "disabled",
        "reasoning": {"effort": None, "summary": None}, "background": False,
    }  # fmt: skip
    assert {name: body[name] for name in told} == told
    asked = {
        "instructions": "Be brief.", "max_output_tokens": 99, "metadata": {"a": "b"},
        "parallel_tool_calls": False, "service_tier": "flex", "temperature": 0, "top_p": 0.5,
        "tool_choice": {"type": "function", "name": "get_weather"}, "tools": [WEATHER],
        "text": {"format": {"type": "text"}, "verbosity": "medium"}, "max_tool_calls": 3,
    }  # fmt: skip
    body = body_of(service.respond(**asked))
    assert {name: body[name] for name in asked} == asked


def test_thoughts_text_and_calls_are_items_in_their_order(service: Service) -> None:
    body = body_of(service.respond("weather", tools=[WEATHER]))
    thoughts, message, call = body["output"]
    assert thoughts["id"].startswith("rs_")
    assert thoughts["type"] == "reasoning"
    assert thoughts["summary"] == []
    assert thoughts["content"] == [{"type": "reasoning_text", "text": "Hm."}]
    assert message["content"][0]["text"] == "Let me look."
    assert call.pop("id").startswith("fc_")
    assert call.pop("call_id").startswith("call_")
    assert call == {
        "type": "function_call",
        "status": "completed",
        "name": "get_weather",
        "arguments": '{"city": "Paris"}',
    }
    assert body["usage"]["output_tokens_details"]["reasoning_tokens"] > 3
    assert body["status"] == "completed"


def test_a_stream_tells_how_the_response_grows(service: Service) -> None:
    whole = body_of(service.respond("weather", tools=[WEATHER]))
    told = named_events(service.respond("weather", tools=[WEATHER], stream=True))
    assert [data["sequence_number"] for data in told] == list(range(len(told)))
    kinds = [data["type"].removeprefix("response.") for data in told]
    assert list(dict.fromkeys(kinds)) == [
        "created", "in_progress", "output_item.added", "content_part.added",
        "reasoning_text.delta", "reasoning_text.done", "content_part.done", "output_item.done",
        "output_text.delta", "output_text.done",
        "function_call_arguments.delta", "function_call_arguments.done", "completed",
    ]  # fmt: skip
    assert told[0]["response"]["status"] == "in_progress"
    assert told[0]["response"]["output"] == []
    last = told[-1]["response"]

    def plain(item: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in item.items() if name not in ("id", "call_id")}

    assert [plain(item) for item in last["output"]] == [plain(item) for item in whole["output"]]
    assert last["usage"]["output_tokens"] == whole["usage"]["output_tokens"]
    for index, item in enumerate(last["output"]):
        own = [d for d in told if d.get("output_index") == index]
        begun = own[0]["item"]
        assert (begun["id"], begun["status"]) == (item["id"], "in_progress")
        assert own[-1]["item"] == item
        assert {d["item_id"] for d in own[1:-1]} == {item["id"]}
        deltas = "".join(d["delta"] for d in own if d["type"].endswith(".delta"))
        assert deltas == item.get("arguments") or deltas == item["content"][0]["text"]


@pytest.mark.parametrize("text", ["weather", "think", "break", "Hi"])
def test_all_has_the_types_of_the_sdk(service: Service, text: str) -> None:
    for data in named_events(service.respond(text, tools=[WEATHER], stream=True)):
        EVENT.validate_python(data)
    if text != "break":
        types.Response.model_validate(body_of(service.respond(text, tools=[WEATHER])))


def test_an_answer_that_is_cut_is_incomplete(service: Service) -> None:
    body = body_of(service.respond("Hello", max_output_tokens=5))
    assert (body["status"], body["output"][0]["status"]) == ("incomplete", "incomplete")
    assert body["incomplete_details"] == {"reason": "max_output_tokens"}
    assert body["completed_at"] is None
    *_, done, last = named_events(service.respond("Hello", max_output_tokens=5, stream=True))
    assert (last["type"], done["item"]["status"]) == ("response.incomplete", "incomplete")
    cut = body_of(service.respond("think", max_output_tokens=12))
    assert [item["type"] for item in cut["output"]] == ["reasoning"]


def test_a_stream_that_breaks_ends_as_failed_and_with_an_error(service: Service) -> None:
    *told, failed, error = named_events(service.respond("break", stream=True))
    assert "".join(data.get("delta", "") for data in told) == "half"
    assert failed["type"] == "response.failed"
    assert failed["response"]["status"] == "failed"
    assert failed["response"]["error"]["code"] == "server_error"
    assert (error["type"], error["code"]) == ("error", "internal_error")
    assert error["error"]["message"] == error["message"]
    assert error["sequence_number"] == len(told) + 1


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"input": "x" * 100}, "context_length_exceeded"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"not": {}}}}},
         "invalid_prompt"),
    ],
)  # fmt: skip
def test_a_late_stream_that_no_other_try_would_mend_says_so(
    fields: dict[str, Any], code: str
) -> None:
    launcher = Held()
    body = {"model": "light", "input": "Hi", "stream": True, **fields}
    tiers = {"light": fake(n_ctx=64)}
    with (
        serving(settings({"comment_after_s": 0.05}, **tiers), launch=launcher) as service,
        service.http.stream("POST", "/v1/responses", json=body) as reply,
    ):
        pieces = reply.iter_text()
        assert any('"waiting":"loading light ' in piece for piece in pieces)  # it is late
        launcher.go_on()
        text = "".join(pieces)
    (failed,) = re.findall("^event: response.failed\ndata: (.*)$", text, re.MULTILINE)
    assert json.loads(failed)["response"]["error"]["code"] == code


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (QueueFull("Later."), "rate_limit_exceeded"),
        (TierUnavailable("Later."), "server_error"),
        (UnsupportedParameter("Never."), "invalid_prompt"),
    ],
)
def test_a_failure_has_openais_codes(error: ServiceError, code: str) -> None:
    text = _Reply({"output": []}, {}, packs_thoughts=False).failed(error).decode()
    (data,) = re.findall('^data: ({"type":"response.failed".*)', text, re.MULTILINE)
    failed = json.loads(data)["response"]["error"]
    assert failed == {"code": code, "message": error.message}
    types.ResponseError.model_validate(failed)


def test_a_fault_before_the_answer_is_an_http_status(service: Service) -> None:
    response = service.respond("fail", stream=True)
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
@pytest.mark.parametrize("streams", [False, True])
def test_a_client_that_leaves_frees_its_place(service: Service, path: str, streams: bool) -> None:
    slow = [{"role": "user", "content": "slow"}]
    body = {"model": "medium", "input": slow, "messages": slow, "max_tokens": 9999}
    with (
        contextlib.suppress(httpx.ReadTimeout),
        service.http.stream("POST", path, json=body | {"stream": streams}, timeout=0.3) as response,
    ):
        assert streams
        next(response.iter_raw())
    wait_until(lambda: not service.manager.tiers["medium"]._n_leases)


def test_log_probabilities_come_where_they_are_asked_for(service: Service) -> None:
    asked = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    part = body_of(service.respond("Hi", **asked))["output"][0]["content"][0]
    assert [entry["token"] for entry in part["logprobs"]] == list("You said: Hi")
    assert len(part["logprobs"][0]["top_logprobs"]) == 2
    told = named_events(service.respond("Hi", stream=True, **asked))
    deltas = [data for data in told if data["type"].endswith("text.delta")]
    assert [data["logprobs"][0]["token"] for data in deltas] == list("You said: Hi")
    (done,) = [data for data in told if data["type"].endswith("text.done")]
    assert done["logprobs"] == part["logprobs"]
    part = body_of(service.respond("umlaut", **asked))["output"][0]["content"][0]
    assert [entry["token"] for entry in part["logprobs"]] == ["", "ü", "b", "e", "r"]


CITY = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Paris"]}}, "required": ["city"]}


@pytest.mark.parametrize(
    "wanted",
    [{"type": "json_schema", "name": "city", "schema": CITY, "strict": True},
     {"type": "json_object"}],
)  # fmt: skip
def test_a_text_has_the_form_that_is_asked_for(service: Service, wanted: dict[str, Any]) -> None:
    response = service.respond("as json", text={"format": wanted})
    assert json.loads(text_of(response)) == {"city": "Paris"}
    body = body_of(response)
    assert body["text"]["format"] == wanted
    assert body["schema_valid"] is True


def test_thinking_goes_as_far_as_the_effort(service: Service) -> None:
    body = body_of(service.respond("x", reasoning={"effort": "none"}))
    assert [item["type"] for item in body["output"]] == ["message"]
    assert body["reasoning"] == {"effort": "none", "summary": None}
    reply = service.respond("x", model="heavy", reasoning={"effort": "high"})
    assert [item["type"] for item in body_of(reply)["output"]] == ["message"]
    assert reply.headers["X-Ignored-Params"] == "reasoning.effort"


# what a chat's messages come to be


def messages(*items: Any, **fields: Any) -> list[dict[str, Any]]:
    body = {"model": "light", "input": list(items)} | fields
    chat = ResponsesRequest.model_validate(body).chat()
    return [message.model_dump(exclude_unset=True) for message in chat.messages]


def call(call_id: str, city: str) -> dict[str, Any]:
    function = {"name": "get_weather", "arguments": f'{{"city": "{city}"}}'}
    return {"id": call_id, "function": function}


def test_a_conversation_comes_back_as_it_was() -> None:
    def item(call_id: str, city: str) -> dict[str, Any]:
        arguments = f'{{"city": "{city}"}}'
        about = {"id": "fc_1", "status": "completed", "call_id": call_id}
        return {"type": "function_call", "name": "get_weather", "arguments": arguments, **about}

    text = {"type": "output_text", "text": "Let me look.", "annotations": [], "logprobs": []}
    assert messages(
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "input_text", "text": "Weather?"},
                                     {"type": "input_text", "text": "In both."}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": None,
         "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"type": "message", "id": "msg_1", "role": "assistant", "content": [text]},
        item("call_1", "Paris"),
        item("call_2", "Rome"),
        {"type": "function_call_output", "call_id": "call_1", "output": "12C"},
        {"type": "function_call_output", "call_id": "call_2",
         "output": [{"type": "input_text", "text": text} for text in ("20C", "sun")]},
        {"type": "message", "role": "user", "content": "Thanks"},
        instructions="Be brief.",
    ) == [
        {"role": "system", "content": "Be brief.\n\nBe kind."},
        {"role": "user", "content": "Weather?\nIn both."},
        {"role": "assistant", "reasoning_content": "Hm.", "content": "Let me look.",
         "tool_calls": [call("call_1", "Paris"), call("call_2", "Rome")]},
        {"role": "tool", "tool_call_id": "call_1", "content": "12C"},
        {"role": "tool", "tool_call_id": "call_2", "content": "20C\nsun"},
        {"role": "user", "content": "Thanks"},
    ]  # fmt: skip


def test_what_the_assistant_said_to_refuse_is_its_text() -> None:
    refusal = {"type": "refusal", "refusal": "I will not."}
    said = messages({"type": "message", "role": "assistant", "content": [refusal]})
    assert said == [{"role": "assistant", "content": "I will not."}]
    with pytest.raises(UnsupportedParameter) as caught:
        messages({"role": "user", "content": [refusal]})
    assert caught.value.param == "input[0].content[0].type"


@pytest.mark.parametrize("stream", [False, True])
def test_thoughts_come_back_from_clients_that_send_only_their_encrypted_content(
    service: Service, stream: bool
) -> None:
    """Such as LangChain, Codex and agent-framework: nothing else of the item."""
    reply = service.respond("think", include=["reasoning.encrypted_content"], stream=stream)
    if stream:
        told = named_events(reply)
        items = [e["item"] for e in told if e["type"] == "response.output_item.done"]
        assert told[-1]["response"]["output"] == items
    else:
        items = body_of(reply)["output"]
    thoughts = items[0]
    assert types.ResponseReasoningItem.model_validate(thoughts).encrypted_content
    sent_back = {"type": "reasoning", "summary": [],
                 "encrypted_content": thoughts["encrypted_content"]}  # fmt: skip
    for empty in ({}, {"content": None}, {"content": []}):
        assert messages({"role": "user", "content": "a"}, sent_back | empty, items[1])[1] == {
            "role": "assistant", "reasoning_content": "Well.", "content": "Done."
        }  # fmt: skip
    text = {"type": "reasoning_text", "text": "Hm."}
    (said,) = messages(sent_back | {"content": [text]})
    assert said["reasoning_content"] == "Hm."


@pytest.mark.parametrize(
    "foreign", ["gAAAAABo-_x=", "", "é", "cXVpbnRldDr/", "bm8gbWFyaw==", "cXVpbnRldDpX"[:-1]]
)
def test_encrypted_content_of_others_is_passed_over(foreign: str) -> None:
    summary = [{"type": "summary_text", "text": "Well."}]
    item = {"type": "reasoning", "summary": summary, "encrypted_content": foreign}
    assert messages(item)[0]["reasoning_content"] == "Well."


@pytest.mark.parametrize("stream", [False, True])
def test_the_ids_of_calls_rise(service: Service, stream: bool) -> None:
    """haystack puts the calls of a stream in order by them."""
    ids = []
    for _ in range(2):
        reply = service.respond("twelve", tools=[WEATHER], stream=stream)
        response = named_events(reply)[-1]["response"] if stream else body_of(reply)
        ids += [item["id"] for item in response["output"] if item["type"] == "function_call"]
    assert len(set(ids)) == 24
    assert ids[:12] == sorted(ids[:12])


def test_thoughts_have_no_encrypted_content_unless_it_is_asked_for(service: Service) -> None:
    assert "encrypted_content" not in body_of(service.respond("think"))["output"][0]


def test_thoughts_after_an_answer_begin_another_one() -> None:
    summary = [{"type": "summary_text", "text": "Well."}]
    assert messages(
        {"role": "user", "content": "a"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c"},
        {"type": "reasoning", "summary": summary},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
    ) == [
        {"role": "user", "content": "a\n\nb"},
        {"role": "assistant", "content": "c"},
        {
            "role": "assistant",
            "reasoning_content": "Well.",
            "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}],
        },
    ]


def test_an_allowed_set_of_tools_is_that_of_a_chat(service: Service) -> None:
    named = {"type": "function", "name": "get_weather"}
    choice = {"type": "allowed_tools", "mode": "required", "tools": [named]}
    other = WEATHER | {"name": "other"}
    fields = {"tools": [WEATHER, other], "reasoning": {"effort": "none"}}
    body = body_of(service.respond("Hi", tool_choice=choice, **fields))
    assert [item["name"] for item in body["output"]] == ["get_weather"]
    choice["tools"] = [named | {"name": "third"}]
    error = error_of(service.respond("Hi", tools=[WEATHER], tool_choice=choice))
    assert (error["param"], "third" in error["message"]) == ("tool_choice", True)


# functions of a namespace, as Codex sends those of MCP servers

WEATHERS = {
    "type": "namespace",
    "name": "mcp__sky__",
    "description": "Of the sky.",
    "tools": [
        {"type": "custom", "name": "free"},
        WEATHER | {"name": "get_stars"},
        WEATHER | {"description": None},
    ],
}


def function(tool: dict[str, Any], name: str, description: str) -> dict[str, Any]:
    return {name: tool[name] for name in ("parameters", "strict")} | {
        "name": name,
        "description": description,
    }


def test_functions_of_a_namespace_are_shown_by_both_names() -> None:
    other = {"type": "namespace", "name": "crm", "tools": [WEATHER]}
    body = {"model": "light", "input": "Hi", "tools": [{"type": "web_search"}, WEATHERS, other]}
    request = ResponsesRequest.model_validate(body)
    tools = request.chat().tools or []
    assert [tool.function.model_dump() for tool in tools] == [
        function(WEATHER, "mcp__sky__get_stars", "Of the sky.\n\nOf a city"),
        function(WEATHER, "mcp__sky__get_weather", ""),
        function(WEATHER, "crm__get_weather", "Of a city"),
    ]
    assert request.left_out == {"tools[0]": "web_search", "tools[1].tools[0]": "custom"}


def test_a_call_of_a_namespace_is_told_in_two_fields(service: Service) -> None:
    response = service.respond("sky", tools=[WEATHERS])
    assert response.headers["x-ignored-params"] == "tools[0].tools[0]"
    body = body_of(response)
    (call,) = body["output"]
    assert (call["namespace"], call["name"]) == ("mcp__sky__", "get_weather")
    assert types.Response.model_validate(body).tools[0].type == "namespace"
    told = named_events(service.respond("sky", tools=[WEATHERS], stream=True))
    for data in told:
        EVENT.validate_python(data)
    items = [data["item"] for data in told if "item" in data] + told[-1]["response"]["output"]
    assert {(item["namespace"], item["name"]) for item in items} == {("mcp__sky__", "get_weather")}
    (done,) = [data for data in told if data["type"].endswith("arguments.done")]
    assert done["name"] == "get_weather"


def test_a_past_call_of_a_namespace_has_the_name_that_is_shown() -> None:
    past = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}
    (message,) = messages(past | {"namespace": "mcp__x__"}, past | {"namespace": None})
    names = [call["function"]["name"] for call in message["tool_calls"]]
    assert names == ["mcp__x__f", "f"]


@pytest.mark.parametrize(
    "named",
    [{"name": "get_weather", "namespace": "mcp__sky__"}, {"name": "get_weather"},
     {"name": "mcp__sky__get_weather"}],
)  # fmt: skip
def test_a_function_of_a_namespace_can_be_chosen(service: Service, named: dict[str, Any]) -> None:
    fields = {"tools": [WEATHERS], "reasoning": {"effort": "none"}}
    chosen = {"type": "function", **named}
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [chosen]}
    for choice in (chosen, allowed):
        body = body_of(service.respond("Hi", tool_choice=choice, **fields))
        assert [item["name"] for item in body["output"]] == ["get_weather"]
        assert body["tool_choice"] == choice


def test_a_choice_among_namespaces_has_to_say_which(service: Service) -> None:
    tools = [WEATHERS, WEATHERS | {"name": "crm"}]
    choice = {"type": "function", "name": "get_stars"}
    error = error_of(service.respond("Hi", tools=tools, tool_choice=choice))
    assert error["param"] == "tool_choice"
    assert "`namespace`" in error["message"]
    body_of(service.respond("Hi", tools=[*tools, WEATHER | {"name": "get_stars"}],
                            tool_choice=choice))  # fmt: skip


LONG_NAME = WEATHER | {"name": "f" * 64}


@pytest.mark.parametrize(
    ("tools", "param"),
    [
        ([WEATHER, WEATHERS | {"tools": [{"type": "function"}]}], "tools[1].tools[0].name"),
        ([WEATHER, WEATHERS | {"name": "a b"}], "tools[1].name"),
        ([WEATHER, WEATHERS | {"name": "n" * 64, "tools": [LONG_NAME]}], "tools[1]"),
        ([WEATHERS | {"tools": [{"type": "custom"}]}], "tools[0].tools[0].type"),
        ([WEATHERS, WEATHER | {"name": "mcp__sky__get_stars"}], "tools[1].name"),
        ([WEATHER | {"name": "mcp__sky__get_stars"}, WEATHERS], "tools[1].tools[1].name"),
        ([WEATHERS | {"tools": [WEATHER | {"parameters": {"not": {}}}]}],
         "tools[0].tools[0].parameters"),
        ([WEATHERS | {"name": f"n{n}", "tools": [{"type": "x"}] * 300} for n in range(2)], "tools"),
    ],
)  # fmt: skip
def test_a_fault_in_a_namespace_is_named(
    service: Service, tools: list[dict[str, Any]], param: str
) -> None:
    error = error_of(service.respond("Hi", tools=tools, tool_choice="required"))
    assert error["param"] == param


def test_unknown_fields_in_a_namespace_are_named(service: Service) -> None:
    inner = [WEATHER | {"defer_loading": True}]
    response = service.respond("Hi", tools=[WEATHERS | {"tools": inner, "frob": 1}])
    named = "tools[0].frob,tools[0].tools[0].defer_loading"
    assert response.headers["x-ignored-params"] == named


@pytest.mark.parametrize("stream", [False, True])
def test_truncation_leaves_out_the_oldest_turns(service: Service, stream: bool) -> None:
    turns = [
        {"role": role, "content": f"{n} of many words"}
        for n in range(6)
        for role in ("user", "assistant")
    ]
    items = [*turns, {"role": "user", "content": "the last"}]
    fields = {"model": "heavy", "input": items, "max_output_tokens": 9}  # of 64 tokens
    for truncation in (None, "disabled"):
        response = service.respond(**fields, truncation=truncation)
        assert error_of(response)["code"] == "context_length_exceeded"
    response = service.respond(**fields, truncation="auto", stream=stream)
    assert response.status_code == 200
    assert int(response.headers["X-Truncated-Messages"]) >= 8
    whole = named_events(response)[-1]["response"] if stream else body_of(response)
    assert whole["truncation"] == "auto"
    assert whole["usage"]["input_tokens"] <= 64 - 9


def test_an_image_that_a_tool_found_is_a_note(service: Service) -> None:
    call = {"type": "function_call", "call_id": "x", "name": "shoot", "arguments": "{}"}
    found = [{"type": "input_text", "text": "Here."}, PNG]
    result = {"type": "function_call_output", "call_id": "x", "output": found}
    response = service.respond([{"role": "user", "content": "Go"}, call, result])
    assert response.status_code == 200
    assert response.headers["X-Ignored-Params"] == "input[2].output[1]"
    told = messages({"role": "user", "content": "Go"}, call, result)[-1]["content"]
    assert told.startswith("Here.\n[Content of type 'input_image' is left out")


# what is not there

FIELDS = [
    ({"background": True}, "background"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"prompt": {"id": "pmpt_1"}}, "prompt"),
    ({"include": ["message.output_text.logprobs", "file_search_call.secrets"]}, "include[1]"),
    ({"text": {"verbosity": "low"}}, "text.verbosity"),
    ({"tools": [{"type": "mcp", "server_label": "x"}]}, "tools[0].type"),
    ({"tools": [WEATHER], "tool_choice": {"type": "file_search"}}, "tool_choice.type"),
]
PNG = {"type": "input_image", "image_url": "data:"}
INPUTS = [
    ({"type": "item_reference", "id": "msg_1"}, "input[1].type"),
    ({"id": "msg_1"}, "input[1].type"),
    ({"type": "computer_call_output", "call_id": "x"}, "input[1].type"),
    ({"role": "user", "content": [{"type": "input_text", "text": "a"}, PNG]},
     "input[1].content[1].type"),
    ({"role": "user", "content": [{"type": "input_file", "file_id": "x"}]},
     "input[1].content[0].type"),
    ({"role": "user", "content": [{"type": "input_audio"}]}, "input[1].content[0].type"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param"), FIELDS)
def test_what_is_not_there_is_refused_by_name(
    service: Service, fields: dict[str, Any], param: str
) -> None:
    error = error_of(service.respond(**fields))
    assert (error["code"], error["param"]) == ("unsupported_parameter", param)


@pytest.mark.parametrize(("item", "param"), INPUTS)
def test_an_item_that_cannot_be_read_is_refused_by_its_place(
    service: Service, item: dict[str, Any], param: str
) -> None:
    error = error_of(service.respond([{"role": "user", "content": "Hi"}, item]))
    assert (error["code"], error["param"]) == ("unsupported_parameter", param)


BAD = [
    ({"input": None}, "input"),
    ({"input": []}, "input"),
    ({"input": [5]}, "input[0]"),
    ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
    ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]},
     "input[0].content[0].text"),
    ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input[0].call_id"),
    ({"input": "\ud800"}, "input"),
    ({"input": "x" * 9000, "model": "heavy"}, "input"),
    ({"temperature": 3}, "temperature"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"max_output_tokens": "many"}, "max_output_tokens"),
    ({"reasoning": {"effort": "extreme"}}, "reasoning.effort"),
    ({"metadata": {"a": 5}}, "metadata.a"),
    ({"service_tier": "first"}, "service_tier"),
    ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
    ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
    ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"not": {}}}}},
     "text.format"),
    ({"tools": [{"type": "function"}]}, "tools[0].name"),
    ({"tools": [WEATHER, WEATHER]}, "tools[1].name"),
    ({"tools": [WEATHER | {"parameters": {"not": {}}}], "tool_choice": "required"},
     "tools[0].parameters"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": "always"}, "tool_choice"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param"), BAD)
def test_a_bad_value_is_a_400_that_names_it(
    service: Service, fields: dict[str, Any], param: str
) -> None:
    content = json.dumps({"model": "light", "input": "Hi"} | fields)
    headers = {"Content-Type": "application/json"}
    error = error_of(service.http.post("/v1/responses", content=content, headers=headers))
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert "messages" not in error["message"] or param == "input"
    assert "response_format" not in error["message"]


def test_values_that_ask_for_nothing_are_fine(service: Service) -> None:
    neutral = {
        "background": False, "conversation": None, "include": [], "instructions": None,
        "previous_response_id": None, "prompt": None, "store": False, "truncation": "disabled",
        "tools": [], "tool_choice": "auto", "temperature": None, "stream": None, "metadata": None,
        "reasoning": None, "text": {"verbosity": None}, "service_tier": "auto", "top_logprobs": 0,
        "user": None, "max_tool_calls": None, "stream_options": None,
    }  # fmt: skip
    service.respond(tools=None, tool_choice=None, text=None).raise_for_status()
    response = service.respond(**neutral)
    assert text_of(response) == "You said: Hi"
    assert "x-ignored-params" not in response.headers


def test_tools_that_are_not_there_are_left_out_beside_functions_and_named(
    service: Service,
) -> None:
    tools = [{"type": "web_search", "external_web_access": True}, WEATHER, {"type": "custom"}]
    for choice in ("auto", "none", "required"):
        response = service.respond("Hi", tools=tools, tool_choice=choice)
        assert response.status_code == 200, response.text
        assert response.headers["x-ignored-params"] == "tools[0],tools[2]"
    error = error_of(service.respond("Hi", tools=[*tools, WEATHER]))
    assert error["param"] == "tools[3].name"


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_that_means_nothing_is_named_as_here(service: Service, stream: bool) -> None:
    odd, other = (
        {"type": "function", "name": "odd", "parameters": {"properties": {"a": {"type": type}}}}
        for type in ("float", "int")
    )
    space = {"type": "namespace", "name": "x", "tools": [other]}
    tools = [{"type": "web_search"}, WEATHER, odd, space]
    response = service.respond("Hi", tools=tools, stream=stream)
    assert response.headers["x-ignored-params"] == (
        "tools[2].parameters,tools[3].tools[0].parameters,tools[0]"
    )


@pytest.mark.parametrize("field", ["previous_response_id", "conversation"])
def test_a_client_that_relies_on_a_memory_is_told_what_to_do(service: Service, field: str) -> None:
    response = service.respond("And then?", **{field: "resp_1"})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, field)
    assert error["message"].startswith(f"'{field}'")
    assert "send the whole conversation (`store: false`)" in error["message"]


@pytest.mark.parametrize("what", get_args(types.ResponseIncludable))
def test_what_openai_includes_is_there_or_named(service: Service, what: str) -> None:
    response = service.respond("Hi", include=[what], tools=[{"type": "web_search"}, WEATHER])
    is_there = what in ("message.output_text.logprobs", "reasoning.encrypted_content")
    named = "tools[0]" if is_there else "tools[0],include[0]"
    assert (response.status_code, response.headers["x-ignored-params"]) == (200, named)


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_ignored_is_named_in_a_header(service: Service, stream: bool) -> None:
    response = service.respond(
        store=True,
        prompt_cache_key="x",
        include=["file_search_call.results"],
        reasoning={"effort": "low", "summary": "auto"},
        tools=[WEATHER | {"defer_loading": False}],
        frob=1,
        stream=stream,
    )
    assert response.headers["x-ignored-params"] == (
        "include[0],prompt_cache_key,store,frob,reasoning.summary,tools[0].defer_loading"
    )


def test_unknown_fields_in_items_are_named_and_what_a_reply_has_is_not(service: Service) -> None:
    asked = {"include": ["message.output_text.logprobs", "reasoning.encrypted_content"]}
    said = body_of(service.respond("weather", tools=[WEATHER], **asked))["output"]
    assert [item["type"] for item in said] == ["reasoning", "message", "function_call"]
    result = {"type": "function_call_output", "call_id": said[-1]["call_id"], "output": "12C",
              "id": None, "status": "completed"}  # fmt: skip
    items = [{"role": "user", "content": "weather"}, *said, result]
    quiet = service.respond(items)
    assert quiet.status_code == 200
    assert "x-ignored-params" not in quiet.headers

    part = {"type": "input_text", "text": "Hi", "frob": 1, "none": None}
    choice = {"type": "function", "name": "get_weather", "frob": 1}
    response = service.respond(
        [{"role": "user", "content": [part], "frob": 1}, *said, result | {"output": [part]}],
        tools=[WEATHER],
        tool_choice={"type": "allowed_tools", "mode": "auto", "tools": [choice], "frob": 1},
    )
    assert response.headers["x-ignored-params"] == (
        "tool_choice.frob,tool_choice.tools[0].frob,input[0].frob,input[0].content[0].frob,"
        "input[4].output[0].frob"
    )
    thought = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "x", "frob": 1}]}
    response = service.respond([{"role": "user", "content": "Hi"}, thought])
    assert response.headers["x-ignored-params"] == "input[1].summary[0].frob"


def test_with_strict_params_no_tool_is_left_out() -> None:
    with serving(settings({"strict_params": True})) as service:
        error = error_of(service.respond("Hi", tools=[WEATHER, {"type": "web_search"}]))
    assert (error["code"], error["param"]) == ("unsupported_parameter", "tools[1]")
    assert "is of type 'web_search', which is not supported" in error["message"]


def test_what_a_client_wrote_comes_back_as_json_whatever_it_is(service: Service) -> None:
    odd = WEATHER | {"parameters": {"default": float("nan")}}
    content = json.dumps(
        {
            "model": "light",
            "input": "Hi",
            "metadata": {"a": "\ud800"},
            "tools": [odd],
            "tool_choice": "none",
        }
    )
    headers = {"Content-Type": "application/json"}
    body = body_of(service.http.post("/v1/responses", content=content, headers=headers))
    assert body["metadata"] == {"a": "?"}
    assert body["tools"][0]["parameters"] == {"default": None}
