"""What each argument of a function may be, for families that write arguments one by one, and texts
without quotes."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import unquote

from engine.grammar_text import BY_NAME, DATA, DEFINITIONS
from engine.wire import GrammarPart
from errors import BadRequest

Schema = Mapping[str, Any]
Form = Literal["text", "json", "either"]

TYPES = frozenset({"string", "number", "integer", "boolean", "null", "array", "object"})
SAYS_NOTHING = {"title", "description", "default", "examples", "deprecated", "$comment", "$schema"}
BRANCHES = ("anyOf", "oneOf", "allOf")
MAX_DEPTH = 32  # of schemas in one another
MAX_COPIED = 50_000  # parts of the schemas of a function
MAX_LIMIT = 1 << 16  # of lengths
NEVER = 1 << 24  # as long is nothing that a model says


@dataclass(frozen=True, slots=True)
class Parameter:
    """An argument. As `text` what is written is its value, as `json` it is JSON, and as `either` it
    is JSON of a type that fits, or else text."""

    name: str
    types: frozenset[str]
    form: Form
    schema: Schema  # by itself
    is_required: bool = False
    # where there are no others: their JSON, by how they are written
    choices: Mapping[str, str] = field(default_factory=dict)
    length: str = ""  # of a text, as a range: the least, and the most if there is one

    @property
    def is_text_or_null(self) -> bool:
        return self.types == {"string", "null"}

    def value(self, written: str) -> str:
        """JSON of what was written in another form."""
        if written in self.choices:
            return self.choices[written]
        if self._fits(written):
            return written.strip()
        return json.dumps(written, ensure_ascii=False)

    def _fits(self, written: str) -> bool:
        """It is JSON, of a type that is no text."""
        if self.is_text_or_null:
            return written == "null"
        try:
            found = _type_of(read_json(written))
        except (ValueError, RecursionError):
            return False
        types = self.types - {"string"}
        return found in types or (found == "integer" and "number" in types)


ANY = Parameter("", TYPES, "either", {})


@dataclass(frozen=True, slots=True)
class _Found:
    """What a schema says, as far as it matters here."""

    types: frozenset[str] = TYPES
    choices: Mapping[str, str] = field(default_factory=dict)
    is_free: bool = False  # any text of this length is valid, and of what is no text at most null
    length: str = ""


class Parameters:
    """Those of one function, by the schema of its arguments. No text has the `end` in it that
    stands behind texts."""

    def __init__(self, arguments: GrammarPart, end: str) -> None:
        self.is_exact = not arguments.is_lenient
        self._end = end
        self._references = References(arguments)
        self._known: dict[str, _Found] = {}  # by references
        root, schema = self._references.root, self._meant(self._references.root)
        properties = dict(_mapping(schema.get("properties")))
        for branch in () if self.is_exact else self._branches(schema):
            properties = {**_mapping(branch.get("properties")), **properties}
        required = schema.get("required")
        required = required if isinstance(required, list) else ()
        self.listed = [
            self._parameter(name, inner, required)
            for name, inner in properties.items()
            if inner is not False  # which allows no value
        ]
        more = schema.get("additionalProperties", not properties or "patternProperties" in schema)
        # those that the schema does not name; None: there are none
        self.others = None if more is False else self._parameter("", more, ())
        understood = {"type", "properties", "required", "additionalProperties", *DEFINITIONS}
        said = root.keys() if schema is root else (root.keys() - {"$ref"}) | schema.keys()
        self.unknown = sorted(said - understood - SAYS_NOTHING)
        self._by_name = {parameter.name: parameter for parameter in self.listed}

    def of(self, name: str) -> Parameter:
        """The one of this name, whether the schema names it or not."""
        return self._by_name.get(name) or self.others or ANY

    def _meant(self, schema: Schema) -> Schema:
        for _ in range(MAX_DEPTH):
            reference = schema.get("$ref")
            if not isinstance(reference, str):
                break
            schema = _mapping(self._references.at(reference))
        return schema

    def _branches(self, schema: Schema) -> list[Schema]:
        found = [schema.get(key) for key in BRANCHES]
        return [self._meant(_mapping(one)) for of in found if isinstance(of, list) for one in of]

    def _parameter(self, name: str, schema: Any, required: Sequence[str]) -> Parameter:
        found = self._look(schema, 0)
        form: Form = "text" if found.types == {"string"} else "either"
        choices = found.choices
        is_inexact = self.is_exact and not choices and not found.is_free
        if (
            "string" not in found.types
            or is_inexact
            or any(self._end in choice for choice in choices)
        ):
            form, choices = "json", {}
        alone = self._references.alone(schema) if form == "json" else {}
        length = found.length if form == "text" else ""
        return Parameter(name, found.types, form, alone, name in required, choices, length)

    def _look(self, schema: Any, depth: int) -> _Found:
        if depth > MAX_DEPTH or not isinstance(schema, Mapping):
            return _Found()
        if isinstance(reference := schema.get("$ref"), str):
            if reference not in self._known:
                self._known[reference] = _Found()  # of one that leads to itself
                self._known[reference] = self._look(self._references.at(reference), depth + 1)
            return self._within(schema, self._known[reference], "$ref")
        listed = [schema["const"]] if "const" in schema else schema.get("enum")
        if isinstance(listed, list) and listed:
            return self._listed(schema, listed)
        for key in BRANCHES:
            branches = schema.get(key)
            if isinstance(branches, list) and branches and (key != "allOf" or len(branches) == 1):
                found = [self._look(one, depth + 1) for one in branches]
                choices: dict[str, str] = {}
                for one in found if all(one.choices for one in found) else ():
                    choices = {**one.choices, **choices}
                types = frozenset().union(*(one.types for one in found))
                is_free = all(one.is_free and not one.length for one in found)
                of_all = _Found(types, choices, is_free)
                return self._within(schema, of_all, key)
            if isinstance(branches, list) and branches:  # all of several
                types = frozenset.intersection(*(self._look(b, depth + 1).types for b in branches))
                return self._within(schema, _Found(types))
        length, is_exact = limits(schema, "minLength", "maxLength")
        said = ("minLength", "maxLength") if schema.get("type") == "string" else ()
        return self._within(schema, _Found(is_free=is_exact, length=length if said else ""), *said)

    def _within(self, schema: Schema, inner: _Found, *said: str) -> _Found:
        """What a schema says that says the inner of itself, and perhaps a type and more."""
        types = inner.types & _named_types(schema) or inner.types
        if types == {"null"}:
            return _Found(types, {"null": "null"}, is_free=True)
        is_free = inner.is_free and schema.keys() <= SAYS_NOTHING | {"type", *said}
        is_free = is_free and types <= {"string", "null"}
        return _Found(types, inner.choices, is_free, inner.length)

    def _listed(self, schema: Schema, values: Sequence[Any]) -> _Found:
        """What a schema says that lists its values, and perhaps their type. Where it says more, the
        list is not to the letter all that is valid."""
        if self.is_exact and not schema.keys() <= SAYS_NOTHING | {"const", "enum", "type"}:
            return _Found()
        named = _named_types(schema)
        choices: dict[str, str] = {}
        types = set()
        for value in values:
            whole, type = json.dumps(value, ensure_ascii=False), _type_of(value)
            if type in named or (type == "integer" and "number" in named):
                types.add(type)
                # of those that are written alike the first counts
                choices.setdefault(value if isinstance(value, str) else whole, whole)
        return _Found(frozenset(types), choices) if types else _Found()


class References:
    """The references in a schema, and what they mean."""

    def __init__(self, whole: GrammarPart) -> None:
        self.root = _mapping(json.loads(whole.text))
        self._param = whole.param
        self._n_left = MAX_COPIED

    def at(self, reference: str) -> Any:
        """The schema that a JSON pointer means; None where there is none."""
        found: Any = self.root if reference.partition("/")[0] == "#" else None
        for key in unquote(reference).split("/")[1:]:
            key = key.replace("~1", "/").replace("~0", "~")
            if isinstance(found, list):
                found = found[int(key)] if key in map(str, range(len(found))) else None
            else:
                found = found.get(key) if isinstance(found, Mapping) else None
        return found

    def alone(self, schema: Any) -> Schema:
        """A schema within the root as one of its own: with all that it refers to, and no more."""
        names: dict[str, str] = {}
        whole = dict(_mapping(self._renamed(schema, names)))
        for key in SAYS_NOTHING & whole.keys():
            del whole[key]
        definitions: dict[str, Any] = {}
        while len(definitions) < len(names):  # those of definitions come in too
            reference = [*names][len(definitions)]
            definitions[names[reference]] = self._renamed(self.at(reference), names)
        return {**whole, "$defs": definitions} if definitions else whole

    def _renamed(self, value: Any, names: dict[str, str], *, is_schema: bool = True) -> Any:
        self._n_left -= 1
        if self._n_left < 0:
            raise BadRequest("The schema refers to itself too often.", param=self._param)
        if isinstance(value, list):
            return [self._renamed(item, names) for item in value]
        if not isinstance(value, Mapping):
            return value
        renamed = {}
        for key, inner in value.items():
            if not is_schema:  # but schemas by name
                inner = self._renamed(inner, names)
            elif key in DEFINITIONS:
                continue
            elif key == "$ref" and isinstance(inner, str) and self.at(inner) is not None:
                inner = f"#/$defs/{names.setdefault(inner, f'd{len(names)}')}"
            elif key not in DATA:
                inner = self._renamed(inner, names, is_schema=key not in BY_NAME)
            renamed[key] = inner
        return renamed


def limits(schema: Schema, least: str, most: str) -> tuple[str, bool]:
    """What a schema says by two of its keywords as a range of a regular expression, without its
    braces: empty if that is nothing. And whether it says just that."""
    found: list[int | None] = []
    is_exact = True
    for key in (least, most):
        limit = schema.get(key)
        found.append(None)
        if isinstance(limit, bool) or not isinstance(limit, int | float):
            is_exact = is_exact and limit is None
        elif 0 <= limit <= MAX_LIMIT:
            found[-1] = int(limit)
        elif not (key == most and limit > NEVER):
            is_exact = False
    low, high = found
    is_range = bool(low) or high is not None
    return (f"{low or 0},{'' if high is None else high}" if is_range else ""), is_exact


def read_json(text: str) -> Any:
    """What JSON says, to whose letter there is no NaN. Raises ValueError or RecursionError."""
    return json.loads(text, parse_constant=_no_json)


def _named_types(schema: Schema) -> frozenset[str]:
    """Those that a schema names; all, if it names none."""
    named = schema.get("type")
    named = named if isinstance(named, list) else [named]
    return frozenset(name for name in TYPES if name in named) or TYPES


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _no_json(constant: str) -> None:
    raise ValueError(f"{constant} is none")


def _type_of(value: Any) -> str:
    names = {type(None): "null", bool: "boolean", str: "string", int: "integer", float: "number",
             list: "array"}  # fmt: skip
    return names.get(type(value), "object")
