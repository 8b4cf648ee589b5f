"""The kernels of rows against their references bit by bit, and against the roundings that records hold."""

import math
from collections.abc import Callable

import pytest
import torch
from numeric import assert_bits, assert_reproducible, dirty_memory, poison, without_allocator
from shapes import TOKENS
from torch import Tensor

from dsv4.ops.formats import INDEX_CODES, INDEX_RECORD, KV_CODES, KV_RECORD, KV_ROPE, decode_rows
from dsv4.ops.quant import round_index, round_kv
from dsv4.ops.rows import load_rows, reference, store_rows

Normal = Callable[..., Tensor]
KV, INDEX = KV_CODES + KV_ROPE, INDEX_CODES
RECORDS = pytest.mark.parametrize(("width", "record"), [(KV, KV_RECORD), (INDEX, INDEX_RECORD)])


def values(normal: Normal, rows: int, width: int) -> Tensor:
    """Rows and blocks of very different magnitude, zeros of both signs, scales at their floor and steps."""
    x = normal(rows, width) * torch.exp2(4 * normal(rows, 1))
    x = x * torch.exp2(3 * normal(rows, width // 32)).repeat_interleave(32, dim=-1)
    x.flatten()[::37] = -0.0
    x[1::5, :96] = 0
    x[2::5] = 1e-7 * x[2::5]
    x[3::5] = -torch.exp2(torch.arange(width, device="cuda") % 20 - 12.0)
    x[4::5] = (x[4::5] * 8).round()  # ties
    x = x.bfloat16()
    if width == KV:
        x[-1:, -KV_ROPE:] = math.nan  # what turns is copied, whatever it is
    return x


def slots_of(tokens: int, rows: int, seed: int) -> Tensor:
    """Different rows of the table, some counted around it once or twice, a third none; [tokens] i64."""
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randperm(rows, generator=generator)[:tokens]
    slots = slots + rows * torch.randint(3, (tokens,), generator=generator)
    return torch.where(torch.rand(tokens, generator=generator) < 0.3, -1, slots).cuda()


def assert_table(found: Tensor, want: Tensor, case: str) -> None:
    wrong = (found.view(torch.uint8) != want.view(torch.uint8)).nonzero()
    assert not wrong.numel(), f"{case}: {len(wrong)} bytes differ, the first (row, byte): {wrong[0].tolist()}"


@RECORDS
@pytest.mark.parametrize("tokens", TOKENS)
def test_store_records(width: int, record: int, tokens: int, cuda_normal: Normal) -> None:
    x, rows = values(cuda_normal, tokens, width), tokens + 37
    table = torch.empty((rows, record), dtype=torch.uint8, device="cuda")
    poison(table)
    want, slots = table.clone(), slots_of(tokens, rows, tokens)
    store_rows(x, table, slots)
    reference.store_rows(x, want, slots)
    assert_table(table, want, f"{width} {tokens=}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("width", [8, 40, INDEX, KV, 2056])
def test_store_plain_rows(width: int, dtype: torch.dtype, cuda_normal: Normal) -> None:
    for tokens in (0, 1, 8, 137):
        x, table = cuda_normal(tokens, width).to(dtype), cuda_normal(tokens + 5, width).to(dtype)
        want, slots = table.clone(), slots_of(tokens, tokens + 5, tokens)
        store_rows(x, table, slots)
        reference.store_rows(x, want, slots)
        assert_table(table, want, f"{width} {dtype} {tokens=}")


@RECORDS
def test_records_are_the_rounded_rows(width: int, record: int, cuda_normal: Normal) -> None:
    x = values(cuda_normal, 4001, width)
    table = torch.zeros((4001, record), dtype=torch.uint8, device="cuda")
    store_rows(x, table, torch.arange(4001, device="cuda"))
    rounded = round_kv(x, rope_dim=KV_ROPE) if width == KV else round_index(x)
    assert_bits(decode_rows(table), rounded, f"{width}")
    if width == KV:  # a chunk stores what it has rounded: the same values again
        store_rows(rounded, table, torch.arange(4001, device="cuda"))
        assert_bits(decode_rows(table), rounded, "rounded twice")


@pytest.mark.parametrize("count", TOKENS)
def test_load_rows(count: int, cuda_normal: Normal) -> None:
    """Rows behind ``count`` may hold anything."""
    table = torch.empty((count + 3, KV_RECORD), dtype=torch.uint8, device="cuda")
    poison(table)
    if count:
        x = values(cuda_normal, count, KV)
        reference.store_rows(x, table, torch.arange(count, device="cuda"))
    dirty_memory()
    assert_bits(load_rows(table, count), reference.load_rows(table, count), f"{count=}")


def test_a_graph_stores_where_the_slots_say(cuda_normal: Normal) -> None:
    """Slots are read when the graph runs, and all of 8 rows have the bits of one stored alone."""
    for width, record in ((KV, KV_RECORD), (INDEX, INDEX_RECORD), (40, None)):
        x = values(cuda_normal, 8, width) if record else cuda_normal(8, width).bfloat16()
        dtype = torch.uint8 if record else torch.bfloat16
        table = torch.zeros((30, record or width), dtype=dtype, device="cuda")

        def call(x: Tensor = x, table: Tensor = table) -> Tensor:
            new = table.clone()
            store_rows(x, new, torch.arange(3, 11, device="cuda"))
            return new

        assert_reproducible(call, f"{width}")
        if without_allocator():
            continue  # a graph needs it
        slots = torch.arange(8, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            store_rows(x, table, slots)
        slots.copy_(torch.tensor([40, -1, 12, 13, 14, -1, 16, 17]))
        table.zero_()
        graph.replay()
        want = torch.zeros_like(table)
        for t, slot in enumerate((40, -1, 12, 13, 14, -1, 16, 17)):
            store_rows(x[t : t + 1].contiguous(), want, torch.tensor([slot], device="cuda"))
        assert_table(table, want, f"{width}: replayed")


def test_what_it_cannot_take(cuda_normal: Normal) -> None:
    x = cuda_normal(4, KV).bfloat16()
    table = torch.zeros((6, KV_RECORD), dtype=torch.uint8, device="cuda")
    slots = torch.arange(4, device="cuda")
    for call, words in (
        (lambda: store_rows(x.float(), table, slots), "x: expected torch.bfloat16"),
        (lambda: store_rows(x[:, :INDEX].contiguous(), table, slots), "x: expected shape"),
        (lambda: store_rows(x, table[:, :500].contiguous(), slots), "\\[592, 68\\] bytes a row"),
        (lambda: store_rows(x, table, slots.int()), "slots: expected torch.int64"),
        (lambda: store_rows(x, table, slots[:3]), "slots: expected shape"),
        (lambda: store_rows(x, x.float(), slots), "x: expected torch.float32"),
        (lambda: store_rows(x[:, :12].contiguous(), x[:, :12].contiguous(), slots), "a multiple of 8"),
        (lambda: store_rows(x, table[:0], slots), "found \\[0, 592\\]"),
        (lambda: load_rows(table, 7), "count: expected 0 to 6 rows, found 7"),
        (lambda: load_rows(x, 1), "table: expected"),
    ):
        with pytest.raises(AssertionError, match=words):
            call()
