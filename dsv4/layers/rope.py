"""The rotation frequencies of a layer."""

import math

import torch
from torch import Tensor

from dsv4.config import ModelConfig


def inverse_frequencies(config: ModelConfig, ratio: int, device: torch.device | str = "cpu") -> Tensor:
    """The frequencies [Dr/2] f32 of a layer with compress ratio ``ratio``.

    Window-only layers: rope_theta, plain. Compressed layers: compress_rope_theta with YaRN, without any
    scaling of cos, sin or softmax. Source: docs/model.md 2.6.
    """
    dim = config.rope_dim
    base = config.compress_rope_theta if ratio else config.rope_theta
    freq = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    if ratio and config.yarn is not None:
        yarn = config.yarn

        def turning_dim(rotations: float) -> float:
            """The dimension whose wave turns ``rotations`` times over the original context."""
            return dim * math.log(yarn.original_context / (rotations * 2 * math.pi)) / (2 * math.log(base))

        low = max(math.floor(turning_dim(yarn.beta_fast)), 0)
        high = min(math.ceil(turning_dim(yarn.beta_slow)), dim - 1)
        ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
        ramp = ramp.clamp(0, 1)
        freq = freq / yarn.factor * ramp + freq * (1 - ramp)
    return freq.to(device)
