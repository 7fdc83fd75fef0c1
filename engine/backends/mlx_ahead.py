"""Guessed tokens in one pass of a model on MLX, and what was wrong of them taken back."""

import copy
import time
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from engine.backends.mlx_prompts import Cache, parts, restore_order
from engine.backends.mlx_sampling import Chooser

# memories of mlx-lm's that are lists of cells
CUTS = {"KVCache", "BatchKVCache", "ChunkedKVCache"}
# and with a window: a pass with several tokens leaves what its second one sees
ROTATES = {"RotatingKVCache", "BatchRotatingKVCache"}
# families of mlx-lm's in which several tokens at once see another window than one at a time
UNEVEN = {"plamo3"}


@dataclass(frozen=True, slots=True)
class Pass:
    """Tokens that a cache got at once; and where not all of it can be cut, what has states or a
    window as it was before. That is free for what each pass makes anew."""

    tokens: list[int]
    before: list[tuple[Any, dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class Ahead:
    last: Pass  # the cache has its tokens more: the next one, what was right, perhaps one more
    following: int  # what is chosen to come after them
    n_right: int
    seconds: float  # of the pass with all guesses


def can_guess(model: Any) -> bool:
    """It says the same in passes with several tokens."""
    return type(model).__module__.rpartition(".")[2] not in UNEVEN


def can_take_back(cache: Cache) -> bool:
    """Any of the last pass's tokens, and not only all."""
    return all(type(part).__name__ in CUTS | ROTATES for part in parts(cache))


def take_back(cache: Cache, last: Pass, n_tokens: int) -> int:
    """Take so many of the last pass's tokens out of a cache, or all. Returns how many."""
    n_tokens = len(last.tokens) if last.before else n_tokens
    before = {id(part): values for part, values in last.before}
    for part in parts(cache):
        if id(part) in before:
            vars(part).update(copy.deepcopy(before[id(part)]))
            continue
        part.trim(n_tokens)
        if type(part).__name__ in ROTATES:  # whose next pass takes all that is there for said
            part.keys = part.keys[..., : part._idx, :]
            part.values = part.values[..., : part._idx, :]
    return n_tokens


def compute_ahead(
    model: Any, cache: Cache, token: int, guesses: list[int], chooser: Chooser
) -> Ahead:
    """Compute the next token of the one sequence in `cache`, and guesses of what comes after it."""
    started_at = time.perf_counter()
    logits, last = _compute(model, cache, [token, *guesses])
    chosen = chooser.ahead(logits, guesses)
    seconds = time.perf_counter() - started_at
    n_right = len(chosen) - 1
    n_wrong = len(guesses) - n_right
    if n_wrong:
        right = last.tokens[:-n_wrong]
        if take_back(cache, last, n_wrong) > n_wrong:
            logits, last = _compute(model, cache, [*right, chosen[-1]])
            chosen = chooser.ahead(logits[-1:], [])
        else:
            last = Pass(right, [])
    import_module("mlx.core").async_eval([layer.state for layer in cache])
    return Ahead(last, chosen[-1], n_right, seconds)


def _compute(model: Any, cache: Cache, tokens: list[int]) -> tuple[Any, Pass]:
    """The logits of all tokens, [n_tokens, n_vocab]."""
    cut = CUTS | ROTATES if can_take_back(cache) else CUTS
    kept = [part for part in parts(cache) if type(part).__name__ not in cut]
    before = [(part, copy.deepcopy(vars(part))) for part in kept]
    restore_order(cache)
    logits = model(import_module("mlx.core").array([tokens]), cache=cache)[0]
    return logits, Pass(tokens, before)
