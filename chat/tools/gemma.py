"""Gemma 4: calls in a notation of its own, in which texts stand between marks.

<|tool_call>call:get_weather{city:<|"|>Paris<|"|>,n_days:3}<tool_call|>

Thoughts are in a channel. It also opens ones that stay empty, before a text or behind it.

<|channel>thought
The weather in Paris.<channel|>
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from chat.events import Event, Reasoning, Splitter
from chat.splitter import ReasoningTags, n_held
from chat.tools.base import Function, Messages, Parts, Tool, ToolFormat, literal
from chat.tools.calls import HeadedCalls, begun, inner_json
from chat.tools.parameters import BRANCHES, MAX_DEPTH, SAYS_NOTHING, References, Schema, limits
from engine.grammar_text import DEFINITIONS
from engine.wire import GrammarPart
from errors import UnsupportedParameter

OPEN, CLOSE, QUOTE = "<|tool_call>", "<tool_call|>", '<|"|>'
TAGS = ReasoningTags("<|channel>", "<channel|>")
LABEL = "thought\n"  # of the channel
NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
KEYWORDS: dict[Any, tuple[str, ...]] = {  # that are understood, by the types that they are about
    "number": NUMBERS,
    "integer": NUMBERS,
    "boolean": (),
    "null": (),
    "string": ("minLength", "maxLength"),
    "array": ("items", "minItems", "maxItems"),
    "object": ("properties", "required", "additionalProperties"),
}
PLAIN_KEY = re.compile(r"[^\s{}\[\]:,<>|\"]+")
# rules that all functions share
ANYTHING = rf"""
text: «{QUOTE}» «inside until {QUOTE}»
any: text | WORD | list | object
list: "[" (any ("," any)*)? "]"
object: "{{" (entry ("," entry)*)? "}}"
entry: key ":" any
key: KEY | text
WORD: /-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?|true|false|null/
KEY: /[^\s{{}}\[\]:,<>|"]+/"""


class Gemma(ToolFormat):
    name = "gemma4"
    opener = OPEN
    visible = (OPEN, CLOSE, QUOTE)
    thinks_again = True

    def fits(self, template: str) -> bool:
        return f"{OPEN}call:" in template

    def reasoning(self, template: str) -> ReasoningTags | None:
        return TAGS if TAGS.close in template else None

    def ending(self, tags: ReasoningTags, functions: Sequence[Function]) -> str:
        return tags.close

    def function(self, tool: Tool, number: int, parts: Parts) -> Function:
        notation = _Notation(tool.arguments, number, parts)
        return Function(tool.name, notation.whole(), notation.rules)

    def calls(self, functions: Sequence[Function], *, is_parallel: bool) -> str:
        more = f" («{OPEN}» call)*" if is_parallel else ""
        calls = " | ".join(
            f"{literal(f'call:{function.name}')} {function.arguments}" for function in functions
        )
        rules = [f"calls: call{more}", f"call: ({calls}) «{CLOSE}»", ANYTHING.strip()]
        return "\n".join([*rules, *(rule for function in functions for rule in function.rules)])

    def call_splitter(self, functions: Sequence[Function], *, only_first: bool) -> Splitter:
        return GemmaSplitter(OPEN, only_first=only_first)

    def thinking_splitter(self, tags: ReasoningTags, rest: Splitter, *, is_open: bool) -> Splitter:
        return Channels(rest, is_open=is_open)

    def history(self, messages: Messages, tools: Sequence[Any]) -> Messages:
        """What was said before calls in a turn before them, since templates put it behind the
        results; these as a part of the calls' turn, since the first templates take no others."""
        turns: list[dict[str, Any]] = []
        for message in messages:
            turn = {key: value for key, value in message.items() if key != "tool_responses"}
            calls = turns[-1] if turns and "tool_calls" in turns[-1] else None
            if turn["role"] == "tool" and calls:
                response = {"name": turn.get("name", "unknown"), "response": turn["content"]}
                calls.setdefault("tool_responses", []).append(response)
            elif turn["role"] == "tool":
                turns.append({"role": "user", "content": turn["content"]})
            else:
                if turn.get("tool_calls") and turn["content"]:
                    turns.append({"role": "model", "content": turn["content"]})
                    turn["content"] = ""
                turns.append(turn)
        return turns


class _Notation:
    """Lark of the arguments of a function. What holds others is a rule of its own, so that nothing
    is written twice."""

    def __init__(self, arguments: GrammarPart, number: int, parts: Parts) -> None:
        self.rules: list[str] = []
        self._arguments = arguments
        self._prefix = f"f{number}_"
        self._parts = parts
        self._references = References(arguments)
        self._meant: dict[str, str] = {}  # rules by the references to schemas

    def whole(self) -> str:
        schema = self._references.root
        if "$ref" in schema:
            return self._referred(schema)
        self._understand(schema, "type", *KEYWORDS["object"])
        return self._object(schema, 0)

    def _value(self, schema: Any, depth: int) -> str:
        if depth > MAX_DEPTH or not isinstance(schema, Mapping):
            if schema is not True:
                self._refuse("a schema that is none" if depth <= MAX_DEPTH else "so deep a schema")
            return "any"
        if "$ref" in schema:
            return self._referred(schema, depth)
        if "const" in schema or isinstance(schema.get("enum"), list):
            self._understand(schema, "const", "enum", "type")
            values = [schema["const"]] if "const" in schema else schema["enum"]
            if not values:
                self._refuse("an empty 'enum'")
            return _one_of([_written(value) for value in values]) if values else "any"
        types = self._types(schema)
        if not types:
            return self._branched(schema, depth)
        self._understand(schema, "type", *(key for type in types for key in KEYWORDS[type]))
        return _one_of([self._of_type(type, schema, depth) for type in types])

    def _types(self, schema: Schema) -> list[str]:
        named = schema.get("type", "object" if "properties" in schema else None)
        named = named if isinstance(named, list) else [named]
        return [type for type in KEYWORDS if type in named]

    def _branched(self, schema: Schema, depth: int) -> str:
        """Of a schema that says no type."""
        for key in BRANCHES:
            branches = schema.get(key)
            if isinstance(branches, list) and branches and (key != "allOf" or len(branches) == 1):
                self._understand(schema, "anyOf", "allOf")
                return _one_of([self._value(one, depth + 1) for one in branches])
        self._understand(schema)
        return "any"

    def _of_type(self, type: str, schema: Schema, depth: int) -> str:
        if type == "string":
            length = self._limits(schema, "minLength", "maxLength")
            return f"«{QUOTE}» «inside {{{length}}} until {QUOTE}»" if length else "text"
        if type == "array":
            return self._list(schema, depth)
        if type == "object":
            return self._object(schema, depth)
        of = self._arguments
        text = json.dumps({"type": type, **{key: schema[key] for key in NUMBERS if key in schema}})
        return self._parts.rule(GrammarPart("json_schema", text, of.param, of.is_lenient))

    def _list(self, schema: Schema, depth: int) -> str:
        item = self._rule(self._value(schema.get("items", True), depth + 1))
        found = self._limits(schema, "minItems", "maxItems") or "0,"
        least, _, most = found.partition(",")
        if most == "0":
            return '"[" "]"'
        more = f"{max(int(least) - 1, 0)},{int(most) - 1 if most else ''}"
        items = f'{item} ("," {item}){{{more}}}'
        return f'"[" {items} "]"' if int(least) else f'"[" ({items})? "]"'

    def _object(self, schema: Schema, depth: int) -> str:
        properties = schema.get("properties")
        required = schema.get("required")
        required = required if isinstance(required, list) else []
        if not isinstance(properties, Mapping) or not properties:
            if required:
                self._refuse("'required' without 'properties'")
            return self._map(schema.get("additionalProperties", True), depth)
        entries = []
        for name in sorted(properties, key=str.lower):  # as its templates show them
            if properties[name] is False:  # which allows no value
                continue
            key = literal(f"{name}:")
            if not PLAIN_KEY.fullmatch(name):
                key = f'«{QUOTE}» {literal(name)} «{QUOTE}» ":"'
            entry = self._rule(f"{key} {self._value(properties[name], depth + 1)}")
            entries.append((entry, name in required))
        rest = ""  # of the entries, where one has been
        whole: list[str] = []  # by the entry that is the first
        for entry, is_required in reversed(entries):
            whole = [f"{entry} {rest}", *([] if is_required else whole or [""])]
            rest = self._rule(f'"," {entry} {rest}' if is_required else f'("," {entry})? {rest}')
        return f'"{{" {_one_of(whole)} "}}"'

    def _map(self, schema: Any, depth: int) -> str:
        """An object with whatever names, and values of this schema."""
        if schema is False:
            return '"{" "}"'
        entry = self._rule(f'key ":" {self._value(schema, depth + 1)}')
        return f'"{{" ({entry} ("," {entry})*)? "}}"'

    def _referred(self, schema: Schema, depth: int = 0) -> str:
        self._understand(schema, "$ref", "type", *DEFINITIONS)
        reference = str(schema["$ref"])
        if reference not in self._meant:
            index = len(self.rules)
            self._meant[reference] = name = self._rule("")
            value = self._value(self._references.at(reference), depth + 1)
            self.rules[index] = f"{name}: {value}"
        return self._meant[reference]

    def _limits(self, schema: Schema, least: str, most: str) -> str:
        found, is_exact = limits(schema, least, most)
        if not is_exact:
            self._refuse(f"this '{least}' or '{most}'")
        return found

    def _rule(self, lark: str) -> str:
        name = f"{self._prefix}{len(self.rules)}"
        self.rules.append(f"{name}: {lark}")
        return name

    def _understand(self, schema: Schema, *keys: str) -> None:
        for key in schema.keys() - SAYS_NOTHING - {*keys, *DEFINITIONS}:
            self._refuse(f"'{key}'")

    def _refuse(self, what: str) -> None:
        if not self._arguments.is_lenient:
            raise UnsupportedParameter(
                f"In calls of this model (gemma4) {what} cannot be enforced; leave `strict` out.",
                param=self._arguments.param,
            )


def _one_of(options: Sequence[str]) -> str:
    return options[0] if len(options) == 1 else f"({' | '.join(dict.fromkeys(options))})"


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


class GemmaSplitter(HeadedCalls):
    """Texts go out as they come, all else as soon as it is sure."""

    _head = re.compile(r"\s*call:([^\s{]+)\s*\{")
    _half_head = re.compile(rf"\s*({begun('call:')}|call:[^\s{{]*\s*)")
    _end = CLOSE
    _MARK = re.compile(rf"{re.escape(QUOTE)}|[{{}}\[\]:,]")

    def _begin(self) -> None:
        super()._begin()
        self._depth = 1  # of brackets
        self._is_text = False  # between its marks

    def _next(self, name: str) -> str | None:
        if self._is_text:
            text, quote, after = self._raw.partition(QUOTE)
            n_sure = len(text) if quote else len(text) - n_held(text, QUOTE)
            self._raw = after if quote else text[n_sure:]
            self._is_text = not quote
            said = inner_json(text[:n_sure]) + ('"' if quote else "")
            return said or None
        mark = self._MARK.search(self._raw)
        if mark is None:
            return None
        word, self._raw = self._raw[: mark.start()].strip(), self._raw[mark.end() :]
        if mark[0] == ":":
            return f"{json.dumps(word, ensure_ascii=False) if word else ''}: "
        if mark[0] == QUOTE:
            self._is_text = True
            return word + '"'
        self._depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(mark[0], 0)
        self._is_whole = self._depth == 0
        return word + (", " if mark[0] == "," else mark[0])


class Channels:
    """Thoughts, wherever their channel opens, and what another splitter makes of all else. In calls
    there are no channels; what closes one that is not open is nothing."""

    _MARK = re.compile(f"{re.escape(TAGS.open)}|{re.escape(TAGS.close)}")

    def __init__(self, rest: Splitter, *, is_open: bool = False) -> None:
        self._rest = rest
        self._held = ""
        self._is_open = is_open
        self._label = ""  # what came of it, while nothing else has
        self._has_begun = False  # something else has come since the channel opened
        self._is_behind = False  # a channel, but for spaces

    @property
    def is_reasoning(self) -> bool:
        return self._is_open

    @property
    def is_calling(self) -> bool:
        return self._rest.is_calling

    def feed(self, text: str) -> list[Event]:
        events: list[Event] = []
        text, self._held = self._held + text, ""
        while mark := self._MARK.search(text):
            before, text = text[: mark.start()], text[mark.end() :]
            opens = mark[0] == TAGS.open
            events += self._said(before.rstrip() if self._is_open and not opens else before)
            if self._rest.is_calling or (opens and self._is_open):
                events += self._said(mark[0])
            elif opens:
                self._is_open, self._has_begun, self._label = True, False, ""
            elif self._is_open:
                self._is_open, self._is_behind = False, True
        n_held_back = max(n_held(text, TAGS.open), n_held(text, TAGS.close))
        n_sure = len(text) - n_held_back
        self._held = text[n_sure:]
        return events + self._said(text[:n_sure])

    def finish(self) -> list[Event]:
        held, self._held = self._held, ""
        return [*self._said(held), *self._rest.finish()]

    def _said(self, text: str) -> list[Event]:
        if self._is_open:
            return self._thought(text)
        if self._is_behind:
            text = text.lstrip()
            self._is_behind = not text
        return self._rest.feed(text) if text else []

    def _thought(self, text: str) -> list[Event]:
        if not self._has_begun:
            text = (self._label + text).lstrip()
            is_label = LABEL.startswith(text)
            self._label = text if is_label else ""
            text = "" if is_label else text.removeprefix(LABEL).lstrip()
            self._has_begun = bool(text)
        return [Reasoning(text)] if text else []
