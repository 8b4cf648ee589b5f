"""The whole engine against transformers' independent implementation, fp32, exact numerics.

Random checkpoints are written to disk, loaded by the engine, and given dequantised to transformers.
Windows and ratios are small, so that 300 tokens fill many windows, emit many compressed entries and
make the indexer's top-k bind; 32 index heads keep exact ties at zero out of the way.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    PRESETS,
    dequantized,
    encode_model,
    random_model,
    rename_transformers,
    tiny_config_dict,
    write_checkpoint,
)
from torch import Tensor
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

import dsv4
from dsv4.config import ModelConfig

TOLERANCE = 1e-3
PROMPT = 300
LENGTHS = (1, 2, 3, 4, 5, 6, 7, 8, 126, 127, 128, 129, 130, 254, 255, 256, 257, 258)
SWA, CSA, HCA = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"

CONFIGS: dict[str, dict[str, Any]] = {
    "window-only": {"compress_ratios": [0, 0], "num_hash_layers": 0},
    "csa": {"compress_ratios": [4, 4], "num_hash_layers": 0},
    "hca": {"compress_ratios": [8, 8], "num_hash_layers": 0},
    "mixed": {"compress_ratios": [0, 4, 8, 4], "num_hash_layers": 1},
    "hash-routed": {"compress_ratios": [4, 8], "num_hash_layers": 2},
    # Flash: 8 heads a group, top-6; Pro: twice the heads, 8 a group as well, starts with HCA.
    "flash-like": {
        "compress_ratios": [0, 0, 4, 16],
        "num_attention_heads": 16,
        "head_dim": 32,
        "num_experts_per_tok": 6,
        "n_routed_experts": 16,
        "num_hash_layers": 3,
        "sliding_window": 32,
    },
    "pro-like": {
        "compress_ratios": [16, 16, 4, 16, 4],
        "num_attention_heads": 32,
        "head_dim": 32,
        "o_groups": 4,
        "num_experts_per_tok": 6,
        "n_routed_experts": 16,
        "num_hash_layers": 3,
        "routed_scaling_factor": 2.5,
        "index_topk": 16,
    },
    # Clamp active, no YaRN, window and HCA ratio as released.
    "released-window": {
        "compress_ratios": [128, 4, 0],
        "sliding_window": 128,
        "swiglu_limit": 0.3,
        "rope_scaling": None,
    },
}


def config_dict(name: str) -> dict[str, Any]:
    """A DeepSeek config.json without MTP, which transformers does not have."""
    overrides = CONFIGS[name]
    ratios = overrides["compress_ratios"]
    shared = {"num_hidden_layers": len(ratios), "index_n_heads": 32, "num_nextn_predict_layers": 0}
    return tiny_config_dict(**(shared | overrides))


def transformers_logits(config: dict[str, Any], weights: dict[str, Tensor], ids: list[int]) -> Tensor:
    """transformers' fp32 logits [T, V] for dequantised weights under DeepSeek's names."""
    ratios = config["compress_ratios"]
    kept = ("compress_ratios", "num_hash_layers", "rope_scaling", "model_type")
    fields = {key: value for key, value in config.items() if key not in kept}
    hca = max(ratios) if max(ratios) > 4 else 8
    layers = [SWA if ratio == 0 else CSA if ratio == 4 else HCA for ratio in ratios]
    hashed = config["num_hash_layers"]
    rope = config["rope_scaling"]
    model = DeepseekV4ForCausalLM(
        DeepseekV4Config(
            **fields,
            layer_types=layers,
            mlp_layer_types=["hash_moe"] * hashed + ["moe"] * (len(layers) - hashed),
            compress_rates={CSA: 4, HCA: hca},
            partial_rotary_factor=config["qk_rope_head_dim"] / config["head_dim"],
            rope_parameters=rope and {"rope_type": rope["type"], **rope},
            attn_implementation="eager",
        )
    )
    named = rename_transformers(weights, fused=True)
    missing, unexpected = model.load_state_dict(named, strict=False)
    assert not unexpected and all("inv_freq" in name for name in missing), (missing, unexpected)
    with torch.inference_mode():
        return model.eval()(torch.tensor([ids]), use_cache=False).logits[0].float()


def make_case(directory: Path, name: str, form: str) -> tuple[dsv4.Engine, list[int], Tensor]:
    """An engine on a random checkpoint, a prompt, and transformers' logits for it."""
    raw = config_dict(name)
    config = ModelConfig.from_dict(raw)
    tensors = encode_model(random_model(config, seed=7), config, PRESETS[form])
    write_checkpoint(directory, raw, tensors)
    ids = torch.randint(0, config.vocab_size, (PROMPT,), generator=torch.Generator().manual_seed(3)).tolist()
    expected = transformers_logits(raw, dequantized(tensors), ids)
    return dsv4.load(directory, numerics="exact", max_context=PROMPT), ids, expected


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_and_chunking_agrees(name: str, tmp_path: Path) -> None:
    engine, ids, expected = make_case(tmp_path, name, "bf16")
    assert 0.3 < expected.std() < 3
    for chunk in (None, 1, 3, 7, 64):
        worst = (engine.logits(ids, chunk=chunk) - expected).abs().max()
        assert worst < TOLERANCE, f"{name}, chunk {chunk}: {worst:.2e}"
    for length in LENGTHS:
        for chunk in (None, 64):
            worst = (engine.logits(ids[:length], chunk=chunk) - expected[:length]).abs().max()
            assert worst < TOLERANCE, f"{name}, {length} tokens, chunk {chunk}: {worst:.2e}"


@pytest.mark.parametrize("form", [form for form in PRESETS if form != "bf16"])
def test_every_storage_format_agrees(form: str, tmp_path: Path) -> None:
    engine, ids, expected = make_case(tmp_path, "mixed", form)
    for chunk in (None, 7):
        worst = (engine.logits(ids, chunk=chunk) - expected).abs().max()
        assert worst < TOLERANCE, f"{form}, chunk {chunk}: {worst:.2e}"


def test_a_checkpoint_saved_by_transformers_loads(tmp_path: Path) -> None:
    config = DeepseekV4Config(
        vocab_size=64,
        hidden_size=32,
        moe_intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        head_dim=32,
        q_lora_rank=32,
        num_experts_per_tok=2,
        n_routed_experts=4,
        layer_types=[SWA, CSA, HCA],
        compress_rates={CSA: 4, HCA: 8},
        num_hash_layers=1,
        sliding_window=8,
        o_groups=2,
        o_lora_rank=16,
        index_n_heads=32,
        index_head_dim=16,
        index_topk=4,
        partial_rotary_factor=0.25,
        rope_parameters={"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 64},
        max_position_embeddings=256,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = DeepseekV4ForCausalLM(config).eval()
    with torch.inference_mode():
        for name, parameter in model.named_parameters():
            if not name.endswith("norm.weight"):
                parameter.normal_(0, 0.3)
        model.save_pretrained(tmp_path)
        ids = torch.randint(0, 64, (60,)).tolist()
        expected = model(torch.tensor([ids]), use_cache=False).logits[0]
    engine = dsv4.load(tmp_path, numerics="exact", max_context=60)
    assert (engine.logits(ids) - expected).abs().max() < TOLERANCE
