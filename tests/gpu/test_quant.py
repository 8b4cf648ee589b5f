"""The quant kernels against their references, bit by bit."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from numeric import assert_bits, assert_reproducible, dirty_memory
from shapes import MODELS, TOKENS, Sizes
from torch import Tensor

from dsv4.ops import quant
from dsv4.ops.quant import reference

Normal = Callable[..., Tensor]
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def activations(normal: Normal, *shape: int, dtype: torch.dtype) -> Tensor:
    """Rows and blocks of very different magnitude; zeros of both signs, blocks of them, a row of them."""
    x = normal(*shape) * torch.exp2(4 * normal(*shape[:-1], 1))
    x = x * torch.exp2(3 * normal(*shape[:-1], shape[-1] // 16)).repeat_interleave(16, dim=-1)
    x.flatten()[::37] = -0.0
    x[..., :16] = 0
    if shape[0] > 2:
        x[2] = -0.0
    return x.to(dtype)


def outputs(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def assert_same(call: Callable[[Any], Tensor | tuple[Tensor, ...]], case: str) -> None:
    """``call(quant)`` and then ``call(reference)`` give the same bits."""
    dirty_memory()
    found = outputs(call(quant))
    for index, (own, want) in enumerate(zip(found, outputs(call(reference)), strict=True)):
        assert_bits(own, want.contiguous(), f"{case}, output {index}")


def linear_inputs(sizes: Sizes, tokens: int) -> list[tuple[int, int]]:
    """Shapes that enter linear layers; the last is the concatenated heads before ``wo_a``."""
    widths = (sizes.hidden, sizes.q_lora, sizes.expert_width)
    wide = tokens // 8 if tokens > 1000 else tokens
    return [*((tokens, width) for width in widths), (wide, sizes.heads * sizes.head_dim)]


@DTYPES
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("sizes", MODELS, ids=lambda sizes: sizes.name)
def test_nvfp4(sizes: Sizes, tokens: int, dtype: torch.dtype, cuda_normal: Normal) -> None:
    for shape in linear_inputs(sizes, tokens):
        x = activations(cuda_normal, *shape, dtype=dtype)
        case = f"{sizes.name} {shape} {dtype}"
        assert_same(lambda room, x=x: room.quantize_nvfp4_tokens(x), case)
        assert_same(lambda room, x=x: room.nvfp4_global_scale(x, per_token=True), case)
        assert_same(lambda room, x=x: room.round_nvfp4(x), case)
        if tokens:
            assert_same(lambda room, x=x: room.nvfp4_global_scale(x, per_token=False), case)
        for scale in (torch.tensor(0.003, device="cuda"), torch.exp2(4 * cuda_normal(*shape[:-1], 1) - 9)):
            assert_same(lambda room, x=x, scale=scale: room.quantize_nvfp4(x, scale), case)
            assert_same(lambda room, x=x, scale=scale: room.round_nvfp4(x, scale), case)


@DTYPES
def test_nvfp4_ties(dtype: torch.dtype, cuda_normal: Normal) -> None:
    """Multiples of a quarter with scales that are powers of two: a third of all quotients are midpoints."""
    x = (cuda_normal(500, 256) * 8).round() / 4
    x[:, ::16] = 6
    scale = torch.exp2((2 * cuda_normal(500, 1)).round())
    assert_same(lambda room: room.quantize_nvfp4((x * scale).to(dtype), scale), f"{dtype}")


def test_nvfp4_close_to_ties(cuda_normal: Normal) -> None:
    """Global scales a few ulps around x / midpoint, for a bf16 x: where approximate quotients go astray."""
    for midpoint in MIDPOINTS:
        near = cuda_normal(20000).abs().bfloat16() + 0.01
        scale = near.float() / midpoint
        ulps = torch.arange(20000, device="cuda").int() % 17 - 8
        scale = (scale.view(torch.int32) + ulps).view(torch.float32)
        x = torch.zeros(20000, 16, dtype=torch.bfloat16, device="cuda")
        x[:, 3] = (6 * scale).bfloat16()  # a block scale of 1
        x[:, 5] = -near
        neighbours = near.view(torch.int16)[:, None] + torch.arange(-1, 2, device="cuda").short()
        x[:, 7:10] = neighbours.view(torch.bfloat16)
        x[:, 10:12] = near[:, None] * torch.tensor([0.5, -0.25], device="cuda")
        assert_same(lambda room, x=x, s=scale: room.quantize_nvfp4(x, s[:, None]), f"bf16 at {midpoint}")
        wide = x.float()
        wide[:, 12:16] = torch.tensor(MIDPOINTS[:4], device="cuda") * scale[:, None]
        wide[:, 13] = (wide[:, 13].view(torch.int32) + 1).view(torch.float32)
        assert_same(lambda room, x=wide, s=scale: room.quantize_nvfp4(x, s[:, None]), f"f32 at {midpoint}")


@DTYPES
def test_nvfp4_of_short_numbers(dtype: torch.dtype, cuda_normal: Normal) -> None:
    """Quotients on midpoints and an ulp beside: 2688 is 2^7 21, so 3 or 7 steps may be a short number."""
    most = torch.arange(128, 256, device="cuda")[:, None, None]
    share = torch.arange(64, device="cuda")[None, :, None] + 1  # of a row's maximum, the largest of a block
    odd = 2 * (cuda_normal(128, 64, 16) * 2).round() + 1
    x = most * odd * torch.exp2((2 * cuda_normal(128, 64, 16)).round() - 6)
    x = torch.minimum(x.abs(), most * share / 64) * x.sign()
    x[..., :1] = most * share / 64
    x = x.flatten(1).to(dtype)
    assert_same(lambda room: room.quantize_nvfp4_tokens(x), f"rows {dtype}")
    scale = torch.exp2(torch.arange(128, device="cuda") % 40 - 20.0)[:, None]
    powers = scale * torch.exp2(torch.arange(256, device="cuda") % 16 - 13.0)
    powers[:, ::16] = 6 * scale
    for ulps in range(-3, 4):  # at -1 a step of 24 ones: no quotient is closer to being rounded to a midpoint
        near = (scale.view(torch.int32) + ulps).view(torch.float32)
        assert_same(lambda room, s=near: room.quantize_nvfp4(powers.to(dtype), s), f"{ulps} {dtype}")


@DTYPES
def test_nvfp4_extremes(dtype: torch.dtype, cuda_normal: Normal) -> None:
    """Scales that saturate, are subnormal or vanish; magnitudes at both ends of fp32; infinity and NaN."""
    x = activations(cuda_normal, 200, 64, dtype=torch.float32)
    powers = torch.linspace(-120, 90, 200, device="cuda")[:, None]
    rows, small = ((x * torch.exp2(powers - down)).to(dtype) for down in (0, 20))
    assert_same(lambda room: room.quantize_nvfp4_tokens(small), "small rows")
    for shift in (-12, -4, 0, 6, 9, 15):
        scale = torch.exp2(powers - shift)
        assert_same(lambda room, s=scale: room.quantize_nvfp4(rows, s), f"{shift}")
        assert_same(lambda room, s=scale: room.round_nvfp4(rows, s), f"{shift}")
    odd = x.to(dtype)
    odd[1, 20], odd[4, 33], odd[5, 3], odd[6, 40] = math.inf, -math.inf, math.nan, 1e-40
    for scale in torch.tensor([0.0, 1e-42, 1.0, 1e38], device="cuda"):
        assert_same(lambda room, s=scale: room.quantize_nvfp4(odd, s), f"{scale}")
        assert_same(lambda room, s=scale: room.round_nvfp4(odd, s), f"{scale}")


@DTYPES
@pytest.mark.parametrize("shape", [(1,), (5, 33), (3, 2, 100), (2, 200000), (70001, 16)])
def test_global_scale_of_any_width(shape: tuple[int, ...], dtype: torch.dtype, cuda_normal: Normal) -> None:
    x = cuda_normal(*shape).to(dtype)
    for per_token in (True, False):
        assert_same(lambda room, p=per_token: room.nvfp4_global_scale(x, per_token=p), f"{shape} {dtype}")


@DTYPES
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("sizes", MODELS, ids=lambda sizes: sizes.name)
def test_fp8(sizes: Sizes, tokens: int, dtype: torch.dtype, cuda_normal: Normal) -> None:
    for shape in linear_inputs(sizes, tokens)[:3]:
        x = activations(cuda_normal, *shape, dtype=dtype)
        assert_same(lambda room, x=x: room.quantize_fp8(x), f"{sizes.name} {shape} {dtype}")
        assert_same(lambda room, x=x: room.round_fp8(x), f"{sizes.name} {shape} {dtype}")
    kv = activations(cuda_normal, tokens, sizes.head_dim, dtype=dtype)
    kv[..., -40:] = math.nan  # what has RoPE is copied, whatever it is
    assert_same(lambda room: room.round_kv(kv, rope_dim=sizes.rope_dim), f"{sizes.name} kv {tokens} {dtype}")


@DTYPES
@pytest.mark.parametrize("block", [16, 32, 48, 64, 100, 128, 512, 1000])
@pytest.mark.parametrize("width", [1, 16, 100, 200, 448, 528, 10000])
def test_fp8_of_any_width(width: int, block: int, dtype: torch.dtype, cuda_normal: Normal) -> None:
    """Partial last blocks; powers of two times 448, where the scale steps; below the floor."""
    x = cuda_normal(9, width) * torch.exp2(6 * cuda_normal(9, 1))
    x[1], x[2, 0], x[3, 0] = 1e-6 * x[1], 448.0, 448.5
    x[4], x[5] = 0.0, -torch.exp2(torch.arange(width, device="cuda") % 20 - 12.0)
    x = x.to(dtype)
    assert_same(lambda room: room.quantize_fp8(x, block=block), f"{width} {block} {dtype}")
    assert_same(lambda room: room.round_fp8(x, block=block), f"{width} {block} {dtype}")
    for rope_dim in {0, width // 3, width // 32 * 16, width - 1}:
        case = f"{width} {block} {rope_dim} {dtype}"
        assert_same(lambda room, r=rope_dim: room.round_kv(x, rope_dim=r, block=block), case)


@DTYPES
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("width", [32, 64, 128, 256])
def test_hadamard(width: int, tokens: int, dtype: torch.dtype, cuda_normal: Normal) -> None:
    """The index queries and keys; whole numbers bring ties of the FP4 rounding."""
    for shape in ((tokens // 8 if tokens > 1000 else tokens, 64, width), (tokens, width)):
        for x in (activations(cuda_normal, *shape, dtype=dtype), (8 * cuda_normal(*shape)).round().to(dtype)):
            assert_same(lambda room, x=x: room.rotate_hadamard(x), f"{shape} {dtype}")
            assert_same(lambda room, x=x: room.round_index(x), f"{shape} {dtype}")


@pytest.mark.parametrize("sizes", MODELS, ids=lambda sizes: sizes.name)
def test_bits(sizes: Sizes, cuda_normal: Normal) -> None:
    """The same call, its graph, and each row alone, give the same bits."""
    x = activations(cuda_normal, 8, sizes.hidden, dtype=torch.bfloat16)
    kv, keys = x.view(-1, 512)[:8].contiguous(), x.view(-1, 128)[:8].contiguous()
    scale = torch.tensor(0.01, device="cuda")
    calls: list[tuple[Tensor, Callable[[Tensor], Tensor | tuple[Tensor, ...]]]] = [
        (x, quant.quantize_nvfp4_tokens),
        (x, lambda rows: quant.quantize_nvfp4(rows, scale)),
        (x, quant.round_nvfp4),
        (x, lambda rows: quant.round_nvfp4(rows, scale)),
        (x, lambda rows: quant.nvfp4_global_scale(rows, per_token=True)),
        (x, quant.quantize_fp8),
        (x, quant.round_fp8),
        (kv, lambda rows: quant.round_kv(rows, rope_dim=64)),
        (keys, quant.round_index),
    ]
    for number, (rows, call) in enumerate(calls):
        assert_reproducible(lambda call=call, rows=rows: call(rows), f"{sizes.name} {number}")
        whole = outputs(call(rows))
        for t in range(1, 8):
            for own, want in zip(outputs(call(rows[:t])), whole, strict=True):
                assert_bits(own, want[:t], f"{sizes.name} {number}: {t} tokens")


def test_what_it_cannot_take(cuda_normal: Normal) -> None:
    x = cuda_normal(64, 32)
    calls: list[Callable[[Tensor], object]] = [
        quant.quantize_nvfp4_tokens,
        quant.round_nvfp4,
        lambda x: quant.nvfp4_global_scale(x, per_token=True),
        quant.quantize_fp8,
        quant.round_fp8,
        lambda x: quant.round_kv(x, rope_dim=0),
        quant.rotate_hadamard,
        quant.round_index,
    ]
    for call in calls:
        for bad, words in ((x.T, "contiguous"), (x.half(), "float16")):
            with pytest.raises(AssertionError, match=words):
                call(bad)
    for call, words in (
        (lambda: quant.quantize_nvfp4_tokens(cuda_normal(4, 40)), "multiple of 16"),
        (lambda: quant.quantize_nvfp4(x, cuda_normal(64)), "global_scale: expected"),
        (lambda: quant.round_nvfp4(x, cuda_normal(64)), "global_scale: expected"),
        (lambda: quant.round_nvfp4(cuda_normal(4, 40)), "multiple of 16"),
        (lambda: quant.round_index(cuda_normal(4, 48)), "32, 64, 128 or 256"),
        (lambda: quant.round_kv(x, rope_dim=33), "rope_dim: expected"),
    ):
        with pytest.raises(AssertionError, match=words):
            call()
