"""The caches of prompts seen before, for a model on MLX: the longest beginning of a new one."""

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.prefix import Tokens, n_common

Cache = list[Any]  # mlx-lm's, one for each layer


@dataclass(slots=True, eq=False)
class Entry:
    tokens: Tokens  # that are in it
    cache: Cache
    n_bytes: int
    last_used: int


class Prompts:
    """Remembers up to `max_bytes` of caches, and forgets the least recently used first."""

    def __init__(self, max_bytes: int) -> None:
        self.n_bytes = 0
        self._max_bytes = max_bytes
        self._entries: list[Entry] = []
        self._clock = 0

    @property
    def is_off(self) -> bool:
        return self._max_bytes == 0

    def __len__(self) -> int:
        return len(self._entries)

    def n_known(self, wanted: Tokens) -> int:
        """How many tokens the longest remembered beginning of `wanted` has."""
        return max(
            (n_usable(entry.tokens, entry.cache, wanted) for entry in self._entries), default=0
        )

    def recall(self, wanted: Tokens) -> tuple[int, Cache] | None:
        """The longest remembered beginning of `wanted`, and a cache with just that, which is the
        caller's own. Whoever asks leaves the last token of a prompt out: it has to be computed."""
        best = max(
            self._entries,
            key=lambda entry: n_usable(entry.tokens, entry.cache, wanted),
            default=None,
        )
        n = n_usable(best.tokens, best.cache, wanted) if best else 0
        if best is None or n == 0:
            return None
        self._clock += 1
        best.last_used = self._clock
        return n, beginning(best.cache, len(best.tokens), n)

    def remember(self, tokens: Tokens, cache: Cache) -> None:
        """What is a beginning of another is not kept twice, where that can be cut."""
        n_bytes = sum(layer.nbytes for layer in cache)
        if not len(tokens) or n_bytes > self._max_bytes:
            return
        self._clock += 1
        for entry in self._entries:
            if n_usable(entry.tokens, entry.cache, tokens) == len(tokens):
                entry.last_used = self._clock
                return
        covered = [
            entry
            for entry in self._entries
            if n_usable(tokens, cache, entry.tokens) == len(entry.tokens)
        ]
        for entry in covered:
            self._forget(entry)
        self._entries.append(Entry(tokens, cache, n_bytes, self._clock))
        self.n_bytes += n_bytes
        self.resize(self._max_bytes)

    def resize(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        while self.n_bytes > max_bytes:
            self._forget(
                min(self._entries, key=lambda entry: (entry.n_bytes <= max_bytes, entry.last_used))
            )

    def _forget(self, entry: Entry) -> None:
        self._entries.remove(entry)
        self.n_bytes -= entry.n_bytes

    def clear(self) -> None:
        self._entries.clear()
        self.n_bytes = 0


def n_usable(tokens: Tokens, cache: Cache, wanted: Tokens) -> int:
    """How many tokens of `wanted` a cache of `tokens` can begin: all or nothing, where it cannot be
    cut."""
    n = n_common(tokens, wanted)
    return n if n == len(tokens) or can_cut(cache) else 0


def can_cut(cache: Cache) -> bool:
    """A chunked layer that has dropped its beginning says so of itself too, and would then miss
    what the tokens before its end have to see."""
    return all(layer.is_trimmable() and not getattr(layer, "start_position", 0) for layer in cache)


def beginning(cache: Cache, n_tokens: int, n: int) -> Cache:
    """A cache with the first `n` of the `n_tokens` tokens of another. Memory is shared until one of
    them is written."""
    own = copy.deepcopy(cache)
    if n < n_tokens:
        for layer in own:
            layer.trim(n_tokens - n)
    return own


def as_tokens(tokens: Any) -> Tokens:
    return np.array(tokens, np.int32)
