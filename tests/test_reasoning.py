"""Thoughts over HTTP: apart from the text, counted, bounded, and before every other rule."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import pytest

from api.turn import _Reader
from chat.events import Text
from chat.tools.base import Tool
from engine import wire
from tests import chat_formats
from tests.serving import Service, events, fake, script, serving, settings

# Of a model that thinks unless it is told not to, and whose past thoughts are shown.
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
OPEN = TEMPLATE.replace("<|assistant|>", "<|assistant|><think>\n")
ANSWERS = [
    {"match": "city", "answer": '<think>\n{"no": 1}\n</think>\n\n{"city": "Oslo"}'},
    {"match": "weather", "answer": "<think>\nI use <tool_call>.\n</think>\n\n<tool_call>\n"
     '{"name": "get_weather", "arguments": {}}\n</tool_call>'},
    {"match": "open", "answer": "hm, hm\n</think>\n\nFour."},
    {"match": "sum", "answer": "<think>\nhm, hm\n</think>\n\nFour."},
    {"match": "late", "answer": "A <think>tag</think>."},
    {"match": "endless", "answer": "<think>\n" + "hm " * 100},
]  # fmt: skip
MORE_TOOLS = chat_formats.TOOLS
TOOLS = [{"type": "function", "function": {"name": "get_weather"}}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tmp_path_factory.mktemp("reasoning")


@pytest.fixture(scope="module")
def service(folder: Any) -> Iterator[Service]:
    tiers = {
        "light": fake(script(folder, *ANSWERS, template=TEMPLATE), max_tokens=300),
        "medium": fake(script(folder, *ANSWERS, template=OPEN), max_tokens=300),
        "heavy": fake(script(folder, *ANSWERS), max_tokens=300),
    }
    with serving(settings(**tiers)) as service:
        yield service


def answer(response: httpx.Response) -> Any:
    assert response.status_code == 200, response.text
    body = response.json()
    return body["choices"][0]["message"], body["usage"]["completion_tokens_details"]


def error(response: httpx.Response) -> Any:
    assert response.status_code == 400, response.text
    return response.json()["error"]


def test_thoughts_are_apart_from_the_text_and_counted(service: Service) -> None:
    message, details = answer(service.chat("sum"))
    assert message["content"] == "Four."
    assert message["reasoning_content"] == "hm, hm"
    assert details == {"reasoning_tokens": len("<think>\nhm, hm\n</think>")}


def test_a_prompt_may_end_inside_of_thoughts(service: Service) -> None:
    message, details = answer(service.chat("open", model="medium"))
    assert (message["reasoning_content"], message["content"]) == ("hm, hm", "Four.")
    assert details == {"reasoning_tokens": len("hm, hm\n</think>")}


def test_what_stands_around_thoughts_has_no_log_probabilities(service: Service) -> None:
    for n_tokens in (8, len("<think>\nhm, hm\n</think>\n")):
        body = service.chat("sum", logprobs=True, max_tokens=n_tokens).json()
        assert body["choices"][0]["logprobs"]["content"] == []


def test_streamed_thoughts_come_first_in_a_field_of_their_own(service: Service) -> None:
    chunks = events(service.chat("sum", stream=True))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    kinds = [next(iter(delta), None) for delta in deltas[1:-1]]
    assert kinds == sorted(kinds, reverse=True)
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "hm, hm"
    assert "".join(delta.get("content", "") for delta in deltas) == "Four."


def test_an_answer_without_thoughts_is_text_and_a_late_tag_too(service: Service) -> None:
    for text, said in (("Hi", "You said: Hi"), ("late", "A <think>tag</think>.")):
        message, details = answer(service.chat(text))
        assert message["content"] == said
        assert "reasoning_content" not in message
        assert details == {"reasoning_tokens": 0}


def test_a_model_that_does_not_think_keeps_its_tags(service: Service) -> None:
    message, _ = answer(service.chat("sum", model="heavy"))
    assert message["content"].startswith("<think>")


def test_a_form_is_that_of_the_answer_and_not_of_the_thoughts(service: Service) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    form = {"type": "json_schema", "json_schema": {"schema": schema}}
    response = service.chat("city", response_format=form)
    message, _ = answer(response)
    assert json.loads(message["content"]) == {"city": "Oslo"}
    assert message["reasoning_content"] == '{"no": 1}'
    assert response.json()["choices"][0]["schema_valid"] is True


def test_a_tag_of_calls_in_thoughts_calls_nothing(service: Service) -> None:
    message, _ = answer(service.chat("weather", tools=TOOLS))
    assert message["reasoning_content"] == "I use <tool_call>."
    (call,) = message["tool_calls"]
    assert call["function"]["name"] == "get_weather"


def test_stop_strings_count_after_the_thoughts(service: Service) -> None:
    message, _ = answer(service.chat("sum", stop=["hm", "r."]))
    assert (message["reasoning_content"], message["content"]) == ("hm, hm", "Fou")


def test_thoughts_may_take_so_many_tokens(service: Service) -> None:
    for n_tokens in (0, 6):
        message, details = answer(service.chat("endless", thinking_budget_tokens=n_tokens))
        assert len(message.get("reasoning_content", "")) <= n_tokens
        assert details["reasoning_tokens"] <= len("<think>\n") + n_tokens + len("\n</think>\n\n")


def test_thoughts_can_be_switched_off_by_the_template(service: Service) -> None:
    for fields in (
        {"reasoning_effort": "none"},
        {"chat_template_kwargs": {"enable_thinking": False}},
    ):
        response = service.chat("sum", **fields)
        n_more = len("<think>\n\n</think>\n\n")
        plain = service.chat("sum").json()["usage"]["prompt_tokens"]
        assert response.json()["usage"]["prompt_tokens"] == plain + n_more
        assert "reasoning_content" not in response.json()["choices"][0]["message"]


@pytest.mark.parametrize("effort", ["minimal", "low", "medium", "high", "xhigh"])
def test_an_effort_bounds_the_thoughts_and_changes_no_others(service: Service, effort: str) -> None:
    message, _ = answer(service.chat("sum", reasoning_effort=effort))
    assert message["reasoning_content"] == "hm, hm"


@pytest.mark.parametrize(
    "fields", [{"reasoning_effort": "high"}, {"thinking_budget_tokens": 5}], ids=str
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_model_that_does_not_think_goes_without_and_says_so(
    service: Service, fields: dict[str, Any], stream: bool
) -> None:
    reply = service.chat(model="heavy", stream=stream, **fields)
    assert reply.status_code == 200
    assert reply.headers["X-Ignored-Params"] == next(iter(fields))
    messages = [{"role": "user", "content": "Hi"}]
    body = {"model": "heavy", "messages": messages, **fields}
    shown = service.http.post("/apply-template", json=body)
    assert shown.headers["X-Ignored-Params"] == next(iter(fields))
    reply = service.chat(model="heavy", reasoning_effort="none", thinking_budget_tokens=0)
    assert "X-Ignored-Params" not in reply.headers


def test_where_all_must_be_known_no_bound_is_set_on_thoughts_that_there_are_not() -> None:
    with serving(settings({"strict_params": True}, light=fake())) as strict:
        assert error(strict.chat(thinking_budget_tokens=5))["param"] == "thinking_budget_tokens"
        reply = strict.chat(reasoning_effort="high")
        assert reply.headers["X-Ignored-Params"] == "reasoning_effort"


def test_past_thoughts_are_the_templates_affair_under_both_names(service: Service) -> None:
    def n_tokens(**fields: str) -> int:
        past = {"role": "assistant", "content": "Four."} | fields
        messages = [{"role": "user", "content": "sum"}, past, {"role": "user", "content": "Hi"}]
        body = {"model": "light", "messages": messages}
        reply = service.http.post("/v1/chat/completions", json=body).json()
        return int(reply["usage"]["prompt_tokens"])

    shown = n_tokens(reasoning_content="hm, hm")
    assert shown == n_tokens(reasoning="hm, hm")
    assert shown == n_tokens() + len("<think>hm, hm</think>")


def test_log_probabilities_are_not_of_thoughts(service: Service) -> None:
    choice = service.chat("sum", logprobs=True).json()["choices"][0]
    tokens = [token["token"] for token in choice["logprobs"]["content"]]
    assert "".join(tokens) == "Four."


def test_a_stream_tells_log_probabilities_once(folder: Any) -> None:
    """Also where one token makes two texts: the end of the thoughts, and what comes after it."""
    tier = fake(script(folder, *ANSWERS, template=TEMPLATE))
    with serving(settings({"reasoning_field": "none"}, light=tier)) as service:
        whole = service.chat("sum", logprobs=True).json()["choices"][0]["logprobs"]["content"]
        chunks = events(service.chat("sum", logprobs=True, stream=True))
        told = [chunk["choices"][0]["logprobs"] for chunk in chunks]
        assert [entry for part in told if part for entry in part["content"]] == whole
        body = {"input": "sum", "include": ["message.output_text.logprobs"], "model": "light"}
        (message,) = service.http.post("/v1/responses", json=body).json()["output"]
        (text,) = message["content"]
        assert [entry["token"] for entry in text["logprobs"]] == [e["token"] for e in whole]


@pytest.mark.parametrize("field", ["reasoning", "both", "none"])
@pytest.mark.parametrize("stream", [False, True])
def test_the_field_of_the_thoughts_is_a_setting(folder: Any, field: str, stream: bool) -> None:
    tier = fake(script(folder, *ANSWERS, template=TEMPLATE))
    with serving(settings({"reasoning_field": field}, light=tier)) as service:
        response = service.chat("sum", stream=stream)
    if stream:
        message: dict[str, str] = {}
        for chunk in events(response):
            for name, text in chunk["choices"][0]["delta"].items():
                message[name] = message.get(name, "") + text
    else:
        message, _ = answer(response)
    names = {name for name in message if name.startswith("reasoning")}
    if field == "none":
        assert message["content"] == "<think>\nhm, hm\n</think>\n\nFour."
        assert names == set()
    else:
        assert names == ({"reasoning", "reasoning_content"} if field == "both" else {field})
        assert all(message[name] == "hm, hm" for name in names)


@pytest.mark.parametrize(
    ("template", "tools", "tokens", "said", "told"),
    [
        ("qwen3", (), ["Hm", "</think>", "\n\n", " Four", "."], "Four.", ["Four", "."]),
        ("qwen3", (), ["Hm", "</think>", "\n\nFour", "."], "Four.", ["Four", "."]),
        ("qwen2_5", MORE_TOOLS, ["cout<<", "\n", "x"], "cout<<\nx", ["cout<<", "\n", "x"]),
        ("qwen2_5", MORE_TOOLS, ["if (<", " ", "5"], "if (< 5", ["if (<", " ", "5"]),
        ("mistral_v11", MORE_TOOLS, ["f([", "\n", "1])"], "f([\n1])", ["f([", "\n", "1])"]),
    ],
)
def test_tokens_add_up_to_the_text_wherever_it_is_held_back(
    template: str, tools: Sequence[Tool], tokens: Sequence[str], said: str, told: Sequence[str]
) -> None:
    splitter = chat_formats.prompt(template, chat_formats.user("Hi"), tools).splitter()
    if "</think>" in tokens:
        splitter.feed("<think>")
    reader = _Reader(splitter, splitter, has_client_grammar=False)
    outs = [
        reader.read(
            0, wire.TokenOut(1, one, logprobs=[wire.TokenLogprob(one.encode(), one, -1.0, [])])
        )
        for one in tokens
    ]
    outs.append(reader.read(0, wire.TokenOut(1, "", wire.Done("stop", 0))))
    texts = [event.text for out in outs for event in out.events if isinstance(event, Text)]
    assert "".join(texts) == said
    assert [one.text for out in outs for one in out.logprobs] == told
