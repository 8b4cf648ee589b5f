"""Choosing experts: by score (sqrt-softplus, top-k) or by token id.

``route_topk`` and ``route_hash`` go from the router's input to weights and experts: for few tokens in one
launch, for many by ``gate_logits`` and then ``topk_gate`` or ``hash_gate``.
"""

import torch
from torch import Tensor

from dsv4 import _C
from dsv4.ops import gemm, quant
from dsv4.ops.checks import FLOATS, Shapes
from dsv4.ops.dispatch import op
from dsv4.ops.formats import Packed, Plain, Weight, is_nvfp4, packed_shape, shape_of
from dsv4.ops.router import reference

MAX_EXPERTS = 1024  # of the kernels
MANY_TOKENS = 16  # above, gate_logits is a matrix product
FUSED_TOKENS, FUSED_EXPERTS, FUSED_CHOICE = 8, 512, 32  # of one launch, at most


@op(reference.route_topk, kernel=True)
def route_topk(
    x: Tensor, weight: Weight, bias: Tensor, *, top_k: int, scale: float, activations: str = "bf16"
) -> tuple[Tensor, Tensor]:
    """``topk_gate`` of ``gate_logits``: the ``top_k`` experts of each token by score + bias, their weights.

    x [T, D] bf16/f32, weight (E, D), bias [E] f32 -> weights [T, K] f32, experts [T, K] i64. ``activations``
    is what NVFP4 weights are multiplied with, as in ``ops.gemm``. One launch takes up to 8 bf16 tokens, up to
    512 experts of bf16 or packed NVFP4 weights, and up to 32 chosen; a token's result is bitwise the same
    whatever stands beside it. Anything else takes the two operations named, with their conditions.
    Launches overlap with the one before, which must not write weight or bias; two must not run at the same
    time, on two streams. Source: docs/model.md 2.14.
    """
    if not _is_fused(x, weight, top_k):
        logits = gate_logits(x, weight, activations=activations)
        return topk_gate(logits, bias, top_k=top_k, scale=scale)
    shapes = _check_gate(x, weight)
    shapes.check("bias", bias, "E", torch.float32)
    tokens, experts, width = shapes["T"], shapes["E"], shapes["D"]
    assert 1 <= top_k <= experts, f"top_k: expected 1 to {experts} experts, found {top_k}"
    weights, chosen = _outputs(x, top_k)
    if tokens:
        gate = _operands(x, weight, activations)
        _C.route_topk(*gate, bias, weights, chosen, tokens, experts, width, top_k, scale)
    return weights, chosen


@op(reference.route_hash, kernel=True)
def route_hash(
    x: Tensor, weight: Weight, token_ids: Tensor, tid2eid: Tensor, *, scale: float, activations: str = "bf16"
) -> tuple[Tensor, Tensor]:
    """``hash_gate`` of ``gate_logits``: the experts that the table fixes for a token id, their weights.

    x [T, D] bf16/f32, weight (E, D), token_ids [T] i64, tid2eid [V, K] i64 -> weights [T, K] f32, experts
    [T, K] i64, in the table's order. What one launch takes, and the rest, as in ``route_topk``. Ids and
    experts exist: the kernel does not look. Source: docs/model.md 2.14.
    """
    if not _is_fused(x, weight, tid2eid.shape[-1]):
        logits = gate_logits(x, weight, activations=activations)
        return hash_gate(logits, token_ids, tid2eid, scale=scale)
    shapes = _check_gate(x, weight)
    shapes.check("token_ids", token_ids, "T", torch.int64)
    shapes.check("tid2eid", tid2eid, "V K", torch.int64)
    tokens, experts, width, top_k = shapes["T"], shapes["E"], shapes["D"], shapes["K"]
    weights, chosen = _outputs(x, top_k)
    if tokens:
        gate = _operands(x, weight, activations)
        _C.route_hash(*gate, token_ids, tid2eid, weights, chosen, tokens, experts, width, top_k, scale)
    return weights, chosen


@op(reference.gate_logits, kernel=True)
def gate_logits(x: Tensor, weight: Weight, *, activations: str = "bf16") -> Tensor:
    """The router's logits x W^T, products and sums in fp32: x [T, D] bf16/f32, weight (E, D) -> [T, E] f32.

    The kernel takes Plain weights, bf16 or f32, with D a multiple of 8, and up to 16 tokens: it streams the
    weight once, and a token's logits are bitwise the same whatever stands beside it. More tokens go to
    torch's matrix product, of bf16 operands with fp32 sums or of fp32 operands. Other weights are those of
    ``ops.gemm.linear``, with what ``activations`` names there. Source: docs/model.md 2.14.
    """
    if not isinstance(weight, Plain):
        return gemm.linear(x, weight, activations=activations, out_dtype=torch.float32)
    shapes = Shapes()
    shapes.check("x", x, "T D", FLOATS)
    shapes.check("weight", weight.w, "E D", FLOATS)
    tokens, experts, width = shapes["T"], shapes["E"], shapes["D"]
    if tokens > MANY_TOKENS:
        if x.dtype == weight.w.dtype == torch.bfloat16:
            return torch.mm(x, weight.w.T, out_dtype=torch.float32)
        return torch.mm(x.float(), weight.w.float().T)
    assert width % 8 == 0, f"x: expected a multiple of 8 values a token, found {list(x.shape)}"
    out = torch.empty(tokens, experts, dtype=torch.float32, device=x.device)
    if tokens:
        _C.gate_logits(x, weight.w, out, tokens, experts, width)
    return out


@op(reference.topk_gate, kernel=True)
def topk_gate(logits: Tensor, bias: Tensor, *, top_k: int, scale: float) -> tuple[Tensor, Tensor]:
    """The ``top_k`` experts of each token by score + bias, and their weights.

    logits [T, E] f32, bias [E] f32 -> weights [T, K] f32, experts [T, K] i64 in descending order of
    score + bias, ties by lowest index. score = sqrt(softplus(logit)); the bias selects only; weights are
    the chosen scores divided by their sum, times ``scale``. The kernel takes up to 1024 experts.
    Source: docs/model.md 2.14.
    """
    shapes = Shapes()
    shapes.check("logits", logits, "T E", torch.float32)
    shapes.check("bias", bias, "E", torch.float32)
    tokens, experts = shapes["T"], shapes["E"]
    assert experts <= MAX_EXPERTS, f"logits: expected at most {MAX_EXPERTS} experts, found {experts}"
    assert 1 <= top_k <= experts, f"top_k: expected 1 to {experts} experts, found {top_k}"
    weights, chosen = _outputs(logits, top_k)
    if tokens:
        _C.topk_gate(logits, bias, weights, chosen, tokens, experts, top_k, scale)
    return weights, chosen


@op(reference.hash_gate, kernel=True)
def hash_gate(logits: Tensor, token_ids: Tensor, tid2eid: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """The experts that the table fixes for each token id, and their weights.

    logits [T, E] f32, token_ids [T] i64, tid2eid [V, K] i64 -> weights [T, K] f32, experts [T, K] i64, in
    the table's order. Weights as in ``topk_gate``. Ids and experts exist: the kernel does not look.
    Source: docs/model.md 2.14.
    """
    shapes = Shapes()
    shapes.check("logits", logits, "T E", torch.float32)
    shapes.check("token_ids", token_ids, "T", torch.int64)
    shapes.check("tid2eid", tid2eid, "V K", torch.int64)
    tokens, experts, top_k = shapes["T"], shapes["E"], shapes["K"]
    assert top_k <= MAX_EXPERTS, f"tid2eid: expected at most {MAX_EXPERTS} experts a token, found {top_k}"
    weights, chosen = _outputs(logits, top_k)
    if tokens:
        _C.hash_gate(logits, token_ids, tid2eid, weights, chosen, tokens, experts, top_k, scale)
    return weights, chosen


def _is_fused(x: Tensor, weight: Weight, top_k: int) -> bool:
    """Whether one launch routes these tokens."""
    plain = isinstance(weight, Plain) and weight.w.dtype == torch.bfloat16
    if not plain and not (isinstance(weight, Packed) and is_nvfp4(weight)):
        return False
    few = x.dim() == 2 and x.shape[0] <= FUSED_TOKENS and top_k <= FUSED_CHOICE
    return few and x.dtype == torch.bfloat16 and shape_of(weight)[0] <= FUSED_EXPERTS


def _check_gate(x: Tensor, weight: Plain | Packed) -> Shapes:
    """The sizes of x [T, D] and weight (E, D) of one launch."""
    shapes = Shapes()
    shapes.check("x", x, "T D", torch.bfloat16)
    if isinstance(weight, Plain):
        shapes.check("weight", weight.w, "E D", torch.bfloat16)
    else:
        experts, width = shape_of(weight)
        assert width == shapes["D"], f"weight: expected (E, {shapes['D']}), found ({experts}, {width})"
        shapes = Shapes(T=shapes["T"], E=experts, D=width)
        units, size = packed_shape(weight.kind, experts, width)
        Shapes(U=units, B=size).check("weight", weight.data, "U B", torch.uint8)
    assert shapes["D"] % 8 == 0, f"x: expected a multiple of 8 values a token, found {list(x.shape)}"
    return shapes


def _operands(
    x: Tensor, weight: Plain | Packed, activations: str
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """What the kernel multiplies: x and its global scales [T, 1] or None, the weight and its global scale."""
    if isinstance(weight, Plain):
        return x, None, weight.w, None
    scales = None
    if activations == "nvfp4":
        x, scales = quant.round_nvfp4(x, weight.in_gs)
    elif activations == "fp8":
        x = quant.round_fp8(x)
    return x, scales, weight.data, weight.gs


def _outputs(like: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Weights [T, K] f32 and experts [T, K] i64, for T rows of a tensor."""
    shape = (like.shape[0], top_k)
    return like.new_empty(shape, dtype=torch.float32), like.new_empty(shape, dtype=torch.int64)
