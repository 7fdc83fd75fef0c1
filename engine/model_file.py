"""What a GGUF header says about a model, without loading it.

A GGUF file is: magic, version, counts; the metadata, as keys with typed values; the list of
tensors; padding; the tensors' bytes. Only what stands before the padding is read. Arrays are
stepped over, and from the vocabulary only the few texts are fetched that somebody asks for.
"""

import mmap
import re
import stat
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray

from errors import ModelLoadFailed

T = TypeVar("T")
Kind = Literal["chat", "embedding", "reranker"]


@dataclass(frozen=True, slots=True)
class ModelFile:
    """The facts of one model that its users need before, or without, loading it."""

    path: Path
    size_bytes: int  # all parts of a split model together
    architecture: str
    name: str
    n_ctx_train: int
    n_layer: int
    n_embd: int
    n_vocab: int
    max_token_bytes: int  # no token stands for more of a prompt
    kv_bytes_per_token: int  # f16 keys and values of all layers; 0 for encoders
    chat_template: str | None
    bos_token: str  # "" where the model has none, also eos_token
    eos_token: str
    add_bos: bool
    control_tokens: tuple[str, ...]  # longest first; the literals that parse_special would obey
    kind: Kind
    n_head: int = 0  # of attention, in the layer with most; 0: not known
    # every token has a cell in each layer, and its numbers do not depend on the context's size
    has_plain_cells: bool = False
    # a context of more cells is computed with other factors of RoPE (Phi-3 and later); 0: there is
    # but one set
    n_ctx_short: int = 0
    tool_template: str | None = None  # in the place of the other where there are tools
    state_bytes: int = 0  # of recurrent layers, for each sequence; 0: counted among the cells


def name_of(path: Path) -> str:
    """What a model is called where clients may read it: never where it is, and of a directory in
    the hub's cache its repo and not a commit."""
    repo = path.parent.parent.name
    if path.parent.name == "snapshots" and repo.startswith("models--"):
        return repo.removeprefix("models--").replace("--", "/", 1)
    return path.name.encode("utf-8", "replace").decode() or "the model path"


def read_model_file(path: Path) -> ModelFile:
    """The header of the GGUF at `path`, or ModelLoadFailed with one sentence that names the file.

    The sentence holds the file's name and never its folder: it goes to HTTP clients.
    """
    with open_header(path) as header:
        return _describe(path, header)


@contextmanager
def open_header(path: Path) -> Iterator["Header"]:
    """The header itself, for readers that want more of it; raises like read_model_file."""
    name = name_of(path)
    with _map(path, name) as data:
        yield Header(data, name)


# fmt: off
# Scalar types by their number in the file, as codes that struct and numpy share.
_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}
_U32, _STRING, _ARRAY, _U64 = 4, 8, 9, 10

# Tensor types by their number: elements a block, bytes a block (ggml.h, ggml-common.h).
_TENSOR_TYPES = {
    0: (1, 4), 1: (1, 2), 30: (1, 2), 28: (1, 8),           # F32 F16 BF16 F64
    24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8),         # I8 I16 I32 I64
    2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24),     # Q4_0 Q4_1 Q5_0 Q5_1
    8: (32, 34), 9: (32, 40),                               # Q8_0 Q8_1
    10: (256, 84), 11: (256, 110), 12: (256, 144),          # Q2_K Q3_K Q4_K
    13: (256, 176), 14: (256, 210), 15: (256, 292),         # Q5_K Q6_K Q8_K
    16: (256, 66), 17: (256, 74), 22: (256, 82),            # IQ2_XXS IQ2_XS IQ2_S
    18: (256, 98), 21: (256, 110), 20: (32, 18),            # IQ3_XXS IQ3_S IQ4_NL
    23: (256, 136), 19: (256, 50), 29: (256, 56),           # IQ4_XS IQ1_S IQ1_M
    34: (256, 54), 35: (256, 66), 39: (32, 17),             # TQ1_0 TQ2_0 MXFP4
    40: (64, 36), 41: (128, 18),                            # NVFP4 Q1_0
}
# fmt: on

# Architectures that llama.cpp runs without a KV cache.
ENCODERS = frozenset(
    "bert modern-bert nomic-bert nomic-bert-moe neo-bert jina-bert-v2 jina-bert-v3 eurobert "
    "gemma-embedding t5encoder".split()
)
_POOLING_NONE, _POOLING_RANK = 0, 4

# llama-vocab.cpp: who adds BOS when the file does not say, and which ids stand in for missing
# ones. Its BOS 11 for gpt2 is left out: that is Falcon's, and a comma elsewhere.
_BOS_TOKENIZERS = ("llama", "bert", "gemma4")
_BOS_PRE_TOKENIZERS = frozenset(
    "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano tekken "
    "chameleon".split()
)
_DEFAULT_BOS = {"llama": 1, "bert": 101}
_DEFAULT_EOS = {"llama": 2, "t5": 1}

_TYPE_UNKNOWN, _TYPE_CONTROL = 2, 3
# Ends of turn and marks of infilling that llama-vocab.cpp makes control tokens, whatever type the
# file gives them.
CONTROL_BY_NAME = frozenset(
    "<|fim_prefix|> <fim-prefix> <fim_prefix> <｜fim▁begin｜> <PRE> ▁<PRE> <|code_prefix|> "
    "<|fim_suffix|> <fim-suffix> <fim_suffix> <｜fim▁hole｜> <SUF> ▁<SUF> <|code_suffix|> "
    "<|fim_middle|> <fim-middle> <fim_middle> <｜fim▁end｜> <MID> ▁<MID> <|code_middle|> "
    "<|prefix|> <|suffix|> <|middle|> <|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD] "
    "<|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame> <|file_sep|> "
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> "
    "<|endoftext|> </s> <|eom_id|> <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> "
    "<eos> <turn|> <|tool_response> <｜end▁of▁sentence｜> [e~[".split()
)

# Far above any real model; they bound the time that a hostile file can take.
_MAX_ENTRIES = 1 << 16  # metadata keys, tensors
_MAX_TEXTS = 1 << 21  # elements of all string arrays together
_MAX_TEXT_BYTES = 1 << 24
_MAX_LAYERS = 1 << 12
_MAX_NUMBER = (1 << 31) - 1

# Metadata and tensors of models with sliding windows, with states in the place of cells or beside
# them, and with RoPE scaled for long contexts: it may go by the size of the context.
_OTHER_CELLS = re.compile(
    r"\.sliding_window|\.ssm[._]|\.wkv|\.token_shift|\.shortconv|\.original_context_length"
    r"|\.indexer\.|rope_factors_long"
)
_ARCHITECTURE_NAME = re.compile(r"[\w.-]{1,64}")
_SPLIT_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True, slots=True)
class _Array:
    """Where an array stands in the file; its elements are read when somebody needs them."""

    type: int
    count: int
    start: int
    texts: NDArray[np.int64]  # for strings: where each begins, and where the last one ends


class Header:
    """Steps through a header once. Every length in it is checked before it is used."""

    def __init__(self, data: mmap.mmap, name: str) -> None:
        self.data = data
        self.name = name
        self.size = len(data)
        self.pos = 0
        self._n_texts = 0
        self._read_magic()
        n_tensors = self._count(_MAX_ENTRIES, "tensors")
        n_keys = self._count(_MAX_ENTRIES, "metadata keys")
        self.metadata = {self._text(): self._value() for _ in range(n_keys)}
        # By name, where each ends in the data section.
        self.tensors = {self._text(): self._tensor() for _ in range(n_tensors)}

    def fail(self, reason: str) -> NoReturn:
        raise ModelLoadFailed(f"{self.name} {reason}.")

    def damaged(self, reason: str) -> NoReturn:
        self.fail(f"is damaged: {reason}; download it again")

    def wrong_type(self, key: str) -> NoReturn:
        self.damaged(f"{key} has a value of the wrong type")

    # Facts, once the header has been stepped through.

    def text(self, key: str) -> str:
        return self.value(key, "")

    def number(self, key: str, default: int, limit: int = _MAX_NUMBER) -> int:
        value = self.value(key, default)
        if not 0 <= value <= limit:
            self.damaged(f"{key} is out of range")
        return value

    def value(self, key: str, default: T) -> T:
        """The value, which has to be of the same type as the default."""
        value = self.metadata.get(key, default)
        if type(value) is not type(default):
            self.wrong_type(key)
        return value

    def size_of(self, key: str, limit: int = _MAX_NUMBER) -> int:
        """A number without which there is no language model."""
        value = self.number(key, 0, limit)
        if value < 1:
            self.fail(f"is not a whole language model (no {key} in it); give the model's main file")
        return value

    def per_layer(self, key: str, n_layer: int, default: list[int]) -> list[int]:
        """A value that some architectures give once and some for each layer."""
        value = self.metadata.get(key)
        if value is None:
            return default
        if not isinstance(value, _Array):
            return [self.number(key, 0)] * n_layer
        numbers = self.numbers(key, n_layer)
        if len(numbers) < n_layer or numbers.min() < 0 or numbers.max() > _MAX_NUMBER:
            self.damaged(f"{key} does not fit its {n_layer} layers")
        return [int(number) for number in numbers]

    def array(self, key: str) -> _Array | None:
        value = self.metadata.get(key)
        if not isinstance(value, _Array | None):
            self.wrong_type(key)
        return value

    def numbers(self, key: str, at_most: int) -> NDArray[Any]:
        """The first `at_most` elements of an array of integers, empty where there is none."""
        array = self.array(key)
        if array is None:
            return np.empty(0, np.int64)
        code = _SCALARS.get(array.type, "f")
        if code in "fd?":
            self.wrong_type(key)
        # Copied, because the map cannot be closed under a view of it.
        count = min(array.count, at_most)
        dtype: np.dtype[Any] = np.dtype(f"<{code}")
        return np.array(np.frombuffer(self.data, dtype, count, array.start))

    def floats(self, key: str) -> NDArray[np.float32] | None:
        """An array of float32, None where there is none."""
        array = self.array(key)
        if array is None:
            return None
        if _SCALARS.get(array.type) != "f":
            self.wrong_type(key)
        return np.array(np.frombuffer(self.data, "<f4", array.count, array.start))

    def texts(self, array: _Array, indices: Iterable[int]) -> list[str]:
        """Elements of an array of strings."""
        spans = ((array.texts[i] + 8, array.texts[i + 1]) for i in indices)
        return [self.data[start:end].decode("utf-8", "replace") for start, end in spans]

    # Stepping. Each method begins at `pos` and leaves it behind what it has read.

    def _skip(self, n_bytes: int) -> int:
        start = self.pos
        if n_bytes > self.size - start:
            self.fail("is cut short: it ends inside its header; download it again")
        self.pos = start + n_bytes
        return start

    def _scalar(self, type_: int) -> Any:
        code = self._code(type_)
        return struct.unpack_from(code, self.data, self._skip(struct.calcsize(code)))[0]

    def _code(self, type_: int) -> str:
        if type_ not in _SCALARS:
            self.damaged(f"its header has a value of unknown type {type_}")
        return f"<{_SCALARS[type_]}"

    def _count(self, limit: int, what: str) -> int:
        count: int = self._scalar(_U64)
        if count > limit:
            self.damaged(f"it claims {count} {what}")
        return count

    def _text(self) -> str:
        n_bytes = self._count(_MAX_TEXT_BYTES, "bytes of text for one value")
        start = self._skip(n_bytes)
        return self.data[start : start + n_bytes].decode("utf-8", "replace")

    def _value(self) -> Any:
        type_ = self._scalar(_U32)
        if type_ == _STRING:
            return self._text()
        return self._array() if type_ == _ARRAY else self._scalar(type_)

    def _array(self) -> _Array:
        type_ = self._scalar(_U32)
        if type_ == _ARRAY:
            self.fail("has an array within an array, which no model needs; download it again")
        if type_ == _STRING:
            self._n_texts += (count := self._count(_MAX_TEXTS - self._n_texts, "strings"))
            start = self.pos
            return _Array(type_, count, start, self._step_over_texts(count))
        item_bytes = struct.calcsize(self._code(type_))
        count = self._scalar(_U64)
        start = self._skip(count * item_bytes)
        return _Array(type_, count, start, np.empty(0, np.int64))

    def _step_over_texts(self, count: int) -> NDArray[np.int64]:
        # The loop that decides how long a header takes: a vocabulary passes through it.
        data, pos, last = self.data, self.pos, self.size - 8
        length_at = struct.Struct("<Q").unpack_from
        starts = [pos]
        for _ in range(count):
            if pos > last:
                break
            pos += 8 + length_at(data, pos)[0]
            starts.append(pos)
        if len(starts) <= count or pos > self.size:
            self.fail("is cut short: it ends inside its vocabulary; download it again")
        self.pos = pos
        return np.array(starts, np.int64)

    def _tensor(self) -> int:
        n_dims = self._scalar(_U32)
        if n_dims > 4:
            self.damaged(f"it claims a tensor of {n_dims} dimensions")
        n_elements: int = prod(self._scalar(_U64) for _ in range(n_dims))
        # A type that is newer than the table counts as nothing.
        block, block_bytes = _TENSOR_TYPES.get(self._scalar(_U32), (1, 0))
        offset: int = self._scalar(_U64)
        return offset + n_elements // block * block_bytes

    def _read_magic(self) -> None:
        if self.data[:8] == b"version ":
            self.fail("is a Git LFS pointer and not the model itself; fetch it with `git lfs pull`")
        if self.data[:4] != b"GGUF":
            self.fail("is not a GGUF file; llama.cpp needs a model in that format")
        self.pos = 4
        version = self._scalar(_U32)
        if version and version & 0xFFFF == 0:
            self.fail("is a big-endian GGUF; use the little-endian one")
        if version not in (2, 3):
            self.fail(f"has GGUF version {version}, and only 2 and 3 are read; convert it again")


def _map(path: Path, name: str) -> mmap.mmap:
    try:
        status = path.stat()  # before opening: that would wait for ever on a named pipe
        if not stat.S_ISREG(status.st_mode):
            is_folder = stat.S_ISDIR(status.st_mode)
            kind = "a directory" if is_folder else "not a regular file"
            hint = " (or BACKEND=mlx, onnx or flag, for encoders)" if is_folder else ""
            raise ModelLoadFailed(f"{name} is {kind}; give the path of a GGUF file{hint}.")
        if status.st_size == 0:
            raise ModelLoadFailed(f"{name} is empty; download it again.")
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path, a file emptied just now
        reason = getattr(error, "strerror", None) or "The path is not valid"
        raise ModelLoadFailed(f"{name} cannot be read: {reason}; check its path.") from None


def _describe(path: Path, header: Header) -> ModelFile:
    architecture = header.text("general.architecture")
    if not _ARCHITECTURE_NAME.fullmatch(architecture):
        header.fail("does not name its architecture (general.architecture); convert it again")
    _check_tensor_data(header)
    n_layer = header.size_of(f"{architecture}.block_count", _MAX_LAYERS)
    tokens = header.array("tokenizer.ggml.tokens")
    if tokens and tokens.type != _STRING:
        header.damaged("its vocabulary is not text")
    tokenizer_model, pre = header.text("tokenizer.ggml.model"), header.text("tokenizer.ggml.pre")
    bos_token = _special(header, tokens, "bos", _DEFAULT_BOS.get(tokenizer_model))
    names = [*header.metadata, *header.tensors]
    adds_bos = tokenizer_model in _BOS_TOKENIZERS or pre in _BOS_PRE_TOKENIZERS
    n_ctx_train = header.size_of(f"{architecture}.context_length")
    has_factors = any("rope_factors_long" in name for name in header.tensors)
    original = f"{architecture}.rope.scaling.original_context_length"
    return ModelFile(
        path=path,
        size_bytes=_size_bytes(path, header),
        architecture=architecture,
        name=header.text("general.name") or path.stem,
        n_ctx_train=n_ctx_train,
        n_layer=n_layer,
        n_embd=header.size_of(f"{architecture}.embedding_length"),
        n_vocab=tokens.count if tokens else header.number(f"{architecture}.vocab_size", 0),
        max_token_bytes=int(np.diff(tokens.texts).max(initial=9)) - 8 if tokens else 1,
        kv_bytes_per_token=_kv_bytes_per_token(header, architecture, n_layer),
        chat_template=header.text("tokenizer.chat_template") or None,
        bos_token=bos_token,
        eos_token=_special(header, tokens, "eos", _DEFAULT_EOS.get(tokenizer_model)),
        add_bos=header.value("tokenizer.ggml.add_bos_token", adds_bos) and bos_token != "",
        control_tokens=_control_tokens(header, tokens),
        kind=_kind(header, architecture),
        n_head=max(_n_head(header, architecture, n_layer), default=0),
        has_plain_cells=not any(_OTHER_CELLS.search(name) for name in names),
        n_ctx_short=header.number(original, n_ctx_train) if has_factors else 0,
        tool_template=header.text("tokenizer.chat_template.tool_use") or None,
    )


def _check_tensor_data(header: Header) -> None:
    alignment = header.number("general.alignment", 32) or 32
    data_start = -(-header.pos // alignment) * alignment
    end = data_start + max(header.tensors.values(), default=0)
    if header.tensors and end > header.size:
        header.fail(f"is cut short: it has {header.size:,} bytes of {end:,}; download it again")


def _size_bytes(path: Path, header: Header) -> int:
    """Bytes of the file, or of all parts where the model is split."""
    n_parts = header.number("split.count", 1)
    named = _SPLIT_NAME.fullmatch(path.name)
    if n_parts <= 1 or not named or int(named[3]) != n_parts:
        return header.size
    if int(named[2]) != 1:
        header.fail("is a later part of a split model; give the first part")
    size_bytes = header.size
    for i in range(2, n_parts + 1):
        part = path.with_name(f"{named[1]}-{i:05}-of-{named[3]}.gguf")
        try:
            size_bytes += part.stat().st_size
        except OSError:
            header.fail(f"is split, and {part.name} is not beside it; download all parts")
    return size_bytes


def _kv_bytes_per_token(header: Header, architecture: str, n_layer: int) -> int:
    """An upper bound: sliding windows and layers without attention may hold less."""
    if architecture in ENCODERS:
        return 0
    attention = f"{architecture}.attention"
    n_head = _n_head(header, architecture, n_layer)
    n_head_kv = header.per_layer(f"{attention}.head_count_kv", n_layer, n_head)
    n_embd = header.size_of(f"{architecture}.embedding_length")
    n_embd_head = n_embd // max(*n_head, 1)
    n_key = header.number(f"{attention}.key_length", n_embd_head)
    n_value = header.number(f"{attention}.value_length", n_embd_head)
    return sum(n_head_kv) * (n_key + n_value) * 2


def _n_head(header: Header, architecture: str, n_layer: int) -> list[int]:
    return header.per_layer(f"{architecture}.attention.head_count", n_layer, [0] * n_layer)


def _kind(header: Header, architecture: str) -> Kind:
    pooling = header.number(f"{architecture}.pooling_type", _POOLING_NONE)
    if pooling == _POOLING_RANK or "cls.output.weight" in header.tensors:
        return "reranker"
    # labels alone say nothing, since configs have them by default, and a ModernBERT that embeds may
    # have the first layer of a head; where all of the head is that one, labels come with it
    has_labels = f"{architecture}.classifier.output_labels" in header.metadata
    if pooling == _POOLING_NONE and has_labels and "cls.weight" in header.tensors:
        return "reranker"
    return "embedding" if pooling != _POOLING_NONE or architecture in ENCODERS else "chat"


def _special(header: Header, tokens: _Array | None, which: str, default: int | None) -> str:
    """The text of BOS or EOS. An id outside the vocabulary is ignored, as in llama.cpp."""
    if tokens is None:
        return ""
    declared = header.metadata.get(f"tokenizer.ggml.{which}_token_id")
    for token in (declared, default):
        if isinstance(token, int) and 0 <= token < tokens.count:
            return header.texts(tokens, [token])[0]
    return ""


def _control_tokens(header: Header, tokens: _Array | None) -> tuple[str, ...]:
    """Texts that llama.cpp turns into one special id when it parses specials in a prompt.

    Those are the tokens of type control, and the unknown token, and the names it knows by heart.
    """
    if tokens is None:
        return ()
    types = header.numbers("tokenizer.ggml.token_type", tokens.count)
    special = np.flatnonzero((types == _TYPE_CONTROL) | (types == _TYPE_UNKNOWN))
    every = header.texts(tokens, range(tokens.count))
    texts = {every[i] for i in special} | CONTROL_BY_NAME.intersection(every)
    return tuple(sorted(texts - {""}, key=lambda text: (-len(text), text)))
