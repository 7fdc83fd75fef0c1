"""How many prompt tokens a step may take, so that running streams keep their pace."""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

PROBE_TOKENS = 64  # of the first prompt, before anything was measured
MIN_TOKENS = 16  # of a step alone, whatever it costs: fewer cost more each
MIN_BESIDE = 4  # beside streams, which wait for it
SHARE = 0.5  # of the streams' own time a prompt may take at least
GAPS = 3  # times their own may the streams' gap become, where no time is set,
LEAST_STALL_S = 0.06  # and so long in any case
ALONE_S = 0.8  # may a step take when no stream waits for it, or only such as have just begun,
ALONE = 4  # or so many times the time that is set
TILE = 64  # tokens and more have their attention computed at half the cost for each,
STRETCH, STRETCHED_S = 2.5, 2.0  # so for those a step alone may take so much longer, and so long
FAR, FAR_S = 3, 6.0  # or so long, where a token costs so many times the least: most is attention
WIDE = TILE + 1  # beside streams: with cells apart one of them is computed with these
DEEP, DEEP_S = 1.5, 1.0  # and so long beside streams, where wide steps still cost so many times it
CHEAPER = 0.85  # at most a token costs in a wide step, of what it did, where that is true
OWED, MOST_OWED_S = 1 / 3, 0.3  # of what such a step takes too long streams have for themselves
SMOOTHING = 0.3  # weight of the newest measurement

Kind = Literal["alone", "narrow", "wide"]  # of steps; the latter two are beside streams


class Pace:
    """Learns from measured steps what a step costs. `max_stall_s` bounds those with streams; None:
    what they take by themselves does. `has_tiles`: wide steps have cheaper attention, as with
    llama.cpp's flash attention on a CPU."""

    def __init__(self, max_stall_s: float | None, *, has_tiles: bool) -> None:
        self._max_stall_s = max_stall_s
        self._has_tiles = has_tiles
        self._token_s: float | None = None  # of a prompt token
        self._kind: Kind | None = None  # of the steps that this was measured in
        self._narrow_s = 0.0  # of a token in the last narrow one
        self._least_token_s = math.inf  # without attention: the least in prompts alone
        self._decode_s: dict[int, float] = {}  # of a step with so many streams and no prompt
        self._owed_s = 0.0  # to the streams

    def n_prefill(self, n_decodes: int, n_most: int, burst: Sequence[int] = ()) -> int:
        """Prompt tokens for the next step beside `n_decodes` streams, `n_most` at most. With tiles
        it may be none, where the streams waited too long before. `burst`: how long the prompts are,
        in their order, where no stream has said more than a token, so that none has a pace."""
        if self._token_s is None:
            return min(n_most, PROBE_TOKENS)
        if n_decodes == 0:
            return min(n_most, max(MIN_TOKENS, int(self._n_alone(self._token_s))))
        decode_s = self._expected_s(n_decodes)
        n_burst = self._n_of_burst(self._token_s, n_decodes, n_most, burst)
        if self._owed_s > decode_s and not n_burst:
            return 0
        n = max(MIN_BESIDE, n_burst, int((self._stall_s(decode_s) - decode_s) / self._token_s))
        if n < WIDE <= n_most and self._is_deep(self._token_s):
            n = WIDE
        return min(n_most, n)

    def observe(
        self, n_decodes: int, n_prefill: int, seconds: float, *, is_beginning: bool = False
    ) -> None:
        """A step with so many tokens took so long. In a beginning no stream has a pace yet."""
        if n_prefill == 0:
            self._owed_s = max(0.0, self._owed_s - seconds)
            old = self._decode_s.get(n_decodes, seconds)
            self._decode_s[n_decodes] = _smooth(old, min(seconds, 2 * old))
            return
        decode_s = self._expected_s(n_decodes)
        if n_decodes == 0:
            self._owed_s = 0.0
        elif self._has_tiles and not is_beginning:
            owed_s = self._owed_s + OWED * (seconds - self._stall_s(decode_s))
            self._owed_s = min(max(owed_s, 0.0), MOST_OWED_S)
        if n_prefill >= (MIN_BESIDE if n_decodes else MIN_TOKENS) or self._token_s is None:
            token_s = max(seconds - decode_s, seconds / 10) / n_prefill
            kind: Kind = "narrow" if n_prefill < TILE else "wide"
            kind = kind if n_decodes and not is_beginning else "alone"
            if kind == "narrow":
                self._narrow_s = token_s
            elif (self._kind, kind) == ("narrow", "wide") and token_s > CHEAPER * self._narrow_s:
                # it was something else than attention that cost so much
                without_s = min(2 * token_s - self._narrow_s, self._narrow_s)
                self._least_token_s = max(self._least_token_s, without_s)
            self._token_s = _smooth(self._token_s if kind == self._kind else None, token_s)
            self._kind = kind
            if n_decodes == 0:
                self._least_token_s = min(self._least_token_s, token_s)

    def _n_alone(self, token_s: float) -> float:
        alone_s = ALONE_S if self._max_stall_s is None else ALONE * self._max_stall_s
        n, most = (s / token_s for s in (alone_s, min(STRETCH * alone_s, STRETCHED_S)))
        if not self._has_tiles:
            return n
        if most >= TILE:
            return max(n, min(most, 2 * TILE))
        is_far = FAR * self._least_token_s < token_s <= FAR_S / TILE
        return max(n, TILE) if is_far and self._max_stall_s is None else n

    def _n_of_burst(self, token_s: float, n_decodes: int, n_most: int, burst: Sequence[int]) -> int:
        """Tokens of the first prompts, as many as should end in a step as long as one alone; none,
        if those are fewer than the streams that would wait for it."""
        if self._max_stall_s is not None:
            return 0
        n_most = min(n_most, int(ALONE_S / token_s))
        ends = [n for n in accumulate(burst) if n <= n_most]
        return ends[-1] if len(ends) >= n_decodes else 0

    def _is_deep(self, token_s: float) -> bool:
        """Half of a token's cost beside streams is attention, and a wide step is not too long."""
        wide_s = token_s if self._kind == "wide" else (token_s + self._least_token_s) / 2
        is_worth_it = DEEP * self._least_token_s < wide_s <= DEEP_S / WIDE
        return self._has_tiles and self._max_stall_s is None and is_worth_it

    def _stall_s(self, decode_s: float) -> float:
        """That a step may take beside streams which take `decode_s` by themselves."""
        stall_s = self._max_stall_s or max(GAPS * decode_s, LEAST_STALL_S)
        return max(stall_s, decode_s * (1 + SHARE))

    def _expected_s(self, n_decodes: int) -> float:
        """Of a step with `n_decodes` streams alone: as measured for the nearest number."""
        if n_decodes == 0 or not self._decode_s:
            return 0.0
        nearest = min(self._decode_s, key=lambda n: abs(n - n_decodes))
        return self._decode_s[nearest]


def _smooth(old: float | None, new: float) -> float:
    return new if old is None else old + SMOOTHING * (new - old)
