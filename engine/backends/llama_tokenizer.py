"""The tokenizer of a GGUF."""

import ctypes
import re
from functools import cached_property
from typing import Any

import llama_cpp as lib

from engine.backends.llama_model import meta_text
from engine.deep import in_depth
from engine.spelling import Spelling
from errors import BadRequest

# control tokens by the files of gpt-oss and Solar Open, which llama.cpp makes user-defined at load
# (llama-vocab.cpp), and so finds in any text
HARMONY = (b"<|start|>", b"<|message|>", b"<|channel|>", b"<|constrain|>", b"<|end|>")
# llama.cpp splits texts for a BPE by expressions, some through std::regex, which takes 330 bytes of
# stack for each character of a match (x86-64): of a run, and of one of line breaks behind it. For
# these (tokenizer.ggml.pre) it has code of its own, or expressions of a character.
RUN_BYTES = 1024
SHORT, LONG = 4096, 65536  # bytes of a text: any stack is deep enough; it may leave much of it used
SPLIT_BY_CODE = frozenset(
    (
        # as GPT-2's
        "gpt-2", "phi-2", "jina-es", "jina-de", "jina-v1-en", "jina-v2-es", "jina-v2-de",
        "jina-v2-code", "roberta-bpe", "modern-bert", "mpt", "olmo", "jais", "trillion", "exaone4",
        "granite-docling", "gigachat", "a.x-4.0", "mellum",
        # and with digits apart
        "smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b",
        "mellum2",
        # as Llama 3's
        "llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2",
        "jina-v5-nano", "dbrx", "smaug-bpe", "chatglm-bpe", "glm4", "glm5",
        # as Qwen's
        "qwen2", "qwen35", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan",
        "solar-open", "grok-2",
        # at line breaks
        "gemma4", "granite-embed-multi-311m", "sarvam-moe",
    )
)  # fmt: skip
_SPACES = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # to llama.cpp
_RUNS = re.compile(f"[{_SPACES}]+|[^{_SPACES}]+")
_LINES = re.compile(r"\n+|[^\n]+")
_WITH_SPACES = ("exaone-moe",)  # in whose matches there may be single ones


class LlamaTokenizer:
    """A GGUF's vocabulary. llama.cpp's tokenizer may be called from any thread (llama.h)."""

    def __init__(self, model: Any) -> None:
        self._vocab = lib.llama_model_get_vocab(model)
        named = meta_text(model, "tokenizer.ggml.pre")
        split_by = named or meta_text(model, "tokenizer.ggml.model")
        is_bpe = lib.llama_vocab_type(self._vocab) == lib.LLAMA_VOCAB_TYPE_BPE
        self._recurses = is_bpe and split_by not in SPLIT_BY_CODE
        self._runs = _LINES if split_by in _WITH_SPACES else _RUNS
        self.n_vocab: int = lib.llama_vocab_n_tokens(self._vocab)
        wants_bos = lib.llama_vocab_get_add_bos(self._vocab)
        self.bos: int | None = lib.llama_vocab_bos(self._vocab) if wants_bos else None
        self._pieces: dict[int, bytes] = {}
        # SPM vocabularies put a space before a text
        first = self._call(b"a", parse_special=False)[:1]
        self._adds_space = any(self.piece(token)[:1] == b" " for token in first)
        self._harmony = {
            token
            for ids in (self._call(text, parse_special=True) for text in HARMONY)
            for token in ids
            if len(ids) == 1
            and lib.llama_vocab_get_attr(self._vocab, token) & lib.LLAMA_TOKEN_ATTR_USER_DEFINED
        }

    def tokenize(self, text: str, *, parse_special: bool, continues: bool) -> list[int]:
        data = text.encode()
        if not self._recurses or len(data) <= SHORT:
            return self._tokenize(data, parse_special, continues)

        def tokenize(stack_bytes: int) -> list[int]:
            self._check_runs(text, stack_bytes // RUN_BYTES)
            return self._tokenize(data, parse_special, continues)

        return in_depth(tokenize, alone=len(data) > LONG)

    def _check_runs(self, text: str, most: int) -> None:
        """Raises BadRequest for what would end the process."""
        if len(text) <= most:
            return
        longest = max(run.end() - run.start() for run in self._runs.finditer(text))
        if longest > most:
            between = "line break" if self._runs is _LINES else "space or line break"
            raise BadRequest(
                f"The text has {longest:,} characters without a {between} between them, or of "
                f"nothing else; the model's tokenizer takes {most:,} such. Break them up."
            )

    def _tokenize(self, data: bytes, parse_special: bool, continues: bool) -> list[int]:
        ids = self._call(data, parse_special)
        if not parse_special and any(map(self._is_control, ids)):
            return self._spell(data)  # merges have put one together, or llama.cpp looks for it
        if continues and self._adds_space and ids and self.piece(ids[0])[:1] == b" ":
            ids[:1] = self._spell(self.piece(ids[0])[1:])
        return ids

    def piece(self, token: int) -> bytes:
        piece = self._pieces.get(token)
        if piece is None:
            piece = self._pieces[token] = self._read_piece(token, with_control=False)
        return piece

    def literal(self, token: int) -> bytes:
        return self.piece(token) or self._read_piece(token, with_control=True)

    def ends_generation(self, token: int) -> bool:
        return bool(lib.llama_vocab_is_eog(self._vocab, token))

    @cached_property
    def ends(self) -> list[int]:
        """Every token that ends a generation."""
        return [token for token in range(self.n_vocab) if self.ends_generation(token)]

    def _is_control(self, token: int) -> bool:
        return token in self._harmony or lib.llama_vocab_is_control(self._vocab, token)

    def _call(self, data: bytes, parse_special: bool) -> list[int]:
        n_room = len(data) + 16
        while True:
            ids = (lib.llama_token * n_room)()
            n = lib.llama_tokenize(self._vocab, data, len(data), ids, n_room, False, parse_special)
            if n >= 0:
                return list(ids[:n])
            n_room = -n  # a character can be many tokens: llama.cpp says how many

    @cached_property
    def _spelling(self) -> Spelling:
        """With ordinary tokens. Those of single bytes are the last resort."""
        masks = lib.LLAMA_TOKEN_ATTR_NORMAL, lib.LLAMA_TOKEN_ATTR_BYTE
        tokens = (
            token
            for mask in masks
            for token in range(self.n_vocab)
            if lib.llama_vocab_get_attr(self._vocab, token) & mask
        )
        return Spelling(tokens, self.piece)

    def _spell(self, data: bytes) -> list[int]:
        return self._spelling.spell(data)

    def _read_piece(self, token: int, *, with_control: bool) -> bytes:
        n_room = 64
        while True:
            buffer = ctypes.create_string_buffer(n_room)
            n = lib.llama_token_to_piece(self._vocab, token, buffer, n_room, 0, with_control)
            if n >= 0:
                return buffer.raw[:n]
            n_room = -n
