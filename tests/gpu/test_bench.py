"""The benchmarks' own kernel reads every value once; a case measured on the GPU gives a sensible row."""

import pytest
import torch

from bench.cases import all_cases
from bench.harness import measure
from dsv4 import _C


@pytest.mark.parametrize("vectors", [1, 255, 1024, 1025, 2 * 1056 * 1024 + 7])
@pytest.mark.parametrize("blocks", [1, 3, 1056])
def test_read_stream(vectors: int, blocks: int) -> None:
    """Small integers, so that sums of any order are exact."""
    x = torch.randint(-8, 9, (4 * vectors,), device="cuda").float()
    sums = torch.full((blocks,), torch.nan, device="cuda")
    _C.read_stream(x, sums, vectors, blocks)
    assert sums.double().sum().item() == x.double().sum().item()


def test_one_row() -> None:
    """A chunk of 8192 rows in bf16 moves 134 MB: between the fastest memory there is and a tenth of it."""
    (case,) = [case for case in all_cases() if case.name == "norm: rms_norm, Flash, 8192 tokens"]
    row = measure(case, stream_gbs=4000.0)
    assert row["bytes"] == 2 * 8192 * 4096 * 2 + 4 * 4096 and row["sets"] in (3, 4, 5, 6)
    assert 10 < row["us"] < 400, row
