"""Token embedding into the residual streams, in plain torch."""

import torch
from torch import Tensor


def embed_streams(token_ids: Tensor, table: Tensor, *, num_streams: int, dtype: torch.dtype) -> Tensor:
    rows = table[token_ids].to(dtype)  # [T, D]
    return rows.unsqueeze(1).expand(-1, num_streams, -1).contiguous()  # [T, M, D]
