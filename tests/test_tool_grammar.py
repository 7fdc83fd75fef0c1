"""What a model may say that has tools: what comes out is always text, thoughts and valid calls."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import jsonschema
import numpy as np
import pytest

from api.chat_request import Conversation
from chat.events import Call, Message
from chat.format import Prompt
from chat.tools import BY_NAME
from chat.tools.base import Parts, Tool
from engine.grammar import Compiler, GrammarState
from engine.thinking import Thoughts
from engine.wire import GrammarPart
from errors import BadRequest, UnsupportedParameter
from tests.byte_tokenizer import END, ByteTokenizer, sampled
from tests.chat_formats import (
    CONTROL_TOKENS,
    NAMES,
    TOOLS,
    assistant,
    choose,
    prompt,
    tool,
    user,
)

CITY = '{"city": "Oslo"}'
CALL = ("get_time", CITY)
ANSWER_SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"],
                 "additionalProperties": False}  # fmt: skip
ANSWER = GrammarPart("json_schema", json.dumps(ANSWER_SCHEMA), "response_format")
REQUIRED = choose(TOOLS, is_required=True)
TAGGED = {
    "qwen3_coder": "<tool_call>\n<function=NAME>\nARGUMENTS</function>\n</tool_call>",
    "glm": "<tool_call>NAME\nARGUMENTS</tool_call>",
}
OPEN_THOUGHTS = ("deepseek_r1", *TAGGED)
HERMES = ("qwen2_5", "qwen3", "smollm2", "deepseek_r1")


class Model:
    """Writes as its family does, in a vocabulary in which the family's marks are control tokens or
    text as any other."""

    def __init__(self, template: str, *, has_tokens: bool) -> None:
        self.template = template
        self.has_tokens = has_tokens
        self.tokenizer = ByteTokenizer(*(CONTROL_TOKENS[template] if has_tokens else ()))
        self.compiler = Compiler(self.tokenizer)
        self.thinks = template in (*OPEN_THOUGHTS, "qwen3", "gpt_oss", "gemma4")
        self.is_parallel = template not in ("llama3_1", "gpt_oss")  # several calls in a turn

    def __repr__(self) -> str:
        return self.template + ("" if self.has_tokens else " in text")

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.tokenize(text, parse_special=True, continues=True)

    def calls(self, *calls: tuple[str, str]) -> str:
        if self.template in HERMES:
            return "\n".join(
                f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'
                for name, arguments in calls
            )
        if self.template in TAGGED:
            return "\n".join(
                TAGGED[self.template]
                .replace("NAME", name)
                .replace("ARGUMENTS", self._tagged(arguments))
                for name, arguments in calls
            )
        if self.template == "gemma4":
            return "".join(
                f"<|tool_call>call:{name}{noted(json.loads(arguments))}<tool_call|>"
                for name, arguments in calls
            )
        if self.template == "mistral_v3":
            listed = (f'{{"name": "{call[0]}", "arguments": {call[1]}}}' for call in calls)
            return f"[TOOL_CALLS] [{', '.join(listed)}]"
        if self.template == "mistral_v11":
            return "".join(f"[TOOL_CALLS]{name}[ARGS]{arguments}" for name, arguments in calls)
        ((name, arguments),) = calls
        if self.template == "llama3_1":
            return f'{{"name": "{name}", "parameters": {arguments}}}'
        to = f"<|channel|>commentary to=functions.{name}"
        return f"{to} <|constrain|>json<|message|>{arguments}"

    def _tagged(self, arguments: str) -> str:
        """Arguments one by one; what is no object, as one of a name that no function knows."""
        values = json.loads(arguments)
        values = values if isinstance(values, dict) else {"?": values}
        form = "<parameter={}>\n{}\n</parameter>\n"
        if self.template == "glm":
            form = "<arg_key>{}</arg_key>\n<arg_value>{}</arg_value>\n"
        texts = {n: v if isinstance(v, str) else json.dumps(v) for n, v in values.items()}
        return "".join(form.format(name, text) for name, text in texts.items())

    def answer(self, text: str) -> str:
        return f"<|channel|>final<|message|>{text}" if self.template == "gpt_oss" else text

    def before_a_call(self, text: str) -> str:
        if self.template == "gpt_oss":
            return f"<|channel|>commentary<|message|>{text}<|end|><|start|>assistant"
        return f"{text}\n"

    def thoughts(self, text: str) -> str:
        """And what leads on from them. Some have begun in the prompt."""
        if self.template == "gpt_oss":
            return f"<|channel|>analysis<|message|>{text}<|end|><|start|>assistant"
        if self.template == "gemma4":
            return f"<|channel>thought\n{text}<channel|>"
        opening = "" if self.template in OPEN_THOUGHTS else "<think>\n"
        return f"{opening}{text}\n</think>\n\n"

    def asked(self, tools: Sequence[Tool] = TOOLS, **fields: Any) -> "Turn":
        messages = fields.pop("messages", user("Hi"))
        if self.template == "gemma4":  # which thinks if it is asked to
            fields.setdefault("extra", {"enable_thinking": True})
        return Turn(self, prompt(self.template, messages, tools, **fields))


def noted(value: Any) -> str:
    """A value in Gemma's notation."""
    if isinstance(value, str):
        return f'<|"|>{value}<|"|>'
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{noted(value[key])}' for key in sorted(value))}}}"
    if isinstance(value, list):
        return f"[{','.join(map(noted, value))}]"
    return json.dumps(value)


class Turn:
    """What one answer may be. It thinks of nothing unless told."""

    def __init__(self, model: Model, made: Prompt) -> None:
        self.model = model
        self.made = made

    def state(self) -> GrammarState:
        assert self.made.grammar
        return self.model.compiler.compile(self.made.grammar)

    def split(self, raw: str) -> Message:
        splitter = self.made.splitter()
        return Message.of([*splitter.feed(raw), *splitter.finish()])

    def says(self, said: str, thoughts: str | None = None) -> Message:
        """How it is read that the model says this, which it may."""
        raw = self.raw(said, thoughts)
        assert self.stop([*self.model.ids(raw), END]) is None
        return self.split(raw)

    def may_begin(self, said: str, thoughts: str | None = None) -> bool:
        return self.stop(self.model.ids(self.raw(said, thoughts))) is None

    def may_say(self, said: str, thoughts: str | None = None) -> bool:
        return self.stop([*self.model.ids(self.raw(said, thoughts)), END]) is None

    def raw(self, said: str, thoughts: str | None = None) -> str:
        if thoughts is not None:
            return self.model.thoughts(thoughts) + said
        is_open = self.made.thinking and self.made.thinking.is_open
        return f"</think>{said}" if is_open else said

    def stop(self, tokens: Iterable[int]) -> int | None:
        """The first token that is not allowed."""
        state = self.state()
        for token in tokens:
            if token not in allowed(state, self.model):
                return token
            state.accept(token)
        return None


def allowed(constraint: Any, model: Model) -> list[int]:
    logits = np.zeros(model.tokenizer.n_vocab, np.float32)
    constraint.apply(logits)
    return [int(token) for token in np.flatnonzero(logits > -np.inf)]


MODELS = {
    (name, has_tokens): Model(name, has_tokens=has_tokens)
    for name in NAMES
    for has_tokens in (True, False)
}
QWEN3, QWEN3_IN_TEXT = MODELS["qwen3", True], MODELS["qwen3", False]
GPT_OSS = MODELS["gpt_oss", True]


def every(**has: bool) -> pytest.MarkDecorator:
    """Of all models, those of this kind."""
    fitting = [
        model
        for model in MODELS.values()
        if all(getattr(model, name) == value for name, value in has.items())
    ]
    return pytest.mark.parametrize("model", fitting, ids=repr)


# what is allowed, and how it is read


@every()
@pytest.mark.parametrize(
    "text",
    ["Hello", "Hello \n", "{}", "[1]", '{"name"', '{"name": "Bob", "parameters": {}}', "<tool_cal",
     "[TOOL_", "a <b> | </c> ", "世界 🎉"],
)  # fmt: skip
def test_text(model: Model, text: str) -> None:
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
def test_mistral_may_give_its_calls_ids(has_tokens: bool) -> None:
    turn = MODELS["mistral_v11", has_tokens].asked()
    raw = f"[TOOL_CALLS]get_time[CALL_ID]9kTq2Zx0B[ARGS]{CITY}"
    assert turn.says(raw + raw).calls == [Call(*CALL)] * 2
    assert not turn.may_begin(raw.replace("city", "town"))


def test_gpt_oss_may_think_twice() -> None:
    raw = GPT_OSS.thoughts("Hm.") + GPT_OSS.before_a_call("I look.") + GPT_OSS.thoughts("Oh.")
    said = GPT_OSS.asked().says(raw + GPT_OSS.calls(CALL))
    assert said == Message("I look.", "Hm.Oh.", [Call(*CALL)])


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
    unended = model.thoughts('{"n": 5}').partition("\n</think>")[0].partition("<|end|>")[0]
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


# arguments that are written one by one, or in a notation

FORECAST = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "unit": {"enum": ["celsius", "kelvin", ""]},
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "places": {"type": "array", "items": {"$ref": "#/$defs/place"}, "maxItems": 2},
        "more": {},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
    "$defs": {"place": {"type": "object", "properties": {"name": {"type": "string"},
                                                         "at": {"type": "number"}},
                        "required": ["name"], "additionalProperties": False}},
}  # fmt: skip
NOT_JSON = pytest.mark.parametrize(
    "model", [model for model in MODELS.values() if model.template in (*TAGGED, "gemma4")], ids=repr
)


@NOT_JSON
@pytest.mark.parametrize(
    "arguments",
    [
        {"city": "Oslo", "unit": "kelvin"},
        {"city": 'a "b" <c>\n\n</d> \\ {e}, é 世界 ', "unit": ""},
        {"city": "5", "unit": "celsius", "note": None},
        {"city": "null", "unit": "celsius", "note": "null and void"},
        {"city": "", "unit": "celsius", "note": "", "days": 14},
        {"city": "x", "unit": "celsius", "places": []},
        {"city": "x", "unit": "celsius", "days": 3, "places": [{"name": "[}", "at": -1.5},
                                                              {"name": ""}]},
        {"city": "x", "unit": "celsius", "more": {"a": [True, None, 2, {"b": "c"}]}},
        {"city": "x", "unit": "celsius", "more": [1, "a"]},
        {"city": "x", "unit": "celsius", "more": "text"},
    ],
    ids=str,
)  # fmt: skip
def test_arguments_of_all_types(model: Model, arguments: dict[str, Any]) -> None:
    turn = model.asked([tool("forecast", schema=FORECAST)])
    said = turn.says(model.calls(("forecast", json.dumps(arguments))))
    (call,) = said.calls
    assert json.loads(call.arguments) == arguments
    assert not said.text


@NOT_JSON
@pytest.mark.parametrize(
    "arguments",
    [
        {"city": "x"},
        {"unit": "celsius"},
        {"city": "x", "unit": "rankine"},
        {"city": "x", "unit": "celsius", "days": 15},
        {"city": "x", "unit": "celsius", "days": "three"},
        {"city": "x", "unit": "celsius", "places": [{"at": 1}]},
        {"city": "x", "unit": "celsius", "places": [{"name": "a"}] * 3},
        {"city": "x", "unit": "celsius", "other": 1},
    ],
    ids=str,
)
def test_no_arguments_but_those_of_the_schema(model: Model, arguments: dict[str, Any]) -> None:
    turn = model.asked([tool("forecast", schema=FORECAST)])
    assert not turn.may_begin(model.calls(("forecast", json.dumps(arguments))))


@NOT_JSON
def test_arguments_of_which_the_schema_says_nothing(model: Model) -> None:
    turn = model.asked([tool("free", schema={"type": "object"})])
    for arguments in ({}, {"a": 1, "b_2": "x"}, {"a": {"b": [None]}}):
        (call,) = turn.says(model.calls(("free", json.dumps(arguments)))).calls
        assert json.loads(call.arguments) == arguments


@NOT_JSON
def test_a_text_may_spell_what_calls_are_made_of(model: Model) -> None:
    """A file about such calls can be written, if it is with letters."""
    text = "A <tool_call> or <|tool_call> begins, </tool_call> or <tool_call|> ends."
    arguments = json.dumps({"city": text})
    turn = model.asked(choice=REQUIRED)
    raw = turn.raw(model.calls(("get_time", arguments)))
    begun, written, ended = raw.partition(text)
    tokens = [*model.ids(begun), *written.encode(), *model.ids(ended), END]
    if model.has_tokens:
        assert turn.stop(tokens) is None
    assert turn.split(raw).calls == [Call("get_time", arguments)]


STRICT = {
    "type": "object",
    "properties": {"a": {"type": "string", "maxLength": 2}, "b": {"type": ["string", "null"]},
                   "c": {"type": ["string", "integer"]}},
    "required": ["a", "b", "c"],
    "additionalProperties": False,
}  # fmt: skip


@NOT_JSON
def test_a_strict_schema_is_kept_to_the_letter(model: Model) -> None:
    turn = model.asked([tool("f", schema=STRICT, is_strict=True)])
    if model.template == "gemma4":
        quoted = model.calls(("f", '{"a": "xy", "b": null, "c": "5"}'))
        longer = quoted.replace("xy", "xyz")
    else:  # what a text could not say exactly is JSON, quotes and all
        quoted = model.calls(("f", r'{"a": "xy", "b": "null", "c": "\"5\""}'))
        longer = quoted.replace("xy", "xyz")
    assert turn.says(quoted).calls == [Call("f", '{"a": "xy", "b": null, "c": "5"}')]
    assert not turn.may_begin(longer)


@pytest.mark.parametrize(
    ("template", "schema", "named"),
    [
        ("qwen3_coder", {"properties": {}, "minProperties": 1}, "minProperties"),
        ("glm", {"properties": {"a": {}}, "anyOf": [{"required": ["a"]}]}, "anyOf"),
        ("gemma4", {"properties": {"a": {"type": "string", "pattern": "x"}}}, "pattern"),
        ("gemma4", {"properties": {"a": {"type": "array", "uniqueItems": True}}}, "uniqueItems"),
        ("gemma4", {"properties": {"a": {"oneOf": [{"type": "string"}]}}}, "oneOf"),
        ("gemma4", {"properties": {"a": {"type": "array", "items": False}}}, "that is none"),
        ("gemma4", {"required": ["a"]}, "required"),
        ("gemma4", {"properties": {"a": {}}, "anyOf": [{"required": ["a"]}]}, "anyOf"),
    ],
)
def test_what_of_a_strict_schema_cannot_be_enforced_is_refused(
    template: str, schema: dict[str, Any], named: str
) -> None:
    schema = {"type": "object", **schema}
    with pytest.raises(UnsupportedParameter, match=named) as caught:
        prompt(template, user("Hi"), [tool("f", schema=schema, is_strict=True)])
    assert caught.value.param == "tools"
    assert prompt(template, user("Hi"), [tool("f", schema=schema)])


@NOT_JSON
def test_schemas_in_circles(model: Model) -> None:
    schema = {
        "type": "object",
        "properties": {"tree": {"$ref": "#/$defs/tree"}},
        "required": ["tree"],
        "additionalProperties": False,
        "$defs": {"tree": {"type": "object", "properties": {"leaf": {"type": "integer"},
                           "left": {"$ref": "#/$defs/tree"}}, "additionalProperties": False}},
    }  # fmt: skip
    turn = model.asked([tool("f", schema=schema)])
    arguments = '{"tree": {"left": {"left": {"leaf": 1}}}}'
    assert turn.says(model.calls(("f", arguments))).calls == [Call("f", arguments)]
    assert not turn.may_begin(model.calls(("f", arguments.replace("1", '"x"'))))


def call_of(model: Model, name: str, arguments: str) -> tuple[str, list[Call]]:
    return model.calls((name, arguments)), [Call(name, arguments)]


@every(is_parallel=True)
def test_a_line_break_behind_the_last_call_leads_to_no_other(model: Model) -> None:
    """Templates of Nemotron and others end each call with one."""
    if model.template in (*HERMES, *TAGGED):
        said = model.asked().says(f"{model.calls(CALL)}\n")
        assert said == Message(calls=[Call(*CALL)])


@NOT_JSON
@pytest.mark.parametrize("limits", [{"minLength": 1}, {"maxLength": 9}, {"maxLength": 2**53}])
def test_a_text_of_a_certain_length_ends(model: Model, limits: dict[str, int]) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string"} | limits},
              "required": ["a"], "additionalProperties": False}  # fmt: skip
    for is_strict in (False, True):
        turn = model.asked([tool("f", schema=schema, is_strict=is_strict)])
        raw, calls = call_of(model, "f", '{"a": "Oslo"}')
        assert turn.says(raw).calls == calls
        fits = limits.get("maxLength", 99) > 9
        assert turn.may_begin(raw.replace("Oslo", "Oslo, Norge")) == fits
        assert turn.may_begin(raw.replace("Oslo", "")) == ("maxLength" in limits)


@NOT_JSON
def test_arguments_that_are_named_have_their_types_where_others_may_come_too(model: Model) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}, "u": {"enum": ["a"]}},
              "additionalProperties": True}  # fmt: skip
    if model.template == "gemma4":
        return  # where nothing comes that is not named
    for is_strict in (False, True):
        turn = model.asked([tool("f", schema=schema, is_strict=is_strict)])
        for arguments in ('{"n": 5}', '{"n": 5, "x": 1}', '{"u": "a", "nn": 1}', "{}"):
            raw, calls = call_of(model, "f", arguments)
            assert turn.says(raw).calls == calls
        for arguments in ('{"n": "abc"}', '{"x": 1, "n": "abc"}', '{"x": 1, "u": "b"}'):
            assert not turn.may_begin(model.calls(("f", arguments)))


@NOT_JSON
@pytest.mark.parametrize("is_strict", [False, True])
def test_names_that_nobody_knows_have_values_of_their_type(model: Model, is_strict: bool) -> None:
    schema = {"type": "object", "additionalProperties": {"type": "integer"}}
    turn = model.asked([tool("f", schema=schema, is_strict=is_strict)])
    for arguments in ("{}", '{"a": 1, "b": -2}'):
        raw, calls = call_of(model, "f", arguments)
        assert turn.says(raw).calls == calls
    assert not turn.may_begin(model.calls(("f", '{"a": "x"}')))


@NOT_JSON
def test_references_to_anywhere_mean_what_they_mean(model: Model) -> None:
    place = {"type": "object", "properties": {"x": {"type": "integer"}},
             "additionalProperties": False}  # fmt: skip
    schema = {
        "type": "object",
        "properties": {
            "a": {"anyOf": [place, {"type": "null"}]},
            "b": {"$ref": "#/properties/a/anyOf/0"},
            "kids": {"type": "array", "items": {"$ref": "#"}},
            "text": {"$ref": "#/$defs/te~1xt"},
        },
        "additionalProperties": False,
        "$defs": {"te/xt": {"type": "string"}},
    }
    turn = model.asked([tool("f", schema=schema)])
    for arguments in (
        '{"a": null}', '{"b": {"x": 1}}', '{"kids": [{"b": {}}, {"kids": []}]}', '{"text": "5"}',
    ):  # fmt: skip
        raw, calls = call_of(model, "f", arguments)
        assert turn.says(raw).calls == calls
    for arguments in ('{"b": null}', '{"b": {"y": 1}}', '{"kids": [1]}', '{"kids": [[]]}'):
        assert not turn.may_begin(model.calls(("f", arguments)))


@NOT_JSON
def test_schemas_that_many_functions_have_cost_once(model: Model) -> None:
    """Over HTTP each has a place of its own, for faults."""
    place = {"type": "object", "properties": {f"p{n}": {"type": "number"} for n in range(60)}}
    schema = {"type": "object", "properties": {f"n{n}": {"type": "integer"} for n in range(10)},
              "$defs": {f"d{n}": place for n in range(9)}}  # fmt: skip
    names = [f"a_function_with_a_long_name_of_some_server_{n}" for n in range(12)]
    sent: Any = [
        {"type": "function", "function": {"name": name, "parameters": schema}} for name in names
    ]
    tools = Conversation(messages=user("Hi"), tools=sent).tool_list()
    turn = model.asked(tools)
    grammar = turn.made.grammar
    assert grammar
    assert len(grammar.parts) < 3
    assert grammar.param == "tools"
    raw, calls = call_of(model, tools[7].name, '{"n3": 5}')
    assert turn.says(raw).calls == calls


DEEP: dict[str, Any] = {"type": "string"}
for _ in range(30):
    DEEP = {"type": "array", "items": DEEP}
UNION: dict[str, Any] = {"$ref": "#/$defs/n"}
for _ in range(200):
    UNION = {"anyOf": [UNION]}
OBJECTS: dict[str, Any] = {"type": "string"}
for _ in range(30):
    OBJECTS = {"type": "object", "properties": {"a": OBJECTS, "b": {"type": "string"}}}


@pytest.mark.parametrize("family", ["qwen3-coder", "glm", "gemma4"])
@pytest.mark.parametrize("schema", [DEEP, UNION, OBJECTS], ids=["lists", "unions", "objects"])
def test_deep_schemas_are_no_burden(family: str, schema: dict[str, Any]) -> None:
    whole = {"type": "object", "properties": {"a": schema}, "$defs": {"n": UNION}}
    function = BY_NAME[family].function(tool("f", schema=whole), 0, Parts())
    assert len(BY_NAME[family].calls([function], is_parallel=True)) < 20_000


def test_a_schema_that_is_too_deep_is_refused() -> None:
    schema = '{"type": "array", "items": ' * 5000 + "{}" + "}" * 5000
    whole = '{"type": "object", "properties": {"a": ' + schema + "}}"
    part = GrammarPart("json_schema", whole, "tools", is_lenient=True)
    function = {"name": "f", "description": "", "parameters": {}}
    deep = Tool({"type": "function", "function": function}, part)
    with pytest.raises(BadRequest, match="too deeply") as caught:
        prompt("qwen3_coder", user("Hi"), [deep])
    assert caught.value.param == "tools"


@pytest.mark.parametrize("template", TAGGED)
def test_many_arguments_of_many_functions_are_within_bounds(template: str) -> None:
    schema = {"type": "object", "properties": {f"argument_{n}": {"type": "string"}
                                               for n in range(24)},
              "required": [f"argument_{n}" for n in (3, 7, 11, 20)]}  # fmt: skip
    made = prompt(template, user("Hi"), [tool(f"f{n}", schema=schema) for n in range(60)])
    assert made.grammar
    size = len(made.grammar.frame) + sum(len(part.text) for part in made.grammar.parts)
    assert size < 60 * 4 * len(json.dumps(schema))


@NOT_JSON
def test_no_word_of_a_schema_is_a_mark_of_the_grammar(model: Model) -> None:
    schema = {"type": "object", "properties": {"«x»": {"enum": ["«Spartak»", "a «» b"]}},
              "additionalProperties": False}  # fmt: skip
    turn = model.asked([tool("f", schema=schema)])
    for value in ("«Spartak»", "a «» b"):
        raw, calls = call_of(model, "f", json.dumps({"«x»": value}, ensure_ascii=False))
        assert turn.says(raw).calls == calls
    assert not turn.may_begin(model.calls(("f", '{"«x»": "a b"}')))


@NOT_JSON
def test_one_of_several_objects_is_an_object(model: Model) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "integer"}},
              "anyOf": [{"required": ["a"]}, {"required": ["b"]}]}  # fmt: skip
    turn = model.asked([tool("f", schema=schema)])
    for arguments in ('{"a": "x"}', '{"b": 1}'):
        raw, calls = call_of(model, "f", arguments)
        assert turn.says(raw).calls == calls
    assert not turn.may_begin(model.calls(("f", '{"b": "x"}')))
    if model.template == "gemma4":
        assert not turn.may_begin(model.calls(("f", "{}")).replace("{}", "<"))


@pytest.mark.parametrize("has_tokens", [True, False])
@pytest.mark.parametrize("template", TAGGED)
def test_arguments_may_come_in_any_order(template: str, has_tokens: bool) -> None:
    model = MODELS[template, has_tokens]
    names = ("limit", "query", "page", "kind")
    schema = {"type": "object", "properties": {name: {"type": "string"} for name in names},
              "required": ["query", "kind"], "additionalProperties": False}  # fmt: skip
    turn = model.asked([tool("f", schema=schema)])
    for order in (names, names[::-1], ("query", "limit", "kind"), ("kind", "query", "page")):
        raw, calls = call_of(model, "f", json.dumps(dict.fromkeys(order, "x")))
        assert turn.says(raw).calls == calls
    said = {"limit": "x", "query": "x", "kind": "x", "page": "x"}
    twice = model.calls(("f", json.dumps(said))).replace("page", "limit")
    assert not turn.may_begin(twice)
    for order in (("limit", "query"), ("kind",), ()):
        assert not turn.may_begin(model.calls(("f", json.dumps(dict.fromkeys(order, "x")))))
    strict = model.asked([tool("f", schema=schema, is_strict=True)])
    assert not strict.may_begin(model.calls(("f", json.dumps(dict.fromkeys(names[::-1], "x")))))


@pytest.mark.parametrize("has_tokens", [True, False])
def test_qwen3_coder_may_leave_the_opener_out(has_tokens: bool) -> None:
    model = MODELS["qwen3_coder", has_tokens]
    bare = model.calls(CALL).removeprefix("<tool_call>\n")
    turn = model.asked()
    for text in ("", "Let me look.\n", "Let <function=x> be.\n\n  "):
        for close in ("\n</tool_call>", ""):
            raw = text + bare.removesuffix("\n</tool_call>") + close
            assert turn.says(raw) == Message(text.rstrip(), calls=[Call(*CALL)])
    two = f"{bare}\n{model.calls(CALL)}"
    assert turn.says(two).calls == [Call(*CALL)] * 2
    assert not turn.may_begin(bare.replace("get_time", "no_such"))
    assert turn.says("In <function=f> a name is") == Message("In <function=f> a name is")
    json_or_call = model.asked(answer=ANSWER)
    assert json_or_call.split("</think><function=f>\n</function>").calls == []


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
