"""The lightning indexer: which compressed entries a query of a CSA layer attends to."""

from torch import Tensor

from dsv4.ops.dispatch import op
from dsv4.ops.indexer import launch, reference


@op(reference.index_scores, kernel=True)
def index_scores(q: Tensor, keys: Tensor, weights: Tensor, visible: Tensor) -> Tensor:
    """score[t, j] = sum_h weights[t, h] relu(q[t, h] . keys[j]) in fp32, of the entries j < visible[t] alone.

    q [T, Hi, Di], bf16 or f32; keys [C, Di] of q's dtype, or index records [C, 68] u8 (ops/formats.py), which
    q meets rotated by the Hadamard transform and rounded to FP4; weights [T, Hi] f32, scaled by (Di Hi)^-0.5,
    may be negative; visible [T] i64, 0 to C -> [T, C] f32. What stands at other entries is undefined (in the
    reference -inf), and so are their keys. On CUDA Di is 128, and bf16 queries have up to 128 heads.
    Source: docs/model.md 2.10, 2.11; paper 2.3.1.
    """
    return launch.score(q, keys, weights, visible)


@op(reference.select_topk, kernel=True)
def select_topk(scores: Tensor, visible: Tensor, *, top_k: int) -> Tensor:
    """The ``top_k`` best visible entries of each row, ties by lowest index, in ascending order of index.

    scores [T, C] f32, visible [T] i64 (entries j < visible[t] may be chosen; other scores do not matter, be
    they NaN) -> [T, min(top_k, C)] i32, -1s at the end where fewer are visible. -0.0 equals 0.0; NaN
    is above all.
    Source: docs/model.md 2.10, 2.11.
    """
    return launch.select(scores, visible, top_k=top_k)


@op(reference.choose_entries, kernel=True)
def choose_entries(q: Tensor, keys: Tensor, weights: Tensor, visible: Tensor, *, top_k: int) -> Tensor:
    """``select_topk`` of ``index_scores``, in blocks of queries whose scores take at most 256 MB.

    q [T, Hi, Di], keys [C, Di or 68], weights [T, Hi] f32, visible [T] i64 -> [T, min(top_k, C)] i32. Where
    no more than ``top_k`` entries are visible, these are the choice, and scores are not needed. Capturable in
    a CUDA graph. Row t has the bits that a call with this query alone gives, for T <= ``MAX_STEP``.
    Source: docs/model.md 2.10, 2.11.
    """
    return launch.choose(q, keys, weights, visible, top_k=top_k)
