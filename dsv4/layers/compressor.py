"""A compressor: projections, and the entries that windows of them become."""

import torch
from torch import Tensor

from dsv4.cache import CompressorState
from dsv4.config import CSA_RATIO, ModelConfig
from dsv4.layers.weights import Weights
from dsv4.numerics import Numerics
from dsv4.ops.compressor import compress_kv
from dsv4.ops.gemm import linear


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
        return compress_kv(
            kv,
            gate,
            self.ape,
            state.tail_kv,
            state.tail_gate,
            self.norm,
            self.inv_freq,
            start=start,
            overlap=self.ratio == CSA_RATIO,
            eps=self.norm_eps,
            dtype=u.dtype,
        )  # [n, width]
