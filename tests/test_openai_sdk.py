"""What applications use: the OpenAI SDK, sync, async and streaming, against the service."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pydantic
import pytest
from openai.types.chat import ChatCompletionMessageParam

from tests.serving import THINKING_TEMPLATE, Service, fake, script, serving, settings

HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    path = script(
        tmp_path_factory.mktemp("sdk"),
        {"match": "break", "answer": "half of it", "fault": "step", "after": 4},
        {"match": "a city", "answer": '{"name": "Paris", "is_old": true}'},
    )
    with serving(settings(light=fake(path, n_ctx=64))) as service:
        yield service


@pytest.fixture
def client(service: Service) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture
def thinker(tmp_path: Path) -> Iterator[openai.OpenAI]:
    """A model that thinks, then calls."""
    answer = "<think>\nHm.\n</think>\n\nLet me look.\n<tool_call>\n"
    answer += '{"name": "GetWeather", "arguments": {"city": "Paris"}}\n</tool_call>'
    path = script(tmp_path, {"match": "weather", "answer": answer}, template=THINKING_TEMPLATE)
    with (
        serving(settings(light=fake(path))) as service,
        openai.OpenAI(base_url=f"{service.url}/v1", api_key="any", max_retries=0) as client,
    ):
        yield client


def test_a_whole_answer(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="light", messages=HELLO)
    assert reply.choices[0].message.content == "You said: Hello"
    assert reply.usage
    assert reply.usage.prompt_tokens_details
    assert reply.usage.total_tokens == 8 + 16


def test_a_stream_with_usage(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="light", messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == "You said: Hello"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage
    assert chunks[-1].usage.completion_tokens == 16


def test_the_streaming_helper(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="light", messages=HELLO) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "You said: Hello"


class GetWeather(pydantic.BaseModel):
    city: str


class City(pydantic.BaseModel):
    name: str
    is_old: bool


def test_parsed_answers(client: openai.OpenAI) -> None:
    reply = client.chat.completions.parse(
        model="light", messages=[{"role": "user", "content": "a city"}], response_format=City
    )
    assert reply.choices[0].message.parsed == City(name="Paris", is_old=True)


def test_a_whole_response(client: openai.OpenAI) -> None:
    reply = client.responses.create(model="light", input="Hello", instructions="Be brief.")
    assert reply.output_text == "You said: Hello"
    assert reply.status == "completed"
    assert reply.usage
    assert reply.usage.output_tokens == 16


def test_a_streamed_response_with_its_helper(client: openai.OpenAI) -> None:
    with client.responses.stream(model="light", input="Hello") as stream:
        told = list(stream)
        final = stream.get_final_response()
    deltas = [event for event in told if event.type == "response.output_text.delta"]
    assert deltas[-1].snapshot == final.output_text == "You said: Hello"
    assert told[-1].type == "response.completed"


def test_parsed_responses(client: openai.OpenAI) -> None:
    reply = client.responses.parse(model="light", input="a city", text_format=City)
    assert reply.output_parsed == City(name="Paris", is_old=True)
    with client.responses.stream(model="light", input="a city", text_format=City) as stream:
        assert stream.get_final_response().output_parsed == City(name="Paris", is_old=True)


def test_a_loop_of_thoughts_and_tools(thinker: openai.OpenAI) -> None:
    tool: Any = openai.pydantic_function_tool(GetWeather)
    conversation: list[Any] = [{"role": "user", "content": "weather?"}]
    reply = thinker.responses.parse(model="light", input=conversation, tools=[tool])
    thoughts, message, call = reply.output
    assert thoughts.type == "reasoning"
    assert thoughts.content
    assert thoughts.content[0].text == "Hm."
    assert message.type == "message"
    assert call.type == "function_call"
    assert call.parsed_arguments == GetWeather(city="Paris")
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "12 C"}
    for items in (reply.output, [item.to_dict() for item in reply.output]):
        more = [*conversation, *items, result]
        reply = thinker.responses.parse(model="light", input=more, tools=[tool])
        assert reply.output_text == "You said: 12 C"
    with thinker.responses.stream(model="light", input=conversation, tools=[tool]) as stream:
        call = stream.get_final_response().output[-1]
    assert call.type == "function_call"
    assert call.parsed_arguments == GetWeather(city="Paris")


def test_a_response_that_breaks_off_raises(client: openai.OpenAI) -> None:
    told = []
    with pytest.raises(openai.APIError, match="The model failed") as broken:  # noqa: PT012
        for event in client.responses.create(model="light", input="break", stream=True):
            told.append(event.type)  # noqa: PERF401
    assert told[-1] == "response.failed"
    assert broken.value.code == "internal_error"


def test_raw_completions(client: openai.OpenAI) -> None:
    reply = client.completions.create(model="light", prompt=["a", "b"])
    assert [choice.text for choice in reply.choices] == ["You said: a", "You said: b"]
    chunks = client.completions.create(model="light", prompt="c", stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "You said: c"
    reply = client.completions.create(model="light", prompt="a", suffix="b", echo=True)
    assert reply.choices[0].text == "aYou said: ab"


def test_a_place_in_the_queue_and_fields_that_openai_keeps(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="light", messages=HELLO, service_tier="flex", store=True, metadata={"run": "7"},
        extra_body={"priority": 3, "mirostat": 2},
    )  # fmt: skip
    assert reply.service_tier == "flex"
    assert reply.choices[0].message.content == "You said: Hello"


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["light"]
    assert client.models.retrieve("light").owned_by == "quintet"


def test_errors_are_the_sdks_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist") as missing:
        client.chat.completions.create(model="gpt-9", messages=HELLO)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="light", messages=HELLO, modalities=["audio"])
    assert (refused.value.code, refused.value.param) == ("unsupported_parameter", "modalities")
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="light", prompt="x" * 99, stream=True)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.APIError, match="The model failed"):
        list(client.completions.create(model="light", prompt="break", stream=True))


def test_async_and_sixteen_at_once(service: Service) -> None:
    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="any") as client:

            async def one(i: int) -> str:
                stream = await client.chat.completions.create(
                    model="light", messages=[{"role": "user", "content": f"{i}"}], stream=True
                )
                return "".join([c.choices[0].delta.content or "" async for c in stream])

            return await asyncio.gather(*map(one, range(16)))

    assert asyncio.run(main()) == [f"You said: {i}" for i in range(16)]
