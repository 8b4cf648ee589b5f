"""The kernel of f32 attend against the reference on the same device."""

from typing import Any

import pytest
import torch
from attention_cases import UNUSED, VALUES, WINDOW, Normal, choose
from numeric import assert_close, dirty_memory
from shapes import TINY

from dsv4.ops.attention import attend, reference


@pytest.mark.parametrize("source", ["window", "CSA, chosen", "CSA, all", "HCA"])
def test_chunk(source: str, cuda_normal: Normal) -> None:
    """attend in f32, behind 130 rows of which the first three are not seen."""
    tokens, before, start = 37, 130, 700
    positions = torch.arange(start, start + tokens, device="cuda")
    window_kv = VALUES * cuda_normal(before + tokens, 512)
    q, sink = cuda_normal(tokens, TINY.heads, 512) / VALUES, cuda_normal(TINY.heads)
    always = q, window_kv, sink, positions, cuda_normal(32).sigmoid()
    options: dict[str, Any] = {"window": WINDOW}
    if source != "window":
        visible = (positions + 1) // (128 if source == "HCA" else 4)
        entries = int(visible[-1]) + UNUSED
        options["compressed"] = VALUES * cuda_normal(entries, 512)
        if source == "CSA, chosen":
            options["selected"] = choose(visible, entries, TINY.index_topk, cuda_normal)
        else:
            options["visible"] = visible
    dirty_memory()
    want = reference.attend(*always, **options)
    window_kv[: before - WINDOW + 1] = torch.nan
    assert_close(attend(*always, **options), want, source, rtol=1e-4, atol=1e-4)
