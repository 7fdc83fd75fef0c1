"""Where the slots of a memory that cannot be cut can be brought back to.

Recurrent states, and cells behind a sliding window, are not there any more for tokens before the
last ones. So they are copied while a prompt is computed: near its end, from where the next turn of
a conversation goes on whatever its template makes of the answer; where somebody waits for a common
beginning; and at lengths that double, so that who comes later has at least half of it.
"""

from collections import OrderedDict
from collections.abc import Iterator

from engine.prefix import Saved

FIRST = 256  # tokens; then twice as many, and so on
TAIL = 4  # tokens at a prompt's end that the next turn may not have, such as of no thoughts
WORTH = 32  # tokens since the last mark, for one near a prompt's end: fewer are faster computed


class Marks:
    """Copies by slot and number of tokens. Up to `max_bytes` are kept, those used last."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._saved: OrderedDict[tuple[int, int], Saved] = OrderedDict()
        self._wanted: set[tuple[int, int]] = set()

    @property
    def n_bytes(self) -> int:
        """Each copy counted once, as slots may share them."""
        return sum({id(saved): saved.nbytes for saved in self._saved.values()}.values())

    def last(self, slot: int, n_tokens: int) -> int:
        """How long the longest beginning of a slot is that is marked and not longer; 0: none."""
        return max((n for n in self._of(slot) if n <= n_tokens), default=0)

    def want(self, slot: int, n_tokens: int) -> None:
        """Somebody waits for so many of the tokens that are being computed in a slot."""
        self._wanted.add((slot, n_tokens))

    def next(self, slot: int, n_past: int, n_prompt: int) -> int:
        """Where a prompt that has come so far is to be marked next; 0: nowhere."""
        place = FIRST
        while place <= n_past:
            place *= 2
        tail = n_prompt - TAIL
        places = [n for of, n in self._wanted if of == slot and n > n_past]
        places += [place] if place < tail else []
        if tail > n_past and tail - self.last(slot, tail) >= WORTH:
            places.append(tail)
        return min(places, default=0)

    def put(self, slot: int, n_tokens: int, saved: Saved) -> None:
        self._wanted.discard((slot, n_tokens))
        self._saved[slot, n_tokens] = saved
        while self.n_bytes > self.max_bytes:
            self._saved.popitem(last=False)

    def get(self, slot: int, n_tokens: int) -> Saved:
        self._saved.move_to_end((slot, n_tokens))
        return self._saved[slot, n_tokens]

    def copy(self, source: int, slot: int, n_tokens: int) -> None:
        """A slot has so many of another's first tokens."""
        for n in [n for n in self._of(source) if n <= n_tokens]:
            self._saved[slot, n] = self._saved[source, n]

    def forget(self, slot: int, n_tokens: int = 0) -> None:
        """A slot has only its first tokens."""
        self._wanted = {place for place in self._wanted if place[0] != slot}
        for n in [n for n in self._of(slot) if n > n_tokens]:
            del self._saved[slot, n]

    def _of(self, slot: int) -> Iterator[int]:
        return (n for of, n in self._saved if of == slot)
