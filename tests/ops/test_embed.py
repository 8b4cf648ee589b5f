"""The embed room: every stream starts as the token's row."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv4.ops.embed import embed_streams


@pytest.mark.parametrize("tokens", [0, 1, 7])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_stream_is_the_row(
    tokens: int,
    stored: torch.dtype,
    dtype: torch.dtype,
    rng: np.random.Generator,
    normal: Callable[..., Tensor],
) -> None:
    table, ids = normal(11, 5).to(stored), rng.integers(0, 11, tokens)
    x = embed_streams(torch.from_numpy(ids), table, num_streams=3, dtype=dtype)
    assert x.shape == (tokens, 3, 5) and x.dtype == dtype
    for token, row in zip(ids, x, strict=True):
        for stream in row:
            assert stream.tolist() == table[token].to(dtype).tolist()


def test_streams_share_no_memory() -> None:
    table = torch.ones(4, 2)
    x = embed_streams(torch.tensor([3]), table, num_streams=2, dtype=torch.float32)
    x[0, 0] = 7
    assert x[0, 1].tolist() == [1, 1] and table[3].tolist() == [1, 1]
