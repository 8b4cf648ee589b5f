"""The kernels of ``attend``: which one runs, and what they check. bf16 alone; heads of 512 values."""

import torch
from torch import Tensor

from dsv4 import _C
from dsv4.ops.checks import Shapes

WIDTH, ROTARY_PAIRS = 512, 32  # Dh and Dr / 2 of csrc/attention/prefill.cuh
FORMS = ("wgmma", "tiles", "small tiles")


def run(
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
    form: str | None = None,
) -> Tensor:
    """``attend`` on CUDA tensors; tests name a ``form``, one of ``FORMS``. Source: docs/model.md 2.7."""
    sources = (compressed, visible, selected)
    before, entries, top_k = _sizes(q, window_kv, sink, positions, inv_freq, *sources)
    assert window > 0, f"window: expected at least 1, found {window}"
    form = form or default_form()
    assert form in FORMS, f"form: expected one of {FORMS}, found {form!r}"
    if entries == 0:
        sources = (None, None, None)
    elif selected is not None:
        sources = (compressed, None, selected)
    out = torch.empty_like(q)
    if not out.numel():
        return out
    tensors = (q, window_kv, sink, positions, inv_freq, *sources, out)
    numbers = (*q.shape[:2], before, window, entries, top_k)
    if form == "wgmma":
        _C.attend_wgmma(*tensors, *numbers)
    else:
        _C.attend_tiles(*tensors, *numbers, form == "small tiles")
    return out


def default_form() -> str:
    """What runs on the current device."""
    return "wgmma" if torch.cuda.get_device_capability() == (9, 0) else "tiles"


def _sizes(
    q: Tensor,
    window_kv: Tensor,
    sink: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    compressed: Tensor | None,
    visible: Tensor | None,
    selected: Tensor | None,
) -> tuple[int, int, int]:
    """Rows before the first query, compressed entries and choices of a query; everything is checked."""
    shapes, bf16 = Shapes(), torch.bfloat16
    shapes.check("q", q, f"T H {WIDTH}", bf16)
    shapes.check("window_kv", window_kv, f"N {WIDTH}", bf16)
    shapes.check("sink", sink, "H", torch.float32)
    shapes.check("positions", positions, "T", torch.int64)
    shapes.check("inv_freq", inv_freq, str(ROTARY_PAIRS), torch.float32)
    before = shapes["N"] - shapes["T"]
    assert before >= 0, f"window_kv: expected at least {shapes['T']} rows, found {shapes['N']}"
    if compressed is None:
        assert visible is None and selected is None, "visible, selected: expected None without compressed"
        return before, 0, 0
    shapes.check("compressed", compressed, f"C {WIDTH}", bf16)
    assert visible is not None or selected is not None, "expected visible or selected beside compressed"
    if visible is not None:
        shapes.check("visible", visible, "T", torch.int64)
    if selected is None:
        return before, shapes["C"], 0
    shapes.check("selected", selected, "T choices", torch.int32)
    return before, shapes["C"], shapes["choices"]
