"""Arguments of calls that are no JSON: written one by one, or in a notation."""

import json
from typing import Any

import pytest

from api.chat_request import Conversation
from chat.events import Call, Message
from chat.tools import BY_NAME
from chat.tools.base import Parts, Tool
from engine.wire import MAX_GRAMMAR_BYTES, GrammarPart
from errors import BadRequest, UnsupportedParameter
from tests.byte_tokenizer import END
from tests.chat_formats import prompt, tool, user
from tests.tool_models import ANSWER, CALL, MODELS, REQUIRED, TAGGED, Model

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
        ("gemma4", {"properties": {"a": {"enum": []}}}, "empty 'enum'"),
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


NOTED = {
    "$ref": "#/$defs/whole",
    "$defs": {"whole": {"type": "object", "properties": {
        "one": {"enum": [1, 2.5, None, True, "x", [], [1, 2]]},
        "same": {"const": {"a b": [1, "z", {"c d": False}]}},
        "some": {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 3},
        "none": {"type": "array", "maxItems": 0},
        "no such": {"type": "integer"},
        "not": False,
    }, "required": ["one"]}},
}  # fmt: skip
NOTES: Any = [
    *({"one": one} for one in (1, 2.5, None, True, "x", [], [1, 2])),
    {"one": 1, "same": {"a b": [1, "z", {"c d": False}]}},
    {"one": 1, "some": [1, 2]}, {"one": 1, "some": [1, 2, 3]},
    {"one": 1, "none": []}, {"one": 1, "no such": 3},
]  # fmt: skip
NO_NOTES: Any = [
    {}, *({"one": one} for one in (3, "1", [1])), {"one": 1, "same": {"a b": []}},
    {"one": 1, "some": [1]}, {"one": 1, "some": [1, 2, 3, 4]},
    {"one": 1, "none": [1]}, {"one": 1, "no such": "x"}, {"one": 1, "not": 1},
]  # fmt: skip


@pytest.mark.parametrize("is_strict", [False, True])
def test_gemma_keeps_what_can_be_enforced(is_strict: bool) -> None:
    model = MODELS["gemma4", True]
    turn = model.asked([tool("f", schema=NOTED, is_strict=is_strict)])
    for arguments in NOTES:
        (call,) = turn.says(model.calls(("f", json.dumps(arguments)))).calls
        assert json.loads(call.arguments) == arguments
    for arguments in NO_NOTES:
        assert not turn.may_begin(model.calls(("f", json.dumps(arguments))))


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
def test_a_limit_that_is_no_number_limits_nothing(model: Model) -> None:
    schema = {"type": "object", "properties": {
        "a": {"type": "string", "maxLength": "1"}, "b": {"type": "array", "maxItems": "1"},
    }}  # fmt: skip
    raw, calls = call_of(model, "f", '{"a": "Oslo", "b": [1, 2]}')
    assert model.asked([tool("f", schema=schema)]).says(raw).calls == calls


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


@pytest.mark.parametrize(
    "family", ["qwen3-coder", "seed-oss", "minimax-m2", "minicpm5", "glm", "gemma4"]
)
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


def test_schemas_that_are_too_large_in_all_are_refused() -> None:
    parts = Parts()
    parts.rule(GrammarPart("json_schema", "x" * (MAX_GRAMMAR_BYTES - 1), "tools"))
    with pytest.raises(BadRequest, match="in all") as caught:
        parts.rule(GrammarPart("json_schema", "é", "tools"))
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
def test_minicpm5_puts_marks_around_texts(has_tokens: bool) -> None:
    model = MODELS["minicpm5", has_tokens]
    turn = model.asked([tool("f", schema=FORECAST)])
    text = "<b>One</b>\n & ]] two ]]"
    for written, city in (
        (f"<![CDATA[{text}]]>", text),
        ("<![CDATA[]]>", ""),
        ("<![CDAT[]]>", "<![CDAT[]]>"),
        ("a <![CDATA[]]>", "a <![CDATA[]]>"),
    ):
        raw = model.calls(("f", '{"city": "CITY", "unit": ""}')).replace("CITY", written)
        (call,) = turn.says(raw).calls
        assert json.loads(call.arguments) == {"city": city, "unit": ""}
    assert not turn.may_say(raw.replace("a <![CDATA[]]>", "<![CDATA[x"))


@pytest.mark.parametrize("has_tokens", [True, False])
def test_minicpm5_may_say_what_begins_like_a_call(has_tokens: bool) -> None:
    model = MODELS["minicpm5", has_tokens]
    turn = model.asked()
    for text in ("Use <functional> and <function>.", "<function", "So: <function"):
        assert turn.says(text) == Message(text)
    text = "Use <functional>"
    assert turn.says(f"{text}; {model.calls(CALL)}") == Message(f"{text};", calls=[Call(*CALL)])
    assert not turn.may_begin(f"{text}; {model.calls(('no_such', CALL[1]))}")


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
