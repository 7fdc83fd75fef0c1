"""The tokenizer of a Hugging Face directory, for a model that generates."""

import re
import threading
from functools import cached_property
from importlib import import_module
from typing import Any

from engine.backends.hf_tokenizer import BYTES
from engine.chat_folder import adds_bos, end_tokens, is_byte_level, read_tokenizer
from engine.model_file import ModelFile
from engine.spelling import Spelling
from errors import ModelLoadFailed

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # how SentencePiece writes a single byte


class MlxTokenizer:
    """Implements `engine.backends.base.Tokenizer`."""

    def __init__(self, facts: ModelFile) -> None:
        library = import_module("tokenizers")
        path = facts.path
        file, settings = read_tokenizer(path)
        self._tokenizer = tokenizer = _read(library, facts)
        self._lock = threading.Lock()  # whether specials count is a state of the tokenizer
        for token in settings.added_tokens_decoder.values():
            if tokenizer.token_to_id(token.content) is None:
                added = library.AddedToken(token.content, special=token.special, normalized=False)
                (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([added])
        by_text: dict[str, int] = self._tokenizer.get_vocab()
        self._texts = {token: text for text, token in by_text.items()}
        self._added: dict[int, str] = {
            number: token.content
            for number, token in self._tokenizer.get_added_tokens_decoder().items()
        }
        self._control = frozenset(by_text[text] for text in facts.control_tokens if text in by_text)
        self.n_vocab = min(max(self._texts) + 1, facts.n_vocab)
        self._ends = frozenset(end_tokens(path, file, settings))
        begins = facts.bos_token in by_text and adds_bos(file, settings, facts.bos_token)
        self.bos: int | None = by_text[facts.bos_token] if begins else None
        self._is_byte_level = is_byte_level(file)
        self._pieces: dict[int, bytes] = {}
        # vocabularies of SentencePiece may put a space before a text
        first = self._encode("a", parse_special=False)[:1]
        self._adds_space = any(self.piece(token)[:1] == b" " for token in first)

    def tokenize(self, text: str, *, parse_special: bool, continues: bool) -> list[int]:
        ids = self._encode(text, parse_special)
        if not parse_special and not self._control.isdisjoint(ids):
            return self._spelling.spell(text.encode())  # merges have put one together
        if continues and self._adds_space and ids and self.piece(ids[0])[:1] == b" ":
            ids = [*self._spelling.spell(self.piece(ids[0])[1:]), *ids[1:]]
        return ids

    def piece(self, token: int) -> bytes:
        piece = self._pieces.get(token)
        if piece is None:
            piece = self._pieces[token] = self._read_piece(token)
        return piece

    def literal(self, token: int) -> bytes:
        return self.piece(token) or self._texts.get(token, "").encode()

    def ends_generation(self, token: int) -> bool:
        return token in self._ends

    @property
    def ends(self) -> list[int]:
        """Every token that ends a generation."""
        return sorted(self._ends)

    def _encode(self, text: str, parse_special: bool) -> list[int]:
        with self._lock:
            self._tokenizer.encode_special_tokens = not parse_special
            return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _read_piece(self, token: int) -> bytes:
        if token in self._control:
            return b""
        text = self._added.get(token, self._texts.get(token, ""))
        if self._is_byte_level and token in self._added:
            return text.encode()
        if self._is_byte_level:
            return bytes(BYTES[letter] for letter in text if letter in BYTES)
        if byte := _BYTE.fullmatch(text):
            return bytes.fromhex(byte[1])
        return text.replace("▁", " ").encode()

    @cached_property
    def _spelling(self) -> Spelling:
        """With ordinary tokens. Those of single bytes are the last resort."""
        usual = [token for token in self._texts if token not in self._added]
        usual.sort(key=lambda token: bool(_BYTE.fullmatch(self._texts[token])))
        return Spelling(usual, self.piece)


def _read(library: Any, facts: ModelFile) -> Any:
    try:
        tokenizer = library.Tokenizer.from_file(str(facts.path / "tokenizer.json"))
    except Exception as error:  # the library raises bare ones
        raise ModelLoadFailed(f"{facts.name} has a tokenizer.json that fails: {error}.") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
