"""An encoder of the XLM-R family as one GGUF: what llama.cpp has to be told about it."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

BOS, PAD, EOS, UNKNOWN = 0, 1, 2, 3  # in every XLM-R; EOS also separates the texts of a pair


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Pieces by id, special tokens included; `<mask>` may come last."""

    pieces: list[str]
    scores: list[float]
    charsmap: bytes


@dataclass(frozen=True, slots=True)
class Tensor:
    """Rows of numbers, or, of a quantized type, rows of bytes."""

    name: str  # llama.cpp's
    data: NDArray[np.float32] | NDArray[np.float16] | NDArray[np.uint8]
    type: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32


@dataclass(frozen=True, slots=True)
class Encoder:
    name: str
    license: str  # "" where it is not known
    n_ctx: int  # texts may be as long as this, special tokens included
    n_embd: int
    n_layer: int
    n_head: int
    n_ff: int
    n_token_types: int
    eps: float
    pooling: gguf.PoolingType
    file_type: gguf.LlamaFileType
    vocabulary: Vocabulary
    labels: list[str] = field(default_factory=list)  # of a classifier
    arrays: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)  # more metadata, flat


def write_gguf(path: Path, encoder: Encoder, tensors: Iterable[Tensor]) -> None:
    """Writes the file whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    try:
        writer = gguf.GGUFWriter(part, "bert")
        _add_model(writer, encoder)
        _add_tokenizer(writer, encoder.vocabulary)
        for key, values in encoder.arrays.items():
            writer.add_array(key, values.ravel().tolist())
        for tensor in tensors:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _add_model(writer: gguf.GGUFWriter, encoder: Encoder) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(encoder.name)
    if encoder.license:
        writer.add_license(encoder.license)
    writer.add_file_type(encoder.file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(encoder.n_ctx)
    writer.add_embedding_length(encoder.n_embd)
    writer.add_block_count(encoder.n_layer)
    writer.add_head_count(encoder.n_head)
    writer.add_feed_forward_length(encoder.n_ff)
    writer.add_layer_norm_eps(encoder.eps)
    writer.add_causal_attention(False)
    writer.add_pooling_type(encoder.pooling)
    writer.add_token_type_count(encoder.n_token_types)
    if encoder.labels:
        writer.add_classifier_output_labels(encoder.labels)


def _add_tokenizer(writer: gguf.GGUFWriter, vocabulary: Vocabulary) -> None:
    pieces = vocabulary.pieces
    special = {BOS, PAD, EOS}
    if pieces[-1] == "<mask>":
        special.add(len(pieces) - 1)
        writer.add_mask_token_id(len(pieces) - 1)
    types = [gguf.TokenType.NORMAL] * len(pieces)
    for token in special:
        types[token] = gguf.TokenType.CONTROL
    types[UNKNOWN] = gguf.TokenType.UNKNOWN

    writer.add_tokenizer_model("t5")  # llama.cpp's name for SentencePiece's unigrams
    writer.add_tokenizer_pre("default")
    writer.add_token_list(pieces)
    writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(types)
    writer.add_precompiled_charsmap(vocabulary.charsmap)
    writer.add_add_space_prefix(True)
    # Without it every second space, and each line break, would be a token of its own.
    writer.add_remove_extra_whitespaces(True)
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_sep_token_id(EOS)
    writer.add_pad_token_id(PAD)
    writer.add_unk_token_id(UNKNOWN)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(True)
