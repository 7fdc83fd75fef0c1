"""Small models through the SDK: what must hold whatever they say. Structure, never meaning."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import jsonschema
import openai
import pydantic
import pytest

from engine.client import launch_process
from settings import TierSettings
from tests.engines import needs_mlx
from tests.serving import serving, settings

pytestmark = pytest.mark.real

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "strict": True,
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "maxLength": 20},
                    "unit": {"enum": ["celsius", "kelvin"]},
                    "days": {"type": "integer", "minimum": 1, "maximum": 14},
                },
                "required": ["city", "unit"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("get_weather", "get_überblick")
]


@pytest.fixture(scope="module", params=["smollm2", pytest.param("tiny_mlx", marks=needs_mlx)])
def client(request: pytest.FixtureRequest) -> Iterator[openai.OpenAI]:
    path = str(request.getfixturevalue(request.param))
    tier = TierSettings(model_path=path, n_ctx=2048, kv_tokens=4096)
    with (
        serving(settings(light=tier), launch=launch_process) as service,
        openai.OpenAI(base_url=f"{service.url}/v1", api_key="any", max_retries=0) as client,
    ):
        yield client


class Person(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=20)
    age: int = pydantic.Field(ge=0, le=150)
    likes: list[Annotated[str, pydantic.Field(max_length=20)]] = pydantic.Field(max_length=3)


def test_a_parsed_answer_is_the_model_it_was_asked_for(client: openai.OpenAI) -> None:
    reply = client.chat.completions.parse(
        model="light",
        messages=[{"role": "user", "content": "Invent a person."}],
        response_format=Person,
        seed=1,
        max_tokens=300,
    )
    choice = reply.choices[0]
    if choice.finish_reason == "stop":
        assert isinstance(choice.message.parsed, Person)
    assert choice.schema_valid == (choice.finish_reason == "stop")  # type: ignore[attr-defined]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "get_überblick"}}], ids=str
)
def test_a_forced_call_is_valid(client: openai.OpenAI, choice: object, seed: int) -> None:
    with client.chat.completions.stream(
        model="light",
        messages=[{"role": "user", "content": "What is the weather in Paris?"}],
        tools=TOOLS,
        tool_choice=choice,
        parallel_tool_calls=False,
        seed=seed,
        max_tokens=200,
    ) as stream:
        reply = stream.get_final_completion().choices[0]
    assert reply.finish_reason == "tool_calls"
    assert not reply.message.content
    (call,) = reply.message.tool_calls or ()
    schemas = {t["function"]["name"]: t["function"]["parameters"] for t in TOOLS}
    if isinstance(choice, dict):
        assert call.function.name == "get_überblick"
    jsonschema.validate(json.loads(call.function.arguments), schemas[call.function.name])


@pytest.mark.parametrize(
    "tool_format",
    ["qwen3-coder", "minimax-m2", "minicpm5", "glm", "gemma4", "kimi-k2", "lfm2", "command"],
)
def test_a_call_in_another_form_is_valid(smollm2: Path, tool_format: str) -> None:
    tier = TierSettings(
        model_path=str(smollm2), n_ctx=2048, kv_tokens=4096, tool_format=tool_format
    )
    with (
        serving(settings(light=tier), launch=launch_process) as service,
        openai.OpenAI(base_url=f"{service.url}/v1", api_key="any", max_retries=0) as client,
    ):
        for choice in ("required", {"type": "function", "function": {"name": "get_überblick"}}):
            test_a_forced_call_is_valid(client, choice, seed=1)


@pytest.mark.parametrize("seed", range(2))
def test_whatever_the_model_chooses_is_text_or_valid_calls(
    client: openai.OpenAI, seed: int
) -> None:
    reply = client.chat.completions.create(
        model="light",
        messages=[{"role": "user", "content": "Use get_weather for Paris."}],
        tools=TOOLS,
        seed=seed,
        max_tokens=150,
    ).choices[0]
    assert reply.message.content or reply.message.tool_calls
    if reply.finish_reason != "length":
        for call in reply.message.tool_calls or ():
            arguments = json.loads(call.function.arguments)
            jsonschema.validate(arguments, TOOLS[0]["function"]["parameters"])


def test_the_same_seed_gives_the_same_call_whatever_was_asked_before(
    client: openai.OpenAI,
) -> None:
    def call() -> str:
        reply = client.chat.completions.create(
            model="light",
            messages=[{"role": "user", "content": "Paris?"}],
            tools=TOOLS,
            tool_choice="required",
            seed=7,
            max_tokens=100,
        )
        return str(reply.choices[0].message.tool_calls[0].function)

    assert call() == call()


def test_the_seed_that_the_server_chose_repeats_the_answer(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "Say something."}]
    raw = client.chat.completions.with_raw_response.create(
        model="light", messages=messages, max_tokens=16, extra_body={"cache_prompt": False}
    )
    again = client.chat.completions.create(
        model="light", messages=messages, max_tokens=16, seed=int(raw.headers["x-seed"])
    )
    assert raw.parse().choices[0].message.content == again.choices[0].message.content
