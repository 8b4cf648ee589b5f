"""Random weights of every format, for tests of the matrix products of many tokens."""

from collections.abc import Callable

import torch
from torch import Tensor

from dsv4.ops.formats import Fp8Block, Mxfp4, Nvfp4, Packed, Plain
from dsv4.ops.pack import pack_weight

Stored = Packed | Fp8Block | Plain
Normal = Callable[..., Tensor]

KINDS = ("nvfp4", "mxfp4", "fp8", "fp8 with f32 scales", "bf16")
NUMBER = {"nvfp4": 0, "mxfp4": 1, "fp8": 2, "bf16": 3}  # as csrc/gemm/units.cuh counts them


def kind_of(weight: Stored) -> str:
    return weight.kind if isinstance(weight, Packed) else "fp8" if isinstance(weight, Fp8Block) else "bf16"


def bytes_between(normal: Normal, low: int, high: int, *shape: int) -> Tensor:
    """Random bytes low .. high - 1."""
    return (low + (normal(*shape).view(torch.int32) >> 2) % (high - low)).to(torch.uint8)


def random_weight(kind: str, n: int, k: int, normal: Normal) -> Stored:
    """Every code; scales that differ; sums near 1 for inputs near 1."""
    codes = bytes_between(normal, 0, 256, n, k // 2)
    if kind == "nvfp4":
        scales = bytes_between(normal, 0, 72, n, k // 16).view(torch.float8_e4m3fn)
        return pack_weight(Nvfp4(codes, scales, torch.tensor(0.37 * k**-0.5, device="cuda")))
    if kind == "mxfp4":
        scales = bytes_between(normal, 113, 124, n, k // 32).view(torch.float8_e8m0fnu)
        return pack_weight(Mxfp4(codes, scales))
    if kind == "bf16":
        return Plain((normal(n, k) * k**-0.5).bfloat16())
    w = (100 * normal(n, k)).clamp(-448, 448).to(torch.float8_e4m3fn)  # beyond, NaN
    if kind == "fp8":
        scales = bytes_between(normal, 106, 120, -(-n // 128), -(-k // 128))
        return Fp8Block(w, scales.view(torch.float8_e8m0fnu))
    scales = normal(-(-n // 128), -(-k // 128)).abs() * 1e-2 * k**-0.5
    scales[-1, -1] = 0.0
    return Fp8Block(w, scales)


def exact_weight(kind: str, n: int, k: int, normal: Normal) -> Stored:
    """Sums of products with small integers are exact in fp32: their bits are the same in any order."""
    codes = bytes_between(normal, 0, 256, n, k // 2)
    if kind == "nvfp4":
        scales = bytes_between(normal, 0x30, 0x48, n, k // 16).view(torch.float8_e4m3fn)  # 0.5 .. 3.75
        return pack_weight(Nvfp4(codes, scales, torch.tensor(0.25, device="cuda")))
    if kind == "mxfp4":
        scales = bytes_between(normal, 124, 130, n, k // 32).view(torch.float8_e8m0fnu)
        return pack_weight(Mxfp4(codes, scales))
    integers = (2 * normal(n, k)).round()
    if kind == "bf16":
        return Plain(integers.bfloat16())
    scales = bytes_between(normal, 124, 130, -(-n // 128), -(-k // 128)).view(torch.float8_e8m0fnu)
    return Fp8Block(integers.to(torch.float8_e4m3fn), scales if kind == "fp8" else scales.float())
