"""The vocabulary of an XLM-R, out of tokenizer.json or sentencepiece.bpe.model."""

import base64
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from errors import ModelLoadFailed
from models.convert.xlm_roberta import Vocabulary

_SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]  # by id
# Field numbers of sentencepiece_model.proto.
_PIECES, _NORMALIZER = 1, 3
_PIECE, _SCORE = 1, 2
_CHARSMAP = 2


def read_vocabulary(directory: Path) -> Vocabulary:
    """From tokenizer.json where there is one: in it, `<mask>` has a place."""
    if (directory / "tokenizer.json").is_file():
        vocabulary = _from_json(directory / "tokenizer.json")
    elif (directory / "sentencepiece.bpe.model").is_file():
        vocabulary = _from_model(directory / "sentencepiece.bpe.model")
    else:
        raise ModelLoadFailed(
            f"{directory.name} has no tokenizer.json and no sentencepiece.bpe.model; "
            "download one of them."
        )
    if vocabulary.pieces[:4] != _SPECIAL:
        raise ModelLoadFailed(f"{directory.name} has not the special tokens of an XLM-R.")
    return vocabulary


def _from_json(path: Path) -> Vocabulary:
    content = json.loads(path.read_text(encoding="utf-8"))
    model = content["model"]
    charsmap = _charsmap_in(content.get("normalizer"))
    if model.get("type") != "Unigram" or charsmap is None:
        raise ModelLoadFailed(f"{path.name} is not the tokenizer of an XLM-R.")
    scores = {piece: float(score) for piece, score in model["vocab"]}
    pieces = list(scores)
    for token in content.get("added_tokens", []):
        if token["id"] == len(pieces):
            pieces.append(token["content"])
            scores[token["content"]] = 0.0
    return Vocabulary(pieces, list(scores.values()), base64.b64decode(charsmap))


def _charsmap_in(normalizer: Any) -> str | None:
    """It may be one of a sequence of normalizers; the others only squeeze spaces."""
    if not isinstance(normalizer, dict):
        return None
    found = (_charsmap_in(part) for part in normalizer.get("normalizers", []))
    charsmap: str | None = normalizer.get("precompiled_charsmap")
    return charsmap or next(filter(None, found), None)


def _from_model(path: Path) -> Vocabulary:
    pieces, scores, charsmap = [], [], b""
    for number, value in _fields(path.read_bytes()):
        if number == _PIECES:
            piece = dict(_fields(value))
            pieces.append(piece[_PIECE].decode())
            scores.append(struct.unpack("<f", piece[_SCORE])[0])
        elif number == _NORMALIZER:
            charsmap = dict(_fields(value)).get(_CHARSMAP, b"")
    # The ids of fairseq, in which XLM-R was trained: its own special tokens, then the pieces behind
    # SentencePiece's three, and the mask last.
    return Vocabulary([*_SPECIAL, *pieces[3:], "<mask>"], [0.0] * 4 + scores[3:] + [0.0], charsmap)


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Numbers and values of a protobuf message."""
    pos = 0
    while pos < len(message):
        key, pos = _varint(message, pos)
        match key & 7:
            case 0:
                value, pos = _varint(message, pos)
                yield key >> 3, value
                continue
            case 1:
                end = pos + 8
            case 2:
                n_bytes, pos = _varint(message, pos)
                end = pos + n_bytes
            case 5:
                end = pos + 4
            case _:
                raise ModelLoadFailed("sentencepiece.bpe.model is damaged; download it again.")
        if end > len(message):
            raise ModelLoadFailed("sentencepiece.bpe.model is cut short; download it again.")
        yield key >> 3, message[pos:end]
        pos = end


def _varint(message: bytes, pos: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if pos >= len(message):
            raise ModelLoadFailed("sentencepiece.bpe.model is cut short; download it again.")
        byte = message[pos]
        value |= (byte & 127) << shift
        pos, shift = pos + 1, shift + 7
        if byte < 128:
            return value, pos
