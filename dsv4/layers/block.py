"""One layer of the model: attention and mixture of experts, each between hyper-connections."""

from torch import Tensor

from dsv4.cache import LayerCache
from dsv4.config import ModelConfig
from dsv4.layers.attention import Attention
from dsv4.layers.mhc import HyperConnection
from dsv4.layers.moe import Moe
from dsv4.layers.weights import Weights
from dsv4.numerics import Numerics
from dsv4.ops.norm import rms_norm


class Block:
    """Docs: docs/model.md 2.2."""

    def __init__(
        self, config: ModelConfig, numerics: Numerics, *, ratio: int, hashed: bool, weights: Weights
    ) -> None:
        self.norm_eps = config.norm_eps
        self.attn_hc = HyperConnection(config, "attn", weights)
        self.ffn_hc = HyperConnection(config, "ffn", weights)
        self.attn_norm = weights.tensor("attn_norm")
        self.ffn_norm = weights.tensor("ffn_norm")
        self.attn = Attention(config, numerics, ratio, weights.scope("attn"))
        self.ffn = Moe(config, numerics, hashed, weights.scope("ffn"))

    def forward(
        self, x: Tensor, token_ids: Tensor, positions: Tensor, cache: LayerCache, start: int
    ) -> Tensor:
        """x [T, M, D], token_ids [T], positions [T] = start .. start + T - 1 -> [T, M, D]."""
        u, post, comb = self.attn_hc.pre(x)  # [T, D], [T, M], [T, M, M]
        y = self.attn.forward(rms_norm(u, self.attn_norm, eps=self.norm_eps), positions, cache, start)
        x = self.attn_hc.post(y, x, post, comb)
        u, post, comb = self.ffn_hc.pre(x)
        y = self.ffn.forward(rms_norm(u, self.ffn_norm, eps=self.norm_eps), token_ids)
        return self.ffn_hc.post(y, x, post, comb)
