"""The KV cells of the slots: who holds which, what is shared, and what moves to the prefix tree."""

from array import array
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from engine.backends.base import Memory
from engine.prefix import Match, PrefixTree, Tokens, n_common


class Cells:
    """Counts cells and changes the memory with them. A slot holds the cells of its first tokens;
    cells may have several holders, and are free again when the last lets go.

    The numbers of cells are our own: a memory finds its places by itself.
    """

    def __init__(self, memory: Memory, tree: PrefixTree, *, n_slots: int, n_cells: int) -> None:
        self.held = [array("i") for _ in range(n_slots)]  # cells, by slot
        self.tokens = [array("i") for _ in range(n_slots)]  # and what they were computed from
        self._memory = memory
        self._tree = tree
        self._free = list(range(n_cells))
        self._n_holders = np.zeros(n_cells, np.int32)

    @property
    def n_free(self) -> int:
        return len(self._free)

    def n_only_in(self, slots: Sequence[int]) -> int:
        """Cells that would be free if these slots were cleared."""
        n_here = np.zeros_like(self._n_holders)
        for slot in slots:
            n_here[_view(self.held[slot])] += 1
        return int(np.count_nonzero((n_here > 0) & (n_here == self._n_holders)))

    def n_common(self, slot: int, wanted: Tokens) -> int:
        """How many of the slot's first cells are right for a prompt that begins with `wanted`."""
        return n_common(_view(self.tokens[slot]), wanted)

    def match(self, wanted: Tokens) -> Match:
        """The longest beginning of `wanted` in the prefix tree."""
        return self._tree.match(wanted)

    def touch(self, match: Match) -> None:
        """A match will be of use."""
        self._tree.touch(match)

    def extend(self, slot: int, tokens: "array[int]") -> None:
        """The memory has computed these tokens behind those of the slot."""
        cells = self._free[len(self._free) - len(tokens) :]
        del self._free[len(self._free) - len(tokens) :]
        self._n_holders[cells] = 1
        self.held[slot].extend(cells)
        self.tokens[slot].extend(tokens)

    def share(self, source: int, slot: int, n_tokens: int) -> bool:
        """Let an empty slot hold the first cells of another too. False where the memory cannot."""
        if not self._memory.share(source, slot, n_tokens):
            return False
        self.held[slot] = self.held[source][:n_tokens]
        self.tokens[slot] = self.tokens[source][:n_tokens]
        self._n_holders[_view(self.held[slot])] += 1
        return True

    def truncate(self, slot: int, n_tokens: int) -> bool:
        """Drop all but the first cells of a slot. False, and all are dropped, where the memory
        cannot drop an end."""
        if n_tokens == len(self.held[slot]):
            return True
        if n_tokens == 0 or not self._memory.truncate(slot, n_tokens):
            self.clear(slot)
            return n_tokens == 0
        self._let_go(self.held[slot][n_tokens:])
        del self.held[slot][n_tokens:]
        del self.tokens[slot][n_tokens:]
        return True

    def clear(self, slot: int) -> None:
        if self.held[slot]:
            self._let_go(self.held[slot])
        self._memory.clear(slot)
        self.held[slot] = array("i")
        self.tokens[slot] = array("i")

    def remember(self, slot: int) -> None:
        """Put what a slot holds into the prefix tree as well."""
        self._tree.insert(
            _view(self.tokens[slot]), lambda start, end: self._memory.save(slot, start, end)
        )

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

    def _let_go(self, cells: "array[int]") -> None:
        numbers = _view(cells)
        self._n_holders[numbers] -= 1
        self._free.extend(numbers[self._n_holders[numbers] == 0].tolist())


def _view(tokens: "array[int]") -> npt.NDArray[np.int32]:
    return np.frombuffer(tokens, np.int32) if tokens else np.empty(0, np.int32)
