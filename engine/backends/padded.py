"""What encoders have in common whose libraries take sequences as rows of one length.

A batch is cut into calls of like lengths, and in each call the short ones are filled up.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from engine.backends.base import (
    MAX_SEQUENCES,
    Floats,
    Ids,
    Interrupted,
    Specials,
    Tokenizer,
    check_batch,
)
from engine.heads import heads_of
from engine.model_file import ModelFile
from engine.model_folder import pooling_in
from engine.types import Pooling, Scale
from engine.wire import WorkerSpec

CALL_TOKENS = 20  # so many could be computed in the time that a call takes beside its tokens


@dataclass(frozen=True, slots=True)
class Inputs:
    """The sequences of one call, each of shape [n_sequences, longest]."""

    ids: NDArray[np.int64]
    mask: NDArray[np.int64]  # 1 where there is a token
    types: NDArray[np.int64] | None  # 1 in the second text of a pair; None: there is one type


class PaddedEncoder(ABC):
    """Implements `engine.backends.base.Encoder` for the model in a Hugging Face directory."""

    tokenizer: Tokenizer
    specials: Specials
    padding: int  # the id that fills up
    template: str | None = None
    default_pooling: Pooling = "mean"  # of sentence-transformers

    def __init__(self, spec: WorkerSpec, facts: ModelFile) -> None:
        assert spec.encoder is not None
        ranks = spec.encoder.kind == "reranker"
        self.heads, self.missing_heads = heads_of(facts.path, facts.n_embd, spec.encoder)
        self.n_embd = facts.n_embd
        self.n_ctx = min(spec.n_ctx, facts.n_ctx_train)
        self.n_tokens = max(self.n_ctx, spec.encoder.batch_tokens)
        self.n_sequences = MAX_SEQUENCES
        is_told = ranks or self.heads is not None or spec.encoder.pooling is not None
        self.pooling: Pooling | None = None if is_told else pooling_in(facts.path)
        self.scale: Scale | None = "logit" if ranks else None
        # BERT was trained to tell a query from a document by a type; XLM-R has only one
        self.has_types = ranks and facts.architecture == "bert"
        self._go_on: Callable[[], bool] = lambda: True

    @abstractmethod
    def compute(self, inputs: Inputs) -> Floats:
        """Rows [n_sequences, longest, n_embd], or scores [n_sequences, 1]."""

    @abstractmethod
    def close(self) -> None: ...

    def ask(self) -> None:
        """To be called now and then while something is computed. Raises Interrupted."""
        if not self._go_on():
            raise Interrupted

    def encode(self, batch: Sequence[Ids], go_on: Callable[[], bool] = lambda: True) -> Floats:
        check_batch(batch, self)
        self._go_on = go_on
        lengths = [len(ids) for ids in batch]
        ends = np.cumsum(lengths)
        size = (len(batch),) if self.scale is not None else (int(ends[-1]), self.n_embd)
        found = np.empty(size, np.float32)
        for group in groups(lengths):
            values = self.compute(self._padded([batch[i] for i in group]))
            for i, of_sequence in zip(group, values, strict=True):
                if self.scale is not None:
                    found[i] = of_sequence[0]
                else:
                    found[ends[i] - lengths[i] : ends[i]] = of_sequence[: lengths[i]]
        return found

    def _padded(self, group: Sequence[Ids]) -> Inputs:
        longest = max(map(len, group))
        ids = np.full((len(group), longest), self.padding, np.int64)
        mask = np.zeros((len(group), longest), np.int64)
        for row, sequence in enumerate(group):
            ids[row, : len(sequence)] = sequence
            mask[row, : len(sequence)] = 1
        types = None
        if self.has_types:
            is_border = ids == self.specials.end
            types = (np.cumsum(is_border, axis=1) - is_border > 0) * mask
        return Inputs(ids, mask, types)


def groups(lengths: Sequence[int]) -> list[list[int]]:
    """Which sequences go into one call, each padded to the longest of its call. The cheapest way
    to cut the sequences, sorted by length, where a call costs CALL_TOKENS beside its tokens."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    costs, starts = [0], [0]  # of the first n sequences; where their last call begins
    for n in range(1, len(order) + 1):
        cost, start = min(
            (costs[k] + CALL_TOKENS + (n - k) * lengths[order[k]], k) for k in range(n)
        )
        costs.append(cost)
        starts.append(start)
    cuts = [len(order)]
    while cuts[-1]:
        cuts.append(starts[cuts[-1]])
    return [order[start:end] for start, end in pairwise(reversed(cuts))]
