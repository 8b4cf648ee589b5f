"""What linear, linear_stack and grouped_linear promise bit by bit up to eight tokens; extreme values."""

import functools
import math
from collections.abc import Callable

import pytest
import torch
from linear_shapes import GROUPS, matrices, odd_matrices
from numeric import assert_bits, assert_gemm, assert_reproducible, dirty_memory, without_allocator
from shapes import MODELS, Sizes
from tile_weights import KINDS, Stored, bytes_between, random_weight
from torch import Tensor

from dsv4.ops.formats import Fp8Block, Mxfp4, Nvfp4, Plain, shape_of
from dsv4.ops.gemm import grouped_linear, linear, linear_stack, reference
from dsv4.ops.pack import pack_weight

Normal = Callable[..., Tensor]
Call = Callable[[Tensor], Tensor | tuple[Tensor, ...]]
F32 = torch.float32
by_kind = pytest.mark.parametrize("kind", KINDS)


def outputs(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def stack_of(weights: list[Stored], columns: int, other: Stored) -> list[Stored]:
    """Up to six matrices of that many columns, and one of another format."""
    return [*[weight for weight in weights if shape_of(weight)[1] == columns][:6], other]


def calls_of(kind: str, sizes: Sizes, normal: Normal) -> list[tuple[Call, tuple[int, ...]]]:
    """Every linear of a model, odd ones, a stack, a grouped one; with the shape of eight tokens."""
    weights = [random_weight(kind, n, k, normal) for n, k in (*matrices(sizes), *odd_matrices(kind))]
    calls: list[tuple[Call, tuple[int, ...]]] = []
    for weight in weights:
        calls.append((functools.partial(linear, weight=weight), (8, shape_of(weight)[1])))
    for how in ("fp8", "nvfp4"):
        calls.append((functools.partial(linear, weight=weights[0], activations=how), calls[0][1]))
    other = random_weight("mxfp4" if kind == "bf16" else "bf16", 200, sizes.hidden, normal)
    stack = stack_of(weights, sizes.hidden, other)
    dtypes = [None, *[F32] * (len(stack) - 1)]
    calls.append((functools.partial(linear_stack, weights=stack, out_dtypes=dtypes), (8, sizes.hidden)))
    groups, rows, k = GROUPS[sizes.name]
    grouped = random_weight(kind, groups * rows, k, normal)
    for how in ("bf16", "nvfp4"):
        calls.append((functools.partial(grouped_linear, weight=grouped, activations=how), (8, groups, k)))
    return calls


@pytest.mark.parametrize("sizes", MODELS, ids=lambda sizes: sizes.name)
@by_kind
def test_bits(kind: str, sizes: Sizes, cuda_normal: Normal) -> None:
    """The same call, its graph, and each of eight tokens, alone or beside others, give the same bits."""
    for number, (call, shape) in enumerate(calls_of(kind, sizes, cuda_normal)):
        case, x = f"{kind} {sizes.name}, call {number}, {shape}", cuda_normal(*shape).bfloat16()
        assert_reproducible(functools.partial(call, x), case)
        whole = outputs(call(x))
        for start, end in (*((0, t) for t in range(1, 8)), (7, 8), (3, 6)):
            for own, want in zip(outputs(call(x[start:end])), whole, strict=True):
                assert_bits(own, want[start:end], f"{case}: tokens {start} to {end - 1}")


@by_kind
def test_one_token_at_a_time(kind: str, cuda_normal: Normal) -> None:
    """Eight tokens of so many columns do not fit a block, however many blocks divide them."""
    n, k = 40, 33_024
    weight, x = random_weight(kind, n, k, cuda_normal), cuda_normal(8, k).bfloat16()
    whole = linear(x, weight)
    assert_gemm(whole, reference.linear(x, weight, out_dtype=F32), f"{kind} {n} x {k}")
    for start, end in ((0, 1), (2, 4), (7, 8)):
        assert_bits(linear(x[start:end], weight), whole[start:end], f"{kind}: tokens {start} to {end - 1}")


@by_kind
@pytest.mark.parametrize("tokens", [16, 32])
def test_more_tokens_are_reproducible(tokens: int, kind: str, cuda_normal: Normal) -> None:
    for n, k in ((300, 544), (1024, 2048), (64, 4096), (16, 16384)):
        weight, x = random_weight(kind, n, k, cuda_normal), cuda_normal(tokens, k).bfloat16()
        assert_reproducible(functools.partial(linear, x, weight), f"{kind} {n} x {k}, {tokens} tokens")


@pytest.mark.allocator
@pytest.mark.skipif(without_allocator(), reason="a graph needs the allocator")
@pytest.mark.parametrize("tokens", [1, 8, 32])
@pytest.mark.parametrize("width", [256, 2048])
def test_overlapping_launches(width: int, tokens: int, cuda_normal: Normal) -> None:
    """Each launch reads what the one before wrote, in memory that is used again; new values every time."""
    weights = [random_weight(KINDS[i % 5], width, width, cuda_normal) for i in range(10)]
    pairs = [
        random_weight(kind, width // 2, width, cuda_normal) for kind in ("nvfp4", "bf16", "fp8", "mxfp4")
    ]
    blocks = [random_weight(kind, width, width // 4, cuda_normal) for kind in ("fp8", "nvfp4")]

    def chain(y: Tensor, overlap: bool) -> Tensor:
        for weight in weights:
            y = linear(y, weight, overlap=overlap)
        for pair in (pairs[:2], pairs[2:]):
            y = torch.cat(linear_stack(y, pair, out_dtypes=(None, None), overlap=overlap), dim=1)
        for block in blocks:
            y = grouped_linear(y.view(len(y), 4, -1), block, overlap=overlap)
        for weight in weights:
            y = linear_stack(y, [weight, weight], out_dtypes=(None, F32), overlap=overlap)[0]
        return y

    x = cuda_normal(tokens, width).bfloat16()
    chain(x, True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = chain(x, True)
    for turn in range(8):
        x.copy_(cuda_normal(tokens, width))
        graph.replay()
        want = chain(x, False)
        assert bool(want.isfinite().all()) and bool(want.any())
        assert_bits(replayed, want, f"width {width}, {tokens} tokens, replay {turn}")
        assert_bits(chain(x, True), want, f"width {width}, {tokens} tokens, turn {turn} without a graph")


@by_kind
@pytest.mark.parametrize("tokens", [8, 16, 32])
def test_extreme_tokens(tokens: int, kind: str, cuda_normal: Normal) -> None:
    """1e-30 beside 1e30, zeros of both signs, infinity and NaN; other tokens keep their bits."""
    n, k = 300, 544
    weight, usual = random_weight(kind, n, k, cuda_normal), cuda_normal(tokens, k).bfloat16()
    x = usual.clone()
    x[0] = (10.0 ** torch.linspace(-30, 30, k, device="cuda"))[cuda_normal(k).argsort()] * cuda_normal(
        k
    ).sign()
    x[1], x[1, ::2] = 0.0, -0.0
    x[2, 17], x[3, 100], x[4, 3] = math.inf, -math.inf, math.nan
    x[5], x[6] = x[5] * 1e-30, x[6] * 1e30
    dirty_memory()
    y, want = linear(x, weight, out_dtype=F32), reference.linear(x, weight, out_dtype=F32)
    for row in (0, 1, 5, 6):
        assert_gemm(y[row : row + 1], want[row : row + 1], f"{kind}, {tokens} tokens, row {row}")
    assert bool((y[1] == 0).all()), kind
    for row in (2, 3, 4):
        assert not bool(want[row].isfinite().any())
        torch.testing.assert_close(y[row], want[row], rtol=0, atol=0, equal_nan=True)
    assert_bits(y[7:], linear(usual, weight, out_dtype=F32)[7:], f"{kind}, {tokens} tokens, others")


@pytest.mark.parametrize("tokens", [1, 8, 32])
def test_every_scale_and_code(tokens: int, cuda_normal: Normal) -> None:
    """Every e4m3 from 0 to 448, zeros of both signs. Each row has one scale or magnitude: sums are exact."""
    k, x = 256, (2 * cuda_normal(tokens, 256)).round().bfloat16()
    codes = bytes_between(cuda_normal, 0, 256, 127, k // 2)
    codes[:, :9] = 0x88  # -0 twice
    rows = torch.arange(127, device="cuda", dtype=torch.uint8)[:, None]
    e4m3 = rows.repeat(1, k // 16).view(torch.float8_e4m3fn)
    e8m0 = (rows + 10).repeat(1, k // 32).view(torch.float8_e8m0fnu)
    signed = (rows | 128 * bytes_between(cuda_normal, 0, 2, 127, k)).view(torch.float8_e4m3fn)
    weights: dict[str, Stored] = {
        "nvfp4": pack_weight(Nvfp4(codes, e4m3, torch.tensor(0.5, device="cuda"))),
        "mxfp4": pack_weight(Mxfp4(codes, e8m0)),
        "bf16": Plain(signed.bfloat16()),
    }
    for byte in (40, 127, 200):
        scales = torch.full((1, 2), byte, dtype=torch.uint8, device="cuda").view(torch.float8_e8m0fnu)
        weights[f"fp8, e8m0 {byte}"] = Fp8Block(signed, scales)
        weights[f"fp8, f32 {byte}"] = Fp8Block(signed, scales.float())
    for name, weight in weights.items():
        dirty_memory()
        y, want = linear(x, weight, out_dtype=F32), reference.linear(x, weight, out_dtype=F32)
        assert_bits(y, want, f"{name}, {tokens} tokens")
