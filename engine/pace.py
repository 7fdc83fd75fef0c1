"""How many prompt tokens a step may take, so that running streams keep their pace."""

import math

PROBE_TOKENS = 64  # of the first prompt, before anything was measured
MIN_TOKENS = 16  # a prompt gets on in every step, whatever the steps cost: fewer cost more each
MIN_BESIDE = 4  # beside streams, which wait for it
SHARE = 0.5  # of the streams' own time a prompt may take at least
GAPS = 3  # times their own may the streams' gap become, where no time is set,
LEAST_STALL_S = 0.06  # and so long in any case
ALONE_S = 0.8  # may a step take when no stream waits for it,
ALONE = 4  # or so many times the time that is set
TILE = 64  # tokens and more have their attention computed at half the cost for each,
STRETCH, STRETCHED_S = 2.5, 2.0  # so for those a step alone may take so much longer, and so long
FAR, FAR_S = 3, 6.0  # or so long, where a token costs so many times the least: most is attention
DEEP, DEEP_S = 1.2, 1.0  # and beside streams, from so many times on, so long, if no time is set
SMOOTHING = 0.3  # weight of the newest measurement


class Pace:
    """Learns from measured steps what a step costs. `max_stall_s` bounds those with streams; None:
    what they take by themselves does. `has_tiles`: wide steps have cheaper attention, as with
    llama.cpp's flash attention on a CPU."""

    def __init__(self, max_stall_s: float | None, *, has_tiles: bool) -> None:
        self._max_stall_s = max_stall_s
        self._has_tiles = has_tiles
        self._token_s: float | None = None  # of a prompt token
        self._was_wide = False  # the step that this was measured in, beside streams
        self._least_token_s = math.inf  # that it has been, in prompts alone
        self._decode_s: dict[int, float] = {}  # of a step with so many streams and no prompt
        self._owed_s = 0.0  # that streams may have for themselves, since they waited too long

    def n_prefill(self, n_decodes: int) -> int:
        """Prompt tokens for the next step beside `n_decodes` streams; 0 where these waited too
        long before."""
        if self._token_s is None:
            return PROBE_TOKENS
        if n_decodes == 0:
            return max(MIN_TOKENS, int(self._n_alone(self._token_s)))
        decode_s = self._expected_s(n_decodes)
        if self._owed_s > decode_s:
            return 0
        n = max(MIN_BESIDE, int((self._stall_s(decode_s) - decode_s) / self._token_s))
        return TILE if n < TILE and self._is_deep(self._token_s) else n

    def observe(self, n_decodes: int, n_prefill: int, seconds: float) -> None:
        """A step with so many tokens took so long."""
        decode_s = self._expected_s(n_decodes)
        if n_prefill == 0:
            self._owed_s = max(0.0, self._owed_s - seconds)
            self._decode_s[n_decodes] = _smooth(self._decode_s.get(n_decodes), seconds)
            return
        if n_decodes == 0:
            self._owed_s = 0.0
        else:  # a part of what the step took too long; the machine may have slept
            too_long_s = min(seconds, DEEP_S) - self._stall_s(decode_s)
            self._owed_s = max(0.0, self._owed_s + too_long_s / GAPS)
        if n_prefill >= (MIN_BESIDE if n_decodes else MIN_TOKENS) or self._token_s is None:
            token_s = max(seconds - decode_s, seconds / 10) / n_prefill
            is_wide = n_decodes > 0 and n_prefill >= TILE
            is_alike = is_wide == self._was_wide
            self._token_s = _smooth(self._token_s if is_alike else None, token_s)
            self._was_wide = is_wide
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

    def _is_deep(self, token_s: float) -> bool:
        """Most of a token's cost beside streams is attention, and a wide step is worth it."""
        wide_s = token_s if self._was_wide else token_s / 2
        is_worth_it = DEEP * self._least_token_s < wide_s <= DEEP_S / TILE
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
