"""Cached rows in plain torch: encoding into a table's format, and back."""

import torch
from torch import Tensor

from dsv4.ops.formats import INDEX_RECORD, KV_BLOCK, KV_CODES, KV_RECORD, decode_rows
from dsv4.ops.quant.reference import quantize_fp8, quantize_mxfp4, rotate_hadamard


def store_rows(x: Tensor, table: Tensor, slots: Tensor) -> None:
    if slots.shape[0] == 0:
        return
    rows, kept = _encode(x, table), slots >= 0
    # No wait for the device: a row that is not kept repeats the store of one that is, or row 0 if none is.
    first = kept.int().argmax(dim=0, keepdim=True)
    places = torch.where(kept, slots, slots[first].clamp_min(0)) % table.shape[0]
    instead = torch.where(kept[first][:, None], rows[first], table[places[first]])
    table[places] = torch.where(kept[:, None], rows, instead)


def load_rows(table: Tensor, count: int) -> Tensor:
    return decode_rows(table[:count])


def _encode(x: Tensor, table: Tensor) -> Tensor:
    """x [T, W] as rows of ``table``."""
    if table.dtype != torch.uint8:
        return x
    if table.shape[1] == INDEX_RECORD:
        codes, scales = quantize_mxfp4(rotate_hadamard(x))
        return torch.cat((codes, scales.view(torch.uint8)), dim=1)
    codes, scales = quantize_fp8(x[:, :KV_CODES], block=KV_BLOCK)
    parts = (codes, x[:, KV_CODES:].contiguous(), scales)
    record = torch.cat([part.view(torch.uint8) for part in parts], dim=1)
    return torch.nn.functional.pad(record, (0, KV_RECORD - record.shape[1]))
