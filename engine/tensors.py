"""Named arrays out of the files in which weights come: .safetensors, .pt, .bin."""

import json
import math
import mmap
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from engine.torch_file import (
    Floats,
    UnreadableTensors,
    names_in_torch_file,
    read_torch_file,
    to_float32,
)
from errors import ModelLoadFailed

T = TypeVar("T")

_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library


def read_tensors(path: Path) -> dict[str, Floats]:
    """All arrays of a file as float32, or ModelLoadFailed with one sentence that names the file.

    The sentence holds the file's name and never its folder: it goes to HTTP clients.
    """
    return _read(path, _READERS)


def tensor_names(path: Path) -> set[str]:
    """Of the arrays of a model's file, which are not read; raises like read_tensors."""
    return _read(path, _NAMES)


def _read(path: Path, readers: Mapping[str, Callable[[Path], T]]) -> T:
    try:
        read = readers.get(path.suffix)
        if read is None:
            raise UnreadableTensors(f"is none of {', '.join(sorted(readers))}")
        return read(path)
    except OSError as error:
        raise ModelLoadFailed(
            f"{path.name} cannot be read: {error.strerror or 'it is damaged'}; check its path."
        ) from None
    except UnreadableTensors as error:
        raise ModelLoadFailed(f"{path.name} {error}.") from None
    except Exception as error:  # a damaged file makes its readers raise anything
        raise ModelLoadFailed(f"{path.name} is damaged; download it again.") from error


def _read_safetensors(path: Path) -> dict[str, Floats]:
    # Ours, because the safetensors library has no bfloat16 for numpy.
    header, data = _open_safetensors(path)
    return {name: _tensor(data, entry) for name, entry in header.items()}


def _open_safetensors(path: Path) -> tuple[dict[str, Any], memoryview]:
    """What it says of each tensor, and their bytes."""
    with path.open("rb") as file:
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    (n_header,) = struct.unpack_from("<Q", data)
    start = 8 + n_header
    if n_header > _MAX_HEADER_BYTES or start > len(data):
        raise UnreadableTensors("is not a safetensors file, or is cut short")
    header: dict[str, Any] = json.loads(bytes(data[8:start]))
    header.pop("__metadata__", None)
    return header, data[start:]


def _tensor(data: memoryview, entry: dict[str, Any]) -> Floats:
    begin, end = entry["data_offsets"]
    if not 0 <= begin <= end <= len(data):
        raise UnreadableTensors("is cut short; download it again")
    values = to_float32(data[begin:end], entry["dtype"])
    shape: tuple[int, ...] = tuple(entry["shape"])
    if math.prod(shape) != values.size:
        raise UnreadableTensors("has a tensor whose shape does not fit its data")
    return values.reshape(shape)


_READERS = {
    ".safetensors": _read_safetensors,
    ".pt": read_torch_file,
    ".bin": read_torch_file,
}
_NAMES = {
    ".safetensors": lambda path: set(_open_safetensors(path)[0]),
    ".bin": names_in_torch_file,
}
