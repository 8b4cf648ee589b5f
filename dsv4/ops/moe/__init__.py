"""Routed and shared experts."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dsv4.ops.checks import FLOATS, Shapes
from dsv4.ops.dispatch import op
from dsv4.ops.moe import reference
from dsv4.ops.moe.bank import ExpertBank, bank_experts
from dsv4.ops.moe.launch import FEW_TOKENS, PAIRS_AT_ONCE, run_few, run_many
from dsv4.ops.moe.reference import Expert

__all__ = ["Expert", "ExpertBank", "bank_experts", "run_experts"]


@op(reference.run_experts, kernel=True)
def run_experts(
    x: Tensor,
    routing: Tensor,
    chosen: Tensor,
    experts: Sequence[Expert],
    shared: Expert,
    *,
    limit: float,
    activations: str = "bf16",
) -> Tensor:
    """sum_k routing[k] * expert_k(x) + shared(x): x [T, D], routing [T, K] f32, chosen [T, K] i64 -> [T, D].

    Expert: g = min(w1 x, limit), v = clamp(w3 x, -limit, limit), a = silu(g) * v in fp32; the routing weight
    multiplies a in fp32 before its one rounding to x's dtype, then w2. Contributions are summed in fp32 in
    ascending slot order, the shared expert last, and rounded once. The kernels take an ``ExpertBank``; chosen
    experts exist, nobody looks. A token's result is bitwise the same beside any other seven.
    Source: docs/model.md 2.14.
    """
    assert isinstance(experts, ExpertBank), "experts: the kernels need the tables of bank_experts"
    sides = experts.sides(shared)
    shapes = Shapes(D=sides[0].width)
    shapes.check("x", x, "T D", FLOATS)
    shapes.check("chosen", chosen, "T K", torch.int64)
    shapes.check("routing", routing, "T K", torch.float32)
    assert 1 <= shapes["K"] <= PAIRS_AT_ONCE, (
        f"chosen: expected 1 to {PAIRS_AT_ONCE} slots, found {shapes['K']}"
    )
    if shapes["T"] == 0:
        return torch.empty_like(x)
    few = shapes["T"] <= FEW_TOKENS and x.dtype == torch.bfloat16 and activations != "nvfp4"
    run = run_few if few else run_many
    return run(x, routing, chosen, sides, limit=limit, activations=activations)
