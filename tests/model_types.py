"""Configurations of small models of each type, and the types that the tests go over.

`docs/models.py` writes `docs/models.md` from these.
"""

# Entries of the configuration of a small model of each type, in addition to those that
# `tests.conftest.write_model` sets. The sizes are all different, so that mixed-up axes show.
_SIZES: dict[str, dict[str, object]] = {
    "llama": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "mistral": {"num_key_value_heads": 1, "sliding_window": None},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 12},
    "gemma": {"num_key_value_heads": 1, "head_dim": 12},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 12, "sliding_window": 16},
    "gemma3_text": {
        "num_key_value_heads": 2,
        "head_dim": 12,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "do_layer_norm_before": True},
    "gpt2": {"n_inner": 48},
    "gpt_neox": {"use_parallel_residual": True},
}
MODEL_TYPES = tuple(_SIZES)

# Further types, which fewer tests go over: their structure matters to pruning alone, or it differs
# from that of other types only inside the blocks.
_MORE_SIZES: dict[str, dict[str, object]] = {
    "smollm3": {"num_key_value_heads": 2, "no_rope_layers": [1, 0]},
    "ministral": {"num_key_value_heads": 2, "head_dim": 12, "sliding_window": 16},
    "granite": {
        "num_key_value_heads": 2,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.3,
        "logits_scaling": 2.0,
    },
    "olmo2": {"num_key_value_heads": 2},
    "olmo3": {
        "num_key_value_heads": 2,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "glm4": {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0},
    "phi3": {"num_key_value_heads": 2},
}
SIZES = {**_SIZES, **_MORE_SIZES}

# All types that are pruned, apart from mixtures of experts.
EVERY_TYPE = (*MODEL_TYPES, *_MORE_SIZES)

# Mixtures of experts: the number of experts, and the other entries that make a model small.
_ROUTED: dict[str, object] = {
    "num_experts_per_tok": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
}
MIXTURES: dict[str, dict[str, object]] = {
    "mixtral": _ROUTED,
    # The first block has a dense feed-forward network.
    "qwen3_moe": {**_ROUTED, "head_dim": 12, "moe_intermediate_size": 24, "mlp_only_layers": [0]},
    "gpt_oss": {
        **_ROUTED,
        "head_dim": 8,
        "sliding_window": 16,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4,
            "rope_theta": 150000.0,
        },
    },
}

# Types from which heads and channels can be cut; together they have every layout of both.
CUT_TYPES = (*MODEL_TYPES, "glm4", "phi3")

# Types from which channels can be cut, but not heads.
CHANNEL_TYPES = ("olmo2",)
