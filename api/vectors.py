"""How vectors look in a reply: lists of numbers, or base64 of little-endian floats."""

import asyncio
import base64
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from engine import wire

QUICKLY_ENCODED = 16 << 10  # bytes of vectors: some 0.3 ms as lists of numbers
MAX_HEADER_CHARS = 4000  # of what was cut; clients take some 8,000 in a line

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Cut:
    """What is kept of a dense vector: the first `n` numbers."""

    n: int
    is_centred: bool = False  # of all numbers less their mean

    def of(self, dense: Floats) -> Floats:
        return (dense - dense.mean() if self.is_centred else dense)[: self.n]


@dataclass(frozen=True, slots=True)
class Form:
    """What a client wants to read."""

    is_base64: bool = False
    cut: Cut | None = None
    colbert_dtype: Literal["float32", "float16"] = "float32"


def item(vector: wire.Vector, n_colbert: int, form: Form) -> dict[str, Any]:
    """One item of OpenAI's list. What is not dense stands in further fields, so that every client
    can read it; without a dense vector `embedding` is empty."""
    embedding: Any = []
    if vector.dense is not None:
        dense = of_length_1(vector, form.cut)
        embedding = _base64(dense) if form.is_base64 else dense.tolist()
    fields: dict[str, Any] = {"object": "embedding", "index": vector.index, "embedding": embedding}
    if vector.sparse_ids is not None:
        ids, weights = sparse(vector)
        fields["sparse_embedding"] = {"indices": ids, "values": weights}
        fields["lexical_weights"] = dict(zip(map(str, ids), weights, strict=True))
    if vector.colbert is not None:
        rows: npt.NDArray[Any] = np.frombuffer(vector.colbert, "<f4").reshape(-1, n_colbert)
        rows = rows.astype("<f2" if form.colbert_dtype == "float16" else "<f4")
        if form.is_base64:
            fields["colbert_embedding"] = {
                "data": _base64(rows),
                "shape": list(rows.shape),
                "dtype": form.colbert_dtype,
            }
        else:
            encoded = [msgspec.json.encode(row.tolist()) for row in rows]  # not all in one go
            fields["colbert_vecs"] = msgspec.Raw(b"[" + b",".join(encoded) + b"]")
    if vector.tokens is not None:
        fields["token_ids"] = vector.tokens
        pieces = vector.pieces or []
        fields["tokens"] = [piece.decode(errors="replace") for piece in pieces]
    return fields


async def encoded(vectors: Sequence[wire.Vector], encode: Callable[[], bytes]) -> bytes:
    """What `encode` makes of the vectors, in a thread where that takes longer than to get there."""
    n_bytes = sum(
        len(v.dense or b"") + len(v.colbert or b"") + len(v.sparse_ids or b"") for v in vectors
    )
    return await asyncio.to_thread(encode) if n_bytes > QUICKLY_ENCODED else encode()


def sparse(vector: wire.Vector) -> tuple[list[int], list[float]]:
    """Token ids, ascending, and their weights."""
    assert vector.sparse_ids is not None
    assert vector.sparse_weights is not None
    ids = np.frombuffer(vector.sparse_ids, "<i4").tolist()
    return ids, np.frombuffer(vector.sparse_weights, "<f4").tolist()


def shortened(dense: Floats, cut: Cut | None) -> Floats:
    """What is kept of a vector, of length 1 again."""
    if cut is None or cut.n >= len(dense):
        return dense
    head = cut.of(dense)
    return (head / max(float(np.linalg.norm(head)), 1e-12)).astype("<f4")


def of_length_1(vector: wire.Vector, cut: Cut | None) -> Floats:
    """What is kept of the dense vector."""
    assert vector.dense is not None
    return shortened(np.frombuffer(vector.dense, "<f4"), cut)


def as_pooled(vector: wire.Vector, cut: Cut | None) -> Floats:
    """The same before it had length 1."""
    assert vector.dense is not None
    assert vector.norm is not None
    dense = np.frombuffer(vector.dense, "<f4")
    pooled: Floats = (dense if cut is None else cut.of(dense)) * np.float32(vector.norm)
    return pooled


def _base64(array: npt.NDArray[Any]) -> str:
    return base64.b64encode(array.tobytes()).decode()


def truncated_header(cut: Iterable[tuple[str, int]]) -> dict[str, str]:
    """Where a body has no place for it: which inputs were cut, and by how many tokens. Of more than
    a header takes the first are named, and `...` comes after them."""
    named = ",".join(f"{what}={n_cut}" for what, n_cut in cut if n_cut)
    if len(named) > MAX_HEADER_CHARS:
        named = named[: named.rindex(",", 0, MAX_HEADER_CHARS)] + ",..."
    return {"X-Truncated-Inputs": named} if named else {}
