"""Token embedding into the residual streams."""

import torch
from torch import Tensor

from dsv4 import _C
from dsv4.ops.checks import FLOATS, Shapes
from dsv4.ops.dispatch import op
from dsv4.ops.embed import reference


@op(reference.embed_streams, kernel=True)
def embed_streams(token_ids: Tensor, table: Tensor, *, num_streams: int, dtype: torch.dtype) -> Tensor:
    """Every stream starts as a copy of the token's embedding row.

    token_ids [T] i64 of rows that exist, table [V, D] bf16/f32 -> [T, M, D] dtype. Source: docs/model.md 2.1.
    """
    shapes = Shapes()
    shapes.check("token_ids", token_ids, "T", torch.int64)
    shapes.check("table", table, "V D", FLOATS)
    assert dtype in FLOATS, f"dtype: expected bfloat16 or float32, found {dtype}"
    tokens, width = shapes["T"], shapes["D"]
    out = torch.empty(tokens, num_streams, width, dtype=dtype, device=table.device)
    if out.numel():
        _C.embed_streams(token_ids, table, out, tokens, width, num_streams)
    return out
