"""The caches of prompts seen before, for a model on MLX: the longest beginning of a new one."""

import copy
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from engine.marks import Kept, Marks
from engine.prefix import Tokens, n_common

logger = logging.getLogger("worker.mlx")

Cache = list[Any]  # mlx-lm's, one for each layer
SAID_MEANWHILE = 8  # tokens that a row has said at most when those that wait for its prompt begin


class Beginnings(Protocol):
    """What is remembered. Rows are known by their numbers."""

    @property
    def n_bytes(self) -> int: ...

    @property
    def is_off(self) -> bool: ...

    def __len__(self) -> int: ...

    def n_known(self, wanted: Tokens) -> int:
        """How many tokens the longest remembered beginning of `wanted` has."""

    def n_held(self, number: int, tokens: Tokens, wanted: Tokens) -> int:
        """How much of it can be had of a row with these tokens, at least."""

    def n_coming(self, number: int, n_tokens: int, n_past: int, n_prompt: int) -> int:
        """How much of its first tokens can be had of a row that has computed `n_past` of its
        prompt, when it is through."""

    def recall(self, number: int, wanted: Tokens) -> tuple[int, Cache] | None:
        """The longest remembered beginning of `wanted`, and a cache with just that, which is the
        new row's own. Whoever asks leaves the last token of a prompt out: it has to be computed."""

    def begin(
        self, number: int, source: int, tokens: Tokens, cache: Cache, wanted: Tokens
    ) -> tuple[int, Cache]:
        """The same of a row's tokens, whose memory is given."""

    def remember(self, number: int, tokens: Tokens, cache: Cache) -> None:
        """The row ends, and this is its memory."""

    def forget(self, number: int) -> None:
        """The row ends."""

    def resize(self, max_bytes: int) -> None: ...

    def clear(self) -> None: ...

    def want(self, number: int, n_tokens: int) -> None:
        """Somebody waits for so many tokens of the prompt that a row computes."""

    def next_mark(self, number: int, n_past: int, n_prompt: int) -> int:
        """How many tokens of its prompt a row is to have when it is marked next; 0: nowhere."""

    def mark(self, number: int, n_tokens: int, copied: Callable[[], Cache]) -> None:
        """A row has so many tokens, and this is a copy of what cannot be cut of it."""


def new_prompts(cache: Cache, max_bytes: int) -> Beginnings:
    """For a model that makes such a cache."""
    others = [part for part in parts(cache) if not is_cells(part)]
    return MarkedPrompts(max_bytes, min(map(_window, others))) if others else Prompts(max_bytes)


def _window(part: Any) -> int:
    """How many tokens it holds as a list of cells; with fewer it is one."""
    return int(getattr(part, "max_size", getattr(part, "chunk_size", 0)))


@dataclass(slots=True, eq=False)
class Entry:
    tokens: Tokens  # that are in it
    cache: Cache
    n_bytes: int
    last_used: int


class Prompts:
    """Implements Beginnings for memories that are lists of cells, which are cut anywhere.
    Remembers up to `max_bytes` of caches, and forgets the least recently used first."""

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
        return max((n_common(entry.tokens, wanted) for entry in self._entries), default=0)

    def n_held(self, number: int, tokens: Tokens, wanted: Tokens) -> int:
        return n_common(tokens, wanted)

    def n_coming(self, number: int, n_tokens: int, n_past: int, n_prompt: int) -> int:
        return n_tokens

    def recall(self, number: int, wanted: Tokens) -> tuple[int, Cache] | None:
        best = max(self._entries, key=lambda entry: n_common(entry.tokens, wanted), default=None)
        n = n_common(best.tokens, wanted) if best else 0
        if best is None or n == 0:
            return None
        self._clock += 1
        best.last_used = self._clock
        return n, beginning(best.cache, len(best.tokens), n)

    def begin(
        self, number: int, source: int, tokens: Tokens, cache: Cache, wanted: Tokens
    ) -> tuple[int, Cache]:
        n = n_common(tokens, wanted)
        return n, beginning(cache, len(tokens), n)

    def remember(self, number: int, tokens: Tokens, cache: Cache) -> None:
        """What is a beginning of another is not kept twice."""
        n_bytes = sum(layer.nbytes for layer in cache)
        if not len(tokens) or n_bytes > self._max_bytes:
            return
        self._clock += 1
        for entry in self._entries:
            if n_common(entry.tokens, tokens) == len(tokens):
                entry.last_used = self._clock
                return
        covered = [
            entry for entry in self._entries if n_common(tokens, entry.tokens) == len(entry.tokens)
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

    def forget(self, number: int) -> None: ...

    def want(self, number: int, n_tokens: int) -> None: ...

    def next_mark(self, number: int, n_past: int, n_prompt: int) -> int:
        return 0

    def mark(self, number: int, n_tokens: int, copied: Callable[[], Cache]) -> None:
        raise NotImplementedError("these are cut anywhere")


@dataclass(frozen=True, slots=True)
class Copied:
    """Caches of layers, or of what cannot be cut in them."""

    caches: Cache
    nbytes: int


def copied_of(caches: Cache) -> Copied:
    return Copied(caches, sum(cache.nbytes for cache in caches))


class MarkedPrompts:
    """Implements Beginnings for others, such as states and cells behind a window: a prompt goes on
    where another ended, or where that was marked (`engine/marks.py`)."""

    def __init__(self, max_bytes: int, window: int) -> None:
        self._marks = Marks(max_bytes)
        self._window = window  # so many tokens are a list of cells

    @property
    def n_bytes(self) -> int:
        return self._marks.n_bytes

    @property
    def is_off(self) -> bool:
        return self._marks.max_bytes == 0

    def __len__(self) -> int:
        return self._marks.n_kept

    def n_known(self, wanted: Tokens) -> int:
        return self._marks.match(wanted)[0]

    def n_held(self, number: int, tokens: Tokens, wanted: Tokens) -> int:
        n = n_common(tokens, wanted)
        is_held = n == len(tokens) or len(tokens) < self._window
        return n if is_held else self._marks.last(number, n)

    def n_coming(self, number: int, n_tokens: int, n_past: int, n_prompt: int) -> int:
        is_marked = n_tokens > n_past and not self.is_off
        if is_marked or n_prompt + SAID_MEANWHILE < self._window:
            return n_tokens
        return self._marks.last(number, n_tokens)

    def recall(self, number: int, wanted: Tokens) -> tuple[int, Cache] | None:
        n, kept = self._marks.match(wanted)
        if kept is None or n == 0:
            return None
        assert isinstance(kept.saved, Copied)
        cache = self._begun(kept, kept.tokens, kept.saved.caches, n)
        self._marks.touch(kept)
        self._marks.take(kept, number, n)
        return n, cache

    def begin(
        self, number: int, source: int, tokens: Tokens, cache: Cache, wanted: Tokens
    ) -> tuple[int, Cache]:
        n = n_common(tokens, wanted) if can_cut(cache) else self.n_held(source, tokens, wanted)
        begun = self._begun(source, tokens, cache, n) if n else []
        self._marks.copy(source, number, n)
        return n, begun

    def remember(self, number: int, tokens: Tokens, cache: Cache) -> None:
        saved = copied_of(cache)
        n, kept = self._marks.match(tokens)
        if kept is not None and n == len(tokens):
            self._marks.touch(kept)
        elif len(tokens) and saved.nbytes <= self._marks.max_bytes:
            while saved.nbytes > self._marks.room_to_keep:
                if not self._marks.give_up_first(number):
                    break
            else:
                self._marks.keep(number, tokens, saved, is_cells=can_cut(cache))
        self._marks.forget(number)

    def forget(self, number: int) -> None:
        self._marks.forget(number)

    def resize(self, max_bytes: int) -> None:
        self._marks.resize(max_bytes)

    def clear(self) -> None:
        self._marks = Marks(self._marks.max_bytes)

    def want(self, number: int, n_tokens: int) -> None:
        if not self.is_off:
            self._marks.want(number, n_tokens)

    def next_mark(self, number: int, n_past: int, n_prompt: int) -> int:
        return 0 if self.is_off else self._marks.next(number, n_past, n_prompt)

    def mark(self, number: int, n_tokens: int, copied: Callable[[], Cache]) -> None:
        try:
            saved = copied_of(copied())
            if saved.nbytes <= self._marks.max_bytes:
                self._marks.put(number, n_tokens, saved)
        except Exception as error:  # mostly for want of memory; it would only have saved time
            logger.error("A row cannot be copied; all prompts are forgotten", exc_info=error)
            self.clear()

    def _begun(self, of: int | Kept, tokens: Tokens, cache: Cache, n: int) -> Cache:
        if n == len(tokens) or can_cut(cache):
            return beginning(cache, len(tokens), n)
        saved = self._marks.get(of, n)
        assert isinstance(saved, Copied)
        return beginning(cache, len(tokens), n, saved.caches)


def can_cut(cache: Cache) -> bool:
    """A chunked layer that has dropped its beginning says so of itself too, and would then miss
    what the tokens before its end have to see."""
    return all(layer.is_trimmable() and not getattr(layer, "start_position", 0) for layer in cache)


def beginning(cache: Cache, n_tokens: int, n: int, mark: Cache | None = None) -> Cache:
    """A cache with the first `n` of the `n_tokens` tokens of another; with what it was there in
    place of what cannot be cut. Memory is shared until one of them is written."""
    own = copy.deepcopy(cache)
    marked = iter(copy.deepcopy(mark or []))
    for part in parts(own) if n < n_tokens else ():
        if mark is None or is_cells(part):
            part.trim(n_tokens - n)
        else:
            vars(part).update(vars(next(marked)))
    return own


def parts(cache: Iterable[Any]) -> Iterator[Any]:
    """What the layers keep, each memory for itself."""
    for layer in cache:
        yield from getattr(layer, "caches", [layer])


def restore_order(cache: Cache) -> None:
    """For a pass with several tokens. Once a batch has gone round its window the mask of such a
    pass is one cell off, and hides a row's first token while that is filled up."""
    for part in parts(cache):
        if type(part).__name__ == "BatchRotatingKVCache" and part.rotated:
            part._temporal_order()


def cut_to_window(part: Any) -> None:
    """Drop what only the last pass's first tokens have seen: it may be several windows long."""
    if type(part).__name__ != "RotatingKVCache" or part.keep or part.empty():
        return
    if part._idx == part.keys.shape[2] > part.max_size:
        part.keys = part.keys[..., -part.max_size :, :]
        part.values = part.values[..., -part.max_size :, :]
        part._idx = part.max_size


def is_cells(part: Any) -> bool:
    """A list of them, which can be cut anywhere."""
    return type(part).__name__ in ("KVCache", "BatchKVCache")


def as_tokens(tokens: Any) -> Tokens:
    return np.array(tokens, np.int32)
