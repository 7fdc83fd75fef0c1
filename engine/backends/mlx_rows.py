"""The sequences that a model on MLX computes in one step, each with a cache of its own."""

from collections.abc import Iterable, Iterator
from importlib import import_module
from typing import Any, Protocol

import numpy as np

from engine.backends.mlx_ahead import Ahead, compute_ahead, parts, take_back
from engine.backends.mlx_prompts import Cache, as_tokens, can_cut
from engine.backends.mlx_sampling import Chooser
from engine.prefix import Tokens
from engine.sampling import scored
from engine.types import Sampled

GROWTH = 256  # cells that one of mlx-lm's memories gets at a time


class Rows(Protocol):
    """Rows are known by the numbers of their sequences."""

    n_most: int

    def add(
        self, number: int, tokens: list[int], cached: Cache | None, n_cached: int, chooser: Chooser
    ) -> None:
        """A sequence joins; the first `n_cached` of its tokens, and never all, are in `cached`,
        which is taken over."""

    def step(self, n_prefill: int) -> tuple[list[tuple[int, int]], int]:
        """One token for each row that is past its prompt, by number; and by how many tokens prompts
        got on, of so many at most. After an exception all of this is of no further use."""

    def untold(self, number: int) -> list[int]:
        """What is chosen of a row past its prompt, and told by the next step. Waits for it."""

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


def new_rows(model: Any, n_most: int, n_batch: int) -> Rows:
    """Rows in one batch, where the model's caches can be put together; else one at a time."""
    cache = import_module("mlx_lm.models.cache").make_prompt_cache(model)
    if all(map(_can_merge, cache)):
        # Prompts that are computed together are filled up to one length, and a state goes on
        # through what fills up, unless the model minds: not all of mlx-lm's do.
        return BatchRows(model, n_most, n_batch, n_prompts=n_most if can_cut(cache) else 1)
    return SingleRow(model, n_batch)


def _can_merge(layer: Any) -> bool:
    parts: Iterable[Any] | None = getattr(layer, "caches", None)
    return all(map(_can_merge, parts)) if parts is not None else hasattr(layer, "merge")


def _counters(cache: Iterable[Any]) -> Iterator[Any]:
    """What layers count in each step. Where nothing asks for it, as without RoPE and in a state, it
    would stay a sum that grows by a term a step, each with a buffer, of which Metal has so many."""
    for part in parts(cache):
        found = (getattr(part, name, None) for name in ("offset", "left_padding", "lengths"))
        yield from (counter for counter in found if counter is not None)


class BatchRows:
    """Implements Rows over mlx-lm's BatchGenerator, which computes a step ahead: a row's token is
    told when the next one is on its way. So many prompts are computed at once, the others after
    them."""

    def __init__(self, model: Any, n_most: int, n_batch: int, *, n_prompts: int) -> None:
        generator = import_module("mlx_lm.generate").BatchGenerator
        self._mx = import_module("mlx.core")
        self.n_most = n_most
        self._model = model
        self._n_prompts = n_prompts
        self._generator = generator(
            model,
            completion_batch_size=n_most,
            prefill_batch_size=n_prompts,
            prefill_step_size=n_batch,
        )
        self._uids: dict[int, int] = {}  # by number
        self._numbers: dict[int, int] = {}  # by uid
        self._choosers: dict[int, Chooser] = {}  # by number
        self._prefilled: dict[int, int] = {}  # tokens so far, by uid, of rows in their prompts
        self._ahead: Ahead | None = None  # of the last step, if it had guesses

    def add(
        self, number: int, tokens: list[int], cached: Cache | None, n_cached: int, chooser: Chooser
    ) -> None:
        (uid,) = self._generator.insert(
            [tokens[n_cached:]],
            max_tokens=[1 << 30],  # who counts is above
            caches=[cached],
            all_tokens=[tokens[:n_cached]],
            samplers=[chooser.sample],
            logits_processors=[list(chooser.processors)],
        )
        self._uids[number] = uid
        self._choosers[number] = chooser
        self._numbers[uid] = number
        self._prefilled[uid] = 0

    def step(self, n_prefill: int) -> tuple[list[tuple[int, int]], int]:
        self._ahead = None
        n_prompts = min(max(len(self._prefilled), 1), self._n_prompts)
        # rounded up: from fewer tokens than are allowed the pace learns nothing
        self._generator.prefill_step_size = -(-n_prefill // n_prompts)
        prompts, told = self._generator.next()
        self._mx.async_eval(list(_counters(self._generator._generation_batch.prompt_cache)))
        n_prefilled = 0
        for prompt in prompts:
            if prompt.end_of_prompt:
                del self._prefilled[prompt.uid]
            else:
                n_prefilled += prompt.progress[0] - self._prefilled[prompt.uid]
                self._prefilled[prompt.uid] = prompt.progress[0]
        return [(self._numbers[one.uid], one.token) for one in told], n_prefilled

    def untold(self, number: int) -> list[int]:
        at = self._generator._generation_batch.uids.index(self._uids[number])
        return [self._generator._generation_batch._next_tokens[at].item()]

    def guess(self, number: int, guesses: list[int]) -> tuple[list[int], Ahead]:
        batch = self._generator._generation_batch
        (token,) = self.untold(number)
        with self._mx.stream(self._generator.stream):
            ahead = self._ahead = compute_ahead(
                self._model, batch.prompt_cache, token, guesses, self._choosers[number]
            )
            batch._next_tokens = self._mx.array([ahead.following], dtype=self._mx.uint32)
        (tokens,) = batch.tokens
        tokens += ahead.last.tokens
        if len(tokens) % GROWTH < len(ahead.last.tokens):
            self._mx.clear_cache()
        return ahead.last.tokens, ahead

    def retract(self, number: int, n_tokens: int) -> None:
        assert self._ahead is not None
        batch = self._generator._generation_batch
        (tokens,) = batch.tokens
        with self._mx.stream(self._generator.stream):
            del tokens[-take_back(batch.prompt_cache, self._ahead.last, n_tokens) :]

    def remove(self, number: int) -> None:
        uid = self._uids.pop(number)
        del self._numbers[uid], self._choosers[number]
        self._ahead = None
        self._prefilled.pop(uid, None)
        self._generator.remove([uid])

    def cache_of(self, number: int) -> tuple[Tokens, Cache]:
        uid = self._uids[number]
        cache, tokens = self._generator.extract_cache([uid])[uid]
        mx, tree_map = self._mx, import_module("mlx.utils").tree_map

        def own(part: Any) -> Any:
            """Not a piece of the whole batch's memory, which would stay as long as the piece."""
            return mx.contiguous(part) if isinstance(part, mx.array) else part

        for layer in cache:
            layer.state = tree_map(own, layer.state)
        mx.eval([layer.state for layer in cache])
        return as_tokens(tokens), cache


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

    def __init__(self, model: Any, n_batch: int) -> None:
        self._mx = import_module("mlx.core")
        self._make_cache = import_module("mlx_lm.models.cache").make_prompt_cache
        self._model = model
        self._n_batch = n_batch
        self._number: int | None = None
        self._tokens: list[int] = []
        self._n_past = 0
        self._cache: Cache = []
        self._chooser: Chooser | None = None
        self._ahead: Ahead | None = None  # of the last step, if it had guesses

    def add(
        self, number: int, tokens: list[int], cached: Cache | None, n_cached: int, chooser: Chooser
    ) -> None:
        self._number = number
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
        part = self._mx.array([self._tokens[self._n_past : self._n_past + n]])
        logits = self._model(part, cache=self._cache)
        self._mx.eval([layer.state for layer in self._cache])
        self._n_past += n
        if n_left or self._n_past % GROWTH == 0:
            self._mx.clear_cache()  # as a BatchGenerator does
        if n_left:
            return [], n
        (token,) = self._chooser.ahead(logits[0, -1:], [])
        self._tokens.append(token)
        return [(self._number, token)], 0

    def untold(self, number: int) -> list[int]:
        return []

    def guess(self, number: int, guesses: list[int]) -> tuple[list[int], Ahead]:
        assert self._chooser is not None
        ahead = self._ahead = compute_ahead(
            self._model, self._cache, self._tokens[-1], guesses, self._chooser
        )
        self._n_past += len(ahead.last.tokens)
        if self._n_past % GROWTH < len(ahead.last.tokens):
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
