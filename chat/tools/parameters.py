"""What each argument of a function may be, for families that write arguments one by one, and texts
without quotes."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from engine.wire import GrammarPart

Schema = Mapping[str, Any]
Form = Literal["text", "json", "either"]

TYPES = frozenset({"string", "number", "integer", "boolean", "null", "array", "object"})
SAYS_NOTHING = {"title", "description", "default", "examples", "deprecated", "$comment", "$schema"}
DEFINITIONS = ("$defs", "definitions")
MAX_LOOKS = 1000  # at schemas within one; references may go in circles


@dataclass(frozen=True, slots=True)
class Parameter:
    """An argument. As `text` what is written is its value, as `json` it is JSON, and as `either` it
    is JSON of a type that fits, or else text."""

    name: str
    types: frozenset[str]
    form: Form
    schema: Schema
    is_required: bool = False
    choices: tuple[str, ...] = ()  # as they are written, where there are no others

    def value(self, written: str) -> str:
        """JSON of what was written in another form."""
        if self.form == "either" and _is_json(written, self.types - {"string"}):
            return written.strip()
        return json.dumps(written, ensure_ascii=False)


ANY = Parameter("", TYPES, "either", {})


@dataclass(frozen=True, slots=True)
class _Found:
    """What a schema says, as far as it matters here."""

    types: frozenset[str] = TYPES
    choices: tuple[str, ...] = ()
    is_free: bool = False  # any text is valid, and of what is no text at most null


class Parameters:
    """Those of one function, by the schema of its arguments."""

    def __init__(self, arguments: GrammarPart) -> None:
        self.is_exact = not arguments.is_lenient
        self._root: Schema = json.loads(arguments.text)
        self._n_looks = 0
        schema = self._resolved(self._root)
        properties = schema.get("properties")
        properties = properties if isinstance(properties, Mapping) else {}
        required = schema.get("required")
        required = required if isinstance(required, list) else ()
        self.listed = [self._parameter(name, properties[name], required) for name in properties]
        is_open = schema.get("additionalProperties", not properties) is not False
        self.takes_others = is_open and not self.is_exact
        understood = {"type", "properties", "required", "additionalProperties"}
        self.unknown = sorted(schema.keys() - understood - SAYS_NOTHING - {*DEFINITIONS})

    def _parameter(self, name: str, schema: Any, required: Sequence[str]) -> Parameter:
        found = self._look(schema)
        form: Form = "text" if found.types == {"string"} else "either"
        choices = found.choices
        if "string" not in found.types or (self.is_exact and not choices and not found.is_free):
            form, choices = "json", ()
        definitions = {key: self._root[key] for key in DEFINITIONS if key in self._root}
        whole = {**definitions, **schema} if isinstance(schema, Mapping) else definitions
        return Parameter(name, found.types, form, whole, name in required, choices)

    def _look(self, schema: Any) -> _Found:
        self._n_looks += 1
        if self._n_looks > MAX_LOOKS:
            return _Found()
        schema = self._resolved(schema)
        listed = [schema["const"]] if "const" in schema else schema.get("enum")
        if isinstance(listed, list) and listed:
            written = (one if isinstance(one, str) else json.dumps(one) for one in listed)
            return _Found(frozenset(map(_type_of, listed)), tuple(written))
        alternatives = schema.get("anyOf", schema.get("oneOf"))
        if isinstance(alternatives, list) and alternatives:
            found = [self._look(one) for one in alternatives]
            choices = [one.choices for one in found]
            return _Found(
                frozenset().union(*(one.types for one in found)),
                tuple(text for texts in choices for text in texts) if all(choices) else (),
                all(one.is_free for one in found) and _says_only(schema, "anyOf", "oneOf"),
            )
        named = schema.get("type")
        named = named if isinstance(named, list) else [named]
        types = frozenset(name for name in TYPES if name in named) or TYPES
        if types == {"null"}:
            return _Found(types, ("null",), is_free=True)
        return _Found(types, (), types <= {"string", "null"} and _says_only(schema, "type"))

    def _resolved(self, schema: Any) -> Schema:
        """The schema that is meant, where one only refers to it."""
        while isinstance(schema, Mapping) and self._n_looks < MAX_LOOKS:
            self._n_looks += 1
            if isinstance(reference := schema.get("$ref"), str):
                meant = self._at(reference)
            elif isinstance(parts := schema.get("allOf"), list) and len(parts) == 1:
                meant = parts[0]
            else:
                return schema
            rest = {key: value for key, value in schema.items() if key not in ("$ref", "allOf")}
            schema = {**meant, **rest} if isinstance(meant, Mapping) else rest
        return {}

    def _at(self, reference: str) -> Any:
        found: Any = self._root if reference.startswith("#") else None
        for key in reference.split("/")[1:]:
            key = key.replace("~1", "/").replace("~0", "~")
            found = found.get(key) if isinstance(found, Mapping) else None
        return found


def _says_only(schema: Schema, *keys: str) -> bool:
    return schema.keys() <= SAYS_NOTHING | {*keys}


def _is_json(text: str, types: frozenset[str]) -> bool:
    """It is JSON, of one of these types."""
    try:
        value = json.loads(text, parse_constant=_no_json)
    except (ValueError, RecursionError):
        return False
    found = _type_of(value)
    return found in types or (found == "integer" and "number" in types)


def _no_json(constant: str) -> None:
    raise ValueError(f"{constant} is none")


def _type_of(value: Any) -> str:
    names = {type(None): "null", bool: "boolean", str: "string", int: "integer", float: "number",
             list: "array"}  # fmt: skip
    return names.get(type(value), "object")
