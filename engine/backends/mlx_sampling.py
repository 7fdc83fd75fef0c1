"""How the rows of a batch on MLX choose their tokens: on the device where that is enough, or else
in numpy, by all the rules that llama.cpp has."""

from collections import deque
from collections.abc import Callable
from importlib import import_module
from typing import Any, Protocol

import numpy as np

from engine.backends.base import Constraint
from engine.drawing import RowSampler
from engine.dry import Dry
from engine.sampling import Rules
from engine.types import Sampled, SamplingParams


class Chooser(Protocol):
    """One sequence's choice. MLX calls `processors` and `sample` with its arrays, a step before it
    tells the token."""

    processors: tuple[Callable[[Any, Any], Any], ...]
    sample: Callable[[Any], Any]

    def ahead(self, logits: Any, guesses: list[int]) -> list[int]:
        """What comes after each of some tokens, by logits of [n_guesses + 1, n_vocab], up to the
        first that is not as guessed."""

    def taken(self, token: int) -> Sampled:
        """What was chosen, in the order in which MLX tells it. Raises what went wrong then."""


def new_chooser(
    sampling: SamplingParams,
    prompt: list[int],
    constraint: Constraint | None,
    ends: list[int],
    suppressed: list[int],
    piece: Callable[[int], bytes],
) -> Chooser:
    rules = Rules(sampling, prompt, ends, suppressed)
    is_plain = (
        not rules.changes(constraint)
        and sampling.n_logprobs is None
        and not sampling.mirostat
        and not Dry.wanted(sampling)
        and sampling.typical_p >= 1
        and sampling.xtc_probability <= 0
    )
    if not is_plain:
        return RowChooser(RowSampler(sampling, prompt, rules, piece), constraint)
    return Likeliest() if sampling.is_greedy else Drawn(sampling)


class Likeliest:
    """Takes the likeliest token, for all rows that do so at once."""

    processors: tuple[Callable[[Any, Any], Any], ...] = ()

    def __init__(self) -> None:
        self.sample: Callable[[Any], Any] = _likeliest

    def ahead(self, logits: Any, guesses: list[int]) -> list[int]:
        return _up_to_wrong(_likeliest(normalised(logits)).tolist(), guesses)

    def taken(self, token: int) -> Sampled:
        return Sampled(token)


def _likeliest(scores: Any) -> Any:
    return import_module("mlx.core").argmax(scores, axis=-1)


def normalised(logits: Any) -> Any:
    """As a BatchGenerator gives them to `sample`."""
    return logits - import_module("mlx.core").logsumexp(logits, axis=-1, keepdims=True)


def _up_to_wrong(chosen: list[int], guesses: list[int]) -> list[int]:
    for n, guess in enumerate(guesses):
        if chosen[n] != guess:
            return chosen[: n + 1]
    return chosen


class Drawn:
    """Draws on the device, with a key of its own: company changes nothing in it."""

    processors: tuple[Callable[[Any, Any], Any], ...] = ()

    def __init__(self, sampling: SamplingParams) -> None:
        self._mx = import_module("mlx.core")
        self._sampling = sampling
        self._key = self._mx.random.key(sampling.seed)
        self._drawn: deque[Any] = deque()
        self.sample: Callable[[Any], Any] = self._sample

    def _sample(self, scores: Any) -> Any:
        return self._draw(*self._filtered(scores))

    def _filtered(self, scores: Any) -> tuple[Any, Any]:
        """The tokens of each row that may be drawn, and their scores. The order of llama.cpp:
        top_k, top_p, min_p, temperature."""
        mx, sampling = self._mx, self._sampling
        scores = scores.astype(mx.float32)
        n = scores.shape[-1]
        k = sampling.top_k if 0 < sampling.top_k < n else n
        ids = mx.argpartition(-scores, kth=k - 1, axis=-1)[..., :k] if k < n else None
        if ids is None:
            ids = mx.argsort(-scores, axis=-1)
        else:
            order = mx.argsort(-mx.take_along_axis(scores, ids, axis=-1), axis=-1)
            ids = mx.take_along_axis(ids, order, axis=-1)
        scores = mx.take_along_axis(scores, ids, axis=-1)
        if sampling.top_p < 1:
            shares = mx.softmax(scores, axis=-1)
            before = mx.cumsum(shares, axis=-1) - shares
            scores = mx.where((before < sampling.top_p) | (before <= 0), scores, -mx.inf)
        if sampling.min_p > 0:
            least = scores[..., :1] + float(np.log(sampling.min_p))
            scores = mx.where(scores >= least, scores, -mx.inf)
        return ids, scores * (1 / sampling.temperature)

    def _draw(self, ids: Any, scores: Any) -> Any:
        """The token of one row."""
        mx = self._mx
        self._key, own = mx.random.split(self._key)
        at = mx.random.categorical(scores, key=own)
        token = mx.take_along_axis(ids, at[..., None], axis=-1)[..., 0].astype(mx.uint32)
        self._drawn.append(token)
        return token

    def ahead(self, logits: Any, guesses: list[int]) -> list[int]:
        keys = []
        ids, scores = self._filtered(normalised(logits))
        for n in range(len(guesses) + 1):
            self._draw(ids[n : n + 1], scores[n : n + 1])
            keys.append(self._key)
        drawn = [self._drawn.pop() for _ in keys][::-1]
        chosen = _up_to_wrong(self._mx.concatenate(drawn).tolist(), guesses)
        self._drawn.extend(drawn[: len(chosen)])
        self._key = keys[len(chosen) - 1]  # who was not asked has drawn nothing
        return chosen

    def taken(self, token: int) -> Sampled:
        self._drawn.popleft()
        return Sampled(token)


class RowChooser:
    """Chooses in numpy, by every rule there is."""

    def __init__(self, sampler: RowSampler, constraint: Constraint | None) -> None:
        self._sampler = sampler
        self._constraint = constraint
        self._chosen: deque[Sampled | Exception] = deque()
        self._mx = import_module("mlx.core")
        self._token = 0
        self.processors: tuple[Callable[[Any, Any], Any], ...] = (self._process,)
        self.sample: Callable[[Any], Any] = self._sample

    def _process(self, tokens: Any, logits: Any) -> Any:
        self._choose(logits[0].astype(self._mx.float32))
        return logits

    def _choose(self, logits: Any) -> bool:
        """An exception would be the whole batch's: it waits until the token is asked for. One step
        goes on behind the end of an answer, where a grammar may have nothing to say."""
        try:
            sampled = self._sampler.choose(np.array(logits), self._constraint)
        except Exception as error:
            self._chosen.append(error)
            return False
        self._chosen.append(sampled)
        self._token = sampled.token
        return True

    def _sample(self, scores: Any) -> Any:
        return self._mx.array([self._token], dtype=self._mx.uint32)

    def ahead(self, logits: Any, guesses: list[int]) -> list[int]:
        chosen: list[int] = []
        rows = np.array(logits.astype(self._mx.float32))
        for row, guess in zip(rows, [*guesses, None], strict=True):
            is_chosen = self._choose(row)
            chosen.append(self._token)
            if not is_chosen or self._token != guess:
                break
        return chosen

    def taken(self, token: int) -> Sampled:
        chosen = self._chosen.popleft()
        if isinstance(chosen, Exception):
            raise chosen
        return chosen
