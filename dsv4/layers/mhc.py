"""Hyper-connections around one sublayer, and the collapse before the head."""

from typing import NamedTuple

from torch import Tensor

from dsv4.config import ModelConfig
from dsv4.layers.weights import Weights
from dsv4.ops.mhc import mhc_boundary, mhc_head, mhc_post, mhc_pre
from dsv4.ops.norm import rms_norm


class Entry(NamedTuple):
    """What a sublayer begins with: the streams x [T, M, D], its normalised input u [T, D], and the weights
    post [T, M] f32 and comb [T, M, M] f32 with which its output will return to the streams."""

    x: Tensor
    u: Tensor
    post: Tensor
    comb: Tensor

    def leave(self, y: Tensor) -> Tensor:
        """The streams after the sublayer's output y [T, D]."""
        return mhc_post(y, self.x, self.post, self.comb)


class HyperConnection:
    """The way into one sublayer ("attn" or "ffn"), its norm included. Docs: docs/model.md 2.2 to 2.4."""

    def __init__(self, config: ModelConfig, site: str, weights: Weights) -> None:
        self.iterations = config.sinkhorn_iters
        self.eps = config.hc_eps
        self.norm_eps = config.norm_eps
        self.fn = weights.tensor(f"hc_{site}_fn")
        self.base = weights.tensor(f"hc_{site}_base")
        self.scale = weights.tensor(f"hc_{site}_scale")
        self.norm = weights.tensor(f"{site}_norm")

    def enter(self, x: Tensor) -> Entry:
        """From the streams x [T, M, D] themselves."""
        u, post, comb = mhc_pre(
            x,
            self.fn,
            self.base,
            self.scale,
            iterations=self.iterations,
            eps=self.eps,
            norm_eps=self.norm_eps,
        )
        return Entry(x, rms_norm(u, self.norm, eps=self.norm_eps), post, comb)

    def follow(self, last: Entry, y: Tensor) -> Entry:
        """From the sublayer before, which began with ``last`` and returned y [T, D]: one launch."""
        return Entry(
            *mhc_boundary(
                y,
                *(last.x, last.post, last.comb),
                *(self.fn, self.base, self.scale, self.norm),
                iterations=self.iterations,
                eps=self.eps,
                norm_eps=self.norm_eps,
            )
        )


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
