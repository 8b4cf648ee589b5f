"""The compressors of CSA and HCA: pooling windows of tokens into single entries."""

from torch import Tensor

from dsv4.ops.compressor import reference
from dsv4.ops.dispatch import op


@op(reference.pool_windows)
def pool_windows(
    kv: Tensor, gate: Tensor, ape: Tensor, tail_kv: Tensor, tail_gate: Tensor, *, start: int, overlap: bool
) -> Tensor:
    """The entries that tokens start .. start + T - 1 complete, before norm and RoPE; updates the tail.

    kv, gate [T, C] f32: the projections, gate without position bias; ape [ratio, C] f32 is added to the
    gate only, by position mod ratio. C = width for HCA; 2 x width with ``overlap`` (CSA): channels of
    series Ca, pooled with the *next* window, then Cb. Tail [rows, C] f32, rows = ratio, or 2 ratio with
    overlap (previous window first, whose gates start at -inf), holds the pending tokens and their biased
    gates. Returns [n, width] f32, n = (start + T) // ratio - start // ratio: softmax of the gates over the
    slots of a window, channel by channel, times kv. Source: docs/model.md 2.8, 2.9 and 3; paper 2.3.
    """
