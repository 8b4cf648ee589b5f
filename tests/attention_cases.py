"""What the GPU tests of attention's steps and chunks share."""

from collections.abc import Callable

import torch
from torch import Tensor

Normal = Callable[..., Tensor]
WINDOW = 128
UNUSED = 7  # compressed rows behind those that any query sees
# The size of values, for which the absolute limit of assert_attention is made: roundings of P stay below it.
# Scores are standard normal. Of larger values tests ask that the result grows with them, bit for bit.
VALUES = 1 / 8


def choose(visible: Tensor, entries: int, top_k: int, normal: Normal) -> Tensor:
    """As many random entries of those visible as there may be, [T, top_k] i32, ascending, -1s behind."""
    scores = normal(visible.shape[0], entries)
    hidden = torch.arange(entries, device="cuda") >= visible[:, None]
    order = scores.masked_fill(hidden, -torch.inf).argsort(dim=-1, descending=True)[:, :top_k]
    order = order.masked_fill(hidden.gather(1, order), entries).sort(dim=-1).values
    chosen = torch.full((visible.shape[0], top_k), -1, dtype=torch.int32, device="cuda")
    chosen[:, : order.shape[1]] = order.masked_fill(order == entries, -1)
    return chosen
