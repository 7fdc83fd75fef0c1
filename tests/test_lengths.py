"""What is too long without tokenising."""

import pytest

import lengths
from engine import wire
from errors import BadRequest, ContextLengthExceeded
from lengths import MOST_TO_CUT, Lengths

LENGTHS = Lengths("embedding", n_ctx=16, max_token_bytes=4)
MOST = MOST_TO_CUT * 16 * 4


def check(text: str, *, may_cut: bool = False) -> None:
    LENGTHS.check_texts(wire.Embed([text], ["dense"], "end" if may_cut else "none"))


@pytest.mark.parametrize(
    "text",
    ["a" * 256, " " * MOST, "\u00ad" * MOST, "\u200b" * MOST, "\u0301" * MOST, "\n" * MOST],
    ids=["letters", "spaces", "soft hyphens", "zero width", "accents", "lines"],
)
def test_what_may_fit_is_left_to_the_tokenizer(text: str) -> None:
    check(text)


def test_letters_that_cannot_fit_are_refused_with_how_many_tokens_they_are_at_least() -> None:
    with pytest.raises(ContextLengthExceeded, match="than 17 ") as caught:
        check("a" * 272)
    assert caught.value.numbers == {"n_prompt_tokens": 17, "n_ctx": 16, "index": 0}
    check("a" * 272, may_cut=True)


@pytest.mark.parametrize(
    ("text", "may_cut"), [("a " * 136, True), ("a" * 271, False), ("a " * 100, False)]
)
def test_letters_are_counted_only_where_that_may_decide(
    text: str, may_cut: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would take the event loop 25 ms for a million characters."""
    monkeypatch.setattr(lengths, "_COUNTS_FOR_NOTHING", None)
    check(text, may_cut=may_cut)


def test_what_is_too_much_even_to_be_cut_is_refused() -> None:
    for may_cut in (True, False):
        with pytest.raises(BadRequest, match="too much even to be cut"):
            check(" " * (MOST + 1), may_cut=may_cut)
