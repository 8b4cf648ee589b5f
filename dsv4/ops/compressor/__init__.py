"""The compressors of CSA and HCA: windows of tokens become single entries."""

import torch
from torch import Tensor

from dsv4 import _C
from dsv4.ops.checks import FLOATS, Shapes
from dsv4.ops.compressor import reference
from dsv4.ops.dispatch import op
from dsv4.ops.formats import MAX_STEP

MAX_WIDTH = 4096


@op(reference.compress_kv, kernel=True)
def compress_kv(
    kv: Tensor,
    gate: Tensor,
    ape: Tensor,
    tail_kv: Tensor,
    tail_gate: Tensor,
    norm: Tensor,
    inv_freq: Tensor,
    *,
    start: int,
    overlap: bool,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """``pool_windows`` and what makes its entries keys: rounding to ``dtype``, RMS norm, RoPE.

    norm [width] and inv_freq [Dr/2], f32; all else as for ``pool_windows``, with a width that is a multiple
    of 8. Window j turns by its first position, j ratio. Returns [n, width] of ``dtype``, whose bits do not
    depend on where a sequence is cut. Source: docs/model.md 2.8 and 2.9.
    """
    tokens, ratio, width, pairs = _sizes(kv, gate, ape, tail_kv, tail_gate, norm, inv_freq, overlap)
    assert dtype in FLOATS, f"dtype: expected one of {FLOATS}, found {dtype}"
    entries = norm.new_empty(((start + tokens) // ratio - start // ratio, width), dtype=dtype)
    if tokens:
        inputs = (kv, gate, ape, tail_kv, tail_gate, norm, inv_freq)
        _C.compress_kv(*inputs, entries, tokens, ratio, width, 2 * pairs, start, overlap, eps)
    return entries


@op(reference.compress_step, kernel=True)
def compress_step(
    kv: Tensor,
    gate: Tensor,
    ape: Tensor,
    tail_kv: Tensor,
    tail_gate: Tensor,
    norm: Tensor,
    inv_freq: Tensor,
    positions: Tensor,
    *,
    overlap: bool,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """``compress_kv`` of at most ``MAX_STEP`` tokens whose positions [T] i64 are read on the device alone.

    Returns entries [n, width] of ``dtype``, n = T / ratio rounded up, as many as there may be, and the index
    of each, [n] i64, or -1 for those that no token completes, whose values are undefined: as ``store_rows``
    takes them. Same bits; capturable in a CUDA graph. Source: docs/model.md 2.8, 2.9 and 3.
    """
    tokens, ratio, width, pairs = _sizes(kv, gate, ape, tail_kv, tail_gate, norm, inv_freq, overlap)
    Shapes(T=tokens).check("positions", positions, "T", torch.int64)
    assert dtype in FLOATS, f"dtype: expected one of {FLOATS}, found {dtype}"
    assert tokens <= MAX_STEP, f"kv: expected at most {MAX_STEP} tokens, found {tokens}"
    entries = norm.new_empty((-(-tokens // ratio), width), dtype=dtype)
    slots = positions.new_empty(entries.shape[0])
    if tokens:
        inputs = (kv, gate, ape, tail_kv, tail_gate, norm, inv_freq, positions)
        sizes = (tokens, entries.shape[0], ratio, width, 2 * pairs)
        _C.compress_step(*inputs, entries, slots, *sizes, overlap, eps)
    return entries, slots


def _sizes(
    kv: Tensor,
    gate: Tensor,
    ape: Tensor,
    tail_kv: Tensor,
    tail_gate: Tensor,
    norm: Tensor,
    inv_freq: Tensor,
    overlap: bool,
) -> tuple[int, int, int, int]:
    """Tokens, ratio, width of an entry and pairs that turn, all checked."""
    series, ratio = 1 + overlap, ape.shape[0]
    shapes = Shapes(N=ape.shape[-1] // series, R=series * ratio)
    named = {"ape": (ape, "m C"), "kv": (kv, "T C"), "gate": (gate, "T C"), "norm": (norm, "N")}
    named |= {"tail_kv": (tail_kv, "R C"), "tail_gate": (tail_gate, "R C"), "inv_freq": (inv_freq, "P")}
    for name, (tensor, shape) in named.items():
        shapes.check(name, tensor, shape, torch.float32)
    width, pairs = shapes["N"], shapes["P"]
    assert width * series == shapes["C"] and width % 8 == 0 and 2 * pairs <= width <= MAX_WIDTH, (
        f"ape: expected {series} x a multiple of 8 channels, {2 * pairs} to {MAX_WIDTH}, found {shapes['C']}"
    )
    return shapes["T"], ratio, width, pairs


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
