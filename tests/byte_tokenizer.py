"""A vocabulary of the 256 bytes, an end, and whatever control tokens a test wants."""

import re
from collections.abc import Iterator, Sequence

import numpy as np

from engine.backends.base import Constraint

END = 256


class ByteTokenizer:
    """Implements `engine.backends.base.Tokenizer`."""

    bos: int | None = None

    def __init__(self, *control: str) -> None:
        self._texts = ("<end>", *control)
        self._ids = {text: END + number for number, text in enumerate(self._texts)}
        longest_first = sorted(self._texts, key=len, reverse=True)
        self._control = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        self.n_vocab = END + len(self._texts)

    def tokenize(self, text: str, *, parse_special: bool, continues: bool) -> list[int]:
        if not parse_special:
            return list(text.encode())
        ids: list[int] = []
        for part in self._control.split(text):
            ids += [self._ids[part]] if part in self._ids else part.encode()
        return ids

    def piece(self, token: int) -> bytes:
        return bytes([token]) if token < END else b""

    def ends_generation(self, token: int) -> bool:
        return token == END

    def shown(self, token: int) -> bytes:
        """What a text shows that shows every control token but the end."""
        return self._texts[token - END].encode() if token > END else self.piece(token)

    def text(self, tokens: Sequence[int]) -> str:
        return b"".join(map(self.shown, tokens)).decode(errors="replace")


def sampled(constraint: Constraint | None, wanted: Sequence[int], n_vocab: int) -> Iterator[int]:
    """What a model says that wants to say this, token by token; what it must say it says first.
    (None of it may be what it wants to say at that point.)"""
    at = 0
    for _ in range(len(wanted) + 100):
        if at == len(wanted):
            return
        logits = np.full(n_vocab, -1, np.float32)
        logits[wanted[at]] = 1
        if constraint:
            constraint.apply(logits)
        token = int(logits.argmax())
        assert logits[token] > -np.inf, "nothing is allowed"
        if constraint:
            constraint.accept(token)
        yield token
        at += token == wanted[at]
    raise AssertionError("it never says what it wants to")
