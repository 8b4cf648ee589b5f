"""Routed and shared experts in plain torch."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dsv4.ops.formats import Weight
from dsv4.ops.gemm.reference import linear


class Expert(NamedTuple):
    """The three matrices of one expert: w1 gate (F, D), w2 down (D, F), w3 up (F, D)."""

    w1: Weight
    w2: Weight
    w3: Weight


def swiglu(gate: Tensor, up: Tensor, *, limit: float) -> Tensor:
    return F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


def run_expert(
    x: Tensor, expert: Expert, weight: Tensor | None, *, limit: float, activations: str = "bf16"
) -> Tensor:
    gate = linear(x, expert.w1, activations=activations, out_dtype=torch.float32)  # [T, F]
    up = linear(x, expert.w3, activations=activations, out_dtype=torch.float32)  # [T, F]
    hidden = swiglu(gate, up, limit=limit)
    if weight is not None:
        hidden = hidden * weight.unsqueeze(-1)
    return linear(hidden.to(x.dtype), expert.w2, activations=activations, out_dtype=torch.float32)


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
    tokens, slots = chosen.shape
    parts = x.new_zeros((tokens * slots, x.shape[1]), dtype=torch.float32)
    for e in chosen.unique().tolist():
        pairs = (chosen.flatten() == e).nonzero().squeeze(-1)  # flat index: token * K + slot
        rows = x[pairs // slots]
        y = run_expert(rows, experts[e], routing.flatten()[pairs], limit=limit, activations=activations)
        parts[pairs] = y
    parts = parts.view(tokens, slots, x.shape[1])
    total = parts[:, 0]
    for slot in range(1, slots):
        total = total + parts[:, slot]
    return (total + run_expert(x, shared, None, limit=limit, activations=activations)).to(x.dtype)
