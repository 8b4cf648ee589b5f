"""The mhc kernels against their references."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from numeric import assert_bits, assert_reproducible, assert_rounded, assert_small_fp32, dirty_memory
from shapes import MODELS, TOKENS, Sizes
from torch import Tensor

from dsv4.ops import mhc
from dsv4.ops.mhc import mhc_boundary, mhc_head, mhc_post, mhc_pre, reference, sinkhorn_normalize

PRE = {"iterations": 20, "eps": 1e-6, "norm_eps": 1e-6}
HEAD = {"eps": 1e-6, "norm_eps": 1e-6}
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
ALL_MODELS = pytest.mark.parametrize("sizes", MODELS, ids=lambda sizes: sizes.name)


class Case(NamedTuple):
    """The arguments of ``mhc_boundary``."""

    y: Tensor
    x: Tensor
    post: Tensor
    comb: Tensor
    fn: Tensor
    base: Tensor
    scale: Tensor
    norm: Tensor

    def rows(self, count: int) -> "Case":
        """The same with the first tokens only."""
        return Case(*(tensor[:count] for tensor in self[:4]), *self[4:])


def make_case(tokens: int, hidden: int, dtype: torch.dtype, normal: Callable[..., Tensor]) -> Case:
    comb = reference.sinkhorn_normalize(normal(tokens, 4, 4), iterations=20, eps=1e-6)
    return Case(
        normal(tokens, hidden).to(dtype),
        (2 * normal(tokens, 4, hidden)).to(dtype),
        2 * torch.sigmoid(normal(tokens, 4)),
        comb,
        normal(24, 4 * hidden) * (4 * hidden) ** -0.5,
        normal(24),
        torch.tensor([0.7, 1.3, -0.9], device="cuda"),
        1 + 0.3 * normal(hidden),
    )


def check_pre(found: tuple[Tensor, ...], want: tuple[Tensor, ...], case: str) -> None:
    """u, post and comb."""
    assert_rounded(found[0], want[0], f"{case}: u")
    assert_small_fp32(found[1], want[1], f"{case}: post")
    assert_small_fp32(found[2], want[2], f"{case}: comb")


@DTYPES
@pytest.mark.parametrize("tokens", [*TOKENS, 2, 8, 9, 16, 32, 33])
@ALL_MODELS
def test_boundary(sizes: Sizes, tokens: int, dtype: torch.dtype, cuda_normal: Callable[..., Tensor]) -> None:
    if dtype == torch.float32:
        tokens = min(tokens, 1000)
    args = make_case(tokens, sizes.hidden, dtype, cuda_normal)
    name = f"{sizes.name} T={tokens} {dtype}"
    dirty_memory()
    x, u, post, comb = mhc_boundary(*args, **PRE)
    want_x = reference.mhc_post(*args[:4])
    assert_rounded(x, want_x, f"{name}: x")
    # From the streams that the kernel stored: a rounding that flips there is not an error of what follows.
    want_u, want_post, want_comb = reference.mhc_pre(x, *args[4:7], **PRE)
    want_u = reference.rms_norm(want_u, args.norm, eps=1e-6)
    check_pre((u, post, comb), (want_u, want_post, want_comb), name)


@DTYPES
@pytest.mark.parametrize("tokens", TOKENS)
@ALL_MODELS
def test_parts(sizes: Sizes, tokens: int, dtype: torch.dtype, cuda_normal: Callable[..., Tensor]) -> None:
    """post, pre and head on their own."""
    if dtype == torch.float32:
        tokens = min(tokens, 1000)
    args = make_case(tokens, sizes.hidden, dtype, cuda_normal)
    head = (args.fn[:4].contiguous(), args.base[:4].contiguous(), args.scale[:1].contiguous())
    name = f"{sizes.name} T={tokens} {dtype}"
    dirty_memory()
    x, pre, z = mhc_post(*args[:4]), mhc_pre(args.x, *args[4:7], **PRE), mhc_head(args.x, *head, **HEAD)
    assert_rounded(x, reference.mhc_post(*args[:4]), f"{name}: post")
    check_pre(pre, reference.mhc_pre(args.x, *args[4:7], **PRE), f"{name}: pre")
    assert_rounded(z, reference.mhc_head(args.x, *head, **HEAD), f"{name}: head")


@DTYPES
@pytest.mark.parametrize("hidden", [8, 24, 120, 136, 520, 8192])
def test_odd_widths(hidden: int, dtype: torch.dtype, cuda_normal: Callable[..., Tensor]) -> None:
    """Blocks with few columns or none, chunks that are not full."""
    for tokens in (3, 37):
        args = make_case(tokens, hidden, dtype, cuda_normal)
        dirty_memory()
        x, *pre = mhc_boundary(*args, **PRE)
        name = f"D={hidden} T={tokens}"
        assert_rounded(x, reference.mhc_post(*args[:4]), f"{name}: x")
        want_u, *want = reference.mhc_pre(x, *args[4:7], **PRE)
        check_pre(tuple(pre), (reference.rms_norm(want_u, args.norm, eps=1e-6), *want), name)


def test_products_are_exact(cuda_normal: Callable[..., Tensor]) -> None:
    """fn of 24-bit values whose low bits count: as close to double precision as fp32 sums can be."""
    args = make_case(8, 4096, torch.bfloat16, cuda_normal)
    fn = args.fn * (1 + 2.0**-20 * cuda_normal(*args.fn.shape))
    _, post, _ = mhc_pre(args.x, fn, args.base, args.scale, **PRE)
    flat = args.x.flatten(1).double()
    mixes = flat @ fn.double().T * torch.rsqrt(flat.square().mean(-1, keepdim=True) + 1e-6)
    want = 2 * torch.sigmoid(mixes[:, 4:8] * args.scale[1] + args.base[4:8])
    assert float((post - want).abs().max()) < 2e-6


@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 8.0, 60.0])
@pytest.mark.parametrize("iterations", [1, 2, 20])
def test_sinkhorn(spread: float, iterations: int, cuda_normal: Callable[..., Tensor]) -> None:
    logits = spread * cuda_normal(3, 137, 4, 4)
    dirty_memory()
    found = sinkhorn_normalize(logits, iterations=iterations, eps=1e-6)
    want = reference.sinkhorn_normalize(logits, iterations=iterations, eps=1e-6)
    assert_small_fp32(found, want, f"{spread=} {iterations=}")


@ALL_MODELS
def test_bits(sizes: Sizes, cuda_normal: Callable[..., Tensor]) -> None:
    """The same call, its graph, and the first tokens alone (up to 8), give the same bits."""
    args = make_case(8, sizes.hidden, torch.bfloat16, cuda_normal)
    assert_reproducible(lambda: mhc_boundary(*args, **PRE), sizes.name)
    whole = mhc_boundary(*args, **PRE)
    for count in range(1, 8):
        for index, part in enumerate(mhc_boundary(*args.rows(count), **PRE)):
            assert_bits(part, whole[index][:count], f"{sizes.name}: {count} tokens, output {index}")
    many = make_case(137, sizes.hidden, torch.bfloat16, cuda_normal)
    assert_reproducible(lambda: mhc_boundary(*many, **PRE), f"{sizes.name}: 137 tokens")


@ALL_MODELS
def test_many_tokens(
    sizes: Sizes, cuda_normal: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks of a launch exchange sums: in many launches or one, twenty times, the bits are the same."""
    args = make_case(4500, sizes.hidden, torch.bfloat16, cuda_normal)  # every block finishes many tokens
    whole = mhc_boundary(*args, **PRE)
    for at_once in (*(9, 100, 999), *(mhc.AT_ONCE,) * 20):
        monkeypatch.setattr(mhc, "AT_ONCE", at_once)
        dirty_memory()
        for index, part in enumerate(mhc_boundary(*args, **PRE)):
            assert_bits(part, whole[index], f"{sizes.name}: {at_once} tokens a launch, output {index}")


def test_what_it_cannot_take(cuda_normal: Callable[..., Tensor]) -> None:
    args = make_case(2, 64, torch.bfloat16, cuda_normal)
    wide = make_case(2, 8200, torch.bfloat16, cuda_normal)
    for bad, words in (
        (args._replace(x=args.x[:, :3].contiguous()), "x: expected shape"),
        (args._replace(fn=args.fn.double()), "fn: expected torch.float32"),
        (args._replace(comb=args.comb.mT), "comb: expected a contiguous tensor"),
        (make_case(2, 12, torch.bfloat16, cuda_normal), "a multiple of 8"),
        (wide, "at most 8192"),
    ):
        with pytest.raises(AssertionError, match=words):
            mhc_boundary(*bad, **PRE)
