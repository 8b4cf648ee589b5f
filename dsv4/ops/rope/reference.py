"""Rotary position embedding in plain torch."""

import torch
from torch import Tensor

from dsv4.ops.norm import reference as norm


def apply_rope(x: Tensor, positions: Tensor, inv_freq: Tensor, *, inverse: bool = False) -> Tensor:
    half = inv_freq.shape[0]
    angle = positions.float()[:, None] * inv_freq  # [T, Dr/2] f32
    angle = angle.view(angle.shape[0], *[1] * (x.dim() - 2), half)
    cos, sin = angle.cos(), -angle.sin() if inverse else angle.sin()
    nope, rope = x[..., : -2 * half], x[..., -2 * half :].float().unflatten(-1, (half, 2))
    a, b = rope[..., 0], rope[..., 1]
    rotated = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
    return torch.cat((nope, rotated.to(x.dtype)), dim=-1)


def rms_norm_rope(
    x: Tensor, weight: Tensor | None, positions: Tensor, inv_freq: Tensor, *, eps: float
) -> Tensor:
    return apply_rope(norm.rms_norm(x, weight, eps=eps), positions, inv_freq)
