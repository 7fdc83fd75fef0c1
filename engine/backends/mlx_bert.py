"""BERT, RoBERTa and XLM-R in mlx: rows of texts, and scores of pairs.

Weights keep the names that transformers gives them, so a directory needs no conversion.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn

Head = Literal["roberta", "bert"]  # how a cross-encoder makes a score of its first row

ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "gelu": nn.gelu,
    "gelu_new": nn.gelu_approx,
    "gelu_fast": nn.gelu_approx,
    "gelu_pytorch_tanh": nn.gelu_approx,
    "relu": nn.relu,
}
# Tokens of a layer that are computed between two questions whether anybody still waits. Without a
# good BLAS (mlx's wheels for Linux have none) those of BGE-M3 take a quarter of a minute.
STEP_TOKENS = 512
# What a layer holds of attention at once, in numbers: 64 MB. On a CPU mlx has all of it in memory,
# which of the longest text of BGE-M3 would be gigabytes.
ATTENTION_NUMBERS = 1 << 24


@dataclass(frozen=True, slots=True)
class Shape:
    """What a network looks like, as its config.json says."""

    n_vocab: int
    n_embd: int
    n_layer: int
    n_head: int
    n_ff: int
    n_positions: int  # rows of the table, also those that are never used
    first_position: int
    n_types: int
    eps: float
    activation: str
    head: Head | None

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of all that the network needs."""
        found: dict[str, tuple[int, ...]] = {}
        n = self.n_embd

        def norm(name: str) -> None:
            found[f"{name}.weight"] = found[f"{name}.bias"] = (n,)

        def linear(name: str, n_out: int, n_in: int) -> None:
            found[f"{name}.weight"], found[f"{name}.bias"] = (n_out, n_in), (n_out,)

        for table, rows in (
            ("word", self.n_vocab), ("position", self.n_positions), ("token_type", self.n_types)
        ):  # fmt: skip
            found[f"embeddings.{table}_embeddings.weight"] = (rows, n)
        norm("embeddings.LayerNorm")
        for layer in map(_layer, range(self.n_layer)):
            for part in ("self.query", "self.key", "self.value", "output.dense"):
                linear(f"{layer}.attention.{part}", n, n)
            norm(f"{layer}.attention.output.LayerNorm")
            linear(f"{layer}.intermediate.dense", self.n_ff, n)
            linear(f"{layer}.output.dense", n, self.n_ff)
            norm(f"{layer}.output.LayerNorm")
        if self.head == "roberta":
            linear("classifier.dense", n, n)
            linear("classifier.out_proj", 1, n)
        elif self.head == "bert":
            linear("pooler.dense", n, n)
            linear("classifier", 1, n)
        return found


class Bert:
    """The network. `ask` is called now and then while it computes, and may raise to end that."""

    def __init__(
        self, shape: Shape, weights: Mapping[str, mx.array], ask: Callable[[], None]
    ) -> None:
        self._shape = shape
        self._weights = weights
        self._ask = ask
        self._activation = ACTIVATIONS[shape.activation]
        self._n_pending = 0  # tokens of layers that are asked for and not computed

    def rows(self, ids: mx.array, mask: mx.array | None, types: mx.array | None) -> mx.array:
        """Hidden rows [n_sequences, n_tokens, n_embd] of the last layer, for ids [n_sequences,
        n_tokens]. `mask` is true where there is a token; None: everywhere."""
        self._n_pending = 0
        first = self._shape.first_position
        positions = mx.arange(first, first + ids.shape[1])
        x = self._table("word")[ids] + self._table("position")[positions]
        x = x + self._table("token_type")[mx.zeros_like(ids) if types is None else types]
        x = self._norm("embeddings.LayerNorm", x)
        seen = None if mask is None else mask[:, None, None]
        for number in range(self._shape.n_layer):
            x = self._layer(_layer(number), x, seen)
        return x

    def scores(self, ids: mx.array, mask: mx.array | None, types: mx.array | None) -> mx.array:
        """Logits [n_sequences, 1] of pairs."""
        first = self.rows(ids, mask, types)[:, 0]
        if self._shape.head == "roberta":
            dense, out = "classifier.dense", "classifier.out_proj"
        else:
            dense, out = "pooler.dense", "classifier"
        return self._linear(out, mx.tanh(self._linear(dense, first)))

    def _layer(self, name: str, x: mx.array, seen: mx.array | None) -> mx.array:
        """All of a layer but keys and values is one row's own, so long texts go in pieces."""
        shape = self._shape
        n_sequences, n_tokens, _ = x.shape
        n_rows = max(ATTENTION_NUMBERS // (n_sequences * n_tokens * shape.n_head), 1)
        keys = self._by_head(self._linear(f"{name}.attention.self.key", x))
        values = self._by_head(self._linear(f"{name}.attention.self.value", x))
        pieces = []
        for start in range(0, n_tokens, n_rows):
            piece = x[:, start : start + n_rows]
            mixed = mx.fast.scaled_dot_product_attention(
                self._by_head(self._linear(f"{name}.attention.self.query", piece)),
                keys,
                values,
                scale=(shape.n_embd // shape.n_head) ** -0.5,
                mask=seen,
            )
            mixed = mixed.swapaxes(1, 2).reshape(piece.shape)
            piece = piece + self._linear(f"{name}.attention.output.dense", mixed)
            piece = self._norm(f"{name}.attention.output.LayerNorm", piece)
            inner = self._activation(self._linear(f"{name}.intermediate.dense", piece))
            piece = piece + self._linear(f"{name}.output.dense", inner)
            pieces.append(self._norm(f"{name}.output.LayerNorm", piece))
            self._pace(pieces[-1], is_piece=n_rows < n_tokens)
        return pieces[0] if len(pieces) == 1 else mx.concatenate(pieces, axis=1)

    def _pace(self, rows: mx.array, *, is_piece: bool) -> None:
        """mlx computes nothing before it is told to, and then all of it, pieces side by side."""
        self._n_pending += rows.shape[0] * rows.shape[1]
        if is_piece or self._n_pending >= STEP_TOKENS:
            self._n_pending = 0
            self._ask()
            mx.eval(rows)

    def _by_head(self, rows: mx.array) -> mx.array:
        """[n_sequences, n_head, n_tokens, n_embd / n_head]"""
        return rows.reshape(*rows.shape[:2], self._shape.n_head, -1).swapaxes(1, 2)

    def _table(self, name: str) -> mx.array:
        return self._weights[f"embeddings.{name}_embeddings.weight"]

    def _linear(self, name: str, x: mx.array) -> mx.array:
        return mx.addmm(self._weights[f"{name}.bias"], x, self._weights[f"{name}.weight"].T)

    def _norm(self, name: str, x: mx.array) -> mx.array:
        weight, bias = self._weights[f"{name}.weight"], self._weights[f"{name}.bias"]
        return mx.fast.layer_norm(x, weight, bias, self._shape.eps)


def _layer(number: int) -> str:
    return f"encoder.layer.{number}"
