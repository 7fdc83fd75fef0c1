"""The column MLX of docs/api.md, by running: each field is sent, and its fate compared."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.client import launch_process
from settings import ROOT, TierSettings
from tests.engines import needs_mlx
from tests.serving import Service, serving, settings

pytestmark = [pytest.mark.real, needs_mlx]

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
SHARED: dict[str, Any] = {
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
    "stream_options": {"include_usage": True},
}  # fmt: skip
COMPLETION: dict[str, Any] = {"best_of": 2, "echo": True, "logprobs": 2}
BESIDE = {
    "tool_choice": {"tools": [TOOL]}, "top_logprobs": {"logprobs": True},
    "stream_options": {"stream": True},
}  # fmt: skip


@pytest.fixture(scope="module")
def service(tiny_mlx: Path) -> Iterator[Service]:
    tier = TierSettings(model_path=str(tiny_mlx), n_ctx=512, n_parallel=4)
    with serving(settings(light=tier), launch=launch_process) as service:
        yield service


def written(path: str) -> dict[str, str]:
    """What the column says of each field."""
    text = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    section = text.split(f"## POST {path}\n")[1].split("\n## ")[0]
    rows = [line.split(" | ") for line in section.splitlines() if line.startswith("| `")]
    return {name: row[2] for row in rows for name in re.findall(r"`(\w+)`", row[0])}


@pytest.mark.parametrize(
    ("path", "body", "fields"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}, SHARED | CHAT),
        ("/v1/completions", {"prompt": "one two"}, SHARED | COMPLETION),
    ],
)
def test_the_fate_of_a_field_is_what_a_run_gives(
    path: str, body: dict[str, Any], fields: dict[str, Any], service: Service
) -> None:
    found = {}
    for name, value in fields.items():
        asked = {"model": "light", "max_tokens": 2, **body, **BESIDE.get(name, {}), name: value}
        if name == "max_completion_tokens":
            del asked["max_tokens"]
        reply = service.http.post(path, json=asked)
        is_ignored = name in reply.headers.get("x-ignored-params", "") or name == "user"
        assert reply.status_code in (200, 400), reply.text
        if reply.status_code == 200:
            found[name] = "ignored" if is_ignored else "works"
        else:
            assert reply.json()["error"]["param"] == name, reply.text
            found[name] = "refused"
    column = written(path)
    assert found == {name: column[name] for name in found}
    assert len(found) > len(column) * 0.8
