"""Tools over HTTP: what a client sees of calls, whole and streamed, and what is refused."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from api.chat_request import ChatRequest
from chat.events import CallArguments, CallBegin, Message
from errors import BadRequest
from tests.serving import Held, Service, events, fake, script, serving, settings

PARIS = '{"city": "Paris"}'
CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>'
ROME = CALL.replace("Paris", "Rome")


def tool(name: str = "get_weather", **fields: Any) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "parameters": parameters} | fields}


TOOLS = [tool(), tool("get_time")]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    path = script(
        tmp_path_factory.mktemp("tools"),
        {"match": "tool_response", "answer": "It rains."},
        {"match": "weather in both", "answer": f"{CALL}\n{ROME}"},
        {"match": "weather", "answer": f"Let me look.\n{CALL}"},
        {"match": "unknown", "answer": CALL.replace("get_weather", "no_such")},
        {"match": "json", "answer": '{"city": "<tool_call>"}'},
    )
    with serving(settings(light=fake(path, max_tokens=300))) as service:
        yield service


def message_of(response: httpx.Response) -> Any:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]


def called(message: Any) -> list[tuple[str, str]]:
    functions = [call["function"] for call in message.get("tool_calls", ())]
    return [(function["name"], function["arguments"]) for function in functions]


def error_of(response: httpx.Response) -> Any:
    assert response.status_code == 400, response.text
    return response.json()["error"]


def test_a_call_comes_out_of_the_text(service: Service) -> None:
    response = service.chat("weather", tools=TOOLS)
    message = message_of(response)
    assert message["content"] == "Let me look."
    assert called(message) == [("get_weather", PARIS)]
    (call,) = message["tool_calls"]
    assert call["type"] == "function"
    assert call["id"].startswith("call_")
    assert response.json()["choices"][0]["finish_reason"] == "tool_calls"


def test_several_calls_have_ids_of_their_own_and_no_content(service: Service) -> None:
    message = message_of(service.chat("weather in both", tools=TOOLS))
    assert message["content"] is None
    assert called(message) == [
        ("get_weather", PARIS),
        ("get_weather", PARIS.replace("Paris", "Rome")),
    ]
    assert len({call["id"] for call in message["tool_calls"]}) == 2


def test_a_streamed_call_has_openais_deltas(service: Service) -> None:
    chunks = events(service.chat("weather in both", tools=TOOLS, stream=True))
    choices = [chunk["choices"][0] for chunk in chunks]
    calls = [c["delta"]["tool_calls"] for c in choices if "tool_calls" in c["delta"]]
    assert all(len(deltas) == 1 for deltas in calls)
    first: dict[int, Any] = {}
    joined = Message()
    for (delta,) in calls:
        if delta["index"] not in first:
            first[delta["index"]] = delta
            assert delta["function"]["arguments"] == ""
            joined.add(CallBegin(delta["function"]["name"]))
        else:
            assert delta.keys() == {"index", "function"}
            assert delta["function"].keys() == {"arguments"}
            joined.add(CallArguments(delta["function"]["arguments"]))
    assert list(first) == [0, 1]
    assert first[0]["id"] != first[1]["id"]
    assert [json.loads(call.arguments)["city"] for call in joined.calls] == ["Paris", "Rome"]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert choices[-1]["finish_reason"] == "tool_calls"
    assert not any(choice["delta"].get("content") for choice in choices)
    assert len(calls) > 8, "arguments come as they are generated"


def test_text_without_calls_is_text(service: Service) -> None:
    response = service.chat("Hi", tools=TOOLS)
    assert message_of(response) == {
        "role": "assistant", "content": "You said: Hi", "refusal": None,
    }  # fmt: skip
    assert response.json()["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"get_weather", "get_time"}),
        ({"type": "function", "function": {"name": "get_time"}}, {"get_time"}),
        ({"type": "allowed_tools", "allowed_tools": {
            "mode": "required", "tools": [{"type": "function", "function": {"name": "get_time"}}],
        }}, {"get_time"}),
    ],
    ids=["required", "named", "allowed"],
)  # fmt: skip
def test_a_call_that_is_asked_for_comes(service: Service, choice: Any, names: set[str]) -> None:
    response = service.chat("Hi", tools=TOOLS, tool_choice=choice)
    ((name, arguments),) = called(message_of(response))
    assert name in names
    assert json.loads(arguments).keys() == {"city"}
    assert response.json()["choices"][0]["finish_reason"] == "tool_calls"


def test_only_allowed_tools_are_called(service: Service) -> None:
    allowed = {"mode": "auto", "tools": [{"type": "function", "function": {"name": "get_time"}}]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    message = message_of(service.chat("weather", tools=TOOLS, tool_choice=choice))
    assert "get_weather" not in dict(called(message))


def test_a_name_that_does_not_exist_cannot_be_written(service: Service) -> None:
    calls = called(message_of(service.chat("unknown", tools=TOOLS)))
    assert {name for name, _ in calls} <= {"get_weather", "get_time"}


def test_one_call_where_they_must_not_be_parallel(service: Service) -> None:
    response = service.chat("weather in both", tools=TOOLS, parallel_tool_calls=False)
    assert called(message_of(response)) == [("get_weather", PARIS)]


def test_with_choice_none_the_model_is_told_of_no_tools(service: Service) -> None:
    bare = service.chat("weather").json()
    none = service.chat("weather", tools=TOOLS, tool_choice="none").json()
    assert none["usage"]["prompt_tokens"] == bare["usage"]["prompt_tokens"]
    assert none["choices"][0]["message"] == bare["choices"][0]["message"]
    assert "<tool_call>" in none["choices"][0]["message"]["content"]


def test_a_call_that_is_cut_ends_with_length(service: Service) -> None:
    n_tokens = len("Let me look.\n" + CALL) - 25
    response = service.chat("weather", tools=TOOLS, max_tokens=n_tokens)
    ((_, arguments),) = called(message_of(response))
    assert PARIS.startswith(arguments)
    assert len(arguments) < len(PARIS)
    assert response.json()["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("stop", ["Paris", '"', "}", "\n", "<", "\n<tool", "tool_call>"])
def test_a_stop_string_cuts_no_call(service: Service, stop: str) -> None:
    response = service.chat("weather", tools=TOOLS, stop=stop)
    message = message_of(response)
    assert (message["content"], called(message)) == ("Let me look.", [("get_weather", PARIS)])
    assert response.json()["choices"][0]["finish_reason"] == "tool_calls"
    chunks = events(service.chat("weather", tools=TOOLS, stop=stop, stream=True))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content") or "" for delta in deltas) == "Let me look."
    arguments = [call["function"]["arguments"] for d in deltas for call in d.get("tool_calls", ())]
    assert "".join(arguments) == PARIS
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_no_call_comes_behind_a_stop_string(service: Service) -> None:
    response = service.chat("weather", tools=TOOLS, stop=[" look", "Paris"])
    message = message_of(response)
    assert (message["content"], called(message)) == ("Let me", [])
    assert response.json()["choices"][0]["finish_reason"] == "stop"


def test_results_go_back_to_the_model(service: Service) -> None:
    first = message_of(service.chat("weather", tools=TOOLS))
    messages = [
        {"role": "user", "content": "weather"},
        first,
        {"role": "tool", "tool_call_id": first["tool_calls"][0]["id"], "content": "rain"},
    ]
    body = {"model": "light", "messages": messages, "tools": TOOLS}
    assert (
        message_of(service.http.post("/v1/chat/completions", json=body))["content"] == "It rains."
    )


def test_tools_and_a_form_of_the_answer_go_together(service: Service) -> None:
    form = {"type": "json_object"}
    answer = service.chat("json", tools=TOOLS, response_format=form).json()["choices"][0]
    assert answer["message"]["content"] == '{"city": "<tool_call>"}'
    assert answer["schema_valid"] is True
    call = service.chat("weather in both", tools=TOOLS, response_format=form).json()["choices"][0]
    assert len(called(call["message"])) == 2
    assert "schema_valid" not in call


@pytest.mark.parametrize("stop", [None, ".\n", "look.\nNo", "<", "\n"])
def test_log_probabilities_are_those_of_the_text_alone(service: Service, stop: str | None) -> None:
    response = service.chat("weather", tools=TOOLS, logprobs=True, stop=stop)
    choice = response.json()["choices"][0]
    assert "".join(t["token"] for t in choice["logprobs"]["content"]).strip() == "Let me look."


def test_several_choices_each_have_their_calls(service: Service) -> None:
    choices = service.chat("weather", tools=TOOLS, n=3).json()["choices"]
    assert [called(choice["message"]) for choice in choices] == [[("get_weather", PARIS)]] * 3
    assert len({choice["message"]["tool_calls"][0]["id"] for choice in choices}) == 3


def bad_schema(schema: Any, **fields: Any) -> dict[str, Any]:
    return {"tools": [tool(parameters=schema, **fields)]}


UNIQUE = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}


@pytest.mark.parametrize(
    ("fields", "param", "why"),
    [
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type", "function"),
        ({"tools": [tool("a b")]}, "tools[0].function.name", "pattern"),
        ({"tools": [tool("")]}, "tools[0].function.name", "pattern"),
        ({"tools": [tool(), tool()]}, "tools[1].function.name", "two functions"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "required"),
        ({"tools": [tool()] * 513}, "tools", "512"),
        ({"tool_choice": "required"}, "tool_choice", "no `tools`"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "no `tools`"),
        ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice", "required"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "g"}}},
         "tool_choice", "no function 'g'"),
        ({"tools": TOOLS, "tool_choice": {"type": "custom"}}, "tool_choice.type", "function"),
        (bad_schema(UNIQUE, strict=True), "tools[0].function.parameters",
         "$.properties.a: 'uniqueItems'"),
        *(
            (bad_schema({"type": type}), "tools[0].function.parameters", f"not {json.dumps(type)}")
            for type in ("frob", "string", ["string", "null"], 5)
        ),
        (bad_schema([]), "tools[0].function.parameters", "dict"),
        ({"tools": TOOLS, "ignore_eos": True}, "ignore_eos", "where it ends"),
        ({"tools": TOOLS, "min_tokens": 3}, "min_tokens", "where it ends"),
        ({"tools": TOOLS, "grammar": "root ::= ("}, "grammar", "GBNF"),
        ({"functions": [{"name": "f"}]}, "functions", "not supported"),
    ],
    ids=lambda value: json.dumps(value)[:50],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_done_is_refused_by_name(
    service: Service, fields: dict[str, Any], param: str, why: str, stream: bool
) -> None:
    error = error_of(service.chat(stream=stream, **fields))
    assert error["param"] == param
    assert why in error["message"]


def test_a_function_that_is_not_strict_is_held_to_what_can_be_enforced(service: Service) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True,
              "items": {"type": "integer"}}}, "required": ["a"], "minProperties": 1}  # fmt: skip
    response = service.chat(tools=[tool(parameters=schema)], tool_choice="required")
    ((_, arguments),) = called(message_of(response))
    assert isinstance(json.loads(arguments)["a"], list)


def of_a(schema: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": schema}}


NONSENSE = [
    *(of_a({"type": type}) for type in ("any", "float", "int", "list", "date", "")),
    of_a({"type": "integer", "minimum": "1"}),
    of_a({"type": "string", "minLength": 1.0}),
    of_a({"$ref": "#/$defs/none"}),
    of_a({"$ref": "https://example.com/schema.json"}),
    *({**of_a({"type": "string"}), "required": required} for required in ("a", False)),
]


@pytest.mark.parametrize("schema", NONSENSE, ids=lambda schema: json.dumps(schema)[30:70])
def test_a_schema_that_means_nothing_costs_no_other_tool_and_is_named(
    service: Service, schema: Any
) -> None:
    bad = tool("odd", parameters=schema)
    for stream in (False, True):
        response = service.chat("weather", tools=[tool(), bad], stream=stream, frob=1)
        assert response.status_code == 200, response.text
        named = "tools[1].function.parameters,frob"
        assert response.headers["x-ignored-params"] == named
    response = service.chat("weather", tools=[tool(), bad])
    assert called(message_of(response)) == [("get_weather", PARIS)]
    response = service.chat("Hi", tools=[tool(), bad], tool_choice="required")
    assert message_of(response)["tool_calls"]
    strict = tool("odd", parameters=schema, strict=True)
    error = error_of(service.chat("weather", tools=[tool(), strict]))
    assert error["param"] == "tools[1].function.parameters"


def test_a_schema_that_means_nothing_is_named_also_where_headers_are_sent_already() -> None:
    body = {"model": "light", "messages": [{"role": "user", "content": "Hi"}], "stream": True,
            "tools": [tool(parameters=NONSENSE[0])], "frob": 1}  # fmt: skip
    launcher = Held()
    with (
        serving(settings({"comment_after_s": 0.05}), launch=launcher) as service,
        service.http.stream("POST", "/v1/chat/completions", json=body) as reply,
    ):
        assert reply.headers["x-ignored-params"] == "frob"
        pieces = reply.iter_text()
        text = next(pieces)
        launcher.go_on()
        text += "".join(pieces)
    assert "tools[0].function.parameters,frob" in text


NULLS: list[tuple[Any, Any]] = [
    ({"type": None, "properties": None, "required": None, "additionalProperties": None},
     {"type": "object", "properties": {}}),
    ({"properties": []}, {"type": "object", "properties": {}}),
    (of_a({"type": "object", "properties": [], "required": None}),
     of_a({"type": "object", "properties": {}})),
    (of_a({"type": "integer", "format": None, "minimum": None, "anyOf": None, "enum": None}),
     of_a({"type": "integer"})),
    (of_a({"type": "array", "items": {"type": "string", "pattern": None}, "maxItems": None}),
     of_a({"type": "array", "items": {"type": "string"}})),
    (of_a({"anyOf": [{"type": None, "const": None}, {"type": "string", "default": None}]}),
     of_a({"anyOf": [{"const": None}, {"type": "string", "default": None}]})),
    (of_a({"enum": ["x", None], "default": {"required": None}, "examples": [{"type": None}]}),
     of_a({"enum": ["x", None], "default": {"required": None}, "examples": [{"type": None}]})),
    ({"$defs": {"enum": {"type": "object", "title": None}}, "$ref": "#/$defs/enum"},
     {"type": "object", "properties": {}, "$defs": {"enum": {"type": "object"}},
      "$ref": "#/$defs/enum"}),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "meant"), NULLS, ids=lambda value: json.dumps(value)[:60])
def test_what_a_schema_says_by_null_it_does_not_say(
    service: Service, schema: Any, meant: Any
) -> None:
    before = json.dumps(schema)
    body = {"messages": [{"role": "user", "content": "Hi"}], "model": "light",
            "tools": [tool(parameters=schema)]}  # fmt: skip
    (made,) = ChatRequest.model_validate(body).tool_list()
    assert made.definition["function"]["parameters"] == meant
    response = service.chat("weather", tools=[tool(), tool("odd", parameters=schema)])
    assert called(message_of(response)) == [("get_weather", PARIS)]
    assert "x-ignored-params" not in response.headers
    assert json.dumps(schema) == before


def test_a_schema_that_is_nested_too_deeply_is_a_400() -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(900):
        schema = of_a(schema)
    body = {"messages": [{"role": "user", "content": "Hi"}], "model": "light",
            "tools": [tool(parameters=schema)]}  # fmt: skip
    with pytest.raises(BadRequest, match="too deeply") as caught:
        ChatRequest.model_validate(body).tool_list()
    assert caught.value.param == "tools[0].function.parameters"


@pytest.mark.parametrize(
    "parameters",
    [None, {}, {"properties": {}}, {"type": "object", "properties": {}}, {"properties": None}],
)
def test_a_function_may_have_no_parameters(service: Service, parameters: Any) -> None:
    response = service.chat(tools=[tool(parameters=parameters)], tool_choice="required")
    ((_, arguments),) = called(message_of(response))
    assert json.loads(arguments) == {}


def test_undeclared_arguments_are_written_only_where_they_may_be(service: Service) -> None:
    for schema, names in (
        ({"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]}, {"a"}),
        ({"type": "object", "additionalProperties": {"type": "null"}}, {""}),
        ({"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a", "b"]},
         {"a", "b"}),
        ({"type": "object", "properties": {}, "required": ["b", "b"]}, {"b"}),
    ):  # fmt: skip
        for strict in (False, True):
            functions = [tool(parameters=schema, strict=strict)]
            response = service.chat(tools=functions, tool_choice="required")
            ((_, arguments),) = called(message_of(response))
            assert json.loads(arguments).keys() == names


@pytest.mark.parametrize("strict", [False, True])
def test_arguments_are_an_object_whatever_else_they_may_be(service: Service, strict: bool) -> None:
    schema = {"type": ["null", "object"], "properties": {"a": {"type": "null"}}, "required": ["a"]}
    body = {"messages": [{"role": "user", "content": "Hi"}], "model": "light",
            "tools": [tool(parameters=schema, strict=strict)]}  # fmt: skip
    (made,) = ChatRequest.model_validate(body).tool_list()
    assert json.loads(made.arguments.text)["type"] == "object"
    assert made.definition["function"]["parameters"] == {**schema, "type": "object"}
    response = service.chat(tools=body["tools"], tool_choice="required")
    ((_, arguments),) = called(message_of(response))
    assert json.loads(arguments) == {"a": None}


@pytest.mark.parametrize("parameters", [None, {}, {"type": "object"}, {"$ref": "#/$defs/a"}])
def test_templates_find_the_properties_of_every_function(parameters: dict[str, Any] | None) -> None:
    """Those of Seed and others look for them."""
    body = {"messages": [{"role": "user", "content": "Hi"}], "model": "light",
            "tools": [tool(parameters=parameters)]}  # fmt: skip
    (made,) = ChatRequest.model_validate(body).tool_list()
    assert made.definition["function"]["parameters"]["properties"] == {}


@pytest.mark.parametrize(
    "calls",
    [[{}], [{"function": {}}], [{"function": {"name": 5}}], "x",
     [{"id": 5, "function": {"name": "f"}}],
     [{"type": "custom", "function": {"name": "f", "arguments": ""}}]],
    ids=json.dumps,
)  # fmt: skip
def test_half_a_call_in_the_history_is_a_400(service: Service, calls: Any) -> None:
    messages = [{"role": "assistant", "tool_calls": calls}, {"role": "user", "content": "Hi"}]
    body = {"model": "light", "messages": messages}
    error = error_of(service.http.post("/v1/chat/completions", json=body))
    assert error["param"].startswith("messages[0].tool_calls")


@pytest.mark.parametrize("arguments", ["", "no json", "[1]", "{"])
def test_odd_arguments_in_the_history_are_the_models_to_read(
    service: Service, arguments: str
) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "done"},
    ]
    body = {"model": "light", "messages": messages}
    assert (
        message_of(service.http.post("/v1/chat/completions", json=body))["content"] == "It rains."
    )
