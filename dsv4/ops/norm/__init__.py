"""RMS normalisation."""

from torch import Tensor

from dsv4.ops.dispatch import op
from dsv4.ops.norm import reference


@op(reference.rms_norm)
def rms_norm(x: Tensor, weight: Tensor | None, *, eps: float) -> Tensor:
    """x * rsqrt(mean(x^2) + eps) * weight over the last dimension, fp32 inside, one rounding to x's dtype.

    x [..., N]; weight [N] f32, or None for the parameterless norm of the query heads.
    Source: docs/model.md 2 and 2.6.
    """
