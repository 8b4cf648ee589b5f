"""Routed and shared experts."""

from collections.abc import Sequence

from torch import Tensor

from dsv4.ops.dispatch import op
from dsv4.ops.moe import reference
from dsv4.ops.moe.reference import Expert

__all__ = ["Expert", "run_experts"]


@op(reference.run_experts)
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
    ascending slot order, the shared expert last, and rounded once. Source: docs/model.md 2.14.
    """
