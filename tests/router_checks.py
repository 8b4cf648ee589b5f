"""How tests/gpu/test_router*.py judge a choice of experts, whichever kernel made it."""

import math

import torch
from numeric import assert_bits, assert_layout, assert_small_fp32
from torch import Tensor

from dsv4.ops.router import reference


def assert_choice(
    found: tuple[Tensor, Tensor],
    logits: Tensor,
    bias: Tensor,
    case: str,
    *,
    top_k: int,
    scale: float,
    ties: bool = False,
) -> None:
    """Each choice more than 2e-5 from its neighbours in rank is the reference's; with ``ties``, every one."""
    weights, experts = found
    want_weights, want_experts = reference.topk_gate(logits, bias, top_k=top_k, scale=scale)
    assert_layout(weights, want_weights, f"{case}: weights")
    assert_layout(experts, want_experts.contiguous(), f"{case}: experts")
    if ties:
        assert_bits(experts, want_experts.contiguous(), f"{case}: experts")
    scores = reference._scores(logits)
    biased = scores + bias
    distinct = experts.sort(dim=-1).values.diff(dim=-1) > 0
    assert bool(distinct.all()), f"{case}: an expert twice"
    assert_small_fp32(biased.gather(-1, experts), biased.gather(-1, want_experts), f"{case}: score + bias")
    ranked = biased.sort(dim=-1, descending=True).values
    ends = biased.new_full((len(biased), 1), math.inf)
    gaps = torch.cat((ends, -ranked.diff(dim=-1), ends), dim=-1) > 2e-5
    clear = (gaps[:, :-1] & gaps[:, 1:])[:, :top_k]
    assert torch.equal(experts[clear], want_experts[clear]), f"{case}: other experts than the reference"
    assert_small_fp32(weights, reference._weights(scores, experts, scale), f"{case}: weights")
