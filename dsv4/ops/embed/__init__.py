"""Token embedding into the residual streams."""

import torch
from torch import Tensor

from dsv4.ops.dispatch import op
from dsv4.ops.embed import reference


@op(reference.embed_streams)
def embed_streams(token_ids: Tensor, table: Tensor, *, num_streams: int, dtype: torch.dtype) -> Tensor:
    """Every stream starts as a copy of the token's embedding row.

    token_ids [T] i64, table [V, D] bf16/f32 -> [T, M, D] dtype. Source: docs/model.md 2.1.
    """
