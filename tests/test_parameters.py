"""What the schema of a function says of each argument by itself."""

import json
from typing import Any

import pytest

from chat.tools.parameters import ANY, Parameter, Parameters
from engine.wire import GrammarPart
from errors import BadRequest

COLOUR = {"enum": ["red", "blue"], "type": "string"}
NODE = {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "string"}]}
DEFS = {"$defs": {"colour": COLOUR, "node": NODE, "a/b": {"type": "integer"},
                  "short": {"type": "string", "maxLength": 3}}}  # fmt: skip


def found(schema: Any, *, strict: bool = False, **root: Any) -> Parameters:
    whole = {"type": "object", "properties": {"x": schema}, **DEFS, **root}
    return Parameters(GrammarPart("json_schema", json.dumps(whole), "tools", not strict), "</end>")


def of(schema: Any, *, strict: bool = False) -> Parameter:
    (parameter,) = found(schema, strict=strict).listed
    return parameter


@pytest.mark.parametrize(
    ("schema", "form", "strict_form"),
    [
        ({"type": "string"}, "text", "text"),
        ({"type": "string", "description": "Where."}, "text", "text"),
        ({"type": ["string"]}, "text", "text"),
        ({"type": "string", "minLength": 2}, "text", "text"),
        ({"type": "string", "maxLength": 2.5e5}, "text", "json"),
        ({"type": "string", "pattern": "a+"}, "text", "json"),
        (COLOUR, "text", "text"),
        ({"const": "red"}, "text", "text"),
        ({"$ref": "#/$defs/colour"}, "text", "text"),
        ({"allOf": [{"$ref": "#/$defs/colour"}], "default": "red"}, "text", "text"),
        ({"type": "integer"}, "json", "json"),
        ({"type": ["integer", "null"]}, "json", "json"),
        ({"enum": [1, 2]}, "json", "json"),
        ({"type": "object"}, "json", "json"),
        ({"type": "array", "items": {"type": "string"}}, "json", "json"),
        ({"$ref": "#/$defs/a~1b"}, "json", "json"),
        ({"type": "null"}, "json", "json"),
        ({"enum": ["a", "</end>"]}, "json", "json"),
        ({"type": "string", "anyOf": [{"format": "date"}, {}]}, "text", "json"),
        ({"$ref": "#/$defs/colour", "description": "Which."}, "text", "text"),
        ({"type": ["string", "null"]}, "either", "either"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "either", "either"),
        ({"anyOf": [COLOUR, {"type": "null"}]}, "either", "either"),
        ({"anyOf": [{"type": "string", "maxLength": 5}, {"type": "null"}]}, "either", "json"),
        ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, "either", "json"),
        ({"enum": ["auto", 5]}, "either", "either"),
        ({}, "either", "json"),
        (True, "either", "json"),
        ({"type": "no such"}, "either", "json"),
        ({"type": [{}]}, "either", "json"),
        ({"anyOf": []}, "either", "json"),
        ({"$ref": "#/nowhere"}, "either", "json"),
        ({"$ref": "#anchor"}, "either", "json"),
        ({"$ref": f"#/$defs/node/anyOf/{'9' * 5000}"}, "either", "json"),
        ({"$ref": "#/$defs/a%7e1b"}, "json", "json"),
        ({"allOf": [{"type": "string"}, {"minLength": 1}]}, "text", "json"),
        (COLOUR | {"minLength": 1}, "text", "json"),
        ({"$ref": "http://elsewhere"}, "either", "json"),
        (NODE, "either", "json"),  # in a circle
    ],
)
def test_the_form_of_an_argument(schema: Any, form: str, strict_form: str) -> None:
    assert of(schema).form == form
    assert of(schema, strict=True).form == strict_form


def test_choices_are_listed_as_they_are_written() -> None:
    def choices(schema: Any, **fields: bool) -> list[str]:
        return sorted(of(schema, **fields).choices)

    assert choices(COLOUR) == choices(COLOUR, strict=True) == ["blue", "red"]
    optional = {"anyOf": [{"$ref": "#/$defs/colour"}, {"type": "null"}]}
    assert choices(optional) == ["blue", "null", "red"]
    assert choices({"enum": ["auto", 5, None, True]}) == ["5", "auto", "null", "true"]
    assert choices({"enum": ["auto", 5], "type": "string"}) == ["auto"]
    assert choices({"enum": ["auto", 5, 0.5], "type": ["string", "number"]}) == ["0.5", "5", "auto"]
    assert choices({"enum": ["a", "ab"], "minLength": 2}, strict=True) == []
    assert choices({"anyOf": [COLOUR, {"type": "string"}]}) == []
    assert choices({"enum": [1, 2]}) == []  # JSON, which knows them


def test_the_length_of_a_text_is_a_range() -> None:
    lengths = {(2, None): "2,", (None, 5): "0,5", (2, 5.0): "2,5", (0, 2**53): "", (0, -1): ""}
    for (least, most), length in lengths.items():
        said = {key: n for key, n in (("minLength", least), ("maxLength", most)) if n is not None}
        assert of({"type": "string"} | said).length == length
    for no_number in ("1", [1], True):
        assert of({"type": "string", "maxLength": no_number}).length == ""
        assert of({"type": "string", "maxLength": no_number}, strict=True).form == "json"
    assert of({"$ref": "#/$defs/short"}, strict=True).length == "0,3"
    assert of({"anyOf": [{"$ref": "#/$defs/short"}, {"type": "null"}]}).length == ""
    assert of({"anyOf": [{"$ref": "#/$defs/short"}, {"type": "null"}]}, strict=True).form == "json"


def test_of_choices_that_are_written_alike_the_first_is_meant() -> None:
    for schema, written, value in (
        ({"enum": ["1", 2]}, "1", '"1"'), ({"enum": ["1", 2]}, "2", "2"),
        ({"enum": [True, "true"]}, "true", "true"), ({"enum": ["[]", [1]]}, "[]", '"[]"'),
    ):  # fmt: skip
        assert of(schema).value(written) == value


@pytest.mark.parametrize(
    ("schema", "written", "value"),
    [
        ({"type": "string"}, "null", '"null"'),
        ({"type": ["string", "null"]}, "null", "null"),
        ({"type": ["string", "null"]}, "5", '"5"'),
        ({"type": ["string", "null"]}, " null", '" null"'),
        ({"type": ["string", "integer"]}, "5", "5"),
        ({"type": ["string", "integer"]}, " 5\n", "5"),
        ({"type": ["string", "integer"]}, "5.5", '"5.5"'),
        ({"type": ["string", "number"]}, "5", "5"),
        ({"type": ["string", "boolean"]}, "True", '"True"'),
        ({"type": ["string", "boolean"]}, "1", '"1"'),
        ({}, '{"a": NaN}', r'"{\"a\": NaN}"'),
        ({}, "[" * 100_000, json.dumps("[" * 100_000)),
        ({}, "[1]", "[1]"),
        ({}, "é\n", r'"é\n"'),
    ],
)
def test_what_is_written_is_json_where_that_fits(schema: Any, written: str, value: str) -> None:
    assert of(schema).value(written) == value


def test_what_is_required_and_what_may_be_there_too() -> None:
    assert of({}).is_required is False
    assert found({}, required=["x"]).listed[0].is_required
    assert found({}, required=True).listed[0].is_required is False
    for root, takes in (({}, False), ({"additionalProperties": True}, True)):
        assert bool(found({}, **root).others) is takes
        assert bool(found({}, strict=True, **root).others) is takes
    assert found({}, properties={}).others
    assert not found({}, properties={}, additionalProperties=False).others
    assert found({}, patternProperties={}).others
    assert found({}, properties=5).listed == []
    assert ANY.form == "either"
    integers = found({}, additionalProperties={"type": "integer"})
    assert (integers.of("x").form, integers.of("y").form) == ("either", "json")


def test_what_of_all_arguments_is_not_looked_at() -> None:
    assert found({}, title="x", required=[], additionalProperties=False).unknown == []
    assert found({}, anyOf=[{"required": ["x"]}], minProperties=1).unknown == [
        "anyOf", "minProperties",
    ]  # fmt: skip


def test_a_schema_by_itself_has_what_it_refers_to_and_no_more() -> None:
    def alone(schema: Any, **root: Any) -> Any:
        return found(schema, **root).listed[0].schema

    assert alone({"type": "integer", "description": "How many."}) == {"type": "integer"}
    assert alone({"type": "array", "items": {"$ref": "#/$defs/colour"}}) == {
        "type": "array", "items": {"$ref": "#/$defs/d0"}, "$defs": {"d0": COLOUR},
    }  # fmt: skip
    of_itself = {"type": "array", "items": {"$ref": "#/properties/x"}}
    assert alone(of_itself) == {
        "type": "array", "items": {"$ref": "#/$defs/d0"},
        "$defs": {"d0": {"type": "array", "items": {"$ref": "#/$defs/d0"}}},
    }  # fmt: skip
    union = {"type": "array", "items": {"$ref": "#/$defs/node/anyOf/1"}}
    assert alone(union)["$defs"] == {"d0": {"type": "string"}}
    named = {"type": "object", "properties": {"$defs": {}, "$ref": {}, "enum": {}}}
    assert alone(named) == named
    assert alone({"type": "object", "$defs": {"own": {}}}) == {"type": "object"}
    data = {"type": "array", "const": [{"$ref": "#/$defs/colour"}]}
    assert alone(data) == data
    assert alone({"type": "array", "items": {"$ref": "#/no"}})["items"] == {"$ref": "#/no"}


def test_a_schema_that_is_large_by_its_references_is_refused() -> None:
    large = {"type": "object", "properties": {f"p{n}": {"type": "integer"} for n in range(500)}}
    properties = {f"x{n}": {"type": "array", "items": {"$ref": "#/$defs/d"}} for n in range(100)}
    with pytest.raises(BadRequest, match="too often") as caught:
        found({}, properties=properties, **{"$defs": {"d": large}})
    assert caught.value.param == "tools"


def test_arguments_may_be_one_of_several_objects() -> None:
    a, b = {"properties": {"a": {"type": "string"}}}, {"properties": {"b": {"type": "integer"}}}
    for schema in ({"anyOf": [a, b]}, {"oneOf": [a, {"$ref": "#/$defs/b"}], "$defs": {"b": b}}):
        part = GrammarPart("json_schema", json.dumps(schema), "tools", is_lenient=True)
        forms = {one.name: one.form for one in Parameters(part, "").listed}
        assert forms == {"a": "text", "b": "json"}
    whole = {"$ref": "#/$defs/a", "$defs": {"a": a}, "type": "object"}
    (one,) = Parameters(GrammarPart("json_schema", json.dumps(whole), "tools"), "</end>").listed
    assert one.name == "a"


def test_schemas_that_grow_as_they_are_looked_at_take_no_time() -> None:
    grown = {f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 30} for n in range(6)}
    grown["d6"] = COLOUR
    whole = {"properties": {"x": {"$ref": "#/$defs/d0"}}, "$defs": grown}
    (parameter,) = Parameters(
        GrammarPart("json_schema", json.dumps(whole), "tools"), "</end>"
    ).listed
    assert sorted(parameter.choices) == ["blue", "red"]
