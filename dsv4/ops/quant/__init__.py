"""Quantisation: NVFP4, MXFP4, FP8 blocks, and the roundings the model was trained with.

Rounding is to nearest, ties to even, everywhere; values above the largest code saturate.
"""

from torch import Tensor

from dsv4.ops.dispatch import op
from dsv4.ops.formats import FP8_BLOCK
from dsv4.ops.quant import reference


@op(reference.pack_e2m1)
def pack_e2m1(x: Tensor) -> Tensor:
    """Round to e2m1 and pack: x [..., K] f32 -> [..., K/2] u8, element 2k in the low nibble.

    Magnitudes 0, .5, 1, 1.5, 2, 3, 4, 6; saturates at 6; the sign of zero is kept. Source: docs/model.md 4.1.
    """


@op(reference.round_e4m3)
def round_e4m3(x: Tensor) -> Tensor:
    """Round to e4m3, saturating at 448: x [...] f32 -> [...] e4m3. Source: docs/model.md 4.1."""


@op(reference.nvfp4_global_scale)
def nvfp4_global_scale(x: Tensor, *, per_token: bool) -> Tensor:
    """amax(|x|) / 2688 in fp32: of each row ([..., K] -> [..., 1]) or of the whole tensor ([]).

    Source: docs/model.md 4.2.
    """


@op(reference.quantize_nvfp4)
def quantize_nvfp4(x: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor]:
    """NVFP4 codes and block scales for a given global scale.

    x [..., K], K a multiple of 16; global_scale f32, [] or broadcastable to [..., K/16].
    Returns codes [..., K/2] u8 and block scales [..., K/16] e4m3, with fp32 divisions in the order
    sf = e4m3(amax16 / 6 / gs), code = e2m1(x / (sf * gs)). A block whose scale rounds to zero, and a row
    whose global scale is zero, gets zero codes. Source: docs/model.md 4.2.
    """


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


@op(reference.quantize_fp8)
def quantize_fp8(x: Tensor, *, block: int = FP8_BLOCK) -> tuple[Tensor, Tensor]:
    """FP8 activations: x [..., K] -> codes [..., K] e4m3, scales [..., K/block] e8m0 (rounded up).

    scale = 2^ceil(log2(max(amax, 1e-4) / 448)) of each row's block. Source: docs/model.md 2.13 (fp8lin128).
    """


@op(reference.round_fp8)
def round_fp8(x: Tensor, *, block: int = FP8_BLOCK) -> Tensor:
    """The values that ``quantize_fp8`` keeps: x [..., K] -> [..., K] in x's dtype.

    Source: docs/model.md 2.13 (fp8lin128).
    """


@op(reference.round_kv)
def round_kv(kv: Tensor, *, rope_dim: int, block: int = 64) -> Tensor:
    """FP8 rounding of a KV row's part without RoPE: kv [..., Dh], the last ``rope_dim`` values untouched.

    Source: docs/model.md 2.13 (fp8sim64).
    """


@op(reference.rotate_hadamard)
def rotate_hadamard(x: Tensor) -> Tensor:
    """Walsh-Hadamard transform in Sylvester order times Di^-0.5: x [..., Di], Di a power of two.

    Source: docs/model.md 2.11.
    """


@op(reference.round_index)
def round_index(x: Tensor) -> Tensor:
    """Hadamard rotation, then FP4 rounding by blocks of 32 with power-of-two scales: x [..., Di], same dtype.

    Source: docs/model.md 2.11 and 2.13 (fp4sim32).
    """
