"""The service's own encoders, as its worker loads and uses them, without the worker."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedders import Embedded, SimpleEmbedder, new_embedder
from engine import wire
from engine.backends.base import Encoder, load_encoder
from rerankers import BGEReranker
from tests import encoder_fixtures as tiny

ALL: frozenset[Any] = frozenset({"dense", "sparse", "colbert"})
Load = Callable[..., Encoder]


@contextmanager
def loading(**common: Any) -> Iterator[Load]:
    """Loads encoders by `spec`, with what is common to all; closes them at the end."""
    with ExitStack() as loaded:

        def load(path: Path, **values: Any) -> Encoder:
            encoder = load_encoder(spec(path, **common | values), lambda _: None)
            loaded.callback(encoder.close)
            return encoder

        yield load


def spec(
    path: Path,
    n_ctx: int = 512,
    backend: str = "llamacpp",
    *,
    flash_attention: bool = False,
    **values: Any,
) -> wire.WorkerSpec:
    kind = "reranker" if "reranker" in path.name else "embedding"
    encoder = wire.EncoderSpec(**{"kind": kind} | values)
    return wire.WorkerSpec(
        name="embedding", backend=backend, model_path=str(path), n_ctx=n_ctx, n_parallel=8,
        kv_tokens=512, n_batch=512, n_threads=1, n_gpu_layers=0,
        flash_attention=flash_attention, encoder=encoder,
    )  # fmt: skip


def embedder_of(encoder: Encoder, **values: Any) -> SimpleEmbedder:
    embedder = new_embedder(encoder, wire.EncoderSpec(kind="embedding", **values))
    assert isinstance(embedder, SimpleEmbedder)
    return embedder


def sequences(embedder: SimpleEmbedder, texts: Sequence[str]) -> list[NDArray[np.int32]]:
    fitting = [embedder.frame(text, "none").fit(embedder.encoder.n_ctx, "end") for text in texts]
    return [fit[0] for fit in fitting if fit is not None]


def embed(embedder: SimpleEmbedder, texts: Sequence[str], size: int = 4) -> list[Embedded]:
    """All kinds of vectors, `size` texts at a time."""
    ids = sequences(embedder, texts)
    found = []
    for at in range(0, len(ids), size):
        batch = ids[at : at + size]
        found += embedder.embed(batch, [ALL & embedder.outputs] * len(batch), lambda: True)
    return found


def pairs_of(reranker: BGEReranker, pairs: Sequence[tuple[str, str]]) -> list[NDArray[np.int32]]:
    framed = [reranker.frame(query, document)[0] for query, document in pairs]
    fitting = [pair.fit(reranker.encoder.n_ctx, "end") for pair in framed]
    return [fit[0] for fit in fitting if fit is not None]


def scores_of(
    reranker: BGEReranker, pairs: Sequence[tuple[str, str]], size: int = 4
) -> list[float]:
    ids = pairs_of(reranker, pairs)
    return [s for at in range(0, len(ids), size) for s in reranker.score(ids[at : at + size])]


def write_hf_folders(folder: Path) -> Path:
    """Of both families an encoder and a cross-encoder, as Hugging Face directories."""
    tiny.write_hf_embedder(folder / "embedder")
    tiny.write_hf_reranker(folder / "reranker")
    tiny.write_hf_bert(folder / "bert", tiny.tiny_bert())
    tiny.write_hf_bert(folder / "bert-reranker", tiny.tiny_typed_reranker())
    return folder


def ids_of(*texts: Sequence[int]) -> list[NDArray[np.int32]]:
    return [np.array(ids, np.int32) for ids in texts]


def vectors_of(embedder: SimpleEmbedder, batch: Sequence[NDArray[np.int32]]) -> list[Embedded]:
    return embedder.embed(batch, [embedder.outputs] * len(batch), lambda: True)


def weights_of(text: Embedded) -> dict[int, float]:
    assert text.sparse is not None
    return dict(zip(text.sparse[0].tolist(), text.sparse[1].tolist(), strict=True))
