"""Which copies stay where they are bounded, as lists of plain calls."""

import numpy as np
import numpy.typing as npt

from engine.marks import Kept, Marks


def of(*tokens: int) -> npt.NDArray[np.int32]:
    return np.array(tokens, np.int32)


def kept(marks: Marks, *tokens: int, mark: int) -> Kept:
    """A slot that is kept, with a mark: copies of 10 bytes each."""
    marks.put(0, mark, np.zeros(10, np.int8))
    marks.keep(0, of(*tokens), np.zeros(10, np.int8))
    n_tokens, found = marks.match(of(*tokens))
    assert n_tokens == len(tokens)
    assert found
    return found


def test_the_least_recently_used_is_given_up_with_its_marks() -> None:
    marks = Marks(50)
    first, second = kept(marks, 1, 2, 3, mark=2), kept(marks, 4, 5, 6, mark=2)
    marks.touch(first)
    third = kept(marks, 7, 8, 9, mark=2)
    assert [marks.has(one) for one in (first, second, third)] == [True, False, True]
    assert marks.n_bytes == 40


def test_one_that_is_taken_whole_is_not_kept_and_its_marks_are_the_slots() -> None:
    marks = Marks(100)
    taken = kept(marks, 1, 2, 3, 4, mark=3)
    marks.take(taken, 1, 3)
    assert not marks.has(taken)
    assert (marks.last(1, 9), marks.n_bytes) == (3, 10)
    marks.forget(1)
    assert marks.n_bytes == 0


def test_the_one_with_most_of_it_is_found_also_if_a_shorter_one_has_some() -> None:
    marks = Marks(100)
    longer = kept(marks, 1, 2, 3, 4, 5, mark=3)
    kept(marks, 1, 2, 3, 8, mark=1)
    assert marks.match(of(1, 2, 3, 9)) == (3, longer)


def test_what_is_a_list_of_cells_still_is_of_use_anywhere_and_stays_until_it_is_all_taken() -> None:
    marks = Marks(100)
    marks.keep(0, of(1, 2, 3, 4), np.zeros(10, np.int8), is_cells=True)
    n_tokens, cells = marks.match(of(1, 2, 9))
    assert n_tokens == 2
    assert cells
    marks.take(cells, 1, 2)
    assert marks.has(cells)
    marks.take(cells, 1, 4)
    assert not marks.has(cells)


def test_with_less_room_what_is_kept_goes_first_and_then_the_oldest_mark() -> None:
    marks = Marks(100)
    kept(marks, 1, 2, 3, mark=2)
    marks.put(1, 5, np.zeros(10, np.int8))
    marks.put(1, 3, np.zeros(10, np.int8))
    marks.resize(25)
    assert (marks.n_kept, marks.n_bytes) == (0, 20)
    marks.resize(15)
    assert (marks.last(1, 4), marks.last(1, 9)) == (3, 3)


def test_the_shortest_beginning_is_given_up_first() -> None:
    marks = Marks(100)
    for n_tokens in (6, 4, 8):
        marks.put(1, n_tokens, np.zeros(10, np.int8))
    assert marks.give_up_first(1)
    assert (marks.last(1, 5), marks.last(1, 7)) == (0, 6)
    assert not marks.give_up_first(2)
