"""A product with NVFP4 weights in Triton, as one would write it in an afternoon: a peer of ``bench.peers``.

It reads the weights as they are stored. A program computes BLOCK_N rows of the output for all tokens, going
along K in steps of BLOCK_K. A code's sign, exponent and mantissa, moved to their places in a bf16, stand for
its value times 2^-126; its scale times 2^118 brings that to 2^-8 of the weight, exactly. Low nibbles are the
even columns, so x is read as even and odd columns. One token takes sums of products, several take MMAs.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.ops.formats import Nvfp4

MMA_TOKENS = 16  # at least, of a product of tiles
SCALE_UNIT = tl.constexpr(2.0**118)
WEIGHT_UNIT = tl.constexpr(2.0**8)


class Config(NamedTuple):
    """Rows and columns of a program's tile, its warps, and steps under way."""

    block_n: int
    block_k: int
    warps: int
    stages: int


ONE_TOKEN = (
    Config(4, 1024, 4, 3),
    Config(8, 512, 4, 3),
    Config(8, 1024, 8, 3),
    Config(16, 256, 4, 4),
    Config(16, 512, 8, 3),
    Config(32, 256, 8, 3),
)
TILES = (
    Config(16, 128, 2, 5),
    Config(16, 256, 4, 4),
    Config(32, 128, 4, 4),
    Config(32, 256, 4, 4),
    Config(64, 128, 4, 4),
    Config(64, 256, 8, 3),
)


@triton.jit
def decode(codes, scales):
    """u8 codes in the low nibbles, bf16 scales -> bf16 weights times 2^-8."""
    bits = ((codes & 8).to(tl.int16) << 12) | ((codes & 7).to(tl.int16) << 6)
    return bits.to(tl.bfloat16, bitcast=True) * scales


@triton.jit
def spread(scales, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """A scale a group of 16 columns, e4m3 [rows, groups] -> one a pair of columns, times 2^118, bf16."""
    scales = (scales.to(tl.float32) * SCALE_UNIT).to(tl.bfloat16)
    return tl.broadcast_to(scales[:, :, None], (ROWS, GROUPS, 8)).reshape(ROWS, 8 * GROUPS)


@triton.jit
def linear_kernel(
    x_ptr,
    w_ptr,
    sf_ptr,
    gs_ptr,
    out_ptr,
    tokens,
    n,
    k,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    pairs, groups = tl.arange(0, BLOCK_K // 2), tl.arange(0, BLOCK_K // 16)
    ms = tl.arange(0, BLOCK_M)
    there = (ms < tokens)[None, :]
    if BLOCK_M == 1:
        sums = tl.zeros([BLOCK_N, BLOCK_K // 2], dtype=tl.float32)
    else:
        sums = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    w_row = w_ptr + rows.to(tl.int64)[:, None] * (k // 2)
    sf_row = sf_ptr + rows.to(tl.int64)[:, None] * (k // 16)
    for start in tl.range(0, k, BLOCK_K, num_stages=STAGES):
        at = start // 2 + pairs
        codes = tl.load(w_row + at[None, :])
        scales = spread(tl.load(sf_row + (start // 16 + groups)[None, :]), BLOCK_N, BLOCK_K // 16)
        even, odd = decode(codes & 15, scales), decode(codes >> 4, scales)
        if BLOCK_M == 1:
            x_even = tl.load(x_ptr + 2 * at).to(tl.float32)[None, :]
            x_odd = tl.load(x_ptr + 2 * at + 1).to(tl.float32)[None, :]
            sums += even.to(tl.float32) * x_even + odd.to(tl.float32) * x_odd
        else:
            x_at = x_ptr + ms[None, :] * k + 2 * at[:, None]
            x_even, x_odd = tl.load(x_at, mask=there, other=0.0), tl.load(x_at + 1, mask=there, other=0.0)
            sums = tl.dot(even, x_even, sums)
            sums = tl.dot(odd, x_odd, sums)
    factor = tl.load(gs_ptr) * WEIGHT_UNIT
    if BLOCK_M == 1:
        tl.store(out_ptr + rows, (tl.sum(sums, 1) * factor).to(tl.bfloat16))
    else:
        out_at = out_ptr + ms[None, :] * n + rows[:, None]
        tl.store(out_at, (sums * factor).to(tl.bfloat16), mask=there)


def configs_for(tokens: int) -> tuple[Config, ...]:
    return ONE_TOKEN if tokens == 1 else TILES


def linear(x: Tensor, weight: Nvfp4, config: Config) -> Tensor:
    """y = x W^T: x [T, K] bf16, weight (N, K), both multiples of the config's tile -> [T, N] bf16."""
    tokens, k = x.shape
    n = weight.w.shape[0]
    assert n % config.block_n == k % config.block_k == 0, f"no whole tiles: {n} x {k}, {config}"
    out = torch.empty(tokens, n, dtype=x.dtype, device=x.device)
    block_m = 1 if tokens == 1 else max(MMA_TOKENS, triton.next_power_of_2(tokens))
    linear_kernel[(triton.cdiv(n, config.block_n),)](
        x,
        weight.w,
        weight.w_sf,
        weight.w_gs,
        out,
        tokens,
        n,
        k,
        BLOCK_M=block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        STAGES=config.stages,
        num_warps=config.warps,
    )
    return out
