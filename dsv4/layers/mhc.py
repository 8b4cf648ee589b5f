"""Hyper-connections around one sublayer, and the collapse before the head."""

from torch import Tensor

from dsv4.config import ModelConfig
from dsv4.layers.weights import Weights
from dsv4.ops.mhc import mhc_head, mhc_post, mhc_pre


class HyperConnection:
    """One site ("attn" or "ffn") of a block. Docs: docs/model.md 2.3, 2.4."""

    def __init__(self, config: ModelConfig, site: str, weights: Weights) -> None:
        self.config = config
        self.fn = weights.tensor(f"hc_{site}_fn")
        self.base = weights.tensor(f"hc_{site}_base")
        self.scale = weights.tensor(f"hc_{site}_scale")

    def pre(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, M, D] -> the sublayer's input [T, D], post [T, M] f32, comb [T, M, M] f32."""
        return mhc_pre(
            x,
            self.fn,
            self.base,
            self.scale,
            iterations=self.config.sinkhorn_iters,
            eps=self.config.hc_eps,
            norm_eps=self.config.norm_eps,
        )

    @staticmethod
    def post(y: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        """The sublayer's output y [T, D] back into the streams x [T, M, D] -> [T, M, D]."""
        return mhc_post(y, x, post, comb)


class HyperHead:
    """The learned collapse of the streams. Docs: docs/model.md 2.5."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.config = config
        self.fn = weights.tensor("hc_head_fn")
        self.base = weights.tensor("hc_head_base")
        self.scale = weights.tensor("hc_head_scale")

    def forward(self, x: Tensor) -> Tensor:
        """x [T, M, D] -> [T, D]."""
        return mhc_head(
            x, self.fn, self.base, self.scale, eps=self.config.hc_eps, norm_eps=self.config.norm_eps
        )
