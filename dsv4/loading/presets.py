"""The released configurations and a tiny one, as DeepSeek's config.json states the architecture.

Facts of the architecture only: how the weights are stored (``quantization_config``, ``expert_dtype``)
is added by whoever writes a checkpoint.
"""

import copy
from typing import Any

# Equal in every release.
_COMMON: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "torch_dtype": "bfloat16",
    "num_key_value_heads": 1,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "n_shared_experts": 1,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "swiglu_limit": 10.0,
    "sliding_window": 128,
    "index_head_dim": 128,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "compress_rope_theta": 160000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "beta_fast": 32,
        "beta_slow": 1,
    },
    "bos_token_id": 0,
    "eos_token_id": 1,
    "num_nextn_predict_layers": 1,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
}

# compress_ratios: one entry a trunk layer and one for the MTP block behind them.
PRESETS: dict[str, dict[str, Any]] = {
    "flash": {
        **_COMMON,
        "vocab_size": 129280,
        "hidden_size": 4096,
        "num_hidden_layers": 43,
        "num_attention_heads": 64,
        "q_lora_rank": 1024,
        "o_groups": 8,
        "o_lora_rank": 1024,
        "n_routed_experts": 256,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 2048,
        "num_hash_layers": 3,
        "routed_scaling_factor": 1.5,
        "index_n_heads": 64,
        "index_topk": 512,
        "max_position_embeddings": 1048576,
        "compress_ratios": [0, 0] + [4, 128] * 20 + [4] + [0],
    },
    "pro": {
        **_COMMON,
        "vocab_size": 129280,
        "hidden_size": 7168,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "q_lora_rank": 1536,
        "o_groups": 16,
        "o_lora_rank": 1024,
        "n_routed_experts": 384,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 3072,
        "num_hash_layers": 3,
        "routed_scaling_factor": 2.5,
        "index_n_heads": 64,
        "index_topk": 1024,
        "max_position_embeddings": 1048576,
        "compress_ratios": [128, 128] + [4, 128] * 29 + [4] + [0],
    },
    # Every kind of layer and both routers in seconds on a CPU. What kernels are compiled for stays real (head
    # width, RoPE, window, streams, index width); the rest shrinks, to multiples of 128 so that FP8 blocks are
    # whole. With 64 index entries the top-k binds from 260 tokens on; with fewer than 32 index heads many
    # scores are exactly 0, ties that two implementations may break differently. YaRN has the real numbers and
    # so the real frequencies; the context ends where it would begin to stretch.
    "tiny": {
        **_COMMON,
        "vocab_size": 1280,
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "q_lora_rank": 256,
        "o_groups": 2,
        "o_lora_rank": 256,
        "n_routed_experts": 16,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 256,
        "num_hash_layers": 1,
        "routed_scaling_factor": 1.5,
        "index_n_heads": 32,
        "index_topk": 64,
        "max_position_embeddings": 65536,
        "compress_ratios": [0, 4, 128, 4] + [0],
    },
}


def preset(name: str, layers: int | None = None) -> dict[str, Any]:
    """A copy of preset ``name``, its trunk cut to the first ``layers`` layers.

    The MTP block stays. At least one layer keeps the router that scores, so that a cut model has both
    routers whenever it has two layers. Raises ``ValueError`` for an unknown name or a wrong number.
    """
    if name not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, found {name!r}")
    config = copy.deepcopy(PRESETS[name])
    trunk = config["num_hidden_layers"]
    if layers is None:
        return config
    if not 1 <= layers <= trunk:
        raise ValueError(f"layers: expected 1 to {trunk} for preset {name}, found {layers}")
    ratios = config["compress_ratios"]
    config["num_hidden_layers"] = layers
    config["compress_ratios"] = ratios[:layers] + ratios[trunk:]
    config["num_hash_layers"] = min(config["num_hash_layers"], layers - 1)
    return config
