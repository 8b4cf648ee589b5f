"""Manifold-constrained hyper-connections in plain torch, fp32 throughout."""

import torch
from torch import Tensor

from dsv4.ops.norm.reference import rms_norm


def sinkhorn_normalize(logits: Tensor, *, iterations: int, eps: float) -> Tensor:
    c = logits.softmax(dim=-1) + eps
    c = c / (c.sum(dim=-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        c = c / (c.sum(dim=-1, keepdim=True) + eps)
        c = c / (c.sum(dim=-2, keepdim=True) + eps)
    return c


def mhc_pre(
    x: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    *,
    iterations: int,
    eps: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    m = x.shape[1]
    mixes = _project(x, fn, norm_eps)  # [T, (2 + M) M]
    pre = torch.sigmoid(mixes[:, :m] * scale[0] + base[:m]) + eps
    post = 2 * torch.sigmoid(mixes[:, m : 2 * m] * scale[1] + base[m : 2 * m])
    logits = (mixes[:, 2 * m :] * scale[2] + base[2 * m :]).unflatten(-1, (m, m))
    comb = sinkhorn_normalize(logits, iterations=iterations, eps=eps)
    return _collapse(x, pre), post, comb


def mhc_post(y: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    # comb[j, k]: row j is the source stream, column k the destination.
    mixed = torch.einsum("tjk,tjd->tkd", comb, x.float())
    return (post.unsqueeze(-1) * y.float().unsqueeze(1) + mixed).to(x.dtype)


def mhc_boundary(
    y: Tensor,
    x: Tensor,
    post: Tensor,
    comb: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    norm: Tensor,
    *,
    iterations: int,
    eps: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = mhc_post(y, x, post, comb)
    u, post, comb = mhc_pre(x, fn, base, scale, iterations=iterations, eps=eps, norm_eps=norm_eps)
    return x, rms_norm(u, norm, eps=norm_eps), post, comb


def mhc_head(x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, eps: float, norm_eps: float) -> Tensor:
    weights = torch.sigmoid(_project(x, fn, norm_eps) * scale[0] + base) + eps  # [T, M]
    return _collapse(x, weights)


def _project(x: Tensor, fn: Tensor, norm_eps: float) -> Tensor:
    """fn times the RMS-normalised concatenation of the streams, stream 0 first: [T, rows of fn] f32."""
    flat = x.flatten(1).float()
    inverse_rms = torch.rsqrt(flat.square().mean(dim=-1, keepdim=True) + norm_eps)
    return flat @ fn.T * inverse_rms


def _collapse(x: Tensor, weights: Tensor) -> Tensor:
    return (weights.unsqueeze(-1) * x.float()).sum(dim=1).to(x.dtype)
