"""The lightning indexer in plain torch: scores in fp32, exact top-k."""

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 24


def index_scores(q: Tensor, keys: Tensor, weights: Tensor) -> Tensor:
    tokens, heads, _ = q.shape
    if tokens == 0:
        return q.new_empty((0, keys.shape[0]), dtype=torch.float32)
    rows = max(1, BLOCK_ELEMENTS // max(1, heads * keys.shape[0]))
    blocks = []
    for first in range(0, tokens, rows):
        part = slice(first, first + rows)
        dots = torch.relu(q[part].float() @ keys.float().T)  # [t, H, C]
        blocks.append(torch.einsum("th,thc->tc", weights[part], dots))
    return torch.cat(blocks)


def select_topk(scores: Tensor, visible: Tensor, *, top_k: int) -> Tensor:
    entries = torch.arange(scores.shape[1], device=scores.device)
    hidden = entries >= visible[:, None]
    masked = scores.masked_fill(hidden, -torch.inf)
    # A stable sort breaks ties by the lowest index, which torch.topk does not promise.
    chosen = masked.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    return chosen.masked_fill(hidden.gather(1, chosen), -1)
