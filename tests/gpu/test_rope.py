"""The rope kernels against their references."""

from collections.abc import Callable

import pytest
import torch
from numeric import assert_bits, assert_close, assert_reproducible, assert_rounded, dirty_memory
from shapes import MODELS, PRO, TOKENS, Sizes
from torch import Tensor

from dsv4.ops.rope import apply_rope, reference, rms_norm_rope

EPS = 1e-6
Normal = Callable[..., Tensor]
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])


def rows_of(sizes: Sizes, tokens: int) -> list[tuple[int, ...]]:
    """Queries, KV rows, index queries and keys."""
    few = tokens // 8 if tokens > 1000 else tokens
    heads = [(few, sizes.heads, sizes.head_dim), (few, sizes.index_heads, sizes.index_dim)]
    return [*heads, (tokens, sizes.head_dim), (tokens, sizes.index_dim)]


def turns(tokens: int, pairs: int) -> tuple[Tensor, Tensor]:
    """Positions up to a million, frequencies from 1 down to 1e-5."""
    generator = torch.Generator("cuda").manual_seed(tokens + 1)
    positions = torch.randint(1_000_001, (tokens,), generator=generator, device="cuda")
    return positions, torch.logspace(0, -5, pairs, device="cuda")


@DTYPES
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("sizes", MODELS, ids=lambda sizes: sizes.name)
def test_rope(sizes: Sizes, tokens: int, dtype: torch.dtype, cuda_normal: Normal) -> None:
    for shape in rows_of(sizes, tokens):
        x, (positions, inv_freq) = (3 * cuda_normal(*shape)).to(dtype), turns(shape[0], sizes.rope_dim // 2)
        for inverse in (False, True):
            case = f"{sizes.name} {shape} {dtype} {inverse=}"
            dirty_memory()
            y = apply_rope(x, positions, inv_freq, inverse=inverse)
            exact = reference.apply_rope(x.float(), positions, inv_freq, inverse=inverse)
            assert_rounded(y, reference.apply_rope(x, positions, inv_freq, inverse=inverse), case, exact)
            kept = (y[..., : -sizes.rope_dim], x[..., : -sizes.rope_dim])
            assert_bits(*(part.contiguous() for part in kept), f"{case}: copied values")


@DTYPES
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("sizes", MODELS, ids=lambda sizes: sizes.name)
def test_rms_norm_rope(sizes: Sizes, tokens: int, dtype: torch.dtype, cuda_normal: Normal) -> None:
    for shape in rows_of(sizes, tokens):
        x, (positions, inv_freq) = (3 * cuda_normal(*shape)).to(dtype), turns(shape[0], sizes.rope_dim // 2)
        weight = 1 + 0.3 * cuda_normal(shape[-1]) if len(shape) == 2 else None
        dirty_memory()
        y = rms_norm_rope(x, weight, positions, inv_freq, eps=EPS)
        exact = reference.rms_norm_rope(x.float(), weight, positions, inv_freq, eps=EPS)
        want = reference.rms_norm_rope(x, weight, positions, inv_freq, eps=EPS)
        assert_rounded(y, want, f"{sizes.name} {shape} {dtype}", exact)


def test_angles() -> None:
    """Unit vectors turn to the cosine and sine of the fp32 angle, within 3e-7 at any position."""
    positions = torch.cat((torch.arange(2000), torch.arange(2000) + 998_000)).cuda()
    inv_freq = torch.logspace(0, -5, 32, device="cuda")
    x = torch.tensor([1.0, 0.0], device="cuda").repeat(4000, 32)
    y = apply_rope(x, positions, inv_freq).double()
    angle = (positions.float()[:, None] * inv_freq).double()
    want = torch.stack((angle.cos(), angle.sin()), dim=-1).flatten(1)
    assert_close(y, want, "angles", rtol=0, atol=3e-7)
    assert_bits(apply_rope(x[:1], positions[:1], inv_freq), x[:1], "position 0")


ODD = [(1, 2), (5, 11), (4, 3, 14), (9, 16), (33, 5, 24), (3, 2, 3, 264), (2, 1024), (2, 4100)]


@DTYPES
@pytest.mark.parametrize("shape", ODD)
def test_odd_sizes(shape: tuple[int, ...], dtype: torch.dtype, cuda_normal: Normal) -> None:
    """Widths that no vector fits, groups of one lane, tokens across blocks, lanes with fewer vectors."""
    x, weight = cuda_normal(*shape).to(dtype), cuda_normal(shape[-1])
    for pairs in {1, shape[-1] // 2, min(4, shape[-1] // 2)}:
        positions, inv_freq = turns(shape[0], pairs)
        case = f"{shape} {pairs} pairs {dtype}"
        dirty_memory()
        y, z = apply_rope(x, positions, inv_freq), rms_norm_rope(x, weight, positions, inv_freq, eps=EPS)
        assert_rounded(y, reference.apply_rope(x, positions, inv_freq), case)
        assert_rounded(z, reference.rms_norm_rope(x, weight, positions, inv_freq, eps=EPS), case)


def test_bits(cuda_normal: Normal) -> None:
    """The same call, its graph, and each token alone, give the same bits."""
    for shape in ((8, PRO.heads, 512), (8, 4, 512), (8, 512), (8, 64, 128), (8, 128)):
        x, (positions, inv_freq) = cuda_normal(*shape).bfloat16(), turns(8, 32)
        for call in (
            lambda x, positions, inv_freq=inv_freq: apply_rope(x, positions, inv_freq, inverse=True),
            lambda x, positions, inv_freq=inv_freq: rms_norm_rope(x, None, positions, inv_freq, eps=EPS),
        ):
            assert_reproducible(lambda call=call, x=x, positions=positions: call(x, positions), f"{shape}")
            whole = call(x, positions)
            for t in range(8):
                assert_bits(call(x[t : t + 1], positions[t : t + 1]), whole[t : t + 1], f"{shape}: token {t}")
            assert_bits(call(x[:5], positions[:5]), whole[:5], f"{shape}: 5 tokens")


def test_what_it_cannot_take(cuda_normal: Normal) -> None:
    x, (positions, inv_freq) = cuda_normal(4, 8), turns(4, 2)
    for bad, words in (
        ((cuda_normal(8, 4).T, positions, inv_freq), "contiguous"),
        ((x.half(), positions, inv_freq), "float16"),
        ((x, positions.int(), inv_freq), "positions: expected torch.int64"),
        ((x, positions[:3], inv_freq), "T = 3"),
        ((x, positions, inv_freq.repeat(3)), "N >= 12"),
    ):
        with pytest.raises(AssertionError, match=words):
            apply_rope(*bad)
        with pytest.raises(AssertionError, match=words):
            rms_norm_rope(bad[0], None, *bad[1:], eps=EPS)
    with pytest.raises(AssertionError, match="weight: expected shape"):
        rms_norm_rope(x, cuda_normal(4), positions, inv_freq, eps=EPS)
