"""Embeddings through the service, over HTTP, beside a bare loop of llama_encode on the same file.

    python -m bench.encoders
    python -m bench.encoders models/multilingual-e5-small-F32.gguf --texts 64 --rounds 5
    python -m bench.encoders --llama-server $(bench/peers/build_llama_server.sh)/llama-server

1. Many texts of mixed lengths in one request: tokens/s beside the bare loop, which packs the same
   texts to the same budget and makes nothing of the rows.
2. Single requests, all at once: the same.
3. Dense, sparse and ColBERT vectors in one request, beside dense ones alone. The heads are made up,
   which costs what real ones cost.
4. Short queries one after the other, alone and beside a request of many long documents: how long
   one takes. The same with a query and four short documents that are to be ranked, beside many
   long ones; and with passages of some sentences, alone.
5. With --llama-server that server, on the same file and over HTTP, with 1, 2 and 4.
6. With --flag FlagEmbedding's own encode on a Hugging Face directory of the same model, with 1 and
   2, and a service with the backend flag, with 1. It wants `./setup.sh --flag`.

It starts a service of its own on a free port. All take turns in each round, forwards and backwards,
with texts that no round had before; what counts is the median of the rounds' ratios.
"""

import argparse
import asyncio
import os
import random
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

import httpx
import msgspec
import numpy as np

from bench.own_service import PATIENCE_S, free_port, running, service
from bench.plain_client import REST_S, post
from engine.backends.base import Encoder, load_encoder
from engine.batcher import Batcher
from engine.client import SPIN_COUNT
from engine.file_names import COLBERT, SPARSE
from engine.model_file import read_model_file
from engine.wire import EncoderSpec, WorkerSpec
from models.convert.hf_folder import write_safetensors
from settings import DEFAULT_EMBEDDING_MODEL, ROOT
from worker_spec import default_n_threads

BATCH_TOKENS = 512
WORDS = (
    "river stone lamp bird cloud letter garden winter bridge coffee paper train window music "
    "forest silver market island candle mirror story engine summer shadow painter doctor ocean "
    "Fluss Stein Lampe Vogel Wolke Brief Garten Winter Brücke Kaffee maison jardin fenêtre "
    "книга город вода зима окно поезд музыка"
).split()

N_QUERIES = 12
N_PASSAGES = 24
PASSAGE_WORDS = 42
N_DOCUMENTS = 100  # beside them
PAUSE_S = 0.7  # between queries

IN_MS = ("queries", "passages", "rankings")
Turn = Callable[[Sequence[str]], Awaitable[float]]  # tokens/s; of IN_MS ms


def mixed_texts(seed: str, count: int) -> list[str]:
    """Many short ones and a few long ones: half have fewer than some thirty tokens, the longest
    some four hundred. Each seed has words of its own, and all have texts of the same lengths."""
    of_lengths, of_words = random.Random(0), random.Random(seed)
    lengths = (min(max(int(of_lengths.lognormvariate(3.0, 1.2)), 3), 220) for _ in range(count))
    return [" ".join(of_words.choices(WORDS, k=length)) for length in lengths]


class Bare:
    """llama_encode on texts that are tokenised already, in batches as full as the service's."""

    def __init__(self, model: Path, n_ctx: int, n_threads: int) -> None:
        self._encoder = load_encoder(spec_of(model, n_ctx, n_threads), lambda _: None)
        ask_nobody(self._encoder)

    def tokenize(self, texts: Sequence[str]) -> list[np.ndarray[Any, np.dtype[np.int32]]]:
        specials, n_ctx = self._encoder.specials, self._encoder.n_ctx
        begin = [] if specials.begin is None else [specials.begin]
        end = [] if specials.end is None else [specials.end]
        found = []
        for text in texts:
            ids = self._encoder.tokenizer.tokenize(text, parse_special=False, continues=False)
            body = ids[: n_ctx - len(begin) - len(end)]
            found.append(np.array(begin + body + end, np.int32))
        return found

    async def run(self, texts: Sequence[str]) -> float:
        ids = self.tokenize(texts)
        packer = Batcher(n_tokens=BATCH_TOKENS, n_sequences=self._encoder.n_sequences)
        packer.add(0, [(index, len(of_text)) for index, of_text in enumerate(ids)])
        started_at = time.perf_counter()
        while not packer.idle:
            self._encoder.encode([ids[index] for _, index in packer.plan()])
        return sum(map(len, ids)) / (time.perf_counter() - started_at)

    def close(self) -> None:
        self._encoder.close()


def spec_of(model: Path, n_ctx: int, n_threads: int, backend: str = "llamacpp") -> WorkerSpec:
    return WorkerSpec(
        name="bench", backend=backend, model_path=str(model), n_ctx=n_ctx, n_parallel=1,
        kv_tokens=n_ctx, n_batch=BATCH_TOKENS, n_threads=n_threads, n_gpu_layers=-1,
        encoder=EncoderSpec(kind="embedding", batch_tokens=BATCH_TOKENS),
    )  # fmt: skip


def ask_nobody(encoder: Encoder) -> None:
    """Without the call between two nodes of the graph, by which the service hears of new things."""
    import llama_cpp

    nothing = llama_cpp.ggml_abort_callback()
    llama_cpp.llama_set_abort_callback(getattr(encoder, "_context", None), nothing, None)


class Service:
    """What a client of the embedding tier measures. It speaks plain sockets: an HTTP library takes
    as long for a request as the service does, on the same cores."""

    def __init__(self, url: str, **fields: Any) -> None:
        self._host, self._port = urlsplit(url).hostname, urlsplit(url).port
        self._fields = fields

    async def bulk(self, texts: Sequence[str]) -> float:
        return await self._timed([list(texts)])

    async def singles(self, texts: Sequence[str]) -> float:
        return await self._timed([[text] for text in texts])

    async def triple(self, texts: Sequence[str]) -> float:
        return await self._timed([list(texts)], embedding_type=["dense", "sparse", "colbert"])

    async def queries(self, texts: Sequence[str]) -> float:
        """How long one takes, in ms."""
        return await self._each([self._embed([_query(text)]) for text in texts[:N_QUERIES]])

    async def queries_beside(self, texts: Sequence[str]) -> float:
        """The same while documents are embedded."""
        queries = [self._embed([_query(text)]) for text in texts[:N_QUERIES]]
        return await self._beside(self._embed([_long(text) for text in texts]), queries)

    async def passages(self, texts: Sequence[str]) -> float:
        """How long one of some sentences takes, in ms."""
        return await self._each([self._embed([_passage(text)]) for text in texts])

    async def rankings(self, texts: Sequence[str]) -> float:
        """How long one of a few short documents takes, in ms."""
        return await self._each([self._rank(text, _short(text)) for text in texts[:N_QUERIES]])

    async def rankings_beside(self, texts: Sequence[str]) -> float:
        """The same while many long ones are ranked."""
        short = [self._rank(text, _short(text)) for text in texts[:N_QUERIES]]
        return await self._beside(self._rank(texts[-1], [_long(text) for text in texts]), short)

    async def _beside(self, large: bytes, small: Sequence[bytes]) -> float:
        task = asyncio.create_task(self._ask(large))
        await asyncio.sleep(PAUSE_S)
        ms = await self._each(small, task)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        return ms

    async def _each(
        self, requests: Sequence[bytes], beside: "asyncio.Task[bytes] | None" = None
    ) -> float:
        """The median of their times in ms, as long as there is something beside them."""
        times: list[float] = []
        for request in requests:
            if times and beside is not None and beside.done():
                break
            started_at = time.perf_counter()
            await self._ask(request)
            times.append(1e3 * (time.perf_counter() - started_at))
            await asyncio.sleep(PAUSE_S)
        return median(times)

    def _embed(self, texts: Sequence[str], **fields: Any) -> bytes:
        common = {"model": "embedding", "encoding_format": "base64", **self._fields}
        return post("/v1/embeddings", common | fields | {"input": texts})

    def _rank(self, text: str, documents: Sequence[str]) -> bytes:
        body = {"model": "reranker", "query": _query(text), "documents": documents}
        return post("/v1/rerank", body | self._fields)

    async def _timed(self, inputs: Sequence[list[str]], **fields: Any) -> float:
        """Until the last byte has come; what is in them is read afterwards."""
        requests = [self._embed(texts, **fields) for texts in inputs]
        started_at = time.perf_counter()
        replies = await asyncio.gather(*map(self._ask, requests))
        seconds = time.perf_counter() - started_at
        n_tokens: int = sum(msgspec.json.decode(r)["usage"]["prompt_tokens"] for r in replies)
        return n_tokens / seconds

    async def _ask(self, request: bytes) -> bytes:
        reader, writer = await asyncio.open_connection(self._host, self._port, limit=1 << 24)
        try:
            writer.write(request)
            head, _, content = (await reader.read()).partition(b"\r\n\r\n")
        finally:
            writer.close()
        if b" 200 " not in head.partition(b"\r\n")[0]:
            raise SystemExit(f"no measurement: {(head + content)[:400].decode(errors='replace')}")
        return content


def _query(text: str) -> str:
    return " ".join(text.split()[:6])


def _passage(text: str) -> str:
    return " ".join(random.Random(text).choices(WORDS, k=PASSAGE_WORDS))


def _short(text: str) -> list[str]:
    """Four documents, which begin as it does."""
    return [f"{_query(text)} {word}" for word in WORDS[:4]]


def _long(text: str) -> str:
    return " ".join([*text.split()[:60], *WORDS * 4])


class Flag:
    """FlagEmbedding as its users call it, for dense vectors."""

    def __init__(self, folder: Path, n_ctx: int, n_threads: int) -> None:
        import torch
        from FlagEmbedding import BGEM3FlagModel

        torch.set_num_threads(n_threads)
        self._model = BGEM3FlagModel(str(folder), use_fp16=False, devices="cpu")
        self._n_ctx = n_ctx

    async def bulk(self, texts: Sequence[str]) -> float:
        return self._timed([list(texts)])

    async def singles(self, texts: Sequence[str]) -> float:
        return self._timed([[text] for text in texts])

    def _timed(self, calls: Sequence[list[str]]) -> float:
        started_at = time.perf_counter()
        for texts in calls:
            self._model.encode(texts, max_length=self._n_ctx)
        seconds = time.perf_counter() - started_at
        ids = self._model.tokenizer(
            [text for texts in calls for text in texts], max_length=self._n_ctx, truncation=True
        )["input_ids"]
        return sum(map(len, ids)) / seconds


@contextmanager
def serving(model: Path, n_ctx: int, n_threads: int) -> Iterator[str]:
    """The URL of a service with this model and made heads."""
    with tempfile.TemporaryDirectory() as folder:
        heads = write_heads(Path(folder), read_model_file(model).n_embd)
        settings = _settings(model, "llamacpp", n_ctx, n_threads) | {
            "EMBEDDING_SPARSE_HEAD_PATH": str(heads), "EMBEDDING_COLBERT_HEAD_PATH": str(heads),
        }  # fmt: skip
        with service(settings, _answers) as (url, _):
            yield url


def _settings(model: Path, backend: str, n_ctx: int, n_threads: int) -> dict[str, str]:
    return {
        "LOG_LEVEL": "WARNING",
        "EMBEDDING_MODEL_PATH": str(model.resolve()), "EMBEDDING_BACKEND": backend,
        "EMBEDDING_PRELOAD": "true", "EMBEDDING_N_CTX": str(n_ctx),
        "EMBEDDING_N_THREADS": str(n_threads), "EMBEDDING_BATCH_TOKENS": str(BATCH_TOKENS),
    }  # fmt: skip


@contextmanager
def llama_server(binary: Path, model: Path, n_ctx: int, n_threads: int) -> Iterator[str]:
    """The URL of llama.cpp's own server with this model, eight texts at once."""
    port = free_port()
    numbers = {
        "--port": port, "-c": 8 * n_ctx, "-np": 8, "-b": BATCH_TOKENS, "-ub": BATCH_TOKENS,
        "-t": n_threads,
    }  # fmt: skip
    options = [text for name, number in numbers.items() for text in (name, str(number))]
    command = [str(binary.resolve()), "-m", str(model.resolve()), "--embeddings", *options]
    url = f"http://127.0.0.1:{port}"
    with running(command, url, _answers):
        yield url


def write_heads(folder: Path, n_embd: int) -> Path:
    dice = np.random.RandomState(0)
    shapes = {
        f"{SPARSE}.weight": (1, n_embd), f"{SPARSE}.bias": (1,),
        f"{COLBERT}.weight": (n_embd, n_embd), f"{COLBERT}.bias": (n_embd,),
    }  # fmt: skip
    made = {name: dice.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return write_safetensors(folder / "heads.safetensors", made)


def _answers(url: str) -> bool:
    """False while it loads. Raises SystemExit where it says that it cannot."""
    body = {"model": "embedding", "input": "hello"}
    reply = httpx.post(f"{url}/v1/embeddings", json=body, timeout=PATIENCE_S)
    if reply.status_code not in (200, 503):
        raise SystemExit(f"no measurement: HTTP {reply.status_code}: {reply.text[:300]}")
    return reply.status_code == 200


async def measure(
    url: str,
    bare: Bare,
    *,
    n_texts: int,
    n_singles: int,
    rounds: int,
    peer: str | None = None,
    flag: tuple[Flag, str] | None = None,
) -> dict[str, list[float]]:
    """Tokens/s by turn, a number a round."""
    service = Service(url, truncate="end")
    turns: dict[str, tuple[Turn, int]] = {
        "bulk": (service.bulk, n_texts),
        "bulk, bare": (bare.run, n_texts),
        "triple": (service.triple, n_texts),
        "singles": (service.singles, n_singles),
        "singles, bare": (bare.run, n_singles),
        "queries": (service.queries, N_QUERIES),
        "queries, beside": (service.queries_beside, N_DOCUMENTS),
        "passages": (service.passages, N_PASSAGES),
        "rankings": (service.rankings, N_QUERIES),
        "rankings, beside": (service.rankings_beside, N_DOCUMENTS),
    }
    if peer is not None:
        turns["bulk, llama-server"] = Service(peer).bulk, n_texts
        turns["singles, llama-server"] = Service(peer).singles, n_singles
        turns["queries, llama-server"] = Service(peer).queries, N_QUERIES
        turns["passages, llama-server"] = Service(peer).passages, N_PASSAGES
        turns["queries, beside, llama-server"] = Service(peer).queries_beside, N_DOCUMENTS
    if flag is not None:
        flag_embedding, with_flag = flag
        turns["bulk, FlagEmbedding"] = flag_embedding.bulk, n_texts
        turns["singles, FlagEmbedding"] = flag_embedding.singles, n_singles
        turns["bulk, backend flag"] = Service(with_flag, truncate="end").bulk, n_texts
    for name, (turn, _) in turns.items():
        if not name.startswith(IN_MS):
            await turn(mixed_texts("warm-up", 4))
    speeds: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(rounds):
        for name in list(turns)[:: -1 if number % 2 else 1]:
            turn, count = turns[name]
            await asyncio.sleep(REST_S)
            # who is compared has the same texts; dense and triple must not share them, as what the
            # service has computed it may remember
            kind = name if name.startswith(("triple", *IN_MS)) else name.partition(",")[0]
            speeds[name].append(await turn(mixed_texts(f"{kind}/{number}", count)))
    return speeds


COMPARED = (
    ("one request / bare loop", "bulk", "bulk, bare"),
    ("single requests / bare loop", "singles", "singles, bare"),
    ("dense + sparse + colbert / dense", "triple", "bulk"),
    ("one request / llama-server", "bulk", "bulk, llama-server"),
    ("single requests / llama-server", "singles", "singles, llama-server"),
    ("a query beside documents / alone", "queries, beside", "queries"),
    ("the same, llama-server", "queries, beside, llama-server", "queries, llama-server"),
    ("a ranking beside a long one / alone", "rankings, beside", "rankings"),
    ("a query alone / llama-server", "queries", "queries, llama-server"),
    ("a passage alone / llama-server", "passages", "passages, llama-server"),
    ("one request / FlagEmbedding", "bulk", "bulk, FlagEmbedding"),
    ("single requests / FlagEmbedding", "singles", "singles, FlagEmbedding"),
    ("backend flag / FlagEmbedding", "bulk, backend flag", "bulk, FlagEmbedding"),
)


def report(speeds: dict[str, list[float]]) -> Iterator[str]:
    for what, ours, others in COMPARED:
        if ours not in speeds or others not in speeds:
            continue
        pairs = list(zip(speeds[ours], speeds[others], strict=True))
        ratios = sorted(a / b for a, b in pairs)
        unit = "ms" if ours.startswith(IN_MS) else "tokens/s"
        yield (
            f"{what:34} {median(ratios):.3f}  (rounds {ratios[0]:.3f} to {ratios[-1]:.3f}; "
            f"{median(a for a, _ in pairs):.0f} and {median(b for _, b in pairs):.0f} {unit})"
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("model", nargs="?", type=Path, default=ROOT / DEFAULT_EMBEDDING_MODEL)
    add("--texts", type=int, default=256, metavar="N", help="of one request")
    add("--singles", type=int, default=64, metavar="N", help="requests at once")
    add("--rounds", type=int, default=3, metavar="N")
    add("--n-ctx", type=int, default=512, metavar="N")
    add("--threads", type=int, default=default_n_threads(), metavar="N")
    add("--llama-server", type=Path, metavar="FILE", help="the binary")
    add("--flag", type=Path, metavar="DIR", help="the same model as Hugging Face has it")
    options = parser.parse_args(argv)
    os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))  # as workers have it
    n_ctx = min(options.n_ctx, read_model_file(options.model).n_ctx_train)
    with ExitStack() as stack:
        url = stack.enter_context(serving(options.model, n_ctx, options.threads))
        peer = None
        if options.llama_server is not None:
            peer = stack.enter_context(
                llama_server(options.llama_server, options.model, n_ctx, options.threads)
            )
        flag = None
        if options.flag is not None:
            settings = _settings(options.flag, "flag", n_ctx, options.threads)
            with_flag, _ = stack.enter_context(service(settings, _answers))
            flag = Flag(options.flag, n_ctx, options.threads), with_flag
        bare = Bare(options.model, n_ctx, options.threads)
        try:
            speeds = asyncio.run(
                measure(
                    url, bare, n_texts=options.texts, n_singles=options.singles,
                    rounds=options.rounds, peer=peer, flag=flag,
                )
            )  # fmt: skip
        finally:
            bare.close()
    print(*report(speeds), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
