"""What a checkpoint must hold: one table of slots from the config, and the names both dialects use.

A *slot* is one weight of the model under DeepSeek's name, without the suffixes that a storage
format adds (``.weight``, ``.scale``, ...). Everything that needs to know the model's tensors reads
this table: the loader, the memory plan, the synthetic writer and the tests (docs/model.md 4).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from dsv4.config import CSA_RATIO, ModelConfig


@dataclass(frozen=True)
class Slot:
    """One weight: DeepSeek's name, logical shape, and what may be stored there.

    ``kind``: "linear" (a matrix in any format, on disk ``name.weight`` + scales), "matrix" (a plain
    bf16/f32 matrix, ``name.weight``), "norm" (bf16/f32 vector, ``name.weight``), "f32" (a plain
    tensor without suffix: mHC, sink, position bias, selection bias), "ids" (int64 without suffix).
    """

    name: str
    shape: tuple[int, ...]
    kind: str

    @property
    def stem(self) -> str:
        """The on-disk name of the plain tensor."""
        return f"{self.name}.weight" if self.kind in ("linear", "matrix", "norm") else self.name


def trunk_slots(config: ModelConfig) -> list[Slot]:
    """Slots outside the layers: embedding, head, final norm, mHC head."""
    v, d = config.vocab_size, config.hidden_size
    return [
        Slot("embed", (v, d), "matrix"),
        Slot("norm", (d,), "norm"),
        Slot("head", (v, d), "linear"),
        *_hc_head_slots(config, ""),
    ]


def layer_slots(config: ModelConfig, layer: int) -> list[Slot]:
    """Slots of trunk layer ``layer``."""
    return _block_slots(config, f"layers.{layer}.", config.ratio(layer), config.is_hash_layer(layer))


def mtp_slots(config: ModelConfig) -> list[Slot]:
    """Slots of the multi-token-prediction block (docs/model.md 2.16)."""
    d = config.hidden_size
    return [
        *_block_slots(config, "mtp.0.", 0, False),
        Slot("mtp.0.e_proj", (d, d), "linear"),
        Slot("mtp.0.h_proj", (d, d), "linear"),
        Slot("mtp.0.enorm", (d,), "norm"),
        Slot("mtp.0.hnorm", (d,), "norm"),
        Slot("mtp.0.norm", (d,), "norm"),
        *_hc_head_slots(config, "mtp.0."),
    ]


def _hc_head_slots(config: ModelConfig, prefix: str) -> list[Slot]:
    m = config.num_streams
    return [
        Slot(f"{prefix}hc_head_fn", (m, m * config.hidden_size), "f32"),
        Slot(f"{prefix}hc_head_base", (m,), "f32"),
        Slot(f"{prefix}hc_head_scale", (1,), "f32"),
    ]


def _block_slots(config: ModelConfig, prefix: str, ratio: int, hashed: bool) -> list[Slot]:
    d, m = config.hidden_size, config.num_streams
    slots = [Slot(f"{prefix}{name}", (d,), "norm") for name in ("attn_norm", "ffn_norm")]
    mixes = (2 + m) * m
    for site in ("attn", "ffn"):
        slots += [
            Slot(f"{prefix}hc_{site}_fn", (mixes, m * d), "f32"),
            Slot(f"{prefix}hc_{site}_base", (mixes,), "f32"),
            Slot(f"{prefix}hc_{site}_scale", (3,), "f32"),
        ]
    slots += _attention_slots(config, f"{prefix}attn.", ratio)
    slots += _moe_slots(config, f"{prefix}ffn.", hashed)
    return slots


def _attention_slots(config: ModelConfig, prefix: str, ratio: int) -> list[Slot]:
    d, dh, q = config.hidden_size, config.head_dim, config.q_lora_rank
    heads, groups, rank = config.num_heads, config.o_groups, config.o_lora_rank
    slots = [
        Slot(f"{prefix}attn_sink", (heads,), "f32"),
        Slot(f"{prefix}wq_a", (q, d), "linear"),
        Slot(f"{prefix}q_norm", (q,), "norm"),
        Slot(f"{prefix}wq_b", (heads * dh, q), "linear"),
        Slot(f"{prefix}wkv", (dh, d), "linear"),
        Slot(f"{prefix}kv_norm", (dh,), "norm"),
        Slot(f"{prefix}wo_a", (groups * rank, heads * dh // groups), "linear"),
        Slot(f"{prefix}wo_b", (d, groups * rank), "linear"),
    ]
    if ratio:
        slots += _compressor_slots(config, f"{prefix}compressor.", ratio, dh)
    if ratio == CSA_RATIO:
        di, hi = config.index_head_dim, config.index_heads
        slots += [
            Slot(f"{prefix}indexer.wq_b", (hi * di, q), "linear"),
            Slot(f"{prefix}indexer.weights_proj", (hi, d), "linear"),
            *_compressor_slots(config, f"{prefix}indexer.compressor.", ratio, di),
        ]
    return slots


def _compressor_slots(config: ModelConfig, prefix: str, ratio: int, width: int) -> list[Slot]:
    wide = 2 * width if ratio == CSA_RATIO else width  # CSA: series Ca and Cb
    return [
        Slot(f"{prefix}wkv", (wide, config.hidden_size), "linear"),
        Slot(f"{prefix}wgate", (wide, config.hidden_size), "linear"),
        Slot(f"{prefix}ape", (ratio, wide), "f32"),
        Slot(f"{prefix}norm", (width,), "norm"),
    ]


def _moe_slots(config: ModelConfig, prefix: str, hashed: bool) -> list[Slot]:
    d, f = config.hidden_size, config.expert_width
    slots = [Slot(f"{prefix}gate", (config.num_experts, d), "linear")]
    if hashed:
        slots.append(Slot(f"{prefix}gate.tid2eid", (config.vocab_size, config.experts_per_token), "ids"))
    else:
        slots.append(Slot(f"{prefix}gate.bias", (config.num_experts,), "f32"))
    for expert in [f"experts.{e}" for e in range(config.num_experts)] + ["shared_experts"]:
        slots += [
            Slot(f"{prefix}{expert}.w1", (f, d), "linear"),
            Slot(f"{prefix}{expert}.w2", (d, f), "linear"),
            Slot(f"{prefix}{expert}.w3", (f, d), "linear"),
        ]
    return slots


# (DeepSeek, transformers): names inside a layer; the rest of the path is equal on both sides.
_LAYER_NAMES = (
    ("attn_norm", "input_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("hc_attn_fn", "attn_hc.fn"),
    ("hc_attn_base", "attn_hc.base"),
    ("hc_attn_scale", "attn_hc.scale"),
    ("hc_ffn_fn", "ffn_hc.fn"),
    ("hc_ffn_base", "ffn_hc.base"),
    ("hc_ffn_scale", "ffn_hc.scale"),
    ("attn.attn_sink", "self_attn.sinks"),
    ("attn.wq_a", "self_attn.q_a_proj"),
    ("attn.q_norm", "self_attn.q_a_norm"),
    ("attn.wq_b", "self_attn.q_b_proj"),
    ("attn.wkv", "self_attn.kv_proj"),
    ("attn.kv_norm", "self_attn.kv_norm"),
    ("attn.wo_a", "self_attn.o_a_proj"),
    ("attn.wo_b", "self_attn.o_b_proj"),
    ("attn.compressor.wkv", "self_attn.compressor.kv_proj"),
    ("attn.compressor.wgate", "self_attn.compressor.gate_proj"),
    ("attn.compressor.ape", "self_attn.compressor.position_bias"),
    ("attn.compressor.norm", "self_attn.compressor.kv_norm"),
    ("attn.indexer.wq_b", "self_attn.compressor.indexer.q_b_proj"),
    ("attn.indexer.weights_proj", "self_attn.compressor.indexer.scorer.weights_proj"),
    ("attn.indexer.compressor.wkv", "self_attn.compressor.indexer.kv_proj"),
    ("attn.indexer.compressor.wgate", "self_attn.compressor.indexer.gate_proj"),
    ("attn.indexer.compressor.ape", "self_attn.compressor.indexer.position_bias"),
    ("attn.indexer.compressor.norm", "self_attn.compressor.indexer.kv_norm"),
    ("ffn.gate", "mlp.gate"),
    ("ffn.gate.bias", "mlp.gate.e_score_correction_bias"),
    ("ffn.gate.tid2eid", "mlp.gate.tid2eid"),
    ("ffn.experts", "mlp.experts"),
    ("ffn.shared_experts", "mlp.shared_experts"),
)
_EXPERT_NAMES = (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj"))
_TRUNK_NAMES = (
    ("embed", "model.embed_tokens"),
    ("norm", "model.norm"),
    ("head", "lm_head"),
    ("hc_head_fn", "model.hc_head.hc_fn"),
    ("hc_head_base", "model.hc_head.hc_base"),
    ("hc_head_scale", "model.hc_head.hc_scale"),
)
_TO_TRANSFORMERS = dict(_LAYER_NAMES)
_TRUNK_TO_TRANSFORMERS = dict(_TRUNK_NAMES)
_EXPERT_TO_TRANSFORMERS = dict(_EXPERT_NAMES)
_EXPERT_NAME = re.compile(r"ffn\.(experts\.\d+|shared_experts)\.(w[123])")


def to_transformers(name: str) -> str:
    """The transformers name of a slot given by DeepSeek's; ``mtp.*`` has none and raises."""
    if name in _TRUNK_TO_TRANSFORMERS:
        return _TRUNK_TO_TRANSFORMERS[name]
    if not name.startswith("layers."):
        raise ValueError(f"{name}: transformers has no name for this tensor")
    _, layer, inner = name.split(".", 2)
    expert = _EXPERT_NAME.fullmatch(inner)
    if expert:
        inner = f"mlp.{expert[1]}.{_EXPERT_TO_TRANSFORMERS[expert[2]]}"
    else:
        inner = _TO_TRANSFORMERS[inner]
    return f"model.layers.{layer}.{inner}"


def to_transformers_saved(name: str) -> str:
    """The name under which transformers' ``save_pretrained`` (5.23) writes a slot given by DeepSeek's.

    It renames most tensors back to DeepSeek's on the way out, but keeps the prefix ``model.`` and turns
    ``attn.kv_norm`` into ``attn.norm``. ``mtp.*`` has no name there and raises.
    """
    if name == "head":
        return name
    if name in _TRUNK_TO_TRANSFORMERS:
        return _TRUNK_TO_TRANSFORMERS[name]
    if not name.startswith("layers."):
        raise ValueError(f"{name}: transformers has no name for this tensor")
    if name.endswith(".attn.kv_norm"):
        name = name.removesuffix("kv_norm") + "norm"
    return f"model.{name}"


# How a checkpoint may name its tensors, each with the translation from DeepSeek's names.
DIALECTS: dict[str, Callable[[str], str]] = {
    "deepseek": lambda name: name,
    "transformers": to_transformers,
    "transformers-saved": to_transformers_saved,
}


def all_slots(config: ModelConfig, *, mtp: bool) -> list[Slot]:
    """Every slot of the trunk and its layers, and of the MTP block if ``mtp``."""
    layers = [slot for layer in range(config.num_layers) for slot in layer_slots(config, layer)]
    return [*trunk_slots(config), *layers, *(mtp_slots(config) if mtp else [])]
