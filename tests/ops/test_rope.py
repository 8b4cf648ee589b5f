"""The rope room by pairs in double precision, and the frequency tables of the layers."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from checkpoints import tiny_config_dict
from torch import Tensor

from dsv4.config import ModelConfig, Yarn
from dsv4.layers.rope import inverse_frequencies
from dsv4.ops.norm import rms_norm
from dsv4.ops.rope import apply_rope, rms_norm_rope


def rotated(x: Tensor, positions: list[int], inv_freq: Tensor, sign: float = 1.0) -> np.ndarray:
    """Pair by pair: the fp32 angle of every pair, its cosine and sine in double precision."""
    out = x.double().numpy().copy()
    dims, freqs = out.shape[-1], inv_freq.numpy()
    for t, position in enumerate(positions):
        for row in out[t].reshape(-1, dims):
            for i, freq in enumerate(freqs):
                angle = sign * float(np.float32(position) * freq)
                even = dims - 2 * len(freqs) + 2 * i
                a, b = row[even], row[even + 1]
                row[even] = a * math.cos(angle) - b * math.sin(angle)
                row[even + 1] = a * math.sin(angle) + b * math.cos(angle)
    return out


@pytest.mark.parametrize("shape", [(0, 8), (1, 8), (5, 11), (4, 3, 14), (0, 3, 14)])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_last_dims_turn_in_neighbouring_pairs(
    shape: tuple[int, ...], sign: float, rng: np.random.Generator, normal: Callable[..., Tensor]
) -> None:
    x = normal(*shape)
    inv_freq = torch.tensor([1.0, 0.37, 0.011, 1e-5])
    positions = rng.integers(0, 1_000_001, shape[0])
    y = apply_rope(x, torch.from_numpy(positions), inv_freq, inverse=sign < 0)
    assert y.shape == shape and y.dtype == torch.float32
    assert torch.equal(y[..., :-8], x[..., :-8])
    np.testing.assert_allclose(y.numpy(), rotated(x, positions.tolist(), inv_freq, sign), atol=2e-6)


def test_a_quarter_turn() -> None:
    y = apply_rope(torch.tensor([[5.0, 1.0, 2.0]]), torch.tensor([1]), torch.tensor([math.pi / 2]))
    np.testing.assert_allclose(y.numpy(), [[5.0, -2.0, 1.0]], atol=1e-6)


def test_position_zero_changes_nothing(normal: Callable[..., Tensor]) -> None:
    x = normal(1, 2, 6)
    assert torch.equal(apply_rope(x, torch.zeros(1, dtype=torch.int64), torch.tensor([1.0, 0.5])), x)


@pytest.mark.parametrize("last", [100, 1_000_000])
def test_inverse_undoes(last: int, normal: Callable[..., Tensor]) -> None:
    x, positions = normal(9, 2, 64), torch.linspace(0, last, 9).long()
    inv_freq = 10000.0 ** (-torch.arange(0, 64, 2) / 64)
    y = apply_rope(apply_rope(x, positions, inv_freq), positions, inv_freq, inverse=True)
    np.testing.assert_allclose(y.numpy(), x.numpy(), atol=2e-6)


def test_bfloat16_rounds_rotated_dims_only(normal: Callable[..., Tensor]) -> None:
    """The angle is formed in fp32 whatever the dtype of x: a bf16 position would be off by radians."""
    x, positions, inv_freq = normal(6, 3, 12).bfloat16(), torch.arange(6) + 999_990, torch.tensor([1.0, 0.3])
    y = apply_rope(x, positions, inv_freq)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y[..., :8], x[..., :8])
    want = rotated(x, positions.tolist(), inv_freq)
    np.testing.assert_allclose(y.double().numpy(), want, rtol=2.0**-8, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 8), (1, 8), (5, 11), (4, 3, 14)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("weighted", [True, False])
def test_norm_then_rope(
    shape: tuple[int, ...], dtype: torch.dtype, weighted: bool, normal: Callable[..., Tensor]
) -> None:
    """The norm runs over the whole row and rounds to x's dtype before the rotation, which rounds again."""
    x, positions = (3 * normal(*shape)).to(dtype), torch.arange(shape[0]) + 70_000
    weight = 1 + 0.3 * normal(shape[-1]) if weighted else None
    inv_freq = torch.tensor([1.0, 0.37, 0.011])
    y = rms_norm_rope(x, weight, positions, inv_freq, eps=1e-6)
    assert y.shape == shape and y.dtype == dtype
    scale = np.sqrt((x.double().numpy() ** 2).mean(-1, keepdims=True) + 1e-6)
    normed = torch.from_numpy(x.double().numpy() / scale * (1 if weight is None else weight.numpy()))
    want = rotated(normed.to(dtype), positions.tolist(), inv_freq)
    tolerance = 2.0**-7 if dtype == torch.bfloat16 else 1e-5
    np.testing.assert_allclose(y.double().numpy(), want, rtol=tolerance, atol=tolerance)
    both = apply_rope(rms_norm(x, weight, eps=1e-6), positions, inv_freq)
    assert torch.equal(y, both)


def real_config() -> ModelConfig:
    """The released models' RoPE: 64 dims, 160000 with YaRN 16 over 65536, 10000 for window-only layers."""
    scaling = {"type": "yarn", "factor": 16, "original_max_position_embeddings": 65536}
    widths = {"head_dim": 512, "qk_rope_head_dim": 64, "index_head_dim": 128}
    return ModelConfig.from_dict(tiny_config_dict(rope_scaling=scaling, **widths))


@pytest.mark.parametrize("ratio", [4, 128])
def test_compressed_layers_use_yarn(ratio: int) -> None:
    """Pairs up to 15 keep their frequency, pairs from 25 on turn 16 times slower, linear between."""
    table = inverse_frequencies(real_config(), ratio)
    assert table.shape == (32,) and table.dtype == torch.float32
    for i in range(32):
        freq = 160000.0 ** (-2 * i / 64)
        slow = 0.0 if i <= 15 else 1.0 if i >= 25 else (i - 15) / 10
        assert table[i].item() == pytest.approx(freq / 16 * slow + freq * (1 - slow), rel=1e-6)


def test_window_layers_use_the_plain_base() -> None:
    table = inverse_frequencies(real_config(), 0)
    assert table.tolist() == pytest.approx([10000.0 ** (-2 * i / 64) for i in range(32)], rel=1e-6)


def test_without_yarn_compressed_layers_keep_their_base() -> None:
    table = inverse_frequencies(dataclasses.replace(real_config(), yarn=None), 4)
    assert table.tolist() == pytest.approx([160000.0 ** (-2 * i / 64) for i in range(32)], rel=1e-6)


def test_yarn_of_a_short_context_starts_at_pair_zero() -> None:
    """At a context of 64 no pair turns 32 times: the ramp begins at 0, and 64 / 2 pi ends it at 7."""
    yarn = Yarn(factor=4, original_context=64, beta_fast=32, beta_slow=1)
    table = inverse_frequencies(dataclasses.replace(real_config(), yarn=yarn), 4)
    for i in range(32):
        slow = min(i / 7, 1.0)
        freq = 160000.0 ** (-2 * i / 64)
        assert table[i].item() == pytest.approx(freq / 4 * slow + freq * (1 - slow), rel=1e-6)
