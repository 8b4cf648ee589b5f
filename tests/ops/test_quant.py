"""e2m1, e4m3 and NVFP4: literal codes at every edge, and a brute force in numpy."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from codes import E2M1, E4M3, TINY, above, below, bits, brute_codes, f32, nibbles
from torch import Tensor

from dsv4.ops import quant
from dsv4.ops.formats import e8m0_to_float, unpack_e2m1

Normal = Callable[..., Tensor]

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nvfp4_tokens_at_once(normal: Normal, dtype: torch.dtype) -> None:
    x = (normal(3, 5, 64) * torch.exp2(4 * normal(3, 5, 1))).to(dtype)
    x[1, 2] = 0
    gs = quant.nvfp4_global_scale(x, per_token=True)
    for own, other in zip(quant.quantize_nvfp4_tokens(x), (*quant.quantize_nvfp4(x, gs), gs), strict=True):
        assert own.dtype == other.dtype and torch.equal(bits(own), bits(other))
    assert [t.shape for t in quant.quantize_nvfp4_tokens(x[:0])] == [(0, 5, 32), (0, 5, 4), (0, 5, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nvfp4_values(normal: Normal, dtype: torch.dtype) -> None:
    """Codes by table times scales by table, exact in either dtype; the scale of each row comes along."""
    x = (normal(3, 5, 64) * torch.exp2(4 * normal(3, 5, 1))).to(dtype)
    x[1, 2], x[0, 0, 3] = 0, -0.0
    own = quant.nvfp4_global_scale(x, per_token=True)
    for given in (None, torch.tensor(0.02), 3 * own):
        values, gs = quant.round_nvfp4(x, given)
        expected_gs = own if given is None else given.expand(3, 5, 1)
        codes, scale = quant.quantize_nvfp4(x, expected_gs.contiguous())
        magnitudes, code = torch.from_numpy(E2M1), torch.tensor(nibbles(codes)).view(3, 5, 64)
        sized = magnitudes[code & 7] * torch.from_numpy(E4M3)[bits(scale).int()].repeat_interleave(16, -1)
        assert values.dtype == dtype and torch.equal(values.double(), torch.where(code > 7, -1, 1) * sized)
        assert torch.equal(values.signbit(), code > 7)
        assert gs.dtype == torch.float32 and gs.is_contiguous() and torch.equal(gs, expected_gs)
    assert [t.shape for t in quant.round_nvfp4(x[:0])] == [(0, 5, 64), (0, 5, 1)]


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


def test_code_times_scale_is_exact_in_bf16() -> None:
    codes = unpack_e2m1(torch.arange(256, dtype=torch.uint8)).unique()
    scales = torch.from_numpy(E4M3).float()
    products = codes.double()[:, None] * scales.double()
    assert torch.equal(products.bfloat16().double(), products) and len(codes) == 15
