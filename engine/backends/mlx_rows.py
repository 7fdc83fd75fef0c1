"""The sequences that a model on MLX computes in one step, each with a cache of its own."""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, Protocol

import numpy as np

from engine.backends.mlx_ahead import Ahead, compute_ahead, take_back
from engine.backends.mlx_prompts import (
    Beginnings,
    Cache,
    as_tokens,
    can_cut,
    cut_to_window,
    is_cells,
    parts,
    restore_order,
)
from engine.backends.mlx_sampling import Chooser
from engine.prefix import Tokens
from engine.sampling import scored
from engine.types import Sampled

GROWTH = 256  # cells that one of mlx-lm's memories gets at a time


class Rows(Protocol):
    """Rows are known by the numbers of their sequences."""

    n_most: int
    was_cut: bool  # by a mark the pieces of prompts of the last step were

    def add(
        self,
        number: int,
        tokens: list[int],
        cached: Cache | None,
        n_cached: int,
        chooser: Chooser,
        *,
        is_marked: bool,
    ) -> None:
        """A sequence joins; the first `n_cached` of its tokens, and never all, are in `cached`,
        which is taken over. With marks what follows is computed in pieces that end there."""

    def n_past(self, number: int) -> int:
        """Tokens of its prompt that are computed."""

    def step(self, n_prefill: int) -> tuple[list[tuple[int, int]], int]:
        """One token for each row that is past its prompt, by number; and by how many tokens prompts
        got on, of so many at most. After an exception all of this is of no further use."""

    def untold(self, number: int) -> list[int]:
        """What is chosen of a row, and told by the next step. Waits for it."""

    def guess(self, number: int, guesses: list[int]) -> tuple[list[int], Ahead]:
        """A step of the only row, which is past its prompt, with guesses of what comes after all
        that is chosen. Returns its tokens: what was untold, the guesses that were right, and
        perhaps more. After an exception all of this is of no further use."""

    def retract(self, number: int, n_tokens: int) -> None:
        """Forget so many at least of the tokens that the last `guess` returned, and never more than
        all of them. The row must be removed then."""

    def remove(self, number: int) -> None: ...

    def cache_of(self, number: int) -> tuple[Tokens, Cache]:
        """What is computed of a row, and its tokens: perhaps none, if it has just joined."""


def new_rows(model: Any, n_most: int, n_batch: int, prompts: Beginnings) -> Rows:
    """Rows in one batch, where the model's caches can be put together; else one at a time."""
    cache = import_module("mlx_lm.models.cache").make_prompt_cache(model)
    if all(map(_can_merge, cache)):
        # Prompts that are computed together are filled up to one length, and a state goes on
        # through what fills up, unless the model minds: not all of mlx-lm's do.
        n_prompts = n_most if can_cut(cache) else 1
        return BatchRows(model, n_most, n_batch, prompts, n_prompts=n_prompts)
    return SingleRow(model, n_batch, prompts)


def _can_merge(layer: Any) -> bool:
    parts: Iterable[Any] | None = getattr(layer, "caches", None)
    return all(map(_can_merge, parts)) if parts is not None else hasattr(layer, "merge")


def _has_grown(n_tokens: int, n_new: int) -> bool:
    """A memory with so many tokens got cells for the last of them."""
    return n_tokens % GROWTH < n_new


def _counters(cache: Iterable[Any]) -> Iterator[Any]:
    """What layers count in each step. Where nothing asks for it, as without RoPE and in a state, it
    would stay a sum that grows by a term a step, each with a buffer, of which Metal has so many."""
    for part in parts(cache):
        found = (getattr(part, name, None) for name in ("offset", "left_padding", "lengths"))
        yield from (counter for counter in found if counter is not None)


@dataclass(slots=True)
class Row:
    """One in a BatchGenerator."""

    number: int
    uid: int
    chooser: Chooser
    n_cached: int
    n_prompt: int
    is_marked: bool
    n_prefilled: int = 0

    @property
    def n_past(self) -> int:
        """Of its prompt."""
        return self.n_cached + self.n_prefilled


class BatchRows:
    """Implements Rows over mlx-lm's BatchGenerator, which computes a step ahead: a row's token is
    told when the next one is on its way. So many prompts are computed at once, the others after
    them."""

    def __init__(
        self, model: Any, n_most: int, n_batch: int, prompts: Beginnings, *, n_prompts: int
    ) -> None:
        generator = import_module("mlx_lm.generate").BatchGenerator
        self._mx = import_module("mlx.core")
        self.n_most = n_most
        self._model = model
        self._prompts = prompts
        self._n_prompts = n_prompts
        self._generator = generator(
            model,
            completion_batch_size=n_most,
            prefill_batch_size=n_prompts,
            prefill_step_size=n_batch,
        )
        self.was_cut = False
        self._rows: dict[int, Row] = {}  # by uid
        self._ahead: Ahead | None = None  # of the last step, if it had guesses

    def add(
        self,
        number: int,
        tokens: list[int],
        cached: Cache | None,
        n_cached: int,
        chooser: Chooser,
        *,
        is_marked: bool,
    ) -> None:
        (uid,) = self._generator.insert(
            [tokens[n_cached:]],
            max_tokens=[1 << 30],  # who counts is above
            caches=[cached],
            all_tokens=[tokens[:n_cached]],
            samplers=[chooser.sample],
            logits_processors=[list(chooser.processors)],
        )
        self._rows[uid] = Row(number, uid, chooser, n_cached, len(tokens), is_marked)

    def step(self, n_prefill: int) -> tuple[list[tuple[int, int]], int]:
        self._ahead = None
        restore_order(self._generator._prompt_batch.prompt_cache)
        prefilling = self._prefilling()
        # rounded up: from fewer tokens than are allowed the pace learns nothing
        n_each = -(-n_prefill // max(len(prefilling), 1))
        marks = {row.uid: mark for row in prefilling if (mark := self._next_mark(row))}
        to_mark = min(
            (mark - self._rows[uid].n_past for uid, mark in marks.items()), default=n_each
        )
        self.was_cut = to_mark < n_each
        self._generator.prefill_step_size = min(n_each, to_mark)
        prompts, told = self._generator.next()
        self._mx.async_eval(list(_counters(self._generator._generation_batch.prompt_cache)))
        n_prefilled = 0
        for prompt in prompts:
            if prompt.end_of_prompt:
                continue
            row = self._rows[prompt.uid]
            n_prefilled += prompt.progress[0] - row.n_prefilled
            row.n_prefilled = prompt.progress[0]
            if marks.get(row.uid) == row.n_past:
                self._prompts.mark(row.number, row.n_past, partial(self._copied, row))
        return [(self._rows[one.uid].number, one.token) for one in told], n_prefilled

    def _prefilling(self) -> list[Row]:
        """Those of whose prompts the next step computes a part."""
        waiting = (sequence[0] for sequence in self._generator._unprocessed_sequences)
        uids = [*self._generator._prompt_batch.uids, *waiting]
        return [self._rows[uid] for uid in uids[: self._n_prompts]]

    def _next_mark(self, row: Row) -> int:
        if not row.is_marked:
            return 0
        return self._prompts.next_mark(row.number, row.n_past, row.n_prompt)

    def _copied(self, row: Row) -> Cache:
        """What cannot be cut of a row in its prompt."""
        batch = self._generator._prompt_batch
        at = batch.uids.index(row.uid)
        return self._own([p.extract(at) for p in parts(batch.prompt_cache) if not is_cells(p)])

    def n_past(self, number: int) -> int:
        return self._row(number).n_past

    def _row(self, number: int) -> Row:
        (row,) = (row for row in self._rows.values() if row.number == number)
        return row

    def untold(self, number: int) -> list[int]:
        batch, uid = self._generator._generation_batch, self._row(number).uid
        return [batch._next_tokens[batch.uids.index(uid)].item()] if uid in batch.uids else []

    def guess(self, number: int, guesses: list[int]) -> tuple[list[int], Ahead]:
        batch = self._generator._generation_batch
        (token,) = self.untold(number)
        self._ahead = None  # with the states before it
        with self._mx.stream(self._generator.stream):
            ahead = self._ahead = compute_ahead(
                self._model, batch.prompt_cache, token, guesses, self._row(number).chooser
            )
            batch._next_tokens = self._mx.array([ahead.following], dtype=self._mx.uint32)
        (tokens,) = batch.tokens
        tokens += ahead.last.tokens
        if _has_grown(len(tokens), len(ahead.last.tokens)):
            self._mx.clear_cache()
        return ahead.last.tokens, ahead

    def retract(self, number: int, n_tokens: int) -> None:
        assert self._ahead is not None
        batch = self._generator._generation_batch
        (tokens,) = batch.tokens
        with self._mx.stream(self._generator.stream):
            del tokens[-take_back(batch.prompt_cache, self._ahead.last, n_tokens) :]

    def remove(self, number: int) -> None:
        uid = self._row(number).uid
        del self._rows[uid]
        self._ahead = None
        self._generator.remove([uid])

    def cache_of(self, number: int) -> tuple[Tokens, Cache]:
        uid = self._row(number).uid
        cache, tokens = self._generator.extract_cache([uid])[uid]
        return as_tokens(tokens), self._own(cache)

    def _own(self, cache: Cache) -> Cache:
        """Not a piece of the whole batch's memory, which would stay as long as the piece."""
        mx, tree_map = self._mx, import_module("mlx.utils").tree_map

        def own(part: Any) -> Any:
            return mx.contiguous(part) if isinstance(part, mx.array) else part

        for part in parts(cache):
            cut_to_window(part)
        for layer in cache:
            layer.state = tree_map(own, layer.state)
        mx.eval([layer.state for layer in cache])
        return cache


class ScoredPrompt:
    """A prompt whose tokens' log probabilities are wanted, before it joins the rows. All but its
    last token are computed here."""

    def __init__(self, model: Any, tokens: list[int], n_top: int) -> None:
        self._mx = import_module("mlx.core")
        self._model = model
        self._tokens = tokens
        self._n_top = n_top
        self.cache: Cache = import_module("mlx_lm.models.cache").make_prompt_cache(model)
        self.scored: list[Sampled] = []  # its tokens but the first

    @property
    def n_left(self) -> int:
        return len(self._tokens) - 1 - len(self.scored)

    def step(self, n_tokens: int) -> int:
        """Compute so many more at most, and say how many."""
        at = len(self.scored)
        n_tokens = min(n_tokens, self.n_left)
        part = self._mx.array([self._tokens[at : at + n_tokens]])
        logits = self._model(part, cache=self.cache)[0].astype(self._mx.float32)
        self._mx.eval(logits, [layer.state for layer in self.cache])
        for row, token in zip(np.array(logits), self._tokens[at + 1 :], strict=False):
            self.scored.append(scored(row, token, self._n_top))
        self._mx.clear_cache()  # as a BatchGenerator does after each part of a prompt
        return n_tokens


class SingleRow:
    """Implements Rows for one at a time."""

    n_most = 1

    def __init__(self, model: Any, n_batch: int, prompts: Beginnings) -> None:
        self._mx = import_module("mlx.core")
        self._make_cache = import_module("mlx_lm.models.cache").make_prompt_cache
        self._model = model
        self._n_batch = n_batch
        self._prompts = prompts
        self._number: int | None = None
        self._tokens: list[int] = []
        self._n_past = 0
        self._is_marked = False
        self.was_cut = False
        self._cache: Cache = []
        self._chooser: Chooser | None = None
        self._ahead: Ahead | None = None  # of the last step, if it had guesses

    def add(
        self,
        number: int,
        tokens: list[int],
        cached: Cache | None,
        n_cached: int,
        chooser: Chooser,
        *,
        is_marked: bool,
    ) -> None:
        self._number = number
        self._is_marked = is_marked
        self._tokens = tokens
        self._n_past = n_cached
        self._cache = cached if cached is not None else self._make_cache(self._model)
        self._chooser = chooser

    def step(self, n_prefill: int) -> tuple[list[tuple[int, int]], int]:
        if self._number is None or self._chooser is None:
            return [], 0
        self._ahead = None
        n_left = len(self._tokens) - 1 - self._n_past
        n = min(n_left, n_prefill, self._n_batch) if n_left else 1
        mark = 0
        if n_left and self._is_marked:
            mark = self._prompts.next_mark(self._number, self._n_past, len(self._tokens))
        self.was_cut = 0 < mark - self._n_past < n
        n = mark - self._n_past if self.was_cut else n
        part = self._mx.array([self._tokens[self._n_past : self._n_past + n]])
        logits = self._model(part, cache=self._cache)
        self._mx.eval([layer.state for layer in self._cache])
        self._n_past += n
        if n_left or _has_grown(self._n_past, 1):
            self._mx.clear_cache()  # as a BatchGenerator does
        if self._n_past == mark:
            self._prompts.mark(self._number, mark, self._copied)
        if n_left:
            return [], n
        (token,) = self._chooser.ahead(logits[0, -1:], [])
        self._tokens.append(token)
        return [(self._number, token)], 0

    def _copied(self) -> Cache:
        copied = copy.deepcopy([part for part in parts(self._cache) if not is_cells(part)])
        for part in copied:
            cut_to_window(part)
        return copied

    def n_past(self, number: int) -> int:
        return self._n_past

    def untold(self, number: int) -> list[int]:
        return []

    def guess(self, number: int, guesses: list[int]) -> tuple[list[int], Ahead]:
        assert self._chooser is not None
        self._ahead = None  # with the states before it
        ahead = self._ahead = compute_ahead(
            self._model, self._cache, self._tokens[-1], guesses, self._chooser
        )
        self._n_past += len(ahead.last.tokens)
        if _has_grown(self._n_past, len(ahead.last.tokens)):
            self._mx.clear_cache()
        said = [*ahead.last.tokens[1:], ahead.following]
        self._tokens += said
        return said, ahead

    def retract(self, number: int, n_tokens: int) -> None:
        assert self._ahead is not None
        self._n_past -= take_back(self._cache, self._ahead.last, n_tokens)

    def remove(self, number: int) -> None:
        self._number = self._chooser = self._ahead = None
        self._cache = []

    def cache_of(self, number: int) -> tuple[Tokens, Cache]:
        return as_tokens(self._tokens[: self._n_past]), self._cache
