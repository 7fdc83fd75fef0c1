"""CPU runtimes for encoders, on the same weights and tokens, beside llama.cpp. It prints JSON.

    pip install onnxruntime onnx tokenizers openvino torch --extra-index-url \\
        https://download.pytorch.org/whl/cpu
    python -m bench.encoder_runtimes --threads 2 --lengths short middle
    python -m bench.encoder_runtimes --runtimes llamacpp onnx

Each runtime is a process of its own, all are loaded at once, and they take turns in each round,
forwards and backwards, with the batches that the service would make. Where other programs want the
cores too, tokens of a second of CPU say more than tokens of a second.

What is not installed is named and left out. It wants an environment apart from the service's, with
requirements.txt in it.

Vectors are means of rows, of length one; they are compared with those of llama.cpp in F32.
"""

import argparse
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil

from bench.compare import machine
from bench.encoders import BATCH_TOKENS, WORDS, ask_nobody, spec_of
from engine.backends.base import Floats, Ids, load_encoder
from engine.backends.bert_folder import read_shape, read_weights
from engine.backends.llama_model import LlamaLog
from engine.backends.padded import Inputs, groups
from engine.batcher import Batcher
from engine.client import SPIN_COUNT
from engine.model_folder import read_model_folder
from models.convert.gguf_to_folder import convert
from settings import DEFAULT_EMBEDDING_MODEL, ROOT

REFERENCE = "llamacpp"
PACKAGES = ("llama-cpp-python", "onnxruntime", "torch", "openvino")
LENGTHS = {"short": (8, 32), "middle": (60, 140), "long": (300, 500)}  # tokens of a text
MAX_SEQUENCES = 64
N_CTX = 512

Encode = Callable[[Sequence[Ids]], Floats]  # rows of all tokens of a batch
Call = Callable[[Inputs], Floats]  # [n_sequences, longest, n_embd]


@dataclass(frozen=True, slots=True)
class Files:
    """The same weights in several forms."""

    gguf: Path
    q8_0: Path
    folder: Path
    int8: Path  # of ONNX; its runtime makes it where it is not there


def padded(call: Call) -> Encode:
    """For runtimes that take sequences as rows of one length: as `padded.py` has it."""

    def encode(batch: Sequence[Ids]) -> Floats:
        rows: list[Floats] = [np.empty(0, np.float32)] * len(batch)
        for group in groups([len(ids) for ids in batch]):
            longest = max(len(batch[i]) for i in group)
            ids = np.ones((len(group), longest), np.int64)
            mask = np.zeros_like(ids)
            for row, i in enumerate(group):
                ids[row, : len(batch[i])], mask[row, : len(batch[i])] = batch[i], 1
            for i, found in zip(group, call(Inputs(ids, mask, None)), strict=True):
                rows[i] = found[: len(batch[i])]
        return np.concatenate(rows)

    return encode


# the runtimes


def ours(files: Files, n_threads: int, *, backend: str, form: str) -> Encode:
    """As the service has it, but that nobody is asked whether it is still wanted."""
    encoder = load_encoder(spec_of(getattr(files, form), N_CTX, n_threads, backend), lambda _: None)
    if backend == REFERENCE:
        ask_nobody(encoder)
    return encoder.encode


def onnx_int8(files: Files, n_threads: int) -> Encode:
    import onnxruntime

    if not files.int8.exists():
        _write_int8(files)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = n_threads
    options.enable_mem_pattern, options.log_severity_level = False, 3
    session = onnxruntime.InferenceSession(files.int8, options, ["CPUExecutionProvider"])

    def call(inputs: Inputs) -> Floats:
        lengths = inputs.mask.sum(axis=1, dtype=np.int32)
        is_padded = np.array(not inputs.mask.all())
        feed = {"ids": inputs.ids, "lengths": lengths, "is_padded": is_padded}
        found: Floats = session.run(None, feed)[0]
        return found

    return padded(call)


def _write_int8(files: Files) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    from engine.backends import onnx_bert

    facts = read_model_folder(files.folder)
    shape = read_shape(facts, ranks=False)
    model = onnx_bert.model_of(shape, has_types=False)
    weights = read_weights(facts, shape)
    for tensor in model.graph.initializer:
        if tensor.name in weights:
            tensor.CopyFrom(onnx.numpy_helper.from_array(weights[tensor.name], tensor.name))
    with tempfile.TemporaryDirectory() as made:
        plain = Path(made) / "plain.onnx"
        onnx.save(model, plain)
        # seven bits: with eight AVX2 adds pairs of products that do not fit
        quantize_dynamic(
            plain, files.int8, op_types_to_quantize=["MatMul"], weight_type=QuantType.QInt8,
            per_channel=True, reduce_range=True,
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
        )  # fmt: skip


def network(files: Files) -> Any:
    """The encoder as a module of torch, as plain as it gets."""
    import torch
    from torch.nn import functional

    facts = read_model_folder(files.folder)
    shape = read_shape(facts, ranks=False)
    weights = {name: torch.from_numpy(v.copy()) for name, v in read_weights(facts, shape).items()}

    def linear(*names: str) -> Any:
        weight = torch.cat([weights[f"{name}.weight"] for name in names])
        made = torch.nn.Linear(weight.shape[1], weight.shape[0])
        made.weight.data = weight
        made.bias.data = torch.cat([weights[f"{name}.bias"] for name in names])
        return made

    def norm(name: str) -> Any:
        made = torch.nn.LayerNorm(shape.n_embd, shape.eps)
        made.weight.data, made.bias.data = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return made

    class Layer(torch.nn.Module):  # type: ignore[misc,name-defined,unused-ignore]
        def __init__(self, name: str) -> None:
            super().__init__()
            own = f"{name}.attention.self"
            self.heads = linear(f"{own}.query", f"{own}.key", f"{own}.value")
            self.mixed = linear(f"{name}.attention.output.dense")
            self.norm = norm(f"{name}.attention.output.LayerNorm")
            self.inner = linear(f"{name}.intermediate.dense")
            self.outer = linear(f"{name}.output.dense")
            self.last_norm = norm(f"{name}.output.LayerNorm")

        def forward(self, x: Any, mask: Any) -> Any:
            by_head = *x.shape[:2], 3, shape.n_head, shape.n_embd // shape.n_head
            query, key, value = self.heads(x).view(by_head).permute(2, 0, 3, 1, 4).unbind(0)
            mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
            x = self.norm(x + self.mixed(mixed.transpose(1, 2).reshape(x.shape)))
            return self.last_norm(x + self.outer(functional.gelu(self.inner(x))))

    class Network(torch.nn.Module):  # type: ignore[misc,name-defined,unused-ignore]
        def __init__(self) -> None:
            super().__init__()
            table = torch.nn.Embedding.from_pretrained
            self.words = table(weights["embeddings.word_embeddings.weight"])
            positions = weights["embeddings.position_embeddings.weight"][shape.first_position :]
            types = weights["embeddings.token_type_embeddings.weight"][0]
            self.positions = torch.nn.Parameter(positions + types)
            self.norm = norm("embeddings.LayerNorm")
            self.layers = torch.nn.ModuleList(map(Layer, shape.layers))

        def forward(self, ids: Any, mask: Any) -> Any:
            x = self.norm(self.words(ids) + self.positions[: ids.shape[1]])
            seen = mask[:, None, None].to(torch.bool)
            for layer in self.layers:
                x = layer(x, seen)
            return x

    return Network().eval()


def torch_runtime(files: Files, n_threads: int, *, kind: str) -> Encode:
    import torch

    torch.set_num_threads(n_threads)
    model = network(files)
    if kind == "int8":
        model = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, torch.qint8)
    elif kind == "compiled":
        model = torch.compile(model, dynamic=True)

    def call(inputs: Inputs) -> Floats:
        with torch.inference_mode():
            rows = model(torch.from_numpy(inputs.ids), torch.from_numpy(inputs.mask))
            found: Floats = rows.numpy()
        return found

    return padded(call)


def openvino_runtime(files: Files, n_threads: int) -> Encode:
    import openvino
    import torch

    examples = torch.ones(2, 8, dtype=torch.int64), torch.ones(2, 8, dtype=torch.int64)
    model = openvino.convert_model(network(files), example_input=examples)
    model.reshape({"ids": [-1, -1], "mask": [-1, -1]})
    how = {
        "INFERENCE_NUM_THREADS": n_threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32",
    }  # fmt: skip
    compiled = openvino.Core().compile_model(model, "CPU", how)

    def call(inputs: Inputs) -> Floats:
        found: Floats = compiled({"ids": inputs.ids, "mask": inputs.mask})[0]
        return found

    return padded(call)


RUNTIMES: dict[str, Callable[[Files, int], Encode]] = {
    REFERENCE: partial(ours, backend="llamacpp", form="gguf"),
    "llamacpp Q8_0": partial(ours, backend="llamacpp", form="q8_0"),
    "onnx": partial(ours, backend="onnx", form="folder"),
    "onnx int8": onnx_int8,
    "torch": partial(torch_runtime, kind="f32"),
    "torch compiled": partial(torch_runtime, kind="compiled"),
    "torch int8": partial(torch_runtime, kind="int8"),
    "openvino": openvino_runtime,
}


# a process of one runtime


@dataclass(frozen=True, slots=True)
class Ready:
    seconds: float  # to import, load, and in int8 to quantize
    fault: str = ""  # why it is not


@dataclass(frozen=True, slots=True)
class Turn:
    seconds: float
    cpu_seconds: float  # of all its threads
    vectors: Floats
    memory_bytes: int  # of its own


def serve(name: str, files: Files, n_threads: int, pipe: Connection) -> None:
    """Loads, then answers each list of batches with a Turn, until there is none."""
    started_at = time.perf_counter()
    try:
        encode = RUNTIMES[name](files, n_threads)
    except Exception as error:  # whatever a runtime has to say
        pipe.send(Ready(0, f"{type(error).__name__}: {error}"))
        return
    pipe.send(Ready(time.perf_counter() - started_at))
    while batches := pipe.recv():
        vectors: list[Floats] = []
        started_at, cpu_started_at = time.perf_counter(), time.process_time()
        for batch in batches:
            rows, end = encode(batch), 0
            for ids in batch:
                vectors.append(rows[end : end + len(ids)].mean(axis=0))
                end += len(ids)
        seconds = time.perf_counter() - started_at
        cpu_seconds = time.process_time() - cpu_started_at
        found = np.stack(vectors)
        memory = psutil.Process().memory_full_info().uss
        found /= np.linalg.norm(found, axis=1, keepdims=True)
        pipe.send(Turn(seconds, cpu_seconds, found, memory))


class Runtime:
    def __init__(self, name: str, files: Files, n_threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(name, files, n_threads, theirs))
        self._process.start()
        self.ready: Ready = self._pipe.recv()

    def turn(self, batches: list[list[Ids]]) -> Turn:
        self._pipe.send(batches)
        turn: Turn = self._pipe.recv()
        return turn

    def close(self) -> None:
        if self._process.is_alive():
            self._pipe.send(None)
        self._process.join()


# what is measured


def batches_of(tokenize: Callable[[str], list[int]], kind: str, n_tokens: int, seed: str) -> Any:
    """Texts of such lengths, packed as the service does it. `mixed` has many short and few long."""
    dice = random.Random(f"{kind}/{seed}")
    texts: list[Ids] = []
    while sum(map(len, texts)) < n_tokens:
        if kind == "mixed":
            length = min(max(int(dice.lognormvariate(3.6, 1.2)), 5), 400)
        else:
            length = dice.randint(*LENGTHS[kind])
        body = tokenize(" ".join(dice.choices(WORDS, k=length)))[: length - 2]
        texts.append(np.array([0, *body, 2], np.int32))  # of an XLM-R
    packer = Batcher(n_tokens=BATCH_TOKENS, n_sequences=MAX_SEQUENCES)
    packer.add(0, [(index, len(ids)) for index, ids in enumerate(texts)])
    batches = []
    while not packer.idle:
        batches.append([texts[index] for _, index in packer.plan()])
    return batches


def prepared(model: Path, made: Path) -> Files:
    """Of what is in `made` already nothing is made again."""
    import llama_cpp

    LlamaLog()
    base = made / model.stem
    files = Files(
        model.resolve(), base.with_suffix(".q8_0.gguf"), base, base.with_suffix(".int8.onnx")
    )
    if not files.folder.exists():
        convert(files.gguf, files.folder)
    if not files.q8_0.exists():
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.allow_requantize = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, True
        paths = (str(path).encode() for path in (files.gguf, files.q8_0))
        if llama_cpp.llama_model_quantize(*paths, params):
            raise SystemExit(f"{model.name} cannot be quantized.")
    return files


def measure(
    runtimes: dict[str, Runtime], kinds: Sequence[str], n_tokens: int, rounds: int,
    tokenize: Callable[[str], list[int]],
) -> dict[str, dict[str, Any]]:  # fmt: skip
    found: dict[str, dict[str, Any]] = {name: {} for name in runtimes}
    for kind in kinds:
        speeds: dict[str, list[float]] = {name: [] for name in runtimes}
        by_cpu: dict[str, list[float]] = {name: [] for name in runtimes}
        turns: dict[str, Turn] = {}
        for number in range(rounds + 1):  # the first one is to warm up
            batches = batches_of(tokenize, kind, n_tokens, str(number))
            n_tokens_of_round = sum(len(ids) for batch in batches for ids in batch)
            for name in list(runtimes)[:: -1 if number % 2 else 1]:
                turns[name] = runtimes[name].turn(batches)
                speeds[name].append(n_tokens_of_round / turns[name].seconds)
                by_cpu[name].append(n_tokens_of_round / turns[name].cpu_seconds)
        print(f"{kind}: {rounds} rounds", file=sys.stderr)
        for name, turn in turns.items():
            ratios = _ratios(speeds[name], speeds[REFERENCE])
            apart = turn.vectors - turns[REFERENCE].vectors
            cosines = (turn.vectors * turns[REFERENCE].vectors).sum(axis=1)
            found[name][kind] = {
                "tokens_per_s": round(median(speeds[name][1:])),
                "ratio": round(median(ratios), 2),
                "least": round(min(ratios), 2),
                "most": round(max(ratios), 2),
                "tokens_per_cpu_s": round(median(by_cpu[name][1:])),
                "cpu_ratio": round(median(_ratios(by_cpu[name], by_cpu[REFERENCE])), 2),
                "max_difference": float(f"{np.abs(apart).max():.1e}"),
                "max_cosine_distance": float(f"{max(0.0, 1 - cosines.min()):.1e}"),
                "memory_mb": turn.memory_bytes >> 20,
            }
    return found


def _ratios(speeds: Sequence[float], of_others: Sequence[float]) -> list[float]:
    """Within each round but the first."""
    return [a / b for a, b in zip(speeds[1:], of_others[1:], strict=True)]


def versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add, kinds = parser.add_argument, [*LENGTHS, "mixed"]
    add("model", nargs="?", type=Path, default=ROOT / DEFAULT_EMBEDDING_MODEL)
    add("--runtimes", nargs="+", choices=RUNTIMES, default=list(RUNTIMES), metavar="NAME")
    add("--lengths", nargs="+", choices=kinds, default=kinds, metavar="KIND")
    add("--tokens", type=int, default=1500, metavar="N", help="of a turn, at least")
    add("--rounds", type=int, default=3, metavar="N")
    add("--threads", type=int, default=2, metavar="N")
    add("--made", type=Path, metavar="DIR", help="keeps what is made of the model, for other runs")
    options = parser.parse_args(argv)
    os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))  # as workers have it
    with ExitStack() as stack:
        made = options.made or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        files = prepared(options.model, made)
        runtimes: dict[str, Runtime] = {}
        for name in dict.fromkeys([REFERENCE, *options.runtimes]):
            runtime = Runtime(name, files, options.threads)
            stack.callback(runtime.close)
            fault = runtime.ready.fault
            print(f"{name}: {fault or 'ready'}", file=sys.stderr)
            if not fault:
                runtimes[name] = runtime
        if len(runtimes) < 2:
            print("Nothing to compare. See the line with pip in this file.", file=sys.stderr)
            return 1
        tokenizer = load_encoder(spec_of(files.gguf, N_CTX, 1), lambda _: None).tokenizer
        found = measure(
            runtimes, options.lengths, options.tokens, options.rounds,
            partial(tokenizer.tokenize, parse_special=False, continues=False),
        )  # fmt: skip
    result = {
        "machine": machine(), "versions": versions(), "model": options.model.name,
        "threads": options.threads, "rounds": options.rounds,
        "start_s": {name: round(of.ready.seconds, 1) for name, of in runtimes.items()},
        "runtimes": found,
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
