"""An XLM-R that embeds, in a GGUF, as a Hugging Face directory for the backends onnx and mlx.

    python -m models.convert.gguf_to_folder models/multilingual-e5-small-F32.gguf models/e5

Weights become float32: those of a file in F32 or F16 are the same, as are tables in Q4_0.
"""

import base64
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import gguf
import numpy as np
from numpy.typing import NDArray

from errors import ModelLoadFailed
from models.convert.command import run
from models.convert.hf_folder import around, write_json, write_safetensors

_MODULES = {
    "token_embd": "embeddings.word_embeddings",
    "position_embd": "embeddings.position_embeddings",
    "token_types": "embeddings.token_type_embeddings",
    "token_embd_norm": "embeddings.LayerNorm",
}
_LAYER_MODULES = {
    "attn_q": "attention.self.query",
    "attn_k": "attention.self.key",
    "attn_v": "attention.self.value",
    "attn_output": "attention.output.dense",
    "attn_output_norm": "attention.output.LayerNorm",
    "ffn_up": "intermediate.dense",
    "ffn_down": "output.dense",
    "layer_output_norm": "output.LayerNorm",
}
_POOLINGS = {1: "pooling_mode_mean_tokens", 2: "pooling_mode_cls_token"}
_CONTROL = 3  # a type of tokens
Tensors = Mapping[str, NDArray[np.float32]]


def main() -> None:
    run(__doc__, convert)


def convert(path: Path, out: Path) -> None:
    """Writes the directory `out`, or raises ModelLoadFailed with a sentence that says what is
    wrong."""
    try:
        file = _File(path.name, _Reader(path))
    except (OSError, ValueError, struct.error) as error:
        raise ModelLoadFailed(f"{path.name} cannot be read: {error}.") from None
    tensors = file.tensors()
    config, tokenizer = _config(file, tensors), _tokenizer(file)
    (out / "1_Pooling").mkdir(parents=True, exist_ok=True)
    write_safetensors(out / "model.safetensors", tensors)
    write_json(out / "config.json", config)
    write_json(out / "tokenizer.json", tokenizer)
    pooling = _POOLINGS.get(file.get("bert.pooling_type", 0))
    write_json(out / "1_Pooling" / "config.json", {pooling: True} if pooling else {})


class _Reader(gguf.GGUFReader):  # type: ignore[misc,unused-ignore]
    """Takes arrays whole: one by one a vocabulary of 250,000 takes half a minute."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if raw_type != gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        data = memoryview(self.data)
        kind, count = struct.unpack_from("<IQ", data, orig_offs)
        at, values = orig_offs + 12, []
        if kind == gguf.GGUFValueType.STRING:
            for _ in range(count):
                start = at + 8
                at = start + struct.unpack_from("<Q", data, at)[0]
                values.append(bytes(data[start:at]).decode())
        else:
            dtype = np.dtype(self.gguf_scalar_to_np[gguf.GGUFValueType(kind)])
            values = np.frombuffer(data, dtype, count, at).tolist()
            at += count * dtype.itemsize
        return at - orig_offs, [values], [], [gguf.GGUFValueType.ARRAY]


class _File:
    def __init__(self, name: str, reader: _Reader) -> None:
        self._name = name
        self._reader = reader
        architecture = self.get("general.architecture", "nothing known")
        if architecture != "bert" or self.get("tokenizer.ggml.model", "") != "t5":
            self.fail(f"is no XLM-R (but {architecture})")

    def fail(self, reason: str) -> NoReturn:
        raise ModelLoadFailed(f"{self._name} {reason}; take the model as its authors publish it.")

    def get(self, key: str, default: Any) -> Any:
        field = self._reader.fields.get(key)
        if field is None:
            return default
        is_array = field.types[0] == gguf.GGUFValueType.ARRAY
        return field.parts[-1] if is_array else field.contents()

    def must(self, key: str) -> Any:
        value = self.get(key, None)
        if value is None:
            self.fail(f"does not say {key}")
        return value

    def tensors(self) -> dict[str, NDArray[np.float32]]:
        """By the names that transformers has for them."""
        found = {}
        for tensor in self._reader.tensors:
            stem, _, part = tensor.name.rpartition(".")
            layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
            module = _LAYER_MODULES.get(layer[2]) if layer else _MODULES.get(stem)
            if module is None:
                self.fail(f"has a tensor {tensor.name}, which is none of a network that embeds")
            prefix = f"encoder.layer.{layer[1]}." if layer else ""
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            if module == "embeddings.position_embeddings":  # counted from behind the padding
                values = np.concatenate([np.zeros((2, values.shape[1]), np.float32), values])
            found[f"{prefix}{module}.{part}"] = values
        return found


def _config(file: _File, tensors: Tensors) -> dict[str, Any]:
    tables = {
        name: len(tensors[f"embeddings.{name}_embeddings.weight"])
        for name in ("word", "position", "token_type")
    }
    return {
        "architectures": ["XLMRobertaModel"],
        "model_type": "xlm-roberta",
        "vocab_size": tables["word"],
        "hidden_size": file.must("bert.embedding_length"),
        "num_hidden_layers": file.must("bert.block_count"),
        "num_attention_heads": file.must("bert.attention.head_count"),
        "intermediate_size": file.must("bert.feed_forward_length"),
        "max_position_embeddings": tables["position"],
        "type_vocab_size": tables["token_type"],
        "layer_norm_eps": file.must("bert.attention.layer_norm_epsilon"),
        "hidden_act": "gelu",
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }


def _tokenizer(file: _File) -> dict[str, Any]:
    pieces: list[str] = file.must("tokenizer.ggml.tokens")
    scores: list[float] = file.must("tokenizer.ggml.scores")
    types: list[int] = file.must("tokenizer.ggml.token_type")
    charsmap = np.array(file.must("tokenizer.ggml.precompiled_charsmap"), np.int64)
    if pieces[:4] != ["<s>", "<pad>", "</s>", "<unk>"]:
        file.fail("has other control tokens than an XLM-R")
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    special = {"single_word": False, "rstrip": False, "normalized": False, "special": True}
    controls = [
        token for token, kind in enumerate(types) if token < 4 or kind == _CONTROL or
        pieces[token] == "<mask>"
    ]  # fmt: skip
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": token, "content": pieces[token], "lstrip": pieces[token] == "<mask>", **special}
            for token in controls
        ],
        "normalizer": {
            "type": "Precompiled",
            "precompiled_charsmap": base64.b64encode(charsmap.astype(np.uint8).tobytes()).decode(),
        },
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace],
        },
        "post_processor": around("<s> A </s>", "<s> A </s> </s> B </s>", pieces),
        "decoder": metaspace,
        "model": {
            "type": "Unigram",
            "unk_id": 3,
            "vocab": list(zip(pieces, scores, strict=True)),
            "byte_fallback": False,
        },
    }


if __name__ == "__main__":
    main()
