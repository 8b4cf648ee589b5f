"""Quantisation: NVFP4, MXFP4, FP8 blocks, and the roundings the model was trained with.

Rounding is to nearest, ties to even, everywhere; values above the largest code saturate. What activations go
through has kernels; what only weights do, while they are loaded (MXFP4, FP8 blocks of 128 x 128), has none.
"""

import torch
from torch import Tensor

from dsv4 import _C
from dsv4.ops.checks import FLOATS, Shapes
from dsv4.ops.dispatch import op
from dsv4.ops.formats import FP8_BLOCK, NVFP4_BLOCK
from dsv4.ops.quant import reference


@op(reference.pack_e2m1)
def pack_e2m1(x: Tensor) -> Tensor:
    """Round to e2m1 and pack: x [..., K] f32 -> [..., K/2] u8, element 2k in the low nibble.

    Magnitudes 0, .5, 1, 1.5, 2, 3, 4, 6; saturates at 6; the sign of zero is kept. Source: docs/model.md 4.1.
    """


@op(reference.round_e4m3)
def round_e4m3(x: Tensor) -> Tensor:
    """Round to e4m3, saturating at 448: x [...] f32 -> [...] e4m3. Source: docs/model.md 4.1."""


@op(reference.nvfp4_global_scale, kernel=True)
def nvfp4_global_scale(x: Tensor, *, per_token: bool) -> Tensor:
    """amax(|x|) / 2688 in fp32: of each row ([..., K] -> [..., 1]) or of the whole tensor ([]).

    Source: docs/model.md 4.2.
    """
    rows, width = _rows(x)
    assert width and (rows or per_token), f"x: expected values to take the largest of, found {list(x.shape)}"
    out = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    if rows:
        _C.nvfp4_global_scale(x, out, rows, width, reference.E2M1_MAX * reference.E4M3_MAX)
    if per_token:
        return out
    # Division is monotonic, so the largest of the rows' scales is the scale of the largest value.
    whole = torch.empty((), dtype=torch.float32, device=x.device)
    _C.nvfp4_global_scale(out, whole, 1, rows, 1.0)
    return whole


@op(reference.quantize_nvfp4, kernel=True)
def quantize_nvfp4(x: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor]:
    """NVFP4 codes and block scales for a given global scale.

    x [..., K], K a multiple of 16; global_scale f32, [] or of each row [..., 1].
    Returns codes [..., K/2] u8 and block scales [..., K/16] e4m3, with fp32 divisions in the order
    sf = e4m3(amax16 / 6 / gs), code = e2m1(x / (sf * gs)). A block whose scale rounds to zero, and a row
    whose global scale is zero, gets zero codes. Source: docs/model.md 4.2.
    """
    rows, width = _rows(x)
    per_row = _is_per_row(global_scale, x)
    codes, scales = _nvfp4_outputs(x)
    if x.numel():
        _C.quantize_nvfp4(x, global_scale, codes, scales, rows, width, per_row)
    return codes, scales


@op(reference.quantize_nvfp4_tokens, kernel=True)
def quantize_nvfp4_tokens(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``nvfp4_global_scale`` of each row and ``quantize_nvfp4`` with it, in one pass over x.

    x [..., K], K a multiple of 16 -> codes [..., K/2] u8, block scales [..., K/16] e4m3, global scales
    [..., 1] f32. Source: docs/model.md 2.13, 4.2.
    """
    rows, width = _rows(x)
    codes, scales = _nvfp4_outputs(x)
    global_scale = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    if x.numel():
        _C.quantize_nvfp4_tokens(x, codes, scales, global_scale, rows, width)
    return codes, scales, global_scale


@op(reference.round_nvfp4, kernel=True)
def round_nvfp4(x: Tensor, global_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What a matrix product reads of NVFP4 activations: x [..., K], K a multiple of 16.

    Returns code x block scale of ``quantize_nvfp4``, exact in x's dtype [..., K], and the global scale of
    each row [..., 1] f32, which multiplies the sums: the given one ([] or [..., 1]), or amax(|row|) / 2688
    where none is given. Source: docs/model.md 2.13, 4.2.
    """
    rows, width = _rows(x)
    assert width and width % NVFP4_BLOCK == 0, f"x: expected rows of a multiple of 16, found {list(x.shape)}"
    per_row = global_scale is not None and _is_per_row(global_scale, x)
    out = torch.empty_like(x)
    scales = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    if rows:
        _C.round_nvfp4(x, global_scale, out, scales, rows, width, per_row)
    return out, scales


@op(reference.quantize_mxfp4)
def quantize_mxfp4(x: Tensor) -> tuple[Tensor, Tensor]:
    """MXFP4: x [..., K], K a multiple of 32 -> codes [..., K/2] u8, scales [..., K/32] e8m0.

    scale = 2^ceil(log2(max(amax, 6 * 2^-126) / 6)), so nothing saturates. Source: docs/model.md 4.1.
    """


@op(reference.quantize_fp8_block)
def quantize_fp8_block(w: Tensor) -> tuple[Tensor, Tensor]:
    """FP8 weight blocks of 128 x 128: w [N, K] -> codes [N, K] e4m3, scales [N/128, K/128] e8m0 (rounded up).

    scale = 2^ceil(log2(max(amax, 1e-4) / 448)). Source: docs/model.md 4.1.
    """


@op(reference.quantize_fp8, kernel=True)
def quantize_fp8(x: Tensor, *, block: int = FP8_BLOCK) -> tuple[Tensor, Tensor]:
    """FP8 activations: x [..., K] -> codes [..., K] e4m3, scales [..., K/block] e8m0 (rounded up).

    scale = 2^ceil(log2(max(amax, 1e-4) / 448)) of each row's block. Source: docs/model.md 2.13 (fp8lin128).
    """
    rows, width = _rows(x)
    codes = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    blocks = -(-width // block)
    scales = torch.empty(*x.shape[:-1], blocks, dtype=torch.float8_e8m0fnu, device=x.device)
    if x.numel():
        _C.quantize_fp8(x, codes, scales, rows, width, block)
    return codes, scales


@op(reference.round_fp8, kernel=True)
def round_fp8(x: Tensor, *, block: int = FP8_BLOCK) -> Tensor:
    """The values that ``quantize_fp8`` keeps: x [..., K] -> [..., K] in x's dtype.

    Source: docs/model.md 2.13 (fp8lin128).
    """
    rows, width = _rows(x)
    out = torch.empty_like(x)
    if x.numel():
        _C.round_fp8(x, out, rows, width, block)
    return out


@op(reference.round_kv, kernel=True)
def round_kv(kv: Tensor, *, rope_dim: int, block: int = 64) -> Tensor:
    """FP8 rounding of a KV row's part without RoPE: kv [..., Dh], the last ``rope_dim`` values untouched.

    Source: docs/model.md 2.13 (fp8sim64).
    """
    rows, width = _rows(kv, "kv")
    assert 0 <= rope_dim <= width, f"rope_dim: expected 0 .. {width}, found {rope_dim}"
    out = torch.empty_like(kv)
    if kv.numel():
        _C.round_kv(kv, out, rows, width, rope_dim, block)
    return out


@op(reference.rotate_hadamard, kernel=True)
def rotate_hadamard(x: Tensor) -> Tensor:
    """Walsh-Hadamard transform in Sylvester order times Di^-0.5: x [..., Di], Di a power of two.

    Source: docs/model.md 2.11.
    """
    rows, width = _hadamard_rows(x)
    out = torch.empty_like(x)
    if x.numel():
        _C.rotate_hadamard(x, out, rows, width, width**-0.5)
    return out


@op(reference.round_index, kernel=True)
def round_index(x: Tensor) -> Tensor:
    """Hadamard rotation, then FP4 rounding by blocks of 32 with power-of-two scales: x [..., Di], same dtype.

    Source: docs/model.md 2.11 and 2.13 (fp4sim32).
    """
    rows, width = _hadamard_rows(x)
    out = torch.empty_like(x)
    if x.numel():
        _C.round_index(x, out, rows, width, width**-0.5)
    return out


def _rows(x: Tensor, name: str = "x") -> tuple[int, int]:
    """The number of rows of x [..., K], and K."""
    shapes = Shapes()
    shapes.check(name, x, "... K", FLOATS)
    return x.shape[:-1].numel(), shapes["K"]


def _is_per_row(global_scale: Tensor, x: Tensor) -> bool:
    """Whether a checked global scale is one of each row of x, [..., 1], or a single one, []."""
    Shapes().check("global_scale", global_scale, "...", torch.float32)
    per_row = global_scale.dim() > 0
    assert not per_row or global_scale.shape == (*x.shape[:-1], 1), (
        f"global_scale: expected [] or {[*x.shape[:-1], 1]}, found {list(global_scale.shape)}"
    )
    return per_row


def _hadamard_rows(x: Tensor) -> tuple[int, int]:
    rows, width = _rows(x)
    assert width in (32, 64, 128, 256), f"x: expected rows of 32, 64, 128 or 256, found {list(x.shape)}"
    return rows, width


def _nvfp4_outputs(x: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for codes [..., K/2] u8 and block scales [..., K/16] e4m3."""
    *rows, width = x.shape
    assert width % NVFP4_BLOCK == 0, f"x: expected rows of a multiple of 16, found {list(x.shape)}"
    codes = torch.empty(*rows, width // 2, dtype=torch.uint8, device=x.device)
    return codes, torch.empty(*rows, width // NVFP4_BLOCK, dtype=torch.float8_e4m3fn, device=x.device)
