"""Rotary position embedding of interleaved pairs in the last dimensions, alone and after an RMS norm."""

import torch
from torch import Tensor

from dsv4 import _C
from dsv4.ops.checks import FLOATS, Shapes
from dsv4.ops.dispatch import op
from dsv4.ops.rope import reference


@op(reference.apply_rope, kernel=True)
def apply_rope(x: Tensor, positions: Tensor, inv_freq: Tensor, *, inverse: bool = False) -> Tensor:
    """Rotate the last Dr values of every row by its position; ``inverse`` rotates back.

    x [T, ..., Dr or more] any float dtype, positions [T] i64, inv_freq [Dr/2] f32 -> like x. The pair
    (2i, 2i+1) turns by the fp32 product position * inv_freq[i]. Source: docs/model.md 2.6.
    """
    sizes = _sizes(x, positions, inv_freq)
    out = torch.empty_like(x)
    if x.numel():
        _C.apply_rope(x, positions, inv_freq, out, *sizes, inverse)
    return out


@op(reference.rms_norm_rope, kernel=True)
def rms_norm_rope(
    x: Tensor, weight: Tensor | None, positions: Tensor, inv_freq: Tensor, *, eps: float
) -> Tensor:
    """``apply_rope(rms_norm(x, weight))``: queries and KV rows, rounded to x's dtype between the two.

    x [T, ..., N], weight [N] f32 or None, positions [T] i64, inv_freq [Dr/2] f32 -> like x.
    Source: docs/model.md 2.6.
    """
    sizes = _sizes(x, positions, inv_freq)
    if weight is not None:
        Shapes(N=x.shape[-1]).check("weight", weight, "N", torch.float32)
    out = torch.empty_like(x)
    if x.numel():
        _C.rms_norm_rope(x, weight, positions, inv_freq, out, *sizes, eps)
    return out


def _sizes(x: Tensor, positions: Tensor, inv_freq: Tensor) -> tuple[int, int, int, int]:
    """Tokens, rows of a token, width of a row and pairs that turn, all checked."""
    shapes = Shapes()
    shapes.check("x", x, "... N", FLOATS)
    shapes.check("positions", positions, "T", torch.int64)
    shapes.check("inv_freq", inv_freq, "P", torch.float32)
    tokens, width, pairs = shapes["T"], shapes["N"], shapes["P"]
    assert x.dim() > 1 and x.shape[0] == tokens and 2 * pairs <= width, (
        f"x: expected [T, ..., N] with T = {tokens} and N >= {2 * pairs}, found {list(x.shape)}"
    )
    return tokens, x.shape[1:-1].numel(), width, pairs
