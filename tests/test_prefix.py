"""The radix tree of remembered beginnings, as plain calls. A token's saved cell is four bytes."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.prefix import PrefixTree, n_common


def array(tokens: list[int]) -> "np.ndarray[tuple[int], np.dtype[np.int32]]":
    return np.array(tokens, np.int32)


class Tree(PrefixTree):
    """Saves the tokens themselves, and remembers what it was asked to save."""

    def __init__(self, max_bytes: int = 1 << 20) -> None:
        super().__init__(max_bytes)
        self.saved: list[tuple[int, int]] = []

    def put(self, tokens: list[int]) -> bool:
        def save(start: int, end: int) -> "np.ndarray[tuple[int], np.dtype[np.int32]]":
            self.saved.append((start, end))
            return array(tokens[start:end])

        return self.insert(array(tokens), save)

    def get(self, tokens: list[int]) -> list[int]:
        """What comes back for `tokens`, run by run."""
        found = self.match(array(tokens))
        runs = [list(node.saved[: end - node.start]) for node, end in found.runs()]
        back = [int(token) for run in runs for token in run]
        assert len(back) == found.n_tokens
        return back


def test_nothing_is_remembered_at_first() -> None:
    assert Tree().get([1, 2, 3]) == []
    assert Tree().get([]) == []


def test_the_longest_beginning_comes_back() -> None:
    tree = Tree()
    tree.put([1, 2, 3, 4])
    assert tree.get([1, 2, 3, 4, 5]) == [1, 2, 3, 4]
    assert tree.get([1, 2, 9]) == [1, 2]
    assert tree.get([2, 3]) == []


def test_what_is_longer_than_all_room_is_refused_and_costs_the_others_nothing() -> None:
    tree = Tree(max_bytes=4 * 6)
    tree.put([7, 7])
    assert tree.put([1, 2, 3])
    assert tree.put([1, 2, 3, 4])
    assert not tree.put([1, 2, 3, 4, 5, 6, 7])
    assert tree.get([1, 2, 3, 4, 5, 6, 7]) == [1, 2, 3, 4]
    assert tree.get([7, 7]) == [7, 7]


def test_what_is_put_last_stays_when_its_elders_become_leaves() -> None:
    tree = Tree(max_bytes=4 * 8)
    for n in (3, 4, 5):  # a chain of three nodes
        tree.put([1] * n)
    assert tree.put([2] * 6)
    assert tree.get([2] * 6) == [2] * 6
    assert tree.n_bytes <= 4 * 8


def test_only_what_is_new_is_saved() -> None:
    tree = Tree()
    tree.put([1, 2, 3, 4])
    tree.put([1, 2, 3, 4, 5, 6])  # goes on
    tree.put([1, 2, 7, 8])  # leaves in the middle
    tree.put([1, 2, 3])  # is known
    assert tree.saved == [(0, 4), (4, 6), (2, 4)]
    assert tree.n_bytes == 4 * 8
    assert tree.get([1, 2, 3, 4, 5, 6, 7]) == [1, 2, 3, 4, 5, 6]
    assert tree.get([1, 2, 7, 8, 9]) == [1, 2, 7, 8]


def test_branches_leave_branches_anywhere() -> None:
    tree = Tree()
    words = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 9, 9, 9], [1, 2, 3, 9, 8], [1, 5], [1, 2, 3, 4, 5, 7]]
    for word in words:
        tree.put(word)
    for word in words:
        assert tree.get([*word, 0]) == word


def test_the_least_recently_used_is_forgotten_first() -> None:
    tree = Tree(max_bytes=4 * 6)
    tree.put([1, 1, 1])
    tree.put([2, 2, 2])
    tree.touch(tree.match(array([1, 1, 1])))
    tree.put([3, 3, 3])
    assert [tree.get([n] * 3) for n in (1, 2, 3)] == [[1, 1, 1], [], [3, 3, 3]]


def test_a_beginning_is_not_forgotten_before_what_needs_it() -> None:
    tree = Tree(max_bytes=4 * 6)
    tree.put([1, 1, 1])
    tree.put([1, 1, 1, 2, 2])
    tree.put([5, 5])
    assert tree.get([1, 1, 1, 2, 2]) == [1, 1, 1]


def test_what_is_larger_than_all_the_room_is_not_remembered() -> None:
    tree = Tree(max_bytes=4 * 3)
    tree.put([1, 2, 3])
    tree.put([7, 7, 7, 7])
    assert tree.get([1, 2, 3]) == [1, 2, 3]
    assert tree.get([7]) == []


def test_what_cannot_be_saved_is_not_remembered() -> None:
    tree = Tree()
    tree.insert(array([1, 2]), lambda start, end: None)
    assert (tree.get([1, 2]), tree.n_bytes) == ([], 0)


Word = st.lists(st.integers(0, 2), max_size=12)


@settings(max_examples=200)
@given(words=st.lists(Word, max_size=20), asked=Word, max_tokens=st.integers(0, 60))
def test_what_comes_back_was_put_and_the_bound_is_kept(
    words: list[list[int]], asked: list[int], max_tokens: int
) -> None:
    bounded, unbounded = Tree(4 * max_tokens), Tree()
    for word in words:
        bounded.put(word)
        unbounded.put(word)
        assert bounded.n_bytes <= 4 * max_tokens
    longest = max((n_common(array(word), array(asked)) for word in words), default=0)
    assert unbounded.get(asked) == asked[:longest]
    back = bounded.get(asked)
    assert back == asked[: len(back)]
    assert len(back) <= longest
