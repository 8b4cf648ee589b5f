"""Rotary position embedding of interleaved pairs in the last dimensions."""

from torch import Tensor

from dsv4.ops.dispatch import op
from dsv4.ops.rope import reference


@op(reference.apply_rope)
def apply_rope(x: Tensor, positions: Tensor, inv_freq: Tensor, *, inverse: bool = False) -> Tensor:
    """Rotate the last Dr values of every row by its position; ``inverse`` rotates back.

    x [T, ..., Dr or more] any float dtype, positions [T] i64, inv_freq [Dr/2] f32 -> like x. The pair
    (2i, 2i+1) turns by the fp32 product position * inv_freq[i]. Source: docs/model.md 2.6.
    """
