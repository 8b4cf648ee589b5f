"""The kernels of ``attend_step``, and of f32 ``attend``: what they check, and their launch."""

import torch
from torch import Tensor

from dsv4 import _C
from dsv4.ops.checks import FLOATS, Shapes
from dsv4.ops.formats import KV_RECORD, MAX_STEP

WIDTH, ROTARY_PAIRS = 512, 32  # Dh and Dr / 2 of the kernels


def run(
    q: Tensor,
    window_rows: Tensor,
    sink: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    *,
    window: int,
    compressed: Tensor | None = None,
    ratio: int = 0,
    selected: Tensor | None = None,
    splits: int = 0,
) -> Tensor:
    """``attend_step`` on CUDA; tests name the blocks of a query, 8 or 16. Source: docs/model.md 2.7."""
    tokens, heads, ring, entries, top_k = _sizes(
        q, window_rows, sink, positions, inv_freq, compressed, None, selected
    )
    assert tokens <= MAX_STEP, f"q: expected at most {MAX_STEP} tokens, found {tokens}"
    least = window + max(tokens, 1) - 1
    assert window > 0 and ring >= least, f"window_rows: expected at least {least} rows, found {ring}"
    assert compressed is None or selected is not None or ratio > 0, (
        f"ratio: expected at least 1, found {ratio}"
    )
    if entries == 0 or (selected is not None and top_k == 0):
        compressed = selected = None
    out = torch.empty_like(q)
    if not out.numel():
        return out
    always = q, window_rows, sink, positions, inv_freq, compressed
    if q.dtype == torch.float32:
        numbers = (tokens, heads, ring, window, entries, ratio, top_k)
        _C.attend_f32(*always, None, selected, out, *numbers, True)
    else:
        numbers = (tokens, heads, window, ring, entries, ratio, top_k, splits)
        _C.attend_step(*always, selected, out, *numbers)
    return out


def run_chunk_f32(
    q: Tensor,
    window_kv: Tensor,
    sink: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    *,
    window: int,
    compressed: Tensor | None = None,
    visible: Tensor | None = None,
    selected: Tensor | None = None,
) -> Tensor:
    """``attend`` of f32 CUDA tensors. Source: docs/model.md 2.7."""
    assert q.dtype == torch.float32, f"q: expected torch.float32, found {q.dtype}"
    tokens, heads, rows, entries, top_k = _sizes(
        q, window_kv, sink, positions, inv_freq, compressed, visible, selected
    )
    assert window > 0 and rows >= tokens, f"expected window > 0, N >= T, found {window}, {rows}, {tokens}"
    assert compressed is None or selected is not None or visible is not None, "expected visible or selected"
    if entries == 0 or (selected is not None and top_k == 0):
        compressed = visible = selected = None
    out = torch.empty_like(q)
    if out.numel():
        tensors = (q, window_kv, sink, positions, inv_freq, compressed, visible, selected, out)
        _C.attend_f32(*tensors, tokens, heads, rows, window, entries, 0, top_k, False)
    return out


def _sizes(
    q: Tensor,
    window_rows: Tensor,
    sink: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    compressed: Tensor | None,
    visible: Tensor | None,
    selected: Tensor | None,
) -> tuple[int, int, int, int, int]:
    """T, H, rows of the window's table, C and I (0 for what is not given); everything checked."""
    shapes = Shapes()
    shapes.check("q", q, f"T H {WIDTH}", FLOATS)
    records = window_rows.dtype == torch.uint8 and q.dtype == torch.bfloat16
    width, dtype = (KV_RECORD, torch.uint8) if records else (WIDTH, q.dtype)
    shapes.check("window_rows", window_rows, f"R {width}", dtype)
    shapes.check("sink", sink, "H", torch.float32)
    shapes.check("positions", positions, "T", torch.int64)
    shapes.check("inv_freq", inv_freq, str(ROTARY_PAIRS), torch.float32)
    if compressed is not None:
        shapes.check("compressed", compressed, f"C {width}", dtype)
    if selected is not None:
        assert compressed is not None, "selected: expected none without compressed"
        shapes.check("selected", selected, "T I", torch.int32)
    if visible is not None:
        shapes.check("visible", visible, "T", torch.int64)
    entries = 0 if compressed is None else compressed.shape[0]
    top_k = 0 if selected is None else selected.shape[1]
    return shapes["T"], shapes["H"], shapes["R"], entries, top_k
