"""Every fault of the list below shows in the logits, so agreement with tests/oracle.py excludes all of them.

The faults are mistakes that ports of DeepSeek-V4 have made (docs/model.md 7). One at a time is put into
the engine; the logits must then leave the oracle's by ten times the tolerance that the engine keeps
without it. The model's magnitudes make that possible: a small clamp, large eps, few Sinkhorn iterations.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import checkpoints
import pytest
import torch
from mutations import (
    Fault,
    assign,
    attention_ropes,
    biased,
    compressed_layers,
    drafter,
    edit,
    edit_pooling,
    fold_input_scale,
    forget,
    frequencies,
    interleave_heads,
    keep_tails,
    rotate_halves,
    rotate_only_queries,
    rows_first,
    score_without_relu,
    see,
    share_scale,
    swap_series,
    unnormalised,
    weigh_by_latent,
    window_layers,
    without_eps,
    wrap,
)
from oracle import Oracle
from torch import Tensor
from torch.nn import functional as F

from dsv4 import model
from dsv4.config import ModelConfig
from dsv4.engine import Engine, load
from dsv4.layers import attention, indexer, mhc
from dsv4.ops import formats, quant
from dsv4.ops.attention import reference as attention_reference
from dsv4.ops.compressor import reference as pool_reference
from dsv4.ops.gemm import reference as gemm_reference
from dsv4.ops.indexer import reference as indexer_reference
from dsv4.ops.mhc import reference as mhc_reference
from dsv4.ops.moe import reference as moe_reference
from dsv4.ops.quant import reference as quant_reference
from dsv4.ops.router import reference as router_reference

TOLERANCE = 1e-3
VISIBLE = 10 * TOLERANCE

RAW_CONFIG = checkpoints.tiny_config_dict(
    q_lora_rank=64,  # as wide as the hidden state, so that one can stand in for the other
    swiglu_limit=0.5,
    sliding_window=16,
    compress_ratios=[0, 4, 16, 4, 0],
    index_n_heads=32,
    hc_eps=0.05,
    hc_sinkhorn_iters=2,
)
CONFIG = ModelConfig.from_dict(RAW_CONFIG)
PROMPT = torch.randint(2, 128, (80,), generator=torch.Generator().manual_seed(1)).tolist()


FAULTS = {
    # Attention
    "no inverse rotation": Fault(
        wrap(attention_reference, "apply_rope", lambda f, x, *a, inverse=False: x if inverse else f(x, *a))
    ),
    "output rotated forward": Fault(edit(attention_reference, "apply_rope", inverse=lambda a: False)),
    "halves rotated instead of pairs": Fault(wrap(attention_ropes, "apply_rope", rotate_halves)),
    "window-only layers with YaRN": Fault(assign(window_layers, "inv_freq", frequencies())),
    "no YaRN": Fault(assign(compressed_layers, "inv_freq", frequencies(yarn=lambda c: None))),
    "plain base in compressed layers": Fault(
        assign(compressed_layers, "inv_freq", frequencies(compress_rope_theta=lambda c: c.rope_theta))
    ),
    "softmax scaled for YaRN": Fault(
        edit(attention, "attend", q=lambda a: a["q"] * (0.1 * math.log(16) + 1) ** 2)
    ),
    "query heads not normalised": Fault(wrap(attention, "rms_norm_rope", rotate_only_queries)),
    "no sink": Fault(edit(attention, "attend", sink=lambda a: a["sink"] - math.inf)),
    "sink scaled like a score": Fault(
        edit(attention, "attend", sink=lambda a: a["sink"] * a["q"].shape[-1] ** -0.5)
    ),
    "sink counted twice": Fault(edit(attention, "attend", sink=lambda a: a["sink"] + math.log(2))),
    "window one too small": Fault(edit(attention, "attend", window=lambda a: a["window"] - 1)),
    "window one too large": Fault(edit(attention, "attend", window=lambda a: a["window"] + 1)),
    "entries visible one too late": Fault(see(later=1)),
    "entries visible one too early": Fault(see(later=-1)),
    "output groups of interleaved heads": Fault(edit(attention, "grouped_linear", x=interleave_heads)),
    # Compressors
    "ape in kv as well": Fault(edit_pooling(kv=lambda a: a["kv"] + a["ape"].repeat(20, 1)[: len(a["kv"])])),
    "Ca and Cb swapped": Fault(edit_pooling(**{name: swap_series(name) for name in ("kv", "gate", "ape")})),
    "zero gates before the first window": Fault(
        edit_pooling(tail_gate=lambda a: torch.zeros_like(a["tail_gate"]))
    ),
    "entries at position j": Fault(
        edit(pool_reference, "apply_rope", positions=lambda a: a["positions"] // a["positions"][1])
    ),
    "entries at their last token": Fault(
        edit(pool_reference, "apply_rope", positions=lambda a: a["positions"] + a["positions"][1] - 1)
    ),
    "ape by position in the pass": Fault(edit_pooling(ape=lambda a: a["ape"].roll(a["start"], 0)), chunk=7),
    "previous window forgotten": Fault(forget(lambda a: range(4 if a["overlap"] else 0)), chunk=7),
    "pending tokens forgotten": Fault(
        forget(lambda a: range(4 if a["overlap"] else 0, len(a["tail_gate"]))), chunk=7
    ),
    "tails of the previous sequence": Fault(keep_tails),
    # Indexer
    "no relu": Fault(wrap(indexer_reference, "index_scores", score_without_relu)),
    "index weights from the query latent": Fault(weigh_by_latent),
    "index weights all positive": Fault(
        edit(indexer, "choose_entries", weights=lambda a: a["weights"].abs())
    ),
    # Experts
    "shared expert not clamped": Fault(
        edit(moe_reference, "run_expert", limit=lambda a: math.inf if a["weight"] is None else a["limit"])
    ),
    "gate clamped below": Fault(
        edit(moe_reference, "swiglu", gate=lambda a: a["gate"].clamp(min=-a["limit"]))
    ),
    "clamp after silu": Fault(
        wrap(
            moe_reference,
            "swiglu",
            lambda f, g, v, limit: F.silu(g).clamp(max=limit) * v.clamp(-limit, limit),
        )
    ),
    "bias in the routing weights": Fault(wrap(router_reference, "topk_gate", biased)),
    "routing weights not normalised": Fault(wrap(router_reference, "topk_gate", unnormalised)),
    "hash layers not normalised": Fault(wrap(router_reference, "hash_gate", unnormalised)),
    "no routing scale": Fault(edit(router_reference, "topk_gate", scale=lambda a: 1.0)),
    "hash layers without routing scale": Fault(edit(router_reference, "hash_gate", scale=lambda a: 1.0)),
    "hash layers without token ids": Fault(
        edit(router_reference, "hash_gate", token_ids=lambda a: torch.zeros_like(a["token_ids"]))
    ),
    # Hyper-connections
    "comb not transposed": Fault(edit(mhc_reference, "mhc_post", comb=lambda a: a["comb"].mT)),
    "Sinkhorn rows first": Fault(wrap(mhc_reference, "sinkhorn_normalize", rows_first)),
    "Sinkhorn one iteration less": Fault(
        edit(mhc_reference, "mhc_pre", iterations=lambda a: a["iterations"] - 1)
    ),
    "pre without eps": Fault(wrap(mhc_reference, "mhc_pre", without_eps)),
    "post without its factor 2": Fault(edit(mhc_reference, "mhc_post", post=lambda a: a["post"] / 2)),
    "embedding divided among the streams": Fault(
        wrap(model, "embed_streams", lambda f, *a, **k: f(*a, **k) / k["num_streams"])
    ),
    "mean instead of the learned head": Fault(wrap(mhc, "mhc_head", lambda f, x, *a, **k: x.mean(1))),
    # Weights
    "global scale dropped": Fault(wrap(gemm_reference, "unscaled", lambda f, weight: (f(weight)[0], None))),
    "w3 with w1's global scale": Fault(
        assign(lambda engine: [b.ffn for b in engine.model.blocks], "experts", share_scale)
    ),
    "input scale folded in": Fault(wrap(gemm_reference, "unscaled", fold_input_scale)),
    "nibbles swapped": Fault(edit(formats, "unpack_e2m1", codes=lambda a: a["codes"] << 4 | a["codes"] >> 4)),
    "e8m0 off by one": Fault(wrap(formats, "e8m0_to_float", lambda f, scale: 2 * f(scale))),
    "block scales divided by": Fault(wrap(formats, "e8m0_to_float", lambda f, scale: 1 / f(scale))),
    # Trained roundings
    "Hadamard on queries only": Fault(
        wrap(indexer, "round_index", lambda f, x: f(x) if x.ndim == 3 else f(quant.rotate_hadamard(x))),
        numerics="trained",
    ),
    "KV not rounded": Fault(wrap(attention, "round_kv", lambda f, kv, rope_dim: kv), numerics="trained"),
    "rotated dimensions rounded": Fault(
        edit(attention, "round_kv", rope_dim=lambda a: 0), numerics="trained"
    ),
    "rounding scales rounded down": Fault(
        wrap(quant_reference, "_ceil_log2", lambda f, x: f(x) - 1), numerics="trained"
    ),
    # Drafts
    "draft from collapsed streams": Fault(
        edit(drafter, "forward", x=lambda a: a["x"].mean(1, keepdim=True).expand_as(a["x"])), draft=True
    ),
    "draft from the current token": Fault(
        edit(drafter, "forward", next_embedding=lambda a: a["next_embedding"].roll(1, 0)), draft=True
    ),
    "YaRN in the draft block": Fault(
        assign(lambda engine: [engine.model.mtp.block.attn], "inv_freq", frequencies()), draft=True
    ),
}


@dataclass(frozen=True)
class Case:
    """One way to run the engine, and what the oracle says to it."""

    engine: Engine
    expected: Tensor
    draft: bool

    def distance(self, chunk: int | None) -> float:
        found = self.engine.draft_logits(PROMPT) if self.draft else self.engine.logits(PROMPT, chunk)
        return float((found - self.expected).abs().max())


@pytest.fixture(scope="module")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], Case]:
    """The engine and the oracle's answer for (numerics, draft), made once each."""
    weights = checkpoints.random_model(CONFIG, seed=0)
    for name in weights:
        if name.endswith(("_base", "gate.bias")):  # streams that differ, a bias that counts
            weights[name] *= 4
    tensors = checkpoints.encode_model(weights, CONFIG, checkpoints.PRESETS["nvidia"])
    directory = checkpoints.write_checkpoint(tmp_path_factory.mktemp("mutations"), RAW_CONFIG, tensors)

    @cache
    def engine(numerics: str) -> Engine:
        # Nothing dequantised is kept: faults of the formats must reach every product.
        return load(
            directory, numerics=numerics, dtype="float32", max_context=128, mtp=True, cache_dequantised_mb=0
        )

    @cache
    def case(numerics: str, draft: bool) -> Case:
        oracle = Oracle(RAW_CONFIG, checkpoints.dequantized(tensors), numerics=numerics)
        expected = oracle.draft_logits(PROMPT) if draft else oracle.logits(PROMPT)
        return Case(engine(numerics), expected, draft)

    return case


@pytest.mark.parametrize(
    ("numerics", "draft", "chunk"), dict.fromkeys(fault[1:] for fault in FAULTS.values())
)
def test_engine_without_fault(
    case_of: Callable[[str, bool], Case], numerics: str, draft: bool, chunk: int | None
) -> None:
    assert case_of(numerics, draft).distance(chunk) <= TOLERANCE


@pytest.mark.parametrize("name", FAULTS)
def test_fault_shows(
    case_of: Callable[[str, bool], Case], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = FAULTS[name]
    case = case_of(fault.numerics, fault.draft)
    fault.inject(case.engine, monkeypatch)
    assert case.distance(fault.chunk) > VISIBLE
