"""DRY: lowers the logits of tokens that would carry a repetition on."""

from collections import deque
from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

from engine.types import SamplingParams

MOST_EXPONENT = 80.0  # of the base, or a long repetition would be beyond floats


class Dry:
    """Follows one sequence's tokens. As llama.cpp's sampler of that name: a token that would make
    a repetition of n tokens longer is lowered by multiplier * base ** (n - allowed_length), where
    n is that or more. Nothing is repeated across a breaker, and no breaker is lowered."""

    def __init__(
        self, sampling: SamplingParams, prompt: Iterable[int], piece: Callable[[int], bytes]
    ) -> None:
        self._sampling = sampling
        self._piece = piece
        self._breakers = [text.encode() for text in sampling.dry_sequence_breakers if text]
        n_last = sampling.dry_penalty_last_n
        self._tokens: deque[int] = deque(maxlen=None if n_last < 0 else n_last)
        self._n_whole = 0  # tokens since a breaker
        self._tail = b""  # of their text, as far as a breaker may have begun in it
        for token in prompt:
            self.accept(token)

    @staticmethod
    def wanted(sampling: SamplingParams) -> bool:
        return (
            sampling.dry_multiplier > 0
            and sampling.dry_base >= 1
            and sampling.dry_penalty_last_n != 0
        )

    def accept(self, token: int) -> None:
        self._tokens.append(token)
        self._n_whole += 1
        self._tail += self._piece(token)
        if self._breaks(self._tail):
            self._n_whole = 0
            self._tail = b""
        longest = max(map(len, self._breakers), default=1)
        self._tail = self._tail[len(self._tail) - longest + 1 :] if longest > 1 else b""

    def _breaks(self, text: bytes) -> bool:
        return any(breaker in text for breaker in self._breakers)

    def apply(self, logits: npt.NDArray[np.float32]) -> None:
        allowed = self._sampling.dry_allowed_length
        limit = min(self._n_whole, len(self._tokens))
        if limit < allowed:
            return
        most: dict[int, int] = {}
        back = list(reversed(self._tokens))
        lengths = _overlaps(back)
        for at in range(1, len(back)):
            n = min(lengths[at], limit)
            following = back[at - 1]
            if n >= allowed and not self._breaks(self._piece(following)):
                most[following] = max(most.get(following, 0), n)
        base = self._sampling.dry_base
        most_exponent = MOST_EXPONENT / np.log(base) if base > 1 else np.inf
        for token, n in most.items():
            exponent = min(n - allowed, most_exponent)
            logits[token] -= np.float32(self._sampling.dry_multiplier * base**exponent)


def _overlaps(tokens: list[int]) -> list[int]:
    """Of each place, how many tokens from there on are as at the beginning (the Z-function)."""
    lengths = [0] * len(tokens)
    left = right = 0
    for at in range(1, len(tokens)):
        n = min(right - at, lengths[at - left]) if at < right else 0
        while at + n < len(tokens) and tokens[n] == tokens[at + n]:
            n += 1
        lengths[at] = n
        if at + n > right:
            left, right = at, at + n
    return lengths
