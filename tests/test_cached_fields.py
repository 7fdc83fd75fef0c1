"""Every field of a request either is in the key of what is remembered, or changes nothing of it.

A new field is entered here: with a value that makes another answer, or among those that make none.
"""

from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel

from api.chat_request import ChatRequest
from api.completions import CompletionRequest
from api.embeddings import EmbeddingRequest
from api.messages_request import MessagesRequest
from api.rerank import RerankRequest, ScoreRequest
from api.responses_request import ResponsesRequest
from api.tei import EmbedRequest, SparseRequest
from tests.serving import THINKING_TEMPLATE, Service, fake, remembering, script, serving
from tests.test_docs import fates, read

FUNCTION = {"name": "f", "parameters": {"type": "object"}}
TOOL = {"type": "function", "function": FUNCTION}
USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "You"}

PAIRED = {"queries": None, "documents": None, "text_1": ["a"], "text_2": ["c"]}

# With each of them another answer is made.
SAMPLING: dict[str, Any] = {
    "temperature": 0.5, "top_p": 0.5, "top_k": 7, "min_p": 0.2, "repeat_penalty": 1.5,
    "repeat_last_n": 5, "typical_p": 0.5, "xtc_probability": 0.5, "xtc_threshold": 0.3,
    "mirostat": 1, "mirostat_tau": 2, "mirostat_eta": 0.5, "dry_multiplier": 1, "dry_base": 2,
    "dry_allowed_length": 5, "dry_penalty_last_n": 9, "dry_sequence_breakers": ["x"],
    "min_tokens": 3, "ignore_eos": True, "frequency_penalty": 1, "presence_penalty": 1, "seed": 8,
    "stop": "said", "logit_bias": {"89": 1}, "response_format": {"type": "json_object"},
    "grammar": 'start: "a"', "max_tokens": 7, "cache_prompt": True, "n": 2, "logprobs": True,
}  # fmt: skip
# Who asks, when it is served, and how it is told.
TELLING: dict[str, Any] = {
    "stream": True, "timings": True, "user": "me", "priority": -5, "service_tier": "flex",
    "keep_alive": "5m",
}  # fmt: skip
KEPT_ELSEWHERE: dict[str, Any] = {
    "metadata": {"a": "b"}, "prompt_cache_key": "k", "prompt_cache_retention": "24h",
    "prompt_cache_options": {}, "safety_identifier": "s", "store": True,
}  # fmt: skip


class Route:
    """A request, and what becomes of it where one field is another. A field with `also` needs these
    beside it, which alone were asked before."""

    def __init__(
        self,
        path: str,
        model: type[BaseModel],
        base: dict[str, Any],
        *,
        decides: dict[str, Any],
        is_told: dict[str, Any],
        also: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        self.path = path
        self.model = model
        self.base = base
        self.decides = decides
        self.is_told = is_told
        self.also = also or {}


ROUTES = [
    Route(
        "/v1/chat/completions",
        ChatRequest,
        {"model": "light", "messages": [USER], "seed": 1, "max_tokens": 30},
        decides={
            **SAMPLING,
            "model": "medium",
            "messages": [USER, ASSISTANT, USER],
            "tools": [TOOL],
            "tool_choice": "required",
            "parallel_tool_calls": False,
            "reasoning_effort": "none",
            "thinking_budget_tokens": 5,
            "chat_template_kwargs": {"enable_thinking": False},
            "continue_final_message": True,
            "max_completion_tokens": 9,
            "top_logprobs": 3,
        },
        is_told={
            **TELLING,
            **KEPT_ELSEWHERE,
            "stream_options": {"include_usage": True},
            "add_generation_prompt": True,
            "truncate": "middle",
        },
        also={
            "tool_choice": {"tools": [TOOL]},
            "parallel_tool_calls": {"tools": [TOOL]},
            "continue_final_message": {"messages": [USER, ASSISTANT]},
            "top_logprobs": {"logprobs": True},
            "max_completion_tokens": {"max_tokens": None},
            "stream_options": {"stream": True},
        },
    ),
    Route(
        "/v1/completions",
        CompletionRequest,
        {"model": "light", "prompt": "Hi", "seed": 1, "max_tokens": 30},
        decides={
            **SAMPLING,
            "model": "medium",
            "prompt": ["Hi", "Hi"],
            "suffix": "end",
            "logprobs": 2,
            "best_of": 3,
        },
        is_told={**TELLING, "stream_options": {"include_usage": True}, "echo": True},
        also={"stream_options": {"stream": True}},
    ),
    Route(
        "/v1/responses",
        ResponsesRequest,
        {"model": "light", "input": "Hi", "temperature": 0, "max_output_tokens": 30},
        decides={
            "model": "medium",
            "input": "Ho",
            "instructions": "Be brief.",
            "max_output_tokens": 20,
            "temperature": 0.00001,
            "top_p": 0.5,
            "tools": [{"type": "function", **FUNCTION}],
            "tool_choice": "required",
            "parallel_tool_calls": False,
            "text": {"format": {"type": "json_object"}},
            "reasoning": {"effort": "none"},
            "include": ["message.output_text.logprobs"],
            "top_logprobs": 2,
        },
        is_told={
            **KEPT_ELSEWHERE,
            "max_tool_calls": 3,
            "keep_alive": 60,
            "truncation": "auto",
            "service_tier": "flex",
            "stream": True,
            "stream_options": {"include_obfuscation": False},
            "user": "me",
        },
        also={
            "tool_choice": {"tools": [{"type": "function", **FUNCTION}]},
            "parallel_tool_calls": {"tools": [{"type": "function", **FUNCTION}]},
            "top_logprobs": {"include": ["message.output_text.logprobs"]},
            "stream_options": {"stream": True},
        },
    ),
    Route(
        "/v1/messages",
        MessagesRequest,
        {"model": "light", "messages": [USER], "max_tokens": 50, "temperature": 0},
        decides={
            "model": "medium",
            "messages": [USER, ASSISTANT],
            "system": "Be brief.",
            "max_tokens": 20,
            "temperature": 0.00001,
            "top_p": 0.5,
            "top_k": 7,
            "stop_sequences": ["said"],
            "tools": [{"name": "f", "input_schema": {"type": "object"}}],
            "tool_choice": {"type": "any"},
            "thinking": {"type": "disabled"},
            "output_config": {"effort": "low"},
            "output_format": {"type": "json_schema", "schema": {"type": "object"}},
        },
        is_told={
            "stream": True,
            "cache_control": {"type": "ephemeral"},
            "keep_alive": 60,
            "service_tier": "auto",
            "metadata": {"user_id": "me"},
        },
        also={"tool_choice": {"tools": [{"name": "f", "input_schema": {"type": "object"}}]}},
    ),
    Route(
        "/v1/embeddings",
        EmbeddingRequest,
        {"model": "embedding", "input": ["a b"]},
        decides={"input": ["c"], "input_type": "query", "embedding_type": ["sparse"],
                 "return_sparse": True, "return_colbert": True, "return_tokens": True},
        is_told={"model": "vectors", "encoding_format": "base64", "dimensions": 4, "user": "me",
                 "return_dense": True, "colbert_dtype": "float16", "truncate": "end",
                 "keep_alive": 60},
    ),
    Route(
        "/embed",
        EmbedRequest,
        {"inputs": ["a b"]},
        decides={"inputs": ["c"], "prompt_name": "query"},
        is_told={"truncate": True, "truncation_direction": "Left", "normalize": False,
                 "dimensions": 4},
    ),
    Route(
        "/embed_sparse",
        SparseRequest,
        {"inputs": ["a b"]},
        decides={"inputs": ["c"], "prompt_name": "query"},
        is_told={"truncate": True, "truncation_direction": "Left"},
    ),
    Route(
        "/v1/rerank",
        RerankRequest,
        {"query": "a", "documents": ["a b", "c"]},
        decides={"model": "vectors", "query": "b", "documents": ["d"], "texts": ["d"],
                 "method": "hybrid", "weights": [1, 2, 3], "max_tokens_per_doc": 3,
                 "truncate": "none", "truncation_direction": "Left"},
        is_told={"top_n": 1, "return_documents": True, "return_text": True, "raw_scores": True,
                 "keep_alive": 60},
        also={"weights": {"method": "hybrid"}, "texts": {"documents": None, "texts": ["b"]}},
    ),
    Route(
        "/v1/score",
        ScoreRequest,
        {"queries": ["a"], "documents": ["a b", "c"]},
        decides={"model": "vectors", "queries": ["b"], "documents": ["d"], "text_1": ["b"],
                 "text_2": ["d"], "method": "hybrid", "weights": [1, 2, 3],
                 "max_tokens_per_doc": 3, "truncate": "none", "truncation_direction": "Left"},
        is_told={"raw_scores": True, "keep_alive": 60},
        also={"weights": {"method": "hybrid"},
              "text_1": PAIRED,
              "text_2": PAIRED},
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    path = script(tmp_path_factory.mktemp("fields"), template=THINKING_TEMPLATE)
    encoder = fake(aliases=["vectors"], matryoshka=True, query_prefix="ask: ")
    with serving(
        remembering(
            light=fake(path),
            medium=fake(path, top_p=0.9),
            embedding=encoder,
            reranker=fake(),
        )
    ) as service:
        yield service


def asked(service: Service, route: Route, **fields: Any) -> str:
    body = {name: value for name, value in (route.base | fields).items() if value is not None}
    reply = service.http.post(route.path, json=body)
    assert reply.status_code == 200, (body, reply.text)
    found: str = reply.headers["x-cache"]
    return found


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.path)
def test_every_field_is_decided(route: Route) -> None:
    fields = {field.alias or name for name, field in route.model.model_fields.items()}
    assert not route.decides.keys() & route.is_told.keys()
    assert route.decides.keys() | route.is_told.keys() >= fields


def test_every_field_that_the_documents_name_is_decided() -> None:
    for route in ROUTES:
        if f"## POST {route.path}\n" in read("docs/api.md"):
            named = {name for name, fate in fates(route.path).items() if fate == "works"}
            assert named <= route.decides.keys() | route.is_told.keys()


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.path)
def test_what_decides_an_answer_is_in_its_key_and_nothing_else(
    service: Service, route: Route
) -> None:
    for name, value in (route.decides | route.is_told).items():
        service.http.delete("/v1/cache")
        also = route.also.get(name, {})
        assert asked(service, route, **also) == "MISS"
        expected = "MISS" if name in route.decides else "HIT"
        assert asked(service, route, **also | {name: value}) == expected, name
