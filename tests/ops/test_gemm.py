"""The gemm room against a decoder of codes and sums of its own, for every format and input rounding."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv4.ops.formats import Fp8Block, MatrixCache, Mxfp4, Nvfp4, Plain, Weight
from dsv4.ops.gemm import bf16_terms, grouped_linear, linear, linear_stack

FORMATS = ("bf16", "f32", "nvfp4", "nvfp4 without input scale", "mxfp4", "fp8", "fp8 with f32 scales")
ACTIVATIONS = ("bf16", "fp8", "nvfp4")
GLOBAL_SCALE, INPUT_SCALE = np.float32(0.0123), np.float32(1 / 700)

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])  # magnitudes by code
E4M3 = np.array([(b % 8) / 512 if b < 8 else (8 + b % 8) * 2.0 ** (b // 8 - 10) for b in range(127)])


def decode(codes: np.ndarray, magnitudes: np.ndarray, sign_bit: int) -> np.ndarray:
    return np.where(codes & sign_bit, -1.0, 1.0) * magnitudes[codes & (sign_bit - 1)]


def random_weight(form: str, n: int, k: int, rng: np.random.Generator) -> tuple[Weight, np.ndarray]:
    """A weight from random bytes, and its matrix of code x block scale, element by element."""
    if form in ("bf16", "f32"):
        w = torch.from_numpy(rng.standard_normal((n, k)))
        w = w.bfloat16() if form == "bf16" else w.float()
        return Plain(w), w.double().numpy()
    if form.startswith("fp8"):
        return random_fp8(n, k, rng, f32_scales=form != "fp8")
    codes = rng.integers(0, 256, (n, k // 2)).astype(np.uint8)
    nibbles = np.stack((codes % 16, codes // 16), axis=-1).reshape(n, k)  # the low nibble comes first
    values, w = decode(nibbles, E2M1, 8), torch.from_numpy(codes)
    if form == "mxfp4":
        exponents = rng.integers(120, 131, (n, k // 32)).astype(np.uint8)
        scale = np.repeat(2.0 ** (exponents.astype(float) - 127), 32, axis=1)
        return Mxfp4(w, torch.from_numpy(exponents).view(torch.float8_e8m0fnu)), values * scale
    scales = rng.integers(80, 127, (n, k // 16)).astype(np.uint8)  # 8 to 448
    w_sf = torch.from_numpy(scales).view(torch.float8_e4m3fn)
    in_gs = torch.tensor(INPUT_SCALE) if form == "nvfp4" else None
    return Nvfp4(w, w_sf, torch.tensor(GLOBAL_SCALE), in_gs), values * np.repeat(E4M3[scales], 16, axis=1)


def random_fp8(n: int, k: int, rng: np.random.Generator, *, f32_scales: bool) -> tuple[Weight, np.ndarray]:
    codes = rng.choice([b for b in range(256) if b % 128 != 127], (n, k)).astype(np.uint8)
    exponents = rng.integers(110, 125, (-(-n // 128), -(-k // 128))).astype(np.uint8)
    scale = 2.0 ** (exponents.astype(float) - 127)
    w_sf = torch.from_numpy(exponents).view(torch.float8_e8m0fnu)
    if f32_scales:
        scale = scale.astype(np.float32) * np.float32(1.3)
        w_sf = torch.from_numpy(scale)
    spread = np.array([[scale[i // 128, j // 128] for j in range(k)] for i in range(n)])
    weight = Fp8Block(torch.from_numpy(codes).view(torch.float8_e4m3fn), w_sf)
    return weight, decode(codes, E4M3, 128) * spread


def nearest(x: np.ndarray, magnitudes: np.ndarray) -> np.ndarray:
    """The nearest representable value; a tie goes to the even code, too large a value to the largest."""
    size = np.minimum(np.abs(x), magnitudes[-1])
    upper = np.searchsorted(magnitudes, size)
    lower = np.maximum(upper - 1, 0)
    excess = (size - magnitudes[lower]) - (magnitudes[upper] - size)
    up = (excess > 0) | ((excess == 0) & (upper % 2 == 0))
    return np.copysign(magnitudes[np.where(up, upper, lower)], x)


def fp8_values(row: np.ndarray) -> np.ndarray:
    """One token rounded to e4m3 by blocks of 128 with power-of-two scales."""
    blocks = []
    for first in range(0, len(row), 128):
        block = row[first : first + 128]
        amax = max(np.abs(block).max(), np.float32(1e-4))
        scale = 2.0 ** math.ceil(math.log2(np.float32(amax) / np.float32(448)))
        blocks.append(nearest(block / scale, E4M3) * scale)
    return np.concatenate(blocks)


def nvfp4_values(row: np.ndarray, gsa: np.float32) -> np.ndarray:
    """One token as e2m1 code x e4m3 block scale, the global scale left out."""
    values = np.zeros(len(row))
    for first in range(0, len(row), 16):
        block = row[first : first + 16]
        sf = nearest(np.float32(np.abs(block).max() / np.float32(6) / gsa), E4M3) if gsa else 0.0
        if sf:
            values[first : first + 16] = nearest(block / np.float32(np.float32(sf) * gsa), E2M1) * sf
    return values


def operand(row: np.ndarray, form: str, activations: str) -> tuple[np.ndarray, np.float32]:
    """What the product reads of one token, and the scale of the activations (1 if there is none)."""
    if form in ("bf16", "f32") or activations == "bf16":
        return row.astype(float), np.float32(1)
    if activations == "nvfp4" and form.startswith("nvfp4"):
        gsa = INPUT_SCALE if form == "nvfp4" else np.abs(row).max() / np.float32(2688)
        return nvfp4_values(row, gsa), gsa
    return fp8_values(row), np.float32(1)


def assert_near(y: Tensor, want: np.ndarray) -> None:
    assert y.shape == want.shape
    np.testing.assert_allclose(y.numpy(), want, rtol=1e-5, atol=2e-6 * np.abs(want).max(initial=0))


@pytest.mark.parametrize("tokens", [0, 1, 7])
@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("form", FORMATS)
def test_linear(
    form: str, activations: str, tokens: int, rng: np.random.Generator, normal: Callable[..., Tensor]
) -> None:
    weight, matrix = random_weight(form, 133, 160, rng)
    x = normal(tokens, 160) * torch.exp(3 * normal(tokens, 1))  # rows of very different size
    want = np.zeros((tokens, 133))
    for t in range(tokens):
        row, gsa = operand(x[t].numpy(), form, activations)
        for i in range(133):
            want[t, i] = float(row @ matrix[i]) * gsa * (GLOBAL_SCALE if form.startswith("nvfp4") else 1)
    y = linear(x, weight, activations=activations)
    assert y.dtype == torch.float32
    assert_near(y, want)


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("form", FORMATS)
def test_grouped_linear_is_block_diagonal(
    form: str, activations: str, rng: np.random.Generator, normal: Callable[..., Tensor]
) -> None:
    """FP8 rounding never reaches it; an NVFP4 token has one scale over all its groups."""
    groups, rank, width = 3, 5, 64
    weight, matrix = random_weight(form, groups * rank, width, rng)
    x = normal(4, groups, width) * torch.tensor([1.0, 30.0, 0.2])[:, None]
    rounded = activations == "nvfp4" and form.startswith("nvfp4")
    want = np.zeros((4, groups * rank))
    for t in range(4):
        row, gsa = operand(x[t].flatten().numpy(), form, "nvfp4" if rounded else "bf16")
        for i in range(groups * rank):
            first = i // rank * width
            gs = GLOBAL_SCALE if form.startswith("nvfp4") else 1
            want[t, i] = float(row[first : first + width] @ matrix[i]) * gsa * gs
    assert_near(grouped_linear(x, weight, activations=activations), want)
    assert grouped_linear(x[:0], weight, activations=activations).shape == (0, groups * rank)
    assert grouped_linear(x.bfloat16(), weight, activations=activations).dtype == torch.bfloat16


@pytest.mark.parametrize("activations", ["bf16", "nvfp4"])
def test_global_scales_multiply_the_finished_sum(activations: str, rng: np.random.Generator) -> None:
    """Sums here are exact in fp32, so the bits show where each scale enters: the activations' first."""
    weight, matrix = random_weight("nvfp4", 96, 48, rng)
    x = rng.integers(-8, 9, (5, 48)).astype(np.float32) / 4
    rows = [operand(row, "nvfp4", activations)[0] for row in x]
    sums = np.array([[np.float32(row @ line) for line in matrix] for row in rows])
    assert (sums == np.array([[row @ line for line in matrix] for row in rows])).all()
    want = (sums if activations == "bf16" else sums * INPUT_SCALE) * GLOBAL_SCALE
    assert want.dtype == np.float32
    assert np.array_equal(linear(torch.from_numpy(x), weight, activations=activations).numpy(), want)


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_input_scale_is_read_for_nvfp4_activations_only(
    activations: str, rng: np.random.Generator, normal: Callable[..., Tensor]
) -> None:
    weight, _ = random_weight("nvfp4", 32, 64, rng)
    assert isinstance(weight, Nvfp4)
    x = normal(6, 64)
    with_scale = linear(x, weight, activations=activations)
    without = linear(x, weight._replace(in_gs=None), activations=activations)
    assert torch.equal(with_scale, without) == (activations != "nvfp4")


def test_per_token_scales_ignore_other_tokens(
    rng: np.random.Generator, normal: Callable[..., Tensor]
) -> None:
    """Rows fed 1, 7 or all at once give the same bits (the sums are exact); a row of zeros gives zeros."""
    weight, _ = random_weight("nvfp4 without input scale", 40, 64, rng)
    x = normal(20, 64) * torch.exp2(torch.arange(20.0) - 10)[:, None]
    x[9] = 0
    y = linear(x, weight, activations="nvfp4")
    for size in (1, 7):
        assert torch.equal(torch.cat([linear(p, weight, activations="nvfp4") for p in x.split(size)]), y)
    assert torch.equal(y[9], torch.zeros(40))


@pytest.mark.parametrize("limit", [0, 133 * 160 * 4, 1 << 30])
@pytest.mark.parametrize("form", FORMATS)
def test_memo_gives_the_bits_of_the_weight(
    form: str, limit: int, rng: np.random.Generator, normal: Callable[..., Tensor]
) -> None:
    cache, x = MatrixCache(limit), normal(3, 160)
    group = x.unsqueeze(1)
    for weight in [random_weight(form, 133, 160, rng)[0] for _ in range(2)]:
        memo = cache.wrap(weight)
        for activations in ACTIVATIONS:
            want = linear(x, weight, activations=activations)
            assert torch.equal(linear(x, memo, activations=activations), want)
            want = grouped_linear(group, weight, activations=activations)
            assert torch.equal(grouped_linear(group, memo, activations=activations), want)
    assert cache.free_bytes >= 0


@pytest.mark.parametrize("form", FORMATS)
def test_out_dtype(form: str, rng: np.random.Generator, normal: Callable[..., Tensor]) -> None:
    """The input's dtype unless named; bf16 is the fp32 result rounded once."""
    weight, _ = random_weight(form, 33, 64, rng)
    x = normal(5, 64).bfloat16()
    full = linear(x, weight, out_dtype=torch.float32)
    assert full.dtype == torch.float32
    assert torch.equal(full, linear(x.float(), weight))
    assert torch.equal(linear(x, weight), full.bfloat16())


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_stack_is_linear_with_each_weight(
    dtype: torch.dtype, activations: str, rng: np.random.Generator, normal: Callable[..., Tensor]
) -> None:
    """Bit by bit, in the order given; each weight rounds the input as it would alone, each has its dtype."""
    weights = [random_weight(form, 24 + 3 * i, 160, rng)[0] for i, form in enumerate((*FORMATS, *FORMATS))]
    assert isinstance(weights[2], Nvfp4)
    weights[2] = weights[2]._replace(in_gs=torch.tensor(0.01))  # another than the second of its format
    weights[4] = MatrixCache(1 << 20).wrap(weights[4])
    dtypes = [(None, torch.float32, torch.bfloat16)[i % 3] for i in range(len(weights))]
    for tokens in (0, 1, 7):
        x = normal(tokens, 160).to(dtype)
        found = linear_stack(x, weights, activations=activations, out_dtypes=dtypes)
        assert isinstance(found, tuple)
        for y, weight, out_dtype in zip(found, weights, dtypes, strict=True):
            want = linear(x, weight, activations=activations, out_dtype=out_dtype)
            assert y.dtype == (out_dtype or dtype) and torch.equal(y, want)


def test_a_stack_of_nothing_and_of_too_few_dtypes(rng: np.random.Generator) -> None:
    weight, x = random_weight("mxfp4", 16, 64, rng)[0], torch.ones(2, 64)
    assert linear_stack(x, (), out_dtypes=()) == ()
    with pytest.raises(ValueError, match="shorter"):
        linear_stack(x, (weight, weight), out_dtypes=(None,))


def test_three_bf16_terms_are_an_f32_tensor() -> None:
    x = torch.randn(4096) * 2.0 ** torch.randint(-80, 80, (4096,))
    x = torch.cat((x, torch.tensor([0.0, torch.inf])))
    terms = bf16_terms(x)
    assert [term.dtype for term in terms] == [torch.bfloat16] * 3
    assert torch.equal(terms[2].float() + terms[1].float() + terms[0].float(), x)
