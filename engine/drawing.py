"""How a row of logits chooses its token in numpy, by every rule that llama.cpp has."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.backends.base import Constraint
from engine.dry import Dry
from engine.sampling import Rules, logprobs
from engine.types import Sampled, SamplingParams

Row = npt.NDArray[np.float32]
MIROSTAT_M = 100  # likeliest tokens that version 1 estimates from, as in the paper and llama.cpp


class RowSampler:
    """How one sequence chooses."""

    def __init__(
        self,
        sampling: SamplingParams,
        prompt: Iterable[int],
        rules: Rules,
        piece: Callable[[int], bytes],
    ) -> None:
        self._n_logprobs = sampling.n_logprobs
        self._rules = rules
        self._dry = Dry(sampling, prompt, piece) if Dry.wanted(sampling) else None
        self._draw = Draw(sampling)

    def choose(self, logits: Row, constraint: Constraint | None) -> Sampled:
        """The token for a row of logits, which is changed."""
        raw = logits.copy() if self._n_logprobs is not None else logits
        self._rules.apply(logits, constraint)
        likeliest = int(logits.argmax())
        if self._dry:
            self._dry.apply(logits)
        token = self._draw(logits)
        if logits[token] == -np.inf:  # XTC and DRY may leave only what is forbidden
            token = likeliest
        if self._dry:
            self._dry.accept(token)
        self._rules.accept(token, constraint)
        if self._n_logprobs is None:
            return Sampled(token)
        return Sampled(token, *logprobs(raw, token, self._n_logprobs))


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
        """In logarithms: where the surprise that it aims at cannot be reached `mu` grows on and on,
        and all stay."""
        shares = shares[shares > 0]
        n, likely = len(shares), shares[:MIROSTAT_M]
        if n < 2:
            return 1
        ranks = np.arange(1, len(likely))
        t = np.log((ranks + 1) / ranks)
        s = float((t * -np.diff(np.log(likely))).sum() / (t * t).sum())
        epsilon = s - 1 or 1e-9
        ratio = epsilon / -math.expm1(-epsilon * math.log(n))
        log2_k = (math.log2(ratio) + self._mu) / max(s, 1e-9)
        return n if log2_k >= math.log2(n) else max(int(2**log2_k), 1)


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
