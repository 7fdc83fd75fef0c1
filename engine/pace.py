"""How many prompt tokens a step may take, so that running streams keep their pace."""

import math

PROBE_TOKENS = 64  # of the first prompt, before anything was measured
MIN_TOKENS = 16  # a prompt gets on in every step, whatever the steps cost: fewer cost more each
MIN_IF_SET = 4  # so few beside streams where a time is set, which is to be kept
SHARE = 0.5  # of the streams' own time a prompt may take at least
GAPS = 3  # times their own may the streams' gap become, where no time is set,
LEAST_STALL_S = 0.06  # and so long in any case
ALONE_S = 0.8  # may a step take when no stream waits for it,
ALONE = 4  # or so many times the time that is set
TILE = 64  # tokens and more have their attention computed at half the cost for each,
STRETCH, STRETCHED_S = 2.5, 2.0  # so for those a step alone may take so much longer, and so long
FAR, FAR_S = 3, 6.0  # or so long, where a token costs so many times the least: most is attention
SMOOTHING = 0.3  # weight of the newest measurement


class Pace:
    """Learns from measured steps what a step costs. `max_stall_s` bounds those with streams; None:
    what they take by themselves does."""

    def __init__(self, max_stall_s: float | None) -> None:
        self._max_stall_s = max_stall_s
        self._min_beside = MIN_TOKENS if max_stall_s is None else MIN_IF_SET
        self._token_s: float | None = None  # of a prompt token
        self._least_token_s = math.inf  # that it has been, in prompts alone
        self._decode_s: dict[int, float] = {}  # of a step with so many streams and no prompt

    def n_prefill(self, n_decodes: int) -> int:
        """Prompt tokens for the next step beside `n_decodes` streams."""
        if self._token_s is None:
            return PROBE_TOKENS
        if n_decodes == 0:
            alone_s = ALONE_S if self._max_stall_s is None else ALONE * self._max_stall_s
            n, most = (s / self._token_s for s in (alone_s, min(STRETCH * alone_s, STRETCHED_S)))
            if most >= TILE:
                n = max(n, min(most, 2 * TILE))
            elif self._is_far and self._max_stall_s is None:
                n = max(n, TILE)
            return max(MIN_TOKENS, int(n))
        decode_s = self._expected_s(n_decodes)
        stall_s = self._max_stall_s or max(GAPS * decode_s, LEAST_STALL_S)
        left_s = max(stall_s - decode_s, decode_s * SHARE)
        return max(self._min_beside, int(left_s / self._token_s))

    def observe(self, n_decodes: int, n_prefill: int, seconds: float) -> None:
        """A step with so many tokens took so long."""
        if n_prefill == 0:
            self._decode_s[n_decodes] = _smooth(self._decode_s.get(n_decodes), seconds)
        elif n_prefill >= (self._min_beside if n_decodes else MIN_TOKENS) or self._token_s is None:
            token_s = max(seconds - self._expected_s(n_decodes), seconds / 10) / n_prefill
            self._token_s = _smooth(self._token_s, token_s)
            if n_decodes == 0:
                self._least_token_s = min(self._least_token_s, token_s)

    @property
    def _is_far(self) -> bool:
        assert self._token_s is not None
        return FAR * self._least_token_s < self._token_s <= FAR_S / TILE

    def _expected_s(self, n_decodes: int) -> float:
        """Of a step with `n_decodes` streams alone: as measured for the nearest number."""
        if n_decodes == 0 or not self._decode_s:
            return 0.0
        nearest = min(self._decode_s, key=lambda n: abs(n - n_decodes))
        return self._decode_s[nearest]


def _smooth(old: float | None, new: float) -> float:
    return new if old is None else old + SMOOTHING * (new - old)
