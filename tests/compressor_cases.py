"""What the GPU tests of the compressor share: its kinds, their weights, tails at any position."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from shapes import MODELS
from torch import Tensor

EPS = 1e-6
Normal = Callable[..., Tensor]


class Kind(NamedTuple):
    """A compressor: ``rotary`` values at the end of an entry turn."""

    ratio: int
    width: int
    overlap: bool
    rotary: int

    @property
    def before(self) -> int:
        """Rows of the tail in front of the pending ones."""
        return self.ratio if self.overlap else 0

    @property
    def channels(self) -> int:
        return 2 * self.width if self.overlap else self.width

    @property
    def starts(self) -> list[int]:
        """Fresh sequences, tails of every size (HCA: some), windows before, and positions near a million."""
        few = range(2 * self.ratio) if self.ratio <= 8 else (0, 1, 63, 64, 126, 127, 128, 200)
        return [*few, 999_999, 1_000_000]


# Flash, Pro and tiny have the same three compressors.
CSA, INDEX, HCA = (
    Kind(ratio, width, overlap, rope_dim)
    for ratio, width, overlap, rope_dim in dict.fromkeys(
        (ratio, width, overlap, sizes.rope_dim)
        for sizes in MODELS
        for ratio, width, overlap in (
            (sizes.csa_ratio, sizes.head_dim, True),
            (sizes.csa_ratio, sizes.index_dim, True),
            (sizes.hca_ratio, sizes.head_dim, False),
        )
    )
)
# One vector a slot, more slots than a thread takes at a time, shares of channels that are empty or uneven.
ODD = [
    Kind(8, 8, False, 2),
    Kind(8, 8, True, 4),
    Kind(3, 24, True, 24),
    Kind(2, 40, False, 38),
    Kind(128, 72, False, 64),
    Kind(130, 264, True, 64),
    Kind(600, 40, False, 8),
    Kind(16, 1040, True, 64),
    Kind(24, 64, True, 8),
]
# The last two have clusters with two windows that read the tail, and six groups of slots.
CUTS = [CSA, INDEX, HCA, Kind(8, 8, False, 2), Kind(3, 24, True, 24), *ODD[-2:]]


def name(kind: Kind) -> str:
    return f"{'csa' if kind.overlap else 'hca'}{kind.ratio}x{kind.width}"


def weights(kind: Kind, normal: Normal) -> tuple[Tensor, Tensor, Tensor]:
    """ape, norm, inv_freq."""
    inv_freq = torch.logspace(0, -5, kind.rotary // 2, device="cuda")
    return normal(kind.ratio, kind.channels), 1 + 0.3 * normal(kind.width), inv_freq


def fresh_tail(kind: Kind) -> tuple[Tensor, Tensor]:
    shape = (kind.before + kind.ratio, kind.channels)
    return torch.zeros(shape, device="cuda"), torch.full(shape, -torch.inf, device="cuda")


def tail_at(kind: Kind, start: int, normal: Normal) -> tuple[Tensor, Tensor]:
    """A tail as ``start`` tokens leave it; whatever is not live must not matter."""
    shape = (kind.before + kind.ratio, kind.channels)
    kv, gate = normal(*shape), normal(*shape)
    if start < kind.ratio:  # no window before
        kv[: kind.before], gate[: kind.before] = 1e30, -torch.inf
    kv[kind.before + start % kind.ratio :] = torch.nan
    gate[kind.before + start % kind.ratio :] = torch.nan
    return kv, gate
