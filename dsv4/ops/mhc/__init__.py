"""Manifold-constrained hyper-connections: how M residual streams feed a sublayer and take its output."""

from torch import Tensor

from dsv4.ops.dispatch import op
from dsv4.ops.mhc import reference


@op(reference.sinkhorn_normalize)
def sinkhorn_normalize(logits: Tensor, *, iterations: int, eps: float) -> Tensor:
    """A nearly doubly stochastic matrix from logits [..., M, M] f32 -> same shape.

    Row softmax + eps, then columns; then ``iterations`` - 1 times rows, columns; eps in every divisor.
    Source: docs/model.md 2.3; paper section 2.2.
    """


@op(reference.mhc_pre)
def mhc_pre(
    x: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    *,
    iterations: int,
    eps: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sublayer's input and the weights with which its output returns to the streams.

    x [T, M, D]; fn [(2 + M) M, M D], base [(2 + M) M], scale [3], all f32 -> u [T, D] in x's dtype,
    post [T, M] f32, comb [T, M, M] f32 (row: source stream, column: destination). Source: docs/model.md 2.3.
    """


@op(reference.mhc_post)
def mhc_post(y: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """X'[k] = post[k] y + sum_j comb[j, k] X[j] in fp32, one rounding.

    y [T, D], x [T, M, D], post [T, M] f32, comb [T, M, M] f32 -> [T, M, D] in x's dtype.
    Source: docs/model.md 2.4.
    """


@op(reference.mhc_head)
def mhc_head(x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, eps: float, norm_eps: float) -> Tensor:
    """The learned collapse of the streams before the final norm: x [T, M, D] -> [T, D] in x's dtype.

    fn [M, M D], base [M], scale [1], all f32. Source: docs/model.md 2.5.
    """
