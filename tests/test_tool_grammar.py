"""What a model may say that has tools: what comes out is always text, thoughts and valid calls."""

import json
from collections.abc import Sequence
from typing import Any

import jsonschema
import numpy as np
import pytest

from chat.events import Call, Message
from engine.thinking import Thoughts
from tests.byte_tokenizer import END, sampled
from tests.chat_formats import TOOLS, assistant, choose, tool, user
from tests.tool_models import (
    ANSWER,
    ANSWER_SCHEMA,
    CALL,
    CITY,
    GPT_OSS,
    HERMES,
    MODELS,
    QWEN3,
    QWEN3_IN_TEXT,
    REQUIRED,
    TAGGED,
    Model,
    Turn,
    allowed,
    every,
)

# what is allowed, and how it is read


@every()
@pytest.mark.parametrize(
    "text",
    ["Hello", "Hello \n", "{}", "[1]", '{"name"', '{"name": "Bob", "parameters": {}}', "<tool_cal",
     "[TOOL_", "a <b> | </c> ", "世界 🎉"],
)  # fmt: skip
def test_text(model: Model, text: str) -> None:
    if model.template == "command":  # where spaces before the mark behind it are nobody's
        assert model.asked().says(model.answer(text)) == Message(text.rstrip())
    else:
        assert model.asked().says(model.answer(text)) == Message(text)


@every()
@pytest.mark.parametrize("arguments", [CITY, '{"city": ""}', r'{"city": "\"}]\n}}é"}'])
def test_a_call(model: Model, arguments: str) -> None:
    said = model.asked().says(model.calls(("get_time", arguments)))
    assert said == Message(calls=[Call("get_time", arguments)])


@every()
def test_text_before_a_call(model: Model) -> None:
    raw = model.before_a_call("Let me <b> look.") + model.calls(CALL)
    if model.template == "llama3_1":  # whose calls are the whole answer
        assert model.asked().says(raw) == Message(raw)
    else:
        assert model.asked().says(raw) == Message("Let me <b> look.", calls=[Call(*CALL)])


@every(is_parallel=True)
def test_several_calls_unless_the_client_wants_one(model: Model) -> None:
    calls = [CALL, ("get_weather", CITY), CALL]
    assert model.asked().says(model.calls(*calls)).calls == [Call(*call) for call in calls]
    turn = model.asked(choice=choose(TOOLS, is_parallel=False))
    assert turn.says(model.calls(CALL)).calls == [Call(*CALL)]
    assert not turn.may_begin(model.calls(*calls))


@every(thinks=True)
def test_text_or_a_call_after_thoughts(model: Model) -> None:
    turn = model.asked()
    hm = "Hm. {} [x]"
    assert turn.says(model.answer("Hello"), thoughts=hm) == Message("Hello", hm)
    assert turn.says(model.calls(CALL), thoughts=hm) == Message("", hm, [Call(*CALL)])


@every(thinks=True, has_tokens=False)
def test_thoughts_about_calls(model: Model) -> None:
    text = "I could say <tool_call>, as in " + QWEN3.calls(("f", "{}"))
    said = model.asked().says(model.calls(CALL), thoughts=text)
    assert said == Message("", text, [Call(*CALL)])


def test_a_control_token_for_calls_is_for_nothing_else() -> None:
    assert not QWEN3.asked().may_begin("", thoughts="I could say <tool_call>")


@pytest.mark.parametrize("spaces", [" ", "\n", "\n\n"])
@pytest.mark.parametrize("model", [QWEN3, QWEN3_IN_TEXT], ids=repr)
def test_spaces_before_thoughts(model: Model, spaces: str) -> None:
    raw = f"{spaces}{model.thoughts('<b>, </b>?')}{model.calls(CALL)}"
    assert model.asked().says(raw) == Message("", "<b>, </b>?", [Call(*CALL)])
    about_calls = f"{spaces}<think><tool_call>x</think>So."
    if not model.has_tokens:
        assert model.asked().says(about_calls) == Message("So.", "<tool_call>x")


@pytest.mark.parametrize("spaces", ["", "\n", "\n\n"])
def test_a_tag_of_thoughts_behind_them_is_text_and_calls_may_follow(spaces: str) -> None:
    turn = QWEN3_IN_TEXT.asked()
    raw = f"<think>Hm.</think>{spaces}<think>Oh. "
    assert turn.says(raw) == Message("<think>Oh. ", "Hm.")
    called = raw + QWEN3_IN_TEXT.calls(CALL)
    assert turn.says(called) == Message("<think>Oh.", "Hm.", [Call(*CALL)])
    assert not turn.may_begin(raw + QWEN3_IN_TEXT.calls(("f", "{}")))


@every()
def test_the_end_of_an_answer_that_is_continued(model: Model) -> None:
    if model.template not in ("llama3_1", "gpt_oss"):  # where that is refused
        messages = [*user("Hi"), *assistant("Let me see.")]
        turn = model.asked(messages=messages, continues=True)
        assert turn.says(" So.") == Message(" So.")
        assert turn.says(f" So.\n{model.calls(CALL)}") == Message(" So.", calls=[Call(*CALL)])


@pytest.mark.parametrize("thoughts", [None, "Hm."])
@pytest.mark.parametrize(
    "head",
    [
        "<|channel|>commentary to=functions.get_time",
        "<|channel|>commentary to=functions.get_time json",
        "<|channel|>commentary to=functions.get_time<|constrain|>json",
        " to=functions.get_time<|channel|>commentary json",
        " to=functions.get_time<|channel|>commentary <|constrain|>json",
    ],
)
def test_gpt_oss_has_many_heads_of_calls(head: str, thoughts: str | None) -> None:
    said = GPT_OSS.asked().says(f"{head}<|message|>{CITY}", thoughts)
    assert said == Message("", thoughts or "", [Call(*CALL)])


@pytest.mark.parametrize("has_tokens", [True, False])
def test_kimi_counts_calls_as_it_likes(has_tokens: bool) -> None:
    model = MODELS["kimi_k2", has_tokens]
    turn = model.asked()
    raw = model.calls(CALL, CALL).replace(":0", ":17").replace(":1<", ":18<")
    assert turn.says(raw).calls == [Call(*CALL)] * 2
    for wrong in ("functions.get_time", "functions.get_time:x", "get_time:0"):
        assert not turn.may_begin(raw.replace("functions.get_time:17", wrong))


@pytest.mark.parametrize("has_tokens", [True, False])
@pytest.mark.parametrize(
    ("template", "begin", "end"),
    [
        ("apriel", "", "\n[END FINAL RESPONSE]\n"),
        ("command", "<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    ],
)
def test_marks_around_an_answer_are_no_text_and_a_call_may_follow(
    template: str, begin: str, end: str, has_tokens: bool
) -> None:
    model = MODELS[template, has_tokens]
    turn = model.asked()
    assert turn.says(f"{begin}So.{end}", thoughts="Hm.") == Message("So.", "Hm.")
    called = f"{begin}So.{end}{model.calls(CALL)}"
    assert turn.says(called, thoughts="Hm.") == Message("So.", "Hm.", [Call(*CALL)])
    wrong = f"{begin}So.{end}{model.calls(('f', '{}'))}"
    assert not turn.may_begin(wrong, thoughts="Hm.")
    assert not turn.may_begin(f"{begin}So.{end}So.", thoughts="Hm.")


@pytest.mark.parametrize("has_tokens", [True, False])
def test_granite_may_spell_its_opener(has_tokens: bool) -> None:
    turn = MODELS["granite3", has_tokens].asked()
    raw = f'<tool_call>[{{"name": "get_time", "arguments": {CITY}}}]'
    assert turn.says(raw) == Message(calls=[Call(*CALL)])
    assert turn.says(f"So.\n{raw}") == Message("So.", calls=[Call(*CALL)])
    assert turn.says(raw, thoughts="Hm.") == Message("", "Hm.", [Call(*CALL)])
    for wrong in (raw.replace("city", "town"), raw.replace("get_time", "f"), f"{raw} So"):
        assert not turn.may_begin(wrong)
        assert not turn.may_begin(f"So. {wrong}")


@pytest.mark.parametrize("has_tokens", [True, False])
def test_mistral_may_give_its_calls_ids(has_tokens: bool) -> None:
    turn = MODELS["mistral_v11", has_tokens].asked()
    raw = f"[TOOL_CALLS]get_time[CALL_ID]9kTq2Zx0B[ARGS]{CITY}"
    assert turn.says(raw + raw).calls == [Call(*CALL)] * 2
    assert not turn.may_begin(raw.replace("city", "town"))


def test_gpt_oss_may_think_twice() -> None:
    raw = GPT_OSS.thoughts("Hm.") + GPT_OSS.before_a_call("I look.") + GPT_OSS.thoughts("Oh.")
    said = GPT_OSS.asked().says(raw + GPT_OSS.calls(CALL))
    assert said == Message("I look.", "Hm.\n\nOh.", [Call(*CALL)])


@pytest.mark.parametrize("before", ["\n\n", "<|python_tag|>", "\n<|python_tag|> "])
@pytest.mark.parametrize("has_tokens", [True, False])
def test_llama_may_put_spaces_and_its_tag_before_a_call(before: str, has_tokens: bool) -> None:
    turn = MODELS["llama3_1", has_tokens].asked()
    for typed in ("", '"type": "function", '):
        call = f'{before}{{{typed}"name": "get_time", "parameters": {CITY}}}'
        assert turn.says(call) == Message(calls=[Call(*CALL)])
        assert not turn.may_begin(call.replace("city", "town"))


# what is not


@every()
@pytest.mark.parametrize("is_required", [False, True])
@pytest.mark.parametrize(
    "call",
    [
        ("get", CITY),
        ("get_times", CITY),
        ("get_time", "{}"),
        ("get_time", '{"city": 5}'),
        ("get_time", '{"city": "Oslo", "x": 1}'),
        ("get_time", "null"),
    ],
)
def test_no_call_of_what_is_no_function_or_with_wrong_arguments(
    model: Model, call: tuple[str, str], is_required: bool
) -> None:
    turn = model.asked(choice=choose(TOOLS, is_required=is_required))
    raw = model.calls(call)
    if model.template == "llama3_1" and call[0] != "get_time" and not is_required:
        assert turn.says(raw) == Message(raw)  # some other JSON
    elif model.template in TAGGED and call[1] == '{"city": 5}':  # a text has no quotes
        assert turn.says(raw).calls == [Call("get_time", '{"city": "5"}')]
    else:
        assert not turn.may_begin(raw)


@every()
def test_no_answer_without_the_call_that_is_required(model: Model) -> None:
    turn = model.asked(choice=REQUIRED)
    for thoughts in [None, "Hm."] if model.thinks else [None]:
        assert turn.says(model.calls(CALL), thoughts).calls == [Call(*CALL)]
        assert not turn.may_begin(model.answer("Hello"), thoughts)
        assert not turn.may_say("", thoughts)


@every(is_parallel=True)
def test_a_line_break_behind_the_last_call_leads_to_no_other(model: Model) -> None:
    """Templates of Nemotron and others end each call with one."""
    if model.template in (*HERMES, *TAGGED, "nemotron2", "apriel"):
        said = model.asked().says(f"{model.calls(CALL)}\n")
        assert said == Message(calls=[Call(*CALL)])


@every()
def test_nothing_after_calls_and_no_half_ones(model: Model) -> None:
    turn = model.asked()
    assert not turn.may_begin(f"{model.calls(CALL)} So")
    assert not turn.may_say(model.calls(CALL)[:-1])


@every()
def test_no_call_and_no_other_text_where_json_is_wanted(model: Model) -> None:
    turn = model.asked(tools=[], answer=ANSWER)
    assert turn.says(model.answer('{"n": 5}')) == Message('{"n": 5}')
    for said in (model.calls(CALL), model.answer("Hello"), model.answer('{"n": "5"}')):
        assert not turn.may_begin(said)
    assert not turn.may_say("")


@every()
def test_json_or_a_call_where_both_are_wanted(model: Model) -> None:
    in_json = model.answer('{"n": 5}')
    required = model.asked(answer=ANSWER, choice=REQUIRED)
    assert required.says(model.calls(CALL)) == Message(calls=[Call(*CALL)])
    assert not required.may_say(in_json)
    if model.template != "llama3_1":  # whose calls look like JSON
        turn = model.asked(answer=ANSWER)
        assert turn.says(model.calls(CALL)) == Message(calls=[Call(*CALL)])
        assert turn.says(in_json) == Message('{"n": 5}')
        assert not turn.may_begin(model.answer("Hello"))
        assert not turn.may_begin(model.before_a_call("So.") + in_json)


@every(thinks=True)
def test_no_json_before_the_thoughts_have_ended(model: Model) -> None:
    turn = model.asked(tools=[], answer=ANSWER)
    said = turn.says(model.answer('{"n": 5}'), thoughts='I say {"n": 4}.')
    assert said == Message('{"n": 5}', 'I say {"n": 4}.')
    assert turn.made.thinking
    unended = model.thoughts('{"n": 5}').partition(turn.made.thinking.close)[0]
    assert turn.stop(model.ids(unended)) is None
    assert turn.stop([*model.ids(unended), END]) == END


@every()
def test_names_are_taken_by_the_letter(model: Model) -> None:
    names = ("a.b-c", "été_2", "世界", "a", "aa")
    turn = model.asked([tool(name) for name in names])
    for name in names:
        assert turn.says(model.calls((name, "{}"))) == Message(calls=[Call(name, "{}")])
    for name in ("aXb-c", "a.b", "ete_2", "世", "aaa"):
        raw = model.calls((name, "{}"))
        if model.template == "llama3_1":
            assert turn.says(raw) == Message(raw)
        else:
            assert not turn.may_begin(raw)


@pytest.mark.parametrize(
    ("template", "before", "mark"),
    [
        ("qwen3", "So: ", "<tool_call>"),
        ("qwen3", "<think>So: ", "</think>"),
        ("mistral_v3", "So: ", "[TOOL_CALLS]"),
        ("gpt_oss", "<|channel|>final<|message|>So: ", "<|end|>"),
    ],
)
def test_a_control_token_is_not_spelt_in_letters(template: str, before: str, mark: str) -> None:
    """Nobody who reads the text could tell it from one, so a call could come unchecked."""
    model = MODELS[template, True]
    state = model.asked().state()
    *letters, last = mark.encode()
    for token in (*model.ids(before), *letters):
        state.accept(token)
    assert last not in allowed(state, model)


# thoughts that must end


@every(thinks=True)
@pytest.mark.parametrize("budget", [0, 1, 4])
@pytest.mark.parametrize("wants_json", [True, False])
def test_what_follows_thoughts_that_are_cut_short(
    model: Model, budget: int, wants_json: bool
) -> None:
    if wants_json:
        turn = model.asked(tools=[], answer=ANSWER, budget=budget)
        said, message = '{"n": 5}', Message('{"n": 5}')
        if model.template != "gpt_oss":  # whose thoughts end with the head of the answer
            said = model.answer(said)
    else:
        turn = model.asked(budget=budget)
        said, message = model.calls(CALL), Message(calls=[Call(*CALL)])
    thinking = turn.made.thinking
    assert thinking
    state = turn.state()
    ending = model.ids(thinking.ending)
    thoughts = Thoughts(thinking, model.tokenizer.shown, ending, state)

    def say(text: str) -> str:
        return model.tokenizer.text(
            list(sampled(thoughts, model.ids(text), model.tokenizer.n_vocab))
        )

    opening = model.thoughts("@").partition("@")[0].removesuffix("\n").removesuffix("thought")
    raw = say(opening + "u" * budget)
    for token in ending:
        assert allowed(thoughts, model) == [token]
        thoughts.accept(token)
    raw += thinking.ending + say(said)
    message.reasoning = "u" * budget
    assert turn.split(raw) == message
    assert state.is_complete


# whatever a model says

N_WALKS = 12
SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["</tool_call>", "<|end|>", '"}]', "é"]},
        "n": {"type": "integer", "minimum": -5, "maximum": 10},
        "more": {"type": "array", "items": {"$ref": "#/$defs/one"}, "maxItems": 2},
    },
    "required": ["kind"],
    "additionalProperties": False,
    "$defs": {"one": {"type": "object", "properties": {"a": {"type": "boolean"}},
                      "additionalProperties": False}},
}  # fmt: skip
TRAP = tool("trap.é", schema=SCHEMA)
ALL = (*TOOLS, TRAP)
WAYS: dict[str, dict[str, Any]] = {
    "auto": {},
    "one": {"choice": choose(ALL, is_parallel=False)},
    "required": {"choice": choose(ALL, is_required=True)},
    "named": {"choice": choose([TRAP], is_required=True, is_parallel=False), "answer": ANSWER},
    "json": {"answer": ANSWER},
}


def walk(turn: Turn, likes: Sequence[Sequence[int]], seed: int) -> tuple[str, bool]:
    """What a model says that knows nothing and likes some texts, and whether it is whole."""
    dice = np.random.default_rng(seed)
    state, tokenizer = turn.state(), turn.model.tokenizer
    said: list[int] = []
    wish: list[int] = []
    for _ in range(250):
        logits = dice.standard_normal(tokenizer.n_vocab).astype(np.float32)
        logits[128:END] -= 9
        logits[[*b'"}]']] += 2
        logits[END] += 1
        state.apply(logits)
        if not wish and dice.random() < (0.3 if said else 0.9):
            wish = list(likes[dice.integers(len(likes))])
        if wish and logits[wish[0]] > -np.inf:
            token = wish.pop(0)
        else:
            token, wish = int(logits.argmax()), []
        assert logits[token] > -np.inf
        state.accept(token)
        if token == END:
            return tokenizer.text(said), True
        said.append(token)
    return tokenizer.text(said), False


@every()
@pytest.mark.parametrize("way", WAYS)
def test_whatever_is_said_is_text_thoughts_and_valid_calls(model: Model, way: str) -> None:
    if (model.template, way) == ("llama3_1", "json"):
        return  # refused
    turn = model.asked(ALL, **WAYS[way])
    texts = [*turn.made.visible, "<think>", "</think>", model.thoughts("Hm."), "\n\n", "get_time",
             model.calls(("trap.é", '{"kind": "é"}')), model.calls(CALL), model.calls(("f", "{}")),
             '{"name": "get_time", "arguments": {"x": 1}}', '[{"name": "f"}]',
             model.answer('{"n": 7}')]  # fmt: skip
    likes = [
        model.tokenizer.tokenize(text, parse_special=is_special, continues=True)
        for text in texts
        for is_special in (True, False)
    ]
    schemas = {tool.name: json.loads(tool.arguments.text) for tool in ALL}
    n_calls = 0
    for seed in range(N_WALKS):
        raw, is_whole = walk(turn, likes, seed)
        message = turn.split(raw)
        n_calls += len(message.calls)
        assert len(message.calls) < 2 or way not in ("one", "named")
        for call in message.calls if is_whole else message.calls[:-1]:
            jsonschema.validate(json.loads(call.arguments), schemas[call.name])
        if is_whole and way in ("required", "named"):
            assert message.calls
        if is_whole and way == "json" and not message.calls:
            jsonschema.validate(json.loads(message.text), ANSWER_SCHEMA)
    assert n_calls


def test_many_tools_take_little_time() -> None:
    tools = [tool(f"function_{n}", "city", "unit") for n in range(128)]
    call = ("function_77", '{"city": "Oslo", "unit": "C"}')
    for model in MODELS.values():
        assert model.asked(tools).says(model.calls(call)).calls == [Call(*call)]
