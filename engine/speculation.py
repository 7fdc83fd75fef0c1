"""What a sequence may say next, guessed from what it has said, and whether guesses pay.

A guess is computed in the step of the token before it, which so becomes longer, and saves a step
where it is right. What is said is the same in any case: each token is chosen as always, and a guess
counts only where it is what was chosen.
"""

from array import array

import numpy as np

from engine.prefix import Tokens
from engine.types import MOST_GUESSES

SHORTEST = 2  # tokens that must be as they were somewhere before
LONGEST = 16  # of which the longest match is taken; of equal ones the last
ROUND = 4  # only multiples: kernels compute so many tokens for the price of one less
LEAST = 0.3  # trust with which it is asked whether guesses pay
RATE = 0.15  # weight of the newest token in a sequence's trust
GAIN = 1.1  # that a step with guesses must promise
BESIDE = 1.25  # times as long may a step take for guesses where it serves several sequences
UNKNOWN = 0.25  # of a token's share in a step: what one more is taken to cost, unless measured
SMOOTHING = 0.3  # weight of the newest measurement
MEMORY = 64  # steps, after which a measurement is forgotten, and so made again


class Guesses:
    """How one sequence may go on: as it did where it was last as it is now.

    Whether the next guess would be right is watched all the time, so nothing needs to be computed
    to find out that guesses have begun to pay.
    """

    def __init__(self) -> None:
        self.trust = 0.0  # the probability that the next one is right
        self._at: int | None = None  # the index of the token that is guessed to come next
        self._n_wrong = 0  # the last so many guesses from there
        self._n_seen = 0

    @property
    def exist(self) -> bool:
        return self._at is not None

    def follow(self, tokens: "array[int]") -> None:
        """Hear what the sequence has said."""
        for token in tokens[self._n_seen :] if self._n_seen else ():
            if self._at is not None:
                is_right = tokens[self._at] == token
                self.trust += RATE * (is_right - self.trust)
                self._at += 1
                self._n_wrong = 0 if is_right else self._n_wrong + 1
        self._n_seen = len(tokens)
        if self._at is None or self._n_wrong:
            found = _continuation(np.frombuffer(tokens, np.int32))
            # else one token may have been put in the place of another
            if found is not None or self._n_wrong > 1:
                self._at, self._n_wrong = found, 0

    def next(self, tokens: "array[int]", n: int) -> "array[int]":
        """So many guesses, or none."""
        guesses = array("i")
        for at in range(self._at, self._at + n) if self._at is not None else ():
            guesses.append(tokens[at] if at < len(tokens) else guesses[at - len(tokens)])
        return guesses


class Speculation:
    """Learns from measured steps what they cost, and says how many guesses pay.

    1. Steps are known by their number of tokens, whoever they are for. Between two numbers that
       were measured lies a straight line; beyond the last one the next tokens are taken to be
       cheap, so that it is tried.
    2. Guesses are worth the tokens that they are likely to give.
    3. Where it `repeats` a step with a wrong guess, that is paid twice.
    """

    def __init__(self, *, repeats: bool = False) -> None:
        self._repeats = repeats
        self._n_steps = 0
        self._measured: dict[int, tuple[float, int]] = {}  # seconds, and in which step

    def observe(self, n_tokens: int, seconds: float) -> None:
        """A step that computed so many tokens, and no prompt, took so long."""
        self._n_steps += 1
        old, _ = self._measured.get(n_tokens, (seconds, 0))
        # one step in the shadow of another program must not decide
        new = old + SMOOTHING * (min(seconds, 2 * old) - old)
        self._measured[n_tokens] = new, self._n_steps
        for n, (_, step) in list(self._measured.items()):
            if step + MEMORY < self._n_steps:
                del self._measured[n]

    def plan(self, trusts: list[float], n_others: int, n_room: int) -> list[int]:
        """How many guesses to compute for each of the sequences that have some, beside `n_others`,
        with room for so many in all."""
        n_sequences = n_tokens = len(trusts) + n_others
        n_guesses = [0] * len(trusts)
        if n_sequences not in self._measured:
            return n_guesses
        plain_s = self._seconds(n_sequences)
        all_right = 1.0  # how likely that is for the guesses so far
        expected, best_rate = float(n_sequences), n_sequences / plain_s
        for i in sorted(range(len(trusts)), key=lambda i: -trusts[i]):
            if trusts[i] < LEAST:
                break
            gained, n_best, expected_best = 0.0, 0, expected
            wanted = best_rate * GAIN
            for n in range(1, min(MOST_GUESSES - n_tokens % ROUND, n_room) + 1):
                gained += trusts[i] ** n
                if (n_tokens + n) % ROUND:
                    continue
                seconds = self._seconds(n_tokens + n)
                if n_sequences > 1 and seconds > BESIDE * plain_s:
                    break
                if self._repeats:
                    seconds *= 2 - all_right * trusts[i] ** n
                if (expected + gained) / seconds > wanted:
                    n_best, expected_best = n, expected + gained
                    wanted = best_rate = expected_best / seconds
            n_guesses[i] = n_best
            all_right *= trusts[i] ** n_best
            n_tokens += n_best
            n_room -= n_best
            expected = expected_best
        return n_guesses

    def _seconds(self, n_tokens: int) -> float:
        """Of a step with so many tokens, of which one with as many or fewer was measured."""
        if n_tokens in self._measured:
            return self._measured[n_tokens][0]
        below = max(n for n in self._measured if n < n_tokens)
        above = min((n for n in self._measured if n > n_tokens), default=None)
        below_s = self._measured[below][0]
        if above is None:
            return below_s * (1 + UNKNOWN * (n_tokens - below) / below)
        above_s = self._measured[above][0]
        return below_s + (above_s - below_s) * (n_tokens - below) / (above - below)


def _continuation(tokens: Tokens) -> int | None:
    """The index of what came after the last place where the last tokens stand before, of several
    after the longest; None where they are new."""
    places = np.flatnonzero(tokens[:-1] == tokens[-1])
    n = 1
    while places.size and n < LONGEST:
        longer = places[places >= n]
        longer = longer[tokens[longer - n] == tokens[-1 - n]]
        if not longer.size:
            break
        places = longer
        n += 1
    return int(places[-1]) + 1 if places.size and n >= SHORTEST else None
