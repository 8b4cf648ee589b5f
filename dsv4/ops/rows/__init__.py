"""Rows of the cache: stored in the format of their table (ops/formats.py); records loaded as plain rows."""

import torch
from torch import Tensor

from dsv4 import _C
from dsv4.ops.checks import FLOATS, Shapes
from dsv4.ops.dispatch import op
from dsv4.ops.formats import INDEX_CODES, INDEX_RECORD, KV_CODES, KV_RECORD, KV_ROPE
from dsv4.ops.rows import reference


@op(reference.store_rows, kernel=True)
def store_rows(x: Tensor, table: Tensor, slots: Tensor) -> None:
    """Store row t of x in row slots[t] mod N of a table of N rows, in place; a negative slot: nowhere.

    x [T, W], bf16 or f32; slots [T] i64, read on the device, no two of one row. table [N, W] of x's dtype
    takes rows as they are: they have been rounded. A KV record, [N, 592] u8 for x [T, 512] bf16, rounds as
    ``round_kv``; an index record, [N, 68] u8 for x [T, 128] bf16, rotates and rounds as ``round_index``.
    Source: docs/model.md 2.13, 3.
    """
    width = _record_width(table) if table.dtype == torch.uint8 else table.shape[1]
    shapes = Shapes(W=width)
    shapes.check("x", x, "T W", torch.bfloat16 if table.dtype == torch.uint8 else table.dtype)
    shapes.check("table", table, "N R", (*FLOATS, torch.uint8))
    shapes.check("slots", slots, "T", torch.int64)
    found = list(table.shape)
    assert width % 8 == 0 and shapes["N"], f"table: expected rows of a multiple of 8, found {found}"
    if shapes["T"]:
        _C.store_rows(x, table, slots, shapes["T"], width, shapes["N"], shapes["R"])


@op(reference.load_rows, kernel=True)
def load_rows(table: Tensor, count: int) -> Tensor:
    """The values of a table's first ``count`` KV records: table [N, 592] u8 -> [count, 512] bf16, exact.

    Source: docs/model.md 2.13, 3.
    """
    shapes = Shapes()
    shapes.check("table", table, f"N {KV_RECORD}", torch.uint8)
    assert 0 <= count <= shapes["N"], f"count: expected 0 to {shapes['N']} rows, found {count}"
    out = table.new_empty((count, KV_CODES + KV_ROPE), dtype=torch.bfloat16)
    if count:
        _C.load_rows(table, out, count)
    return out


def _record_width(table: Tensor) -> int:
    """Values of a row of records."""
    widths = {KV_RECORD: KV_CODES + KV_ROPE, INDEX_RECORD: INDEX_CODES}
    assert table.shape[1] in widths, f"table: expected {list(widths)} bytes a row, found {list(table.shape)}"
    return widths[table.shape[1]]
