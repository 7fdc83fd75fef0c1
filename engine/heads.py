"""The two layers that make sparse weights and ColBERT rows out of BGE-M3's last hidden rows.

GGUF has no place for them among its tensors, so they come beside the model or in its metadata.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.file_names import COLBERT, HEAD_SUFFIXES, PACKED_HEADS, SPARSE
from engine.model_file import open_header
from engine.tensors import read_tensors
from engine.torch_file import Floats
from engine.wire import EncoderSpec
from errors import ModelLoadFailed

METADATA_PREFIX = "bge_m3."  # in a GGUF: bge_m3.sparse_linear.weight and so on, as flat arrays

_POOLING_NONE, _POOLING_CLS = 0, 2
# What converters append to a name: model-Q4_K_M, model.f16, model-fp16.
_QUANTIZATION = re.compile(r"[-._](?:bf16|fp?16|fp?32|i?q\d\w*|tq\d\w*|mxfp4)$", re.IGNORECASE)


@dataclass(frozen=True, slots=True, eq=False)
class Heads:
    """Float32, in the shapes in which they are multiplied with hidden rows [n_tokens, n_embd]."""

    sparse_weight: Floats  # [n_embd]
    sparse_bias: float
    colbert_weight: Floats  # [n_colbert, n_embd]
    colbert_bias: Floats  # [n_colbert]


def heads_of(
    model_path: Path, n_embd: int, encoder: EncoderSpec
) -> tuple[Heads | None, tuple[str, ...]]:
    """The heads that a tier's model has, and where it has none what is missing."""
    if encoder.kind != "embedding":
        return None, ()
    sparse = Path(encoder.sparse_head_path) if encoder.sparse_head_path else None
    colbert = Path(encoder.colbert_head_path) if encoder.colbert_head_path else None
    heads = read_heads(model_path, n_embd, sparse, colbert)
    return heads, missing_heads(model_path, sparse, colbert) if heads is None else ()


def read_heads(
    model_path: Path, n_embd: int, sparse_path: Path | None, colbert_path: Path | None
) -> Heads | None:
    """The heads of a model, or None where one of them is nowhere.

    Each is looked for in this order, and the first place that has it counts:

    1. The path that is given; that there is no such file is then an error.
    2. The model's own metadata.
    3. `<model's name without its quantization>.heads.safetensors` beside the model.
    4. `sparse_linear` and `colbert_linear`, as .pt or .safetensors, in the model where it is a
       directory; or beside it, where it is of BGE-M3's kind and width: other models may lie there.

    Raises ModelLoadFailed with one sentence that names the file, for heads that do not fit.
    """
    sparse = _find(SPARSE, model_path, n_embd, sparse_path)
    colbert = _find(COLBERT, model_path, n_embd, colbert_path)
    if sparse is None or colbert is None:
        return None
    # In metadata the arrays are flat; their last dimension is the model's.
    sparse_weight = sparse.shaped("weight", (1, n_embd))
    n_colbert = colbert.bias.size
    return Heads(
        sparse_weight=sparse_weight[0],
        sparse_bias=float(sparse.shaped("bias", (1,))[0]),
        colbert_weight=colbert.shaped("weight", (n_colbert, n_embd)),
        colbert_bias=colbert.shaped("bias", (n_colbert,)),
    )


def missing_heads(
    model_path: Path, sparse_path: Path | None, colbert_path: Path | None
) -> tuple[str, ...]:
    """Names of the files that would have to be put beside the model, for a message.

    Empty where nothing is missing, or no such file would be taken. It reads no weights.
    """
    if not _takes_loose(model_path):
        return ()
    names = ((SPARSE, sparse_path), (COLBERT, colbert_path))
    return tuple(
        f"{name}.pt"
        for name, given in names
        if given is None
        and not _in_metadata(name, model_path)
        and not _packed(model_path)
        and not _loose(name, model_path)
    )


@dataclass(frozen=True, slots=True)
class _Layer:
    """A linear layer as some file has it."""

    file: str  # its name, for messages
    weight: Floats
    bias: Floats

    def shaped(self, part: str, shape: tuple[int, ...]) -> Floats:
        values = self.weight if part == "weight" else self.bias
        if values.size != np.prod(shape) or (values.ndim == len(shape) and values.shape != shape):
            found, wanted = _shape_text(values.shape), _shape_text(shape)
            raise ModelLoadFailed(
                f"{self.file} has a {part} of {found}, and the model needs {wanted}; "
                "give the heads that belong to it."
            )
        if not np.isfinite(values).all():
            raise ModelLoadFailed(
                f"{self.file} has a {part} that is not finite; download it again."
            )
        return np.array(values.reshape(shape))  # no view of a file that may be replaced


def _find(name: str, model_path: Path, n_embd: int, given: Path | None) -> _Layer | None:
    if given is not None:
        return _from_file(name, given)
    if found := _from_metadata(name, model_path):
        return found
    if packed := _packed(model_path):
        return _from_file(name, packed)
    path = _loose(name, model_path)
    if path is None or not _takes_loose(model_path):
        return None
    layer = _from_file(name, path)
    is_others = not model_path.is_dir() and layer.weight.shape[-1:] != (n_embd,)
    return None if is_others else layer


def _from_file(name: str, path: Path) -> _Layer:
    """The layer of a file with one layer, or of that name in a file with several."""
    tensors = read_tensors(path)
    prefix = f"{name}." if f"{name}.weight" in tensors else ""
    try:
        return _Layer(path.name, tensors[f"{prefix}weight"], tensors[f"{prefix}bias"])
    except KeyError:
        raise ModelLoadFailed(
            f"{path.name} has no {name}.weight and {name}.bias; give BGE-M3's {name}.pt."
        ) from None


def _from_metadata(name: str, model_path: Path) -> _Layer | None:
    if model_path.is_dir():
        return None
    with open_header(model_path) as header:
        weight = header.floats(f"{METADATA_PREFIX}{name}.weight")
        bias = header.floats(f"{METADATA_PREFIX}{name}.bias")
    if weight is None or bias is None:
        return None
    return _Layer(model_path.name, weight, bias)


def _in_metadata(name: str, model_path: Path) -> bool:
    if model_path.is_dir():
        return False
    with open_header(model_path) as header:
        return f"{METADATA_PREFIX}{name}.weight" in header.metadata


def _packed(model_path: Path) -> Path | None:
    """The file beside a GGUF that by its name has the heads of this one."""
    stem = _QUANTIZATION.sub("", model_path.stem)
    path = model_path.with_name(f"{stem}{PACKED_HEADS}")
    return path if path.is_file() and not model_path.is_dir() else None


def _loose(name: str, model_path: Path) -> Path | None:
    """A file by the name that FlagEmbedding gives it, in a directory or beside a GGUF."""
    folder = model_path if model_path.is_dir() else model_path.parent
    paths = (folder / (name + suffix) for suffix in HEAD_SUFFIXES)
    return next((path for path in paths if path.is_file()), None)


def _takes_loose(model_path: Path) -> bool:
    """Whether loose files can be its heads: a GGUF has to be an XLM-R with the row of CLS."""
    if model_path.is_dir():
        return True
    with open_header(model_path) as header:
        return (
            header.text("general.architecture") == "bert"
            and header.text("tokenizer.ggml.model") == "t5"
            and header.number("bert.pooling_type", _POOLING_NONE) in (_POOLING_NONE, _POOLING_CLS)
        )


def _shape_text(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))
