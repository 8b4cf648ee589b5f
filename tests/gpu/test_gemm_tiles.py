"""The matrix product of many tokens, gemm_tiles, against fp32 products of the dequantised codes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from numeric import assert_bits, assert_gemm, assert_reproducible, dirty_memory, poison
from shapes import MODELS, Sizes
from tile_weights import KINDS, NUMBER, Stored, exact_weight, kind_of, random_weight
from torch import Tensor

from dsv4 import _C
from dsv4.ops.formats import Fp8Block, Packed, shape_of, unscaled

Normal = Callable[..., Tensor]
TOKENS = (5, 33, 64, 100, 137, 512, 4001)
MATRICES = {  # rows, columns: projections of attention, of experts, and the index keys' weights
    "flash": ((1024, 4096), (512, 4096), (4096, 8192), (2048, 4096), (64, 4096)),
    "pro": ((1536, 7168), (7168, 16384), (3072, 7168)),
    "tiny": ((256, 256), (512, 256), (256, 512)),
}
GROUPS = {"flash": (8, 1024, 4096), "pro": (16, 1024, 4096), "tiny": (2, 256, 1024)}  # of rows x columns
ODD = ((80, 192), (72, 320), (300, 256), (1040, 1056), (17, 32), (130, 992))


def tiles(
    x: Tensor,
    weight: Stored,
    *,
    groups: int = 1,
    token_scale: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
) -> Tensor:
    """x [T, >= G * K] times weight (G * R, K) -> [T, G * R]; ``out`` may be wider and is returned whole."""
    n, k = shape_of(weight)
    packed = isinstance(weight, Packed)
    data: Tensor = weight.data if packed else weight.w
    scales = weight.w_sf if isinstance(weight, Fp8Block) else None
    out = torch.empty(len(x), n, dtype=dtype, device="cuda") if out is None else out
    strides: list[Any] = [x.stride(0), out.stride(0)]
    gs = weight.gs if packed else None
    kind = NUMBER[kind_of(weight)]
    _C.gemm_tiles(x, data, scales, token_scale, gs, out, kind, len(x), n // groups, k, groups, *strides)
    return out


def product(x: Tensor, weight: Stored, groups: int = 1, token_scale: Tensor | None = None) -> Tensor:
    """The same in fp32."""
    assert not torch.backends.cuda.matmul.allow_tf32
    matrix, global_scale = unscaled(weight)
    n, k = matrix.shape
    parts = x.float()[:, : groups * k].unflatten(1, (groups, k)).unbind(1)
    y = torch.cat([a @ b.T for a, b in zip(parts, matrix.split(n // groups), strict=True)], dim=1)
    y = y if token_scale is None else y * token_scale.unsqueeze(-1)
    return y if global_scale is None else y * global_scale


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("sizes", MODELS, ids=lambda sizes: sizes.name)
@pytest.mark.parametrize("kind", KINDS)
def test_against_fp32(kind: str, sizes: Sizes, tokens: int, cuda_normal: Normal) -> None:
    for n, k in MATRICES[sizes.name]:
        weight, x = random_weight(kind, n, k, cuda_normal), cuda_normal(tokens, k).bfloat16()
        scale = cuda_normal(tokens).abs() if kind == "nvfp4" and tokens % 2 else None
        for dtype in (torch.bfloat16, torch.float32):
            dirty_memory()
            y = tiles(x, weight, token_scale=scale, dtype=dtype)
            want = product(x, weight, token_scale=scale)
            assert_gemm(y, want, f"{kind} {n} x {k}, {tokens} tokens, {dtype}")


@pytest.mark.parametrize("tokens", [1, 5, 33, 63, 64, 65, 127, 130, 257])
@pytest.mark.parametrize("kind", KINDS)
def test_exact(kind: str, tokens: int, cuda_normal: Normal) -> None:
    """Odd sizes, and all tiles that they make, bit by bit."""
    for n, k in (*ODD, *MATRICES["tiny"], (2048, 4096)):
        weight, x = exact_weight(kind, n, k, cuda_normal), (2 * cuda_normal(tokens, k)).round().bfloat16()
        dirty_memory()
        y = tiles(x, weight, dtype=torch.float32)
        assert_bits(y, product(x, weight), f"{kind} {n} x {k}, {tokens} tokens")


@pytest.mark.parametrize("tokens", [5, 137, 1000])
@pytest.mark.parametrize("sizes", MODELS, ids=lambda sizes: sizes.name)
@pytest.mark.parametrize("kind", KINDS)
def test_grouped(kind: str, sizes: Sizes, tokens: int, cuda_normal: Normal) -> None:
    groups, rows, k = GROUPS[sizes.name]
    weight, x = random_weight(kind, groups * rows, k, cuda_normal), cuda_normal(tokens, groups * k).bfloat16()
    dirty_memory()
    y = tiles(x, weight, groups=groups)
    assert_gemm(y, product(x, weight, groups), f"{kind} {GROUPS[sizes.name]}, {tokens} tokens")


@pytest.mark.parametrize("kind", KINDS)
def test_odd_groups(kind: str, cuda_normal: Normal) -> None:
    """A group that ends within a tile, whose other rows are the next group's."""
    sizes = [(3, 96, 256), (5, 32, 320)]  # FP8: rows are a multiple of 32
    sizes += [] if "fp8" in kind else [(3, 48, 192), (2, 272, 64)]
    for groups, rows, k in sizes:
        for tokens in (7, 70, 300):
            weight = exact_weight(kind, groups * rows, k, cuda_normal)
            x = (2 * cuda_normal(tokens, groups * k)).round().bfloat16()
            dirty_memory()
            y = tiles(x, weight, groups=groups, dtype=torch.float32)
            assert_bits(y, product(x, weight, groups), f"{kind}: {groups} x {rows} x {k}, {tokens} tokens")


@pytest.mark.parametrize("kind", KINDS)
def test_strides(kind: str, cuda_normal: Normal) -> None:
    """Rows of x and of the output may be longer; what is behind them is neither read nor written."""
    for n, k, more in ((256, 256, 8), (80, 192, 24), (72, 320, 1)):
        weight = exact_weight(kind, n, k, cuda_normal)
        wide = torch.full((70, k + 16), torch.nan, device="cuda")
        wide[:, :k] = (2 * cuda_normal(70, k)).round()
        x = wide.bfloat16()
        for dtype in (torch.bfloat16, torch.float32):
            out = torch.empty(70, n + more, dtype=dtype, device="cuda")
            poison(out)
            y = tiles(x, weight, out=out)
            case = f"{kind} {n} x {k}, {dtype}"
            assert_bits(y[:, :n].contiguous(), product(x, weight).to(dtype), case)
            assert bool(y[:, n:].isnan().all()), f"{case}: written behind the row"


@pytest.mark.parametrize("tokens", [5, 64, 600, 4001])
@pytest.mark.parametrize("kind", KINDS)
def test_bits(kind: str, tokens: int, cuda_normal: Normal) -> None:
    weight, x = random_weight(kind, 1024, 2048, cuda_normal), cuda_normal(tokens, 2048).bfloat16()
    assert_reproducible(lambda: tiles(x, weight), f"{kind}, {tokens} tokens")


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_apart(kind: str, cuda_normal: Normal) -> None:
    """A token of NaN spoils its own row alone, also where the last tile of tokens is not full."""
    weight, x = random_weight(kind, 256, 512, cuda_normal), cuda_normal(200, 512).bfloat16()
    x[-1] = torch.nan
    y = tiles(x, weight)
    assert bool(y[-1].isnan().all()) and bool(y[:-1].isfinite().all()), kind


def test_what_it_cannot_take(cuda_normal: Normal) -> None:
    weight = random_weight("bf16", 64, 64, cuda_normal)
    for x in (cuda_normal(33, 64), cuda_normal(33, 64).bfloat16().T):
        with pytest.raises(RuntimeError, match="gemm_tiles"):
            tiles(x, weight)
    with pytest.raises(RuntimeError, match="gemm_tiles"):
        tiles(cuda_normal(33, 60).bfloat16(), random_weight("bf16", 64, 60, cuda_normal))
