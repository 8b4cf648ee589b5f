"""The mixture-of-experts sublayer: router, routed experts, shared expert."""

import torch
from torch import Tensor

from dsv4.config import ModelConfig
from dsv4.layers.weights import Weights
from dsv4.numerics import Numerics
from dsv4.ops.formats import Plain, stored
from dsv4.ops.gemm import linear
from dsv4.ops.moe import Expert, run_experts
from dsv4.ops.router import gate_logits, hash_gate, topk_gate


class Router:
    """Chooses experts by score or, in hash layers, by token id. Docs: docs/model.md 2.14."""

    def __init__(self, config: ModelConfig, numerics: Numerics, hashed: bool, weights: Weights) -> None:
        self.top_k = config.experts_per_token
        self.scale = config.routed_scale
        self.activations = numerics.activations
        self.weight = weights.matrix("gate")
        self.bias = None if hashed else weights.tensor("gate.bias")
        self.tid2eid = weights.tensor("gate.tid2eid") if hashed else None

    def forward(self, x: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, D], token_ids [T] -> routing weights [T, K] f32, experts [T, K] i64."""
        if isinstance(stored(self.weight), Plain):
            logits = gate_logits(x, self.weight)  # [T, E] f32
        else:
            logits = linear(x, self.weight, activations=self.activations, out_dtype=torch.float32)
        if self.tid2eid is not None:
            return hash_gate(logits, token_ids, self.tid2eid, scale=self.scale)
        assert self.bias is not None
        return topk_gate(logits, self.bias, top_k=self.top_k, scale=self.scale)


class Moe:
    """Docs: docs/model.md 2.14."""

    def __init__(self, config: ModelConfig, numerics: Numerics, hashed: bool, weights: Weights) -> None:
        self.limit = config.swiglu_limit
        self.activations = numerics.activations
        self.router = Router(config, numerics, hashed, weights)
        self.experts = [_expert(weights.scope(f"experts.{e}")) for e in range(config.num_experts)]
        self.shared = _expert(weights.scope("shared_experts"))

    def forward(self, x: Tensor, token_ids: Tensor) -> Tensor:
        """x [T, D], token_ids [T] -> [T, D]."""
        routing, chosen = self.router.forward(x, token_ids)  # [T, K] f32, [T, K] i64
        return run_experts(
            x, routing, chosen, self.experts, self.shared, limit=self.limit, activations=self.activations
        )


def _expert(weights: Weights) -> Expert:
    return Expert(weights.matrix("w1"), weights.matrix("w2"), weights.matrix("w3"))
