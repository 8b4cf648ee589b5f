"""Choosing experts in plain torch, fp32 throughout."""

import torch
from torch import Tensor
from torch.nn import functional as F

from dsv4.ops.formats import Weight
from dsv4.ops.gemm import reference as gemm


def route_topk(
    x: Tensor, weight: Weight, bias: Tensor, *, top_k: int, scale: float, activations: str = "bf16"
) -> tuple[Tensor, Tensor]:
    return topk_gate(gate_logits(x, weight, activations=activations), bias, top_k=top_k, scale=scale)


def route_hash(
    x: Tensor, weight: Weight, token_ids: Tensor, tid2eid: Tensor, *, scale: float, activations: str = "bf16"
) -> tuple[Tensor, Tensor]:
    return hash_gate(gate_logits(x, weight, activations=activations), token_ids, tid2eid, scale=scale)


def gate_logits(x: Tensor, weight: Weight, *, activations: str = "bf16") -> Tensor:
    return gemm.linear(x, weight, activations=activations, out_dtype=torch.float32)


def topk_gate(logits: Tensor, bias: Tensor, *, top_k: int, scale: float) -> tuple[Tensor, Tensor]:
    scores = _scores(logits)
    # A stable sort breaks ties by the lowest index, which torch.topk does not promise.
    experts = (scores + bias).sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    return _weights(scores, experts, scale), experts


def hash_gate(logits: Tensor, token_ids: Tensor, tid2eid: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    experts = tid2eid[token_ids]
    return _weights(_scores(logits), experts, scale), experts


def _scores(logits: Tensor) -> Tensor:
    return F.softplus(logits.float()).sqrt()


def _weights(scores: Tensor, experts: Tensor, scale: float) -> Tensor:
    chosen = scores.gather(-1, experts)
    return chosen / chosen.sum(dim=-1, keepdim=True) * scale
