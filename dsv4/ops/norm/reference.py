"""RMS normalisation in plain torch."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor | None, *, eps: float) -> Tensor:
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + eps)
    return (y if weight is None else y * weight).to(x.dtype)
