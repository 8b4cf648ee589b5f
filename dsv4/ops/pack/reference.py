"""The packed layout of 4-bit weights in plain torch; ``ops.formats.Packed`` says where each bit stands."""

import torch
from torch import Tensor
from torch.nn import functional as F

from dsv4.ops.formats import (
    BLOCK_OF,
    BOTH_HALVES,
    CODE_BITS,
    UNIT_CODES,
    UNIT_COLUMNS,
    UNIT_ROWS,
    Mxfp4,
    Nvfp4,
    Packed,
    packed_shape,
    shape_of,
    unpack,
)


def pack_weight(weight: Nvfp4 | Mxfp4, *, out: Tensor | None = None) -> Packed:
    n, k = shape_of(weight)
    nvfp4 = isinstance(weight, Nvfp4)
    kind = "nvfp4" if nvfp4 else "mxfp4"
    codes = _units(weight.w, UNIT_COLUMNS // 2).unflatten(-1, (4, 4, 4, 2))  # piece, t, i, column pair
    codes = codes.permute(0, 3, 4, 2, 5, 6, 7, 1)  # [row tile, unit, piece, g, t, i, column pair, half]
    scales = _units(weight.w_sf, UNIT_COLUMNS // BLOCK_OF[kind]).unflatten(-1, (4, -1))  # piece, lanes
    scales = scales.permute(0, 3, 2, 5, 4, 1)  # [row tile, unit, g, lanes, piece, half]
    units, size = packed_shape(kind, n, k)
    words = pack_words(codes, kind).view(torch.uint8).reshape(units, UNIT_CODES)
    data = torch.cat((words, scales.reshape(units, size - UNIT_CODES)), dim=1, out=out)
    return Packed(kind, data, weight.w_gs if nvfp4 else None, n, k, weight.in_gs if nvfp4 else None)


def unpack_weight(weight: Packed) -> Nvfp4 | Mxfp4:
    return unpack(weight)


def pack_words(codes: Tensor, kind: str) -> Tensor:
    """Bytes of codes [..., 2, 2] u8, columns 0, 1 or 2, 3 and row g or g + 8, -> packed words [...] i32."""
    word = torch.zeros(codes.shape[:-2], dtype=torch.int32, device=codes.device)
    for byte, bits in zip(codes.flatten(-2).unbind(-1), CODE_BITS[kind], strict=True):
        pair = (byte & 15).int() | (byte >> 4).int() << 16  # the even column's code and the odd one's
        for place, bit in zip(bits, (3, 2, 1, 0), strict=True):
            word |= ((pair >> bit) & BOTH_HALVES) << place
    return word


def _units(bytes_of_rows: Tensor, width: int) -> Tensor:
    """A row-major matrix [N, B] in units, padded with zeros: [row tile, half, g, unit, width] u8.

    Half 0 of a row tile are rows g, half 1 rows g + 8.
    """
    rows = bytes_of_rows.view(torch.uint8)
    n, size = rows.shape
    rows = F.pad(rows, (0, -size % width, 0, -n % UNIT_ROWS))
    return rows.unflatten(0, (-1, 2, 8)).unflatten(-1, (-1, width))
