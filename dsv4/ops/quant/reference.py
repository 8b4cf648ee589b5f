"""Rounding to e2m1, e4m3 and their block scales in plain torch: the specification of the room.

Every step is one fp32 operation in the order of docs/model.md 2.13 and 4.2, so that a kernel can
agree with it bit for bit.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dsv4.ops.formats import FP8_BLOCK, MXFP4_BLOCK, NVFP4_BLOCK, e8m0_to_float, unpack_e2m1

E4M3_MAX = 448.0
E2M1_MAX = 6.0
FP8_AMAX_FLOOR = 1e-4
FP4_AMAX_FLOOR = 6.0 * 2.0**-126

# Midpoints between neighbouring e2m1 magnitudes. A tie goes to the even code: `>` where the lower
# code is even, `>=` where the upper one is.
_E2M1_TIES_DOWN = (0.25, 1.25, 2.5, 5.0)
_E2M1_TIES_UP = (0.75, 1.75, 3.5)


def pack_e2m1(x: Tensor) -> Tensor:
    magnitude = x.abs()
    code = torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
    for midpoint in _E2M1_TIES_DOWN:
        code += magnitude > midpoint
    for midpoint in _E2M1_TIES_UP:
        code += magnitude >= midpoint
    code |= torch.signbit(x).to(torch.uint8) << 3
    return code[..., 0::2] | (code[..., 1::2] << 4)


def round_e4m3(x: Tensor) -> Tensor:
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def nvfp4_global_scale(x: Tensor, *, per_token: bool) -> Tensor:
    magnitude = x.float().abs()
    amax = magnitude.amax(dim=-1, keepdim=True) if per_token else magnitude.amax()
    return _divide(amax, E2M1_MAX * E4M3_MAX)


def quantize_nvfp4(x: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor]:
    blocks = x.float().unflatten(-1, (-1, NVFP4_BLOCK))
    amax = blocks.abs().amax(dim=-1)
    # A zero global scale (an all-zero token) gives 0/0: those blocks are zero as well.
    scale = round_e4m3((_divide(amax, E2M1_MAX) / global_scale).nan_to_num(0.0))
    step = (scale.float() * global_scale).unsqueeze(-1)
    values = torch.where(step > 0, blocks / step, torch.zeros((), device=x.device))
    return pack_e2m1(values.flatten(-2)), scale


def quantize_nvfp4_tokens(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    global_scale = nvfp4_global_scale(x, per_token=True)
    return *quantize_nvfp4(x, global_scale), global_scale


def round_nvfp4(x: Tensor, global_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    if global_scale is None:
        global_scale = nvfp4_global_scale(x, per_token=True)
    codes, scale = quantize_nvfp4(x, global_scale)
    values = unpack_e2m1(codes).unflatten(-1, (-1, NVFP4_BLOCK)) * scale.float().unsqueeze(-1)
    return values.flatten(-2).to(x.dtype), global_scale.expand(*x.shape[:-1], 1).contiguous()


def quantize_mxfp4(x: Tensor) -> tuple[Tensor, Tensor]:
    values, exponent = _scale_mxfp4(x)
    return pack_e2m1(values.flatten(-2)), exponent


def quantize_fp8_block(w: Tensor) -> tuple[Tensor, Tensor]:
    n, k = w.shape
    padded = F.pad(w.float(), (0, -k % FP8_BLOCK, 0, -n % FP8_BLOCK))
    blocks = padded.unflatten(0, (-1, FP8_BLOCK)).unflatten(2, (-1, FP8_BLOCK))  # [Nb, 128, Kb, 128]
    amax = blocks.abs().amax(dim=(1, 3)).clamp_min(FP8_AMAX_FLOOR)
    exponent = _ceil_log2(_divide(amax, E4M3_MAX))
    scale = e8m0_to_float(exponent)
    codes = round_e4m3(blocks / scale[:, None, :, None])
    codes = codes.flatten(2).flatten(0, 1)[:n, :k].contiguous()
    return codes, exponent.view(torch.float8_e8m0fnu)


def quantize_fp8(x: Tensor, *, block: int = FP8_BLOCK) -> tuple[Tensor, Tensor]:
    k = x.shape[-1]
    blocks = F.pad(x.float(), (0, -k % block)).unflatten(-1, (-1, block))
    amax = blocks.abs().amax(dim=-1).clamp_min(FP8_AMAX_FLOOR)
    exponent = _ceil_log2(_divide(amax, E4M3_MAX))
    codes = round_e4m3(blocks / e8m0_to_float(exponent).unsqueeze(-1))
    return codes.flatten(-2)[..., :k].contiguous(), exponent.view(torch.float8_e8m0fnu)


class _StraightThrough(torch.autograd.Function):
    """Forward the rounded values, backward the gradient as if nothing had been rounded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """``rounded``, with the gradient of ``x``: models are trained with their roundings."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return rounded
    return _StraightThrough.apply(x, rounded.detach())


def round_fp8(x: Tensor, *, block: int = FP8_BLOCK) -> Tensor:
    codes, exponent = quantize_fp8(x.detach(), block=block)
    scale = e8m0_to_float(exponent).repeat_interleave(block, dim=-1)[..., : x.shape[-1]]
    return _straight_through(x, (codes.float() * scale).to(x.dtype))


def round_kv(kv: Tensor, *, rope_dim: int, block: int = 64) -> Tensor:
    nope = kv.shape[-1] - rope_dim
    return torch.cat((round_fp8(kv[..., :nope], block=block), kv[..., nope:]), dim=-1)


def rotate_hadamard(x: Tensor) -> Tensor:
    n = x.shape[-1]
    y = x.float()
    width = 1
    while width < n:
        pairs = y.unflatten(-1, (-1, 2, width))
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        y = torch.stack((a + b, a - b), dim=-2).flatten(-3)
        width *= 2
    return (y * n**-0.5).to(x.dtype)


def round_index(x: Tensor) -> Tensor:
    rotated = rotate_hadamard(x)
    values, exponent = _scale_mxfp4(rotated.detach())
    rounded = unpack_e2m1(pack_e2m1(values.flatten(-2))).unflatten(-1, (-1, MXFP4_BLOCK))
    rounded = (rounded * e8m0_to_float(exponent).unsqueeze(-1)).flatten(-2).to(x.dtype)
    return _straight_through(rotated, rounded)


def _scale_mxfp4(x: Tensor) -> tuple[Tensor, Tensor]:
    """x / 2^e by blocks of 32, [..., K/32, 32] f32, and e as e8m0 bytes viewed [..., K/32]."""
    blocks = x.float().unflatten(-1, (-1, MXFP4_BLOCK))
    amax = blocks.abs().amax(dim=-1).clamp_min(FP4_AMAX_FLOOR)
    exponent = _ceil_log2(_divide(amax, E2M1_MAX))
    values = blocks / e8m0_to_float(exponent).unsqueeze(-1)
    return values, exponent.view(torch.float8_e8m0fnu)


def _divide(x: Tensor, divisor: float) -> Tensor:
    """x / divisor, rounded once. With a plain number torch multiplies by its reciprocal on CUDA."""
    return x / torch.full((), divisor, device=x.device)


def _ceil_log2(x: Tensor) -> Tensor:
    """ceil(log2(x)) + 127 as bytes, from the exponent field: exact, unlike a rounded logarithm."""
    mantissa, exponent = torch.frexp(x)  # x = mantissa * 2^exponent, mantissa in [0.5, 1)
    return (exponent - (mantissa == 0.5).int() + 127).clamp(0, 254).to(torch.uint8)
