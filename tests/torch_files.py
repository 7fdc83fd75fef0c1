"""Writes what torch.save writes for a dictionary of tensors, without torch."""

import io
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Tensors = Mapping[str, NDArray[np.float32]]

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # before torch 1.6
_SYSTEM = {"protocol_version": _PROTOCOL, "little_endian": True, "type_sizes": {}}
_NUMPY_TYPES = {"FloatStorage": "<f4", "HalfStorage": "<f2", "DoubleStorage": "<f8"}


def write_pt(path: Path, tensors: Tensors, storage: str = "FloatStorage") -> Path:
    """The format of torch 1.6 and later: a zip archive of one pickle and a file per storage."""
    names = {name: str(i) for i, name in enumerate(tensors)}
    with zipfile.ZipFile(path, "w") as archive:

        def put(name: str, content: bytes) -> None:
            member = zipfile.ZipInfo(f"{path.stem}/{name}", (1980, 1, 1, 0, 0, 0))
            archive.writestr(member, content)

        put("data.pkl", pickled(tensors, storage))
        put("byteorder", b"little")
        for name, values in tensors.items():
            put(f"data/{names[name]}", stored(values, storage))
        put("version", b"3\n")
    return path


def write_legacy_pt(path: Path, tensors: Tensors, storage: str = "FloatStorage") -> Path:
    """The format before torch 1.6: five pickles, then the storages one after the other."""
    parts = [pickle.dumps(part, 2) for part in (_MAGIC, _PROTOCOL, _SYSTEM)]
    parts.append(pickled(tensors, storage, legacy=True))
    parts.append(pickle.dumps([str(i) for i in range(len(tensors))], 2))
    for values in tensors.values():
        parts += [struct.pack("<q", values.size), stored(values, storage)]
    path.write_bytes(b"".join(parts))
    return path


def pickled(
    tensors: Tensors,
    storage: str = "FloatStorage",
    *,
    legacy: bool = False,
    offset: int = 0,
    strides: tuple[int, ...] | None = None,
) -> bytes:
    """The pickle of an OrderedDict of tensors, each a call of torch's to rebuild it.

    `offset` and `strides` replace, in every tensor, those of an ordinary one.
    """
    out = io.BytesIO()

    def text(value: str) -> bytes:
        encoded = value.encode()
        return pickle.BINUNICODE + struct.pack("<I", len(encoded)) + encoded

    def numbers(*values: int) -> bytes:
        return b"".join(b"J" + struct.pack("<i", v) for v in values)

    out.write(b"\x80\x02ccollections\nOrderedDict\n)R(")
    for i, (name, values) in enumerate(tensors.items()):
        out.write(text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n((")
        out.write(text("storage") + f"ctorch\n{storage}\n".encode() + text(str(i)) + text("cpu"))
        out.write(numbers(values.size) + (b"N" if legacy else b"") + b"tQ" + numbers(offset))
        ordinary = tuple(int(np.prod(values.shape[j + 1 :])) for j in range(values.ndim))
        out.write(b"(" + numbers(*values.shape) + b"t")
        out.write(b"(" + numbers(*(ordinary if strides is None else strides)) + b"t")
        out.write(b"\x89ccollections\nOrderedDict\n)RtR")
    out.write(b"u.")
    return out.getvalue()


def stored(values: NDArray[np.float32], storage: str) -> bytes:
    if storage == "BFloat16Storage":
        bits = np.ascontiguousarray(values, "<f4").view("<u4")
        return (bits >> 16).astype("<u2").tobytes()
    return np.ascontiguousarray(values, _NUMPY_TYPES[storage]).tobytes()
