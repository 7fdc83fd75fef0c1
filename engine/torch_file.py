"""What torch.save wrote of named tensors, read without torch and without running a pickle.

A pickle is a program, so unpickling a file means running whatever it holds. Here a machine with
nothing but the operations that a state dictionary needs steps through it: it makes dictionaries,
tuples and notes of tensors, and whatever else a file asks for is an error.
"""

import io
import math
import mmap
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")
Floats = NDArray[np.float32]
Buffer = bytes | memoryview

# fmt: off
# Bytes of an element and its type for numpy, which has no bfloat16: the upper half of a float32.
_NUMPY_TYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "<i1", "U8": "<u1",
}
_STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32",
}
# fmt: on
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_MAX_PICKLE_BYTES = 1 << 24  # ten thousand tensors need about 2 MB


class UnreadableTensors(Exception):
    """Why a file gives no tensors: the end of a sentence that begins with the file's name."""


def read_torch_file(path: Path) -> dict[str, Floats]:
    """The tensors of a state dictionary, as float32. UnreadableTensors says why there are none."""
    return _read(path, _tensors)


def names_in_torch_file(path: Path) -> set[str]:
    """Of the same tensors, without reading their numbers."""
    return _read(path, lambda content, _: set(_listed(content)))


def to_float32(raw: Buffer, kind: str) -> Floats:
    """The elements of a buffer; F32 is not copied. UnreadableTensors for a type without numbers."""
    if kind not in _NUMPY_TYPES:
        raise UnreadableTensors(f"has a tensor of type {kind}, which is not read")
    values = np.frombuffer(raw, _NUMPY_TYPES[kind])
    if kind == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):  # infinite then, which the reader of a tensor has to refuse
        return values.astype(np.float32, copy=False)


@dataclass(frozen=True, slots=True)
class _Storage:
    kind: str
    key: str


_Take = Callable[[object, Callable[[_Storage], bytes]], T]  # of what is unpickled, and its storages


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A view of a storage; numbers are as the file has them, so nothing about them is sure."""

    storage: Any
    offset: Any
    shape: Any
    strides: Any


@dataclass(frozen=True, slots=True)
class _Name:
    """Something importable that a pickle names. It is never imported."""

    path: str


def _read(path: Path, take: _Take[T]) -> T:
    if zipfile.is_zipfile(path):
        return _read_archive(path, take)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _read_legacy(data, take)


def _read_archive(path: Path, take: _Take[T]) -> T:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        pickles = [name for name in names if name.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise UnreadableTensors("is a zip archive and not what torch.save writes")
        folder = pickles[0].removesuffix("data.pkl")

        def member(name: str) -> bytes:
            # What is not compressed is no larger than the file, whatever it claims.
            if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
                raise UnreadableTensors("is compressed, which torch.save never does")
            return archive.read(name)

        if f"{folder}byteorder" in names and member(f"{folder}byteorder") != b"little":
            raise UnreadableTensors("is big-endian; save it on an ordinary machine")
        content, _ = _run(member(pickles[0]))
        return take(content, lambda storage: member(f"{folder}data/{storage.key}"))


def _read_legacy(data: mmap.mmap, take: _Take[T]) -> T:
    """Before torch 1.6: pickles of a magic number, a version, the machine, the tensors and the
    storages' keys; then each storage's number of elements and bytes."""
    pos, parts = 0, []
    for _ in range(5):
        part, n_bytes = _run(data[pos : pos + _MAX_PICKLE_BYTES])
        parts.append(part)
        pos += n_bytes
        if parts[0] != _LEGACY_MAGIC:
            raise UnreadableTensors("is not what torch.save writes")
    content, keys = parts[3], parts[4]
    kinds = {tensor.storage.key: tensor.storage.kind for tensor in _listed(content).values()}
    spans: dict[str, tuple[int, int]] = {}
    for key in keys:
        (count,) = struct.unpack_from("<q", data, pos)
        end = pos + 8 + count * np.dtype(_NUMPY_TYPES[kinds[key]]).itemsize
        if count < 0 or end > len(data):
            raise UnreadableTensors("is cut short; download it again")
        spans[key] = pos + 8, end
        pos = end
    # Slices of a map are copies: nothing refers to the file when it is closed.
    return take(content, lambda storage: data[slice(*spans[storage.key])])


def _listed(content: object) -> dict[str, _Tensor]:
    """The tensors of a state dictionary, which may stand under a key of its own."""
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not content:
        raise UnreadableTensors("holds no dictionary of tensors")
    for name, tensor in content.items():
        if not isinstance(tensor, _Tensor) or not isinstance(tensor.storage, _Storage):
            raise UnreadableTensors(f"holds something else than tensors (at {name[:80]!r})")
    return content


def _tensors(content: object, read: Callable[[_Storage], bytes]) -> dict[str, Floats]:
    tensors = _listed(content)
    storages: dict[_Storage, Floats] = {}
    n_elements = 0
    found: dict[str, Floats] = {}
    for name, tensor in tensors.items():
        if tensor.storage not in storages:
            storages[tensor.storage] = to_float32(read(tensor.storage), tensor.storage.kind)
            n_elements += storages[tensor.storage].size
        found[name] = _view(storages[tensor.storage], tensor)
    # Tied weights are common; a thousand views of one storage would be a bomb.
    if sum(values.size for values in found.values()) > 4 * n_elements:
        raise UnreadableTensors("has more tensors than numbers to fill them")
    return {name: np.ascontiguousarray(values) for name, values in found.items()}


def _view(elements: Floats, tensor: _Tensor) -> Floats:
    shape, strides = _sizes(tensor.shape), _sizes(tensor.strides)
    (offset,) = _sizes((tensor.offset,))
    if len(shape) != len(strides) or len(shape) > 8:
        raise UnreadableTensors("has a tensor of impossible shape")
    count = math.prod(shape)
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if count > elements.size or (count and last >= elements.size):
        raise UnreadableTensors("has a tensor that reaches outside its storage")
    if not count:
        return np.empty(shape, np.float32)
    step = elements.itemsize
    return np.lib.stride_tricks.as_strided(
        elements[offset:], shape, [stride * step for stride in strides], writeable=False
    )


def _sizes(values: object) -> tuple[int, ...]:
    if not isinstance(values, tuple):
        raise UnreadableTensors("has a tensor of impossible shape")
    for value in values:
        if type(value) is not int or not 0 <= value < 1 << 48:
            raise UnreadableTensors("has a tensor of impossible shape")
    return values


# The machine


def _rebuilt_tensor(arguments: tuple[Any, ...]) -> _Tensor:
    return _Tensor(*arguments[:4])


_CALLABLE: Mapping[str, Callable[[tuple[Any, ...]], object]] = {
    "torch._utils _rebuild_tensor_v2": _rebuilt_tensor,
    "torch._utils _rebuild_tensor": _rebuilt_tensor,
    "torch._utils _rebuild_parameter": lambda arguments: arguments[0],
    "collections OrderedDict": lambda arguments: {},
}
# What puts one value on the stack, and for the first ones which.
_CONSTANTS: Mapping[str, Callable[[Any], object]] = {
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    "EMPTY_TUPLE": lambda _: (),
    "EMPTY_DICT": lambda _: {},
    "EMPTY_LIST": lambda _: [],
    "GLOBAL": _Name,
    **dict.fromkeys(
        "BINUNICODE SHORT_BINUNICODE BININT BININT1 BININT2 LONG1 BINFLOAT".split(),
        lambda value: value,
    ),
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _run(program: bytes) -> tuple[Any, int]:
    """What a pickle leaves on the stack, and how many bytes it has."""
    if len(program) > _MAX_PICKLE_BYTES:
        raise UnreadableTensors("has too long a list of tensors")
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}

    def taken(n: int) -> list[Any]:
        if n > len(stack):
            raise UnreadableTensors("is damaged; download it again")
        values = stack[len(stack) - n :]
        del stack[len(stack) - n :]
        return values

    def since_mark() -> list[Any]:
        return taken(len(stack) - marks.pop())

    for opcode, argument, pos in pickletools.genops(io.BytesIO(program)):
        match opcode.name:
            case "PROTO":
                pass
            case "STOP":
                return stack.pop(), (pos or 0) + 1
            case "MARK":
                marks.append(len(stack))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(taken(_TUPLES[opcode.name])))
            case "APPEND" | "APPENDS":
                items = taken(1) if opcode.name == "APPEND" else since_mark()
                _container(stack[-1], list).extend(items)
            case "SETITEM" | "SETITEMS":
                items = taken(2) if opcode.name == "SETITEM" else since_mark()
                # Only text: the hash of nested tuples can take for ever.
                if not all(type(key) is str for key in items[::2]):
                    raise UnreadableTensors("is damaged; download it again")
                _container(stack[-1], dict).update(zip(items[::2], items[1::2], strict=True))
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "BUILD":
                stack.pop()  # attributes of the dictionary: torch's versions of modules
            case "REDUCE":
                name, arguments = taken(2)
                stack.append(_called(name, arguments))
            case name if name in _CONSTANTS:
                stack.append(_CONSTANTS[name](argument))
            case name:
                raise UnreadableTensors(f"holds more than tensors ({name})")
    raise UnreadableTensors("is cut short; download it again")


def _container(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise UnreadableTensors("is damaged; download it again")
    return value


def _called(name: object, arguments: object) -> object:
    if not isinstance(name, _Name) or name.path not in _CALLABLE:
        path = name.path[:80].replace(" ", ".") if isinstance(name, _Name) else "something"
        raise UnreadableTensors(f"wants to run {path}, and only tensors are read")
    if not isinstance(arguments, tuple):
        raise UnreadableTensors("is damaged; download it again")
    return _CALLABLE[name.path](arguments)


def _storage(note: object) -> _Storage:
    """torch's note of a storage: ("storage", its type, its key, device, number of elements)."""
    match note:
        case ("storage", _Name(path=path), str(key), *rest) if not any(rest[2:]):
            library, _, name = path.partition(" ")
            if library == "torch" and name in _STORAGES:
                return _Storage(_STORAGES[name], key)
            raise UnreadableTensors(f"has tensors of type {name[:80]}, which is not read")
    raise UnreadableTensors("has a storage that is not read")
