"""An XLM-R encoder or cross-encoder from a Hugging Face directory, as one GGUF with everything.

    python -m models.convert.bge_m3 ~/bge-m3 models/bge-m3-F16.gguf
    python -m models.convert.bge_m3 ~/bge-reranker-v2-m3 models/bge-reranker-v2-m3-F16.gguf

The directory has config.json, the weights (safetensors or pytorch_model.bin), tokenizer.json or
sentencepiece.bpe.model, and for BGE-M3 sparse_linear.pt and colbert_linear.pt. Other converters
leave those two out; here they go into the metadata, since llama.cpp refuses tensors that it does
not know.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from engine.file_names import COLBERT, SPARSE
from engine.heads import METADATA_PREFIX, find_heads
from engine.model_folder import pooling_in
from engine.tensors import read_tensors
from engine.torch_file import Floats
from errors import ModelLoadFailed
from models.convert.sentencepiece import read_vocabulary
from models.convert.xlm_roberta import PAD, Encoder, Tensor, write_gguf

FILE_TYPES = {
    "F32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "F16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "Q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
POOLINGS = {
    "cls": gguf.PoolingType.CLS,
    "mean": gguf.PoolingType.MEAN,
    "last": gguf.PoolingType.LAST,
}

_Q8_0_BLOCK = 32
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_PREFIXES = ("roberta.", "xlm_roberta.", "model.", "")
# What an encoder does not need: the layer of another task, a buffer that older versions saved.
_LEFT_OUT = ("pooler.", "lm_head.", "embeddings.position_ids")
_MODULES = {
    "embeddings.word_embeddings": "token_embd",
    "embeddings.position_embeddings": "position_embd",
    "embeddings.token_type_embeddings": "token_types",
    "embeddings.LayerNorm": "token_embd_norm",
    "classifier.dense": "cls",
    "classifier.out_proj": "cls.output",
}
_LAYER_MODULES = {
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}
_NEVER_QUANTIZED = ("position_embd.weight", "token_types.weight")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, help="the model as Hugging Face has it")
    parser.add_argument("out", type=Path, help="the GGUF to write")
    parser.add_argument("--type", choices=FILE_TYPES, default="F16", help="default: F16")
    parser.add_argument(
        "--pooling", choices=POOLINGS, help="of an encoder whose directory does not say it"
    )
    arguments = parser.parse_args()
    try:
        convert(arguments.directory, arguments.out, arguments.type, arguments.pooling)
    except ModelLoadFailed as error:
        sys.exit(error.message)


def convert(directory: Path, out: Path, file_type: str = "F16", pooling: str | None = None) -> None:
    """Writes `out` whole, or raises ModelLoadFailed with a sentence that says what is wrong."""
    config = _json(directory / "config.json")
    if config.get("model_type") != "xlm-roberta":
        raise ModelLoadFailed(
            f"{directory.name} is a {config.get('model_type')}, and only xlm-roberta is converted."
        )
    tensors = _named(_weights(directory))
    vocabulary = read_vocabulary(directory)
    is_classifier = "cls.output.weight" in tensors
    arrays = {} if is_classifier else _heads(directory, config["hidden_size"])
    labels = config.get("id2label") or {"0": "LABEL_0"}
    encoder = Encoder(
        name=directory.resolve().name,
        license="",
        n_ctx=config["max_position_embeddings"] - PAD - 1,
        n_embd=config["hidden_size"],
        n_layer=config["num_hidden_layers"],
        n_head=config["num_attention_heads"],
        n_ff=config["intermediate_size"],
        n_token_types=config["type_vocab_size"],
        eps=config["layer_norm_eps"],
        pooling=gguf.PoolingType.RANK
        if is_classifier
        else _pooling(directory, pooling, has_heads=bool(arrays)),
        file_type=FILE_TYPES[file_type][1],
        vocabulary=vocabulary,
        labels=[labels[key] for key in sorted(labels, key=int)] if is_classifier else [],
        arrays=arrays,
    )
    n_tokens = len(vocabulary.pieces)
    if len(tensors["token_embd.weight"]) < n_tokens:
        raise ModelLoadFailed(f"{directory.name} has more tokens than rows for them.")
    # Rows behind the vocabulary's end fill the table up to a round number. Positions count from the
    # padding id + 1.
    tensors["token_embd.weight"] = tensors["token_embd.weight"][:n_tokens]
    tensors["position_embd.weight"] = tensors["position_embd.weight"][PAD + 1 :]
    write_gguf(out, encoder, _quantized(tensors, file_type))


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelLoadFailed(f"{path.name} cannot be read: {error.strerror}.") from None
    except ValueError:
        raise ModelLoadFailed(f"{path.name} is damaged; download it again.") from None


def _weights(directory: Path) -> dict[str, Floats]:
    for name in _WEIGHTS:
        index = directory / f"{name}.index.json"
        if (directory / name).is_file():
            return read_tensors(directory / name)
        if index.is_file():
            parts = sorted(set(_json(index)["weight_map"].values()))
            return {
                name: tensor
                for part in parts
                for name, tensor in read_tensors(directory / part).items()
            }
    raise ModelLoadFailed(f"{directory.name} has no {' and no '.join(_WEIGHTS)}; download one.")


def _named(tensors: Mapping[str, Floats]) -> dict[str, Floats]:
    """The tensors by llama.cpp's names."""
    first = "embeddings.word_embeddings.weight"
    prefix = next((prefix for prefix in _PREFIXES if prefix + first in tensors), None)
    if prefix is None:
        raise ModelLoadFailed(f"The weights are not those of an XLM-R: there is no {first}.")
    named = {}
    for name, tensor in tensors.items():
        bare = name.removeprefix(prefix)
        if not bare.startswith(_LEFT_OUT):
            named[_gguf_name(bare)] = tensor
    return named


def _gguf_name(name: str) -> str:
    module, _, part = name.rpartition(".")
    if module in _MODULES:
        return f"{_MODULES[module]}.{part}"
    if module.startswith("encoder.layer."):
        layer, _, module = module.removeprefix("encoder.layer.").partition(".")
        if module in _LAYER_MODULES:
            return f"blk.{layer}.{_LAYER_MODULES[module]}.{part}"
    raise ModelLoadFailed(f"The weights are not those of an XLM-R: there is {name[:80]} in them.")


def _heads(directory: Path, n_embd: int) -> dict[str, Floats]:
    """BGE-M3's two, flat, by the keys that engine/heads.py looks for; none where there are none."""
    heads, missing = find_heads(directory, n_embd, None, None)
    if len(missing) == 1:
        raise ModelLoadFailed(f"{directory.name} has no {missing[0]}; download it too.")
    if heads is None:
        return {}
    return {
        f"{METADATA_PREFIX}{SPARSE}.weight": heads.sparse_weight,
        f"{METADATA_PREFIX}{SPARSE}.bias": np.array([heads.sparse_bias], np.float32),
        f"{METADATA_PREFIX}{COLBERT}.weight": heads.colbert_weight,
        f"{METADATA_PREFIX}{COLBERT}.bias": heads.colbert_bias,
    }


def _pooling(directory: Path, wanted: str | None, *, has_heads: bool) -> gguf.PoolingType:
    """What the caller says; else sentence-transformers' note; else BGE-M3's, which has heads."""
    if wanted is not None:
        return POOLINGS[wanted]
    if noted := pooling_in(directory):
        return POOLINGS[noted]
    if has_heads:
        return POOLINGS["cls"]
    raise ModelLoadFailed(
        f"{directory.name} does not say how it pools (1_Pooling/config.json); give --pooling."
    )


def _quantized(tensors: Mapping[str, Floats], file_type: str) -> Iterator[Tensor]:
    for name, values in tensors.items():
        kind = FILE_TYPES[file_type][0]
        if values.ndim == 1 or name in _NEVER_QUANTIZED:
            kind = gguf.GGMLQuantizationType.F32
        elif file_type == "Q8_0" and values.shape[-1] % _Q8_0_BLOCK:
            kind = gguf.GGMLQuantizationType.F16
        if kind == gguf.GGMLQuantizationType.F32:
            yield Tensor(name, values)
        else:
            yield Tensor(name, gguf.quants.quantize(values, kind), kind)


if __name__ == "__main__":
    main()
