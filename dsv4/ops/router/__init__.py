"""Choosing experts: by score (sqrt-softplus, top-k) or by token id."""

import torch
from torch import Tensor

from dsv4 import _C
from dsv4.ops.checks import FLOATS, Shapes
from dsv4.ops.dispatch import op
from dsv4.ops.formats import Plain, Weight
from dsv4.ops.router import reference

MAX_EXPERTS = 1024  # of the kernels
MANY_TOKENS = 16  # above, gate_logits is a matrix product


@op(reference.gate_logits, kernel=True)
def gate_logits(x: Tensor, weight: Weight) -> Tensor:
    """The router's logits x W^T, products and sums in fp32: x [T, D] bf16/f32, weight (E, D) -> [T, E] f32.

    The kernel takes Plain weights, bf16 or f32, with D a multiple of 8, and up to 16 tokens: it streams the
    weight once, and a token's logits are bitwise the same whatever stands beside it. More tokens go to
    torch's matrix product, of bf16 operands with fp32 sums or of fp32 operands. Source: docs/model.md 2.14.
    """
    assert isinstance(weight, Plain), f"weight: expected Plain, found {type(weight).__name__}"
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


def _outputs(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Weights [T, K] f32 and experts [T, K] i64."""
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape), logits.new_empty(shape, dtype=torch.int64)
