"""What an answer must look like: grammars compiled once, and their state in each answer.

One component for all backends, on plain rows of logits: llguidance (constrained decoding over the
whole vocabulary, about 0.1 ms a token). llama.cpp's own grammar sampler is never used: a grammar
that it cannot parse ends the process.
"""

import json
import re
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from typing import Any

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.gbnf_to_lark import ASTNode, GrammarParser, RuleRefNode

from engine.backends.base import Tokenizer
from engine.grammar_text import BY_NAME, DATA, pattern
from engine.wire import MAX_GRAMMAR_BYTES, Grammar, GrammarPart
from errors import BadRequest

MAX_COMPILED = 64  # grammars that are kept
# without a bound on spaces small models write nothing else
JSON_STYLE = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}
_ANYTHING = r"(.|\n)*"
_SPACES = "[ \\n]{0,4}"
_MARK = re.compile(
    "«(?:(?:unlike (?P<unlike>[^»]+?) ?)?"
    "(?:(?P<inside>inside )?(?P<length>\\{[0-9,]+\\} )?until (?P<until>[^»]+))?"
    "|(?P<spaced>spaced )?(?P<text>[^»]+))»"
)
_IS_GBNF = re.compile(r"(?:^|[\r\n])[ \t]*[\w-]+[ \t]*::=")  # the beginning of one of its rules
# what of GBNF holds characters, and comments, which hold none; one character; those of one letter
_GBNF = re.compile(r'#[^\r\n]*|"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|\.', re.DOTALL)
_CHARACTER = re.compile(
    r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|([tnr\"\\\[\]-]))|.", re.DOTALL
)
_LETTERS = {"t": "\t", "n": "\n", "r": "\r"}
# those that llguidance knows; it refuses a schema with another `$schema`
DRAFTS = (
    "http://json-schema.org/draft-04/schema",
    "http://json-schema.org/draft-06/schema",
    "http://json-schema.org/draft-07/schema",
    "https://json-schema.org/draft/2019-09/schema",
    "https://json-schema.org/draft/2020-12/schema",
)
# those that JSON Schema has; another is an annotation, as pydantic's `path` and `binary`
FORMATS = frozenset({
    "date-time", "date", "time", "duration", "email", "idn-email", "hostname", "idn-hostname",
    "ipv4", "ipv6", "uri", "uri-reference", "iri", "iri-reference", "uuid", "uri-template",
    "json-pointer", "relative-json-pointer", "regex",
})  # fmt: skip
_UNKNOWN_FORMAT = "Unknown format: "  # llguidance, of those that it does not enforce
MOST_PATTERNS = 200  # of a schema that are looked at one by one
# what llguidance reads over although it limits what is valid
UNENFORCED = ("minProperties", "maxProperties")


class GrammarState:
    """Where one answer is in its grammar; implements Constraint."""

    def __init__(
        self, matcher: LLMatcher, n_vocab: int, param: str, unenforced: tuple[str, ...] = ()
    ) -> None:
        self.unenforced = unenforced  # params of schemas of which no more than a type can be used
        self._matcher = matcher
        self._param = param
        self._n_vocab = n_vocab
        self._bits = np.zeros((n_vocab + 31) // 32, dtype=np.int32)

    @property
    def is_complete(self) -> bool:
        """The answer so far is a whole one."""
        return bool(self._matcher.is_accepting())

    def apply(self, logits: npt.NDArray[np.float32]) -> None:
        """Leave only tokens that may come next, in place."""
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        self._check()
        allowed = np.unpackbits(self._bits.view(np.uint8), bitorder="little")[: self._n_vocab]
        if not allowed.any():
            raise BadRequest("The grammar leads nowhere: no text completes it.", param=self._param)
        logits[: self._n_vocab][allowed == 0] = -np.inf
        logits[self._n_vocab :] = -np.inf  # of a head that is padded beyond the vocabulary

    def accept(self, token: int) -> None:
        """The token was chosen."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)
            self._check()

    def copy(self) -> "GrammarState":
        matcher = self._matcher.deep_copy()
        return GrammarState(matcher, self._n_vocab, self._param, self.unenforced)

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = _first_line(self._matcher.get_error())
            raise BadRequest(f"The grammar leads nowhere: {reason}.", param=self._param)


class Compiler:
    """Compiles grammars for one vocabulary; the last ones are kept. Not for two threads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ll: LLTokenizer | None = None  # takes about a second: made when first needed
        self._compiled: OrderedDict[Grammar, GrammarState] = OrderedDict()

    def compile(self, grammar: Grammar) -> GrammarState:
        """The state at the beginning of its grammar. Raises BadRequest, param that of the part
        at fault."""
        known = self._compiled.pop(grammar, None) or self._new(grammar)
        self._compiled[grammar] = known
        if len(self._compiled) > MAX_COMPILED:
            self._compiled.popitem(last=False)
        return known.copy()

    def _new(self, grammar: Grammar) -> GrammarState:
        texts = (grammar.frame, *(part.text for part in grammar.parts))
        if sum(len(text.encode()) for text in texts) > MAX_GRAMMAR_BYTES:
            raise BadRequest(
                f"Grammars and schemas may have {MAX_GRAMMAR_BYTES:,} bytes in all.",
                param=grammar.param,
            )
        is_all = "«" not in grammar.frame  # neither thoughts nor calls come instead
        sources = [_source(part, is_all) for part in grammar.parts]
        frame = {"name": "frame", "lark_grammar": self._resolved(grammar.frame)}
        matcher = self._whole(frame, sources)
        unenforced: dict[str, None] = {}
        if matcher.is_error():
            each = zip(grammar.parts, sources, strict=True)
            unenforced = dict.fromkeys(part.param for part, s in each if not self._mend(part, s))
            matcher = self._whole(frame, sources)
        if matcher.is_error():
            reason = _first_line(matcher.get_error())
            raise BadRequest(f"The grammar cannot be used: {reason}", param=grammar.param)
        n_vocab = self._tokenizer.n_vocab
        state = GrammarState(matcher, n_vocab, grammar.param, tuple(unenforced))
        state.copy().apply(np.zeros(n_vocab, np.float32))  # it must begin
        return state

    def _whole(self, frame: dict[str, Any], sources: list[dict[str, Any]]) -> LLMatcher:
        return self._matcher([frame, *({"name": f"p{n}", **s} for n, s in enumerate(sources))])

    def _mend(self, part: GrammarPart, source: dict[str, Any]) -> bool:
        """A lenient part that fails by itself goes without the patterns that cannot be enforced.
        Where it fails all the same any value of its type will do, and it is not enforced. Raises
        BadRequest for others that fail."""
        alone = self._matcher([source])
        if alone.is_error() and part.kind == "json_schema":
            reasons = []
            found = [
                (p, s, *one) for p, s in _schemas(source["json_schema"]) for one in _patterns(s)
            ]
            patterns = {repr(pattern): pattern for *_, pattern in found}
            beyond = set()
            if len(patterns) <= MOST_PATTERNS:
                beyond = {key for key, pattern in patterns.items() if self._is_beyond(pattern)}
            for path, schema, holder, key, pattern in found:
                if repr(pattern) in beyond:
                    reasons.append(f"{path}: the pattern '{pattern!s:.200}' cannot be enforced.")
                    del holder[key]
                    if holder is not schema:  # it is about names without a pattern
                        schema.pop("additionalProperties", None)
            alone = self._matcher([source])
            if reasons and not part.is_lenient and not alone.is_error():
                raise BadRequest(reasons[0], param=part.param)
        if not alone.is_error():
            return True
        if not part.is_lenient:
            raise BadRequest(_explain(alone.get_error(), part), param=part.param)
        schema = source["json_schema"]
        style = {"x-guidance": schema["x-guidance"]}
        source["json_schema"] = {"type": schema.get("type")} | style
        if self._matcher([source]).is_error():  # it says none that there is
            source["json_schema"] = style
        return False

    def _is_beyond(self, pattern: Any) -> bool:
        """It cannot be enforced, as lookarounds, or is none."""
        schema = {"type": "string", "pattern": pattern}
        return bool(self._matcher([{"json_schema": schema}]).is_error())

    def _matcher(self, grammars: list[dict[str, Any]]) -> LLMatcher:
        if self._ll is None:
            self._ll = _ll_tokenizer(self._tokenizer)
        source = json.dumps({"grammars": grammars})
        return LLMatcher(self._ll, source, log_level=0, limits=LLParserLimits())

    def _resolved(self, frame: str) -> str:
        """The frame as plain Lark: its marks by what this vocabulary has."""
        texts = (mark["text"] or mark["until"] for mark in _MARK.finditer(frame))
        tokens = {text: control_token(text, self._tokenizer) for text in texts if text}
        # nobody who reads the text could tell such from one that is spelt in letters
        spelt = [pattern(text) for text, token in tokens.items() if token is not None]
        but_spelt = f" & ~/{_ANYTHING}({'|'.join(spelt)}){_ANYTHING}/" if spelt else ""
        rules: list[str] = []

        def literal(text: str, is_spaced: bool) -> str:
            token = tokens[text]
            if token is not None:
                return f"(/{_SPACES}/ <[{token}]>)" if is_spaced else f"<[{token}]>"
            if is_spaced:
                return f"/{_SPACES}{pattern(text)}/"
            return json.dumps(text, ensure_ascii=False)

        def resolved(mark: re.Match[str]) -> str:
            if mark["text"]:
                return literal(mark["text"], bool(mark["spaced"]))
            until, n = mark["until"], len(rules)
            escaped = pattern(until or "")
            any_text = f"(.|\\n){mark['length'].strip()}" if mark["length"] else _ANYTHING
            but = but_spelt
            if mark["inside"]:
                but = "" if tokens[until] is None else f" & ~/{_ANYTHING}{escaped}{_ANYTHING}/"
            if mark["unlike"]:
                but += f" & ~/({mark['unlike']}){_ANYTHING}/"
            if not until or tokens[until] is not None:
                rules.append(f"TEXT_{n}: /{any_text}/{but}")
                return f"(TEXT_{n} {literal(until, False)})" if until else f"TEXT_{n}"
            if mark["length"]:  # counted to its end, so that end is in it
                rules.append(
                    f"TEXT_{n}: /{any_text}{escaped}/ & ~/{_ANYTHING}{escaped}(.|\\n)+/{but}"
                )
                return f"TEXT_{n}"
            rules.append(f"until_{n}[lazy]: TEXT_{n}\nTEXT_{n}: /{any_text}{escaped}/{but}")
            return f"until_{n}"

        return "\n".join([_MARK.sub(resolved, frame), *rules])


def control_token(text: str, tokenizer: Tokenizer) -> int | None:
    """The token that is written like this and adds nothing to the text, if there is one."""
    ids = tokenizer.tokenize(text, parse_special=True, continues=True)
    return ids[0] if len(ids) == 1 and not tokenizer.piece(ids[0]) else None


def _source(part: GrammarPart, is_all: bool) -> dict[str, Any]:
    """A part as llguidance takes it."""
    if part.kind == "json_schema":
        return {"json_schema": _styled(part)}
    text = part.text
    if _IS_GBNF.search(text):
        try:
            text = _as_lark(text, is_all)
        except Exception as error:  # the converter raises bare ones
            reason = _first_line(str(error)) or "it is nested too deeply"
            raise BadRequest(f"The GBNF cannot be used: {reason}.", param=part.param) from None
    return {"lark_grammar": text}


def _as_lark(gbnf: str, is_all: bool) -> str:
    """GBNF as Lark: of a terminal as much is taken as can be, and a literal that has begun must
    end, where GBNF tries every way. So where it is all of an answer, and no rule is a part of
    itself, it is one terminal; else there are none, nor literals of two characters."""
    rules = GrammarParser().parse(_GBNF.sub(_plain, gbnf))
    if "root" not in rules:
        raise ValueError("it has no rule 'root'")
    names = {name: f"rule_{n}" for n, name in enumerate(rules)}
    if is_all and not _is_recursive(rules):
        names = {name: lark.upper() for name, lark in names.items()}  # of a terminal

    def rename(node: ASTNode) -> None:
        if isinstance(node, RuleRefNode):
            if node.name not in names:
                raise ValueError(f"it has no rule '{node.name}'")
            node.name = names[node.name]
        for child in node.children():
            rename(child)

    for rule in rules.values():
        rename(rule)
    lines = [f"{names[name]}: {rule.alternatives.top_str()}" for name, rule in rules.items()]
    return "\n".join([f"start: {names['root']}", *lines])


def _is_recursive(rules: Mapping[str, ASTNode]) -> bool:
    """A rule is a part of itself."""
    try:
        TopologicalSorter({name: set(_references(r)) for name, r in rules.items()}).prepare()
    except CycleError:
        return True
    return False


def _references(node: ASTNode) -> Iterator[str]:
    if isinstance(node, RuleRefNode):
        yield node.name
    for child in node.children():
        yield from _references(child)


def _plain(match: re.Match[str]) -> str:
    """A part of GBNF in which each character stands for itself, or is written as all read it. The
    parser drops zeros of \\u00e9, and its nodes take dots and classes for those of a regex, where a
    dot is no line break and && intersects."""
    part = match[0]
    if part[0] == "#":
        return part
    if part == ".":
        return "[\\x00-\U0010ffff]"
    found = list(_CHARACTER.finditer(part[1:-1]))
    if part[0] == '"':
        chars = [f'"{_in_literal(_character(one))}"' for one in found]
        return f"({' '.join(chars)})" if chars else part
    is_negated = bool(found) and found[0][0] == "^"
    marks = [one[0] for one in found[is_negated:]]
    chars = [_in_class(_character(one)) for one in found[is_negated:]]
    inner, at = "", 0
    while at < len(chars):
        inner += chars[at]
        if marks[at + 1 : at + 2] == ["-"] and at + 2 < len(chars):
            inner += f"-{chars[at + 2]}"
            at += 2
        at += 1
    return f"[{'^' * is_negated}{inner}]"


def _character(match: re.Match[str]) -> str:
    if code := match[1] or match[2] or match[3]:
        number = int(code, 16)
        if number > sys.maxunicode or 0xD800 <= number < 0xE000:
            raise ValueError(f"{match[0]} is no character")
        return chr(number)
    if match[0] == "\\":
        raise ValueError("a backslash begins no escape that GBNF has")
    return _LETTERS.get(match[4], match[4]) if match[4] else match[0]


def _in_literal(char: str) -> str:
    if char in '"\\':
        return f"\\{char}"
    return char if char.isprintable() or char > "\xff" else f"\\x{ord(char):02x}"


def _in_class(char: str) -> str:
    return char if char.isalnum() or char > "\xff" else f"\\x{ord(char):02x}"


def _styled(part: GrammarPart) -> dict[str, Any]:
    schema = json.loads(part.text)
    if not part.is_lenient:
        for path, keyword in _keywords(schema):
            if keyword in UNENFORCED:
                raise BadRequest(f"{path}: '{keyword}' cannot be enforced.", param=part.param)
    for _, one in _schemas(schema):
        if isinstance(one.get("format"), str) and one["format"] not in FORMATS:
            del one["format"]
        if draft := _draft(one.pop("$schema", None)):
            one["$schema"] = draft
    if isinstance(schema, bool):
        if not schema:
            raise BadRequest("The schema `false` allows nothing.", param=part.param)
        schema = {}
    return {**schema, "x-guidance": {**JSON_STYLE, "lenient": part.is_lenient}}


def _draft(address: Any) -> str | None:
    """The one that is meant, http or https. Other addresses say no more than none at all."""
    _, _, place = str(address).removesuffix("#").partition("://")
    return next((draft for draft in DRAFTS if draft.endswith(f"://{place}")), None)


def _explain(error: str, part: GrammarPart) -> str:
    reason = _first_line(error)
    if part.kind == "json_schema":
        if reason.startswith(_UNKNOWN_FORMAT):
            name = reason.removeprefix(_UNKNOWN_FORMAT)
            schemas = _schemas(json.loads(part.text))
            path = next((path for path, one in schemas if one.get("format") == name), "$")
            return f"{path}: the format '{name}' cannot be enforced."
        for keyword in re.findall(r'"([^"]+)"', reason):
            for path, found in _keywords(json.loads(part.text)):
                if found == keyword:
                    return f"{path}: '{keyword}' cannot be enforced."
        return f"The schema cannot be enforced: {reason}"
    return f"The grammar cannot be used: {reason}"


def _keywords(schema: Any) -> Iterator[tuple[str, str]]:
    """Each keyword of a schema with the JSON path of what it stands in."""
    for path, one in _schemas(schema):
        for key in one:
            yield path, key


def _schemas(schema: Any, path: str = "$") -> Iterator[tuple[str, dict[str, Any]]]:
    """A schema and those in it, with their JSON paths."""
    if isinstance(schema, list):
        for index, item in enumerate(schema):
            yield from _schemas(item, f"{path}[{index}]")
    elif isinstance(schema, dict):
        yield path, schema
        for key, value in schema.items():
            if key in BY_NAME:
                for name, inner in value.items() if isinstance(value, dict) else ():
                    yield from _schemas(inner, f"{path}.{key}.{name}")
            elif key not in DATA:
                yield from _schemas(value, f"{path}.{key}")


def _patterns(schema: dict[str, Any]) -> list[tuple[dict[str, Any], str, Any]]:
    """Those that a schema has of texts and of names, behind what holds them and their keys."""
    found = [(schema, "pattern", schema["pattern"])] if "pattern" in schema else []
    names = schema.get("patternProperties")
    if isinstance(names, dict):
        found += ((names, name, name) for name in names)
    return found


def _first_line(error: str) -> str:
    return error.strip().partition("\n")[0][:300]


def _ll_tokenizer(tokenizer: Tokenizer) -> LLTokenizer:
    vocabulary = range(tokenizer.n_vocab)
    ends = [token for token in vocabulary if tokenizer.ends_generation(token)]
    return LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer, ends)), eos_token=ends)


class _Vocabulary:
    """A vocabulary as llguidance wants to see it."""

    def __init__(self, tokenizer: Tokenizer, ends: list[int]) -> None:
        self.eos_token_id = ends[0]
        self.bos_token_id = tokenizer.bos
        pieces = [tokenizer.piece(token) for token in range(tokenizer.n_vocab)]
        self.special_token_ids = [token for token, piece in enumerate(pieces) if not piece]
        self.tokens = [piece or b"<%d>" % token for token, piece in enumerate(pieces)]
        self._tokenizer = tokenizer

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.tokenize(text.decode(), parse_special=False, continues=True)
