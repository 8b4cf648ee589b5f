"""The lightning indexer in plain torch: scores in fp32, exact top-k."""

import torch
from torch import Tensor

from dsv4.ops.formats import decode_rows

BLOCK_ELEMENTS = 1 << 24


def index_scores(q: Tensor, keys: Tensor, weights: Tensor, visible: Tensor) -> Tensor:
    tokens, heads, _ = q.shape
    if tokens == 0:
        return q.new_empty((0, keys.shape[0]), dtype=torch.float32)
    keys = decode_rows(keys).float()
    entries = torch.arange(keys.shape[0], device=q.device)
    blocks = []
    for part in _blocks(tokens, heads * keys.shape[0]):
        dots = torch.relu(q[part].float() @ keys.T)  # [t, H, C]
        scores = torch.einsum("th,thc->tc", weights[part], dots)
        blocks.append(scores.masked_fill(entries >= visible[part, None], -torch.inf))
    return torch.cat(blocks)


def select_topk(scores: Tensor, visible: Tensor, *, top_k: int) -> Tensor:
    entries = torch.arange(scores.shape[1], device=scores.device)
    hidden = entries >= visible[:, None]
    masked = scores.masked_fill(hidden, -torch.inf)
    # A stable sort breaks ties by the lowest index, which torch.topk does not promise.
    chosen = masked.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    behind = scores.shape[1]  # an index that sorts behind all entries
    chosen = chosen.masked_fill(hidden.gather(1, chosen), behind).sort(dim=-1).values
    return chosen.masked_fill(chosen == behind, -1).int()


def choose_entries(q: Tensor, keys: Tensor, weights: Tensor, visible: Tensor, *, top_k: int) -> Tensor:
    tokens, heads, _ = q.shape
    width = min(top_k, keys.shape[0])
    if tokens:
        keys = keys[: int(visible.max())]  # a table may be far longer
    chosen = [torch.empty((0, width), dtype=torch.int32, device=q.device)]
    for part in _blocks(tokens, heads * keys.shape[0]):
        scores = index_scores(q[part], keys, weights[part], visible[part])
        found = select_topk(scores, visible[part], top_k=top_k)
        chosen.append(torch.nn.functional.pad(found, (0, width - found.shape[1]), value=-1))
    return torch.cat(chosen)


def _blocks(tokens: int, cost: int) -> list[slice]:
    """Slices of the tokens, each of which costs ``cost`` elements."""
    rows = max(1, BLOCK_ELEMENTS // max(1, cost))
    return [slice(first, min(first + rows, tokens)) for first in range(0, tokens, rows)]
