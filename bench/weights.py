"""Random weights of every storage format for the benchmarks, made as codes and scales: nothing is quantised.

Their values have a standard deviation of K^-0.5, so that a product of unit-variance inputs has unit variance,
however many of them are chained; e8m0 scales, which are powers of two, come as near as they can.
"""

import math

import torch

from bench.harness import Draw
from dsv4.ops.formats import (
    BLOCK_OF,
    E2M1_VALUES,
    FP8_BLOCK,
    UNIT_CODES,
    Bare,
    Fp8Block,
    Nvfp4,
    Packed,
    Plain,
    packed_shape,
)

E4M3_SCALES = (40, 64)  # bytes from 0.25 to below 2
E8M0_BIAS = 127
CODE_RMS = math.sqrt(sum(value**2 for value in E2M1_VALUES) / len(E2M1_VALUES))


def scale_rms() -> float:
    """Root mean square of the e4m3 scales that are drawn."""
    values = torch.arange(*E4M3_SCALES, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    return values.square().mean().sqrt().item()


def global_scale(draw: Draw, k: int) -> torch.Tensor:
    return torch.tensor(k**-0.5 / (CODE_RMS * scale_rms()), device=draw.generator.device)


def random_nvfp4(draw: Draw, n: int, k: int) -> Nvfp4:
    low, high = E4M3_SCALES
    scales = draw.codes(n, k // BLOCK_OF["nvfp4"], low=low, high=high).view(torch.float8_e4m3fn)
    return Nvfp4(draw.codes(n, k // 2), scales, global_scale(draw, k))


def random_packed(draw: Draw, kind: str, n: int, k: int) -> Packed:
    """Any bits are codes; the scales of padding are as random as the others, and as harmless."""
    units, size = packed_shape(kind, n, k)
    low, high = E4M3_SCALES
    if kind == "mxfp4":
        low = E8M0_BIAS + round(math.log2(k**-0.5 / CODE_RMS))
        high = low + 1
    scales = draw.codes(units, size - UNIT_CODES, low=low, high=high)
    data = torch.cat((draw.codes(units, UNIT_CODES), scales), dim=1)
    return Packed(kind, data, global_scale(draw, k) if kind == "nvfp4" else None, n, k)


def random_fp8(draw: Draw, n: int, k: int) -> Fp8Block:
    """e4m3 codes of a deviation from 1 to 2, one e8m0 scale for all blocks."""
    exponent = math.floor(math.log2(k**-0.5))
    codes = draw.normal(n, k, dtype=torch.float32).mul_(k**-0.5 / 2**exponent).to(torch.float8_e4m3fn)
    byte = E8M0_BIAS + exponent
    scales = draw.codes(-(-n // FP8_BLOCK), -(-k // FP8_BLOCK), low=byte, high=byte + 1)
    return Fp8Block(codes, scales.view(torch.float8_e8m0fnu))


def random_weight(draw: Draw, kind: str, n: int, k: int) -> Bare:
    """A matrix [N, K] as the kernels read it: ``kind`` is "nvfp4", "mxfp4", "fp8" or "bf16"."""
    if kind == "bf16":
        return Plain(draw.normal(n, k).mul_(k**-0.5))
    return random_fp8(draw, n, k) if kind == "fp8" else random_packed(draw, kind, n, k)


def weight_bytes(kind: str, n: int, k: int) -> int:
    """Codes and block scales of a matrix [N, K] as it is stored."""
    if kind == "fp8":
        return n * k + -(-n // FP8_BLOCK) * -(-k // FP8_BLOCK)
    return 2 * n * k if kind == "bf16" else n * k // 2 + n * k // BLOCK_OF[kind]
