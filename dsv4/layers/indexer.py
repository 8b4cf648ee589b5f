"""The lightning indexer of a CSA layer: its own keys, queries from the query latent, top-k choice."""

import torch
from torch import Tensor

from dsv4.cache import CompressorState
from dsv4.config import CSA_RATIO, ModelConfig
from dsv4.layers.compressor import Compressor
from dsv4.layers.weights import Weights
from dsv4.numerics import Numerics
from dsv4.ops.gemm import linear
from dsv4.ops.indexer import index_scores, select_topk
from dsv4.ops.quant import round_index
from dsv4.ops.rope import apply_rope


class Indexer:
    """Docs: docs/model.md 2.11."""

    def __init__(self, config: ModelConfig, numerics: Numerics, inv_freq: Tensor, weights: Weights) -> None:
        self.heads = config.index_heads
        self.head_dim = config.index_head_dim
        self.top_k = config.index_topk
        self.inv_freq = inv_freq
        self.activations = numerics.activations
        self.trained = numerics.trained
        self.wq_b = weights.matrix("wq_b")
        self.weights_proj = weights.matrix("weights_proj")
        self.compressor = Compressor(config, numerics, CSA_RATIO, inv_freq, weights.scope("compressor"))

    def forward(
        self, u: Tensor, qa: Tensor, positions: Tensor, visible: Tensor, state: CompressorState, start: int
    ) -> Tensor | None:
        """The chosen entries [T, top_k] of each query (-1: none), or None when all visible ones are.

        u [T, D] the normalised input, qa [T, q_lora] the query latent, visible [T] i64. The keys of the
        entries that u completes are stored in any case.
        """
        keys = self.compressor.forward(u, state, start)  # [n, Di]
        keys = state.entries.append(round_index(keys) if self.trained else keys)  # [C, Di]
        if keys.shape[0] <= self.top_k:
            return None
        return select_topk(self.scores(u, qa, positions, keys), visible, top_k=self.top_k)

    def scores(self, u: Tensor, qa: Tensor, positions: Tensor, keys: Tensor) -> Tensor:
        """The score of every key for every query, [T, C] f32, future entries included."""
        q = linear(qa, self.wq_b, activations=self.activations)
        q = apply_rope(q.unflatten(-1, (self.heads, self.head_dim)), positions, self.inv_freq)  # [T, Hi, Di]
        q = round_index(q) if self.trained else q
        weights = linear(u, self.weights_proj, activations=self.activations, out_dtype=torch.float32)
        return index_scores(q, keys, weights * (self.head_dim * self.heads) ** -0.5)
