"""The engine without HTTP, on a real model.

    python -m bench.engine models/SmolLM2-135M-Instruct.Q4_1.gguf

1. How much of a step's time is llama_decode, on a CPU, and tokens/s beside a bare loop of a decoder
   on the same batches, taking turns.
2. Prompt tokens that are decoded for eight requests with one system prompt, first cold, then warm,
   and for conversations whose turns are interleaved.
3. One sequence beside many that are remembered, against a fresh context.
4. Eight sequences with a JSON schema, against the same without.
5. Steps without flash attention in steps with it, taking turns: of so many sequences at so many
   tokens each; and of 32 more tokens of a prompt, alone and beside four sequences of 300.
6. Steps of several sequences with cells apart in steps where all share theirs, taking turns.
"""

import argparse
import json
import random
import statistics
import time
from array import array
from collections.abc import Callable
from typing import Any, cast

import llama_cpp as lib

from chat.tools.base import Function
from chat.tools.hermes import Hermes
from engine.backends.base import load_engine
from engine.backends.llamacpp import LlamaDecoder
from engine.batch_engine import BatchEngine
from engine.grammar import Compiler, GrammarState
from engine.prefix import Saved
from engine.types import Batch, SamplingParams, Sequence
from engine.wire import Grammar, GrammarPart, WorkerSpec

GREEDY, DRAWN = SamplingParams(temperature=0), SamplingParams(seed=1)


class Timed:
    """A function of llama.cpp, and how long it took in all."""

    def __init__(self, function: Callable[..., int]) -> None:
        self.seconds = 0.0
        self._function = function

    def __call__(self, *args: Any) -> int:
        started_at = time.perf_counter()
        status = self._function(*args)
        self.seconds += time.perf_counter() - started_at
        return status


LLAMA_DECODE = Timed(lib.llama_decode)


class Meter:
    """A decoder whose prompt tokens are counted."""

    def __init__(self, decoder: LlamaDecoder) -> None:
        self.n_prompt_tokens = 0
        self._decode = decoder.decode
        decoder.decode = self.decode  # type: ignore[method-assign]

    def decode(self, batch: Batch) -> None:
        self._decode(batch)
        self.n_prompt_tokens += batch.n_tokens - batch.n_decodes


class Bench:
    def __init__(
        self, model: str, n_threads: int, n_parallel: int = 16, *, flash_attention: bool = True,
        lane_tokens: int = 1024,
    ) -> None:  # fmt: skip
        spec = WorkerSpec(
            name="bench", backend="llamacpp", model_path=model, n_ctx=8192,
            n_parallel=n_parallel, kv_tokens=16384, n_batch=512,
            n_threads=n_threads, n_gpu_layers=-1, max_stall_s=0.2, prefix_cache_bytes=1 << 30,
            flash_attention=flash_attention, lane_tokens=lane_tokens,
        )  # fmt: skip
        lib.llama_decode = LLAMA_DECODE
        self.engine = cast(BatchEngine, load_engine(spec, lambda _: None))
        self.decoder = cast(LlamaDecoder, self.engine._decoder)
        self.meter = Meter(self.decoder)
        self._n_admitted = 0

    def admit(
        self,
        prompt: list[int],
        constraint: GrammarState | None = None,
        sampling: SamplingParams = GREEDY,
    ) -> int:
        self._n_admitted += 1
        self.engine.admit(self._n_admitted, prompt, sampling, constraint)
        return self._n_admitted

    def run(self, ids: list[int], n_tokens: int) -> dict[int, list[int]]:
        """Step until each has so many tokens."""
        tokens: dict[int, list[int]] = {id: [] for id in ids}
        while not self.engine.idle:
            for id, (token, *_) in self.engine.step().tokens:
                tokens[id].append(token)
                if len(tokens[id]) >= n_tokens:
                    self.engine.cancel(id)
        return tokens

    def decode_tokens(
        self,
        n_sequences: int,
        n_tokens: int,
        constraint: GrammarState | None = None,
        sampling: SamplingParams = GREEDY,
    ) -> tuple[float, float]:
        """Tokens/s of so many sequences past their prompts, and the share inside llama_decode."""
        ids = [
            self.admit(
                prompt(n_sequences * 100 + i, 16), constraint and constraint.copy(), sampling
            )
            for i in range(n_sequences)
        ]
        started: set[int] = set()
        while len(started) < n_sequences:
            started |= {id for id, _ in self.engine.step().tokens}
        LLAMA_DECODE.seconds = 0.0
        at = time.perf_counter()
        for _ in range(n_tokens):
            self.engine.step()
        seconds = time.perf_counter() - at
        for id in ids:
            self.engine.cancel(id)
        return n_sequences * n_tokens / seconds, LLAMA_DECODE.seconds / seconds

    def bare_tokens(self, n_sequences: int, n_tokens: int) -> float:
        """Tokens/s of a decoder alone, on batches of the same shape at the same positions."""
        sequences = self.fill(*[16] * n_sequences)
        ones = [1] * n_sequences
        seconds = sum(self.bare_step(sequences, ones) for _ in range(n_tokens))
        self.fill()
        return n_sequences * n_tokens / seconds

    def fill(self, *lengths: int) -> list[Sequence]:
        """Sequences of so many tokens, and nothing else in the cells."""
        for slot in range(16):
            self.decoder.memory.clear(slot)
        sequences = [Sequence(slot, array("i"), slot=slot) for slot in range(len(lengths))]
        saved: dict[int, tuple[array[int], Saved | None]] = {}
        for sequence, length in zip(sequences, lengths, strict=True):
            if length not in saved:
                for start in range(0, length, 128):
                    self.bare_step([sequence], [min(128, length - start)])
                cells = self.decoder.memory.save(sequence.id, 0, length)
                saved[length] = sequence.tokens[:], cells
                continue
            tokens, cells = saved[length]  # in cells of its own, as if it had been computed
            assert cells is not None
            assert self.decoder.memory.load(sequence.id, cells, 0, length)
            sequence.tokens, sequence.n_past = tokens[:], length
        return sequences

    def bare_step(self, sequences: list[Sequence], numbers: list[int]) -> float:
        """Seconds of a step with so many more tokens of each."""
        batch = Batch(n_held=sum(len(sequence.tokens) for sequence in sequences))
        for sequence, n in zip(sequences, numbers, strict=True):
            sequence.tokens.extend(prompt(len(sequence.tokens) * 100 + sequence.id, n))
            batch.add(sequence, n)
        at = time.perf_counter()
        self.decoder.decode(batch)
        seconds = time.perf_counter() - at
        for sequence, n in zip(sequences, numbers, strict=True):
            sequence.n_past += n
        return seconds


def prompt(seed: int, n_tokens: int) -> list[int]:
    dice = random.Random(seed)
    return [dice.randint(1000, 40000) for _ in range(n_tokens)]


def step_overhead(model: str, n_threads: int) -> None:
    print("tokens are  sequences  tokens/s  bare loop  ratio  in llama_decode")
    n_tokens = 48
    for name, sampling in (("likeliest", GREEDY), ("drawn", DRAWN)):
        for n in (1, 4, 8, 16):
            ours, bare, shares = [], [], []
            for _ in range(3):
                bench = Bench(model, n_threads)
                bare.append(bench.bare_tokens(n, n_tokens))
                speed, share = bench.decode_tokens(n, n_tokens, sampling=sampling)
                ours.append(speed)
                shares.append(share)
                bench.engine.close()
            a, b, share = sorted(ours)[1], sorted(bare)[1], sorted(shares)[1]
            print(f"{name:10}  {n:9}  {a:8.1f}  {b:9.1f}  {a / b:5.3f}  {share:.3f}", flush=True)


def sharing(model: str, n_threads: int) -> None:
    bench = Bench(model, n_threads)
    system = prompt(1, 1000)
    for name, first in (("cold", 10), ("warm", 20)):
        before = bench.meter.n_prompt_tokens
        at = time.perf_counter()
        ids = [bench.admit(system + prompt(first + i, 12)) for i in range(8)]
        bench.run(ids, 8)
        n = bench.meter.n_prompt_tokens - before
        seconds = time.perf_counter() - at
        print(f"8 requests with one prefix of 1000, {name}: {n} prompt tokens decoded, "
              f"{n / 1012:.2f} of one request's, {seconds:.1f} s", flush=True)  # fmt: skip
    bench.engine.close()
    bench = Bench(model, n_threads, n_parallel=4)
    history = {c: prompt(100 + c, 60) for c in range(6)}
    n_seen = n_again = 0
    for turn in range(4):
        for c in history:
            before = bench.meter.n_prompt_tokens
            n_known = len(history[c]) if turn else 0
            asked = history[c] + prompt(1000 * turn + c, 20)
            (answer,) = bench.run([bench.admit(asked)], 12).values()
            n_again += bench.meter.n_prompt_tokens - before - (len(asked) - n_known)
            n_seen += n_known
            history[c] = asked + answer
    print(
        f"6 conversations of 4 turns: {1 - n_again / n_seen:.3f} of the tokens seen before reused"
    )
    bench.engine.close()


def beside_remembered(model: str, n_threads: int) -> None:
    ratios = []
    for _ in range(3):
        fresh, used = Bench(model, n_threads), Bench(model, n_threads)
        used.run([used.admit(prompt(i, 400)) for i in range(7)], 2)
        a, _ = used.decode_tokens(1, 48)
        b, _ = fresh.decode_tokens(1, 48)
        ratios.append(a / b)
        fresh.engine.close()
        used.engine.close()
    print(f"one sequence beside 2800 remembered tokens: {sorted(ratios)[1]:.3f} of a fresh context")


# so many strings that nobody comes to the end
LONG_LIST = {"type": "array", "minItems": 500, "items": {
    "type": "object", "additionalProperties": False, "required": ["name", "size"],
    "properties": {"name": {"type": "string"}, "size": {"type": "number"}},
}}  # fmt: skip
FREE_TEXT_OR_A_CALL = Hermes().frame(
    [Function("get_sizes", "@p0")],
    answer=None,
    is_required=False,
    is_parallel=True,
    tags=None,
    is_open=False,
)


def constrained(model: str, n_threads: int) -> None:
    part = GrammarPart("json_schema", json.dumps(LONG_LIST), "response_format")
    grammars = {
        "a JSON schema": Grammar((part,)),
        "tools to choose from": Grammar((part,), FREE_TEXT_OR_A_CALL),
    }
    ratios: dict[str, list[float]] = {name: [] for name in grammars}
    for _ in range(3):
        bench = Bench(model, n_threads)
        compiler = Compiler(bench.engine.tokenizer)
        for name, grammar in grammars.items():
            free, _ = bench.decode_tokens(8, 48)
            bound, _ = bench.decode_tokens(8, 48, compiler.compile(grammar))
            ratios[name].append(bound / free)
        bench.engine.close()
    for name, found in ratios.items():
        print(f"8 sequences with {name}: {sorted(found)[1]:.3f} of the same without")


def attention(model: str, n_threads: int) -> None:
    flash = Bench(model, n_threads, lane_tokens=0)
    plain = Bench(model, n_threads, lane_tokens=0, flash_attention=False)
    deep = (64, 1024, 4096)
    cases = [(f"1 at {n}", [n], [1]) for n in (64, 512, 1024, 4096)]
    cases += [(f"4 at {n}", [n] * 4, [1] * 4) for n in (64, 512, 2048)]
    cases += [(f"8 at {n}", [n] * 8, [1] * 8) for n in (64, 512)]
    cases += [(f"32 more at {n}", [n], [32]) for n in deep]
    cases += [(f"32 more at {n}, beside 4", [n, *[300] * 4], [32, *[1] * 4]) for n in deep]
    print("sequences                  flash, ms  without  ratio", flush=True)
    for name, lengths, numbers in cases:
        took: dict[Bench, list[float]] = {flash: [], plain: []}
        sequences = {bench: bench.fill(*lengths) for bench in took}
        for _ in range(24 if max(numbers) == 1 else 6):
            for bench, seconds in took.items():
                seconds.append(bench.bare_step(sequences[bench], numbers) * 1e3)
        a, b = (statistics.median(seconds) for seconds in took.values())
        print(f"{name:25}  {a:9.1f}  {b:7.1f}  {b / a:.2f}", flush=True)
    flash.engine.close()
    plain.engine.close()


def lanes(model: str, n_threads: int) -> None:
    """Of a kind of attention each."""
    for flash_attention in (True, False):
        kind = {"flash_attention": flash_attention}
        apart = Bench(model, n_threads, **kind)
        shared = Bench(model, n_threads, **kind, lane_tokens=0)
        print(f"{'with' if flash_attention else 'without'} flash attention", flush=True)
        print("sequences   shared, ms  apart  ratio", flush=True)
        for n, length in ((4, 64), (4, 512), (8, 64), (8, 512), (16, 64), (16, 256), (16, 512)):
            took: dict[Bench, list[float]] = {shared: [], apart: []}
            sequences = {bench: bench.fill(*[length] * n) for bench in took}
            for _ in range(40):  # in the first ones the lanes are made
                for bench, seconds in took.items():
                    seconds.append(bench.bare_step(sequences[bench], [1] * n) * 1e3)
            a, b = (statistics.median(seconds) for seconds in took.values())
            print(f"{n:2} at {length:4}  {a:10.1f}  {b:5.1f}  {b / a:.2f}", flush=True)
        apart.engine.close()
        shared.engine.close()


PARTS = (step_overhead, sharing, beside_remembered, constrained, attention, lanes)


def main() -> None:
    parser = argparse.ArgumentParser(description="The engine without HTTP, on a real model.")
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    parts = {part.__name__: part for part in PARTS}
    parser.add_argument("--only", choices=parts, action="append", metavar="PART",
                        help=", ".join(parts))  # fmt: skip
    options = parser.parse_args()
    for name in options.only or parts:
        parts[name](options.model, options.threads)


if __name__ == "__main__":
    main()
