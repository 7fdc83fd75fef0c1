"""What is computed of a row of logits: what changes it, in place, and log probabilities."""

import math
import sys
from collections import Counter, deque
from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from engine.backends.base import Constraint
from engine.types import Sampled, SamplingParams


def logprobs(
    logits: npt.NDArray[np.float32], token: int, n_top: int
) -> tuple[float, list[tuple[int, float]]]:
    """The natural logarithm of a token's probability by a row of logits, and the `n_top` likeliest
    tokens with theirs, best first."""
    highest = logits.max()
    log_sum = highest + np.log(np.exp(logits - highest).sum())
    top: list[tuple[int, float]] = []
    if n_top == 1:
        top = [(int(logits.argmax()), float(highest - log_sum))]
    elif n_top:
        likeliest = np.argpartition(logits, -n_top)[-n_top:]
        likeliest = likeliest[np.argsort(-logits[likeliest], kind="stable")]
        top = [(int(i), float(logits[i] - log_sum)) for i in likeliest]
    return float(logits[token] - log_sum), top


def scored(logits: npt.NDArray[np.float32], token: int, n_top: int) -> Sampled:
    """How likely a token was that was given. Raises ValueError where the model has no say in it."""
    logprob, top = logprobs(logits, token, n_top)
    if not math.isfinite(logprob):
        raise ValueError(f"the log probability of token {token} of the prompt is {logprob}")
    return Sampled(token, logprob, top)


class Bias:
    """Adds to the logits of some tokens."""

    def __init__(self, logit_bias: Mapping[int, float]) -> None:
        self._ids = np.array(list(logit_bias), dtype=np.intp)
        self._values = np.array(list(logit_bias.values()), dtype=np.float32)

    def apply(self, logits: npt.NDArray[np.float32]) -> None:
        logits[self._ids] += self._values


class Penalties:
    """Counts one sequence's tokens and lowers their logits.

    frequency and presence: OpenAI's formula over generated tokens. repeat_penalty: divides a
    positive logit and multiplies a negative one (Keskar et al. 2019, as llama.cpp does), over the
    last `repeat_last_n` tokens of prompt and answer.
    """

    def __init__(self, sampling: SamplingParams, prompt: Iterable[int]) -> None:
        self._sampling = sampling
        self._generated: Counter[int] = Counter()
        n_recent = sampling.repeat_last_n
        self._recent = deque(prompt, maxlen=None if n_recent < 0 else n_recent)

    @staticmethod
    def wanted(sampling: SamplingParams) -> bool:
        return (
            sampling.repeat_penalty != 1
            or sampling.frequency_penalty != 0
            or sampling.presence_penalty != 0
        )

    def accept(self, token: int) -> None:
        self._generated[token] += 1
        self._recent.append(token)

    def apply(self, logits: npt.NDArray[np.float32]) -> None:
        if self._sampling.repeat_penalty != 1:
            ids = np.array(list(set(self._recent)), dtype=np.intp)
            values = logits[ids]
            factor = np.float32(self._sampling.repeat_penalty)
            logits[ids] = np.where(values > 0, values / factor, values * factor)
        if self._generated:
            ids = np.fromiter(self._generated.keys(), np.intp, len(self._generated))
            counts = np.fromiter(self._generated.values(), np.float32, len(self._generated))
            logits[ids] -= (
                counts * self._sampling.frequency_penalty + self._sampling.presence_penalty
            ).astype(np.float32)


class Rules:
    """What one sequence's rows of logits go through before a token is drawn: nothing that the model
    never says, no end too early, penalties, bias, grammar, in this order."""

    def __init__(
        self,
        sampling: SamplingParams,
        prompt: Iterable[int],
        ends: list[int],
        suppressed: list[int],
    ) -> None:
        self._suppressed = np.array(suppressed, np.intp) if suppressed else None
        self._ends = ends
        self._n_without_end = sys.maxsize if sampling.ignore_eos else sampling.min_tokens
        self._bias = Bias(sampling.logit_bias) if sampling.logit_bias else None
        self._penalties = Penalties(sampling, prompt) if Penalties.wanted(sampling) else None

    def changes(self, constraint: Constraint | None) -> bool:
        """Whether the next row is changed."""
        is_limited = self._suppressed is not None or self._n_without_end > 0
        return bool(is_limited or self._penalties or self._bias or constraint)

    def apply(self, logits: npt.NDArray[np.float32], constraint: Constraint | None) -> None:
        """Change the next row."""
        if self._suppressed is not None:
            logits[self._suppressed] = -np.inf
        if self._n_without_end > 0:
            self._n_without_end -= 1
            for token in self._ends:
                logits[token] = -np.inf
        if self._penalties:
            self._penalties.apply(logits)
        if self._bias:
            self._bias.apply(logits)
        if constraint:
            constraint.apply(logits)

    def accept(self, token: int, constraint: Constraint | None) -> None:
        """The token was chosen."""
        if self._penalties:
            self._penalties.accept(token)
        if constraint:
            constraint.accept(token)
