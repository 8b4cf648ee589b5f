"""The weight types: one small NamedTuple a format, so that codes and scales never drift apart.

Formats and layouts are those of docs/model.md section 4. Weights stay in memory as they are
stored; ``unscaled`` is what a matrix product reads, ``dequantize`` the plain fp32 matrix.
"""

from typing import NamedTuple

import torch
from torch import Tensor

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
NVFP4_BLOCK = 16
MXFP4_BLOCK = 32
FP8_BLOCK = 128


class Plain(NamedTuple):
    """A matrix as it is: ``w [N, K]`` bf16 or f32."""

    w: Tensor


class Nvfp4(NamedTuple):
    """e2m1 codes, one e4m3 scale per 16 along K, one fp32 global scale: w = code * w_sf * w_gs.

    ``w`` [N, K/2] u8, element 2k in the low nibble; ``w_sf`` [N, K/16] e4m3; ``w_gs`` [] f32;
    ``in_gs`` [] f32 or None: the activations' global scale, read only when activations are NVFP4.
    """

    w: Tensor
    w_sf: Tensor
    w_gs: Tensor
    in_gs: Tensor | None = None


class Mxfp4(NamedTuple):
    """e2m1 codes, one power-of-two scale per 32 along K: ``w`` [N, K/2] u8, ``w_sf`` [N, K/32] e8m0."""

    w: Tensor
    w_sf: Tensor


class Fp8Block(NamedTuple):
    """e4m3 codes, one scale per 128 x 128 block: ``w`` [N, K] e4m3, ``w_sf`` [N/128, K/128] e8m0 or f32
    (both rounded up)."""

    w: Tensor
    w_sf: Tensor


class Memo(NamedTuple):
    """A weight on the CPU whose unscaled matrix may be kept in ``cache`` under ``key``."""

    weight: "Plain | Nvfp4 | Mxfp4 | Fp8Block"
    cache: "MatrixCache"
    key: int


Weight = Plain | Nvfp4 | Mxfp4 | Fp8Block | Memo


class MatrixCache:
    """fp32 matrices of a CPU model, kept until ``limit_bytes`` are used.

    Nothing is evicted: a decode step walks the layers in a circle, where replacing the least
    recently used matrix would always drop the one needed next.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.free_bytes = limit_bytes
        self._kept: dict[int, Tensor] = {}
        self._keys = 0

    def wrap(self, weight: "Plain | Nvfp4 | Mxfp4 | Fp8Block") -> "Memo":
        self._keys += 1
        return Memo(weight, self, self._keys)

    def matrix(self, memo: "Memo") -> Tensor:
        kept = self._kept.get(memo.key)
        if kept is None:
            kept = _matrix(memo.weight)
            size = kept.numel() * kept.element_size()
            if size <= self.free_bytes:
                self._kept[memo.key] = kept
                self.free_bytes -= size
        return kept


def stored(weight: Weight) -> "Plain | Nvfp4 | Mxfp4 | Fp8Block":
    """The weight itself, without the CPU cache around it."""
    return weight.weight if isinstance(weight, Memo) else weight


def shape_of(weight: Weight) -> tuple[int, int]:
    """The logical shape (N, K)."""
    weight = stored(weight)
    n, k = weight.w.shape
    return (n, 2 * k) if isinstance(weight, Nvfp4 | Mxfp4) else (n, k)


def nbytes(weight: Weight) -> int:
    """Bytes held by every tensor of the weight."""
    parts = [part for part in stored(weight) if part is not None]
    return sum(part.numel() * part.element_size() for part in parts)


def unscaled(weight: Weight) -> tuple[Tensor, Tensor | None]:
    """What a product reads: the fp32 matrix [N, K] of code x block scale, and the global scale or None.

    code x block scale is exact in fp32 (and in bf16 for the 4-bit formats); the global scale stays
    apart and is applied to the sum, as the kernels do (docs/model.md 4.2).
    """
    if isinstance(weight, Memo):
        matrix = weight.cache.matrix(weight)
    else:
        matrix = _matrix(weight)
    inner = stored(weight)
    return matrix, inner.w_gs if isinstance(inner, Nvfp4) else None


def dequantize(weight: Weight) -> Tensor:
    """The matrix the weight stands for, [N, K] f32, global scale included."""
    matrix, global_scale = unscaled(weight)
    return matrix if global_scale is None else matrix * global_scale


def unpack_e2m1(codes: Tensor) -> Tensor:
    """The values of packed e2m1 codes: [..., K/2] u8 -> [..., K] f32, low nibble first."""
    table = torch.tensor(E2M1_VALUES, dtype=torch.float32, device=codes.device)
    codes = codes.view(torch.uint8)
    pairs = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)
    return table[pairs.int()]


def e8m0_to_float(scale: Tensor) -> Tensor:
    """2^(byte - 127) in fp32, read from the raw bytes (e8m0 or u8); byte 255 is NaN."""
    return scale.view(torch.float8_e8m0fnu).float()


def _matrix(weight: "Plain | Nvfp4 | Mxfp4 | Fp8Block") -> Tensor:
    if isinstance(weight, Plain):
        return weight.w.float()
    if isinstance(weight, Nvfp4):
        return _blockwise(unpack_e2m1(weight.w), weight.w_sf.float(), NVFP4_BLOCK)
    if isinstance(weight, Mxfp4):
        return _blockwise(unpack_e2m1(weight.w), e8m0_to_float(weight.w_sf), MXFP4_BLOCK)
    n, k = weight.w.shape
    scale = weight.w_sf if weight.w_sf.dtype == torch.float32 else e8m0_to_float(weight.w_sf)
    rows = scale.repeat_interleave(FP8_BLOCK, dim=0)[:n]
    return weight.w.float() * rows.repeat_interleave(FP8_BLOCK, dim=1)[:, :k]


def _blockwise(values: Tensor, scale: Tensor, block: int) -> Tensor:
    """values [N, K] times scale [N, K/block]."""
    return (values.unflatten(-1, (-1, block)) * scale.unsqueeze(-1)).flatten(-2)
