"""How ``run_experts`` runs on a GPU: two launches for every 8 tokens, or products of tiles for many tokens.

Up to ``FEW_TOKENS`` tokens every weight that is needed is streamed once for 8 tokens
(csrc/moe/run_experts.cu). More tokens, x in f32, and NVFP4 activations, whose scales may differ from expert
to expert, go through the matrix products of csrc/gemm/gemm_tiles_experts.cu; the last two are not tuned.
"""

import torch
from torch import Tensor

from dsv4 import _C
from dsv4.ops import quant
from dsv4.ops.gemm import bf16_terms
from dsv4.ops.moe import reference
from dsv4.ops.moe.bank import Side

FEW_TOKENS = 32
TOKENS_AT_ONCE, PAIRS_AT_ONCE = 8, 128  # of the kernels for few tokens
WORKSPACE_BYTES = 256 << 20


def run_few(
    x: Tensor, routing: Tensor, chosen: Tensor, sides: tuple[Side, Side], *, limit: float, activations: str
) -> Tensor:
    """Up to 32 bf16 tokens, eight at a time: at 32 that reads 1.3 times the bytes, some experts twice."""
    (tokens, slots), (routed, shared) = chosen.shape, sides
    at_once = min(TOKENS_AT_ONCE, PAIRS_AT_ONCE // slots)
    hidden = x.new_empty(min(tokens, at_once) * slots, routed.inner)
    shared_hidden = x.new_empty(min(tokens, at_once), shared.inner)
    out = torch.empty_like(x)
    sizes = (x.shape[1], routed.inner, shared.inner)
    tables = [table for side in sides for table in (side.addresses, side.global_scales)]
    forms = [[value for side in sides for value in side.form(matrix)] for matrix in (0, 2)]
    for first in range(0, tokens, at_once):
        part = slice(first, min(first + at_once, tokens))
        count, who = part.stop - first, chosen[part]
        inputs = [_round_input(x[part], side, 0, activations) for side in sides]
        h, shared_h = hidden[: count * slots], shared_hidden[:count]
        told = (routed.count, count, slots, *sizes)
        _C.experts_gate_up(*inputs, routing[part], who, *tables, h, shared_h, *told, *forms[0], limit, True)
        h, shared_h = (_round_input(t, side, 2, activations) for t, side in ((h, routed), (shared_h, shared)))
        _C.experts_down(h, shared_h, who, *tables, out[part], *told, *forms[1], True)
    return out


def run_many(
    x: Tensor, routing: Tensor, chosen: Tensor, sides: tuple[Side, Side], *, limit: float, activations: str
) -> Tensor:
    """Any number of tokens, in slices whose intermediate results take up to 256 MB."""
    slots, (routed, shared) = chosen.shape[1], sides
    # The most at one time: gate, up and h, or h and down; the parts of each pair and of the shared expert.
    size = max(10 * routed.inner, 2 * routed.inner + 4 * routed.width) * slots + 10 * shared.inner
    at_once = max(1, WORKSPACE_BYTES // (size + 4 * shared.width))
    slices = -(-x.shape[0] // at_once)
    per_slice = -(-x.shape[0] // slices)
    out = torch.empty_like(x)
    for first in range(0, x.shape[0], per_slice):
        part = slice(first, first + per_slice)
        who = chosen[part]
        grouping = _Grouping(who, routed.count)
        down = _run_side(x[part], routing[part], grouping, routed, limit=limit, activations=activations)
        everyone = _Grouping(torch.zeros_like(who[:, :1]), 1)
        last = _run_side(x[part], None, everyone, shared, limit=limit, activations=activations)
        _C.sum_slots(down, grouping.place, last, out[part], *who.shape, x.shape[1])
    return out


class _Grouping:
    """Pairs of tokens [T] and slots [K] by expert (csrc/launchers.h, ``group_by_expert``)."""

    def __init__(self, chosen: Tensor, experts: int) -> None:
        self.pairs, self.slots = chosen.numel(), chosen.shape[1]
        self.experts = chosen
        self.offset, self.order, self.place = (
            torch.empty(size, dtype=torch.int32, device=chosen.device)
            for size in (experts + 1, self.pairs, self.pairs)
        )
        _C.group_by_expert(chosen, self.offset, self.order, self.place, self.pairs, experts)


def _run_side(
    x: Tensor, routing: Tensor | None, grouping: _Grouping, side: Side, *, limit: float, activations: str
) -> Tensor:
    """What each pair's expert makes of x [T, D]: [pairs, D] f32, pairs by expert."""
    gate, up = (_multiply(x, grouping, side, m, activations, by_pair=False) for m in (0, 1))
    if x.dtype == torch.float32:
        hidden = reference.swiglu(gate, up, limit=limit)
        if routing is not None:
            hidden *= routing.flatten()[grouping.order.long()].unsqueeze(-1)
    else:
        hidden = x.new_empty(grouping.pairs, side.inner)
        _C.swiglu_pairs(gate, up, routing, grouping.order, hidden, grouping.pairs, side.inner, limit)
    del gate, up
    return _multiply(hidden, grouping, side, 2, activations, by_pair=True)


def _multiply(
    rows: Tensor, grouping: _Grouping, side: Side, matrix: int, activations: str, *, by_pair: bool
) -> Tensor:
    """Rows of tokens, or of pairs by expert, times a matrix of each pair's expert: [pairs, N] f32."""
    scale = None
    if activations == "nvfp4" and side.is_nvfp4(matrix):
        if side.in_scales is None:
            rows, scale = quant.round_nvfp4(rows)
        else:
            order = grouping.order.long()
            rows, by_pair = rows if by_pair else rows[order // grouping.slots], True
            given = side.in_scales[:, matrix][grouping.experts.flatten()[order]].unsqueeze(-1)
            own = quant.nvfp4_global_scale(rows, per_token=True)
            rows, scale = quant.round_nvfp4(rows, torch.where(given.isnan(), own, given))
    else:
        rows = _round_input(rows, side, matrix, activations)
    (n, k), (kind, e8m0) = side.shape(matrix), side.form(matrix)
    out, total = rows.new_empty(grouping.pairs, n, dtype=torch.float32), None
    for term in (rows,) if rows.dtype == torch.bfloat16 else reversed(bf16_terms(rows)):  # the smallest first
        _C.gemm_tiles_experts(
            term,
            None if by_pair else grouping.order,
            grouping.offset,
            side.addresses,
            side.global_scales,
            scale,
            out,
            kind,
            e8m0,
            matrix,
            grouping.pairs,
            side.count,
            grouping.slots,
            n,
            k,
            k,
            n,
        )
        if rows.dtype == torch.float32:
            total = out.clone() if total is None else total.add_(out)
    return out if total is None else total


def _round_input(rows: Tensor, side: Side, matrix: int, activations: str) -> Tensor:
    """FP8 rounding of what a quantised matrix reads, where activations are not "bf16"."""
    return rows if activations == "bf16" or side.is_plain(matrix) else quant.round_fp8(rows)
