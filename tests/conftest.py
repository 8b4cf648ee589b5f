"""Shared by all tests: one thread, random data from a fixed seed, and the options of GPU sessions."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from gpu_session import GpuSession
from torch import Tensor

torch.set_num_threads(1)  # the tensors here are small, and one thread sums in one order


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--small", action="store_true", help="of tests/gpu, the small cases")
    parser.addoption("--gpu-record", action="store_true", help="write tests/gpu_record.json")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(GpuSession(config))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20260131)


@pytest.fixture
def normal(rng: np.random.Generator) -> Callable[..., Tensor]:
    """``normal(2, 3)``: the next standard normal numbers of the test, f32 [2, 3]."""
    return lambda *shape: torch.from_numpy(rng.standard_normal(shape)).float()
