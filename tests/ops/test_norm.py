"""The norm room against sums written out in double precision."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv4.ops.norm import rms_norm

EPS = 1e-6


def expected_norm(x: Tensor, weight: Tensor | None) -> np.ndarray:
    """Row by row: x / sqrt(mean(x^2) + eps) * weight."""
    rows = []
    for row in x.double().reshape(-1, x.shape[-1]).tolist():
        mean = sum(value * value for value in row) / len(row)
        factors = [1.0] * len(row) if weight is None else weight.double().tolist()
        rows.append([value / math.sqrt(mean + EPS) * f for value, f in zip(row, factors, strict=True)])
    return np.array(rows).reshape(x.shape)


@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (1, 8), (7, 33), (3, 4, 16), (0, 4, 16)])
@pytest.mark.parametrize("weighted", [True, False])
def test_float32(shape: tuple[int, ...], weighted: bool, normal: Callable[..., Tensor]) -> None:
    x, weight = 3 * normal(*shape), 1 + normal(shape[-1]) if weighted else None
    y = rms_norm(x, weight, eps=EPS)
    assert y.shape == shape and y.dtype == torch.float32
    np.testing.assert_allclose(y.numpy(), expected_norm(x, weight), rtol=2e-6, atol=1e-12)


@pytest.mark.parametrize("weighted", [True, False])
def test_bfloat16_is_rounded_once(weighted: bool, normal: Callable[..., Tensor]) -> None:
    x, weight = normal(20, 96).bfloat16(), 1 + 0.3 * normal(96) if weighted else None
    y = rms_norm(x, weight, eps=EPS)
    assert y.dtype == torch.bfloat16
    want = expected_norm(x, weight)
    half_step = 2.0 ** (np.floor(np.log2(np.abs(want))) - 8)  # of bf16's 8 significant bits
    assert (np.abs(y.double().numpy() - want) <= half_step * 1.001).all()


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-3, 1e15])
def test_extreme_rows(size: float) -> None:
    """A row of zeros stays zero, a tiny one is lifted by eps^-0.5 only, a huge one is normalised."""
    x = size * torch.tensor([[1.0, -2.0, 0.0, 4.0]])
    np.testing.assert_allclose(
        rms_norm(x, None, eps=EPS).numpy(), expected_norm(x, None), rtol=2e-6, atol=1e-37
    )
