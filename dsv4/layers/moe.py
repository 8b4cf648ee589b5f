"""The mixture-of-experts sublayer: router, routed experts, shared expert."""

from torch import Tensor

from dsv4.config import ModelConfig
from dsv4.layers.weights import Weights
from dsv4.numerics import Numerics
from dsv4.ops.moe import Expert, bank_experts, run_experts
from dsv4.ops.router import route_hash, route_topk


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
        how = {"scale": self.scale, "activations": self.activations}
        if self.tid2eid is not None:
            return route_hash(x, self.weight, token_ids, self.tid2eid, **how)
        assert self.bias is not None
        return route_topk(x, self.weight, self.bias, top_k=self.top_k, **how)


class Moe:
    """Docs: docs/model.md 2.14."""

    def __init__(self, config: ModelConfig, numerics: Numerics, hashed: bool, weights: Weights) -> None:
        self.limit = config.swiglu_limit
        self.activations = numerics.activations
        self.router = Router(config, numerics, hashed, weights)
        experts = [_expert(weights.scope(f"experts.{e}")) for e in range(config.num_experts)]
        self.shared = _expert(weights.scope("shared_experts"))
        self.experts = bank_experts(experts, self.shared)

    def forward(self, x: Tensor, token_ids: Tensor) -> Tensor:
        """x [T, D], token_ids [T] -> [T, D]."""
        routing, chosen = self.router.forward(x, token_ids)  # [T, K] f32, [T, K] i64
        return run_experts(
            x, routing, chosen, self.experts, self.shared, limit=self.limit, activations=self.activations
        )


def _expert(weights: Weights) -> Expert:
    return Expert(weights.matrix("w1"), weights.matrix("w2"), weights.matrix("w3"))
