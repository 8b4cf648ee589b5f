"""A compressor: two projections of the tokens, and the entries that windows of these become."""

from torch import Tensor

from dsv4.cache import CompressorState
from dsv4.config import CSA_RATIO, ModelConfig
from dsv4.layers.weights import Weights
from dsv4.numerics import Numerics
from dsv4.ops.compressor import compress_kv, compress_step


class Compressor:
    """Its owner multiplies u with ``matrices``, beside others. Docs: docs/model.md 2.8 (CSA), 2.9 (HCA)."""

    def __init__(
        self, config: ModelConfig, numerics: Numerics, ratio: int, inv_freq: Tensor, weights: Weights
    ) -> None:
        self.ratio = ratio
        self.inv_freq = inv_freq
        self.norm_eps = config.norm_eps
        self.dtype = numerics.torch_dtype
        self.matrices = (weights.matrix("wkv"), weights.matrix("wgate"))
        self.ape = weights.tensor("ape")
        self.norm = weights.tensor("norm")

    def forward(self, kv: Tensor, gate: Tensor, state: CompressorState, start: int) -> Tensor:
        """The entries [n, width] that tokens complete, in the activation dtype, before any trained rounding.

        kv and gate [T, C] f32: products of the tokens' u with ``matrices``, from position ``start`` on.
        """
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
            dtype=self.dtype,
        )  # [n, width]

    def step(
        self, kv: Tensor, gate: Tensor, state: CompressorState, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``forward`` of up to ``MAX_STEP`` tokens whose ``positions`` [T] i64 are read on the device.

        Returns the entries [n, width] that there may be and the index of each, [n] i64, -1: not completed.
        """
        return compress_step(
            kv,
            gate,
            self.ape,
            state.tail_kv,
            state.tail_gate,
            self.norm,
            self.inv_freq,
            positions,
            overlap=self.ratio == CSA_RATIO,
            eps=self.norm_eps,
            dtype=self.dtype,
        )
