"""What applications use: the OpenAI SDK, sync, async and streaming, against the service."""

import asyncio
from collections.abc import Iterator

import openai
import pydantic
import pytest
from openai.types.chat import ChatCompletionMessageParam

from tests.serving import Service, fake, script, serving, settings

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


class City(pydantic.BaseModel):
    name: str
    is_old: bool


def test_parsed_answers(client: openai.OpenAI) -> None:
    reply = client.chat.completions.parse(
        model="light", messages=[{"role": "user", "content": "a city"}], response_format=City
    )
    assert reply.choices[0].message.parsed == City(name="Paris", is_old=True)


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
