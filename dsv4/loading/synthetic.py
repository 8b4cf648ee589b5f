"""Checkpoints with random weights: any preset, number of layers, storage format and naming.

``python -m dsv4.loading.synthetic --help``. Decides which slot is stored in which format, and makes
config.json and the tokenizer to match. The numbers come from ``loading.random_values``, the files
from ``loading.writer`` (docs/model.md 4 and 5).
"""

import argparse
import functools
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import tokenizers
from tokenizers import AddedToken

from dsv4.chat import ASSISTANT, DSML, END_THINK, REMINDER, THINK, USER
from dsv4.config import CSA_RATIO, WINDOW_ONLY, ModelConfig
from dsv4.loading.formats import Layout
from dsv4.loading.mapping import DIALECTS, Slot, all_slots
from dsv4.loading.presets import PRESETS, preset
from dsv4.loading.random_values import RandomValues
from dsv4.loading.writer import (
    DEFAULT_SHARD_GB,
    Entry,
    expected_parts,
    find_layout,
    write_checkpoint,
)
from dsv4.progress import Progress, progress_bar
from dsv4.tokenizer import BOS, EOS, PAD

NAMES = ("deepseek", "transformers")
EXIT_OK, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 0, 2, 130


class Policy(NamedTuple):
    """The storage format of each group of linears (docs/model.md 4.1 to 4.3)."""

    experts: str
    linears: str
    others: str
    mtp_experts: str
    mtp_linears: str
    mtp_projections: str
    fp8_suffix: str = ".scale"


POLICIES = {
    # format: routed experts, linears, others of the trunk; of the MTP block, with its two projections
    "nvidia": Policy("nvfp4", "fp8", "bf16", "mxfp4", "fp8", "fp8"),
    "deepseek": Policy("mxfp4", "fp8", "bf16", "mxfp4", "fp8", "fp8"),
    "all-nvfp4": Policy("nvfp4", "nvfp4", "nvfp4", "nvfp4", "nvfp4", "fp8"),
    "compressed-tensors": Policy("nvfp4-ct", "fp8", "bf16", "bf16", "bf16", "bf16", ".weight_scale"),
    "bf16": Policy("bf16", "bf16", "bf16", "bf16", "bf16", "bf16"),
}
# Linears that no row matches are "others": router, compressors, weights_proj, head.
_GROUPS = {
    "experts": r"layers\.\d+\.ffn\.experts\.\d+\.w[123]",
    "linears": r"layers\.\d+\.(attn\.(wq_a|wq_b|wkv|wo_a|wo_b|indexer\.wq_b)|ffn\.shared_experts\.w[123])",
    "mtp_experts": r"mtp\.0\.ffn\.experts\.\d+\.w[123]",
    "mtp_linears": r"mtp\.0\.(attn\.(wq_a|wq_b|wkv|wo_a|wo_b)|ffn\.shared_experts\.w[123])",
    "mtp_projections": r"mtp\.0\.[eh]_proj",
}


def write_synthetic(
    directory: str | Path,
    raw: Mapping[str, Any],
    *,
    format: str,
    names: str = "deepseek",
    seed: int = 0,
    shard_gb: float = DEFAULT_SHARD_GB,
    headers_only: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write a checkpoint of the model that ``raw``, a DeepSeek config.json without quantisation, describes.

    ``format`` is one of ``POLICIES``, ``names`` one of ``NAMES``; transformers' names have no MTP
    block. A slot's codes and scales depend on its shape, format and name and on ``seed``. Raises
    ``ValueError`` for a bad argument and as ``write_checkpoint`` does.
    """
    for field, value, known in (("format", format, tuple(POLICIES)), ("names", names, NAMES)):
        if value not in known:
            raise ValueError(f"{field}: expected one of {', '.join(known)}, found {value!r}")
    config = ModelConfig.from_dict(dict(raw))
    write = functools.partial(deepseek_config if names == "deepseek" else transformers_config, raw, config)
    write_checkpoint(
        directory,
        _entries(config, format, names, RandomValues(seed)),
        config=write(format),
        tokenizer=make_tokenizer(config.vocab_size).to_str(),
        shard_gb=shard_gb,
        headers_only=headers_only,
        progress=progress,
    )


def layout_of(slot: Slot, format: str, names: str = "deepseek") -> Layout | None:
    """How ``slot`` is stored under a policy; None for a slot that is no linear."""
    if slot.kind != "linear":
        return None
    policy = POLICIES[format]
    group = next((group for group, pattern in _GROUPS.items() if re.fullmatch(pattern, slot.name)), "others")
    stored = getattr(policy, group)
    if stored != "fp8":
        return find_layout(stored)
    renamed = names == "transformers" and policy.fp8_suffix == ".scale"
    return find_layout("fp8", ".weight_scale_inv" if renamed else policy.fp8_suffix)


def _entries(config: ModelConfig, format: str, names: str, values: RandomValues) -> Iterator[Entry]:
    has_mtp = names == "deepseek" and config.num_mtp_layers > 0
    for slot in all_slots(config, mtp=has_mtp):
        stem = DIALECTS[names](slot.name)
        layout = layout_of(slot, format, names)
        parts = expected_parts(slot, layout)
        if layout is None:
            ((suffix, dtype, shape),) = parts
            yield Entry(stem + suffix, dtype, shape, functools.partial(values.plain, slot, config, dtype))
            continue
        for part, (suffix, dtype, shape) in zip(layout.parts, parts, strict=True):
            make = functools.partial(values.linear, slot, layout, part, dtype, math.prod(shape))
            yield Entry(stem + suffix, dtype, shape, make)


def deepseek_config(raw: Mapping[str, Any], config: ModelConfig, format: str) -> dict[str, Any]:
    """config.json with DeepSeek's field names and the quantisation that producers of ``format`` state."""
    kept = {key: value for key, value in raw.items() if key not in ("quantization_config", "expert_dtype")}
    return kept | _quantization(config, format) | {"synthetic": True}


def transformers_config(raw: Mapping[str, Any], config: ModelConfig, format: str) -> dict[str, Any]:
    """config.json with transformers' field names (5.23). Raises ``ValueError`` if HCA ratios differ."""
    translated = (
        "compress_ratios",
        "num_hash_layers",
        "qk_rope_head_dim",
        "rope_scaling",
        "compress_rope_theta",
    )
    kept = {
        key: value for key, value in deepseek_config(raw, config, format).items() if key not in translated
    }
    hca = sorted({ratio for ratio in config.compress_ratios if ratio not in (WINDOW_ONLY, CSA_RATIO)}) or [
        128
    ]
    if len(hca) > 1:
        raise ValueError(
            f"compress_ratios: transformers' config needs one ratio for all HCA layers, found {hca}"
        )
    kinds = {WINDOW_ONLY: "sliding_attention", CSA_RATIO: "compressed_sparse_attention"}
    hashed, partial = config.num_hash_layers, config.rope_dim / config.head_dim
    main = {"rope_type": "default", "rope_theta": config.rope_theta, "partial_rotary_factor": partial}
    compress = main | {"rope_theta": config.compress_rope_theta}
    if config.yarn is not None:
        compress |= {
            "rope_type": "yarn",
            "factor": config.yarn.factor,
            "original_max_position_embeddings": config.yarn.original_context,
            "beta_fast": config.yarn.beta_fast,
            "beta_slow": config.yarn.beta_slow,
            "attention_factor": 1.0,
        }
    return kept | {
        "architectures": ["DeepseekV4ForCausalLM"],
        "layer_types": [kinds.get(ratio, "heavily_compressed_attention") for ratio in config.compress_ratios],
        "compress_rates": {"compressed_sparse_attention": CSA_RATIO, "heavily_compressed_attention": hca[0]},
        "mlp_layer_types": ["hash_moe"] * hashed + ["moe"] * (config.num_layers - hashed),
        "partial_rotary_factor": partial,
        "rope_parameters": {"main": main, "compress": compress},
        "num_nextn_predict_layers": 0,
    }


def _quantization(config: ModelConfig, format: str) -> dict[str, Any]:
    released = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    }
    if format == "bf16":
        return {}
    if format == "deepseek":
        return {"expert_dtype": "fp4", "quantization_config": released}
    if format == "all-nvfp4":
        ignore = ["embed", "mtp.*.e_proj", "mtp.*.h_proj"]
        modelopt = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "ignore": ignore}
        return {"quantization_config": modelopt}
    four_bits = {"num_bits": 4, "type": "float", "group_size": 16}
    if format == "nvidia":
        experts = {"quant_algo": "NVFP4", "group_size": 16}
        inputs = four_bits | {"dynamic": False}
        added = {
            "moe_quant_algo": "NVFP4",
            "quant_algo": "MIXED_PRECISION",
            "group_size": 16,
            "ignore": ["*.attn.*", "*.ffn.shared_experts.*", "head", "mtp.*"],
            "quantized_layers": {f"layers.{i}.ffn.experts": experts for i in range(config.num_layers)},
            "config_groups": {
                "group_0": {"targets": ["Linear"], "weights": inputs, "input_activations": inputs}
            },
        }
        return {"expert_dtype": "fp4", "quantization_config": released | added}
    nvfp4 = four_bits | {"strategy": "tensor_group", "symmetric": True}
    blocks = {
        "num_bits": 8,
        "type": "float",
        "strategy": "block",
        "block_structure": [128, 128],
        "symmetric": True,
    }
    groups = {
        "group_0": {
            "format": "nvfp4-pack-quantized",
            "targets": [r"re:.*experts\.\d+\..*"],
            "weights": nvfp4 | {"dynamic": False},
            "input_activations": nvfp4 | {"dynamic": "local"},
        },
        "group_1": {
            "format": "float-quantized",
            "targets": [r"re:.*(attn|shared_experts)\..*"],
            "weights": blocks | {"dynamic": False},
        },
    }
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "config_groups": groups,
    }
    return {"quantization_config": quantization | {"ignore": ["lm_head", "head", "mtp.*"]}}


# V4's ids of its special tokens, the first three apart; markup that a reader of replies needs is not hidden.
_RELEASED_IDS = {
    USER: 128803,
    ASSISTANT: 128804,
    THINK: 128821,
    END_THINK: 128822,
    DSML: 128825,
    REMINDER: 128828,
    "<｜action｜>": 128829,
    "<｜query｜>": 128830,
    "<｜authority｜>": 128831,
    "<｜domain｜>": 128832,
    "<｜title｜>": 128836,
    "<｜read_url｜>": 128845,
}
_VISIBLE = (THINK, END_THINK, DSML)


def make_tokenizer(vocab_size: int) -> tokenizers.Tokenizer:
    """A byte-level tokenizer without merges: BOS, EOS and pad, the 256 bytes, V4's special tokens.

    The latter have V4's ids where ``vocab_size`` leaves room, else the ids behind the bytes. Raises
    ``ValueError`` if there is room for neither. Source: docs/model.md 5.
    """
    heads = [BOS, EOS, PAD]
    vocab = {
        token: i for i, token in enumerate(heads + sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    }
    consecutive = {token: len(vocab) + i for i, token in enumerate(_RELEASED_IDS)}
    if vocab_size <= max(consecutive.values()):
        needed = max(consecutive.values()) + 1
        raise ValueError(
            f"vocab_size: expected at least {needed} for bytes and special tokens, found {vocab_size}"
        )
    vocab |= _RELEASED_IDS if vocab_size > max(_RELEASED_IDS.values()) else consecutive
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    for token in [*heads, *_RELEASED_IDS]:
        added = AddedToken(token, normalized=False)
        if token in _VISIBLE:
            backend.add_tokens([added])
        else:
            backend.add_special_tokens([added])
    return backend


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, as for every other error."""
        self.exit(EXIT_BAD_INPUT, f"error: {message}\n")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = _Parser(prog="python -m dsv4.loading.synthetic", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=tuple(PRESETS), default="tiny")
    parser.add_argument("--layers", type=int, metavar="N", help="default: all of the preset's")
    parser.add_argument("--format", choices=tuple(POLICIES), default="nvidia")
    parser.add_argument("--names", choices=NAMES, default="deepseek")
    parser.add_argument("--out", required=True, metavar="DIR", help="a folder that is new or empty")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument("--shard-gb", type=float, default=DEFAULT_SHARD_GB, metavar="G")
    parser.add_argument("--headers-only", action="store_true", help="sparse shards: all data is a hole")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    with progress_bar("write", "B") as progress:
        write_synthetic(
            args.out,
            preset(args.preset, args.layers),
            format=args.format,
            names=args.names,
            seed=args.seed,
            shard_gb=args.shard_gb,
            headers_only=args.headers_only,
            progress=progress,
        )


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    sys.exit(EXIT_OK)
