"""A model of the llama family in a GGUF, as a directory that the backend mlx runs.

    python -m models.convert.gguf_to_mlx model-Q4_0.gguf models/model-mlx

Q4_0, Q4_1 and Q8_0 keep their blocks: nothing is rounded, and the directory is as big as the file.
What is in Q2_K, Q4_K or Q6_K beside them becomes float16. MLX has no other types of llama.cpp's.
Wants the packages of requirements-mlx.txt.
"""

import json
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from errors import ModelLoadFailed
from models.convert.command import run

GROUP = 32  # weights that share a scale, in GGUF's blocks

_MODULES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # types of tokens
Splitters = Callable[[Any], list[Any]]  # the pre-tokenizers, out of the module that has them
_SPLITTERS: dict[str, Splitters] = {
    "default": lambda of: [of.ByteLevel(add_prefix_space=False)],
    "gpt-2": lambda of: [of.ByteLevel(add_prefix_space=False)],
    "smollm": lambda of: [
        of.Digits(individual_digits=True),
        of.ByteLevel(add_prefix_space=False),
    ],
    "llama-bpe": lambda of: [
        of.Split(import_module("tokenizers").Regex(_LLAMA3), "isolated"),
        of.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
}


def main() -> None:
    run(__doc__, convert)


def convert(gguf: Path, out: Path) -> None:
    """Writes the directory `out`, or raises ModelLoadFailed with a sentence that says what is
    wrong."""
    try:
        mx, tokenizers = import_module("mlx.core"), import_module("tokenizers")
    except ImportError as error:
        raise ModelLoadFailed(
            f"{error.name} is not installed: run ./setup.sh --mlx, or pip install -r "
            "requirements-mlx.txt."
        ) from None
    try:
        with mx.stream(mx.cpu):
            tensors, metadata = mx.load(str(gguf), format="gguf", return_metadata=True)
    except (RuntimeError, ValueError) as error:
        raise ModelLoadFailed(f"{gguf.name} cannot be read: {error}.") from None
    header = Header(gguf.name, metadata)
    weights = dict(_renamed(header, tensors))
    tokenizer = _tokenizer(header, tokenizers)
    out.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(out / "model.safetensors"), weights, {"format": "mlx"})
    tokenizer.save(str(out / "tokenizer.json"))
    _write(out / "tokenizer_config.json", _tokenizer_config(header))
    _write(out / "config.json", _config(header, weights))


class Header:
    """The metadata of a GGUF as mlx reads it: numbers in arrays, texts, lists of texts."""

    def __init__(self, name: str, metadata: dict[str, Any]) -> None:
        self._name = name
        self._metadata = metadata
        if self.get("general.architecture") != "llama":
            self.fail(f"is of the architecture {self.get('general.architecture')}, not llama")
        if self.get("llama.expert_count", 0):
            self.fail("is a mixture of experts")
        scaling = self.get("llama.rope.scaling.type", "linear")
        factor = self.get("llama.rope.scaling.factor", self.get("llama.rope.scale_linear", 1))
        if scaling not in ("none", "linear") or (scaling == "linear" and factor not in (0, 1)):
            self.fail(f"scales positions ({scaling}, {factor:g})")
        if (n_turned := self.get("llama.rope.dimension_count", self.head_size)) != self.head_size:
            self.fail(f"turns {n_turned} of the {self.head_size} numbers of a head")
        if self.get("tokenizer.ggml.model") not in ("gpt2", "llama"):
            self.fail(f"has a vocabulary of the type {self.get('tokenizer.ggml.model')}")

    def fail(self, reason: str) -> NoReturn:
        raise ModelLoadFailed(f"{self._name} {reason}; take the model as its authors publish it.")

    def get(self, key: str, default: Any = None) -> Any:
        value = self._metadata.get(key, default)
        return value if isinstance(value, str | list) or not hasattr(value, "tolist") else (
            value.tolist()
        )  # fmt: skip

    def must(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            self.fail(f"does not say {key}")
        return value

    @property
    def head_size(self) -> int:
        n_embd, n_head = map(self.must, ("llama.embedding_length", "llama.attention.head_count"))
        size: int = self.get("llama.attention.key_length", n_embd // n_head)
        return size

    @property
    def tokens(self) -> list[str]:
        tokens: list[str] = self.must("tokenizer.ggml.tokens")
        return tokens

    def special(self, which: str) -> int | None:
        token = self.get(f"tokenizer.ggml.{which}_token_id")
        return token if isinstance(token, int) and 0 <= token < len(self.tokens) else None


def _renamed(header: Header, tensors: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    n_head = header.must("llama.attention.head_count")
    heads = {"attn_q": n_head, "attn_k": header.get("llama.attention.head_count_kv", n_head)}
    for key, tensor in tensors.items():
        stem, _, part = key.rpartition(".")
        layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
        module = _LAYER_MODULES.get(layer[2]) if layer else _MODULES.get(stem)
        if module is None or part == "bias":
            header.fail(f"has a tensor {key}, which the small llama converter does not know")
        if layer:
            if layer[2] in heads:
                tensor = _in_halves(tensor, heads[layer[2]])
            module = f"model.layers.{layer[1]}.{module}"
        yield f"{module}.{part}", tensor


def _in_halves(tensor: Any, n_head: int) -> Any:
    """Rows of each head in the order of Hugging Face: llama.cpp turns neighbours, others halves.
    Quantisation runs along the columns, so scales go the same way."""
    shape = n_head, tensor.shape[0] // n_head // 2, 2, *tensor.shape[1:]
    return tensor.reshape(shape).swapaxes(1, 2).reshape(tensor.shape)


def _config(header: Header, weights: dict[str, Any]) -> dict[str, Any]:
    n_head = header.must("llama.attention.head_count")
    n_embd = header.must("llama.embedding_length")
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": n_embd,
        "intermediate_size": header.must("llama.feed_forward_length"),
        "num_hidden_layers": header.must("llama.block_count"),
        "num_attention_heads": n_head,
        "num_key_value_heads": header.get("llama.attention.head_count_kv", n_head),
        "head_dim": header.head_size,
        "rms_norm_eps": header.must("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": header.get("llama.rope.freq_base", 10000.0),
        "vocab_size": len(header.tokens),
        "max_position_embeddings": header.must("llama.context_length"),
        "tie_word_embeddings": "lm_head.weight" not in weights,
        "bos_token_id": header.special("bos"),
        "eos_token_id": ends(header),
    }
    bits = {
        name.removesuffix(".scales"): weights[name.replace(".scales", ".weight")].shape[-1]
        * 32 // (scales.shape[-1] * GROUP)
        for name, scales in weights.items()
        if name.endswith(".scales")
    }  # fmt: skip
    if bits:
        usual = max(bits.values(), key=list(bits.values()).count)
        others: dict[str, Any] = {
            name: {"group_size": GROUP, "bits": n} for name, n in bits.items() if n != usual
        }
        config["quantization"] = {"group_size": GROUP, "bits": usual, **others}
    return config


def ends(header: Header) -> list[int]:
    """Tokens with which a text, a turn or a message to a tool ends."""
    found = (header.special(which) for which in ("eos", "eot", "eom"))
    return [token for token in found if token is not None]


def _tokenizer(header: Header, tokenizers: Any) -> Any:
    tokens, types = header.tokens, header.must("tokenizer.ggml.token_type")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    is_spm = header.get("tokenizer.ggml.model") == "llama"
    new = _sentencepiece if is_spm else _byte_level
    tokenizer = new(header, tokenizers, vocabulary)
    for token, kind in zip(tokens, types, strict=True):
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED):
            is_special = kind != _USER_DEFINED
            added = tokenizers.AddedToken(token, special=is_special, normalized=False)
            add = tokenizer.add_special_tokens if is_special else tokenizer.add_tokens
            add([added])
    bos = header.special("bos")
    adds_bos = is_spm or header.get("tokenizer.ggml.pre") == "llama-bpe"
    if bos is not None and header.get("tokenizer.ggml.add_bos_token", adds_bos):
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)]
        )
    return tokenizer


def _byte_level(header: Header, tokenizers: Any, vocabulary: dict[str, int]) -> Any:
    splitters = _SPLITTERS.get(header.get("tokenizer.ggml.pre", "default"))
    if splitters is None:
        header.fail(f"splits text as {header.get('tokenizer.ggml.pre')!r}, which is not known here")
    merges = [tuple(pair.split(" ")) for pair in header.must("tokenizer.ggml.merges")]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges))
    of = tokenizers.pre_tokenizers
    tokenizer.pre_tokenizer = of.Sequence(splitters(of))
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


def _sentencepiece(header: Header, tokenizers: Any, vocabulary: dict[str, int]) -> Any:
    """SentencePiece joins the two neighbours whose piece has the best score: that is the order of
    the merges."""
    scores = header.must("tokenizer.ggml.scores")
    ranked = sorted(vocabulary.items(), key=lambda item: -scores[item[1]])
    merges = [
        (piece[:at], piece[at:])
        for piece, _ in ranked
        for at in range(1, len(piece))
        if piece[:at] in vocabulary and piece[at:] in vocabulary
    ]
    unknown = header.special("unknown")
    model = tokenizers.models.BPE(
        vocab=vocabulary, merges=merges, byte_fallback=True, fuse_unk=True,
        unk_token=None if unknown is None else header.tokens[unknown],
    )  # fmt: skip
    tokenizer = tokenizers.Tokenizer(model)
    spaces = tokenizers.normalizers.Replace(" ", "▁")
    if header.get("tokenizer.ggml.add_space_prefix", True):
        spaces = tokenizers.normalizers.Sequence([tokenizers.normalizers.Prepend("▁"), spaces])
    tokenizer.normalizer = spaces
    of = tokenizers.decoders
    tokenizer.decoder = of.Sequence(
        [of.Replace("▁", " "), of.ByteFallback(), of.Fuse(), of.Strip(" ", 1, 0)]
    )
    return tokenizer


def _tokenizer_config(header: Header) -> dict[str, Any]:
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": header.must("llama.context_length"),
        "clean_up_tokenization_spaces": False,
    }
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    for which, name in names.items():
        token = header.special(which)
        if token is not None:
            config[f"{name}_token"] = header.tokens[token]
    if template := header.get("tokenizer.chat_template"):
        config["chat_template"] = template
    return config


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
