"""Makes chat models whose memory cannot be cut, of random weights and with SmolLM2's vocabulary, so
that what such models cost can be measured without having one.

    python -m bench.uncut_models /tmp/made
    python -m bench.compare /tmp/made/gemma3.gguf --only prefix,conversations
    python -m bench.compare /tmp/made/lfm2.gguf --only prefix,conversations
    python -m bench.speculation /tmp/made/qwen35.gguf

1. gemma3, as large as SmolLM2: five of six layers see 512 tokens back.
2. lfm2, as large: two of three layers have a state in the place of cells.
3. qwen35, as large as Qwen3.5-0.8B: in three of four layers the state is a megabyte.

What they say is noise.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np

from engine.model_file import open_header
from settings import DEFAULT_CHAT_MODEL, ROOT

N_LAYER, N_CTX, N_HEAD_DIM, WINDOW, N_CONV = 18, 16384, 64, 512, 3
TOKENIZER = ("model", "pre", "bos_token_id", "eos_token_id", "unknown_token_id", "add_bos_token")


class Model:
    """A GGUF on its way: SmolLM2's vocabulary and template, and weights as they are drawn."""

    def __init__(
        self, path: Path, architecture: str, n_embd: int, n_ff: int, n_kv: int,
        n_layer: int = N_LAYER,
    ) -> None:  # fmt: skip
        self.writer = gguf.GGUFWriter(path, architecture)
        self.n_embd, self.n_ff, self.n_head, self.n_kv = n_embd, n_ff, n_embd // N_HEAD_DIM, n_kv
        self._dice = np.random.RandomState(0)
        self._copy_vocabulary()
        self.writer.add_context_length(N_CTX)
        self.writer.add_block_count(n_layer)
        self.writer.add_embedding_length(n_embd)
        self.writer.add_feed_forward_length(n_ff)
        self.writer.add_head_count(self.n_head)
        self.writer.add_layer_norm_rms_eps(1e-5)
        self.writer.add_rope_freq_base(1e6)

    def _copy_vocabulary(self) -> None:
        with open_header(ROOT / DEFAULT_CHAT_MODEL) as header:
            for name in TOKENIZER:
                value = header.metadata.get(f"tokenizer.ggml.{name}")
                if isinstance(value, str):
                    self.writer.add_string(f"tokenizer.ggml.{name}", value)
                elif isinstance(value, bool):
                    self.writer.add_bool(f"tokenizer.ggml.{name}", value)
                elif isinstance(value, int):
                    self.writer.add_uint32(f"tokenizer.ggml.{name}", value)
            for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges"):
                array = header.array(key)
                assert array is not None
                self.writer.add_array(key, header.texts(array, range(array.count)))
            types = header.numbers("tokenizer.ggml.token_type", 1 << 20)
            self.n_vocab = len(types)
            self.writer.add_token_types(types.tolist())
            self.writer.add_chat_template(header.text("tokenizer.chat_template"))

    def norms(self, *names: str, n: int | None = None) -> None:
        for name in names:
            self.writer.add_tensor(f"{name}.weight", np.ones(n or self.n_embd, np.float32))

    def matrix(self, name: str, n_out: int, n_in: int) -> None:
        """In Q8_0, where its rows have whole blocks of that."""
        drawn = self._dice.standard_normal((n_out, n_in)) / np.sqrt(n_in)
        weights = drawn.astype(np.float32)
        if n_in % 32:
            self.writer.add_tensor(f"{name}.weight", weights)
            return
        packed = gguf.quants.quantize(weights, gguf.GGMLQuantizationType.Q8_0)
        kind = gguf.GGMLQuantizationType.Q8_0
        self.writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)

    def attention(self, layer: str, *, has_norms: bool = True) -> None:
        if has_norms:
            self.norms(f"{layer}.attn_q_norm", f"{layer}.attn_k_norm", n=N_HEAD_DIM)
        self.matrix(f"{layer}.attn_q", self.n_embd, self.n_embd)
        self.matrix(f"{layer}.attn_k", self.n_kv * N_HEAD_DIM, self.n_embd)
        self.matrix(f"{layer}.attn_v", self.n_kv * N_HEAD_DIM, self.n_embd)
        self.matrix(f"{layer}.attn_output", self.n_embd, self.n_embd)

    def feed_forward(self, layer: str) -> None:
        self.matrix(f"{layer}.ffn_gate", self.n_ff, self.n_embd)
        self.matrix(f"{layer}.ffn_up", self.n_ff, self.n_embd)
        self.matrix(f"{layer}.ffn_down", self.n_embd, self.n_ff)

    def close(self) -> None:
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()


def write_gemma3(path: Path) -> None:
    model = Model(path, "gemma3", n_embd=576, n_ff=1536, n_kv=3)
    model.writer.add_head_count_kv(model.n_kv)
    model.writer.add_key_length(N_HEAD_DIM)
    model.writer.add_value_length(N_HEAD_DIM)
    model.writer.add_sliding_window(WINDOW)
    model.norms("output_norm")
    for name in ("token_embd", "output"):
        model.matrix(name, model.n_vocab, model.n_embd)
    for n in range(N_LAYER):
        layer = f"blk.{n}"
        model.norms(f"{layer}.attn_norm", f"{layer}.post_attention_norm")
        model.norms(f"{layer}.ffn_norm", f"{layer}.post_ffw_norm")
        model.attention(layer)
        model.feed_forward(layer)
    model.close()


def write_lfm2(path: Path) -> None:
    model = Model(path, "lfm2", n_embd=768, n_ff=2048, n_kv=4)
    has_cells = [n % 3 == 2 for n in range(N_LAYER)]
    model.writer.add_vocab_size(model.n_vocab)
    model.writer.add_head_count_kv([model.n_kv * has for has in has_cells])
    model.writer.add_shortconv_l_cache(N_CONV)
    model.norms("token_embd_norm")  # as its converter calls the output's
    for name in ("token_embd", "output"):
        model.matrix(name, model.n_vocab, model.n_embd)
    for n in range(N_LAYER):
        layer = f"blk.{n}"
        model.norms(f"{layer}.attn_norm", f"{layer}.ffn_norm")
        if has_cells[n]:
            model.attention(layer)
        else:
            model.matrix(f"{layer}.shortconv.in_proj", 3 * model.n_embd, model.n_embd)
            model.matrix(f"{layer}.shortconv.conv", model.n_embd, N_CONV)
            model.matrix(f"{layer}.shortconv.out_proj", model.n_embd, model.n_embd)
        model.feed_forward(layer)
    model.close()


def write_qwen35(path: Path) -> None:
    n_layer, n_keys, n_heads, n_head_dim = 24, 128, 16, 256
    n_values = n_keys * n_heads
    model = Model(path, "qwen35", n_embd=1024, n_ff=3584, n_kv=2, n_layer=n_layer)
    model.writer.add_head_count_kv(model.n_kv)
    model.writer.add_key_length(n_head_dim)
    model.writer.add_value_length(n_head_dim)
    model.writer.add_rope_dimension_count(n_head_dim // 4)
    model.writer.add_rope_dimension_sections([11, 11, 10, 0])
    model.writer.add_ssm_conv_kernel(N_CONV + 1)
    model.writer.add_ssm_inner_size(n_values)
    model.writer.add_ssm_state_size(n_keys)
    model.writer.add_ssm_time_step_rank(n_heads)
    model.writer.add_ssm_group_count(n_heads)
    model.norms("output_norm")
    model.matrix("token_embd", model.n_vocab, model.n_embd)
    for n in range(n_layer):
        layer = f"blk.{n}"
        model.norms(f"{layer}.attn_norm", f"{layer}.post_attention_norm")
        if n % 4 == 3:
            n_query = model.n_head * n_head_dim
            model.norms(f"{layer}.attn_q_norm", f"{layer}.attn_k_norm", n=n_head_dim)
            model.matrix(f"{layer}.attn_q", 2 * n_query, model.n_embd)
            model.matrix(f"{layer}.attn_k", model.n_kv * n_head_dim, model.n_embd)
            model.matrix(f"{layer}.attn_v", model.n_kv * n_head_dim, model.n_embd)
            model.matrix(f"{layer}.attn_output", model.n_embd, n_query)
        else:
            model.matrix(f"{layer}.attn_qkv", 3 * n_values, model.n_embd)
            model.matrix(f"{layer}.attn_gate", n_values, model.n_embd)
            model.matrix(f"{layer}.ssm_conv1d", 3 * n_values, N_CONV + 1)
            model.writer.add_tensor(f"{layer}.ssm_dt.bias", np.zeros(n_heads, np.float32))
            model.writer.add_tensor(f"{layer}.ssm_a", -np.ones(n_heads, np.float32))
            model.matrix(f"{layer}.ssm_alpha", n_heads, model.n_embd)
            model.matrix(f"{layer}.ssm_beta", n_heads, model.n_embd)
            model.norms(f"{layer}.ssm_norm", n=n_keys)
            model.matrix(f"{layer}.ssm_out", model.n_embd, n_values)
        model.feed_forward(layer)
    model.close()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    folder = parser.parse_args(argv).folder
    folder.mkdir(parents=True, exist_ok=True)
    write_gemma3(folder / "gemma3.gguf")
    write_lfm2(folder / "lfm2.gguf")
    write_qwen35(folder / "qwen35.gguf")
    return 0


if __name__ == "__main__":
    sys.exit(main())
