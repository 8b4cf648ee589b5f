"""RMS normalisation."""

import torch
from torch import Tensor

from dsv4 import _C
from dsv4.ops.checks import FLOATS, Shapes
from dsv4.ops.dispatch import op
from dsv4.ops.norm import reference


@op(reference.rms_norm, kernel=True)
def rms_norm(x: Tensor, weight: Tensor | None, *, eps: float) -> Tensor:
    """x * rsqrt(mean(x^2) + eps) * weight over the last dimension, fp32 inside, one rounding to x's dtype.

    x [..., N]; weight [N] f32, or None for the parameterless norm of the query heads.
    Source: docs/model.md 2 and 2.6.
    """
    shapes = Shapes()
    shapes.check("x", x, "... N", FLOATS)
    if weight is not None:
        shapes.check("weight", weight, "N", torch.float32)
    out = torch.empty_like(x)
    if x.numel():
        _C.rms_norm(x, weight, out, x.numel() // shapes["N"], shapes["N"], eps)
    return out
