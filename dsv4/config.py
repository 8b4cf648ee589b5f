"""The model's facts, read once from a checkpoint's config.json.

The only place that knows the field names of DeepSeek's and transformers' configuration files. It
does not look at tensors: ``loading.checkpoint`` compares them with these facts.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WINDOW_ONLY = 0
CSA_RATIO = 4


@dataclass(frozen=True)
class Yarn:
    """YaRN parameters of the compressed layers' RoPE (docs/model.md 2.6)."""

    factor: float
    original_context: int
    beta_fast: float
    beta_slow: float


@dataclass(frozen=True)
class ModelConfig:
    """Everything the layers need to know; names follow docs/model.md section 1."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    head_dim: int
    rope_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    num_experts: int
    experts_per_token: int
    expert_width: int
    num_hash_layers: int
    routed_scale: float
    swiglu_limit: float
    window: int
    compress_ratios: tuple[int, ...]
    index_heads: int
    index_head_dim: int
    index_topk: int
    num_streams: int
    sinkhorn_iters: int
    hc_eps: float
    norm_eps: float
    rope_theta: float
    compress_rope_theta: float
    yarn: Yarn | None
    max_context: int
    bos_id: int
    eos_ids: tuple[int, ...]
    num_mtp_layers: int
    has_dspark: bool
    synthetic: bool

    @classmethod
    def from_checkpoint(cls, directory: str | Path) -> "ModelConfig":
        """Read ``directory/config.json``, DeepSeek's or transformers' field names.

        Raises ``FileNotFoundError`` when the folder or file is missing and ``ValueError`` naming
        the field, what was expected and what was found.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise FileNotFoundError(f"{directory}: no such folder; expected a checkpoint folder")
        path = directory / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: not found; {directory} is not a checkpoint folder")
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:  # bad JSON, bad UTF-8, or an integer of thousands of digits
            raise ValueError(f"{path}: not valid JSON ({error})") from error
        if not isinstance(raw, dict):
            raise ValueError(f"{path}: expected a JSON object, found {type(raw).__name__}")
        return cls.from_dict(raw, str(path))

    @classmethod
    def from_dict(cls, raw: dict[str, Any], source: str = "config.json") -> "ModelConfig":
        """The same from a parsed configuration; ``source`` names it in error messages."""
        fields = _Fields(raw, source)
        _refuse_other_models(raw, source)
        num_layers = fields.positive("num_hidden_layers")
        head_dim = fields.positive("head_dim")
        config = cls(
            vocab_size=fields.positive("vocab_size"),
            hidden_size=fields.positive("hidden_size"),
            num_layers=num_layers,
            num_heads=fields.positive("num_attention_heads"),
            head_dim=head_dim,
            rope_dim=_rope_dim(fields, head_dim),
            q_lora_rank=fields.positive("q_lora_rank"),
            o_groups=fields.positive("o_groups"),
            o_lora_rank=fields.positive("o_lora_rank"),
            num_experts=fields.positive("n_routed_experts", "num_local_experts"),
            experts_per_token=fields.positive("num_experts_per_tok"),
            expert_width=fields.positive("moe_intermediate_size"),
            num_hash_layers=_num_hash_layers(fields, num_layers),
            routed_scale=fields.number("routed_scaling_factor"),
            swiglu_limit=fields.number("swiglu_limit"),
            window=fields.positive("sliding_window"),
            compress_ratios=_compress_ratios(fields, num_layers),
            index_heads=fields.positive("index_n_heads"),
            index_head_dim=fields.positive("index_head_dim"),
            index_topk=fields.positive("index_topk"),
            num_streams=fields.positive("hc_mult"),
            sinkhorn_iters=fields.positive("hc_sinkhorn_iters"),
            hc_eps=fields.number("hc_eps"),
            norm_eps=fields.number("rms_norm_eps"),
            rope_theta=_rope_theta(fields),
            compress_rope_theta=_compress_rope_theta(fields),
            yarn=_yarn(fields),
            max_context=fields.positive("max_position_embeddings"),
            bos_id=fields.integer("bos_token_id", default=0),
            eos_ids=_eos_ids(fields),
            num_mtp_layers=fields.integer("num_nextn_predict_layers", default=0),
            has_dspark=any(key.startswith("dspark_") for key in raw),
            synthetic=raw.get("synthetic") is True,
        )
        _check(config, fields)
        return config

    def is_hash_layer(self, layer: int) -> bool:
        """Whether ``layer`` routes by token id."""
        return layer < self.num_hash_layers

    def ratio(self, layer: int) -> int:
        """The compress ratio of ``layer``: 0 window only, 4 CSA, any other HCA. The MTP block
        (``layer == num_layers``) is window only."""
        return self.compress_ratios[layer] if layer < self.num_layers else WINDOW_ONLY


class _Fields:
    """Typed access to a configuration; every complaint names file, field, expected and found."""

    def __init__(self, raw: dict[str, Any], source: str) -> None:
        self.raw = raw
        self.source = source

    def error(self, name: str, expected: str, found: object) -> ValueError:
        return ValueError(f"{self.source}: {name}: expected {expected}, found {found!r}")

    def get(self, *names: str) -> Any:
        """The value stated under any of the names (null is not stated), which must agree."""
        stated = {name: self.raw[name] for name in names if self.raw.get(name) is not None}
        first, *others = stated or {names[0]: None}
        for name in others:
            if stated[name] != stated[first]:
                raise self.error(name, f"{stated[first]!r} as in {first}", stated[name])
        return stated.get(first)

    def integer(self, *names: str, default: int | None = None) -> int:
        value = self.get(*names)
        if value is None and default is not None:
            return default
        if value is None:
            raise ValueError(f"{self.source}: field {names[0]} is missing")
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.error(names[0], "an integer of at least 0", value)
        return value

    def positive(self, *names: str) -> int:
        value = self.integer(*names)
        if value == 0:
            raise self.error(names[0], "a positive integer", value)
        return value

    def number(self, name: str) -> float:
        value = self.get(name)
        if value is None:
            raise ValueError(f"{self.source}: field {name} is missing")
        return self.check_number(name, value)

    def check_number(self, name: str, value: object) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.error(name, "a number", value)
        if not 0 < value <= sys.float_info.max:  # NaN fails this too
            raise self.error(name, "a finite number above 0", value)
        return float(value)


def _refuse_other_models(raw: dict[str, Any], source: str) -> None:
    model_type = raw.get("model_type")
    reasons = {
        "deepseek_v41": "DeepSeek-V4.1 is a different architecture (lagged hyper-connections, "
        "shared compressed caches, Engram tables); this program runs DeepSeek-V4 only",
        "deepseek_v3": "DeepSeek-V3 has multi-head latent attention and no compressor, indexer or "
        "hyper-connections; this program runs DeepSeek-V4 only",
        "deepseek_v32": "DeepSeek-V3.2 has multi-head latent attention and no compressor or "
        "hyper-connections; this program runs DeepSeek-V4 only",
    }
    if model_type is None:
        raise ValueError(f"{source}: field model_type is missing; expected 'deepseek_v4'")
    if model_type != "deepseek_v4":
        reason = reasons.get(str(model_type), "this program runs DeepSeek-V4 only")
        raise ValueError(f"{source}: model_type: expected 'deepseek_v4', found {model_type!r}: {reason}")


_LAYER_TYPES = {
    "sliding_attention": WINDOW_ONLY,
    "compressed_sparse_attention": CSA_RATIO,
    "heavily_compressed_attention": 128,
}


def _compress_ratios(fields: _Fields, num_layers: int) -> tuple[int, ...]:
    """One ratio a trunk layer; DeepSeek's list may carry drafter entries behind them."""
    ratios = fields.get("compress_ratios")
    types = fields.get("layer_types")
    if ratios is None and types is None:
        raise ValueError(f"{fields.source}: field compress_ratios (or layer_types) is missing")
    from_types = None if types is None else _ratios_of_types(fields, types, num_layers)
    if ratios is None:
        assert from_types is not None
        return from_types
    valid = isinstance(ratios, list) and all(type(r) is int and r >= 0 for r in ratios)
    if not valid or len(ratios) < num_layers:
        raise fields.error("compress_ratios", f"at least {num_layers} integers of at least 0", ratios)
    trunk = tuple(ratios[:num_layers])
    if from_types is not None and from_types != trunk:
        raise fields.error("layer_types", f"the ratios {list(trunk)} of compress_ratios", types)
    if 1 in trunk:
        raise fields.error("compress_ratios", "0, 4 or a ratio above 1", list(trunk))
    return trunk


def _ratios_of_types(fields: _Fields, types: object, num_layers: int) -> tuple[int, ...]:
    if not isinstance(types, list) or len(types) != num_layers:
        raise fields.error("layer_types", f"a list of {num_layers} names", types)
    unknown = [name for name in types if not isinstance(name, str) or name not in _LAYER_TYPES]
    if unknown:
        raise fields.error("layer_types", f"names out of {sorted(_LAYER_TYPES)}", unknown[0])
    rates = fields.get("compress_rates") or {}
    if not isinstance(rates, dict):
        raise fields.error("compress_rates", "an object", rates)
    by_type = dict(_LAYER_TYPES)
    for name, rate in rates.items():
        if name not in by_type or type(rate) is not int or rate < 2:
            raise fields.error(f"compress_rates.{name}", "a ratio above 1 of a known layer type", rate)
        by_type[name] = rate
    csa = by_type["compressed_sparse_attention"]
    if "compressed_sparse_attention" in types and csa != CSA_RATIO:
        raise fields.error("compress_rates.compressed_sparse_attention", str(CSA_RATIO), csa)
    hca = by_type["heavily_compressed_attention"]
    if "heavily_compressed_attention" in types and hca == CSA_RATIO:
        raise fields.error("compress_rates.heavily_compressed_attention", "a ratio other than 4", hca)
    return tuple(by_type[name] for name in types)


def _num_hash_layers(fields: _Fields, num_layers: int) -> int:
    types = fields.get("mlp_layer_types")
    stated = None if fields.get("num_hash_layers") is None else fields.integer("num_hash_layers")
    if types is None and stated is None:
        raise ValueError(f"{fields.source}: field num_hash_layers (or mlp_layer_types) is missing")
    if types is None:
        return min(stated, num_layers)
    if not isinstance(types, list) or len(types) != num_layers:
        raise fields.error("mlp_layer_types", f"a list of {num_layers} names", types)
    count = sum(name == "hash_moe" for name in types)
    if types != ["hash_moe"] * count + ["moe"] * (num_layers - count):
        raise fields.error("mlp_layer_types", "'hash_moe' layers first, then 'moe' layers", types)
    if stated is not None and min(stated, num_layers) != count:
        raise fields.error("num_hash_layers", f"the {count} hash layers of mlp_layer_types", stated)
    return count


def _rope_dim(fields: _Fields, head_dim: int) -> int:
    """``qk_rope_head_dim``, or ``head_dim`` times a factor that transformers states in up to four places."""
    dims: dict[str, int] = {}
    if fields.get("qk_rope_head_dim") is not None:
        dims["qk_rope_head_dim"] = fields.positive("qk_rope_head_dim")
    for name, parameters in {"": fields.raw, **_rope_parameters(fields)}.items():
        factor, path = parameters.get("partial_rotary_factor"), f"{name}.partial_rotary_factor".lstrip(".")
        if factor is not None:
            dims[f"head_dim x {path}"] = round(head_dim * fields.check_number(path, factor))
    if not dims:
        raise ValueError(f"{fields.source}: field qk_rope_head_dim (or partial_rotary_factor) is missing")
    first, *others = dims
    for name in others:
        if dims[name] != dims[first]:
            raise fields.error(first, f"{dims[name]} = {name}", dims[first])
    return dims[first]


def _rope_parameters(fields: _Fields) -> dict[str, dict[str, Any]]:
    """transformers' RoPE parameters by full name: nested (``main``, ``compress``), flat, or none."""
    stated = fields.get("rope_parameters") or {}
    if not isinstance(stated, dict):
        raise fields.error("rope_parameters", "an object", stated)
    nested = {f"rope_parameters.{kind}": stated[kind] for kind in ("main", "compress") if kind in stated}
    for name, parameters in nested.items():
        if not isinstance(parameters, dict):
            raise fields.error(name, "an object", parameters)
    return nested or {"rope_parameters": stated}


def _rope_theta(fields: _Fields) -> float:
    """The base of window-only layers. Nested parameters win over the top level, as in transformers."""
    places = _rope_parameters(fields)
    main, flat = places.get("rope_parameters.main", {}), places.get("rope_parameters", {})
    if main.get("rope_type", "default") != "default":
        raise fields.error("rope_parameters.main.rope_type", "'default'", main["rope_type"])
    if "rope_theta" in main:
        return fields.check_number("rope_parameters.main.rope_theta", main["rope_theta"])
    if fields.get("rope_theta") is None and "rope_theta" in flat:
        return fields.check_number("rope_parameters.rope_theta", flat["rope_theta"])
    return fields.number("rope_theta")


def _compress_rope_theta(fields: _Fields) -> float:
    compress = _rope_parameters(fields).get("rope_parameters.compress", {})
    if "rope_theta" not in compress:
        return fields.number("compress_rope_theta")
    return fields.check_number("rope_parameters.compress.rope_theta", compress["rope_theta"])


def _yarn(fields: _Fields) -> Yarn | None:
    """YaRN of the compressed layers: DeepSeek's ``rope_scaling`` or transformers' ``rope_parameters``."""
    places = {"rope_scaling": fields.get("rope_scaling"), **_rope_parameters(fields)}
    places.pop("rope_parameters.main", None)
    stated: dict[str, Yarn | None] = {}
    for name, scaling in places.items():
        if scaling is None:
            continue
        if not isinstance(scaling, dict):
            raise fields.error(name, "an object", scaling)
        kinds = [scaling[key] for key in ("rope_type", "type") if scaling.get(key) is not None]
        if not kinds and "factor" in scaling:
            raise ValueError(f"{fields.source}: field {name}.rope_type is missing")
        if any(kind not in ("yarn", "default") or kind != kinds[0] for kind in kinds):
            raise fields.error(f"{name}.rope_type", "'yarn' or 'default'", kinds)
        if kinds:
            stated[name] = _yarn_numbers(fields, name, scaling) if kinds[0] == "yarn" else None
    if len(set(stated.values())) > 1:
        first, second = stated
        raise fields.error(second, f"what {first} says, {stated[first]}", stated[second])
    return next(iter(stated.values()), None)


def _yarn_numbers(fields: _Fields, name: str, scaling: dict[str, Any]) -> Yarn:
    stated = {field: value for field, value in scaling.items() if value is not None}
    numbers = _Fields({"beta_fast": 32, "beta_slow": 1} | stated, f"{fields.source}: {name}")
    for field in ("attention_factor", "mscale", "mscale_all_dim"):
        if stated.get(field, 1) != 1:
            raise numbers.error(field, "1 or nothing: V4 scales neither cos nor sin", stated[field])
    return Yarn(
        factor=numbers.number("factor"),
        original_context=numbers.positive("original_max_position_embeddings"),
        beta_fast=numbers.number("beta_fast"),
        beta_slow=numbers.number("beta_slow"),
    )


def _eos_ids(fields: _Fields) -> tuple[int, ...]:
    value = fields.get("eos_token_id")
    ids = value if isinstance(value, list) else [1 if value is None else value]
    if not ids or not all(type(i) is int and i >= 0 for i in ids):
        raise fields.error("eos_token_id", "a token id or a list of them", value)
    return tuple(ids)


def _check(config: ModelConfig, fields: _Fields) -> None:
    """Facts that must agree with each other or that the architecture fixes."""
    fixed = {
        "scoring_func": "sqrtsoftplus",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "num_key_value_heads": 1,
        "n_shared_experts": 1,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
    }
    for name, expected in fixed.items():
        found = fields.get(name)
        if found is not None and found != expected:
            raise fields.error(name, repr(expected), found)
    rope, chosen, experts = config.rope_dim, config.experts_per_token, config.num_experts
    index_dim, heads, vocab = config.index_head_dim, config.num_heads, config.vocab_size
    has_csa = CSA_RATIO in config.compress_ratios
    rules = (
        ("qk_rope_head_dim", rope, rope % 2 == 0 and 0 < rope <= config.head_dim, "even, at most head_dim"),
        ("index_head_dim", index_dim, index_dim >= rope or not has_csa, f"at least {rope}"),
        ("o_groups", config.o_groups, heads % config.o_groups == 0, f"a divisor of {heads} heads"),
        ("num_experts_per_tok", chosen, chosen <= experts, f"at most {experts} experts"),
        ("bos_token_id", config.bos_id, config.bos_id < vocab, f"below vocab_size {vocab}"),
        ("eos_token_id", config.eos_ids, max(config.eos_ids) < vocab, f"below vocab_size {vocab}"),
    )
    for name, found, holds, expected in rules:
        if not holds:
            raise fields.error(name, expected, found)
