"""The CUDA operations: ``_C.<name>`` is ``torch.ops.dsv4.<name>``; the first use loads the library.

The names and their arguments stand in csrc/bindings.cpp. Only the rooms of ``dsv4.ops`` call them.
"""

import functools
from typing import Any

import torch

from dsv4.device import cuda_arch


@functools.cache
def load_library() -> str:
    """Load the library for this GPU, built on first use; its path. ``ValueError`` if it cannot be built."""
    from dsv4 import build  # here, because python -m dsv4.build shall not find itself imported

    path = str(build.find_or_build(cuda_arch()))
    torch.ops.load_library(path)
    return path


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    load_library()
    function = getattr(torch.ops.dsv4, name).default
    globals()[name] = function  # the next look-up does not come here
    return function
