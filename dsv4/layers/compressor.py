"""A compressor: projections, pooling over windows, norm and RoPE of the emitted entries."""

import torch
from torch import Tensor

from dsv4.cache import CompressorState
from dsv4.config import CSA_RATIO, ModelConfig
from dsv4.layers.weights import Weights
from dsv4.numerics import Numerics
from dsv4.ops.compressor import pool_windows
from dsv4.ops.gemm import linear
from dsv4.ops.norm import rms_norm
from dsv4.ops.rope import apply_rope


class Compressor:
    """Docs: docs/model.md 2.8 (CSA) and 2.9 (HCA)."""

    def __init__(
        self, config: ModelConfig, numerics: Numerics, ratio: int, inv_freq: Tensor, weights: Weights
    ) -> None:
        self.ratio = ratio
        self.inv_freq = inv_freq
        self.norm_eps = config.norm_eps
        self.activations = numerics.activations
        self.wkv = weights.matrix("wkv")
        self.wgate = weights.matrix("wgate")
        self.ape = weights.tensor("ape")
        self.norm = weights.tensor("norm")

    def forward(self, u: Tensor, state: CompressorState, start: int) -> Tensor:
        """The entries that u [T, D] completes, [n, width] in u's dtype, before any trained rounding."""
        kv = linear(u, self.wkv, activations=self.activations, out_dtype=torch.float32)  # [T, C]
        gate = linear(u, self.wgate, activations=self.activations, out_dtype=torch.float32)  # [T, C]
        pooled = pool_windows(
            kv,
            gate,
            self.ape,
            state.tail_kv,
            state.tail_gate,
            start=start,
            overlap=self.ratio == CSA_RATIO,
        )
        entries = rms_norm(pooled.to(u.dtype), self.norm, eps=self.norm_eps)  # [n, width]
        first = start // self.ratio
        windows = torch.arange(first, first + entries.shape[0], device=u.device)
        return apply_rope(entries, windows * self.ratio, self.inv_freq)
