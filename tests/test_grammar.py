"""Constraints on the byte vocabulary of the fake backend: what is accepted is enforced, what cannot
be enforced is refused, and nothing else happens."""

import contextlib
import json
import random
import re
import time
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.backends.fake import FakeTokenizer
from engine.deep import in_depth
from engine.grammar import MOST_PATTERNS, Compiler, GrammarState
from engine.wire import MAX_GRAMMAR_BYTES, Grammar, GrammarPart
from errors import BadRequest
from tests.chat_formats import TOOLS, prompt, user

TOKENIZER = FakeTokenizer()
COMPILER = Compiler(TOKENIZER)


def write(grammar: Grammar, seed: int, max_tokens: int = 400) -> tuple[str, bool]:
    """Text of random allowed tokens, which ends when it may, and whether it is a whole answer."""
    dice = np.random.default_rng(seed)
    constraint = COMPILER.compile(grammar)
    out = bytearray()
    for _ in range(max_tokens):
        logits = dice.standard_normal(TOKENIZER.n_vocab).astype(np.float32)
        logits[256] += 6  # to the end where that is allowed
        logits[128:256] -= 9
        constraint.apply(logits)
        token = int(logits.argmax())
        assert logits[token] > -np.inf
        constraint.accept(token)
        if TOKENIZER.ends_generation(token):
            return out.decode(), True
        out += TOKENIZER.piece(token)
    return out.decode(errors="replace"), constraint.is_complete


def schema(value: Any) -> Grammar:
    return Grammar((GrammarPart("json_schema", json.dumps(value), "response_format"),))


def lark(text: str) -> Grammar:
    return Grammar((GrammarPart("grammar", text, "grammar"),))


ENFORCED: list[Any] = [
    {"type": "object"},
    {},
    True,
    {"type": "string", "pattern": r"^\d{3}-\d{4}$"},
    {"type": "string", "pattern": r"^\w+$"},
    {"type": "array", "items": {"type": "integer"}, "maxItems": 5000},
    {"type": "object", "properties": {'a"b\\c': {"type": "integer"}}, "required": ['a"b\\c']},
    {"type": "object", "properties": {"under_score": {"const": 1}, "schön": {"const": "世"}}},
    {"type": "integer", "minimum": 3, "maximum": 11},
    {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    {"type": "number", "multipleOf": 5},
    {"enum": ["red", 1, None, {"a": [1]}]},
    {"enum": [{"format": "x", "$schema": "y", "minProperties": 1}]},  # which is no schema
    {"type": ["string", "null"], "maxLength": 4},
    {"type": "string", "minLength": 2, "maxLength": 5},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "uuid"},
    {"type": "string", "format": "path", "maxLength": 3},  # which JSON Schema does not know
    {"type": "object", "properties": {"format": {"type": "string", "format": "int32"}},
     "required": ["format"], "additionalProperties": False},
    {"anyOf": [{"type": "integer"}, {"type": "boolean"}]},
    {"oneOf": [{"type": "integer"}, {"type": "boolean"}]},
    {"allOf": [{"type": "integer"}, {"minimum": 5}, {"maximum": 9}]},
    {"type": "array", "prefixItems": [{"type": "boolean"}], "items": {"type": "null"},
     "minItems": 2, "maxItems": 3},
    {"type": "object", "patternProperties": {"^x": {"type": "integer"}},
     "additionalProperties": False},
    {"type": "object", "additionalProperties": {"type": "boolean"}},
    {"$defs": {"tree": {"type": "object", "properties": {
        "left": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]}},
        "required": ["left"], "additionalProperties": False}}, "$ref": "#/$defs/tree"},
    {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
     "required": ["name"], "additionalProperties": False, "title": "Person",
     "description": "Somebody", "$schema": "https://json-schema.org/draft/2020-12/schema"},
]  # fmt: skip


@pytest.mark.parametrize("value", ENFORCED, ids=lambda value: json.dumps(value)[:60])
def test_what_is_accepted_is_enforced(value: Any) -> None:
    for seed in range(6):
        text, is_whole = write(schema(value), seed)
        if is_whole:
            jsonschema.validate(json.loads(text), value)


REFUSED: list[tuple[Any, str]] = [
    ({"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}},
     "$.properties.a: 'uniqueItems'"),
    ({"not": {"type": "string"}}, "$: 'not'"),
    ({"if": {"type": "string"}, "then": {"minLength": 3}}, "$: 'if'"),
    ({"items": {"dependentRequired": {"a": ["b"]}}}, "$.items: 'dependentRequired'"),
    ({"type": "object", "minProperties": 2}, "$: 'minProperties'"),
    ({"type": "object", "dependentSchemas": {"maxProperties": {}}}, "$: 'dependentSchemas'"),
    ({"properties": {"maxProperties": {"maxProperties": 2}}},
     "$.properties.maxProperties: 'maxProperties'"),
    ({"type": "array", "contains": {"type": "string"}}, "'contains'"),
    ({"oneOf": [{"type": "string"}, {"type": "string", "minLength": 2}]}, "oneOf"),
    ({"type": "string", "pattern": "(?=a)b"}, "$: the pattern '(?=a)b' cannot"),
    ({"properties": {"a": {"pattern": "^a"}, "b": {"pattern": "^(a)\\1"}}},
     r"$.properties.b: the pattern '^(a)\1' cannot"),
    ({"type": "object", "patternProperties": {r"\bx": {}}}, r"$: the pattern '\bx' cannot"),
    ({"properties": {"regex": {"type": "string", "format": "regex"}}},
     "$.properties.regex: the format 'regex' cannot"),
    ({"type": "frob"}, "frob"),
    ({"$ref": "#/$defs/none"}, "$defs/none"),
    ({"$ref": "http://127.0.0.1/x"}, "127.0.0.1"),
    ({"$ref": "file:///etc/passwd"}, "passwd"),
    ({"type": "integer", "minimum": 3, "maximum": 2}, "minimum"),
    ({"enum": []}, "empty"),
    ({"properties": {"a": 1}}, "object"),
    (False, "false"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "why"), REFUSED, ids=lambda value: json.dumps(value)[:60])
def test_what_cannot_be_enforced_is_refused_and_named(value: Any, why: str) -> None:
    with pytest.raises(BadRequest) as caught:
        COMPILER.compile(schema(value))
    assert caught.value.param == "response_format"
    assert why in caught.value.message


@pytest.mark.parametrize("is_lenient", [False, True])
@pytest.mark.parametrize("place", ["draft-04", "draft-06", "draft-07", "draft/2019-09",
                                   "draft/2020-12", "draft-03", "draft/2030-01", ""])  # fmt: skip
def test_the_address_of_a_draft_refuses_no_schema(place: str, is_lenient: bool) -> None:
    own = f"//json-schema.org/{place}/schema".replace("///", "//")
    for address in (f"http:{own}#", f"https:{own}#", f"http:{own}", f"https:{own}", place, "a b"):
        said = {"$schema": address}
        inner = {**said, "type": "object", "properties": {"$schema": {**said, "enum": ["x"]}},
                 "required": ["$schema"], "additionalProperties": False}  # fmt: skip
        value = {**said, "anyOf": [inner]}
        part = GrammarPart("json_schema", json.dumps(value), "tools", is_lenient)
        assert write(Grammar((part,)), 1) == ('{"$schema": "x"}', True)


def test_a_schema_is_read_by_its_draft() -> None:
    for scheme in ("http", "https"):
        address = f"{scheme}://json-schema.org/draft-07/schema#"
        pair = {"$schema": address, "type": "array", "items": [{"const": 1}, {"const": 2}],
                "minItems": 2, "additionalItems": False}  # fmt: skip
        assert write(schema(pair), 1) == ("[1, 2]", True)


EMAIL = r"^(?!\.)(?!.*\.\.)([\w'+\-\.]*)[\w+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$"
READ_OVER: list[tuple[Any, Any]] = [
    ({"type": "string", "pattern": EMAIL, "maxLength": 4}, {"type": "string", "maxLength": 4}),
    ({"type": "object", "properties": {"to": {"pattern": EMAIL}, "pattern": {"pattern": "^[ab]$"}},
      "required": ["to", "pattern"], "additionalProperties": False},
     {"properties": {"pattern": {"pattern": "^[ab]$"}}, "required": ["to", "pattern"]}),
    ({"type": "object", "patternProperties": {"^(?!x)": {"type": "null"}, "^y$": {"const": 1}},
      "additionalProperties": False},
     {"patternProperties": {"^y$": {"const": 1}}}),
    ({"$ref": "#/$defs/word", "$defs": {"word": {"type": "string", "pattern": []}}},
     {"type": "string"}),
]  # fmt: skip


@pytest.mark.parametrize(("value", "enforced"), READ_OVER, ids=lambda value: json.dumps(value)[:60])
def test_patterns_that_cannot_be_enforced_are_read_over_where_that_is_allowed(
    value: Any, enforced: Any
) -> None:
    part = GrammarPart("json_schema", json.dumps(value), "tools", is_lenient=True)
    texts = [write(Grammar((part, part), "start: @p0 | @p1"), seed) for seed in range(6)]
    whole = [json.loads(text) for text, is_whole in texts if is_whole]
    assert whole
    for answer in whole:
        jsonschema.validate(answer, enforced)


def test_few_patterns_are_looked_at_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    is_beyond = Compiler._is_beyond

    def note(compiler: Compiler, pattern: str) -> bool:
        asked.append(pattern)
        return is_beyond(compiler, pattern)

    monkeypatch.setattr(Compiler, "_is_beyond", note)
    for n_different, n_asked in ((2, 2), (MOST_PATTERNS + 1, 0)):
        asked.clear()
        properties = {f"p{n}": {"pattern": f"(?=a{{{n % n_different}}})"} for n in range(300)}
        value = {"properties": properties, "additionalProperties": False}
        part = GrammarPart("json_schema", json.dumps(value), "tools", is_lenient=True)
        state = COMPILER.compile(Grammar((part,)))
        assert (len(asked), bool(state.unenforced)) == (n_asked, not n_asked)


NONSENSE: list[tuple[Any, Any]] = [
    ({"type": "object", "properties": {"a": {"type": "float"}}}, {"type": "object"}),
    ({"type": "object", "properties": {"a": {"pattern": EMAIL}, "b": {"$ref": "#/$defs/none"}}},
     {"type": "object"}),
    ({"type": "object", "properties": {}, "required": "a"}, {"type": "object"}),
    ({"type": ["integer", "null"], "minimum": "1"}, {"type": ["integer", "null"]}),
    ({"type": "any"}, {}),
    ({"$ref": "http://127.0.0.1/x"}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("value", "enforced"), NONSENSE, ids=lambda value: json.dumps(value)[:60])
def test_of_a_schema_that_means_nothing_the_type_is_left_where_that_is_allowed_and_it_is_named(
    value: Any, enforced: Any
) -> None:
    """Others are enforced all the same."""
    with pytest.raises(BadRequest):
        COMPILER.compile(schema(value))
    good = GrammarPart("json_schema", json.dumps({"type": "boolean"}), "tools[0]", is_lenient=True)
    bad = GrammarPart("json_schema", json.dumps(value), "tools[1]", is_lenient=True)
    grammar = Grammar((good, bad), 'start: @p0 " " @p1')
    for _ in range(2):  # also where it is known
        assert COMPILER.compile(grammar).copy().unenforced == ("tools[1]",)
    whole = [text for text, is_whole in (write(grammar, seed) for seed in range(6)) if is_whole]
    assert whole
    for text in whole:
        first, _, second = text.partition(" ")
        assert first in ("true", "false")
        jsonschema.validate(json.loads(second), enforced)
    assert COMPILER.compile(Grammar((good,))).unenforced == ()


def after(grammar: Grammar, text: str) -> GrammarState | None:
    """The state behind a text; None where it is not allowed."""
    state = COMPILER.compile(grammar)
    for byte in text.encode():
        logits = np.zeros(TOKENIZER.n_vocab, np.float32)
        state.apply(logits)
        if logits[byte] < 0:
            return None
        state.accept(byte)
    return state


def is_accepted(grammar: str, text: str) -> bool:
    state = after(lark(grammar), text)
    return state is not None and state.is_complete


GRAMMARS = [
    ('root ::= "yes" | "no" digits\ndigits ::= [0-9]+', r"yes|no[0-9]+"),
    ('root ::= a-b\na-b ::= "x"{2,3}', r"xx|xxx"),
    ('start: "a" NUMBER\nNUMBER: /[0-9]{1,3}/', r"a[0-9]{1,3}"),
]


@pytest.mark.parametrize(("text", "pattern"), GRAMMARS)
def test_gbnf_and_lark_are_enforced(text: str, pattern: str) -> None:
    for seed in range(5):
        said, is_whole = write(lark(text), seed, max_tokens=40)
        assert not is_whole or re.fullmatch(pattern, said)


SPELLINGS = [
    (r'"d\u00e9cembre" "\xe9\x09"', "décembreé\t", "d\ue9cembreé\t"),
    (r'"\U0001F600\u4e16"', "😀世", "F600世"),
    (r'"\\u00e9" "\"[]-/#."', '\\u00e9"[]-/#.', 'é"[]-/#.'),
    (r'"\[a\]\-" "^&&"', "[a]-^&&", "a-^&&"),
    ('"a\nb\x7f"', "a\nb\x7f", "a b\x7f"),
    (r'. . "."  # a "." is [.', "\n😀.", "\n😀a"),
    (r"[\u00e0-\u00ff] [\U0001F600]", "é😀", "e😀"),
    (r"[a&&b] [^&&] [~~] [+--]", "&a~,", "&&~,"),
    (r"[-a] [a-] [a\-z] [^-] [a^]", "---a^", "--ya^"),
    (r"[\]\\] [^\]] [\[/] [^^]", "\\\n/-", "\\]/-"),
    (r"[^\x22\n] [ -~] [a-zé-ü]", "'~é", '"~é'),
]


@pytest.mark.parametrize(("rule", "right", "wrong"), SPELLINGS)
def test_characters_of_gbnf_are_what_llama_cpp_takes_them_for(
    rule: str, right: str, wrong: str
) -> None:
    grammar = f"root ::= {rule}\n"
    assert (is_accepted(grammar, right), is_accepted(grammar, wrong)) == (True, False)


WAYS = [
    ('root ::= thought "Answer: " [0-9]+\nthought ::= [^\\n]*', "An An Answer: 42", "Answer: "),
    ('root ::= text "END"\ntext ::= .*', "THE EEND\n END", "EN"),
    ('root ::= .* "END"', "THE EEND\n END", "EN"),
    ('root ::= w " is " w "."\nw ::= [A-Za-z ]+', "This is it is not.", "This is."),
    ('root ::= word "x"\nword ::= [a-z]+', "axbx", "ab"),
    ('root ::= "ab"+ "abc"?', "abababc", "ababa"),
    ('root ::= (text | tool)*\ntext ::= [^<]+\ntool ::= "<" [a-z]+ ">"', "Do <it> now", "<It>"),
    ('root ::= step+ "Answer: " .*\nstep ::= [^\\n]+ "\\n"?', "One\nTwo\nAnswer: 3", "One\n2\nA"),
    ("root ::= " + " | ".join(f'"{n}."' for n in range(3000)), "2999.", "3000."),
    ('root ::= "(" root* ")" | text\ntext ::= [a-z]+', "((ab)(c))", "((ab)"),
    ('root ::= a-b a_b aB\na-b ::= "x"\na_b ::= "y"\naB ::= "z"', "xyz", "xy"),
]  # fmt: skip


@pytest.mark.parametrize(("grammar", "right", "wrong"), WAYS)
def test_gbnf_takes_every_way_that_leads_on(grammar: str, right: str, wrong: str) -> None:
    assert (is_accepted(grammar, right), is_accepted(grammar, wrong)) == (True, False)


@pytest.mark.parametrize("grammar", ["root ::= .{1,30}", r"root ::= [^\n]+", "root ::= .*"])
def test_gbnf_swallows_neither_thoughts_nor_calls(grammar: str) -> None:
    part = GrammarPart("grammar", grammar, "grammar")
    made = prompt("qwen3", user("Hi"), TOOLS, answer=part)  # in a vocabulary with no such tokens
    assert made.grammar

    assert after(made.grammar, f"<think>\n{'Hm, oh. ' * 9}\nSo:\n</think>\n\nAnswer")
    call = '<tool_call>\n{"name": "get_time", "arguments": {"city": "Rome"}}\n</tool_call>'
    assert after(made.grammar, call)
    assert not after(made.grammar, call.replace("time", "rain"))
    assert not after(made.grammar, call.replace('"Rome"', "5"))


CHAINS = {
    "gbnf": lambda n: "root ::= r0\n" + "".join(f"r{i} ::= r{i + 1}\n" for i in range(n))
    + f'r{n} ::= "x"',
    "recursive gbnf": lambda n: 'root ::= "(" root ")" | r0\n'
    + "".join(f"r{i} ::= r{i + 1}\n" for i in range(n)) + f'r{n} ::= "x"',
    "lark": lambda n: "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(n))
    + f'r{n}: "x"',
}  # fmt: skip


@pytest.mark.parametrize("kind", CHAINS)
def test_a_long_chain_of_rules_ends_no_process(kind: str) -> None:
    """In a thread with the stack that a worker gives it."""
    part = GrammarPart("grammar", CHAINS[kind](12_000), "grammar")
    state = in_depth(lambda _: COMPILER.compile(Grammar((part,))))
    logits = np.zeros(TOKENIZER.n_vocab, np.float32)
    state.apply(logits)
    assert logits[ord("x")] == 0


@pytest.mark.parametrize(
    "grammar", ['start: NAME " ::= " NAME\nNAME: /[a-z]+/', "start: /a ::= b/"]
)
def test_what_gbnf_looks_like_may_stand_in_a_literal_of_lark(grammar: str) -> None:
    assert (is_accepted(grammar, "a ::= b"), is_accepted(grammar, "a")) == (True, False)


@pytest.mark.parametrize(
    "text",
    [r'root ::= "\q"', r'root ::= "\ud83d"', r'root ::= "\U00110000"', r'root ::= "\u12"',
     r"root ::= [b-a]", "root ::= []", "nonsense", 'root ::= "a',
     "root ::= undefined", "a ::= b", 'root ::= (' * 2000, "start: rule",
     "::=", "::=::=", "start: /(?=x)y/", "\0", "start: start", "%json {"],
)  # fmt: skip
def test_a_grammar_that_means_nothing_is_refused(text: str) -> None:
    with pytest.raises(BadRequest) as caught:
        COMPILER.compile(lark(text))
    assert caught.value.param == "grammar"


def test_a_grammar_that_is_too_large_is_refused_at_once() -> None:
    with pytest.raises(BadRequest, match="bytes"):
        COMPILER.compile(lark("x" * (MAX_GRAMMAR_BYTES + 1)))


@pytest.mark.parametrize(
    "value",
    [
        {"type": "string", "minLength": 100_000},
        {"type": "string", "maxLength": 1_000_000},
        {"anyOf": [{"properties": {f"p{i}{j}": {"type": "string"} for j in range(30)}}
                   for i in range(30)]},
        {"type": "string", "pattern": "^(a+)+(b+)+(c|d){1,500}$"},
    ],
    ids=lambda value: json.dumps(value)[:40],
)  # fmt: skip
def test_large_schemas_take_little_time(value: Any) -> None:
    started_at = time.perf_counter()
    with contextlib.suppress(BadRequest):
        write(schema(value), 1, max_tokens=20)
    assert time.perf_counter() - started_at < 5


def test_copies_go_their_own_ways() -> None:
    first = COMPILER.compile(schema({"enum": ["aa", "bb"]}))
    for token in b'"a':
        first.accept(token)
    second = first.copy()
    for token in b'a"':
        first.accept(token)
    assert (first.is_complete, second.is_complete) == (True, False)


def test_what_was_compiled_is_kept() -> None:
    grammar = schema({"type": "array", "items": {"enum": list(range(500))}})
    COMPILER.compile(grammar)
    started_at = time.perf_counter()
    for _ in range(20):
        COMPILER.compile(grammar)
    assert time.perf_counter() - started_at < 0.5


LEAF = st.sampled_from([
    {"type": "string"}, {"type": "integer"}, {"type": "number"}, {"type": "boolean"}, True, {},
    {"type": "null"}, {"const": "x\"y"}, {"enum": [1, "a", None]},
    {"type": "string", "maxLength": 3},
    {"type": "integer", "minimum": -5, "maximum": 300}, {"type": "string", "pattern": "^[a-c]+$"},
    {"not": {}}, {"type": "string", "format": "time"}, {"pattern": "["}, {"type": 5}, False,
])  # fmt: skip
SCHEMA = st.recursive(
    LEAF,
    lambda inner: st.one_of(
        st.builds(lambda items: {"type": "array", "items": items, "maxItems": 3}, inner),
        st.builds(
            lambda properties, required: {
                "type": "object",
                "properties": properties,
                "required": list(properties)[:required],
                "additionalProperties": False,
            },
            st.dictionaries(st.sampled_from(["a", "b_c", "é", '"', ""]), inner, max_size=3),
            st.integers(0, 3),
        ),
        st.builds(lambda options: {"anyOf": options}, st.lists(inner, min_size=1, max_size=3)),
        st.builds(lambda one, two: {"allOf": [one, two]}, inner, inner),
    ),
    max_leaves=8,
)


@settings(max_examples=200)
@given(value=SCHEMA, seed=st.integers(0, 2**32 - 1))
def test_any_schema_is_refused_or_enforced(value: Any, seed: int) -> None:
    try:
        text, is_whole = write(schema(value), seed, max_tokens=120)
    except BadRequest:
        return
    if is_whole:
        with contextlib.suppress(jsonschema.SchemaError):  # no schema at all, and read over
            jsonschema.validate(json.loads(text), value)


@settings(max_examples=150)
@given(text=st.one_of(st.text(max_size=60), st.text('root:=" |()[]{}*+?/\\a-z\n', max_size=60)))
def test_any_text_is_refused_or_a_grammar(text: str) -> None:
    with contextlib.suppress(BadRequest):
        write(lark(text), random.getrandbits(16), max_tokens=10)
