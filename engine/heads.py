"""The two layers that make sparse weights and ColBERT rows out of BGE-M3's last hidden rows.

GGUF has no place for them among its tensors, so they come beside the model or in its metadata.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.file_names import COLBERT, HEAD_SUFFIXES, PACKED_HEADS, SPARSE
from engine.model_file import Header, open_header
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
    return find_heads(model_path, n_embd, sparse, colbert)


def find_heads(
    model_path: Path, n_embd: int, sparse_path: Path | None, colbert_path: Path | None
) -> tuple[Heads | None, tuple[str, ...]]:
    """The heads of a model, or None where one of them is nowhere, and the names of the files that
    would have to be put beside the model then: none, where no such file would be taken.

    Each is looked for in this order, and the first place that has it counts:

    1. The path that is given; that there is no such file is then an error.
    2. The model's own metadata.
    3. `<model's name without its quantization>.heads.safetensors` beside the model.
    4. `sparse_linear` and `colbert_linear`, as .pt or .safetensors, in the model where it is a
       directory; or beside it, where it is of BGE-M3's kind and width: other models may lie there.

    Raises ModelLoadFailed with one sentence that names the file, for heads that do not fit.
    """
    given = {SPARSE: sparse_path, COLBERT: colbert_path}
    inside: dict[str, _Layer | None] = {}
    packed, takes_loose = None, True
    if not model_path.is_dir():
        packed = _packed(model_path)
        with open_header(model_path) as header:
            takes_loose = _takes_loose(header)
            inside = {name: _from_metadata(name, header) for name in given if not given[name]}
    found, missing = [], []
    for name in given:
        loose = _loose(name, model_path) if takes_loose else None
        layer, path = inside.get(name), given[name] or packed or loose
        if layer is None and path is not None:
            layer = _from_file(name, path)
            if path is loose and not model_path.is_dir() and layer.weight.shape[-1:] != (n_embd,):
                continue  # another model's
        if layer is not None:
            found.append(layer)
        elif takes_loose:
            missing.append(f"{name}.pt")
    if len(found) < 2:
        return None, tuple(missing)
    sparse, colbert = found
    # In metadata the arrays are flat; their last dimension is the model's.
    sparse_weight = sparse.shaped("weight", (1, n_embd))
    n_colbert = colbert.bias.size
    heads = Heads(
        sparse_weight=sparse_weight[0],
        sparse_bias=float(sparse.shaped("bias", (1,))[0]),
        colbert_weight=colbert.shaped("weight", (n_colbert, n_embd)),
        colbert_bias=colbert.shaped("bias", (n_colbert,)),
    )
    return heads, ()


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


def _from_metadata(name: str, header: Header) -> _Layer | None:
    weight = header.floats(f"{METADATA_PREFIX}{name}.weight")
    bias = header.floats(f"{METADATA_PREFIX}{name}.bias")
    return None if weight is None or bias is None else _Layer(header.name, weight, bias)


def _packed(model_path: Path) -> Path | None:
    """The file beside a GGUF that by its name has the heads of this one."""
    stem = _QUANTIZATION.sub("", model_path.stem)
    path = model_path.with_name(f"{stem}{PACKED_HEADS}")
    return path if path.is_file() else None


def _loose(name: str, model_path: Path) -> Path | None:
    """A file by the name that FlagEmbedding gives it, in a directory or beside a GGUF."""
    folder = model_path if model_path.is_dir() else model_path.parent
    paths = (folder / (name + suffix) for suffix in HEAD_SUFFIXES)
    return next((path for path in paths if path.is_file()), None)


def _takes_loose(header: Header) -> bool:
    """Whether loose files beside a GGUF can be its heads: it has to be an XLM-R with the row of
    CLS."""
    return (
        header.text("general.architecture") == "bert"
        and header.text("tokenizer.ggml.model") == "t5"
        and header.number("bert.pooling_type", _POOLING_NONE) in (_POOLING_NONE, _POOLING_CLS)
    )


def _shape_text(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))
