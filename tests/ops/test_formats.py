"""The weight types: shapes, sizes, what products read, and the CPU cache of dequantised matrices."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dsv4.ops import quant
from dsv4.ops.formats import (
    Fp8Block,
    MatrixCache,
    Memo,
    Mxfp4,
    Nvfp4,
    Plain,
    dequantize,
    nbytes,
    shape_of,
    stored,
    unscaled,
)

Normal = Callable[..., Tensor]


def e8m0(*exponents: int) -> Tensor:
    return torch.tensor([127 + e for e in exponents], dtype=torch.uint8).view(torch.float8_e8m0fnu)


def nvfp4(w: Tensor) -> Nvfp4:
    gs = quant.nvfp4_global_scale(w, per_token=False)
    return Nvfp4(*quant.quantize_nvfp4(w, gs), gs)


def test_nvfp4_by_hand() -> None:
    """Two rows of 32: code 2 (1.0) except for one -6 at [1, 17]; four block scales; global scale 0.5."""
    w = torch.full((2, 16), 0x22, dtype=torch.uint8)
    w[1, 8] = 0xF2
    w_sf = torch.tensor([[1.0, 448.0], [2.0**-9, 1.5]]).to(torch.float8_e4m3fn)
    weight = Nvfp4(w, w_sf, torch.tensor(0.5), torch.tensor(3.0))
    block_scaled = torch.tensor([[1.0, 448.0], [2.0**-9, 1.5]]).repeat_interleave(16, 1)
    block_scaled[1, 17] = -9.0
    matrix, global_scale = unscaled(weight)
    assert torch.equal(matrix, block_scaled) and global_scale is weight.w_gs
    assert torch.equal(dequantize(weight), block_scaled / 2)
    assert shape_of(weight) == (2, 32) and nbytes(weight) == 32 + 4 + 4 + 4
    assert nbytes(weight._replace(in_gs=None)) == 40


@pytest.mark.parametrize("code_dtype", [torch.uint8, torch.int8])
def test_mxfp4_by_hand(code_dtype: torch.dtype) -> None:
    """Code 0xA7: the low nibble 7 is 6.0, the high nibble 10 is -1.0; negative as int8."""
    w = torch.full((2, 32), 0xA7, dtype=torch.uint8).view(code_dtype)
    weight = Mxfp4(w, e8m0(0, -3, 10, -127).view(2, 2))
    scale = torch.tensor([[1.0, 0.125], [1024.0, 2.0**-127]]).repeat_interleave(32, 1)
    matrix, global_scale = unscaled(weight)
    assert torch.equal(matrix, torch.tensor([6.0, -1.0]).repeat(32) * scale) and global_scale is None
    assert torch.equal(dequantize(weight), matrix)
    assert shape_of(weight) == (2, 64) and nbytes(weight) == 64 + 4


@pytest.mark.parametrize("shape", [(256, 256), (130, 200), (128, 129)])
@pytest.mark.parametrize("scales", ["e8m0", "u8", "f32"])
def test_fp8_blocks(shape: tuple[int, int], scales: str) -> None:
    """Block (i, j) is multiplied by its own scale, also where the last blocks are cut off."""
    n, k = shape
    w = (torch.arange(n * k).remainder(17) - 8).view(n, k).to(torch.float8_e4m3fn)
    exponents = e8m0(3, -2, 5, -7).view(2, 2)[: math.ceil(n / 128), : math.ceil(k / 128)]
    w_sf = {"e8m0": exponents, "u8": exponents.view(torch.uint8), "f32": exponents.float() * 1.25}[scales]
    matrix, global_scale = unscaled(Fp8Block(w, w_sf))
    factor = 1.25 if scales == "f32" else 1.0
    for row, column in ((0, 0), (0, k - 1), (n - 1, 0), (n - 1, k - 1), (127, 127), (n - 1, 128)):
        power = 2.0 ** [[3, -2], [5, -7]][row // 128][column // 128]
        assert float(matrix[row, column]) == float(w[row, column]) * power * factor
    assert matrix.shape == shape_of(Fp8Block(w, w_sf)) == shape and global_scale is None
    assert nbytes(Fp8Block(w, w_sf)) == n * k + w_sf.numel() * (4 if scales == "f32" else 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_plain(normal: Normal, dtype: torch.dtype) -> None:
    weight = Plain(normal(3, 5).to(dtype))
    matrix, global_scale = unscaled(weight)
    assert matrix.dtype == torch.float32 and torch.equal(matrix, weight.w.float()) and global_scale is None
    assert shape_of(weight) == (3, 5) and nbytes(weight) == 15 * dtype.itemsize


def test_quantised_weights_come_back(normal: Normal) -> None:
    """Every value within half a step at the top of its block, the step being as coarse as a scale may be."""
    w = normal(256, 256)
    formats = {
        "nvfp4": (nvfp4(w), 16, 17 / 16 / 6),  # an e4m3 scale is off by up to 1/16
        "mxfp4": (Mxfp4(*quant.quantize_mxfp4(w)), 32, 1 / 3),
        "fp8": (Fp8Block(*quant.quantize_fp8_block(w)), 128, 1 / 16),
    }
    for name, (weight, block, relative) in formats.items():
        error, top = ((x.abs().unflatten(-1, (-1, block)).amax(-1)) for x in (dequantize(weight) - w, w))
        assert (error <= relative * top).all() and float(error.max()) > 0, name


def test_memo_is_the_weight(normal: Normal) -> None:
    weight = nvfp4(normal(4, 32))
    memo = MatrixCache(10**6).wrap(weight)
    assert isinstance(memo, Memo) and stored(memo) is weight and stored(weight) is weight
    assert (shape_of(memo), nbytes(memo)) == (shape_of(weight), nbytes(weight))
    assert torch.equal(dequantize(memo), dequantize(weight)) and unscaled(memo)[1] is weight.w_gs


def test_cache_keeps_up_to_its_limit_and_evicts_nothing(normal: Normal) -> None:
    """512 bytes a matrix and room for two and a half: the third is never kept, a small one still is."""
    cache = MatrixCache(2 * 512 + 256)
    first, second, third = (cache.wrap(nvfp4(normal(4, 32))) for _ in range(3))
    small = cache.wrap(nvfp4(normal(2, 32)))
    assert cache.free_bytes == 1280
    kept = [unscaled(memo)[0] for memo in (first, second)]
    assert cache.free_bytes == 256
    for _ in range(2):
        assert torch.equal(unscaled(third)[0], unscaled(third.weight)[0])
        assert unscaled(third)[0] is not unscaled(third)[0]
    assert cache.free_bytes == 256 and unscaled(small)[0] is unscaled(small)[0] and cache.free_bytes == 0
    assert [unscaled(memo)[0] is matrix for memo, matrix in zip((first, second), kept, strict=True)] == [
        True
    ] * 2


def test_cache_without_room_keeps_nothing(normal: Normal) -> None:
    memo = MatrixCache(0).wrap(nvfp4(normal(2, 16)))
    assert unscaled(memo)[0] is not unscaled(memo)[0] and memo.cache.free_bytes == 0
