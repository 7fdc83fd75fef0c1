"""The tokenizer of a Hugging Face directory, without the tokens around texts."""

import threading
from collections.abc import Collection
from typing import Any


class FolderTokenizer:
    """Implements `engine.backends.base.Tokenizer` on one of the library tokenizers."""

    def __init__(
        self,
        backend: Any,
        n_vocab: int,
        *,
        begin: int | None,
        unknown: int | None,
        controls: Collection[int],
    ) -> None:
        self.n_vocab = n_vocab
        self.bos = begin
        self._backend = backend
        self._backend.no_truncation()
        self._backend.no_padding()
        self._kind = type(backend.model).__name__
        self._controls = frozenset(controls)
        self._unknown = unknown
        self._lock = threading.Lock()  # what is special is a state of the tokenizer

    def tokenize(self, text: str, *, parse_special: bool, continues: bool) -> list[int]:
        whole = text.encode("utf-8", "replace").decode()  # it takes no half of a surrogate pair
        with self._lock:
            self._backend.encode_special_tokens = not parse_special
            ids: list[int] = self._backend.encode(whole, add_special_tokens=False).ids
        if parse_special or self._controls.isdisjoint(ids):
            return ids
        return [spelled for token in ids for spelled in self._spelled(token)]

    def _spelled(self, token: int) -> list[int]:
        """XLM-R's `<s>` is also a piece like others, so a text that says it would be obeyed."""
        if token not in self._controls or token == self._unknown:
            return [token]
        letters = map(self._backend.token_to_id, self._backend.id_to_token(token))
        return [letter for letter in letters if letter is not None]

    def piece(self, token: int) -> bytes:
        return b"" if token in self._controls else self.literal(token)

    def literal(self, token: int) -> bytes:
        text: str = self._backend.id_to_token(token) or ""
        if token not in self._controls:
            if self._kind == "BPE":
                return bytes(map(BYTES.__getitem__, text))
            if self._kind == "WordPiece":
                text = text[2:] if text.startswith("##") else f" {text}"
            text = text.replace("▁", " ")
        return text.encode()

    def ends_generation(self, token: int) -> bool:
        return False


def _byte_letters() -> dict[str, int]:
    """The pieces of GPT-2, and of RoBERTa after it, are written in letters that stand for bytes:
    those that print for themselves, the others for letters from 256 on."""
    prints = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in prints]
    return {chr(b): b for b in prints} | {chr(256 + n): b for n, b in enumerate(others)}


BYTES = _byte_letters()
