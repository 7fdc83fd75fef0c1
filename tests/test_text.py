"""Token bytes to text: whole characters, and no stop string."""

import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.text import TextStream
from engine.wire import Calls


def said(chunks: list[bytes], *stops: str, calls: Calls | None = None) -> str:
    """All that comes out of a stream, up to where it stops or ends."""
    stream = TextStream(stops, calls)
    text = ""
    for chunk in chunks:
        text += stream.push(chunk)
        if stream.stop:
            return text
    return text + stream.finish()


def pushes(chunks: list[bytes], *stops: str, calls: Calls | None = None) -> list[str]:
    stream = TextStream(stops, calls)
    return [stream.push(chunk) for chunk in chunks]


def in_bytes(text: str) -> list[bytes]:
    return [bytes([byte]) for byte in text.encode()]


# characters


def test_half_a_character_waits_for_the_rest() -> None:
    assert pushes(in_bytes("aé€🎉")) == ["a", "", "é", "", "", "€", "", "", "", "🎉"]


def test_half_a_character_at_the_end_is_dropped() -> None:
    assert said([b"ab\xf0\x9f"]) == "ab"
    assert said([b"ab\xf0\x9f"], "zz") == "ab"


def test_bytes_that_are_no_text_become_replacement_characters() -> None:
    assert said([b"a\xff", b"b"]) == "a�b"
    assert said([b"\xe2\x82", b"b"]) == "�b"


# stops


def test_without_stops_nothing_is_held_back() -> None:
    assert pushes([b"one ", b"two"]) == ["one ", "two"]


def test_stops_may_come_and_go() -> None:
    stream = TextStream(["END"])
    assert stream.push(b"an EN") == "an "
    stream.stops = ()
    assert stream.push(b"D END") == "END END"
    stream.stops = ("END",)
    assert stream.push(b" ok END") == " ok "


def test_text_ends_before_the_stop_string() -> None:
    stream = TextStream(["END"])
    assert stream.push(b"some text END and more") == "some text "
    assert stream.stop == "END"
    assert stream.finish() == ""


def test_what_may_begin_a_stop_string_is_held_back() -> None:
    assert pushes(in_bytes("a<|b"), "<|end|>") == ["a", "", "", "<|b"]


@pytest.mark.parametrize("chunks", [["x", "END"], ["xE", "ND"], ["xE", "N", "D"], ["xEND"]])
def test_a_stop_string_is_found_across_tokens(chunks: list[str]) -> None:
    assert said([chunk.encode() for chunk in chunks], "END") == "x"


def test_a_stop_string_inside_a_character_of_many_bytes_is_found() -> None:
    assert said(in_bytes("über 世界!"), "世界") == "über "


def test_held_back_text_comes_when_it_was_no_stop_string() -> None:
    assert said([b"text E", b"N"], "END") == "text EN"
    assert pushes([b"E", b"N", b"X"], "END") == ["", "", "ENX"]


def test_a_look_alike_may_end_in_the_beginning_of_another() -> None:
    assert said(in_bytes("aab"), "aab") == ""
    assert said(in_bytes("aaab"), "aab") == "a"
    assert pushes(in_bytes("aaac"), "aab") == ["", "", "a", "aac"]


def test_stops_that_share_their_beginning_are_told_apart() -> None:
    assert said(in_bytes("one\nUser: two"), "\nUser:", "\nSystem:") == "one"
    assert said(in_bytes("one\nSun\nSystem: two"), "\nUser:", "\nSystem:") == "one\nSun"


def test_of_several_stops_the_one_that_is_complete_first_counts() -> None:
    assert said([b"a END b STOP"], "STOP", "END") == "a "
    assert said([b"abcd"], "abcd", "bc") == "a"
    assert said(in_bytes("abcd"), "abcd", "bc") == "a"


def test_a_stop_that_ends_another_takes_the_longer_one() -> None:
    assert said(in_bytes("a\n\nb"), "\n\n", "\n") == "a"
    assert said(in_bytes("xabc"), "bc", "abc") == "x"


# calls

CALLS = Calls(("<a>", "<b>"))


@pytest.mark.parametrize("stop", ["<", "\n", "\n<a", "1", "y\n", "y\n<", "a>1"])
def test_no_stop_string_is_in_a_call_or_in_what_leads_to_it(stop: str) -> None:
    assert said(in_bytes("xy\n<a>1\n<"), stop, calls=CALLS) == "xy\n<a>1\n<"
    assert said([b"xy\n<a>1\n<"], stop, calls=CALLS) == "xy\n<a>1\n<"


def test_what_begins_like_a_call_is_text_once_it_is_none() -> None:
    assert pushes(in_bytes("x <a "), "<", calls=CALLS) == ["x", "", "", "", " "]
    assert pushes(in_bytes("x\n\ny"), "z", calls=CALLS) == ["x", "", "", "\n\ny"]


@pytest.mark.parametrize(("text", "stop"), [("x\n", "\n"), ("x <", "<"), ("x\n<a", "\n")])
def test_what_begins_like_a_call_is_text_at_the_end(text: str, stop: str) -> None:
    for chunks in (in_bytes(text), [text.encode()]):
        stream = TextStream([stop], CALLS)
        out = "".join(map(stream.push, chunks))
        assert stream.stop is None
        assert out + stream.finish() == text.partition(stop)[0]
        assert stream.stop == stop


def test_text_before_calls_comes_as_without_calls() -> None:
    chunks = [b"Let", b" me", b" look", b".\n", b"<a", b">1", b"2"]
    assert pushes(chunks, "STOP", calls=CALLS) == ["Let", " me", " look", ".", "", "\n<a>1", "2"]


def test_text_that_waited_comes_before_the_call() -> None:
    chunks = [b"x", b".", b"\n<", b"a>", b"1", b"2"]
    assert pushes(chunks, ".\n", calls=CALLS) == ["x", "", "", ".", "\n<a>1", "2"]
    assert said(chunks[:4], ".\n", calls=CALLS) == "x.\n<a>"


def test_calls_that_come_first_or_never_are_text_behind_text() -> None:
    first = Calls(CALLS.openers, only_first=True)
    assert said(in_bytes("\n<a>1 x"), "1", "<", "\n", calls=first) == "\n<a>1 x"
    assert said(in_bytes("x <a>1 x"), "1", calls=first) == "x <a>"
    assert pushes([b"x ", b"<"], "1", calls=first) == ["x ", "<"]


LINES = Calls(("<a>",), line_openers=("<b>",))


@pytest.mark.parametrize("before", ["", " \t", "x\n", "x\n\n \t", "x <b>\n"])
def test_what_begins_a_call_only_in_front_of_a_line(before: str) -> None:
    text = f"{before}<b>1"
    for stop in ("1", "<b>1", " ", "\t"):
        if stop not in before.rstrip():
            assert said(in_bytes(text), stop, calls=LINES) == text
            assert said([text.encode()], stop, calls=LINES) == text


@pytest.mark.parametrize("before", ["x", "x ", "x\ny", "<c> ", "x\n<", "<"])
@pytest.mark.parametrize("stop", ["1", "<b>", ">1", "b"])
def test_it_is_text_in_the_midst_of_one(before: str, stop: str) -> None:
    text = f"{before}<b>1"
    assert said(in_bytes(text), stop, calls=LINES) == text.partition(stop)[0]
    assert said([text.encode()], stop, calls=LINES) == text.partition(stop)[0]
    assert said(in_bytes(f"{text} <a>2"), "2", calls=LINES) == f"{text} <a>2"


# any text, any cuts

Texts = st.text(alphabet="abc é世🎉", max_size=30)
Stops = st.lists(st.text(alphabet="abc é世", min_size=1, max_size=4), max_size=3)


def before_first_stop(text: str, stops: list[str]) -> str:
    """The plain definition: read on until the text ends in a stop, the longest one counts."""
    for end in range(len(text) + 1):
        if found := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, found))]
    return text


@settings(max_examples=200)
@given(text=Texts, stops=Stops, cuts=st.lists(st.integers(0, 90), max_size=6))
def test_cuts_between_tokens_change_nothing(text: str, stops: list[str], cuts: list[int]) -> None:
    data = text.encode()
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    chunks = [data[start:end] for start, end in pairwise(edges)]
    expected = before_first_stop(text, stops)
    assert said(chunks, *stops) == expected
    assert said(in_bytes(text), *stops) == expected
    assert not any(stop in expected for stop in stops)


@settings(max_examples=200)
@given(
    text=st.lists(st.sampled_from([*"<ab> \né", "<a>", "<b>"]), max_size=12).map("".join),
    stops=st.lists(st.text(alphabet="<ab> \n", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=6),
    begins=st.sampled_from([(CALLS, "<[ab]>"), (LINES, "<a>|(?:^|(?<=\n))[ ]*<b>")]),
)
def test_cuts_change_nothing_where_calls_may_come(
    text: str, stops: list[str], cuts: list[int], begins: tuple[Calls, str]
) -> None:
    calls, pattern = begins
    data = text.encode()
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    chunks = [data[start:end] for start, end in pairwise(edges)]
    begin = re.search(pattern, text)
    before = text[: begin.start()].rstrip() if begin else text
    expected = before_first_stop(before, stops)
    if begin and expected == before:
        expected = text
    assert said(chunks, *stops, calls=calls) == expected
    assert said(in_bytes(text), *stops, calls=calls) == expected


@settings(max_examples=100)
@given(text=Texts, stops=Stops)
def test_no_more_is_held_back_than_may_begin_a_stop(text: str, stops: list[str]) -> None:
    stream = TextStream(stops)
    out = ""
    for n, character in enumerate(text, start=1):
        out += stream.push(character.encode())
        if stream.stop:
            return
        held = text[len(out) : n]
        assert out + held == text[:n]
        assert not held or any(stop.startswith(held) for stop in stops)
    assert stream.finish() == text[len(out) :]
