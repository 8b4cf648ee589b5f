"""Attention over window and compressed entries with a sink, in plain torch, fp32 scores and sums."""

import torch
from torch import Tensor

from dsv4.ops.formats import decode_rows
from dsv4.ops.rope.reference import apply_rope

BLOCK_ELEMENTS = 1 << 24


def attend(
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
    tokens, heads, width = q.shape
    if tokens == 0:
        return torch.empty_like(q)
    before = window_kv.shape[0] - tokens  # window rows older than the first query
    cost = heads * window  # elements that one query needs: its scores, and the keys gathered for it
    if selected is not None:
        cost += selected.shape[1] * (heads + width)
    elif compressed is not None:
        cost += heads * compressed.shape[0]
    rows = max(1, BLOCK_ELEMENTS // max(1, cost))
    outputs = []
    for first in range(0, tokens, rows):
        last = min(first + rows, tokens)
        oldest = max(0, before + first - window + 1)
        keys = window_kv[oldest : before + last]
        age = torch.arange(first, last, device=q.device)[:, None] + before - oldest
        age = age - torch.arange(keys.shape[0], device=q.device)  # query position - key position
        sources = [(_scores(q[first:last], keys), (age >= 0) & (age < window), keys)]
        if compressed is not None and compressed.shape[0]:
            part = slice(first, last)
            sources.append(
                _compressed_source(
                    q[part],
                    compressed,
                    None if visible is None else visible[part],
                    None if selected is None else selected[part],
                )
            )
        o = _softmax_sum(sources, sink, q.dtype)
        outputs.append(apply_rope(o, positions[first:last], inv_freq, inverse=True).to(q.dtype))
    return torch.cat(outputs)


def attend_step(
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
) -> Tensor:
    outputs = [torch.empty_like(q[:0])]
    for t, position in enumerate(positions.tolist()):  # one by one: no query changes the bits of another
        seen = torch.arange(max(0, position - window + 1), position + 1, device=q.device)
        keys = decode_rows(window_rows[seen % window_rows.shape[0]])
        if compressed is not None:
            chosen = compressed[: (position + 1) // ratio]
            if selected is not None:
                chosen = compressed[selected[t][selected[t] >= 0].long()]
            keys = torch.cat((keys, decode_rows(chosen)))
        query, mask = q[t : t + 1], torch.ones((1, keys.shape[0]), dtype=torch.bool, device=q.device)
        o = _softmax_sum([(_scores(query, keys), mask, keys)], sink, q.dtype)
        outputs.append(apply_rope(o, positions[t : t + 1], inv_freq, inverse=True).to(q.dtype))
    return torch.cat(outputs)


def _compressed_source(
    q: Tensor, compressed: Tensor, visible: Tensor | None, selected: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores [t, H, n], mask [t, n] and keys of the compressed entries; the mask is true where attended.

    Rows that nobody attends to become 0: a weight of 0 would not do where they hold NaN.
    """
    if selected is None:
        assert visible is not None
        mask = torch.arange(compressed.shape[0], device=q.device) < visible[:, None]
        keys = compressed.masked_fill(~mask.any(dim=0)[:, None], 0)
    else:
        mask = selected >= 0
        keys = compressed[selected.clamp_min(0).long()].masked_fill(~mask[..., None], 0)  # [t, I, Dh]
    return _scores(q, keys), mask, keys


def _scores(q: Tensor, keys: Tensor) -> Tensor:
    return (q.float() @ keys.float().mT) * q.shape[-1] ** -0.5


def _softmax_sum(sources: list[tuple[Tensor, Tensor, Tensor]], sink: Tensor, dtype: torch.dtype) -> Tensor:
    """One softmax over all sources and the sink, which adds to the denominator only: [t, H, Dh] f32.

    P meets the values in ``dtype``.
    """
    masked = [scores.masked_fill(~mask[:, None], -torch.inf) for scores, mask, _ in sources]
    peak = torch.cat([scores.amax(dim=-1, keepdim=True) for scores in masked], dim=-1).amax(-1, keepdim=True)
    peak = torch.maximum(peak, sink[:, None])  # [t, H, 1]; guards exp(sink - peak) as well
    total = torch.exp(sink[:, None] - peak)
    out: Tensor | float = 0.0
    for scores, (_, _, keys) in zip(masked, sources, strict=True):
        p = torch.exp(scores - peak)
        total = total + p.sum(dim=-1, keepdim=True)
        out = out + p.to(dtype).float() @ keys.float()
    return out / total
