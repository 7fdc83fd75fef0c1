"""The engine on MLX without HTTP, beside mlx-lm's own loop on the same prompts.

    python -m bench.mlx models/SmolLM2-135M-Instruct-mlx

Tokens/s by the clock, with the prompts; and CPU for each token, of the process and outside mlx.
That is what the thread does beside BatchGenerator's steps, and in them what is chosen in numpy.
Then a conversation of four turns whose answers are left without their beginnings in the next turn,
as thoughts are: seconds to the first token of the first turn, and of the others together, and how
much of their prompts was computed before; with a prompt cache, and without.
"""

import argparse
import random
import time
from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace
from typing import Any, cast

from engine.backends.base import load_engine
from engine.backends.mlx import MlxEngine
from engine.drawing import RowSampler
from engine.types import SamplingParams
from engine.wire import WorkerSpec

GREEDY = SamplingParams(temperature=0)
PENALISED = SamplingParams(temperature=0.8, seed=1, frequency_penalty=0.5)


class Clock:
    """CPU seconds of this thread in functions that are called through it."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def of(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started_at = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.thread_time() - started_at

        return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="a directory")
    parser.add_argument("--tokens", type=int, default=16, help="of each answer")
    parser.add_argument("--runs", type=int, default=3)
    asked = parser.parse_args()
    engine = load(asked.model, prefix_cache_bytes=0)
    in_mlx, in_numpy = Clock(), Clock()
    kind = import_module("mlx_lm.generate").BatchGenerator
    kind._next = in_mlx.of(kind._next)
    RowSampler.choose = in_numpy.of(RowSampler.choose)  # type: ignore[method-assign]

    def ours(n: int, sampling: SamplingParams) -> None:
        for number in range(n):
            engine.admit(number, prompt(number), sampling)
        n_told = dict.fromkeys(range(n), 0)
        while not engine.idle:
            for number, _ in engine.step().tokens:
                n_told[number] += 1
                if n_told[number] == asked.tokens:
                    engine.cancel(number)

    def theirs(n: int) -> None:
        tokenizer = SimpleNamespace(eos_token_ids=(), decode=lambda _: "")
        prompts = [prompt(number) for number in range(n)]
        import_module("mlx_lm.generate").batch_generate(
            engine._model, tokenizer, prompts, max_tokens=asked.tokens
        )

    ours(1, GREEDY)  # whatever the first step makes ready
    print("                         tokens/s  CPU ms a token  outside mlx")
    cases: list[tuple[str, int, Callable[[], None]]] = [
        ("1 stream", 1, lambda: ours(1, GREEDY)),
        ("4 streams", 4, lambda: ours(4, GREEDY)),
        ("4, with a penalty", 4, lambda: ours(4, PENALISED)),
        ("4, batch_generate", 4, lambda: theirs(4)),
    ]
    for name, n, run in cases:
        found = []
        for _ in range(asked.runs):
            in_mlx.seconds = in_numpy.seconds = 0.0
            at, cpu, own = time.perf_counter(), time.process_time(), time.thread_time()
            run()
            seconds, cpu = time.perf_counter() - at, time.process_time() - cpu
            outside = time.thread_time() - own - in_mlx.seconds + in_numpy.seconds
            n_tokens = n * asked.tokens
            found.append((n_tokens / seconds, cpu / n_tokens * 1e3, outside / n_tokens * 1e3))
        speed, each, outside = (
            sorted(column)[len(found) // 2] for column in zip(*found, strict=True)
        )
        print(f"{name:24} {speed:8.1f} {each:15.2f} {outside:12.3f}")
    remembering = load(asked.model, prefix_cache_bytes=1 << 30)
    print("conversation               first s     others s       reused")
    for name, of in [("with a prompt cache", remembering), ("without", engine)] * asked.runs:
        first, others, reused = conversation(of)
        print(f"{name:24} {first:9.2f} {others:12.2f} {reused:12.2f}")
    engine.close()
    remembering.close()


def load(model: str, *, prefix_cache_bytes: int) -> MlxEngine:
    spec = WorkerSpec(
        name="bench", backend="mlx", model_path=model, n_ctx=2048, n_parallel=4,
        kv_tokens=4096, n_batch=512, n_threads=1, n_gpu_layers=-1, max_stall_s=10.0,
        prefix_cache_bytes=prefix_cache_bytes,
    )  # fmt: skip
    return cast(MlxEngine, load_engine(spec, lambda _: None))


def conversation(engine: MlxEngine) -> tuple[float, float, float]:
    dice = random.Random(time.perf_counter())
    history = dice.choices(range(1000, 40_000), k=600)
    n_cached: list[int] = []
    n_asked: list[int] = []
    waits: list[float] = []
    for turn in range(4):
        engine.admit(turn, history, GREEDY)
        n_asked.append(len(history))
        at = time.perf_counter()
        answer: list[int] = []
        while not engine.idle:
            result = engine.step()
            n_cached += [n for _, n in result.started]
            answer += [token for _, (token, *_) in result.tokens]
            if len(answer) == 1 and len(waits) == turn:
                waits.append(time.perf_counter() - at)
            if len(answer) == 16:
                engine.cancel(turn)
        history = [*history, *answer[8:], *dice.choices(range(1000, 40_000), k=60)]
    return waits[0], sum(waits[1:]), sum(n_cached[1:]) / sum(n_asked[1:])


def prompt(seed: int) -> list[int]:
    return random.Random(seed).choices(range(1000, 40_000), k=16)


if __name__ == "__main__":
    main()
