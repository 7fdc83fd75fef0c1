"""The column MLX of docs/api.md, by running: each field is sent, and its fate compared."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.client import launch_process
from settings import ROOT, TierSettings
from tests.engines import needs_mlx
from tests.serving import THINKING_TEMPLATE, Service, serving, settings

pytestmark = [pytest.mark.real, needs_mlx]

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CONSTRAINTS: dict[str, Any] = {
    "structured_outputs": {"regex": "a"}, "guided_json": {"type": "object"}, "guided_regex": "a",
    "guided_choice": ["a"], "guided_grammar": "root ::= [a]", "regex": "a", "ebnf": "root ::= [a]",
    "json_schema": {"type": "object"},
}  # fmt: skip
OF_CHATS = {"grammar": "start: /a/", "response_format": {"type": "json_object"}}
SHARED: dict[str, Any] = {
    **CONSTRAINTS,
    "frequency_penalty": 0.5, "presence_penalty": 0.5, "logit_bias": {"5": 3}, "n": 2, "seed": 3,
    "service_tier": "priority", "stop": ["x"], "stream": True, "temperature": 0.5, "top_p": 0.5,
    "user": "me", "top_k": 3, "min_p": 0.1, "typical_p": 0.5, "repeat_penalty": 1.1,
    "repeat_last_n": 9, "xtc_probability": 0.5, "xtc_threshold": 0.1, "mirostat": 2,
    "mirostat_tau": 3.0, "mirostat_eta": 0.2, "dry_multiplier": 0.8, "dry_base": 1.5,
    "dry_allowed_length": 3, "dry_penalty_last_n": 20, "dry_sequence_breakers": ["\n"],
    "min_tokens": 1, "ignore_eos": True, "grammar": "start: /a+/", "priority": 1,
    "keep_alive": "5m", "cache_prompt": False, "timings": True, "max_tokens": 2,
    "response_format": {"type": "json_object"},
}  # fmt: skip
CHAT: dict[str, Any] = {
    "max_completion_tokens": 2, "parallel_tool_calls": False, "top_logprobs": 2, "logprobs": True,
    "tools": [TOOL], "tool_choice": "auto", "metadata": {"a": "b"}, "prompt_cache_key": "k",
    "safety_identifier": "s", "store": True, "modalities": ["audio"], "audio": {"voice": "x"},
    "functions": [{"name": "f"}], "function_call": {"name": "f"}, "prediction": {"type": "content"},
    "verbosity": "high", "web_search_options": {}, "truncate": "middle",
    "chat_template_kwargs": {"a": 1}, "add_generation_prompt": True,
    "stream_options": {"include_usage": True}, "reasoning_effort": "low",
    "thinking_budget_tokens": 1, "continue_final_message": True, "moderation": {"a": 1},
    "prompt_cache_options": {}, "prompt_cache_retention": "24h",
}  # fmt: skip
COMPLETION: dict[str, Any] = {
    "best_of": 2, "echo": True, "logprobs": 2, "suffix": "four",
    "stream_options": {"include_usage": True},
}  # fmt: skip
COMPLETION_BESIDE = {"stream_options": {"stream": True}}
CHAT_BESIDE = {
    "tool_choice": {"tools": [TOOL]}, "top_logprobs": {"logprobs": True},
    "stream_options": {"stream": True},
    "continue_final_message": {"messages": [{"role": "assistant", "content": "We"}],
                               "add_generation_prompt": False},
}  # fmt: skip
# Of Responses and Messages. Above the sampling they are chats, so little is generated.
RESPONSE_TOOL = {"type": "function", "name": "f", "parameters": {"type": "object"}}
RESPONSE: dict[str, Any] = {
    **CONSTRAINTS, **OF_CHATS,
    "instructions": "Be short.", "temperature": 0.5, "top_p": 0.5, "parallel_tool_calls": False,
    "service_tier": "flex", "tools": [RESPONSE_TOOL], "tool_choice": "auto", "max_tool_calls": 2,
    "max_output_tokens": 1, "text": {"format": {"type": "json_object"}}, "top_logprobs": 2,
    "include": ["message.output_text.logprobs"], "stream": True, "metadata": {"a": "b"},
    "stream_options": {"include_obfuscation": False}, "keep_alive": "5m",
    "prompt_cache_key": "k", "prompt_cache_options": {}, "prompt_cache_retention": "24h",
    "safety_identifier": "s", "store": True, "user": "me", "background": True,
    "background_options": {"a": 1}, "conversation": "c", "previous_response_id": "p",
    "prompt": {"id": "p"}, "access_programs": ["a"], "context_management": [{"type": "compaction"}],
    "image": {"a": 1}, "moderation": {"a": 1}, "truncation": "auto", "reasoning": {"effort": "low"},
}  # fmt: skip
RESPONSE_BESIDE = {
    "tool_choice": {"tools": [RESPONSE_TOOL]}, "stream_options": {"stream": True},
    "top_logprobs": {"include": ["message.output_text.logprobs"]},
}  # fmt: skip
MESSAGE_TOOL = {"name": "f", "input_schema": {"type": "object"}}
MESSAGE: dict[str, Any] = {
    **CONSTRAINTS, **OF_CHATS,
    "system": "Be short.", "stream": True, "temperature": 0.5, "top_p": 0.5, "top_k": 3,
    "stop_sequences": ["x"], "tools": [MESSAGE_TOOL], "tool_choice": {"type": "auto"},
    "thinking": {"type": "disabled"}, "cache_control": {"type": "ephemeral"},
    "output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}},
    "output_format": {"type": "json_schema", "schema": {"type": "object"}},
    "service_tier": "auto", "keep_alive": "5m", "metadata": {"user_id": "me"},
    "diagnostics": {"a": 1}, "inference_geo": "eu", "user_profile_id": "u", "workspace_id": "w",
    "container": "c", "mcp_servers": [{"type": "url"}], "speed": "fast",
}  # fmt: skip
MESSAGE_BESIDE = {"tool_choice": {"tools": [MESSAGE_TOOL]}}
NOT_TO_COUNT = (
    "stream", "temperature", "top_p", "top_k", "stop_sequences", "service_tier", "keep_alive",
    "metadata", "diagnostics", "inference_geo",
)  # fmt: skip
COUNT = {name: value for name, value in MESSAGE.items() if name not in NOT_TO_COUNT}
HI = [{"role": "user", "content": "Hi"}]
MARKS = {
    "<jupyter_start>": "<|fim_prefix|>", "<jupyter_text>": "<|fim_suffix|>",
    "<jupyter_code>": "<|fim_middle|>",
}  # fmt: skip


@pytest.fixture(scope="module")
def service(tiny_mlx: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Of a model that thinks and fills in, so that no field is refused for what it lacks."""
    folder = tmp_path_factory.mktemp("fields") / "tiny"
    shutil.copytree(tiny_mlx, folder)
    tokenizer = folder / "tokenizer.json"
    text = tokenizer.read_text(encoding="utf-8")
    for name, mark in MARKS.items():
        text = text.replace(json.dumps(name), json.dumps(mark))
    tokenizer.write_text(text, encoding="utf-8")
    about = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    about["chat_template"] = THINKING_TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(about), encoding="utf-8")
    tier = TierSettings(model_path=str(folder), n_ctx=512, n_parallel=4)
    with serving(settings(light=tier), launch=launch_process) as service:
        yield service


def written(path: str) -> dict[str, str]:
    """What the column says of each field."""
    text = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    section = text.split(f"## POST {path}\n")[1].split("\n## ")[0]
    rows = [line.split(" | ") for line in section.splitlines() if line.startswith("| `")]
    return {name: row[2] for row in rows for name in re.findall(r"`(\w+)`", row[0])}


def fate(reply: httpx.Response, name: str) -> str:
    """What became of a field."""
    assert reply.status_code in (200, 400), reply.text
    if reply.status_code == 400:
        error = reply.json()["error"]  # Anthropic's has no param
        assert error.get("param", name) == name, reply.text
        assert f"'{name}'" in error["message"], reply.text
        return "refused"
    is_ignored = name in reply.headers.get("x-ignored-params", "") or name == "user"
    return "ignored" if is_ignored else "works"


Fields = dict[str, Any]


@pytest.mark.parametrize(
    ("path", "body", "fields", "beside"),
    [
        ("/v1/chat/completions", {"messages": HI, "max_tokens": 2}, SHARED | CHAT, CHAT_BESIDE),
        ("/v1/completions", {"prompt": "one two", "max_tokens": 2}, SHARED | COMPLETION,
         COMPLETION_BESIDE),
        ("/v1/responses", {"input": "Hi", "max_output_tokens": 1}, RESPONSE, RESPONSE_BESIDE),
        ("/v1/messages", {"messages": HI, "max_tokens": 1}, MESSAGE, MESSAGE_BESIDE),
        ("/v1/messages/count_tokens", {"messages": HI}, COUNT, MESSAGE_BESIDE),
    ],
    ids=["chat", "completion", "response", "message", "count"],
)  # fmt: skip
def test_the_fate_of_a_field_is_what_a_run_gives(
    path: str, body: Fields, fields: Fields, beside: dict[str, Fields], service: Service
) -> None:
    found = {}
    for name, value in fields.items():
        asked = {"model": "light", **body, **beside.get(name, {}), name: value}
        if name == "max_completion_tokens":
            del asked["max_tokens"]
        found[name] = fate(service.http.post(path, json=asked), name)
    column = written(path)
    assert found == {name: column[name] for name in found}
    assert column.keys() - found.keys() <= {"model", *body}, "these are in each request"
