"""The waiting line: lists of calls."""

from hypothesis import given
from hypothesis import strategies as st

from waiting import STEP_S, WaitingLine


def line_of(*joins: tuple[str, int, float]) -> WaitingLine[str]:
    line: WaitingLine[str] = WaitingLine()
    for who, priority, now in joins:
        line.join(who, priority, now)
    return line


def order(line: WaitingLine[str]) -> str:
    return "".join(line.pop() for _ in range(len(line)))


def test_who_came_first_is_served_first() -> None:
    assert order(line_of(("a", 0, 0), ("b", 0, 0), ("c", 0, 1))) == "abc"


def test_a_lower_priority_is_served_earlier() -> None:
    assert order(line_of(("a", 5, 0), ("b", 0, 1), ("c", -5, 2), ("d", 0, 3))) == "cbda"


def test_one_that_left_is_not_served_and_unknown_ones_may_leave() -> None:
    line = line_of(("a", 0, 0), ("b", 0, 1))
    line.leave("a")
    line.leave("z")
    assert (len(line), order(line), len(line)) == (1, "b", 0)


def test_a_step_of_priority_is_worth_some_seconds_of_waiting_and_no_more() -> None:
    assert order(line_of(("old", 1, 0), ("new", 0, STEP_S - 0.1))) == "newold"
    assert order(line_of(("old", 1, 0), ("new", 0, STEP_S + 0.1))) == "oldnew"


def test_one_beside_an_endless_stream_of_urgent_ones_is_served_in_bounded_time() -> None:
    line = line_of(("patient", 3, 0.0))
    now = 0.0
    while True:
        line.join("urgent", -2, now)
        if line.pop() == "patient":
            break
        now += 1
    assert now <= 5 * STEP_S + 1


@given(st.lists(st.tuples(st.integers(-100, 100), st.floats(0, 10)), max_size=30))
def test_of_equal_priority_the_oldest_goes_first_and_nobody_is_lost(
    joins: list[tuple[int, float]],
) -> None:
    line: WaitingLine[int] = WaitingLine()
    now = 0.0
    for number, (priority, seconds) in enumerate(joins):
        now += seconds
        line.join(number, priority, now)
    served = [line.pop() for _ in joins]
    assert sorted(served) == list(range(len(joins)))
    for priority, _ in joins:
        same = [number for number in served if joins[number][0] == priority]
        assert same == sorted(same)
