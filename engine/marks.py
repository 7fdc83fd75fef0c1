"""Where the slots of a memory that cannot be cut can be brought back to, and slots that are kept
outside of it.

Recurrent states, and cells behind a sliding window, are not there any more for tokens before the
last ones. So they are copied while a prompt is computed: near its end, from where the next turn of
a conversation goes on whatever its template makes of the answer; where somebody waits for a common
beginning; and at lengths that double, so that who comes later has at least half of it. A slot whose
place or cells are wanted is kept whole, with its marks.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from engine.prefix import Saved, Tokens, n_common

FIRST = 256  # tokens; then twice as many, and so on
TAIL = 4  # tokens at a prompt's end that the next turn may not have, such as of no thoughts
WORTH = 32  # tokens since the last mark, for one near a prompt's end: fewer are faster computed


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """A slot outside of the memory."""

    tokens: Tokens
    saved: Saved
    is_cells: bool = False  # a list of them still, which can be cut anywhere


Place = tuple[int | Kept, int]  # a slot, or one that is kept, and a number of its tokens


class Marks:
    """Copies by place, up to `max_bytes` of those used last; slots that are kept go first."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._saved: OrderedDict[Place, Saved] = OrderedDict()
        self._kept: list[Kept] = []  # least recently used first
        self._wanted: set[tuple[int, int]] = set()

    @property
    def n_kept(self) -> int:
        return len(self._kept)

    @property
    def n_bytes(self) -> int:
        """Each copy counted once, as slots may share them."""
        marks = {id(saved): saved.nbytes for saved in self._saved.values()}
        return sum(marks.values()) + sum(kept.saved.nbytes for kept in self._kept)

    def last(self, of: int | Kept, n_tokens: int) -> int:
        """How long its longest beginning is that is marked and not longer; 0: none."""
        return max((n for n in self._of(of) if n <= n_tokens), default=0)

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
        self._shrink()

    def get(self, of: int | Kept, n_tokens: int) -> Saved:
        self._saved.move_to_end((of, n_tokens))
        return self._saved[of, n_tokens]

    def copy(self, source: int | Kept, slot: int, n_tokens: int) -> None:
        """A slot has so many of another's first tokens."""
        for n in [n for n in self._of(source) if n <= n_tokens]:
            self._saved[slot, n] = self._saved[source, n]

    def give_up_first(self, slot: int) -> bool:
        """Forget the shortest beginning that is marked; False: there is none."""
        first = min(self._of(slot), default=None)
        if first is not None:
            del self._saved[slot, first]
        return first is not None

    def forget(self, slot: int, n_tokens: int = 0) -> None:
        """A slot has only its first tokens."""
        self._wanted = {place for place in self._wanted if place[0] != slot}
        for n in [n for n in self._of(slot) if n > n_tokens]:
            del self._saved[slot, n]

    @property
    def room_to_keep(self) -> int:
        """Bytes that one that is kept may have: others that are kept make way, and marks do not."""
        marks = {id(s): s.nbytes for (of, _), s in self._saved.items() if isinstance(of, int)}
        return self.max_bytes - sum(marks.values())

    def resize(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._shrink()

    def keep(self, slot: int, tokens: Tokens, saved: Saved, *, is_cells: bool = False) -> None:
        """A slot leaves the memory, and its marks are those of the one that is kept."""
        kept = Kept(tokens.copy(), saved, is_cells)
        for n in list(self._of(slot)):
            self._saved[kept, n] = self._saved.pop((slot, n))
        self._kept.append(kept)
        self._shrink()

    def match(self, wanted: Tokens) -> tuple[int, Kept | None]:
        """The one that is kept with most of the beginning of `wanted`, the shortest of several, and
        how much that is."""
        best, best_n = None, 0
        for kept in self._kept:
            n = n_common(kept.tokens, wanted)
            if not n or n < best_n:  # before its marks are looked through
                continue
            n = n if n == len(kept.tokens) or kept.is_cells else self.last(kept, n)
            is_shorter = best is not None and len(kept.tokens) < len(best.tokens)
            if n > best_n or (n == best_n and is_shorter):
                best, best_n = kept, n
        return best_n, best

    def has(self, kept: Kept) -> bool:
        """It has not been given up for others."""
        return kept in self._kept

    def touch(self, kept: Kept) -> None:
        """It will be of use."""
        self._kept.remove(kept)
        self._kept.append(kept)

    def take(self, kept: Kept, slot: int, n_tokens: int) -> None:
        """Its first tokens are in a slot again. It stays if it has more than an answer beyond."""
        self.copy(kept, slot, n_tokens)
        n_worth = len(kept.tokens) if kept.is_cells else self.last(kept, len(kept.tokens))
        if n_worth <= n_tokens:
            self._kept.remove(kept)
            self._forget_all(kept)

    def _shrink(self) -> None:
        while self.n_bytes > self.max_bytes:
            if self._kept:
                self._forget_all(self._kept.pop(0))
            else:
                self._saved.popitem(last=False)

    def _forget_all(self, of: Kept) -> None:
        for n in list(self._of(of)):
            del self._saved[of, n]

    def _of(self, of: int | Kept) -> Iterator[int]:
        return (n for one, n in self._saved if one == of)
