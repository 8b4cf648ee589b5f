"""Shared by all tests: one thread, and random data from a fixed seed."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

torch.set_num_threads(1)  # the tensors here are small, and one thread sums in one order


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20260131)


@pytest.fixture
def normal(rng: np.random.Generator) -> Callable[..., Tensor]:
    """``normal(2, 3)``: the next standard normal numbers of the test, f32 [2, 3]."""
    return lambda *shape: torch.from_numpy(rng.standard_normal(shape)).float()
