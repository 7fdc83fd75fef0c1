"""The beginnings of prompts that are remembered outside the KV cells: a radix tree over tokens.

Each node is a run of tokens with the saved cells of just that run; what lies before it is on the
way from the root. A branch may leave a node anywhere inside its run, so nothing is ever split: who
needs only a part of a run brings back the whole and drops the rest.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int32]


class Saved(Protocol):
    """The contents of some cells, in memory of the host."""

    @property
    def nbytes(self) -> int: ...


@dataclass(slots=True, eq=False)
class Node:
    """The run `tokens` at the positions from `start`."""

    start: int
    tokens: Tokens
    saved: Any
    parent: "Node | None"
    last_used: int = 0
    branches: dict[tuple[int, int], "Node"] = field(default_factory=dict)  # by (position, token)


@dataclass(frozen=True, slots=True)
class Match:
    """A remembered beginning: the nodes that hold it, the last one up to position `n_tokens`."""

    nodes: tuple[Node, ...] = ()
    n_tokens: int = 0

    def runs(self) -> Iterator[tuple[Node, int]]:
        """Each node with the position at which the match leaves it."""
        for node, following in zip(self.nodes, self.nodes[1:], strict=False):
            yield node, following.start
        if self.nodes:
            yield self.nodes[-1], self.n_tokens


class PrefixTree:
    """Remembers up to `max_bytes` of saved cells, and forgets the least recently used first."""

    def __init__(self, max_bytes: int) -> None:
        self.n_bytes = 0
        self.max_bytes = max_bytes
        self._root = Node(0, np.empty(0, np.int32), None, None)
        self._clock = 0

    def match(self, tokens: Tokens) -> Match:
        """The longest remembered beginning of `tokens`."""
        nodes: list[Node] = []
        at, node = 0, self._root
        while at < len(tokens):
            following = node.branches.get((at, int(tokens[at])))
            if following is None:
                break
            node = following
            nodes.append(node)
            at += n_common(node.tokens, tokens[at:])
        return Match(tuple(nodes), at)

    def insert(self, tokens: Tokens, save: Callable[[int, int], Saved | None]) -> bool:
        """Remember `tokens`. `save(start, end)` is asked for the cells that are not known yet; it
        may answer None. False if they are not remembered."""
        if self.max_bytes == 0:
            return False
        match = self.match(tokens)
        self.touch(match)
        if match.n_tokens == len(tokens):
            return True
        saved = save(match.n_tokens, len(tokens))
        n_bytes_before = sum(node.saved.nbytes for node in match.nodes)
        if saved is None or n_bytes_before + saved.nbytes > self.max_bytes:
            return False
        parent = match.nodes[-1] if match.nodes else self._root
        run = tokens[match.n_tokens :].copy()
        node = Node(match.n_tokens, run, saved, parent, self._clock)
        parent.branches[match.n_tokens, int(run[0])] = node
        self.n_bytes += saved.nbytes
        self._shrink()
        return True

    def touch(self, match: Match) -> None:
        """The match was of use."""
        self._clock += 1
        for node in match.nodes:
            node.last_used = self._clock

    def _shrink(self) -> None:
        if self.n_bytes <= self.max_bytes:
            return
        leaves = [(node.last_used, number, node) for number, node in enumerate(self._leaves())]
        heapify(leaves)
        while self.n_bytes > self.max_bytes:
            _, number, oldest = heappop(leaves)
            parent = oldest.parent
            assert parent is not None
            del parent.branches[oldest.start, int(oldest.tokens[0])]
            self.n_bytes -= oldest.saved.nbytes
            if parent.parent is not None and not parent.branches:
                heappush(leaves, (parent.last_used, number, parent))

    def _leaves(self) -> Iterator[Node]:
        nodes = list(self._root.branches.values())
        for node in nodes:
            if not node.branches:
                yield node
            nodes += node.branches.values()


def n_common(a: Tokens, b: Tokens) -> int:
    """How many tokens two runs share at their beginning."""
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    return int(differs.argmax()) if differs.any() else n
