"""The weight types, one small NamedTuple a format, so that codes and scales never drift apart; cached rows.

Formats and layouts of weights are those of docs/model.md section 4. Weights stay in memory as they are
stored, but for 4-bit ones on CUDA, which become ``Packed`` when they are loaded; ``unscaled`` is what
a matrix product reads, ``dequantize`` the plain fp32 matrix. A table of cached rows is plain or of records
(docs/model.md section 3), told apart by dtype and width; ``decode_rows`` is what attention and indexer read.
"""

from typing import NamedTuple

import torch
from torch import Tensor

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
NVFP4_BLOCK = 16
MXFP4_BLOCK = 32
FP8_BLOCK = 128

# Packed matrices: a unit, and the bits of a 16-bit half word in which the four codes of an mma step stand,
# each as sign, exponent (2 bits), mantissa: where shifts and masks make fp16 of NVFP4, bf16 of MXFP4.
UNIT_ROWS, UNIT_COLUMNS = 16, 256
UNIT_CODES = UNIT_ROWS * UNIT_COLUMNS // 2  # bytes; the scales follow
BLOCK_OF = {"nvfp4": NVFP4_BLOCK, "mxfp4": MXFP4_BLOCK}
CODE_BITS = {
    "nvfp4": ((7, 3, 2, 1), (0, 6, 5, 4), (15, 11, 10, 9), (8, 14, 13, 12)),
    "mxfp4": ((15, 8, 7, 6), (12, 5, 4, 3), (9, 2, 1, 0), (14, 11, 10, 13)),
}
BOTH_HALVES = 0x00010001  # a bit of the even column's code and the same bit of the odd one's

# Records of cached rows, in bytes. A KV row of 512: 448 e4m3 codes of the dims without RoPE, the 64 turned
# dims in bf16, one e8m0 scale for each 64 codes, zeros up to a multiple of 16. An index key of 128: two e2m1
# codes a byte, the even dim in the low half, then one e8m0 scale for each 32 codes.
KV_RECORD, KV_CODES, KV_ROPE, KV_BLOCK = 592, 448, 64, 64
INDEX_RECORD, INDEX_CODES = 68, 128
MAX_STEP = 8  # tokens that work on the tables as they are stored; a window ring has so many rows more, less 1


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


class Packed(NamedTuple):
    """A 4-bit matrix [N, K] as the matrix kernels read it: ``data`` [units, 2304 (nvfp4) or 2176 (mxfp4)] u8.

    A unit has 16 rows and 256 columns, padded with zero codes and zero scales; units stand row tile by row
    tile, ascending in K within it. Lane 4 g + t of a warp owns rows g and g + 8 and, of each 64 columns, the
    16 from 16 t on. First the codes, 4 pieces (64 columns) x 32 lanes x 4 words; word i holds the lane's
    columns 4 i .. + 3, in its low half columns 0 of row g, 0 of row g + 8, 2 of row g, 2 of row g + 8 on the
    bits of ``CODE_BITS``, in its high half columns 1 and 3 likewise. Then the scales: bytes [g, lanes of a
    scale, piece, (row g, row g + 8)], where a scale belongs to one t (nvfp4) or two (mxfp4). ``kind`` is
    "nvfp4" or "mxfp4"; ``gs`` and ``in_gs`` are an Nvfp4's
    ``w_gs`` and ``in_gs``, None of an Mxfp4.
    """

    kind: str
    data: Tensor
    gs: Tensor | None
    n: int
    k: int
    in_gs: Tensor | None = None


Bare = Plain | Nvfp4 | Mxfp4 | Fp8Block | Packed


class Memo(NamedTuple):
    """A weight on the CPU whose unscaled matrix may be kept in ``cache`` under ``key``."""

    weight: Bare
    cache: "MatrixCache"
    key: int


Weight = Bare | Memo


class MatrixCache:
    """fp32 matrices of a CPU model, kept until ``limit_bytes`` are used.

    Nothing is evicted: a decode step walks the layers in a circle, where replacing the least
    recently used matrix would always drop the one needed next.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.free_bytes = limit_bytes
        self._kept: dict[int, Tensor] = {}
        self._keys = 0

    def wrap(self, weight: Bare) -> Memo:
        self._keys += 1
        return Memo(weight, self, self._keys)

    def matrix(self, memo: Memo) -> Tensor:
        kept = self._kept.get(memo.key)
        if kept is None:
            kept = _matrix(memo.weight)
            size = kept.numel() * kept.element_size()
            if size <= self.free_bytes:
                self._kept[memo.key] = kept
                self.free_bytes -= size
        return kept


def stored(weight: Weight) -> Bare:
    """The weight itself, without the CPU cache around it."""
    return weight.weight if isinstance(weight, Memo) else weight


def is_nvfp4(weight: Weight) -> bool:
    """Whether the weight is NVFP4, stored or packed: it has an ``in_gs`` and may meet NVFP4 activations."""
    weight = stored(weight)
    return isinstance(weight, Nvfp4) or (isinstance(weight, Packed) and weight.kind == "nvfp4")


def shape_of(weight: Weight) -> tuple[int, int]:
    """The logical shape (N, K)."""
    weight = stored(weight)
    if isinstance(weight, Packed):
        return weight.n, weight.k
    n, k = weight.w.shape
    return (n, 2 * k) if isinstance(weight, Nvfp4 | Mxfp4) else (n, k)


def nbytes(weight: Weight) -> int:
    """Bytes held by every tensor of the weight."""
    parts = [part for part in stored(weight) if isinstance(part, Tensor)]
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
    if isinstance(inner, Packed):
        return matrix, inner.gs
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


def decode_rows(table: Tensor) -> Tensor:
    """The values of cached rows: records [..., 592] or [..., 68] u8 -> [..., 512] or [..., 128] bf16, exact.

    Plain rows are returned as they are. An index key stays rotated by its Hadamard transform.
    """
    if table.dtype != torch.uint8:
        return table
    if table.shape[-1] == INDEX_RECORD:
        codes, scales = table[..., : INDEX_CODES // 2], table[..., INDEX_CODES // 2 :]
        return _blockwise(unpack_e2m1(codes), e8m0_to_float(scales.contiguous()), MXFP4_BLOCK).bfloat16()
    width = table.shape[-1]
    assert width == KV_RECORD, f"rows: expected {KV_RECORD} or {INDEX_RECORD} bytes, found {width}"
    at_rope, at_scales = KV_CODES, KV_CODES + 2 * KV_ROPE
    codes = table[..., :at_rope].contiguous().view(torch.float8_e4m3fn).float()
    rope = table[..., at_rope:at_scales].contiguous().view(torch.bfloat16)
    scales = e8m0_to_float(table[..., at_scales : at_scales + KV_CODES // KV_BLOCK].contiguous())
    return torch.cat((_blockwise(codes, scales, KV_BLOCK).bfloat16(), rope), dim=-1)


def packed_shape(kind: str, n: int, k: int) -> tuple[int, int]:
    """Units of a packed matrix [n, k], and bytes of one: the shape of ``Packed.data``."""
    units = -(-n // UNIT_ROWS) * -(-k // UNIT_COLUMNS)
    return units, UNIT_CODES + UNIT_ROWS * UNIT_COLUMNS // BLOCK_OF[kind]


def unpack(weight: Packed) -> Nvfp4 | Mxfp4:
    """The weight as it was stored, bit by bit."""
    block = BLOCK_OF[weight.kind]
    tiles, across = -(-weight.n // UNIT_ROWS), -(-weight.k // UNIT_COLUMNS)
    words = weight.data[:, :UNIT_CODES].contiguous().view(torch.int32).view(tiles, across, 4, 8, 4, 4)
    codes = unpack_words(words, weight.kind)  # [row tile, unit, piece, g, t, i, column pair, row g or g + 8]
    codes = codes.permute(0, 7, 3, 1, 2, 4, 5, 6).reshape(tiles * UNIT_ROWS, across * UNIT_COLUMNS // 2)
    scales = weight.data[:, UNIT_CODES:].reshape(tiles, across, 8, UNIT_COLUMNS // block // 4, 4, 2)
    scales = scales.permute(0, 5, 2, 1, 4, 3).reshape(tiles * UNIT_ROWS, across * UNIT_COLUMNS // block)
    w = codes[: weight.n, : weight.k // 2].contiguous()
    w_sf = scales[: weight.n, : weight.k // block].contiguous()
    if weight.kind == "nvfp4":
        return Nvfp4(w, w_sf.view(torch.float8_e4m3fn), weight.gs, weight.in_gs)
    return Mxfp4(w, w_sf.view(torch.float8_e8m0fnu))


def unpack_words(words: Tensor, kind: str) -> Tensor:
    """Packed words [...] i32 -> bytes of codes [..., 2, 2] u8: columns 0, 1 or 2, 3; row g or row g + 8."""
    codes = []
    for bits in CODE_BITS[kind]:
        pair = torch.zeros_like(words)  # of codes: the even column's in the low half, the odd one's above
        for place, bit in zip(bits, (3, 2, 1, 0), strict=True):
            pair |= ((words >> place) & BOTH_HALVES) << bit
        codes.append(((pair | pair >> 12) & 0xFF).to(torch.uint8))
    return torch.stack(codes, dim=-1).unflatten(-1, (2, 2))


def _matrix(weight: Bare) -> Tensor:
    if isinstance(weight, Plain):
        return weight.w.float()
    if isinstance(weight, Packed):
        weight = unpack(weight)
    if isinstance(weight, Nvfp4):
        return _blockwise(unpack_e2m1(weight.w), weight.w_sf.float(), NVFP4_BLOCK)
    if isinstance(weight, Mxfp4):
        return _blockwise(unpack_e2m1(weight.w), e8m0_to_float(weight.w_sf), MXFP4_BLOCK)
    n, k = weight.w.shape
    scale = weight.w_sf if weight.w_sf.dtype == torch.float32 else e8m0_to_float(weight.w_sf)
    rows = scale.repeat_interleave(FP8_BLOCK, dim=0)[:n]
    return weight.w.float() * rows.repeat_interleave(FP8_BLOCK, dim=1)[:, :k]


def _blockwise(values: Tensor, scale: Tensor, block: int) -> Tensor:
    """values [..., K] times scale [..., K/block]."""
    return (values.unflatten(-1, (-1, block)) * scale.unsqueeze(-1)).flatten(-2)
