"""Rules of normalisation in the form in which SentencePiece, and a GGUF, hold them.

That is a double array (darts-clone): a trie in which the children of a node stand at its base,
each at base XOR its byte. A unit of 32 bits has its byte in the low bits, bit 8 where a rule ends,
and from bit 10 on the way from its own place to its base. The value of a rule, at the base itself,
says where its replacement begins in the texts that follow the array.
"""

import struct
import unicodedata
from collections.abc import Mapping
from typing import Any

_BLOCK = 256  # the children of one node lie in one
_OPEN_BLOCKS = 16  # further back nothing is looked for: that would take longer and save little
_MAX_OFFSET = 1 << 21

# Unicode 3.2, which every Python has: what composes has not changed since, and the result is the
# same file everywhere.
_unicode = unicodedata.ucd_3_2_0
_HALF_WIDTH_MARKS = {"\u3099": "\uff9e", "\u309a": "\uff9f"}
_HALF_WIDTH_KANA = {unicodedata.normalize("NFKC", chr(c)): chr(c) for c in range(0xFF66, 0xFF9E)}


def composed_sequences(forms: Mapping[str, str]) -> dict[str, str]:
    """Rules for characters that are spelled as letter and marks, like those of XLM-R.

    `forms` are the rules for single characters.
    """
    rules = {}
    for char in map(chr, range(0xA0, 0x10000)):
        spelled = _unicode.normalize("NFD", char)
        if len(spelled) > 1 and _unicode.normalize("NFC", spelled) == char:
            form = forms.get(char, char)
            rules[spelled] = form
            letter, mark = spelled[0], spelled[1]
            if letter in _HALF_WIDTH_KANA and mark in _HALF_WIDTH_MARKS:
                rules[_HALF_WIDTH_KANA[letter] + _HALF_WIDTH_MARKS[mark]] = form
    return rules


def charsmap(rules: Mapping[str, str]) -> bytes:
    """The rules as `tokenizer.ggml.precompiled_charsmap` has them."""
    texts, start_of = bytearray(), {}
    for form in sorted(set(rules.values())):
        start_of[form] = len(texts)
        texts += form.encode() + b"\0"
    trie: dict[Any, Any] = {}
    for text, form in rules.items():
        node = trie
        for byte in text.encode():
            node = node.setdefault(byte, {})
        node[0] = start_of[form]  # no text has a zero byte: that is how a rule ends
    units = _double_array(trie)
    return struct.pack(f"<I{len(units)}I", 4 * len(units), *units) + bytes(texts)


def _double_array(trie: dict[int, Any]) -> list[int]:
    units: list[int] = []
    free: dict[int, None] = {}  # in order, which a set has not
    bases: set[int] = set()

    def base_for(labels: list[int]) -> int:
        """Where all these children find room; no two nodes share a base."""
        while True:
            for place in free:
                base = place ^ labels[0]
                if base not in bases and all(base ^ label in free for label in labels):
                    return base
            _grow(units, free)

    _grow(units, free)
    del free[0]
    waiting = [(0, trie)]
    while waiting:
        place, node = waiting.pop()
        labels = sorted(node)
        base = base_for(labels)
        bases.add(base)
        offset = place ^ base
        units[place] |= offset << 10 if offset < _MAX_OFFSET else offset >> 8 << 10 | 1 << 9
        units[place] |= (0 in node) << 8
        for label in labels:
            del free[base ^ label]
            if label:
                units[base ^ label] = label
                waiting.append((base ^ label, node[label]))
            else:
                units[base] = 1 << 31 | node[0]
    return units


def _grow(units: list[int], free: dict[int, None]) -> None:
    """One more block of free places, and the oldest one is closed."""
    end = len(units)
    units.extend([0] * _BLOCK)
    free.update(dict.fromkeys(range(end, end + _BLOCK)))
    for place in range(end - _OPEN_BLOCKS * _BLOCK, end - (_OPEN_BLOCKS - 1) * _BLOCK):
        free.pop(place, None)
