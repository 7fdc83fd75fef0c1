"""How the rows of a batch on MLX choose their tokens: on the device where that is enough, or else
in numpy, by all the rules that llama.cpp has."""

from collections import deque
from collections.abc import Callable
from importlib import import_module
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from engine.backends.base import Constraint
from engine.dry import Dry
from engine.sampling import Penalties, Rules, logprobs
from engine.types import Sampled, SamplingParams

Row = npt.NDArray[np.float32]
MIROSTAT_M = 100  # likeliest tokens that version 1 estimates from, as in the paper and llama.cpp


class Chooser(Protocol):
    """One sequence's choice. MLX calls `processors` and `sample` with its arrays, a step before it
    tells the token."""

    processors: tuple[Callable[[Any, Any], Any], ...]
    sample: Callable[[Any], Any]

    def taken(self, token: int) -> Sampled:
        """What was chosen, in the order in which MLX tells it. Raises what went wrong then."""

    def pending(self) -> Sampled | None:
        """What is chosen and not told yet, where it must not be chosen again."""


def new_chooser(
    sampling: SamplingParams,
    prompt: list[int],
    constraint: Constraint | None,
    ends: list[int],
    suppressed: list[int],
    piece: Callable[[int], bytes],
) -> Chooser:
    is_plain = (
        constraint is None
        and not suppressed
        and sampling.n_logprobs is None
        and not sampling.logit_bias
        and not sampling.min_tokens
        and not sampling.ignore_eos
        and not Penalties.wanted(sampling)
        and not sampling.mirostat
        and not Dry.wanted(sampling)
        and sampling.typical_p >= 1
        and sampling.xtc_probability <= 0
    )
    if not is_plain:
        rules = Rules(sampling, prompt, ends, suppressed)
        return RowChooser(sampling, prompt, constraint, rules, piece)
    return Likeliest() if sampling.is_greedy else Drawn(sampling)


class Likeliest:
    """Takes the likeliest token, for all rows that do so at once."""

    processors: tuple[Callable[[Any, Any], Any], ...] = ()

    def __init__(self) -> None:
        self.sample: Callable[[Any], Any] = _likeliest

    def taken(self, token: int) -> Sampled:
        return Sampled(token)

    def pending(self) -> Sampled | None:
        return None


def _likeliest(scores: Any) -> Any:
    return import_module("mlx.core").argmax(scores, axis=-1)


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
        """The order of llama.cpp: top_k, top_p, min_p, temperature."""
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
        self._key, own = mx.random.split(self._key)
        at = mx.random.categorical(scores * (1 / sampling.temperature), key=own)
        token = mx.take_along_axis(ids, at[..., None], axis=-1)[..., 0].astype(mx.uint32)
        self._drawn.append(token)
        return token

    def taken(self, token: int) -> Sampled:
        self._drawn.popleft()
        return Sampled(token)

    def pending(self) -> Sampled | None:
        return Sampled(int(self._drawn.popleft().item())) if self._drawn else None


class RowChooser:
    """Chooses in numpy, by every rule there is."""

    def __init__(
        self,
        sampling: SamplingParams,
        prompt: list[int],
        constraint: Constraint | None,
        rules: Rules,
        piece: Callable[[int], bytes],
    ) -> None:
        self._sampling = sampling
        self._constraint = constraint
        self._rules = rules
        self._dry = Dry(sampling, prompt, piece) if Dry.wanted(sampling) else None
        self._draw = Draw(sampling)
        self._chosen: deque[Sampled | Exception] = deque()
        self._mx = import_module("mlx.core")
        self._token = 0
        self.processors: tuple[Callable[[Any, Any], Any], ...] = (self._process,)
        self.sample: Callable[[Any], Any] = self._sample

    def _process(self, tokens: Any, logits: Any) -> Any:
        """An exception would be the whole batch's: it waits until the token is asked for. One step
        goes on behind the end of an answer, where a grammar may have nothing to say."""
        try:
            sampled = self.choose(np.array(logits[0].astype(self._mx.float32)))
        except Exception as error:
            self._chosen.append(error)
        else:
            self._chosen.append(sampled)
            self._token = sampled.token
        return logits

    def _sample(self, scores: Any) -> Any:
        return self._mx.array([self._token], dtype=self._mx.uint32)

    def taken(self, token: int) -> Sampled:
        chosen = self._chosen.popleft()
        if isinstance(chosen, Exception):
            raise chosen
        return chosen

    def pending(self) -> Sampled | None:
        return self.taken(0) if self._chosen else None

    def choose(self, logits: Row) -> Sampled:
        """The token for a row of logits, which is changed."""
        raw = logits.copy() if self._sampling.n_logprobs is not None else logits
        self._rules.apply(logits, self._constraint)
        likeliest = int(logits.argmax())
        if self._dry:
            self._dry.apply(logits)
        token = self._draw(logits)
        if logits[token] == -np.inf:  # XTC and DRY may leave only what is forbidden
            token = likeliest
        if self._dry:
            self._dry.accept(token)
        self._rules.accept(token, self._constraint)
        if self._sampling.n_logprobs is None:
            return Sampled(token)
        return Sampled(token, *logprobs(raw, token, self._sampling.n_logprobs))


class Draw:
    """Draws from a row of logits, with the filters of llama.cpp in its order."""

    def __init__(self, sampling: SamplingParams) -> None:
        self._sampling = sampling
        self._random = np.random.Generator(np.random.PCG64(sampling.seed))
        self._mu = 2 * sampling.mirostat_tau

    def __call__(self, logits: Row) -> int:
        sampling = self._sampling
        if sampling.is_greedy and sampling.xtc_probability <= 0:
            return int(logits.argmax())
        if sampling.mirostat and not sampling.is_greedy:
            ids = _sorted(logits, 0)
            return self._mirostat(ids, _shares(logits[ids] / np.float32(sampling.temperature)))
        ids = _sorted(logits, sampling.top_k)
        for keep in (self._typical, self._top_p, self._min_p, self._xtc):
            ids = ids[keep(_shares(logits[ids]))]
        if sampling.is_greedy:
            return int(ids[0])
        return int(ids[self._at(_shares(logits[ids] / np.float32(sampling.temperature)))])

    def _at(self, shares: Row) -> int:
        total = np.cumsum(shares, dtype=np.float64)
        return int(np.searchsorted(total, self._random.random() * total[-1], side="right"))

    # each: which of the candidates stay, by their shares, which fall

    def _typical(self, shares: Row) -> Any:
        if self._sampling.typical_p >= 1:
            return slice(None)
        surprise = -np.log(np.maximum(shares, np.finfo(np.float32).tiny))
        nearest = np.argsort(np.abs(surprise - (shares * surprise).sum()), kind="stable")
        n = int(np.searchsorted(np.cumsum(shares[nearest]), self._sampling.typical_p, "right")) + 1
        return np.sort(nearest[:n])

    def _top_p(self, shares: Row) -> Any:
        if self._sampling.top_p >= 1:
            return slice(None)
        return slice(int(np.searchsorted(np.cumsum(shares), self._sampling.top_p)) + 1)

    def _min_p(self, shares: Row) -> Any:
        if self._sampling.min_p <= 0:
            return slice(None)
        return shares >= shares[0] * np.float32(self._sampling.min_p)

    def _xtc(self, shares: Row) -> Any:
        threshold = self._sampling.xtc_threshold
        if self._sampling.xtc_probability <= 0 or threshold > 0.5 or len(shares) < 2:
            return slice(None)
        if self._random.random() > self._sampling.xtc_probability:
            return slice(None)
        n_likely = int((shares >= threshold).sum())
        return slice(max(n_likely - 1, 0), None)

    def _mirostat(self, ids: npt.NDArray[np.intp], shares: Row) -> int:
        """Basu et al. 2020, both versions, as in llama.cpp."""
        if self._sampling.mirostat == 1:
            n = self._n_of_version_1(shares)
        else:
            n = max(int((-np.log2(np.maximum(shares, 1e-38)) <= self._mu).sum()), 1)
        shares = shares[:n] / shares[:n].sum()
        at = self._at(shares)
        surprise = -float(np.log2(shares[at]))
        self._mu -= self._sampling.mirostat_eta * (surprise - self._sampling.mirostat_tau)
        return int(ids[at])

    def _n_of_version_1(self, shares: Row) -> int:
        n_vocab, m = len(shares), min(MIROSTAT_M, len(shares))
        shares = np.maximum(shares[:m], np.finfo(np.float32).tiny)
        ranks = np.arange(1, m)
        t = np.log((ranks + 1) / ranks)
        b = np.log(shares[:-1] / shares[1:])
        s = float((t * b).sum() / max((t * t).sum(), 1e-9))
        epsilon = s - 1
        below = 1 - n_vocab ** (-epsilon)
        k = ((epsilon * 2**self._mu) / below) ** (1 / s) if below and s > 0 else 1
        return max(int(min(k.real, 1e9)), 1)


def _sorted(logits: Row, top_k: int) -> npt.NDArray[np.intp]:
    """Ids of the likeliest tokens, best first; none that is forbidden, but if all are."""
    n = len(logits)
    ids = np.argpartition(logits, n - top_k)[n - top_k :] if 0 < top_k < n else np.arange(n)
    ids = ids[np.argsort(-logits[ids])]
    allowed = ids[logits[ids] > -np.inf]
    return allowed if len(allowed) else ids[:1]


def _shares(logits: Row) -> Row:
    weights = np.exp(logits - logits.max(initial=-np.inf))
    shares: Row = weights / weights.sum()
    return shares
