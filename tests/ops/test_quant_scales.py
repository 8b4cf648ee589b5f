"""FP8 and MXFP4 with power-of-two scales, the KV rounding and the indexer's Hadamard and FP4 rounding."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from codes import E2M1, E4M3, above, below, bits, brute_codes, brute_exponent, f32, nibbles
from torch import Tensor

from dsv4.ops import quant
from dsv4.ops.dispatch import use_reference
from dsv4.ops.formats import e8m0_to_float

Normal = Callable[..., Tensor]


@pytest.mark.parametrize("exponent", [-126, -125, -20, -1, 0, 1, 20, 124])
def test_mxfp4_scale_steps(exponent: int) -> None:
    """Exactly 6 * 2^e has the scale 2^e; the next number above has twice that."""
    edge = math.ldexp(6.0, exponent)
    x = torch.zeros(3, 32)
    x[:, 9] = f32(below(edge), edge, above(edge))
    codes, scale = quant.quantize_mxfp4(x)
    assert scale.dtype == torch.float8_e8m0fnu
    assert bits(scale).flatten().tolist() == [127 + exponent, 127 + exponent, 128 + exponent]
    assert [nibbles(row)[9] for row in codes] == [7, 7, 5]


def test_mxfp4_floor() -> None:
    x = torch.zeros(2, 32)
    x[1, 0] = 2.0**-130
    codes, scale = quant.quantize_mxfp4(x)
    assert bits(scale).tolist() == [[1], [1]] and not codes.any()


@pytest.mark.parametrize("exponent", [-22, -21, -3, 0, 5, 110])
def test_fp8_scale_steps(exponent: int) -> None:
    edge = math.ldexp(448.0, exponent)
    x = torch.zeros(3, 128)
    x[:, 100] = f32(below(edge), edge, -above(edge))
    codes, scale = quant.quantize_fp8(x)
    assert bits(scale).flatten().tolist() == [127 + exponent, 127 + exponent, 128 + exponent]
    assert bits(codes)[:, 100].tolist() == [0x7E, 0x7E, 0xF6]  # 448, 448, -224
    whole, blocks = quant.quantize_fp8_block(x)
    assert torch.equal(bits(whole), bits((x / e8m0_to_float(blocks)).to(torch.float8_e4m3fn)))
    assert bits(blocks).tolist() == [[128 + exponent]]


@pytest.mark.parametrize("value", [0.0, 1e-30, 9.9e-5, 1e-4])
def test_fp8_floor(value: float) -> None:
    """The floor 1e-4: 1e-4 / 448 = 2.2e-7 lies between 2^-23 and 2^-22, byte 127 - 22."""
    for quantise in (quant.quantize_fp8, quant.quantize_fp8_block):
        codes, scale = quantise(torch.full((1, 128), value))
        assert bits(scale).tolist() == [[105]]
        assert bits(codes)[0, 0] == brute_codes(np.float32([value * 2.0**22]), E4M3, 128)[0]


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("width", [64, 128, 200, 448, 1])
def test_fp8_brute_force(normal: Normal, block: int, width: int) -> None:
    """Partial last blocks included: their scale is that of the values which are there."""
    x = normal(9, width) * torch.exp2(6 * normal(9, 1))
    x[0, width // 64 * 64 :] = 0
    codes, scale = quant.quantize_fp8(x, block=block)
    parts = [part.numpy() for part in x.split(block, -1)]
    amax = np.stack([np.abs(part).max(-1) for part in parts], -1)
    exponent = brute_exponent(np.maximum(amax, np.float32(1e-4)), 448)
    assert np.array_equal(bits(scale).numpy(), exponent) and codes.is_contiguous()
    spread = np.repeat(np.exp2(exponent - 127.0), block, -1)[:, :width]
    expected = brute_codes(x.numpy() / spread, E4M3, 128)
    assert np.array_equal(bits(codes).numpy(), expected)
    kept = np.where(expected >> 7, -1, 1) * E4M3[expected & 127] * spread
    assert torch.equal(bits(quant.round_fp8(x, block=block)), bits(torch.from_numpy(kept).float()))


@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (130, 200), (1, 1), (512, 64)])
def test_fp8_block_brute_force(normal: Normal, shape: tuple[int, int]) -> None:
    x = normal(*shape) * torch.exp2(4 * normal(shape[0], 1))
    codes, scale = quant.quantize_fp8_block(x)
    assert scale.shape == (math.ceil(shape[0] / 128), math.ceil(shape[1] / 128)) and codes.is_contiguous()
    for row, band in enumerate(x.split(128)):
        for column, block in enumerate(band.split(128, 1)):
            exponent = brute_exponent(block.abs().amax().clamp(min=1e-4).numpy(), 448)
            own = codes[row * 128 :, column * 128 :][: block.shape[0], : block.shape[1]]
            assert bits(scale)[row, column] == exponent
            expected = brute_codes(block.numpy() / np.exp2(exponent - 127.0), E4M3, 128)
            assert np.array_equal(bits(own).numpy(), expected)


def test_mxfp4_brute_force(normal: Normal) -> None:
    x = normal(40, 96) * torch.exp2(6 * normal(40, 1))
    codes, scale = quant.quantize_mxfp4(x)
    blocks = x.numpy().reshape(40, 3, 32)
    exponent = brute_exponent(np.abs(blocks).max(-1), 6)
    assert np.array_equal(bits(scale).numpy(), exponent)
    values = blocks / np.exp2(exponent - 127.0)[..., None]
    assert nibbles(codes) == brute_codes(values, E2M1, 8).ravel().tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_kv(normal: Normal, dtype: torch.dtype) -> None:
    """Blocks of 64 over the first 448 values; the 64 with RoPE keep every bit, NaN and -0 included."""
    kv = (normal(5, 3, 512) * torch.exp2(6 * normal(5, 3, 8)).repeat_interleave(64, -1)).to(dtype)
    kv[0, 0, 448:451] = torch.tensor([-0.0, math.nan, 1e-30], dtype=dtype)
    rounded = quant.round_kv(kv, rope_dim=64)
    assert rounded.dtype == dtype and torch.equal(bits(rounded[..., 448:]), bits(kv[..., 448:]))
    for start in range(0, 448, 64):
        own = kv[..., start : start + 64]
        assert torch.equal(rounded[..., start : start + 64], quant.round_fp8(own, block=64))
    assert not torch.equal(rounded[..., :448], kv[..., :448])
    assert torch.equal(bits(quant.round_kv(rounded, rope_dim=64)), bits(rounded))


def sylvester(size: int) -> Tensor:
    """+1 where the row and column indices share an even number of set bits, else -1."""
    return torch.tensor([[1.0 - 2 * ((i & j).bit_count() % 2) for j in range(size)] for i in range(size)])


@pytest.mark.parametrize("size", [1, 2, 4, 16, 64, 128])
def test_hadamard(rng: np.random.Generator, size: int) -> None:
    """Whole numbers, so that the sums are exact and only the factor size^-0.5 rounds."""
    x = torch.from_numpy(rng.integers(-50, 50, (6, size))).float()
    rotated = quant.rotate_hadamard(x)
    assert torch.equal(rotated, (x @ sylvester(size)) * size**-0.5)
    assert torch.allclose(quant.rotate_hadamard(rotated), x, rtol=0, atol=1e-4)
    assert quant.rotate_hadamard(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_index(rng: np.random.Generator, dtype: torch.dtype) -> None:
    x = torch.from_numpy(rng.integers(-40, 40, (30, 128))).to(dtype)
    rotated = ((x.float() @ sylvester(128)) * 128**-0.5).to(dtype).float().numpy().reshape(30, 4, 32)
    scale = np.exp2(brute_exponent(np.abs(rotated).max(-1), 6) - 127.0)[..., None]
    codes = brute_codes(rotated / scale, E2M1, 8)
    expected = np.where(codes >> 3, -1, 1) * E2M1[codes & 7] * scale
    rounded = quant.round_index(x)
    assert rounded.dtype == dtype and np.array_equal(rounded.float().numpy(), expected.reshape(30, 128))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_references_give_the_same_bits_on_cuda(normal: Normal) -> None:
    x = normal(64, 512) * torch.exp2(6 * normal(64, 1))
    x[0, :48] = f32(6.0, 448.0, 2688.0).repeat_interleave(16)
    scale = quant.nvfp4_global_scale(x, per_token=True)
    calls: list[Callable[[Tensor], Tensor | tuple[Tensor, ...]]] = [
        lambda t: quant.nvfp4_global_scale(t, per_token=True),
        lambda t: quant.quantize_nvfp4(t, scale.to(t.device)),
        quant.quantize_mxfp4,
        quant.quantize_fp8,
        quant.quantize_fp8_block,
        quant.round_index,
        lambda t: quant.round_kv(t, rope_dim=64),
    ]
    with use_reference("quant"):
        for number, call in enumerate(calls):
            pairs = [out if isinstance(out, tuple) else (out,) for out in (call(x), call(x.cuda()))]
            for own, other in zip(*pairs, strict=True):
                assert torch.equal(bits(own), bits(other.cpu())), number
