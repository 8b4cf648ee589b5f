"""The embed kernel against its reference, bit by bit."""

import math
from collections.abc import Callable

import pytest
import torch
from numeric import assert_bits, assert_reproducible, dirty_memory
from shapes import MODELS, TOKENS, Sizes
from torch import Tensor

from dsv4.ops.embed import embed_streams, reference

FLOATS = (torch.bfloat16, torch.float32)


def check(ids: Tensor, table: Tensor, num_streams: int, case: str) -> None:
    for dtype in FLOATS:
        dirty_memory()
        x = embed_streams(ids, table, num_streams=num_streams, dtype=dtype)
        want = reference.embed_streams(ids, table, num_streams=num_streams, dtype=dtype)
        assert_bits(x, want, f"{case}, {table.dtype} to {dtype}")


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("sizes", MODELS, ids=lambda sizes: sizes.name)
def test_embed_streams(sizes: Sizes, tokens: int, cuda_normal: Callable[..., Tensor]) -> None:
    table = cuda_normal(1000, sizes.hidden)
    ids = cuda_normal(tokens).view(torch.int32).long() % 1000
    for stored in FLOATS:
        check(ids, table.to(stored), sizes.streams, f"{sizes.name}, {tokens} tokens")


def test_rows_far_into_the_table(cuda_normal: Callable[..., Tensor]) -> None:
    """A table of more than 2^31 values."""
    table = torch.zeros(129280, 16640, dtype=torch.bfloat16, device="cuda")
    table[-1] = cuda_normal(16640)
    check(torch.tensor([129279, 0], device="cuda"), table, 4, "the last row")


@pytest.mark.parametrize("width", [1, 5, 12, 24, 4104, 20000])
@pytest.mark.parametrize("num_streams", [1, 3])
def test_odd_sizes(width: int, num_streams: int, cuda_normal: Callable[..., Tensor]) -> None:
    ids = torch.tensor([3, 0, 10, 3], device="cuda")
    for stored in FLOATS:
        check(ids, cuda_normal(11, width).to(stored), num_streams, f"{num_streams} streams of {width}")


def test_rows_that_no_vector_fits(cuda_normal: Callable[..., Tensor]) -> None:
    """A contiguous table that begins between two multiples of 16 bytes."""
    for stored in FLOATS:
        table = cuda_normal(1 + 11 * 64).to(stored)[1:].view(11, 64)
        check(torch.tensor([0, 10], device="cuda"), table, 4, "a table out of line")


def test_special_values() -> None:
    values = [math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-40, 3.3e38]
    for dtype in FLOATS:
        table = torch.tensor([values], device="cuda").to(dtype)
        x = embed_streams(torch.zeros(2, dtype=torch.int64, device="cuda"), table, num_streams=4, dtype=dtype)
        assert_bits(x, table.expand(2, 4, 8).contiguous(), f"{dtype}")


def test_reproducible(cuda_normal: Callable[..., Tensor]) -> None:
    ids, table = torch.arange(8, device="cuda"), cuda_normal(9, 4096).bfloat16()
    assert_reproducible(
        lambda: embed_streams(ids, table, num_streams=4, dtype=torch.bfloat16), "eight tokens"
    )


def test_what_it_cannot_take(cuda_normal: Callable[..., Tensor]) -> None:
    ids, table = torch.arange(4, device="cuda"), cuda_normal(8, 8)
    for bad_ids, bad_table, words in (
        (ids, table.T, "contiguous"),
        (ids[::2], table, "contiguous"),
        (ids.int(), table, "int32"),
        (ids, table.half(), "float16"),
    ):
        with pytest.raises(AssertionError, match=words):
            embed_streams(bad_ids, bad_table, num_streams=4, dtype=torch.float32)
    with pytest.raises(AssertionError, match="dtype: expected"):
        embed_streams(ids, table, num_streams=4, dtype=torch.float16)
