"""Manifold-constrained hyper-connections: how M residual streams feed a sublayer and take its output.

The kernels take M = 4 streams and a hidden size D that is a multiple of 8 and at most 8192.
"""

import torch
from torch import Tensor

from dsv4 import _C
from dsv4.ops.checks import FLOATS, Shapes
from dsv4.ops.dispatch import op
from dsv4.ops.mhc import reference

STREAMS, MAX_HIDDEN = 4, 8192
FEW_TOKENS = 8  # up to which one kernel needs no scratch
# For more: tokens of a launch and columns of a block, at most; csrc/mhc/mhc_prefill.cu refuses more.
AT_ONCE, BLOCK_COLUMNS = 8192, 128


@op(reference.sinkhorn_normalize, kernel=True)
def sinkhorn_normalize(logits: Tensor, *, iterations: int, eps: float) -> Tensor:
    """A nearly doubly stochastic matrix from logits [..., M, M] f32 -> same shape.

    Row softmax + eps, then columns; then ``iterations`` - 1 times rows, columns; eps in every divisor.
    Source: docs/model.md 2.3; paper section 2.2.
    """
    Shapes().check("logits", logits, "... 4 4", torch.float32)
    out = torch.empty_like(logits)
    if logits.numel():
        _C.sinkhorn_normalize(logits, out, logits.numel() // 16, iterations, eps)
    return out


@op(reference.mhc_pre, kernel=True)
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
    tokens, hidden = _check_streams(x, fn, base, scale, rows="24", scales="3")
    u, post, comb = _outputs(x)
    if tokens:
        sizes = (tokens, hidden, *_blocks(x))
        _C.mhc_pre(x, fn, base, scale, u, post, comb, _scratch(x), *sizes, iterations, eps, norm_eps)
    return u, post, comb


@op(reference.mhc_post, kernel=True)
def mhc_post(y: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """X'[k] = post[k] y + sum_j comb[j, k] X[j] in fp32, one rounding.

    y [T, D], x [T, M, D], post [T, M] f32, comb [T, M, M] f32 -> [T, M, D] in x's dtype.
    Source: docs/model.md 2.4.
    """
    tokens, hidden = _check_post(y, x, post, comb)
    out = torch.empty_like(x)
    if tokens:
        _C.mhc_post(y, x, post, comb, out, tokens, hidden)
    return out


@op(reference.mhc_boundary, kernel=True)
def mhc_boundary(
    y: Tensor,
    x: Tensor,
    post: Tensor,
    comb: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    norm: Tensor,
    *,
    iterations: int,
    eps: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From one sublayer's output to the next one's input: ``mhc_post``, ``mhc_pre`` and the RMS norm of u.

    y [T, D], x [T, M, D], post [T, M], comb [T, M, M]: what the sublayer that ends returns; fn, base, scale
    and norm [D] f32: of the one that begins -> x [T, M, D], normalised u [T, D], post, comb; roundings as in
    the three operations. Source: docs/model.md 2.2 to 2.4.
    """
    tokens, hidden = _check_post(y, x, post, comb)
    shapes = Shapes(D=hidden)
    shapes.check("norm", norm, "D", torch.float32)
    _check_streams(x, fn, base, scale, rows="24", scales="3")
    x_out, (u, post_out, comb_out) = torch.empty_like(x), _outputs(x)
    if tokens:
        tensors = (y, x, post, comb, fn, base, scale, norm, x_out, u, post_out, comb_out, _scratch(x))
        _C.mhc_boundary(*tensors, tokens, hidden, *_blocks(x), iterations, eps, norm_eps)
    return x_out, u, post_out, comb_out


@op(reference.mhc_head, kernel=True)
def mhc_head(x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, eps: float, norm_eps: float) -> Tensor:
    """The learned collapse of the streams before the final norm: x [T, M, D] -> [T, D] in x's dtype.

    fn [M, M D], base [M], scale [1], all f32. Source: docs/model.md 2.5.
    """
    tokens, hidden = _check_streams(x, fn, base, scale, rows="4", scales="1")
    u = torch.empty_like(x[:, 0])
    if tokens:
        _C.mhc_head(x, fn, base, scale, u, _scratch(x), tokens, hidden, *_blocks(x), eps, norm_eps)
    return u


def _check_streams(
    x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, rows: str, scales: str
) -> tuple[int, int]:
    """T and D of what every pre or head takes."""
    shapes = Shapes()
    shapes.check("x", x, "T 4 D", FLOATS)
    hidden = shapes["D"]
    assert hidden % 8 == 0 and hidden <= MAX_HIDDEN, (
        f"x: expected D a multiple of 8, at most {MAX_HIDDEN}, found {hidden}"
    )
    shapes.check("fn", fn, f"{rows} {STREAMS * hidden}", torch.float32)
    shapes.check("base", base, rows, torch.float32)
    shapes.check("scale", scale, scales, torch.float32)
    return shapes["T"], hidden


def _check_post(y: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> tuple[int, int]:
    """T and D of what every post takes."""
    shapes = Shapes()
    shapes.check("x", x, "T 4 D", FLOATS)
    shapes.check("y", y, "T D", x.dtype)
    shapes.check("post", post, "T 4", torch.float32)
    shapes.check("comb", comb, "T 4 4", torch.float32)
    assert shapes["D"] % 8 == 0, f"x: expected D a multiple of 8, found {shapes['D']}"
    return shapes["T"], shapes["D"]


def _outputs(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """u, post and comb for streams x [T, M, D]."""
    tokens, streams, hidden = x.shape
    post = torch.empty((tokens, streams), dtype=torch.float32, device=x.device)
    comb = torch.empty((tokens, streams, streams), dtype=torch.float32, device=x.device)
    return torch.empty((tokens, hidden), dtype=x.dtype, device=x.device), post, comb


def _blocks(x: Tensor) -> tuple[int, int]:
    """Of the kernel for many tokens: how many a launch takes, and how many blocks share a token's columns."""
    tokens, _, hidden = x.shape
    splits = 1 << (-(-hidden // BLOCK_COLUMNS) - 1).bit_length()  # a power of two
    return min(tokens, AT_ONCE), splits


def _scratch(x: Tensor) -> Tensor | None:
    """Room for those blocks' sums, [tokens, splits, 25] f32; None for the kernel of few tokens and f32."""
    if x.shape[0] <= FEW_TOKENS or x.dtype == torch.float32:
        return None
    return torch.empty((*_blocks(x), 25), dtype=torch.float32, device=x.device)
