"""What agents are built with, against the service: tool loops, forced tools, structured answers."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pydantic
import pytest
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from openai.types.chat import ChatCompletionMessageParam
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

from tests.serving import Service, fake, script, serving, settings

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
QUESTION = "What is the weather in Paris?"


class City(pydantic.BaseModel):
    name: str
    is_old: bool


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    path = script(
        tmp_path_factory.mktemp("clients"),
        {"match": "rain in Paris", "answer": "It rains in Paris."},
        {"match": "weather", "answer": f"Let me look.\n{CALL}"},
        {"match": "a city", "answer": '{"name": "Paris", "is_old": true}'},
    )
    with serving(settings(light=fake(path))) as service:
        yield service


@pytest.fixture
def client(service: Service) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture
def langchain(service: Service) -> ChatOpenAI:
    return ChatOpenAI(
        model="light", base_url=f"{service.url}/v1", api_key="any", max_retries=0, stream_usage=True
    )


@tool
def get_weather(city: str) -> str:
    """The weather in a city."""
    return f"rain in {city}"


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def test_openais_helper_puts_streamed_calls_together(client: openai.OpenAI) -> None:
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": QUESTION}]
    with client.chat.completions.stream(
        model="light", messages=messages, tools=[WEATHER]
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert "tool_calls.function.arguments.delta" in kinds
    assert kinds.count("tool_calls.function.arguments.done") == 1
    message = final.choices[0].message
    assert message.content == "Let me look."
    assert message.tool_calls
    assert message.tool_calls[0].function.parsed_arguments == {"city": "Paris"}
    messages += [
        message.to_dict(),
        {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain in Paris"},
    ]
    reply = client.chat.completions.create(model="light", messages=messages, tools=[WEATHER])
    assert reply.choices[0].message.content == "It rains in Paris."


def test_openai_parses_calls_by_their_models(client: openai.OpenAI) -> None:
    reply = client.chat.completions.parse(
        model="light",
        messages=[{"role": "user", "content": "a city"}],
        tools=[openai.pydantic_function_tool(City, name="show_city")],
        tool_choice="required",
    )
    (call,) = reply.choices[0].message.tool_calls or ()
    assert isinstance(call.function.parsed_arguments, City)


def test_langchain_tool_loop(langchain: ChatOpenAI) -> None:
    model = langchain.bind_tools([get_weather])
    history = [HumanMessage(QUESTION)]
    asked = model.invoke(history)
    (call,) = asked.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Paris"})
    result = get_weather.invoke(call)
    assert isinstance(result, ToolMessage)
    assert model.invoke([*history, asked, result]).content == "It rains in Paris."


def test_langchain_streamed_tool_calls(langchain: ChatOpenAI) -> None:
    chunks = list(langchain.bind_tools([get_weather]).stream(QUESTION))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert [(c["name"], c["args"]) for c in whole.tool_calls] == [
        ("get_weather", {"city": "Paris"})
    ]
    assert whole.usage_metadata
    assert whole.usage_metadata["output_tokens"] > 0


def test_langchain_forced_tool(langchain: ChatOpenAI) -> None:
    model = langchain.bind_tools([get_weather], tool_choice="get_weather", strict=True)
    (call,) = model.invoke("Hi").tool_calls
    assert call["args"].keys() == {"city"}


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
def test_langchain_structured_output(langchain: ChatOpenAI, method: str) -> None:
    model = langchain.with_structured_output(City, method=method)
    assert isinstance(model.invoke("a city"), City)


def run(service: Service, question: str, **agent: Any) -> Any:
    """What an agent of pydantic-ai makes of a question."""

    async def main() -> Any:
        async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="any") as client:
            model = OpenAIChatModel("light", provider=OpenAIProvider(openai_client=client))
            return (await Agent(model, **agent).run(question)).output

    return asyncio.run(main())


def test_pydantic_ai_tool_loop(service: Service) -> None:
    asked = []

    def get_weather(city: str) -> str:
        asked.append(city)
        return f"rain in {city}"

    assert run(service, QUESTION, tools=[get_weather]) == "It rains in Paris."
    assert asked == ["Paris"]


def test_pydantic_ai_structured_output(service: Service) -> None:
    for output_type in (City, NativeOutput(City)):
        assert isinstance(run(service, "a city", output_type=output_type), City)


def test_arguments_are_text_of_json(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="light", messages=[{"role": "user", "content": QUESTION}], tools=[WEATHER]
    )
    (call,) = reply.choices[0].message.tool_calls or ()
    assert json.loads(call.function.arguments) == {"city": "Paris"}
