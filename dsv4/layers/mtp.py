"""The multi-token-prediction block: drafts the token after next from the trunk's streams."""

import torch
from torch import Tensor

from dsv4.cache import LayerCache
from dsv4.config import WINDOW_ONLY, ModelConfig
from dsv4.layers.block import Block, run_blocks
from dsv4.layers.mhc import HyperHead
from dsv4.layers.weights import Weights
from dsv4.numerics import Numerics
from dsv4.ops.gemm import linear
from dsv4.ops.norm import rms_norm


class MtpBlock:
    """A window-only block over a mix of streams and next-token embedding. Docs: docs/model.md 2.16.

    Embedding table and head are the trunk's; the caller applies them.
    """

    def __init__(self, config: ModelConfig, numerics: Numerics, weights: Weights) -> None:
        self.norm_eps = config.norm_eps
        self.activations = numerics.activations
        self.e_proj = weights.matrix("e_proj")
        self.h_proj = weights.matrix("h_proj")
        self.enorm = weights.tensor("enorm")
        self.hnorm = weights.tensor("hnorm")
        self.norm = weights.tensor("norm")
        self.hc_head = HyperHead(config, weights)
        self.block = Block(config, numerics, ratio=WINDOW_ONLY, hashed=False, weights=weights)

    def forward(
        self,
        x: Tensor,
        next_embedding: Tensor,
        next_ids: Tensor,
        positions: Tensor,
        cache: LayerCache,
        start: int,
    ) -> tuple[Tensor, Tensor]:
        """x [T, M, D] the trunk's streams at ``positions``, next_embedding [T, D] and next_ids [T] of the
        tokens after them -> the block's streams [T, M, D] and the normalised input of the head [T, D]."""
        e = rms_norm(next_embedding, self.enorm, eps=self.norm_eps)
        h = rms_norm(x, self.hnorm, eps=self.norm_eps)
        e = linear(e, self.e_proj, activations=self.activations, out_dtype=torch.float32)  # [T, D]
        h = linear(h.flatten(0, 1), self.h_proj, activations=self.activations, out_dtype=torch.float32)
        x = (e.unsqueeze(1) + h.view(x.shape)).to(x.dtype)  # [T, M, D]
        x = run_blocks(x, [self.block], next_ids, positions, [cache], start)
        return x, rms_norm(self.hc_head.forward(x), self.norm, eps=self.norm_eps)
