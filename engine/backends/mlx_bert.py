"""BERT, RoBERTa and XLM-R in mlx: rows of texts, and scores of pairs.

Weights keep the names that transformers gives them, so a directory needs no conversion.
"""

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from engine.backends.bert_folder import Activation, Shape

_ACTIVATIONS: dict[Activation, Callable[[Any], Any]] = {
    "gelu": nn.gelu,
    "gelu_tanh": nn.gelu_approx,
    "relu": nn.relu,
}
# Tokens of a layer that are computed between two questions whether anybody still waits. Without a
# good BLAS (mlx's wheels for Linux have none) those of BGE-M3 take a quarter of a minute.
STEP_TOKENS = 512
# What a layer holds of attention at once, in numbers: 64 MB. On a CPU mlx has all of it in memory,
# which of the longest text of BGE-M3 would be gigabytes.
ATTENTION_NUMBERS = 1 << 24


class Bert:
    """The network. `ask` is called now and then while it computes, and may raise to end that."""

    def __init__(
        self, shape: Shape, weights: Mapping[str, mx.array], ask: Callable[[], None]
    ) -> None:
        self._shape = shape
        self._weights = weights
        self._ask = ask
        self._activation = _ACTIVATIONS[shape.activation]
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
        for layer in self._shape.layers:
            x = self._layer(layer, x, seen)
        return x

    def scores(self, ids: mx.array, mask: mx.array | None, types: mx.array | None) -> mx.array:
        """Logits [n_sequences, 1] of pairs."""
        first = self.rows(ids, mask, types)[:, 0]
        (dense, _), (out, _) = self._shape.head_layers
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
