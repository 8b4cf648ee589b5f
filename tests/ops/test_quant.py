"""The quantisers: literal codes at every edge, and a brute force in numpy that shares no code with them."""

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv4.ops import quant
from dsv4.ops.dispatch import use_reference
from dsv4.ops.formats import e8m0_to_float, unpack_e2m1

Normal = Callable[..., Tensor]

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
# Sign-less e4m3, decoded by hand: bias 7, 3 bits of mantissa, no infinity, 0x7f is NaN.
E4M3 = np.array([(c & 7) * 2.0**-9 if c < 8 else (8 + (c & 7)) * 2.0 ** ((c >> 3) - 10) for c in range(127)])
TINY = 2.0**-9  # the smallest e4m3 magnitude


def f32(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def above(value: float) -> float:
    return float(np.nextafter(np.float32(value), np.float32(np.inf)))


def below(value: float) -> float:
    return float(np.nextafter(np.float32(value), np.float32(-np.inf)))


def bits(x: Tensor) -> Tensor:
    """The bytes of a tensor, so that -0, NaN and the dtypes without arithmetic compare too."""
    return x.contiguous().view(torch.uint8)


def nibbles(packed: Tensor) -> list[int]:
    return [code for byte in packed.flatten().tolist() for code in (byte & 15, byte >> 4)]


def brute_codes(x: np.ndarray, table: np.ndarray, sign_bit: int) -> np.ndarray:
    """Codes of the nearest table entries, of two equally near ones the even code; the ends saturate."""
    distance = np.abs(np.abs(x).astype(np.float64)[..., None] - table)
    near = distance == distance.min(-1, keepdims=True)
    even = near & (np.arange(len(table)) % 2 == 0)
    best = np.where(even.any(-1), even.argmax(-1), near.argmax(-1))
    return best + sign_bit * np.signbit(x)


def brute_exponent(amax: np.ndarray, top: float) -> np.ndarray:
    """The e8m0 bytes of the smallest powers of two at least fp32(amax / top), in exact arithmetic."""
    ratios = (amax.astype(np.float32) / np.float32(top)).ravel()
    exact = [next(e for e in range(-127, 128) if Fraction(2) ** e >= Fraction(float(r))) for r in ratios]
    return np.array(exact).reshape(amax.shape) + 127


# e2m1: (value, code). Each midpoint, its neighbours, and what lies outside.
TIES = [(0.25, 0, 1), (0.75, 1, 2), (1.25, 2, 3), (1.75, 3, 4), (2.5, 4, 5), (3.5, 5, 6), (5.0, 6, 7)]
EVEN = [0, 2, 2, 4, 4, 6, 6]


def test_e2m1_ties_and_neighbours() -> None:
    for (tie, low, high), even in zip(TIES, EVEN, strict=True):
        x = f32(below(tie), tie, above(tie), 0, -above(tie), -tie, -below(tie), 0)
        assert nibbles(quant.pack_e2m1(x)) == [low, even, high, 0, high | 8, even | 8, low | 8, 0], tie


def test_e2m1_zero_saturation_and_subnormals() -> None:
    x = f32(0.0, -0.0, 1e-40, -1e-40, 6.0, above(6.0), 1e30, math.inf, -6.0, -7.0, -1e30, -math.inf)
    assert nibbles(quant.pack_e2m1(x)) == [0, 8, 0, 8, 7, 7, 7, 7, 15, 15, 15, 15]


def test_e2m1_every_byte() -> None:
    packed = torch.arange(256, dtype=torch.uint8)
    values = unpack_e2m1(packed).view(256, 2)
    table = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    for byte in range(256):
        for value, code in ((values[byte, 0], byte & 15), (values[byte, 1], byte >> 4)):
            expected = math.copysign(table[code & 7], -1 if code & 8 else 1)
            assert (float(value), math.copysign(1, value)) == (expected, math.copysign(1, expected))
    assert torch.equal(quant.pack_e2m1(values).flatten(), packed)
    assert torch.equal(unpack_e2m1(packed.view(torch.int8)), unpack_e2m1(packed))


def test_e8m0_every_byte() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    values = e8m0_to_float(codes)
    assert values[:255].tolist() == [math.ldexp(1.0, byte - 127) for byte in range(255)]
    assert values[255].isnan() and torch.equal(
        bits(e8m0_to_float(codes.view(torch.float8_e8m0fnu))), bits(values)
    )


@pytest.mark.parametrize(
    ("value", "code"),
    [
        *[(0.0, 0x00), (TINY, 0x01), (TINY / 2, 0x00), (above(TINY / 2), 0x01), (1.5 * TINY, 0x02)],
        *[(7.5 * TINY, 0x08), (2.0**-6, 0x08), (1.0, 0x38), (1.0625, 0x38), (above(1.0625), 0x39)],
        *[(below(1.1875), 0x39), (1.1875, 0x3A), (400.0, 0x7C), (432.0, 0x7E), (448.0, 0x7E)],
        *[(above(448.0), 0x7E), (464.0, 0x7E), (480.0, 0x7E), (1e30, 0x7E), (math.inf, 0x7E)],
    ],
)
def test_e4m3_literals(value: float, code: int) -> None:
    assert bits(quant.round_e4m3(f32(value, -value))).tolist() == [code, code | 0x80]


def test_e4m3_brute_force(normal: Normal) -> None:
    steps = torch.from_numpy((E4M3[1:] + E4M3[:-1]) / 2).float()
    x = torch.cat((normal(2000) * torch.exp2(8 * normal(2000)), steps, torch.nextafter(steps, f32(1e9))))
    assert bits(quant.round_e4m3(x)).tolist() == brute_codes(x.numpy(), E4M3, 128).tolist()


def test_nvfp4_by_hand() -> None:
    """Global scale 1/2, amax 6: block scale 6/6/0.5 = 2, so codes stand for the values themselves."""
    x = f32(6.0, -0.0, 0.25, above(0.25), 0.75, -0.75, 5.0, -above(5.0), 1.0, 1.5, 2.0, 3.0, 4.0, 0, 0, 0.5)
    codes, scale = quant.quantize_nvfp4(x, torch.tensor(0.5))
    assert nibbles(codes) == [7, 8, 0, 1, 2, 10, 6, 15, 2, 3, 4, 5, 6, 0, 0, 1]
    assert codes.shape == (8,) and scale.dtype == torch.float8_e4m3fn and bits(scale).tolist() == [0x40]


def test_nvfp4_small_scales() -> None:
    """Scales among e4m3's subnormals; one that rounds to zero takes its block's codes along."""
    amax = f32(6 * TINY, 3 * TINY, above(3 * TINY), 9 * TINY, 0)
    x = torch.zeros(5, 16)
    x[:, 3], x[:, 5] = amax, -amax / 2
    codes, scale = quant.quantize_nvfp4(x, torch.tensor(1.0))
    assert bits(scale).flatten().tolist() == [1, 0, 1, 2, 0]
    assert [nibbles(row)[3:6:2] for row in codes] == [[7, 13], [0, 0], [5, 11], [6, 12], [0, 0]]


def test_nvfp4_largest_element_and_block(normal: Normal) -> None:
    x = normal(200, 64).mul(torch.exp2(6 * normal(200, 1)))
    for per_token in (True, False):
        gs = quant.nvfp4_global_scale(x, per_token=per_token)
        codes, scale = quant.quantize_nvfp4(x, gs)
        rows = range(200) if per_token else [int(x.abs().amax(-1).argmax())]
        for row in rows:
            where = int(x[row].abs().argmax())
            assert scale[row, where // 16].float() == 448 and nibbles(codes[row])[where] & 7 == 7


def test_nvfp4_zero_tokens_and_scale_shapes() -> None:
    x = torch.zeros(2, 32)
    x[1, 20] = -2688.0
    gs = quant.nvfp4_global_scale(x, per_token=True)
    assert gs.tolist() == [[0.0], [1.0]] and quant.nvfp4_global_scale(x, per_token=False).shape == ()
    codes, scale = quant.quantize_nvfp4(x, gs)
    assert bits(scale).tolist() == [[0, 0], [0, 0x7E]]
    assert codes[0].tolist() == [0] * 16 and nibbles(codes[1]) == [0] * 20 + [15] + [0] * 11
    assert [t.shape for t in quant.quantize_nvfp4(x[:0], gs[:0])] == [(0, 16), (0, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nvfp4_per_token_ignores_other_rows(normal: Normal, dtype: torch.dtype) -> None:
    x = (normal(37, 256) * torch.exp2(4 * normal(37, 1))).to(dtype)

    def quantise(rows: Tensor) -> Tensor:
        gs = quant.nvfp4_global_scale(rows, per_token=True)
        codes, scale = quant.quantize_nvfp4(rows, gs)
        return torch.cat((codes, bits(scale), bits(gs)), -1)

    for size in (1, 7):
        assert torch.equal(torch.cat([quantise(part) for part in x.split(size)]), quantise(x))


def brute_nvfp4(x: np.ndarray, gs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes and block scales of x [T, K] for global scales [T, 1] or [1, 1]: four fp32 operations."""
    blocks = x.reshape(len(x), -1, 16)
    scales = brute_codes(np.abs(blocks).max(-1) / np.float32(6) / gs, E4M3, 128)
    step = (E4M3[scales].astype(np.float32) * gs)[..., None]
    values = np.divide(blocks, step, out=np.zeros_like(blocks), where=step > 0)
    return brute_codes(values, E2M1, 8), scales


@pytest.mark.parametrize("per_token", [True, False])
def test_nvfp4_brute_force(normal: Normal, per_token: bool) -> None:
    x = normal(64, 96) * torch.exp2(3 * normal(64, 96 // 16)).repeat_interleave(16, -1)
    gs = quant.nvfp4_global_scale(x, per_token=per_token)
    codes, scale = quant.quantize_nvfp4(x, gs)
    amax = np.abs(x.numpy()).max(-1 if per_token else None).reshape(-1, 1)
    assert np.array_equal(gs.numpy().reshape(-1, 1), amax / np.float32(2688))
    expected, scales = brute_nvfp4(x.numpy(), gs.numpy().reshape(-1, 1))
    assert np.array_equal(bits(scale).numpy(), scales) and len(np.unique(scales)) > 30
    assert nibbles(codes) == expected.ravel().tolist()


def test_nvfp4_order_of_the_divisions(rng: np.random.Generator, normal: Normal) -> None:
    """Scales and elements within an ulp of a tie, where another order of the operations gives other codes."""
    gs = torch.exp2(3 * normal(4000, 1)).numpy()
    ties = (E4M3[60:100] + E4M3[61:101]) / 2
    x = np.zeros((4000, 16), np.float32)
    x[:, :1] = rng.choice(ties, (4000, 1)).astype(np.float32) * np.float32(6) * gs
    step = E4M3[brute_nvfp4(x, gs)[1]].astype(np.float32) * gs
    x[:, 1:8] = np.float32([tie for tie, _, _ in TIES]) * step
    codes, scale = quant.quantize_nvfp4(torch.from_numpy(x), torch.from_numpy(gs))
    expected, scales = brute_nvfp4(x, gs)
    assert np.array_equal(bits(scale).numpy(), scales)
    assert nibbles(codes) == expected.ravel().tolist()


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


def test_code_times_scale_is_exact_in_bf16() -> None:
    codes = unpack_e2m1(torch.arange(256, dtype=torch.uint8)).unique()
    scales = torch.from_numpy(E4M3).float()
    products = codes.double()[:, None] * scales.double()
    assert torch.equal(products.bfloat16().double(), products) and len(codes) == 15


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
