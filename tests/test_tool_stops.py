"""Stop strings of requests with tools: they count in the text, and in nothing of a call."""

import json
from types import SimpleNamespace
from typing import Any

import pytest

import generation_jobs
from chat.events import Call, Message
from engine import wire
from engine.thinking import Thoughts
from engine.types import Sampled, SamplingParams
from engine.wire import GrammarPart
from tests.byte_tokenizer import END, sampled
from tests.chat_formats import message_of
from tests.tool_models import CALL, CITY, MODELS, REQUIRED, Model, Turn, every

# in calls, in their marks, what these begin with, and what comes before them
IN_CALLS = ("Oslo", '"Oslo"', '"', "}", "{", "]", "<", "<|", ">", "|", ":", "get_time", "city",
            "tool", "function", "[TOOL", "\n", "\n<", "\n[", "\n\n")  # fmt: skip
ONE_FIELD = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"],
             "additionalProperties": False}  # fmt: skip


def told(
    turn: Turn, raw: str, *stops: str, max_tokens: int | None = None
) -> tuple[Message, wire.Done]:
    """What a client gets of this answer, token by token, and how it ended."""
    model, made = turn.model, turn.made
    request = wire.Generate(
        prompt=made.segments,
        add_bos=False,
        sampling=SamplingParams(),
        stop=[*stops],
        max_tokens=max_tokens,
        grammar=made.grammar,
        thinking=made.thinking,
        visible=made.visible,
        calls=made.calls,
    )
    engine: Any = SimpleNamespace(tokenizer=model.tokenizer, n_ctx=100_000)
    job = generation_jobs.prepare(request, engine, model.compiler)
    answer = generation_jobs.Answer(job, 0, model.tokenizer)
    splitter = made.splitter()
    events = []
    for token in sampled(answer.constraint, [*model.ids(raw), END], model.tokenizer.n_vocab):
        if out := answer.accept(Sampled(token)):
            events += splitter.feed(out.text)
            if out.done:
                return message_of([*events, *splitter.finish()]), out.done
    raise AssertionError("the answer has no end")


@every()
@pytest.mark.parametrize("is_required", [False, True])
def test_no_stop_string_cuts_a_call(model: Model, is_required: bool) -> None:
    turn = model.asked(choice=REQUIRED) if is_required else model.asked()
    for thoughts in [None, "Hm."] if model.thinks else [None]:
        message, done = told(turn, turn.raw(model.calls(CALL), thoughts), *IN_CALLS)
        assert message == Message("", thoughts or "", [Call(*CALL)])
        assert (done.finish, done.stop) == ("stop", None)


@every(is_parallel=True)
def test_no_stop_string_cuts_the_second_call(model: Model) -> None:
    turn = model.asked()
    message, _ = told(turn, turn.raw(model.calls(CALL, CALL)), *IN_CALLS)
    assert message == Message(calls=[Call(*CALL)] * 2)


@every()
@pytest.mark.parametrize("stop", IN_CALLS)
def test_text_before_a_call_has_no_stop_string_where_only_the_call_has(
    model: Model, stop: str
) -> None:
    if model.template == "gpt_oss" and not model.has_tokens and stop in "<|":
        return  # it is in the end of the message before, which is a token
    turn = model.asked()
    message, done = told(
        turn, turn.raw(model.before_a_call("Let me look.") + model.calls(CALL)), stop
    )
    if model.template == "llama3_1":  # whose calls are the whole answer
        assert not message.calls
        assert stop not in message.text
    else:
        assert message == Message("Let me look.", calls=[Call(*CALL)])
        assert done.stop is None


@every()
@pytest.mark.parametrize("stop", [" look", "look.", "e l", "Let", "<", "<b> "])
def test_no_call_comes_behind_a_stop_string_in_the_text(model: Model, stop: str) -> None:
    turn = model.asked()
    text = "Let me look. <b> So."
    raw = turn.raw(model.before_a_call(text) + model.calls(CALL))
    message, done = told(turn, raw, stop)
    assert message == Message(text.partition(stop)[0])
    assert (done.finish, done.stop) == ("stop", stop)


@every()
def test_a_call_that_is_cut_by_the_limit_has_no_stop_string(model: Model) -> None:
    turn = model.asked(choice=REQUIRED)
    raw = turn.raw(model.calls(CALL))
    n_tokens = len(model.ids(raw.partition("slo")[0]))
    message, done = told(turn, raw, *IN_CALLS, max_tokens=n_tokens)
    plain, _ = told(turn, raw, max_tokens=n_tokens)
    assert message == plain
    assert (done.finish, done.stop) == ("length", None)


@every(has_tokens=False)
def test_stop_strings_count_in_json_that_only_holds_what_calls_begin_with(model: Model) -> None:
    if model.template == "llama3_1":  # whose calls look like JSON
        return
    answer = GrammarPart("json_schema", json.dumps(ONE_FIELD), "response_format")
    turn = model.asked(answer=answer)
    opener = turn.made.calls.openers[0] if turn.made.calls else " to=functions."
    text = json.dumps({"a": f"{opener} STOP"}, ensure_ascii=False)
    message, done = told(turn, turn.raw(model.answer(text)), "STOP")
    assert message == Message(text.partition("STOP")[0])
    assert done.stop == "STOP"
    message, done = told(turn, turn.raw(model.calls(CALL)), "Oslo", "get_time")
    assert message == Message(calls=[Call(*CALL)])


@pytest.mark.parametrize("has_tokens", [True, False])
def test_words_that_begin_like_a_call_of_minicpm5_may_hold_a_stop_string(has_tokens: bool) -> None:
    turn = MODELS["minicpm5", has_tokens].asked()
    message, done = told(turn, turn.raw("Use <functional>; STOP it"), "STOP")
    assert (message, done.stop) == (Message("Use <functional>; "), "STOP")
    raw = turn.raw(f"Use <functional>; {turn.model.calls(CALL)}")
    assert told(turn, raw, "Oslo")[0].calls == [Call(*CALL)]


@pytest.mark.parametrize("has_tokens", [True, False])
def test_stop_strings_count_in_no_call_without_its_opener(has_tokens: bool) -> None:
    model = MODELS["qwen3_coder", has_tokens]
    turn = model.asked()
    bare = model.calls(CALL).removeprefix("<tool_call>\n")
    assert told(turn, turn.raw(f"So.\n{bare}"), *IN_CALLS)[0] == Message("So.", "", [Call(*CALL)])
    granite = MODELS["granite3", has_tokens].asked()
    raw = f'So.\n<tool_call>[{{"name": "get_time", "arguments": {CITY}}}]'
    assert told(granite, raw, *IN_CALLS)[0] == Message("So.", calls=[Call(*CALL)])


@pytest.mark.parametrize("has_tokens", [True, False])
@pytest.mark.parametrize("stop", ["STOP", "STOP it", ".\n", ";", "<", "<f", "<function=", "=a"])
def test_a_call_without_its_opener_is_text_in_the_midst_of_a_line(
    has_tokens: bool, stop: str
) -> None:
    model = MODELS["qwen3_coder", has_tokens]
    turn = model.asked()
    text = "Use <function=a>; STOP it.\n\tSo <function=a"
    message, done = told(turn, turn.raw(text), stop)
    assert (message, done.stop) == (Message(text.partition(stop)[0]), stop)
    bare = model.calls(CALL).removeprefix("<tool_call>\n")
    for before in ("", "Use <function=a>\n", "Use <function=a>\n\n \t", " \t"):
        message, done = told(turn, turn.raw(f"{before}{bare}"), "Oslo", "get_time", "\n", "param")
        assert message == Message(before.rstrip(), calls=[Call(*CALL)])
        assert done.stop is None


@pytest.mark.parametrize("has_tokens", [True, False])
def test_a_call_in_the_midst_of_what_llama_says_is_text(has_tokens: bool) -> None:
    model = MODELS["llama3_1", has_tokens]
    turn = model.asked()
    message, done = told(turn, f"I call {model.calls(CALL)}\nObservation: sun", "Observation:")
    assert (message, done.stop) == (Message(f"I call {model.calls(CALL)}\n"), "Observation:")
    message, _ = told(turn, '{"name": "Bob"}', '"')
    assert message == Message("{")


@pytest.mark.parametrize("has_tokens", [True, False])
@pytest.mark.parametrize(
    ("raw", "stop", "text"),
    [
        ("{1}{2}Hello.", "\n", "Hello."),
        ("{1}\n\n{2}\nHello.\nBye", "\n", "Hello."),
        ("{1}Hello.{2} Bye", "thought", "Hello.Bye"),
        ("Hello.{1} Bye", "STOP", "Hello.Bye"),
        ("Hello.{1} Bye STOP", "STOP", "Hello.Bye "),
        ("Hello.{1}STOP", "STOP", "Hello."),
        ("Hello STOP{1}Bye", "STOP", "Hello "),
        ("Hello.{1}So,{1}\n\nB<|ye", "|", "Hello.So,B<"),
        ("Hello.{1}", "<", "Hello."),
        ("{2}Hello.{1}x<|channel", "<|ch", "Hello.x"),
        ("Hello.<|channel>a STOP", "STOP", "Hello."),
    ],
)
def test_stop_strings_count_in_no_thoughts_of_gemma(
    has_tokens: bool, raw: str, stop: str, text: str
) -> None:
    channels = "<|channel>thought\nHm. STOP\n<channel|>", "<|channel>thought\n<channel|>"
    turn = MODELS["gemma4", has_tokens].asked(tools=[])
    raw = raw.replace("{1}", channels[0]).replace("{2}", channels[1])
    message, done = told(turn, raw, stop)
    plain, _ = told(turn, raw)
    assert message.text == text
    assert done.stop == (None if plain.text == text else stop)
    assert plain.reasoning.startswith(message.reasoning)


def test_no_thoughts_open_in_a_call_of_gemma() -> None:
    """They would be ended there, if they may take no tokens."""
    turn = MODELS["gemma4", False].asked(budget=0)
    call = ("get_time", '{"city": "<|channel>"}')
    message, _ = told(turn, turn.raw(turn.model.calls(call)), "channel")
    assert message == Message(calls=[Call(*call)])


def test_text_of_gemma_waits_only_where_thoughts_may_begin() -> None:
    thinking = MODELS["gemma4", False].asked(tools=[]).made.thinking
    assert thinking
    follower = Thoughts(thinking, lambda token: bytes([token]), [], None)
    waits = []
    for byte in b"Hi <|c, <<|channel>a<channel|>b":
        follower.accept(byte)
        waits.append(follower.n_held)
    assert waits[:12] == [0, 0, 0, 1, 2, 3, 0, 0, 1, 1, 2, 3]
    assert (waits[-1], follower.is_over) == (0, True)


@every(has_tokens=False)
def test_marks_of_calls_are_text_where_there_are_no_tools(model: Model) -> None:
    turn = model.asked(tools=[])
    assert turn.made.calls is None
    raw = turn.raw(model.answer(f"So. {model.calls(CALL)}"))
    if model.template not in ("gpt_oss", "gemma4"):  # whose marks are read without tools too
        assert "Oslo" not in told(turn, raw, "Oslo")[0].text
