"""The prompt to fill in a middle."""

import pytest

from chat.infill import FAMILIES, infill, marks_of
from engine.wire import Segment


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family[0])
def test_a_model_with_the_three_marks_of_a_family_can_fill(family: tuple[str, str, str]) -> None:
    assert marks_of(["<s>", *reversed(family), "</s>"]) == family
    for missing in family:
        assert marks_of(mark for mark in family if mark != missing) is None


def test_a_model_without_marks_cannot() -> None:
    assert marks_of([]) is None
    assert marks_of(["<|im_start|>", "<|im_end|>"]) is None


def test_only_the_marks_are_read_as_control_tokens() -> None:
    assert infill("a<s>", "b<M>", ("<P>", "<S>", "<M>")) == [
        Segment("<P>", True),
        Segment("a<s>", False),
        Segment("<S>", True),
        Segment("b<M>", False),
        Segment("<M>", True),
    ]


def test_nothing_stands_before_a_middle_at_the_beginning() -> None:
    assert [s.text for s in infill("", "b", ("<P>", "<S>", "<M>"))] == ["<P>", "<S>", "b", "<M>"]
