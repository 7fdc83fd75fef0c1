"""Files of a model's directory as Hugging Face has it."""

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def write_safetensors(path: Path, tensors: Mapping[str, NDArray[Any]]) -> Path:
    """As float32."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, values in tensors.items():
        start, end = end, end + 4 * values.size
        header[name] = {"dtype": "F32", "shape": values.shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for values in tensors.values():
            file.write(np.ascontiguousarray(values, "<f4").tobytes())
    return path


def around(single: str, pair: str, pieces: Sequence[str]) -> dict[str, Any]:
    """The part of tokenizer.json that puts tokens around texts, such as `<s> A </s>`."""
    return {
        "type": "TemplateProcessing",
        "single": _template(single),
        "pair": _template(pair),
        "special_tokens": {
            token: {"id": token, "ids": [pieces.index(token)], "tokens": [token]}
            for token in single.split()
            if token != "A"
        },
    }


def _template(pattern: str) -> list[dict[str, Any]]:
    return [
        {"Sequence" if part in "AB" else "SpecialToken": {"id": part, "type_id": 0}}
        for part in pattern.split()
    ]
