"""The layout in which matrix kernels read 4-bit weights, and the way back.

``Packed`` (ops/formats.py) says where each bit stands. Nothing is rounded: both directions only move bits.
FP8 and plain weights have no layout of their own, because kernels read them as they are stored.
"""

import torch
from torch import Tensor

from dsv4 import _C
from dsv4.ops.checks import Shapes
from dsv4.ops.dispatch import op
from dsv4.ops.formats import BLOCK_OF, Mxfp4, Nvfp4, Packed, packed_shape, shape_of
from dsv4.ops.pack import reference

SCALE_DTYPES = {"nvfp4": torch.float8_e4m3fn, "mxfp4": torch.float8_e8m0fnu}


@op(reference.pack_weight, kernel=True)
def pack_weight(weight: Nvfp4 | Mxfp4, *, out: Tensor | None = None) -> Packed:
    """Pack a matrix [N, K], K a multiple of 16 (NVFP4) or 32 (MXFP4); the scalars are handed on.

    N is padded to a multiple of 16 and K to one of 256, with zero codes and zero scales. ``out``: memory for
    the data, [units, 2304 or 2176] u8, aligned to 16 bytes. The kernels that read the result take e4m3 scales
    without sign or NaN and e8m0 scales up to byte 136 (2^9); loading/repack.py refuses others, here they are
    moved like any byte. Source: docs/model.md 4.1, 4.2.
    """
    kind = "nvfp4" if isinstance(weight, Nvfp4) else "mxfp4"
    n, k = shape_of(weight)
    assert k % BLOCK_OF[kind] == 0, f"weight: expected K a multiple of {BLOCK_OF[kind]}, found [{n}, {k}]"
    shapes = Shapes(N=n, B=k // 2, G=k // BLOCK_OF[kind])
    shapes.check("w", weight.w, "N B", torch.uint8)
    shapes.check("w_sf", weight.w_sf, "N G", SCALE_DTYPES[kind])
    units, size = packed_shape(kind, n, k)
    data = torch.empty(units, size, dtype=torch.uint8, device=weight.w.device) if out is None else out
    Shapes(U=units, S=size).check("out", data, "U S", torch.uint8)
    if data.numel():
        _C.pack_weight(weight.w, weight.w_sf, data, n, k)
    if isinstance(weight, Nvfp4):
        return Packed(kind, data, weight.w_gs, n, k, weight.in_gs)
    return Packed(kind, data, None, n, k)


@op(reference.unpack_weight, kernel=True)
def unpack_weight(weight: Packed) -> Nvfp4 | Mxfp4:
    """The inverse of ``pack_weight``, bit by bit: codes [N, K/2] u8 and scales [N, K/16] or [N, K/32].

    Source: docs/model.md 4.1, 4.2.
    """
    kind, n, k = weight.kind, weight.n, weight.k
    units, size = packed_shape(kind, n, k)
    Shapes(U=units, B=size).check("data", weight.data, "U B", torch.uint8)
    w = torch.empty(n, k // 2, dtype=torch.uint8, device=weight.data.device)
    w_sf = torch.empty(n, k // BLOCK_OF[kind], dtype=SCALE_DTYPES[kind], device=weight.data.device)
    if w.numel():
        _C.unpack_weight(weight.data, w, w_sf, n, k)
    return Nvfp4(w, w_sf, weight.gs, weight.in_gs) if kind == "nvfp4" else Mxfp4(w, w_sf)
