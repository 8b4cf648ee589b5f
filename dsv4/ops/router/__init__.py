"""Choosing experts: by score (sqrt-softplus, top-k) or by token id."""

from torch import Tensor

from dsv4.ops.dispatch import op
from dsv4.ops.router import reference


@op(reference.topk_gate)
def topk_gate(logits: Tensor, bias: Tensor, *, top_k: int, scale: float) -> tuple[Tensor, Tensor]:
    """The ``top_k`` experts of each token by score + bias, and their weights.

    logits [T, E] f32, bias [E] f32 -> weights [T, K] f32, experts [T, K] i64 in descending order of
    score + bias, ties by lowest index. score = sqrt(softplus(logit)); the bias selects only; weights are
    the chosen scores divided by their sum, times ``scale``. Source: docs/model.md 2.14.
    """


@op(reference.hash_gate)
def hash_gate(logits: Tensor, token_ids: Tensor, tid2eid: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """The experts that the table fixes for each token id, and their weights.

    logits [T, E] f32, token_ids [T] i64, tid2eid [V, K] i64 -> weights [T, K] f32, experts [T, K] i64, in
    the table's order. Weights as in ``topk_gate``. Source: docs/model.md 2.14.
    """
