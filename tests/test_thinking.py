"""For how long a model may think, and what of an answer counts as thoughts."""

import json
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import generation_jobs
from chat.events import Call, Message
from chat.tools.base import Tool
from engine import wire
from engine.backends.base import Constraint
from engine.grammar import Compiler
from engine.thinking import Thoughts
from engine.types import Sampled, SamplingParams
from tests.byte_tokenizer import END, ByteTokenizer, sampled
from tests.chat_formats import CONTROL_TOKENS, TOOLS, message_of, prompt, user

LETTERS = ByteTokenizer()  # in which all tags are text
TOKENS = ByteTokenizer("<think>", "</think>")
BOTH = pytest.mark.parametrize("tokenizer", [LETTERS, TOKENS], ids=["text", "control tokens"])
ENDING = "\n</think>\n\n"
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"],
        "additionalProperties": False}  # fmt: skip


def think(budget: int | None = None, *, is_open: bool = True) -> wire.Thinking:
    return wire.Thinking("<think>", "</think>", is_open, budget, ENDING)


def tokens(tokenizer: ByteTokenizer, text: str) -> list[int]:
    return tokenizer.tokenize(text, parse_special=True, continues=True)


def thoughts(
    thinking: wire.Thinking, tokenizer: ByteTokenizer, grammar: Constraint | None = None
) -> Thoughts:
    ending = tokens(tokenizer, thinking.ending) if thinking.budget is not None else []
    return Thoughts(thinking, tokenizer.shown, ending, grammar)


def play(follower: Thoughts, tokenizer: ByteTokenizer, script: str) -> str:
    return tokenizer.text(list(sampled(follower, tokens(tokenizer, script), tokenizer.n_vocab)))


# the budget


@BOTH
@pytest.mark.parametrize(
    ("budget", "script", "text"),
    [
        (None, "Um, oz.</think>So", "Um, oz.</think>So"),
        (0, "So", f"{ENDING}So"),
        (1, "Um.", f"U{ENDING}m."),
        (5, "Um, oz.", f"Um, o{ENDING}z."),
        (5, "Um, o", "Um, o"),
        (9, "Um, oz, ar.", f"Um, oz, a{ENDING}r."),
        (20, "Um.</think>So", "Um.</think>So"),
    ],
)
def test_thoughts_in_the_prompt_end_when_their_budget_is_used_up(
    tokenizer: ByteTokenizer, budget: int | None, script: str, text: str
) -> None:
    assert play(thoughts(think(budget), tokenizer), tokenizer, script) == text


@BOTH
@pytest.mark.parametrize("before", ["", " ", "\n\n"])
@pytest.mark.parametrize(("budget", "text"), [(0, f"{ENDING}abc"), (2, f"ab{ENDING}c")])
def test_the_budget_counts_from_where_the_answer_opens_thoughts(
    tokenizer: ByteTokenizer, before: str, budget: int, text: str
) -> None:
    follower = thoughts(think(budget, is_open=False), tokenizer)
    assert play(follower, tokenizer, f"{before}<think>abc") == f"{before}<think>{text}"


@BOTH
@pytest.mark.parametrize("script", ["Hi", " Hi <think>a", "<thin Hi", "</think>Hi", "<b><think>"])
def test_what_is_no_thought_has_no_budget(tokenizer: ByteTokenizer, script: str) -> None:
    follower = thoughts(think(0, is_open=False), tokenizer)
    assert play(follower, tokenizer, script) == script
    assert follower.is_over


@BOTH
def test_an_end_is_put_into_its_mouth_once(tokenizer: ByteTokenizer) -> None:
    thinking = wire.Thinking("{think}", "</think>", True, 2, ENDING)
    script = "ab{think}cdef</think>gh"
    text = play(thoughts(thinking, tokenizer), tokenizer, script)
    assert text == f"ab{ENDING}{{think}}cdef</think>gh"


@BOTH
def test_an_end_without_the_tag_is_said_once_too(tokenizer: ByteTokenizer) -> None:
    thinking = wire.Thinking("<think>", "</think>", True, 1, "So.")
    assert play(thoughts(thinking, tokenizer), tokenizer, "abc</think>d") == "aSo.bc</think>d"


@BOTH
@pytest.mark.parametrize("char", ["é", "世", "🎉"])
def test_thoughts_end_behind_a_whole_character(tokenizer: ByteTokenizer, char: str) -> None:
    for budget in range(1, len(char.encode()) + 1):
        text = play(thoughts(think(budget), tokenizer), tokenizer, f"{char}x")
        assert text == f"{char}{ENDING}x"


def test_bytes_that_are_no_character_do_not_put_the_end_off() -> None:
    follower = thoughts(think(2), LETTERS)
    said = list(sampled(follower, [0xFF, 0xE4, 0xE4, ord("x"), ord("y")], LETTERS.n_vocab))
    assert bytes(said) == b"\xff\xe4\xe4x" + ENDING.encode() + b"y"


def test_a_tag_is_found_however_it_is_spread_over_tokens() -> None:
    pieces = [b" <th", b"ink>Hm", b".</thi", b"nk> H", b"i"]
    follower = Thoughts(think(is_open=False), lambda token: pieces[token], [], None)
    states = []
    for token in range(len(pieces)):
        follower.accept(token)
        states.append(follower.is_over)
    assert states == [False, False, False, True, True]


def test_thoughts_may_open_and_close_in_one_token() -> None:
    follower = Thoughts(think(is_open=False), lambda token: b"<think></think>Hi", [], None)
    follower.accept(0)
    assert follower.is_over


# with a grammar


def grammar(tokenizer: ByteTokenizer, frame: str) -> Any:
    part = wire.GrammarPart("json_schema", json.dumps(CITY), "response_format")
    return Compiler(tokenizer).compile(wire.Grammar((part,), frame))


@BOTH
@pytest.mark.parametrize("budget", range(8))
def test_an_answer_in_json_follows_thoughts_that_must_end(
    tokenizer: ByteTokenizer, budget: int
) -> None:
    state = grammar(tokenizer, "start: «until </think>» /[ \\n]{0,4}/ @p0")
    answer = '{"city": "Oslo"}'
    begun = next(t for n in range(5) if len((t := "Hé世?"[:n]).encode()) >= budget)
    said = play(thoughts(think(budget), tokenizer, state), tokenizer, begun + answer)
    assert said == begun + ENDING + answer
    assert state.is_complete


@BOTH
def test_json_in_the_thoughts_is_no_answer(tokenizer: ByteTokenizer) -> None:
    state = grammar(tokenizer, "start: «until </think>» @p0")
    said = sampled(thoughts(think(), tokenizer, state), tokens(tokenizer, '{"city": "Oslo"}'), 300)
    assert tokenizer.text(list(said)) == '{"city": "Oslo"}'
    assert not state.is_complete
    logits = np.zeros(tokenizer.n_vocab, np.float32)
    state.apply(logits)
    assert logits[END] == -np.inf


# stop strings, and what the text shows


def answer_text(
    script: str,
    *,
    tokenizer: ByteTokenizer = LETTERS,
    thinking: wire.Thinking | None = None,
    stop: list[str] = [],  # noqa: B006 (not changed)
    max_tokens: int | None = None,
    visible: Sequence[str] = ("<think>", "</think>", "<tool_call>"),
) -> tuple[str, str]:
    """What the worker sends of an answer, and why it ended."""
    request = wire.Generate(
        prompt=[wire.Segment("Hi", True)],
        add_bos=False,
        sampling=SamplingParams(),
        stop=stop,
        max_tokens=max_tokens,
        thinking=thinking,
        visible=list(visible) if thinking else [],
    )
    engine: Any = SimpleNamespace(tokenizer=tokenizer, n_ctx=1000)
    answer = generation_jobs.Answer(
        generation_jobs.prepare(request, engine, Compiler(tokenizer)), 0, tokenizer
    )
    text = ""
    for token in sampled(answer.constraint, [*tokens(tokenizer, script), END], tokenizer.n_vocab):
        if out := answer.accept(Sampled(token)):
            text += out.text
            if out.done:
                return text, out.done.finish
    raise AssertionError("the answer has no end")


@BOTH
@pytest.mark.parametrize(
    ("script", "text"),
    [
        ("Hm.\n\nOh.</think>\n\nHello.\n\nMore", "Hm.\n\nOh.</think>\n\nHello."),
        ("Hm.\n\n</think>Hello.\n\nMore", "Hm.\n\n</think>Hello."),
        ("Hm.\n\n", "Hm.\n\n"),
        ("Hm.\n\n</think>\n\n", "Hm.\n\n</think>\n\n"),
        ("Hm.</think> \n\n \n\nHello.\n\nMore", "Hm.</think> \n\n \n\nHello."),
    ],
)
def test_stop_strings_count_in_the_answer_only(
    tokenizer: ByteTokenizer, script: str, text: str
) -> None:
    said, _ = answer_text(script, tokenizer=tokenizer, thinking=think(), stop=["\n\n"])
    assert said == text


def test_a_stop_string_counts_from_the_answers_first_token_where_that_is_told_late() -> None:
    """As a model cuts it: the line break behind the thoughts is one token, and so is a word."""
    pieces = [b"Hm.", b"</think>", b"\n\n", b"Answer", b"\n\n", b"More", b""]
    tokenizer: Any = SimpleNamespace(
        n_vocab=len(pieces),
        piece=lambda token: pieces[token],
        ends_generation=lambda token: token == 6,
    )
    request = wire.Generate([], False, SamplingParams(), ["\n\n"], None, thinking=think())
    job = generation_jobs.Job(request, [0], 100, None, {}, {}, [])
    answer = generation_jobs.Answer(job, 0, tokenizer)
    assert answer.constraint
    text, done = "", None
    answer.constraint.accept(0)
    for token in range(6):
        answer.constraint.accept(token + 1)
        out = answer.accept(Sampled(token))
        text += out.text if out else ""
        if out and (done := out.done):
            break
    assert done
    assert (text, done.stop) == ("Hm.</think>\n\nAnswer", "\n\n")


@BOTH
@pytest.mark.parametrize("stop", ["think", "</think>", ">", "Hm"])
def test_a_stop_string_is_not_looked_for_in_the_tags(tokenizer: ByteTokenizer, stop: str) -> None:
    said, finish = answer_text(
        f"<think>Hm.</think>Hello{stop}More",
        tokenizer=tokenizer,
        thinking=think(is_open=False),
        stop=[stop],
    )
    assert (said, finish) == ("<think>Hm.</think>Hello", "stop")


ANALYSIS = "<|channel|>analysis<|message|>{}<|end|><|start|>assistant"
PREAMBLE = "<|channel|>commentary<|message|>{}<|end|><|start|>assistant"
FINAL = "<|channel|>final<|message|>{}"


def harmony(script: str, *stop: str, tools: Sequence[Tool] = ()) -> Message:
    """What comes of an answer of gpt-oss."""
    made = prompt("gpt_oss", user("Hi"), tools)
    tokenizer = ByteTokenizer(*CONTROL_TOKENS["gpt_oss"])
    said, _ = answer_text(script, tokenizer=tokenizer, thinking=made.thinking, stop=[*stop],
                          visible=made.visible)  # fmt: skip
    splitter = made.splitter()
    return message_of([*splitter.feed(said), *splitter.finish()])


@pytest.mark.parametrize("said", [FINAL, PREAMBLE])
@pytest.mark.parametrize(
    "stop", ["|", "<", "final", "assistant", "analysis", "commentary", "message|>", "<|me"]
)
@pytest.mark.parametrize("before", [ANALYSIS.format("Hm."), ANALYSIS.format("Hm.") * 2, "",
                                    ANALYSIS.format("") + PREAMBLE.format("I look.")])  # fmt: skip
def test_a_stop_string_is_not_looked_for_in_the_heads_of_messages(
    before: str, stop: str, said: str
) -> None:
    assert harmony(before + said.format("Rome."), stop).text.endswith("Rome.")
    assert harmony(before + said.format(f"  Rome {stop}."), stop).text.endswith("  Rome ")


def test_stop_strings_count_in_no_thoughts_of_several() -> None:
    thoughts = ANALYSIS.format("Hm.") + ANALYSIS.format("Observation: none")
    for before in (thoughts, PREAMBLE.format("I look.") + thoughts):
        message = harmony(before + FINAL.format("Rome\nObservation: sun"), "Observation:")
        assert "none" in message.reasoning
        assert message.text.endswith("Rome\n")


@pytest.mark.parametrize("before", ["", ANALYSIS.format("Hm.")])
@pytest.mark.parametrize("head", [" to=functions.get_time<|channel|>commentary json",
                                  "<|channel|>commentary to=functions.get_time "])  # fmt: skip
def test_a_stop_string_is_looked_for_neither_in_a_call_nor_in_its_head(
    before: str, head: str
) -> None:
    call = f'{before}{head}<|message|>{{"city": "Rome"}}'
    for stop in ("json", "get_time", "functions", "to=", "|", "Rome", "}"):
        message = harmony(call, stop, tools=TOOLS)
        assert message.calls == [Call("get_time", '{"city": "Rome"}')]


def test_stop_strings_count_where_a_model_leaves_the_form_of_messages() -> None:
    assert harmony("Rome STOP Paris", "STOP") == Message("Rome ")


def test_the_end_of_a_message_is_whole() -> None:
    tokenizer = ByteTokenizer(*CONTROL_TOKENS["gpt_oss"])
    thinking = prompt("gpt_oss", user("Hi"), TOOLS).thinking
    assert thinking
    follower = thoughts(thinking, tokenizer)
    for token in tokens(tokenizer, PREAMBLE.format("Hi")):
        follower.accept(token)
        if tokenizer.shown(token) == b"<|end|>":
            assert follower.n_begun == 0
            return
    raise AssertionError("it has no end")


def test_a_budget_is_that_of_all_thoughts_of_an_answer() -> None:
    thinking = prompt("gpt_oss", user("Hi"), TOOLS, budget=5).thinking
    assert thinking
    tokenizer = ByteTokenizer(*CONTROL_TOKENS["gpt_oss"])
    script = ANALYSIS.format("abc") + "<|channel|>analysis<|message|>defg"
    said = play(thoughts(thinking, tokenizer), tokenizer, script)
    end = "<|end|><|start|>assistant"
    assert said == f"{ANALYSIS.format('abc')}<|channel|>analysis<|message|>d{end}efg"
    head = "<|channel|>analysis<|message|>"
    said = play(thoughts(thinking, tokenizer), tokenizer, f"{head}abcde{head}{head}xy")
    assert said == f"{head}abcde{end}{head}{end}{head}{end}xy"


def test_a_budget_is_that_of_thoughts_that_open_again_too() -> None:
    thinking = wire.Thinking("<think>", "</think>", True, 4, "</think>", again=True)
    said = play(thoughts(thinking, TOKENS), TOKENS, "ab</think>c<think>defg</think>h")
    assert said == "ab</think>c<think>d</think>efg</think>h"
    said = play(thoughts(thinking, TOKENS), TOKENS, "abcdefX<think>gh</think>Y")
    assert said == "abcd</think>efX<think></think>gh</think>Y"


@BOTH
def test_stop_strings_count_from_the_start_where_nothing_is_thought(
    tokenizer: ByteTokenizer,
) -> None:
    for thinking in (None, think(is_open=False)):
        said = answer_text("STOP it", tokenizer=tokenizer, thinking=thinking, stop=["STOP"])
        assert said == ("", "stop")


@pytest.mark.parametrize(
    ("said", "stop", "text"),
    [
        ("<b>x", "<b>", ""),  # which might have become the tag
        ("<think>Hm.</think><b>x", "<b>", "<think>Hm.</think>"),
        ("\n\nUser: x", "\n\nUser:", ""),
        (" \n\nUser: x", "\n\nUser:", " "),
        ("<think>Hm.</think>x>>y", ">>", "<think>Hm.</think>x"),
        ("<think>Hm.</think>>y>>", ">>", "<think>Hm.</think>>y"),
    ],
)
def test_a_stop_string_may_begin_an_answer(said: str, stop: str, text: str) -> None:
    found = answer_text(said, thinking=think(is_open=False), stop=[stop])
    assert found == (text, "stop")
    assert answer_text(said, thinking=think(is_open=False))[0] == said


@BOTH
@pytest.mark.parametrize("is_open", [True, False])
@pytest.mark.parametrize("stop", ["\n```", "\n\n```", "\n", "\n\n", "\n\n`"])
def test_no_stop_string_begins_in_the_spaces_behind_thoughts(
    tokenizer: ByteTokenizer, is_open: bool, stop: str
) -> None:
    """Which no client sees: it would be cut at a text that is not in its own."""
    said = ("" if is_open else "<think>") + "Hm.</think>\n\n```\nx```"
    thinking = think(is_open=is_open)
    for end in ("", f"{stop} y"):
        found, _ = answer_text(said + end, tokenizer=tokenizer, thinking=thinking, stop=[stop])
        thoughts, close, text = (said + end).partition("</think>\n\n")
        assert found == thoughts + close + text.partition(stop)[0]


def test_spaces_are_no_stop_string_while_another_one_may_have_begun() -> None:
    for said, stops in (
        ("<think>Hm.</think>\n\nHTTP is", ["\n\n", "\n\nHuman:"]),
        ("\n10 apples", ["\n", "\n1)"]),
    ):
        assert answer_text(said, thinking=think(is_open=False), stop=stops) == (said, "stop")
    said = "<think>Hm.</think>\n\nHu\n\n"
    found = answer_text(f"{said}x", thinking=think(is_open=False), stop=["\n\n", "\n\nHuman:"])
    assert found == (said.rstrip(), "stop")


def test_a_token_may_end_thoughts_and_begin_the_answer() -> None:
    pieces = [b"<think>", b"Hm.", b"</think", b"><", b"b>", b"x", b">", b"y", b""]
    tokenizer: Any = SimpleNamespace(
        n_vocab=len(pieces), piece=lambda token: pieces[token], ends_generation=lambda t: t == 8
    )
    for stop, text in ((">", "<think>Hm.</think><b"), ("<b", "<think>Hm.</think>")):
        request = wire.Generate(
            [], False, SamplingParams(), [stop], None, thinking=think(is_open=False)
        )
        job = generation_jobs.Job(request, [0], 100, None, {}, {}, [])
        answer = generation_jobs.Answer(job, 0, tokenizer)
        assert answer.constraint
        said = ""
        for token in range(9):
            answer.constraint.accept(token)
            out = answer.accept(Sampled(token))
            said += out.text if out else ""
            if out and out.done:
                break
        assert said == text


def test_an_answer_that_ends_before_it_has_begun_is_whole() -> None:
    for said in ("<", "<thin", " \n", "<think>Hm.</think> \n"):
        for limit in (None, len(said)):
            found = answer_text(said, thinking=think(is_open=False), stop=["x"], max_tokens=limit)
            assert found[0] == said


@pytest.mark.parametrize(
    ("said", "stop", "text"),
    [
        ("<", "<", ""),
        ("<t", "<", ""),
        ("<t", "t", "<"),
        (" \n<thin", "<thi", " \n"),
        ("\n<", "\n<", ""),
        ("\n<", "\n", None),
        (" \n", "\n", None),
        ("<think>Hm.</think> \n", "\n", None),
        ("<think>", "<think", None),
        ("<thi", "<think", None),
    ],
)
def test_an_answer_that_ends_like_a_tag_begins_may_have_a_stop_string(
    said: str, stop: str, text: str | None
) -> None:
    thinking = think(is_open=False)
    for limit in (None, len(said)):
        found = answer_text(said, thinking=thinking, stop=[stop], max_tokens=limit)
        is_cut = text is not None
        assert found == (text if is_cut else said, "stop" if is_cut or not limit else "length")


def test_an_answer_that_ends_in_the_head_of_a_message_has_no_stop_string() -> None:
    thinking = prompt("gpt_oss", user("Hi"), TOOLS).thinking
    for said in ("<|chan", ANALYSIS.format("Hm.") + "<|channel|>fin"):
        assert answer_text(said, thinking=thinking, stop=["<"])[0] == said


@BOTH
def test_thoughts_that_take_too_long_are_ended_in_the_text(tokenizer: ByteTokenizer) -> None:
    said, _ = answer_text("Hm, oh.", tokenizer=tokenizer, thinking=think(3), stop=["\n\n"])
    assert said == f"Hm,{ENDING} oh."


def test_the_text_shows_the_control_tokens_that_were_asked_for_and_no_others() -> None:
    tokenizer = ByteTokenizer("<think>", "</think>", "<tool_call>", "<other>")
    script = "<think>a<other></think>b<tool_call>"
    said, _ = answer_text(script, tokenizer=tokenizer, thinking=think(is_open=False))
    assert said == "<think>a</think>b<tool_call>"
    assert answer_text(script, tokenizer=tokenizer)[0] == "ab"


def test_the_end_counts_in_the_mean_of_log_probabilities_and_is_not_shown() -> None:
    """Or of several answers those with an unlikely end would be the best."""
    sampling = SamplingParams(n_logprobs=0)
    request = wire.Generate([wire.Segment("Hi", True)], False, sampling, [], None)
    engine: Any = SimpleNamespace(tokenizer=LETTERS, n_ctx=1000)
    job = generation_jobs.prepare(request, engine, Compiler(LETTERS))
    answer = generation_jobs.Answer(job, 0, LETTERS)
    first = answer.accept(Sampled(ord("a"), -1.0))
    last = answer.accept(Sampled(END, -5.0))
    assert first
    assert last
    assert last.done
    assert (last.done.n_tokens, last.done.mean_logprob) == (2, -3.0)
    assert [one.logprob for out in (first, last) for one in out.logprobs] == [-1.0]


def test_an_answer_may_end_in_its_thoughts() -> None:
    assert answer_text("Hm", thinking=think()) == ("Hm", "stop")
    assert answer_text("Hm, oh", thinking=think(), max_tokens=4) == ("Hm, ", "length")
