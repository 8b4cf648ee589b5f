"""Compressed entries from windows of tokens in plain torch; pooling is fp32 throughout."""

import torch
from torch import Tensor

from dsv4.ops.norm.reference import rms_norm
from dsv4.ops.rope.reference import apply_rope


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
    pooled = pool_windows(kv, gate, ape, tail_kv, tail_gate, start=start, overlap=overlap)
    entries = rms_norm(pooled.to(dtype), norm, eps=eps)
    ratio = ape.shape[0]
    first = start // ratio
    windows = torch.arange(first, first + entries.shape[0], device=kv.device)
    return apply_rope(entries, windows * ratio, inv_freq)


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
    tokens, ratio = kv.shape[0], ape.shape[0]
    entries = norm.new_zeros((-(-tokens // ratio), norm.shape[0]), dtype=dtype)
    slots = positions.new_full((entries.shape[0],), -1)
    if tokens:
        start = int(positions[0])
        inputs = (kv, gate, ape, tail_kv, tail_gate, norm, inv_freq)
        new = compress_kv(*inputs, start=start, overlap=overlap, eps=eps, dtype=dtype)
        entries[: new.shape[0]] = new
        slots[: new.shape[0]] = start // ratio + torch.arange(new.shape[0], device=kv.device)
    return entries, slots


def pool_windows(
    kv: Tensor, gate: Tensor, ape: Tensor, tail_kv: Tensor, tail_gate: Tensor, *, start: int, overlap: bool
) -> Tensor:
    ratio, width = ape.shape
    positions = torch.arange(start, start + kv.shape[0], device=kv.device)
    gate = gate + ape[positions % ratio]  # the bias goes to the gate only
    pending = start % ratio
    current = ratio if overlap else 0  # first tail row of the unfinished window
    kv = torch.cat((tail_kv[current : current + pending], kv))
    gate = torch.cat((tail_gate[current : current + pending], gate))
    windows = kv.shape[0] // ratio
    full = windows * ratio
    kv_windows = kv[:full].view(windows, ratio, width)
    gate_windows = gate[:full].view(windows, ratio, width)
    if overlap and windows:
        entries = _pool_overlapping(kv_windows, gate_windows, tail_kv[:ratio], tail_gate[:ratio])
        tail_kv[:ratio] = kv_windows[-1].detach()
        tail_gate[:ratio] = gate_windows[-1].detach()
    elif overlap:
        entries = kv.new_empty((0, width // 2))
    else:
        entries = (gate_windows.softmax(dim=1) * kv_windows).sum(dim=1)
    left = kv.shape[0] - full
    tail_kv[current : current + left] = kv[full:].detach()
    tail_gate[current : current + left] = gate[full:].detach()
    return entries


def _pool_overlapping(kv: Tensor, gate: Tensor, last_kv: Tensor, last_gate: Tensor) -> Tensor:
    """CSA: the previous window's series Ca (first half of the channels) and this window's Cb."""
    half = kv.shape[-1] // 2
    before_kv = torch.cat((last_kv[None], kv[:-1]))[..., :half]
    before_gate = torch.cat((last_gate[None], gate[:-1]))[..., :half]
    slots_kv = torch.cat((before_kv, kv[..., half:]), dim=1)  # [windows, 2 ratio, half]
    slots_gate = torch.cat((before_gate, gate[..., half:]), dim=1)
    return (slots_gate.softmax(dim=1) * slots_kv).sum(dim=1)
