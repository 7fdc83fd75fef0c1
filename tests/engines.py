"""Engines of models on disk, and what they say: llama.cpp for a file, MLX for a directory."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest

import generation_jobs
from engine import wire
from engine.backends.base import Engine, load_engine
from engine.grammar import Compiler
from engine.types import Sampled, SamplingParams, Sequence

Logits = npt.NDArray[np.float32]
GREEDY = SamplingParams(temperature=0)
needs_mlx = pytest.mark.skipif(
    importlib.util.find_spec("mlx_lm") is None, reason="mlx-lm is not installed: ./setup.sh --mlx"
)


def spec(model: Path, **values: Any) -> wire.WorkerSpec:
    """One thread: two collapse on a busy box."""
    defaults: dict[str, Any] = {
        "name": "light", "backend": "mlx" if model.is_dir() else "llamacpp",
        "model_path": str(model), "n_ctx": 512, "n_parallel": 16, "kv_tokens": 4096,
        "n_batch": 256, "n_threads": 1, "n_gpu_layers": -1, "max_stall_s": 1.0,
        "prefix_cache_bytes": 1 << 28,
    }  # fmt: skip
    return wire.WorkerSpec(**(defaults | values))


def engine_of(model: Path, **values: Any) -> Engine:
    return load_engine(spec(model, **values), lambda _: None)


def lanes_of(engine: Engine) -> Any:
    """Of an engine with `lane_tokens`."""
    from engine.backends.llamacpp import LlamaDecoder
    from engine.batch_engine import BatchEngine

    lanes = cast(LlamaDecoder, cast(BatchEngine, engine)._decoder)._lanes
    assert lanes is not None
    return lanes


def open_lanes(engine: Engine) -> Any:
    """Make the lanes, which else are made while several answer."""
    lanes = lanes_of(engine)
    lanes._open()
    assert lanes._opening is not None
    lanes._opening.result()
    lanes._open()
    return lanes


def generate(
    engine: Engine,
    prompts: Mapping[int, list[int]],
    n_tokens: int,
    sampling: SamplingParams = GREEDY,
    *,
    reuses: bool = True,
) -> dict[int, list[int]]:
    """What the engine says to all prompts at once, up to `n_tokens` each."""
    for number, prompt in prompts.items():
        engine.admit(number, list(prompt), sampling, reuses=reuses)
    tokens: dict[int, list[int]] = {number: [] for number in prompts}
    while not engine.idle:
        result = engine.step()
        assert not result.failed
        for number, (token, *_) in result.tokens:
            tokens[number].append(token)
            if len(tokens[number]) == n_tokens or engine.tokenizer.ends_generation(token):
                engine.cancel(number)
    return tokens


def run(engine: Engine, n_tokens: dict[int, int]) -> tuple[dict[int, list[int]], dict[int, int]]:
    """Steps until nothing is left: what was said, each up to its number of tokens; and how much of
    each prompt was cached."""
    said: dict[int, list[int]] = {}
    cached: dict[int, int] = {}
    while not engine.idle:
        result = engine.step()
        assert not result.failed
        cached |= dict(result.started)
        for number, (token, *_) in result.tokens:
            said.setdefault(number, []).append(token)
            if len(said[number]) == n_tokens[number]:
                engine.cancel(number)
    return said, cached


def seeded_answers(engine: Engine, prompt: list[int], *, n: int) -> list[list[tuple[bytes, float]]]:
    """Tokens and log probabilities of the answers to a request with a seed, which end at different
    times, in an engine that is idle."""
    free = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    sampling = SamplingParams(**free, seed=7, n_logprobs=0)  # type: ignore[arg-type]
    request = wire.Generate(list(prompt), False, sampling, ["q"], 40, n=n, reuse=False)
    jobs = generation_jobs.Jobs(engine)
    jobs.admit(generation_jobs.prepare(request, engine, Compiler(engine.tokenizer)))
    answers: list[list[tuple[bytes, float]]] = [[] for _ in range(n)]
    while not engine.idle:
        for message in jobs.report(engine.step()):
            assert not isinstance(message, wire.Failed)
            for out in message.outs if isinstance(message, wire.Step) else ():
                answers[out.index] += [(one.token, one.logprob) for one in out.logprobs]
    return answers


def ids(engine: Engine, text: str) -> list[int]:
    return engine.tokenizer.tokenize(text, parse_special=True, continues=False)


def next_logits(model: Path, prompts: list[list[int]], **values: Any) -> list[Logits]:
    """The raw logits of llama.cpp after each prompt, all in one batch of a fresh context."""
    from engine.backends.llamacpp import LlamaDecoder
    from engine.batch_engine import BatchEngine

    engine = engine_of(model, n_batch=4096, kv_tokens=8192, n_ctx=2048, **values)
    decoder = cast(LlamaDecoder, cast(BatchEngine, engine)._decoder)
    rows: dict[int, Logits] = {}
    sample = decoder.sample

    def record(row: int, sequence: Sequence) -> Sampled:
        _, _, logits = decoder._rows[row]
        rows[sequence.id] = logits.copy()
        return sample(row, sequence)

    decoder.sample = record  # type: ignore[method-assign]
    generate(engine, dict(enumerate(prompts)), 1)
    engine.close()
    return [rows[number] for number in range(len(prompts))]
