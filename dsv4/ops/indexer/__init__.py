"""The lightning indexer: which compressed entries a query of a CSA layer attends to."""

from torch import Tensor

from dsv4.ops.dispatch import op
from dsv4.ops.indexer import reference


@op(reference.index_scores)
def index_scores(q: Tensor, keys: Tensor, weights: Tensor) -> Tensor:
    """score[t, j] = sum_h weights[t, h] relu(q[t, h] . keys[j]) in fp32.

    q [T, Hi, Di], keys [C, Di], weights [T, Hi] f32 (scaled by (Di Hi)^-0.5; may be negative) -> [T, C] f32.
    Source: docs/model.md 2.11; paper 2.3.1.
    """


@op(reference.select_topk)
def select_topk(scores: Tensor, visible: Tensor, *, top_k: int) -> Tensor:
    """The ``top_k`` best visible entries of each row, ties by lowest index, -1 where there are fewer.

    scores [T, C] f32, visible [T] i64 (entries j < visible[t] may be chosen) -> [T, min(top_k, C)] i64.
    Source: docs/model.md 2.10, 2.11.
    """
