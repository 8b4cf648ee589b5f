"""The kernels of run_experts for many tokens: grouping, products of every expert, SwiGLU, sums of slots."""

import functools
from collections.abc import Callable

import pytest
import torch
from numeric import assert_bits, assert_gemm, assert_reproducible, assert_rounded, dirty_memory
from shapes import MODELS, Sizes
from tile_weights import KINDS, NUMBER, Stored, exact_weight, kind_of, random_weight
from torch import Tensor

from dsv4 import _C
from dsv4.ops.formats import Fp8Block, Packed, shape_of, unscaled
from dsv4.ops.moe.reference import swiglu

Normal = Callable[..., Tensor]
PATTERNS = ("spread", "one expert", "skewed", "every third is empty")
DISTINCT = 6  # matrices that are made; the tables repeat them


def choose(pattern: str, tokens: int, slots: int, experts: int, normal: Normal) -> Tensor:
    """Experts [T, K], in a slot's order at random, and in a token more than once."""
    chosen = normal(tokens, slots).view(torch.int32).long().abs() % experts
    if pattern == "one expert":
        return torch.full_like(chosen, experts - 2)
    if pattern == "skewed":
        return torch.where(normal(tokens, slots) < 0.7, 1, chosen)
    return chosen - (chosen % 3 == 2).long() if pattern.startswith("every") else chosen


def group(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    offset = torch.empty(experts + 1, dtype=torch.int32, device="cuda")
    order, place = (torch.empty(chosen.numel(), dtype=torch.int32, device="cuda") for _ in range(2))
    _C.group_by_expert(chosen, offset, order, place, chosen.numel(), experts)
    return offset, order, place


MATRIX = 1  # of an expert's three, the one that is tested


def tables(weights: list[Stored], matrix: int = MATRIX) -> tuple[Tensor, Tensor]:
    """Addresses [E, 3, 2] and global scales [E, 3]; what other matrices would have is not to be read."""
    rows = []
    for weight in weights:
        data = weight.data if isinstance(weight, Packed) else weight.w
        rows.append([data.data_ptr(), weight.w_sf.data_ptr() if isinstance(weight, Fp8Block) else 0])
    addresses = torch.zeros(len(weights), 3, 2, dtype=torch.int64)
    addresses[:, matrix] = torch.tensor(rows)
    scales = torch.full((len(weights), 3), torch.nan, device="cuda")
    for e, weight in enumerate(weights):
        if isinstance(weight, Packed) and weight.gs is not None:
            scales[e, matrix] = weight.gs
    return addresses.cuda(), scales


def experts_tiles(
    x: Tensor,
    weights: list[Stored],
    offset: Tensor,
    index: Tensor | None,
    slots: int,
    *,
    token_scale: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    made: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """out[p] = weights[e] x[index[p] / slots] for the pairs p of each expert e; ``made`` are their tables."""
    first, kind = weights[0], NUMBER[kind_of(weights[0])]
    n, k = shape_of(first)
    pairs = len(x) if index is None else len(index)
    addresses, scales = made or tables(weights)
    e8m0 = isinstance(first, Fp8Block) and first.w_sf.dtype == torch.float8_e8m0fnu
    sizes = (MATRIX, pairs, len(weights), slots, n, k, x.stride(0), n)
    out = torch.empty(pairs, n, dtype=dtype, device="cuda")
    _C.gemm_tiles_experts(x, index, offset, addresses, scales, token_scale, out, kind, e8m0, *sizes)
    return out


def product(x: Tensor, weights: list[Stored], offset: Tensor, rows: Tensor) -> Tensor:
    """The same in fp32; row p of the result is of row ``rows[p]`` of x."""
    ends = offset.tolist()
    parts = []
    for e, weight in enumerate(weights):
        matrix, scale = unscaled(weight)
        y = x[rows[ends[e] : ends[e + 1]]].float() @ matrix.T
        parts.append(y if scale is None else y * scale)
    return torch.cat(parts)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("sizes", MODELS, ids=lambda sizes: sizes.name)
def test_group_by_expert(sizes: Sizes, pattern: str, cuda_normal: Normal) -> None:
    for tokens in (1, 5, 33, 137, 4001, 8192):
        chosen = choose(pattern, tokens, sizes.chosen, sizes.experts, cuda_normal)
        dirty_memory()
        offset, order, place = group(chosen, sizes.experts)
        flat, case = chosen.flatten(), f"{sizes.name}, {tokens} tokens, {pattern}"
        want = flat.sort(stable=True).indices
        counts = torch.bincount(flat, minlength=sizes.experts).cumsum(0)
        assert_bits(order, want.int(), f"{case}: order")
        assert_bits(offset, torch.cat((counts.new_zeros(1), counts)).int(), f"{case}: offset")
        assert_bits(place[want], torch.arange(len(want), device="cuda").int(), f"{case}: place")
        assert_reproducible(lambda c=chosen: group(c, sizes.experts), case)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kind", KINDS)
def test_exact(kind: str, pattern: str, cuda_normal: Normal) -> None:
    """Few pairs an expert and many, with an index and without, bit by bit."""
    for tokens, slots, experts, n, k in ((7, 2, 16, 256, 256), (40, 6, 3, 288, 384), (300, 3, 7, 320, 1056)):
        weights = [exact_weight(kind, n, k, cuda_normal) for _ in range(experts)]
        offset, order, _ = group(choose(pattern, tokens, slots, experts, cuda_normal), experts)
        for index in (order, None):
            rows = order.long() // slots if index is not None else torch.arange(tokens * slots, device="cuda")
            x = (2 * cuda_normal(tokens if index is not None else tokens * slots, k)).round().bfloat16()
            dirty_memory()
            y = experts_tiles(x, weights, offset, index, slots)
            case = f"{kind}, {pattern}, {tokens} tokens, {experts} experts of {n} x {k}"
            assert_bits(y, product(x, weights, offset, rows), case)


@pytest.mark.parametrize("tokens", [5, 40, 512, 4001])
@pytest.mark.parametrize("sizes", MODELS, ids=lambda sizes: sizes.name)
@pytest.mark.parametrize("kind", KINDS)
def test_against_fp32(kind: str, sizes: Sizes, tokens: int, cuda_normal: Normal) -> None:
    for n, k in ((sizes.expert_width, sizes.hidden), (sizes.hidden, sizes.expert_width)):
        made = [random_weight(kind, n, k, cuda_normal) for _ in range(DISTINCT)]
        weights = [made[e % DISTINCT] for e in range(sizes.experts)]
        chosen = choose("skewed", tokens, sizes.chosen, sizes.experts, cuda_normal)
        offset, order, _ = group(chosen, sizes.experts)
        x, scale = cuda_normal(tokens, k).bfloat16(), cuda_normal(tokens).abs()
        rows = order.long() // sizes.chosen
        want = product(x, weights, offset, rows) * scale[rows].unsqueeze(-1)
        for dtype in (torch.float32, torch.bfloat16):
            dirty_memory()
            y = experts_tiles(x, weights, offset, order, sizes.chosen, token_scale=scale, dtype=dtype)
            assert_gemm(y, want, f"{kind} {sizes.name} {n} x {k}, {tokens} tokens, {dtype}")


@pytest.mark.parametrize("tokens", [5, 700])
@pytest.mark.parametrize("kind", KINDS)
def test_bits(kind: str, tokens: int, cuda_normal: Normal) -> None:
    weights = [random_weight(kind, 512, 512, cuda_normal) for _ in range(16)]
    offset, order, _ = group(choose("skewed", tokens, 6, 16, cuda_normal), 16)
    x = cuda_normal(tokens, 512).bfloat16()
    made = tables(weights)
    call = functools.partial(experts_tiles, x, weights, offset, order, 6, made=made)
    assert_reproducible(call, f"{kind}, {tokens} tokens")


@pytest.mark.parametrize("limit", [0.5, 10.0])
@pytest.mark.parametrize("pairs", [1, 7, 820])
def test_swiglu_pairs(pairs: int, limit: float, cuda_normal: Normal) -> None:
    for width in (8, 256, 3072):
        gate, up = 4 * cuda_normal(pairs, width), 4 * cuda_normal(pairs, width)
        gate[0, :3], up[0, 3:6] = torch.tensor([100.0, -100.0, 0.0]), torch.tensor([100.0, -100.0, 0.0])
        order, routing = torch.randperm(pairs, device="cuda").int(), cuda_normal(pairs).abs()
        for weight, by in ((routing, order), (routing, None), (None, None)):
            h = torch.empty(pairs, width, dtype=torch.bfloat16, device="cuda")
            dirty_memory()
            _C.swiglu_pairs(gate, up, weight, by, h, pairs, width, limit)
            exact = swiglu(gate, up, limit=limit)
            if weight is not None:
                exact = exact * (weight if by is None else weight[by.long()]).unsqueeze(-1)
            assert_rounded(h, exact.bfloat16(), f"{pairs} pairs of {width}, {limit=}", exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 7, 333])
def test_sum_slots(tokens: int, dtype: torch.dtype, cuda_normal: Normal) -> None:
    """Bit by bit: the order of the sum is part of the reference."""
    for slots, width in ((6, 4096), (2, 256), (1, 8), (9, 7168)):
        down, shared = cuda_normal(tokens * slots, width), cuda_normal(tokens, width)
        place = torch.randperm(tokens * slots, device="cuda").int()
        for last in (shared, None):
            out = torch.empty(tokens, width, dtype=dtype, device="cuda")
            dirty_memory()
            _C.sum_slots(down, place, last, out, tokens, slots, width)
            parts = down[place.long()].view(tokens, slots, width).unbind(1)
            want = parts[0]
            for part in (*parts[1:], *(() if last is None else (last,))):
                want = want + part
            assert_bits(out, want.to(dtype), f"{tokens} tokens, {slots} slots of {width}")
