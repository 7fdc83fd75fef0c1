"""Small GGUF files for tests: two tiny models that llama.cpp runs, and files that nothing can run.

The weights are random but always the same. They are scaled so that attention is peaked and every
layer moves the residual stream: the next token then depends on all tokens before it, and a wrong
cell in the KV cache shows in greedy text.
"""

import string
import struct
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from engine.model_file import open_header

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPM_WORDS = (
    "the of and to in is was a for on with hello Hello world quick brown fox jumps over lazy dog "
    "what What capital city river model answer question user assistant system You are helpful "
    "one two three four five red green blue sun moon rain music code line"
).split()

FF = 2  # times a row's numbers are there between the matrices of a feed-forward layer
_TYPE_NORMAL, _TYPE_UNKNOWN, _TYPE_CONTROL, _TYPE_BYTE = 1, 2, 3, 6
_COPIED_SCALARS = (
    "add_space_prefix",
    "add_bos_token",
    "model",
    "pre",
    "bos_token_id",
    "eos_token_id",
    "unknown_token_id",
    "padding_token_id",
)


def write_tiny_llama(
    path: Path,
    *,
    vocab_from: Path,
    n_layer: int = 2,
    n_embd: int = 64,
    n_head: int = 4,
    n_head_kv: int = 2,
    n_ctx: int = 2048,
    seed: int = 0,
) -> Path:
    """A llama of random F32 weights with the whole tokenizer of another GGUF (BPE)."""
    writer = gguf.GGUFWriter(path, "llama")
    with open_header(vocab_from) as header:
        for name in _COPIED_SCALARS:
            key = f"tokenizer.ggml.{name}"
            if key in header.metadata:
                _add(writer, key, header.metadata[key])
        for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges"):
            array = header.array(key)
            assert array is not None, f"{vocab_from.name} has no {key}"
            writer.add_array(key, header.texts(array, range(array.count)))
        types = header.numbers("tokenizer.ggml.token_type", 1 << 20)
        writer.add_token_types(types.tolist())
        writer.add_chat_template(header.text("tokenizer.chat_template"))
    _write_llama(writer, types, n_layer, n_embd, n_head, n_head_kv, n_ctx, seed)
    return path


def write_tiny_spm(
    path: Path,
    *,
    architecture: str = "llama",
    n_ctx: int = 512,
    seed: int = 0,
    more_tokens: Sequence[str] = (),
    more_control: Sequence[str] = (),
    suppressed: Sequence[int] = (),
) -> Path:
    """A llama of random F32 weights with a SentencePiece vocabulary of some hundred pieces, and of
    `more_tokens` of the normal type and `more_control` of the control type. It is never to say the
    tokens that are `suppressed`."""
    tokens, scores, types = spm_vocabulary()
    tokens += [*more_tokens, *more_control]
    scores += [-1e6] * (len(more_tokens) + len(more_control))
    types += [_TYPE_NORMAL] * len(more_tokens) + [_TYPE_CONTROL] * len(more_control)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(True)
    writer.add_chat_template(CHATML)
    if suppressed:
        writer.add_array("tokenizer.ggml.suppress_tokens", list(suppressed))
    _write_llama(writer, np.array(types), 2, 64, 4, 2, n_ctx, seed)
    return path


def write_tiny_gemma3(path: Path, *, n_ctx: int = 1024, window: int = 16, seed: int = 0) -> Path:
    """A gemma3 of random F32 weights: six of its seven layers see through a sliding window."""
    n_vocab = len(spm_vocabulary()[0])
    n_layer, n_embd, n_head, n_head_kv = 7, 64, 4, 2
    n_embd_head = n_embd // n_head
    writer = _small_writer(path, "gemma3", n_ctx, n_layer, n_embd, n_head)
    writer.add_head_count_kv(n_head_kv)
    writer.add_key_length(n_embd_head)
    writer.add_value_length(n_embd_head)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_sliding_window(window)
    writer.add_rope_freq_base(10000.0)
    weights = _Weights(writer, seed)
    weights.matrix("token_embd", n_vocab, n_embd, 1.0)
    weights.norm("output_norm", n_embd)
    weights.matrix("output", n_vocab, n_embd, np.sqrt(n_embd))
    for i in range(n_layer):
        for name in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
            weights.norm(f"blk.{i}.{name}", n_embd)
        weights.norm(f"blk.{i}.attn_q_norm", n_embd_head)
        weights.norm(f"blk.{i}.attn_k_norm", n_embd_head)
        weights.attention(f"blk.{i}", n_embd, n_head_kv * n_embd_head)
        weights.feed_forward(f"blk.{i}", n_embd)
    _write(writer)
    return path


def write_tiny_lfm2(path: Path, *, n_ctx: int = 1024, window: int = 0, seed: int = 0) -> Path:
    """An lfm2 of random F32 weights: every second layer has no cells but a state. The others may
    see through a sliding window."""
    n_vocab = len(spm_vocabulary()[0])
    n_layer, n_embd, n_head, n_head_kv, n_conv = 6, 64, 4, 2, 4
    n_embd_head = n_embd // n_head
    writer = _small_writer(path, "lfm2", n_ctx, n_layer, n_embd, n_head)
    writer.add_head_count_kv([0, n_head_kv] * (n_layer // 2))
    writer.add_shortconv_l_cache(n_conv)
    if window:
        writer.add_sliding_window(window)
    writer.add_layer_norm_rms_eps(1e-5)
    weights = _Weights(writer, seed)
    weights.matrix("token_embd", n_vocab, n_embd, np.sqrt(n_embd))
    weights.norm("token_embd_norm", n_embd)  # as its converter calls the output's
    weights.matrix("output", n_vocab, n_embd, np.sqrt(n_embd))
    for i in range(n_layer):
        weights.norm(f"blk.{i}.attn_norm", n_embd)
        weights.norm(f"blk.{i}.ffn_norm", n_embd)
        if i % 2:
            weights.norm(f"blk.{i}.attn_q_norm", n_embd_head)
            weights.norm(f"blk.{i}.attn_k_norm", n_embd_head)
            weights.attention(f"blk.{i}", n_embd, n_head_kv * n_embd_head)
        else:
            weights.matrix(f"blk.{i}.shortconv.in_proj", 3 * n_embd, n_embd, 1.5)
            weights.matrix(f"blk.{i}.shortconv.conv", n_embd, n_conv, 1.5)
            weights.matrix(f"blk.{i}.shortconv.out_proj", n_embd, n_embd, 1.5)
        weights.feed_forward(f"blk.{i}", n_embd)
    _write(writer)
    return path


def write_tiny_qwen35(path: Path, *, n_ctx: int = 1024, seed: int = 0) -> Path:
    """A qwen35 of random F32 weights: three of four layers have a matrix as their state."""
    n_vocab = len(spm_vocabulary()[0])
    n_layer, n_embd, n_head, n_head_kv, n_keys, n_conv = 4, 64, 4, 2, 16, 4
    n_values = n_keys * n_head
    writer = _small_writer(path, "qwen35", n_ctx, n_layer, n_embd, n_head)
    writer.add_head_count_kv(n_head_kv)
    writer.add_key_length(n_keys)
    writer.add_value_length(n_keys)
    writer.add_rope_dimension_count(n_keys)
    writer.add_rope_dimension_sections([3, 3, 2, 0])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_ssm_conv_kernel(n_conv)
    writer.add_ssm_inner_size(n_values)
    writer.add_ssm_state_size(n_keys)
    writer.add_ssm_time_step_rank(n_head)
    writer.add_ssm_group_count(n_head)
    weights = _Weights(writer, seed)
    weights.matrix("token_embd", n_vocab, n_embd, np.sqrt(n_embd))
    weights.norm("output_norm", n_embd)
    weights.matrix("output", n_vocab, n_embd, np.sqrt(n_embd))
    for i in range(n_layer):
        weights.norm(f"blk.{i}.attn_norm", n_embd)
        weights.norm(f"blk.{i}.post_attention_norm", n_embd)
        if i % 4 == 3:
            weights.norm(f"blk.{i}.attn_q_norm", n_keys)
            weights.norm(f"blk.{i}.attn_k_norm", n_keys)
            weights.matrix(f"blk.{i}.attn_q", 2 * n_head * n_keys, n_embd, 1.7)
            weights.matrix(f"blk.{i}.attn_k", n_head_kv * n_keys, n_embd, 1.7)
            weights.matrix(f"blk.{i}.attn_v", n_head_kv * n_keys, n_embd, 1.5)
            weights.matrix(f"blk.{i}.attn_output", n_embd, n_head * n_keys, 1.5)
        else:
            weights.matrix(f"blk.{i}.attn_qkv", 3 * n_values, n_embd, 1.5)
            weights.matrix(f"blk.{i}.attn_gate", n_values, n_embd, 1.5)
            weights.matrix(f"blk.{i}.ssm_conv1d", 3 * n_values, n_conv, 1.5)
            writer.add_tensor(f"blk.{i}.ssm_dt.bias", np.zeros(n_head, np.float32))
            writer.add_tensor(f"blk.{i}.ssm_a", np.full(n_head, -0.05, np.float32))
            weights.matrix(f"blk.{i}.ssm_alpha", n_head, n_embd, 1.0)
            weights.matrix(f"blk.{i}.ssm_beta", n_head, n_embd, 1.0)
            weights.norm(f"blk.{i}.ssm_norm", n_keys)
            weights.matrix(f"blk.{i}.ssm_out", n_embd, n_values, 1.5)
        weights.feed_forward(f"blk.{i}", n_embd)
    _write(writer)
    return path


def spm_vocabulary() -> tuple[list[str], list[float], list[int]]:
    """Texts, scores and types of write_tiny_spm's tokens."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    types = [_TYPE_UNKNOWN, _TYPE_CONTROL, _TYPE_CONTROL] + [_TYPE_BYTE] * 256
    tokens += ["<|im_start|>", "<|im_end|>"]
    types += [_TYPE_CONTROL] * 2
    # Pieces are merged two at a time, so each beginning of a word is a piece as well.
    words = [f"▁{word}" for word in SPM_WORDS]
    pieces = [word[:end] for end in range(2, 12) for word in words if len(word) >= end]
    pieces += ["in", "ing", "er", "ed", "th", "▁"]
    pieces += [char for char in string.printable if char.isprintable() and char != " "]
    pieces = list(dict.fromkeys(pieces))
    scores = [0.0] * len(tokens) + [-float(rank) for rank in range(1, len(pieces) + 1)]
    return tokens + pieces, scores, types + [_TYPE_NORMAL] * len(pieces)


def write_minimal(
    path: Path,
    *,
    architecture: str = "llama",
    tensors: Sequence[str] = ("token_embd.weight",),
    n_values: int = 64,
    **metadata: object,
) -> Path:
    """A whole GGUF of a few hundred bytes: good enough for its header, too little to run.

    `metadata` adds keys or replaces them, with `__` for a dot; None leaves a key out.
    """
    values: dict[str, object] = {
        f"{architecture}.context_length": 128,
        f"{architecture}.block_count": 2,
        f"{architecture}.embedding_length": 8,
        f"{architecture}.attention.head_count": 2,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["a", "b", "<|im_end|>", "<x>"],
        "tokenizer.ggml.token_type": [1, 1, 3, 3],
    }
    values |= {key.replace("__", "."): value for key, value in metadata.items()}
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in values.items():
        if value is not None:
            _add(writer, key, value)
    for name in tensors:
        writer.add_tensor(name, np.zeros(n_values, np.float32))
    _write(writer)
    return path


def write_unknown_architecture(path: Path) -> Path:
    """A sound header of a kind of model that llama.cpp has never heard of."""
    return write_minimal(path, architecture="perpetuum")


def write_text(path: Path) -> Path:
    path.write_text("This is a letter and not a model.\n" * 20, encoding="utf-8")
    return path


def write_raw(
    path: Path, *parts: bytes, version: int = 3, n_tensors: int = 0, n_keys: int = 0
) -> Path:
    """A GGUF by hand: magic, version and counts, then whatever bytes the test gives."""
    start = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys)
    path.write_bytes(start + b"".join(parts))
    return path


def raw_text(text: str) -> bytes:
    """A string as it stands in a GGUF."""
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def truncate(src: Path, dst: Path, n_bytes: int) -> Path:
    """The first `n_bytes` of `src`; a negative number counts from the end."""
    dst.write_bytes(src.read_bytes()[:n_bytes])
    return dst


class _Weights:
    """Random weights, always the same, written as they are drawn."""

    def __init__(self, writer: gguf.GGUFWriter, seed: int) -> None:
        self.random = np.random.RandomState(seed)
        self._writer = writer

    def matrix(self, name: str, n_out: int, n_in: int, gain: float) -> None:
        """Keeps the scale of what passes through, times `gain`."""
        weights = self.random.standard_normal((n_out, n_in)) * gain / np.sqrt(n_in)
        self._writer.add_tensor(f"{name}.weight", weights.astype(np.float32))

    def norm(self, name: str, n_embd: int) -> None:
        self._writer.add_tensor(f"{name}.weight", np.ones(n_embd, np.float32))

    def attention(self, layer: str, n_embd: int, n_kv: int) -> None:
        self.matrix(f"{layer}.attn_q", n_embd, n_embd, 1.7)
        self.matrix(f"{layer}.attn_k", n_kv, n_embd, 1.7)
        self.matrix(f"{layer}.attn_v", n_kv, n_embd, 1.5)
        self.matrix(f"{layer}.attn_output", n_embd, n_embd, 1.5)

    def feed_forward(self, layer: str, n_embd: int) -> None:
        n_ff = FF * n_embd
        self.matrix(f"{layer}.ffn_gate", n_ff, n_embd, 1.5)
        self.matrix(f"{layer}.ffn_up", n_ff, n_embd, 1.5)
        self.matrix(f"{layer}.ffn_down", n_embd, n_ff, 1.5)


def _small_writer(
    path: Path, architecture: str, n_ctx: int, n_layer: int, n_embd: int, n_head: int
) -> gguf.GGUFWriter:
    """A model's file with the vocabulary of write_tiny_spm, and what all architectures say."""
    tokens, scores, types = spm_vocabulary()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_vocab_size(len(tokens))
    writer.add_context_length(n_ctx)
    writer.add_block_count(n_layer)
    writer.add_embedding_length(n_embd)
    writer.add_feed_forward_length(FF * n_embd)
    writer.add_head_count(n_head)
    return writer


def _write_llama(
    writer: gguf.GGUFWriter,
    types: NDArray[np.int_],
    n_layer: int,
    n_embd: int,
    n_head: int,
    n_head_kv: int,
    n_ctx: int,
    seed: int,
) -> None:
    n_vocab, n_embd_head = len(types), n_embd // n_head
    writer.add_name("Tiny Llama of random weights")
    writer.add_context_length(n_ctx)
    writer.add_block_count(n_layer)
    writer.add_embedding_length(n_embd)
    writer.add_feed_forward_length(FF * n_embd)
    writer.add_head_count(n_head)
    writer.add_head_count_kv(n_head_kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(n_embd_head)
    writer.add_vocab_size(n_vocab)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)

    weights = _Weights(writer, seed)
    writer.add_tensor(
        "token_embd.weight", weights.random.standard_normal((n_vocab, n_embd)).astype(np.float32)
    )
    weights.norm("output_norm", n_embd)
    output = weights.random.standard_normal((n_vocab, n_embd)).astype(np.float32)
    # Zero logits for all but normal and byte tokens: greedy text does not end by chance.
    output[(types != _TYPE_NORMAL) & (types != _TYPE_BYTE)] = 0
    writer.add_tensor("output.weight", output)
    for i in range(n_layer):
        weights.norm(f"blk.{i}.attn_norm", n_embd)
        weights.attention(f"blk.{i}", n_embd, n_head_kv * n_embd_head)
        weights.norm(f"blk.{i}.ffn_norm", n_embd)
        weights.feed_forward(f"blk.{i}", n_embd)
    _write(writer)


def _add(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case list() | tuple():
            writer.add_array(key, value)
        case _:
            raise TypeError(f"no GGUF value for {value!r}")


def _write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
