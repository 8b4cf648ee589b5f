"""The norm kernels against their references."""

from collections.abc import Callable

import pytest
import torch
from numeric import assert_bits, assert_reproducible, assert_rounded, dirty_memory
from shapes import MODELS, TOKENS, Sizes
from torch import Tensor

from dsv4.ops.norm import reference, rms_norm

EPS = 1e-6


def rows_of(sizes: Sizes, tokens: int) -> list[tuple[tuple[int, ...], bool]]:
    """Shapes that the model normalises, and whether with a weight."""
    weighted = [(tokens, width) for width in (sizes.hidden, sizes.q_lora, sizes.head_dim, sizes.index_dim)]
    return [(shape, True) for shape in weighted] + [((tokens, sizes.heads, sizes.head_dim), False)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("sizes", MODELS, ids=lambda sizes: sizes.name)
def test_rms_norm(sizes: Sizes, tokens: int, dtype: torch.dtype, cuda_normal: Callable[..., Tensor]) -> None:
    for shape, weighted in rows_of(sizes, tokens):
        if tokens > 1000 and len(shape) == 3:
            shape = (tokens // 8, *shape[1:])
        x = (3 * cuda_normal(*shape)).to(dtype)
        weight = 1 + 0.3 * cuda_normal(shape[-1]) if weighted else None
        dirty_memory()
        y = rms_norm(x, weight, eps=EPS)
        exact = reference.rms_norm(x.double(), weight, eps=EPS) if dtype == torch.bfloat16 else None
        assert_rounded(y, reference.rms_norm(x, weight, eps=EPS), f"{sizes.name} {shape} {dtype}", exact)


@pytest.mark.parametrize("width", [1, 7, 33, 96, 20000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
def test_odd_widths(width: int, dtype: torch.dtype, cuda_normal: Callable[..., Tensor]) -> None:
    x, weight = cuda_normal(5, width).to(dtype), cuda_normal(width)
    assert_rounded(
        rms_norm(x, weight, eps=EPS), reference.rms_norm(x, weight, eps=EPS), f"width {width} {dtype}"
    )


@pytest.mark.parametrize("sizes", MODELS, ids=lambda sizes: sizes.name)
def test_bits(sizes: Sizes, cuda_normal: Callable[..., Tensor]) -> None:
    """The same call, its graph, and each row alone, give the same bits."""
    x, weight = cuda_normal(8, sizes.hidden).bfloat16(), cuda_normal(sizes.hidden)
    assert_reproducible(lambda: rms_norm(x, weight, eps=EPS), sizes.name)
    whole = rms_norm(x, weight, eps=EPS)
    for t in range(1, 8):
        assert_bits(rms_norm(x[:t], weight, eps=EPS), whole[:t], f"{sizes.name}: {t} tokens")


def test_what_it_cannot_take(cuda_normal: Callable[..., Tensor]) -> None:
    x = cuda_normal(4, 8)
    for bad, words in ((x.T, "contiguous"), (x.half(), "float16")):
        with pytest.raises(AssertionError, match=words):
            rms_norm(bad, None, eps=EPS)
    with pytest.raises(AssertionError, match="weight: expected shape"):
        rms_norm(x, cuda_normal(4), eps=EPS)
