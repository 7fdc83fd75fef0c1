"""Small models of random weights for MLX, of many families."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

from engine.prefix import Tokens

FAMILIES: dict[str, dict[str, Any]] = {
    "mamba": {
        "intermediate_size": 256, "state_size": 64, "num_hidden_layers": 2, "conv_kernel": 4,
        "use_bias": False, "use_conv_bias": True, "time_step_rank": 4,
    },  # a state in place of cells
    "jamba": {
        "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "attn_layer_offset": 1, "attn_layer_period": 2,
        "expert_layer_offset": 1, "expert_layer_period": 9, "mamba_d_conv": 4, "mamba_d_state": 8,
        "mamba_expand": 2, "num_experts": 1, "num_experts_per_tok": 1, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 1024,
    },  # the state goes on through what fills up a prompt
    "gemma3_text": {
        "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 2, "head_dim": 16,
        "num_key_value_heads": 1, "sliding_window": 16, "query_pre_attn_scalar": 16,
        "max_position_embeddings": 1024,
    },  # cells behind a window are written again
    "recurrent_gemma": {
        "attention_bias": False, "conv1d_width": 4, "intermediate_size": 64,
        "logits_soft_cap": 30.0, "num_attention_heads": 2, "num_hidden_layers": 3,
        "num_key_value_heads": 1, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
        "attention_window_size": 16, "block_types": ["recurrent", "recurrent", "attention"],
        "max_position_embeddings": 1024, "lru_width": 32,
    },  # states, and cells behind a window
    "lfm2": {
        "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1,
        "norm_eps": 1e-5, "conv_bias": False, "conv_L_cache": 3, "block_dim": 32,
        "block_multiple_of": 8, "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": False,
        "block_ff_dim": 64, "full_attn_idxs": [1], "max_position_embeddings": 1024,
    },  # convolutions beside attention
    "smollm3": {
        "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
        "no_rope_layers": [0, 1], "max_position_embeddings": 1024,
    },  # attention that does not count
    "falcon_h1": {
        "head_dim": 16, "intermediate_size": 64, "mamba_d_head": 16, "mamba_d_ssm": 64,
        "mamba_d_state": 64, "mamba_n_heads": 4, "num_attention_heads": 2,
        "num_key_value_heads": 1, "num_hidden_layers": 2, "max_position_embeddings": 1024,
    },  # a state and attention in each layer
    "glm4_moe_lite": {
        "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 4,
        "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8,
        "v_head_dim": 24, "qk_nope_head_dim": 16, "first_k_dense_replace": 5,
        "max_position_embeddings": 1024,
    },  # latent attention
    "deepseek_v2": {
        "num_hidden_layers": 2, "intermediate_size": 64, "moe_intermediate_size": 32,
        "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": None,
        "qk_rope_head_dim": 8, "v_head_dim": 24, "qk_nope_head_dim": 16, "rms_norm_eps": 1e-5,
        "rope_theta": 1e4, "rope_scaling": {"factor": 1, "mscale_all_dim": 0},
        "first_k_dense_replace": 5, "max_position_embeddings": 1024,
    },  # the same, with the keys and values of each head
    "minicpm3": {
        "num_hidden_layers": 2, "dim_model_base": 32, "intermediate_size": 64, "scale_depth": 1.0,
        "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "rms_norm_eps": 1e-5, "scale_emb": 1.0,
        "max_position_embeddings": 1024, "rope_scaling": {},
    },
    "qwen3_5": {
        "text_config": {
            "model_type": "qwen3_5_text", "vocab_size": 49152, "hidden_size": 32,
            "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": 16, "linear_num_value_heads": 4,
            "linear_num_key_heads": 2, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
            "tie_word_embeddings": True, "full_attention_interval": 4,
            "max_position_embeddings": 1024,
        },
    },  # three of four layers with a state
    "nemotron_h": {
        "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1,
        "attention_bias": False, "mamba_num_heads": 4, "mamba_head_dim": 16,
        "mamba_proj_bias": False, "ssm_state_size": 128, "conv_kernel": 4, "n_groups": 1,
        "mlp_bias": False, "layer_norm_epsilon": 1e-5, "use_bias": False, "use_conv_bias": True,
        "hybrid_override_pattern": ["M", "*", "-", "M"], "num_hidden_layers": 4, "head_dim": 16,
        "max_position_embeddings": 1024,
    },  # and layers that keep nothing
    "granitemoehybrid": {
        "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
        "num_key_value_heads": 1, "attention_bias": False, "embedding_multiplier": 1.0,
        "attention_multiplier": 0.25, "logits_scaling": 1.0, "residual_multiplier": 1.0,
        "layer_types": ["mamba", "attention", "mamba"], "rms_norm_eps": 1e-5, "rope_theta": 1e4,
        "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_proj_bias": False, "mamba_d_state": 128,
        "mamba_d_conv": 4, "mamba_n_groups": 1, "mamba_conv_bias": True,
        "shared_intermediate_size": 64, "max_position_embeddings": 1024,
    },
    "plamo3": {
        "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "rms_norm_eps": 1e-5, "window_size": 16,
        "sliding_window_pattern": 2, "max_position_embeddings": 1024,
    },  # several tokens see another window than one
    "llama4": {
        "text_config": {
            "model_type": "llama4_text", "vocab_size": 49152, "hidden_size": 32,
            "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1,
            "head_dim": 16, "intermediate_size": 64, "intermediate_size_mlp": 64,
            "interleave_moe_layer_step": 1, "num_local_experts": 2, "num_experts_per_tok": 1,
            "max_position_embeddings": 1024, "attention_chunk_size": 16, "attention_bias": False,
            "rms_norm_eps": 1e-5, "rope_theta": 1e4, "rope_scaling": None, "use_qk_norm": True,
        },
    },  # cells before a chunk are dropped
}  # fmt: skip


def write_random(folder: Path, family: str, *, tokenizer_of: Path, **values: Any) -> Path:
    """A small model of random weights, larger than they begin: what stood before has to count."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    config = {
        "model_type": family, "vocab_size": 49152, "hidden_size": 32,
        "architectures": ["AnyForCausalLM"], "tie_word_embeddings": True, **FAMILIES[family],
        **values,
    }  # fmt: skip
    mx.random.seed(7)
    library = import_module(f"mlx_lm.models.{family}")
    model = library.Model(library.ModelArgs.from_dict(config))
    folder.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((tokenizer_of / file).read_bytes())
    (folder / "config.json").write_text(json.dumps(config))
    weights = {
        name: values * 3 if values.ndim > 1 and "embed" not in name else values
        for name, values in tree_flatten(model.parameters())
    }
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder


def remembered(engine: Any) -> list[tuple[Tokens, int]]:
    """The prompts that an engine remembers, and their bytes without marks, as they were used."""
    prompts = engine._prompts
    if hasattr(prompts, "_marks"):
        return [(kept.tokens, kept.saved.nbytes) for kept in prompts._marks._kept]
    return [(entry.tokens, entry.n_bytes) for entry in prompts._entries]
