"""Gemma 4: calls in a notation of its own, in which texts stand between control tokens.

<|tool_call>call:get_weather{city:<|"|>Paris<|"|>,n_days:3}<tool_call|>

Thoughts are in a channel: <|channel>thought
The weather in Paris.<channel|>
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from chat.events import CallArguments, CallBegin, Event, Splitter
from chat.splitter import ReasoningTags, n_held
from chat.tools.base import (
    Function,
    Messages,
    OpenedCalls,
    Tool,
    ToolFormat,
    added,
    after_close,
    begun,
    literal,
    pattern,
)
from chat.tools.parameters import DEFINITIONS, SAYS_NOTHING, Schema
from engine.wire import GrammarPart
from errors import UnsupportedParameter

OPEN, CLOSE, QUOTE = "<|tool_call>", "<tool_call|>", '<|"|>'
TAGS = ReasoningTags("<|channel>", "<channel|>", label="thought\n")
WORDS = ("number", "integer", "boolean", "null")  # types that are written as in JSON
PLAIN_KEY = re.compile(r"[^\s{}\[\]:,<>|\"]+")
NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
MAX_DEPTH = 32  # of schemas in one another
# rules that all functions share
ANYTHING = rf"""
text: «{QUOTE}» «inside until {QUOTE}»
any: text | WORD | list | object
list: "[" (any ("," any)*)? "]"
object: "{{" (entry ("," entry)*)? "}}"
entry: (KEY | text) ":" any
WORD: /-?(0|[1-9][0-9]{{0,15}})(\.[0-9]{{1,16}})?([eE][+-]?[0-9]{{1,2}})?|true|false|null/
KEY: /[^\s{{}}\[\]:,<>|"]+/"""


class Gemma(ToolFormat):
    name = "gemma4"
    opener = OPEN
    visible = (OPEN, CLOSE, QUOTE)

    def fits(self, template: str) -> bool:
        return f"{OPEN}call:" in template

    def reasoning(self, template: str) -> ReasoningTags | None:
        return TAGS if TAGS.close in template else None

    def function(self, tool: Tool, parts: list[GrammarPart]) -> Function:
        notation = _Notation(tool, parts)
        return Function(tool.name, notation.whole(), rules=notation.rules)

    def calls(self, functions: Sequence[Function], *, is_parallel: bool) -> str:
        more = f" («{OPEN}» call)*" if is_parallel else ""
        calls = " | ".join(
            f"{literal(f'call:{function.name}')} {function.arguments}" for function in functions
        )
        rules = [f"calls: call{more}", f"call: ({calls}) «{CLOSE}»", ANYTHING.strip()]
        return "\n".join([*rules, *(rule for function in functions for rule in function.rules)])

    def call_splitter(self, functions: Sequence[Function], *, only_first: bool) -> Splitter:
        return GemmaSplitter(OPEN, only_first=only_first)

    def history(self, messages: Messages, tools: Sequence[Any]) -> Messages:
        """The results of calls as a part of their turn: the first templates take no others."""
        turns: list[dict[str, Any]] = []
        for message in messages:
            if message["role"] == "tool" and turns and turns[-1].get("tool_calls"):
                response = {"name": message.get("name", "unknown"), "response": message["content"]}
                turns[-1].setdefault("tool_responses", []).append(response)
            else:
                turns.append(dict(message))
        return turns


class _Notation:
    """Lark of the arguments of a function, with rules of its own where schemas are named."""

    def __init__(self, tool: Tool, parts: list[GrammarPart]) -> None:
        self.rules: list[str] = []
        self._tool = tool
        self._parts = parts
        self._root: Schema = json.loads(tool.arguments.text)
        self._words: dict[str, str] = {}  # rules of parts by their schemas
        self._meant: dict[str, str] = {}  # rules by the references to schemas

    def whole(self) -> str:
        return self._value(self._root, 0)

    def _value(self, schema: Any, depth: int) -> str:
        if not isinstance(schema, Mapping) or depth > MAX_DEPTH:
            return self._any(f"a schema {depth} deep" if schema else "a schema of all")
        if isinstance(reference := schema.get("$ref"), str):
            self._understand(schema, "$ref", *DEFINITIONS)
            return self._referred(reference, depth)
        if "const" in schema or isinstance(schema.get("enum"), list):
            self._understand(schema, "const", "enum", "type")
            values = [schema["const"]] if "const" in schema else schema["enum"]
            return self._one_of([_written(value) for value in values])
        for key in ("anyOf", "oneOf", "allOf"):
            found = schema.get(key)
            if isinstance(found, list) and found and (key != "allOf" or len(found) == 1):
                self._understand(schema, "anyOf", "allOf", *DEFINITIONS)
                return self._one_of([self._value(one, depth + 1) for one in found])
        named = schema.get("type")
        types = named if isinstance(named, list) else [named]
        return self._one_of([self._of_type(type, schema, depth) for type in types])

    def _of_type(self, type: Any, schema: Schema, depth: int) -> str:
        if type in WORDS:
            limits = {key: value for key, value in schema.items() if key in NUMBERS}
            self._understand(schema, "type", *NUMBERS)
            text = json.dumps({"type": type} | (limits if type in WORDS[:2] else {}))
            if text not in self._words:
                of = self._tool.arguments
                part = GrammarPart("json_schema", text, of.param, of.is_lenient)
                self._words[text] = added(self._parts, part)
            return self._words[text]
        if type == "string":
            self._understand(schema, "type", "minLength", "maxLength")
            least, most = _limits(schema, "minLength", "maxLength")
            return self._text(least, most) if least or most is not None else "text"
        if type == "array":
            self._understand(schema, "type", "items", "minItems", "maxItems")
            return self._list(schema, depth)
        if type == "object":
            understood = ("type", "properties", "required", "additionalProperties", *DEFINITIONS)
            self._understand(schema, *understood)
            return self._object(schema, depth)
        return self._any("a value of any type")

    def _text(self, least: int, most: int | None) -> str:
        length = f"/(.|\\n){{{least},{'' if most is None else most}}}/"
        name = self._rule(f"{length} & ~/(.|\\n)*{pattern(QUOTE)}(.|\\n)*/", is_terminal=True)
        return f"«{QUOTE}» {name} «{QUOTE}»"

    def _list(self, schema: Schema, depth: int) -> str:
        item = self._value(schema.get("items", {}), depth + 1)
        least, most = _limits(schema, "minItems", "maxItems")
        if most == 0:
            return '"[" "]"'
        more = f"{max(least - 1, 0)},{'' if most is None else most - 1}"
        items = f'{item} ("," {item}){{{more}}}'
        return f'"[" {items} "]"' if least else f'"[" ({items})? "]"'

    def _object(self, schema: Schema, depth: int) -> str:
        properties = schema.get("properties")
        if not isinstance(properties, Mapping) or not properties:
            is_empty = schema.get("additionalProperties") is False
            return '"{" "}"' if is_empty else "object"
        required = schema.get("required")
        required = required if isinstance(required, list) else ()
        entries = []
        for name in sorted(properties, key=str.lower):  # as its template shows them
            key = literal(f"{name}:")
            if not PLAIN_KEY.fullmatch(name):
                key = f'«{QUOTE}» {literal(name)} «{QUOTE}» ":"'
            entries.append((f"{key} {self._value(properties[name], depth + 1)}", name in required))
        rest = ""  # of the entries, where one has been
        begun: list[str] = []  # by the entry that is the first
        for entry, is_required in reversed(entries):
            begun = [f"{entry} {rest}", *([] if is_required else begun or [""])]
            rest = self._rule(f'"," {entry} {rest}' if is_required else f'("," {entry})? {rest}')
        return f'"{{" {self._one_of(begun)} "}}"'

    def _referred(self, reference: str, depth: int) -> str:
        if reference not in self._meant:
            found: Any = self._root if reference.startswith("#") else None
            for key in reference.split("/")[1:]:
                found = found.get(key) if isinstance(found, Mapping) else None
            index = len(self.rules)
            self._meant[reference] = name = self._rule("")
            self.rules[index] = f"{name}: {self._value(found, depth + 1)}"
        return self._meant[reference]

    def _rule(self, lark: str, *, is_terminal: bool = False) -> str:
        name = f"r{self._tool.name.encode().hex()}_{len(self.rules)}"
        name = name.upper() if is_terminal else name
        self.rules.append(f"{name}: {lark}")
        return name

    def _one_of(self, options: Sequence[str]) -> str:
        return options[0] if len(options) == 1 else f"({' | '.join(dict.fromkeys(options))})"

    def _any(self, what: str) -> str:
        self._refuse(what)
        return "any"

    def _understand(self, schema: Schema, *keys: str) -> None:
        for key in schema.keys() - SAYS_NOTHING - {*keys}:
            self._refuse(f"'{key}'")

    def _refuse(self, what: str) -> None:
        arguments = self._tool.arguments
        if not arguments.is_lenient:
            raise UnsupportedParameter(
                f"In calls of this model (gemma4) {what} cannot be enforced; leave `strict` out.",
                param=arguments.param,
            )


def _limits(schema: Schema, least: str, most: str) -> tuple[int, int | None]:
    found = [schema.get(key) for key in (least, most)]
    low, high = (limit if isinstance(limit, int) and limit >= 0 else None for limit in found)
    return low or 0, high


def _written(value: Any) -> str:
    """Lark of one value."""
    if isinstance(value, str):
        return f"«{QUOTE}» {literal(value)} «{QUOTE}»"
    if isinstance(value, list):
        return _listed("[", map(_written, value), "]")
    if isinstance(value, Mapping):
        return _listed("{", (f'{_written(key)} ":" {_written(value[key])}' for key in value), "}")
    return literal(json.dumps(value))


def _listed(begin: str, items: Iterable[str], end: str) -> str:
    return f"{literal(begin)} {(literal(',')).join(items)} {literal(end)}"


class GemmaSplitter(OpenedCalls):
    """Texts go out as they come, all else as soon as it is sure."""

    _HEAD = re.compile(r"\s*call:([^\s{]+)\s*\{")
    _HALF = re.compile(rf"\s*({begun('call:')}|call:[^\s{{]*\s*)")  # of what may be one
    _MARK = re.compile(rf"{re.escape(QUOTE)}|[{{}}\[\]:,]")

    def _begin(self) -> None:
        self._raw = ""  # what was not read yet
        self._depth = 0  # of brackets
        self._is_text = False  # between its marks
        self._is_whole = False

    @property
    def is_calling(self) -> bool:
        return self._in_call and not self._is_whole

    def _unread(self) -> str:
        return "" if self._depth or self._is_whole else OPEN + self._raw

    def _read(self, text: str) -> tuple[list[Event], str | None]:
        self._raw += text
        events: list[Event] = []
        if not self._depth and not self._is_whole:
            if not (head := self._HEAD.match(self._raw)):
                if self._HALF.fullmatch(self._raw):
                    return [], None
                text, self._raw = self._raw, ""
                return [], text
            self._raw = self._raw[head.end() :]
            self._depth = 1
            events.append(CallBegin(head[1]))
            said = "{"
        else:
            said = ""
        said += "".join(iter(self._next, None))
        if said:
            events.append(CallArguments(said))
        return events, after_close(self._raw, CLOSE) if self._is_whole else None

    def _next(self) -> str | None:
        """JSON of the next piece; None if more must come first."""
        if self._is_text:
            text, quote, after = self._raw.partition(QUOTE)
            n_sure = len(text) if quote else len(text) - n_held(text, QUOTE)
            self._raw = after if quote else text[n_sure:]
            self._is_text = not quote
            said = json.dumps(text[:n_sure], ensure_ascii=False)[1:-1] + ('"' if quote else "")
            return said or None
        mark = self._MARK.search(self._raw) if self._depth else None
        if mark is None:
            return None
        word, self._raw = self._raw[: mark.start()].strip(), self._raw[mark.end() :]
        if mark[0] == ":":
            return f"{json.dumps(word, ensure_ascii=False) if word else ''}: "
        said = _word(word)
        if mark[0] == QUOTE:
            self._is_text = True
            return said + '"'
        self._depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(mark[0], 0)
        self._is_whole = self._depth == 0
        return said + (", " if mark[0] == "," else mark[0])


def _word(word: str) -> str:
    """JSON of what stands without marks, which is JSON but where a model imitates what its template
    makes of null."""
    return "null" if word == "None" else word
