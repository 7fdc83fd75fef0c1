"""Guessed tokens in one pass of a model on MLX, and what was wrong of them taken back."""

import copy
from collections.abc import Iterable, Iterator
from importlib import import_module
from typing import Any

from engine.backends.mlx_prompts import Cache
from engine.backends.mlx_sampling import Chooser

# kinds of mlx-lm's memories, of which what the last pass computed can be cut off
CUTS = {"KVCache", "BatchKVCache", "ChunkedKVCache"}
# the same with a window: a pass with several tokens leaves all that its first one sees
ROTATES = {"RotatingKVCache", "BatchRotatingKVCache"}


def takes_back(cache: Cache) -> bool:
    """What a pass computed can be cut off again. Else it has to go on from a copy, which is free
    for what is replaced in each pass, as states are, and what was right is computed again."""
    return all(type(part).__name__ in CUTS | ROTATES for part in parts(cache))


def compute_ahead(
    model: Any, cache: Cache, token: int, guesses: list[int], chooser: Chooser
) -> tuple[list[int], int, int]:
    """Compute the next token of the one sequence in `cache`, and guesses of what comes after it.

    Returns the tokens that `cache` has more then, of which that is the first; the one that is
    chosen to come after them; and how many guesses were right.
    """
    mx = import_module("mlx.core")
    copies = [
        (part, copy.deepcopy(vars(part)))
        for part in parts(cache)
        if type(part).__name__ not in CUTS | ROTATES
    ]
    tokens = [token, *guesses]
    chosen = chooser.ahead(model(mx.array([tokens]), cache=cache)[0], guesses)
    n_right = len(chosen) - 1
    right = tokens[: n_right + 1]
    if len(right) < len(tokens):
        for part in parts(cache):
            if type(part).__name__ in CUTS | ROTATES:
                _cut(part, len(tokens) - (0 if copies else len(right)))
        for part, values in copies:
            vars(part).update(values)
        if copies:
            right.append(chosen[-1])
            chosen = chooser.ahead(model(mx.array([right]), cache=cache)[0, -1:], [])
    mx.async_eval([layer.state for layer in cache])
    return right, chosen[-1], n_right


def parts(cache: Iterable[Any]) -> Iterator[Any]:
    """What the layers keep, each memory for itself."""
    for layer in cache:
        yield from getattr(layer, "caches", [layer])


def _cut(part: Any, n_tokens: int) -> None:
    part.trim(n_tokens)
    if type(part).__name__ in ROTATES:  # whose next pass takes all that is there for said
        part.keys = part.keys[..., : part._idx, :]
        part.values = part.values[..., : part._idx, :]
