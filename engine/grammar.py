"""What an answer must look like: grammars compiled once, and their state in each answer.

One component for all backends, on plain rows of logits: llguidance (constrained decoding over the
whole vocabulary, about 0.1 ms a token). llama.cpp's own grammar sampler is never used: a grammar
that it cannot parse ends the process.
"""

import json
import re
from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.gbnf_to_lark import gbnf_to_lark

from engine.backends.base import Tokenizer
from engine.wire import Grammar
from errors import BadRequest

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

MAX_GRAMMAR_BYTES = 256 << 10
MAX_COMPILED = 64  # grammars that are kept
# without a bound on spaces small models write nothing else
JSON_STYLE: "JsonCompileOptions" = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}
# what llguidance reads over although it limits what is valid
UNENFORCED = ("minProperties", "maxProperties")


class Constraint:
    """The state of a grammar in one answer."""

    def __init__(self, matcher: LLMatcher, n_vocab: int) -> None:
        self._matcher = matcher
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
            raise BadRequest("The grammar leads nowhere: no text completes it.", param="grammar")
        logits[: self._n_vocab][allowed == 0] = -np.inf
        logits[self._n_vocab :] = -np.inf  # of a head that is padded beyond the vocabulary

    def accept(self, token: int) -> None:
        """The token was chosen."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)
            self._check()

    def copy(self) -> "Constraint":
        return Constraint(self._matcher.deep_copy(), self._n_vocab)

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = _first_line(self._matcher.get_error())
            raise BadRequest(f"The grammar leads nowhere: {reason}.", param="grammar")


class Compiler:
    """Compiles grammars for one vocabulary; the last ones are kept. Not for two threads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ll: LLTokenizer | None = None  # takes about a second: made when first needed
        self._compiled: OrderedDict[Grammar, Constraint] = OrderedDict()

    def compile(self, grammar: Grammar) -> Constraint:
        """A constraint at the beginning of its grammar. Raises BadRequest, param `grammar`."""
        known = self._compiled.pop(grammar, None) or self._new(grammar)
        self._compiled[grammar] = known
        if len(self._compiled) > MAX_COMPILED:
            self._compiled.popitem(last=False)
        return known.copy()

    def _new(self, grammar: Grammar) -> Constraint:
        if len(grammar.text.encode()) > MAX_GRAMMAR_BYTES:
            raise BadRequest(f"A grammar may have {MAX_GRAMMAR_BYTES:,} bytes.", param="grammar")
        source = _json_grammar(grammar.text) if grammar.kind == "json_schema" else _lark(grammar)
        if self._ll is None:
            self._ll = _ll_tokenizer(self._tokenizer)
        matcher = LLMatcher(self._ll, source, log_level=0, limits=LLParserLimits())
        if matcher.is_error():
            raise BadRequest(_explain(matcher.get_error(), grammar), param="grammar")
        constraint = Constraint(matcher, self._tokenizer.n_vocab)
        constraint.copy().apply(np.zeros(self._tokenizer.n_vocab, np.float32))  # it must begin
        return constraint


def _json_grammar(text: str) -> str:
    schema = json.loads(text)
    for path, keyword in _keywords(schema):
        if keyword in UNENFORCED:
            raise BadRequest(f"{path}: '{keyword}' cannot be enforced.", param="grammar")
    if isinstance(schema, bool):
        if not schema:
            raise BadRequest("The schema `false` allows nothing.", param="grammar")
        schema = {}
    try:
        return str(LLMatcher.grammar_from_json_schema(schema, overrides=JSON_STYLE))
    except ValueError as error:
        raise BadRequest(f"The schema cannot be used: {error}.", param="grammar") from None


def _lark(grammar: Grammar) -> str:
    text = grammar.text
    if "::=" in text:
        try:
            text = gbnf_to_lark(text)
        except Exception as error:  # the converter raises bare ones
            reason = _first_line(str(error)) or "it is nested too deeply"
            raise BadRequest(f"The GBNF cannot be used: {reason}.", param="grammar") from None
    return str(LLMatcher.grammar_from_lark(text))


def _explain(error: str, grammar: Grammar) -> str:
    reason = _first_line(error)
    if grammar.kind == "json_schema":
        for keyword in re.findall(r'"([^"]+)"', reason):
            for path, found in _keywords(json.loads(grammar.text)):
                if found == keyword:
                    return f"{path}: '{keyword}' cannot be enforced."
        return f"The schema cannot be enforced: {reason}"
    return f"The grammar cannot be used: {reason}"


def _keywords(schema: Any, path: str = "$") -> Iterator[tuple[str, str]]:
    """Each keyword of a schema with the JSON path of what it stands in."""
    if isinstance(schema, list):
        for index, item in enumerate(schema):
            yield from _keywords(item, f"{path}[{index}]")
    elif isinstance(schema, dict):
        for key, value in schema.items():
            yield path, key
            if key in ("properties", "patternProperties", "$defs", "definitions"):
                for name, inner in value.items() if isinstance(value, dict) else ():
                    yield from _keywords(inner, f"{path}.{key}.{name}")
            elif key not in ("const", "enum", "default", "examples"):
                yield from _keywords(value, f"{path}.{key}")


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

    def __call__(self, text: str | bytes) -> list[int]:
        if isinstance(text, bytes):
            text = text.decode(errors="replace")
        return self._tokenizer.tokenize(text, parse_special=False, continues=True)
