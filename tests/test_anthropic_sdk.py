"""What applications use: the Anthropic SDK, sync, async and streaming, against the service."""

import asyncio
from collections.abc import Iterator
from typing import Any

import anthropic
import pydantic
import pytest

from tests.serving import THINKING_TEMPLATE, Service, fake, script, serving, settings

ANSWER = """<think>
Hm.
</think>

Let me look.
<tool_call>
{"name": "get_weather", "arguments": {"city": "Paris"}}
</tool_call>"""
WEATHER: Any = {
    "name": "get_weather",
    "description": "The weather in a city",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    },
}


def asked(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    path = script(
        tmp_path_factory.mktemp("sdk"),
        {"match": "weather", "answer": ANSWER},
        {"match": "break", "answer": "half of it", "fault": "step", "after": 4},
        {"match": "a city", "answer": '{"name": "Paris", "is_old": true}'},
        template=THINKING_TEMPLATE,
    )
    with serving(settings(light=fake(path, n_ctx=512))) as service:
        yield service


@pytest.fixture
def client(service: Service) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=service.url, api_key="any", max_retries=0) as client:
        yield client


def test_a_whole_message(client: anthropic.Anthropic) -> None:
    reply = client.messages.create(model="light", max_tokens=99, messages=asked("Hello"))
    (block,) = reply.content
    assert block.type == "text"
    assert block.text == "You said: Hello"
    assert reply.stop_reason == "end_turn"
    assert reply.usage.output_tokens == 16
    assert reply._request_id
    anthropic.types.Message.model_validate(reply.to_dict())  # every required field is there


def test_a_stream(client: anthropic.Anthropic) -> None:
    with client.messages.stream(model="light", max_tokens=99, messages=asked("Hello")) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == "You said: Hello"
    assert final.stop_reason == "end_turn"
    assert final.usage.output_tokens == 16


@pytest.mark.parametrize("streams", [False, True])
def test_a_loop_of_thoughts_and_tools(client: anthropic.Anthropic, streams: bool) -> None:
    def ask(messages: list[Any]) -> anthropic.types.Message:
        fields: Any = {"model": "light", "max_tokens": 300, "tools": [WEATHER]}
        if not streams:
            return client.messages.create(messages=messages, **fields)
        with client.messages.stream(messages=messages, **fields) as stream:
            return stream.get_final_message()

    conversation = asked("weather?")
    reply = ask(conversation)
    thoughts, _, call = reply.content
    assert thoughts.type == "thinking"
    assert thoughts.thinking == "Hm."
    assert call.type == "tool_use"
    assert (call.name, call.input) == ("get_weather", {"city": "Paris"})
    assert reply.stop_reason == "tool_use"
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "12 C"}
    reply = ask([*conversation, reply.to_param(), {"role": "user", "content": [result]}])
    assert reply.content[0].type == "text"
    assert reply.content[0].text == "You said: 12 C"


def test_the_tool_runner(client: anthropic.Anthropic) -> None:
    cities = []

    @anthropic.beta_tool
    def get_weather(city: str) -> str:
        """The weather in a city"""
        cities.append(city)
        return "12 C"

    runner = client.beta.messages.tool_runner(
        model="light", max_tokens=300, messages=asked("weather?"), tools=[get_weather]
    )
    *_, last = runner
    assert cities == ["Paris"]
    assert last.content[0].type == "text"
    assert last.content[0].text == "You said: 12 C"


class City(pydantic.BaseModel):
    name: str
    is_old: bool


def test_parsed_messages(client: anthropic.Anthropic) -> None:
    reply = client.messages.parse(
        model="light", max_tokens=300, messages=asked("a city"), output_format=City
    )
    assert reply.parsed_output == City(name="Paris", is_old=True)


def test_tokens_are_counted(client: anthropic.Anthropic) -> None:
    counted = client.messages.count_tokens(model="light", messages=asked("Hello"))
    assert counted.input_tokens == 8


def test_errors_are_the_sdks_own(client: anthropic.Anthropic) -> None:
    fields: Any = {"model": "light", "max_tokens": 99}
    with pytest.raises(anthropic.NotFoundError, match="does not exist") as missing:
        client.messages.create(**fields | {"model": "gpt-9"}, messages=asked("Hello"))
    assert missing.value.type == "not_found_error"
    assert missing.value.request_id
    image: Any = {"type": "image", "source": {"type": "url", "url": "http://x"}}
    with pytest.raises(anthropic.BadRequestError, match=r"messages\[0\]") as refused:
        client.messages.create(**fields, messages=[{"role": "user", "content": [image]}])
    assert refused.value.type == "invalid_request_error"
    with pytest.raises(anthropic.APIStatusError, match="The model failed") as broken:
        list(client.messages.create(**fields, messages=asked("break"), stream=True))
    assert broken.value.type == "api_error"


def test_async_and_sixteen_at_once(service: Service) -> None:
    async def main() -> list[str]:
        async with anthropic.AsyncAnthropic(base_url=service.url, api_key="any") as client:

            async def one(i: int) -> str:
                fields: Any = {"model": "light", "max_tokens": 99, "messages": asked(f"{i}")}
                async with client.messages.stream(**fields) as stream:
                    return "".join([text async for text in stream.text_stream])

            return await asyncio.gather(*map(one, range(16)))

    assert asyncio.run(main()) == [f"You said: {i}" for i in range(16)]


def test_models_are_listed(client: anthropic.Anthropic) -> None:
    (model,) = client.models.list()
    assert (model.id, model.type, model.display_name) == ("light", "model", "light")
    assert model.created_at.year >= 1970
    assert client.models.retrieve("light").id == "light"
