"""Tests that need a GPU: each kernel against its reference on the same device, at the models' real sizes.

They build nothing: a library for this GPU must be there (``python -m dsv4.build``).
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dsv4 import build
from dsv4.device import cuda_arch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if "tests/gpu/" in item.path.as_posix()]
    for item in here:
        item.add_marker(pytest.mark.gpu)
        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    if here and torch.cuda.is_available() and build.find(cuda_arch()) is None:
        arch = cuda_arch()
        pytest.exit(f"no library of these sources for sm_{arch}: run python -m dsv4.build --arch {arch}", 2)


@pytest.fixture
def cuda_normal() -> Callable[..., Tensor]:
    """``cuda_normal(2, 3)``: standard normal numbers from a fixed seed, f32 on the GPU."""
    generator = torch.Generator("cuda").manual_seed(20260131)
    return lambda *shape: torch.randn(shape, generator=generator, device="cuda")
