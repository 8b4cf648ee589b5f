"""The machine: which device to use and how much memory it has free. Nothing else asks."""

from pathlib import Path

import torch

DEVICES = ("auto", "cpu", "cuda")


def resolve_device(name: str) -> torch.device:
    """"cpu", "cuda", or "auto": the GPU if there is one. Raises ``ValueError`` where it is not there."""
    if name not in DEVICES:
        raise ValueError(f"device: expected one of {', '.join(DEVICES)}, found {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device: expected a CUDA device, found none: torch "
            f"{torch.__version__} sees no usable GPU; use --device cpu or install a CUDA build and driver"
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def cuda_arch() -> str:
    """The architecture of the current GPU as nvcc names it, "90a" for an H200.

    Raises ``ValueError`` for one that the kernels are not written for.
    """
    known = {(9, 0): "90a", (10, 0): "100a", (10, 3): "103a", (12, 0): "120a"}
    found = torch.cuda.get_device_capability()
    if found not in known:
        wanted = ", ".join(f"{major}.{minor}" for major, minor in known)
        raise ValueError(
            f"device: expected a GPU of compute capability {wanted}, found {torch.cuda.get_device_name()} "
            f"of {found[0]}.{found[1]}; use --device cpu or --reference all"
        )
    return known[found]


def free_bytes(device: torch.device) -> int:
    """Memory that a new model may take on ``device``, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("/proc/meminfo has no MemAvailable line")
