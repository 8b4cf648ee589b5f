"""Small checkpoints with random weights in any format, for the tests.

``tiny_config_dict`` -> ``random_model`` -> ``encode_model`` -> ``write_checkpoint`` is the whole path;
``dequantized`` gives the fp32 weights of what was written, by code of its own.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dsv4.config import ModelConfig
from dsv4.loading.formats import SUFFIXES, encode, quantize
from dsv4.loading.mapping import DIALECTS, Slot, all_slots, to_transformers
from dsv4.loading.synthetic import make_tokenizer

INPUT_SCALE = 4.0 / 2688  # activations behind a norm stay within about 4


def tiny_config_dict(**overrides: Any) -> dict[str, Any]:
    """A DeepSeek config.json for a model with every kind of layer; all widths are multiples of 32."""
    config = {
        "model_type": "deepseek_v4",
        "vocab_size": 128,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "qk_rope_head_dim": 16,
        "q_lora_rank": 32,
        "o_groups": 2,
        "o_lora_rank": 32,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "num_hash_layers": 1,
        "scoring_func": "sqrtsoftplus",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.5,
        "swiglu_limit": 10.0,
        "sliding_window": 8,
        "compress_ratios": [0, 4, 8, 4, 0],
        "index_n_heads": 4,
        "index_head_dim": 32,
        "index_topk": 4,
        "hc_mult": 4,
        "hc_sinkhorn_iters": 20,
        "hc_eps": 1e-6,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000,
        "compress_rope_theta": 160000,
        "rope_scaling": {
            "type": "yarn",
            "factor": 16,
            "original_max_position_embeddings": 64,
            "beta_fast": 32,
            "beta_slow": 1,
        },
        "max_position_embeddings": 1024,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "num_nextn_predict_layers": 1,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
    }
    return config | overrides


def model_slots(config: ModelConfig) -> list[Slot]:
    """Every slot of the model, the MTP block included if the config has one."""
    return all_slots(config, mtp=config.num_mtp_layers > 0)


def random_model(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """Weights by slot name, f32 and int64, of magnitudes under which a forward pass stays tame."""
    generator = torch.Generator().manual_seed(seed)
    return {slot.name: _random_tensor(slot, config, generator) for slot in model_slots(config)}


def _random_tensor(slot: Slot, config: ModelConfig, generator: torch.Generator) -> Tensor:
    if slot.kind == "ids":  # distinct experts for each token
        order = torch.rand(slot.shape[0], config.num_experts, generator=generator).argsort()
        return order[:, : slot.shape[1]].contiguous()
    noise = torch.randn(slot.shape, generator=generator)
    if slot.kind == "linear":
        return noise * slot.shape[1] ** -0.5
    if slot.kind == "norm":
        return 1 + 0.1 * noise
    by_ending = {
        "embed": noise,
        "_fn": 0.02 * noise,
        "_base": 0.5 * noise,
        "_scale": 1 + 0.1 * noise,
        "attn_sink": noise,
        "gate.bias": 0.05 * noise,
        "ape": 0.5 * noise,
    }
    return next(value for ending, value in by_ending.items() if slot.name.endswith(ending))


def _preset(experts: str, mtp_experts: str, linear: str, plain: str = "bf16") -> Callable[[Slot], str]:
    """Formats of routed experts, of the linears DeepSeek trained in FP8, and of everything else."""

    def choose(slot: Slot) -> str:
        if ".experts." in slot.name:
            return mtp_experts if slot.name.startswith("mtp.") else experts
        kept = ("compressor", "weights_proj", "gate", "head")
        return plain if slot.kind != "linear" or any(word in slot.name for word in kept) else linear

    return choose


PRESETS: dict[str, Callable[[Slot], str]] = {
    "bf16": _preset("bf16", "bf16", "bf16"),
    "f32": _preset("f32", "f32", "f32", "f32"),
    "nvidia": _preset("nvfp4", "mxfp4", "fp8"),
    "deepseek": _preset("mxfp4", "mxfp4", "fp8"),
    "compressed-tensors": _preset("nvfp4-ct", "bf16", "fp8"),
    "all-nvfp4": lambda slot: "nvfp4" if slot.kind == "linear" else "bf16",
}


def encode_model(
    model: dict[str, Tensor], config: ModelConfig, formats: Callable[[Slot], str]
) -> dict[str, Tensor]:
    """The tensors of a checkpoint under DeepSeek's names; ``formats`` is one of ``PRESETS`` or alike."""
    tensors = {}
    for slot in model_slots(config):
        value = model[slot.name]
        if slot.kind == "linear":
            weight = quantize(value, formats(slot), input_scale=torch.tensor(INPUT_SCALE))
            tensors |= {slot.name + suffix: part for suffix, part in encode(weight, formats(slot)).items()}
        elif slot.kind in ("matrix", "norm") and formats(slot) == "bf16":
            tensors[slot.stem] = value.bfloat16()
        else:
            tensors[slot.stem] = value
    return tensors


def rename(tensors: dict[str, Tensor], names: str) -> dict[str, Tensor]:
    """The same tensors in one of ``mapping.DIALECTS``; ``mtp.*`` stays as it is."""
    renamed = {}
    for name, tensor in tensors.items():
        stem, suffix = _split(name)
        renamed[name if stem.startswith("mtp.") else DIALECTS[names](stem) + suffix] = tensor
    return renamed


def rename_transformers(tensors: dict[str, Tensor], *, fused: bool = False) -> dict[str, Tensor]:
    """The same tensors under transformers' names; ``fused`` stacks the trunk's experts, plain ones only."""
    if not fused:
        return rename(tensors, "transformers")
    experts: dict[str, dict[str, Tensor]] = {}
    others = {}
    for name, tensor in tensors.items():
        stem, _, rest = _split(name)[0].partition(".experts.")
        if rest and not name.startswith("mtp."):
            experts.setdefault(to_transformers(f"{stem}.experts"), {})[rest] = tensor
        else:
            others[name] = tensor
    renamed = rename(others, "transformers")
    for stem, parts in experts.items():
        count = len(parts) // 3
        pairs = [torch.cat((parts[f"{e}.w1"], parts[f"{e}.w3"])) for e in range(count)]
        renamed[f"{stem}.gate_up_proj"] = torch.stack(pairs)
        renamed[f"{stem}.down_proj"] = torch.stack([parts[f"{e}.w2"] for e in range(count)])
    return renamed


def _split(name: str) -> tuple[str, str]:
    """A name on disk as slot and suffix."""
    suffix = max((s for s in SUFFIXES if name.endswith(s)), key=len, default="")
    return name.removesuffix(suffix), suffix


def write_checkpoint(
    directory: Path, config_dict: dict[str, Any], tensors: dict[str, Tensor], shards: int = 2
) -> Path:
    """Write config.json and the tensors: ``shards`` files with an index, or one file without for 1."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config_dict), encoding="utf-8")
    if shards == 1:
        save_file(tensors, directory / "model.safetensors")
        return directory
    weight_map = {}
    names = sorted(tensors)
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = names[len(names) * i // shards : len(names) * (i + 1) // shards]
        save_file({name: tensors[name] for name in part}, directory / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return directory


def write_with_tokenizer(
    directory: Path, form: str = "nvidia", raw: dict[str, Any] | None = None, *, seed: int = 1
) -> Path:
    """A whole checkpoint of random weights, as the driver wants it: with a byte-level tokenizer."""
    raw = tiny_config_dict(vocab_size=288) if raw is None else raw
    config = ModelConfig.from_dict(raw)
    write_checkpoint(directory, raw, encode_model(random_model(config, seed), config, PRESETS[form]))
    (directory / "tokenizer.json").write_text(make_tokenizer(288).to_str(), encoding="utf-8")
    return directory


_BLOCK_SCALES = ("scale", "weight_scale", "weight_scale_inv")
_SCALARS = ("weight_scale_2", "input_scale", "weight_global_scale", "input_global_scale")
_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def dequantized(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's tensors (DeepSeek's names) as plain f32 and int64 ones, scales multiplied in."""
    plain = {}
    for name, tensor in tensors.items():
        stem, _, leaf = name.rpartition(".")
        if leaf in ("weight", "weight_packed"):
            scales = {leaf: tensors.get(f"{stem}.{leaf}") for leaf in _BLOCK_SCALES + _SCALARS}
            plain[f"{stem}.weight"] = _dequantize(tensor, scales)
        elif leaf not in _BLOCK_SCALES + _SCALARS:
            plain[name] = tensor.float() if tensor.is_floating_point() else tensor
    return plain


def _dequantize(codes: Tensor, scales: dict[str, Tensor | None]) -> Tensor:
    """Values of one matrix; ``scales`` by the last part of their names."""
    values, block = codes.float(), (128, 128)
    if codes.dtype in (torch.uint8, torch.int8):
        number = codes.view(torch.uint8).int()
        nibbles = torch.stack((number % 16, number // 16), dim=-1).flatten(1)
        values = _E2M1[nibbles % 8] * torch.where(nibbles >= 8, -1.0, 1.0)
        block = (1, 16 if scales["scale"] is None else 32)
    for leaf in _BLOCK_SCALES:
        if scales[leaf] is not None:
            wide = scales[leaf].float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
            values = values * wide[: values.shape[0], : values.shape[1]]
    if scales["weight_global_scale"] is not None:
        values = values * (1 / scales["weight_global_scale"])
    return values if scales["weight_scale_2"] is None else values * scales["weight_scale_2"]
