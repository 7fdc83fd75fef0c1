"""The KV cells of the slots: who holds which, what is shared, and what moves to the prefix tree."""

from array import array
from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

from engine.backends.base import Memory
from engine.marks import Kept, Marks
from engine.prefix import Match, PrefixTree, Saved, Tokens, n_common

FOR_STEPS = 4  # one part of so many of the room for copies is for those of a step


class Cells:
    """Counts cells and changes the memory with them. A slot holds the cells of its first tokens;
    cells may have several holders, and are free again when the last lets go.

    The numbers of cells are our own: a memory finds its places by itself.
    """

    def __init__(
        self,
        memory: Memory,
        tree: PrefixTree,
        *,
        n_slots: int,
        n_cells: int,
        has_guesses: bool = True,
    ) -> None:
        self.held = [array("i") for _ in range(n_slots)]  # cells, by slot
        self.tokens = [array("i") for _ in range(n_slots)]  # and what they were computed from
        self._memory = memory
        self._tree = tree
        self._step_bytes = 0
        if has_guesses and not memory.takes_back:
            self._step_bytes = tree.max_bytes // FOR_STEPS
        self._marks = Marks(tree.max_bytes - self._step_bytes)
        self.can_mark = memory.can_mark and tree.max_bytes > 0
        self._free = list(range(n_cells))
        self._n_holders = np.zeros(n_cells, np.int32)
        # slots as they were before the last step, with their lengths
        self._before: dict[int, tuple[int, Saved]] = {}

    @property
    def can_share(self) -> bool:
        """Cells may be shared, cut and saved anywhere; else only where they are marked."""
        return self._memory.is_cells

    @property
    def takes_back(self) -> bool:
        """What a step computes can be dropped without a copy."""
        return self._memory.takes_back

    def can_drop(self, slot: int) -> bool:
        """Whether what the next step computes of a slot can be dropped; what cannot be cut is
        copied for that."""
        if self.takes_back:
            return True
        self._before.pop(slot, None)
        n_bytes = sum(saved.nbytes for _, saved in self._before.values())
        saved = self._memory.mark(slot, self._step_bytes - n_bytes)
        if saved is not None:
            self._before[slot] = len(self.tokens[slot]), saved
        return saved is not None

    @property
    def shares_cells(self) -> bool:
        """Cells that several slots hold are there once."""
        return self._memory.shares_cells

    @property
    def block(self) -> int:
        """Tokens of a run in the tree."""
        return self._memory.block

    @property
    def n_free(self) -> int:
        return len(self._free)

    @property
    def n_held(self) -> int:
        """Cells that are in use, each counted once."""
        return len(self._n_holders) - len(self._free)

    def n_only_in(self, slots: Iterable[int]) -> int:
        """Cells that would be free if these slots were cleared."""
        n_here = self._n_held(slots)
        return int(np.count_nonzero((n_here > 0) & (n_here == self._n_holders)))

    def n_also_in(self, slot: int, n_tokens: int, others: Iterable[int]) -> int:
        """How many of a slot's first cells others hold too, or are itself."""
        return int(np.count_nonzero(self._n_held(others)[view(self.held[slot])[:n_tokens]]))

    def n_common(self, slot: int, wanted: Tokens) -> int:
        """How many of the slot's first cells are right for a prompt that begins with `wanted`."""
        n = n_common(view(self.tokens[slot]), wanted)
        is_usable = self.can_share or n == len(self.tokens[slot])
        return n if is_usable else self._marks.last(slot, n)

    def match(self, wanted: Tokens) -> Match:
        """The longest beginning of `wanted` in the prefix tree."""
        return self._tree.match(wanted)

    def match_kept(self, wanted: Tokens) -> tuple[int, Kept | None]:
        """The same of slots that are kept outside of a memory that cannot be cut."""
        return self._marks.match(wanted)

    def touch(self, match: Match) -> None:
        """A match will be of use."""
        self._tree.touch(match)

    def extend(self, slot: int, tokens: "array[int]") -> None:
        """The memory has computed these tokens behind those of the slot."""
        if len(tokens) == 1:  # as in most steps: numpy would take longer to begin
            cell = self._free.pop()
            self._n_holders[cell] = 1
            self.held[slot].append(cell)
            self.tokens[slot].append(tokens[0])
            return
        first = len(self._free) - len(tokens)
        cells = self._free[first:]
        del self._free[first:]
        self._n_holders[cells] = 1
        self.held[slot].extend(cells)
        self.tokens[slot].extend(tokens)

    def want_mark(self, slot: int, n_tokens: int) -> None:
        """Somebody waits for so many of the tokens that are being computed in a slot."""
        self._marks.want(slot, n_tokens)

    def next_mark(self, slot: int, n_prompt: int) -> int:
        """How many tokens of its prompt a slot will have where it is marked next; 0: nowhere."""
        return self._marks.next(slot, len(self.tokens[slot]), n_prompt)

    def mark(self, slot: int) -> None:
        """Make a slot's end a place to which it can be cut, and up to which it can be shared."""
        saved = self._memory.mark(slot, self._marks.max_bytes)
        if saved is not None:
            self._marks.put(slot, len(self.tokens[slot]), saved)

    def has_mark_behind(self, slot: int, n_tokens: int) -> bool:
        """More of a slot than its last answer would be lost if it were cut there."""
        return self._marks.last(slot, len(self.tokens[slot])) > n_tokens

    def share(self, source: int, slot: int, n_tokens: int) -> None:
        """Let an empty slot hold the first cells of another too; none, where the memory refuses.
        If it does not share cells, so many must be free."""
        if self.can_share:
            self._memory.share(source, slot, n_tokens)
        elif not self._share_at_mark(source, slot, n_tokens):
            return
        if not self.shares_cells:
            self.extend(slot, self.tokens[source][:n_tokens])
            return
        self.held[slot] = self.held[source][:n_tokens]
        self.tokens[slot] = self.tokens[source][:n_tokens]
        self._n_holders[view(self.held[slot])] += 1

    def truncate(self, slot: int, n_tokens: int) -> None:
        """Drop all but the first cells of a slot, one at least; all, where the memory refuses."""
        self._keep(slot, n_tokens, self._cut)

    def drop(self, slot: int, n_tokens: int) -> None:
        """Drop what the last step has computed of a slot behind its first cells, for which it must
        have said `can_drop`; all of that step where it cannot be cut in its midst."""
        if self.takes_back:
            self._keep(slot, n_tokens, self._memory.truncate)
            return
        before = self._before.pop(slot, None)
        if n_tokens < len(self.held[slot]):
            assert before is not None
            n_before, saved = before
            self._keep(slot, n_before, lambda slot, n: self._memory.rewind(slot, saved, n))

    def _keep(self, slot: int, n_tokens: int, cut: Callable[[int, int], bool]) -> None:
        if n_tokens == len(self.held[slot]):
            return
        if not cut(slot, n_tokens):
            self.clear(slot)
            return
        self._marks.forget(slot, n_tokens)
        self._let_go(self.held[slot][n_tokens:])
        del self.held[slot][n_tokens:]
        del self.tokens[slot][n_tokens:]

    def clear(self, slot: int) -> None:
        self._let_go(self.held[slot])
        self._memory.clear(slot)
        self._marks.forget(slot)
        self.held[slot] = array("i")
        self.tokens[slot] = array("i")

    def remember(self, slot: int) -> None:
        """Put all of a slot into the prefix tree as well."""
        while self._remember_block(slot):
            pass

    def move_out(self, slot: int) -> None:
        """Put all of a slot into the prefix tree, or keep it whole, and clear it."""
        if self.can_share:
            self.remember(slot)
        elif self.can_mark:
            self.put_away(slot)
        self.clear(slot)

    def put_away(self, slot: int) -> bool:
        """Keep a slot that cannot be cut whole outside of the memory. False, and it is as it was,
        where there is no room for it."""
        if not self.tokens[slot]:
            return False
        saved = self._memory.mark(slot, self._marks.room_to_keep, is_whole=True)
        if saved is None:
            return False
        self._marks.keep(slot, view(self.tokens[slot]), saved)
        self.clear(slot)
        return True

    def move_out_block(self, slot: int) -> bool:
        """Put the next block of a slot into the prefix tree; after the last one it is cleared. So
        it is where a block cannot be remembered: then False."""
        n_left = self._remember_block(slot)
        if not n_left:
            self.clear(slot)
        return n_left is not None

    def _remember_block(self, slot: int) -> int | None:
        """Put the next block into the prefix tree. How many tokens are not there yet; None if it
        cannot be remembered."""
        if not self.can_share:
            return None
        tokens = view(self.tokens[slot])
        end = min(self._tree.match(tokens).n_tokens + self.block, len(tokens))
        is_known = self._tree.insert(
            tokens[:end], lambda start, end: self._memory.save(slot, start, end)
        )
        return len(tokens) - end if is_known else None

    def recall(self, slot: int, match: Match) -> None:
        """Bring cells back from the prefix tree into an empty slot, while there is room."""
        for node, end in match.runs():
            # the whole run comes back, also where only its beginning is wanted
            if len(node.tokens) > self.n_free:
                return
            if not self._memory.load(slot, node.saved, node.start, end):
                self.clear(slot)
                return
            self.extend(slot, array("i", node.tokens[: end - node.start].tolist()))

    def touch_kept(self, kept: Kept) -> None:
        """It will be of use."""
        self._marks.touch(kept)

    def take_back(self, slot: int, kept: Kept, n_tokens: int) -> None:
        """Bring the first tokens of one that is kept into an empty slot, if it still is. There
        must be room for all of it."""
        if not self._marks.has(kept):
            return
        if not self._memory.load(slot, kept.saved, 0, len(kept.tokens)):
            self._memory.clear(slot)
            return
        self.extend(slot, array("i", kept.tokens.tolist()))
        self._marks.take(kept, slot, n_tokens)
        self.truncate(slot, n_tokens)

    def _share_at_mark(self, source: int, slot: int, n_tokens: int) -> bool:
        """False where that fails, and the slot is empty."""
        if self._marks.last(source, n_tokens) < n_tokens:  # it is all of the source
            self.mark(source)
            if self._marks.last(source, n_tokens) < n_tokens:
                return False
        self._memory.share(source, slot, n_tokens)
        if not self._memory.rewind(slot, self._marks.get(source, n_tokens), n_tokens):
            self._memory.clear(slot)
            return False
        self._marks.copy(source, slot, n_tokens)
        return True

    def _cut(self, slot: int, n_tokens: int) -> bool:
        if self.can_share:
            return self._memory.truncate(slot, n_tokens)
        return self._memory.rewind(slot, self._marks.get(slot, n_tokens), n_tokens)

    def _n_held(self, slots: Iterable[int]) -> npt.NDArray[np.int32]:
        """By how many of these slots each cell is held."""
        n_held = np.zeros_like(self._n_holders)
        for slot in slots:
            n_held[view(self.held[slot])] += 1
        return n_held

    def _let_go(self, cells: "array[int]") -> None:
        numbers = view(cells)
        self._n_holders[numbers] -= 1
        self._free.extend(numbers[self._n_holders[numbers] == 0].tolist())


def view(tokens: "array[int]") -> npt.NDArray[np.int32]:
    """The tokens as numpy sees them, without a copy: not to be kept."""
    return np.frombuffer(tokens, np.int32) if tokens else np.empty(0, np.int32)
