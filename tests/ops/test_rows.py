"""The rows room byte by byte: records encoded number by number, and tables written at any slots."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dsv4.ops.formats import E2M1_VALUES, INDEX_RECORD, KV_RECORD, decode_rows
from dsv4.ops.quant import round_index, round_kv
from dsv4.ops.rows import load_rows, store_rows

SLOTS = [3, -1, 0, 7, -1, 5]


def e8m0(most: float, floor: float, largest: float) -> int:
    """The byte of the scale 2^ceil(log2(max(most, floor) / largest))."""
    mantissa, exponent = math.frexp(max(most, floor) / largest)
    return 127 + exponent - (mantissa == 0.5)


def expected_kv(row: Tensor) -> list[int]:
    """592 bytes of a row of 512, code by code."""
    codes: list[int] = []
    scales = []
    for block in row[:448].view(7, 64):
        scales.append(e8m0(block.abs().max().item(), 1e-4, 448.0))
        scaled = block.double() / 2.0 ** (scales[-1] - 127)
        codes += scaled.float().to(torch.float8_e4m3fn).view(torch.uint8).tolist()
    return codes + row[448:].contiguous().view(torch.uint8).tolist() + scales + [0] * 9


def expected_index(row: Tensor) -> list[int]:
    """68 bytes of a row of 128: the transform by its definition, then the nearest of the 16 values."""
    signs = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(128)] for i in range(128)])
    turned = ((signs.double() @ row.double()) * 128**-0.5).bfloat16().double()
    codes, scales = [], []
    for block in turned.view(4, 32):
        scales.append(e8m0(block.abs().max().item(), 6 * 2.0**-126, 6.0))
        for value in (block / 2.0 ** (scales[-1] - 127)).tolist():
            distance = [(abs(abs(value) - E2M1_VALUES[code]), code & 1, code) for code in range(8)]
            codes.append(min(distance)[2] | (8 if math.copysign(1, value) < 0 else 0))
    return [low | high << 4 for low, high in zip(codes[::2], codes[1::2], strict=True)] + scales


def magnitudes(rows: int, width: int, normal: Callable[..., Tensor]) -> Tensor:
    """Rows whose blocks of 32 differ by many powers of two; the first row is 0 but for one value."""
    x = normal(rows, width) * 2.0 ** (6 * normal(rows, width // 32)).round().repeat_interleave(32, 1)
    x[0] = 0
    x[0, 5] = 448.0
    return x.bfloat16()


@pytest.mark.parametrize(("width", "record"), [(512, KV_RECORD), (128, INDEX_RECORD)])
def test_records(width: int, record: int, normal: Callable[..., Tensor]) -> None:
    """Byte by byte at their slots; all other bytes stay. They stand for what rounding alone gives."""
    x = magnitudes(len(SLOTS), width, normal)
    table = torch.full((8, record), 77, dtype=torch.uint8)
    want = table.clone()
    for row, slot in zip(x, SLOTS, strict=True):
        if slot >= 0:
            encoded = expected_kv(row) if width == 512 else expected_index(row)
            want[slot] = torch.tensor(encoded, dtype=torch.uint8)
    store_rows(x, table, torch.tensor(SLOTS))
    different = (table != want).nonzero().tolist()
    assert not different, f"{len(different)} bytes differ, the first (row, byte): {different[0]}"
    rounded = round_kv(x, rope_dim=64) if width == 512 else round_index(x)
    for values, slot in zip(rounded, SLOTS, strict=True):
        assert slot < 0 or torch.equal(decode_rows(table)[slot], values)


def test_rounded_rows_are_stored_as_they_are(normal: Callable[..., Tensor]) -> None:
    """A chunk attends to rounded rows and stores the same: rounding twice changes no value."""
    rounded = round_kv(magnitudes(200, 512, normal), rope_dim=64)
    table = torch.zeros((200, KV_RECORD), dtype=torch.uint8)
    store_rows(rounded, table, torch.arange(200))
    assert torch.equal(decode_rows(table), rounded)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("slots", [[4, -1, 0], [-1, -1, 2], [-1, -1, -1], [23, 25, 30]])
def test_plain_rows(slots: list[int], dtype: torch.dtype, normal: Callable[..., Tensor]) -> None:
    """Slots count around the table; it may hold NaN."""
    x, table = normal(3, 16).to(dtype), normal(6, 16).to(dtype)
    table[0] = torch.nan
    want = table.clone()
    for row, slot in zip(x, slots, strict=True):
        if slot >= 0:
            want[slot % 6] = row
    store_rows(x, table, torch.tensor(slots))
    assert torch.equal(table.nan_to_num(9e9), want.nan_to_num(9e9))


def test_no_rows(normal: Callable[..., Tensor]) -> None:
    table = normal(4, 8)
    kept = table.clone()
    store_rows(normal(0, 8), table, torch.zeros(0, dtype=torch.int64))
    assert torch.equal(table, kept)


def test_load(normal: Callable[..., Tensor]) -> None:
    records, x = torch.zeros((5, KV_RECORD), dtype=torch.uint8), normal(5, 512).bfloat16()
    store_rows(x, records, torch.arange(5))
    for count in (0, 1, 4, 5):
        assert torch.equal(load_rows(records, count), round_kv(x, rope_dim=64)[:count])
