"""linear, linear_stack and grouped_linear against their references, up to where the tile kernel takes over.

test_gemm_bits.py: what is promised bit by bit, and extreme values; test_gemm_tiles.py: many tokens.
"""

from collections.abc import Callable, Sequence

import pytest
import torch
from linear_shapes import GROUPS, matrices, odd_matrices
from numeric import assert_bits, assert_close, assert_gemm, dirty_memory
from shapes import MODELS, Sizes
from tile_weights import KINDS, Stored, bytes_between, exact_weight, random_weight
from torch import Tensor

from dsv4.ops.formats import MatrixCache, Memo, Mxfp4, Nvfp4, Packed, Plain
from dsv4.ops.gemm import grouped_linear, linear, linear_stack, reference

Normal = Callable[..., Tensor]
F32 = torch.float32
TOKENS = (0, 1, 2, 3, 7, 8, 16, 31, 32, 33, 64)
by_model = pytest.mark.parametrize("sizes", MODELS, ids=lambda sizes: sizes.name)
by_kind = pytest.mark.parametrize("kind", KINDS)


def once(weight: Stored) -> Memo:
    """The weight for references: its fp32 matrix is made once."""
    return MatrixCache(1 << 40).wrap(weight)


def assert_product(y: Tensor, want: Tensor, case: str) -> None:
    """``assert_gemm``; but the roundings of a few bf16 values do not average out, so those one by one."""
    if y.dtype == F32 or y.numel() == 0 or y.numel() > 4000:
        assert_gemm(y, want, case)
    else:
        rms = float(want.square().mean().sqrt())
        assert_close(y.float(), want, case, rtol=2**-8, atol=1e-3 * rms)


def check(x: Tensor, weight: Stored, memo: Memo, case: str, dtype: torch.dtype | None, how: str) -> None:
    dirty_memory()
    y = linear(x, weight, activations=how, out_dtype=dtype)
    assert y.dtype == (dtype or x.dtype), case
    want = reference.linear(x, memo, activations=how, out_dtype=F32)
    assert_product(y, want, f"{case}, {len(x)} tokens, {y.dtype}, {how}")


@by_model
@by_kind
def test_linear(kind: str, sizes: Sizes, cuda_normal: Normal) -> None:
    for n, k in matrices(sizes):
        weight = random_weight(kind, n, k, cuda_normal)
        memo = once(weight)
        for tokens in TOKENS:
            x = cuda_normal(tokens, k).bfloat16()
            check(x, weight, memo, f"{kind} {n} x {k}", F32 if tokens % 2 else None, "bf16")


@by_model
@pytest.mark.parametrize("kind", ["bf16", "nvfp4"])
def test_head(kind: str, sizes: Sizes, cuda_normal: Normal) -> None:
    weight = random_weight(kind, sizes.vocab, sizes.hidden, cuda_normal)
    memo = once(weight)
    for tokens in (1, 8, 33):
        check(cuda_normal(tokens, sizes.hidden).bfloat16(), weight, memo, f"{kind} {sizes.name}", F32, "bf16")


@by_model
@by_kind
@pytest.mark.parametrize("activations", ["fp8", "nvfp4"])
def test_activations(activations: str, kind: str, sizes: Sizes, cuda_normal: Normal) -> None:
    """Rows of different size; of NVFP4 a scale of each token's own and a given one."""
    for n, k in ((sizes.q_lora, sizes.hidden), (sizes.hidden, sizes.expert_width)):
        weight = random_weight(kind, n, k, cuda_normal)
        given = [weight]
        if isinstance(weight, Packed) and weight.kind == "nvfp4":
            given.append(weight._replace(in_gs=torch.tensor(0.002, device="cuda")))
        for one in given:
            memo = once(one)
            for tokens in (0, 1, 3, 8, 20, 33):
                x = (cuda_normal(tokens, k) * torch.exp2(2 * cuda_normal(tokens, 1))).bfloat16()
                check(x, one, memo, f"{kind} {n} x {k}", F32 if tokens % 2 else None, activations)


@by_kind
def test_exact(kind: str, cuda_normal: Normal) -> None:
    """Odd sizes, bit by bit: sums of integers do not depend on their order."""
    for n, k in odd_matrices(kind):
        weight = exact_weight(kind, n, k, cuda_normal)
        memo = once(weight)
        for tokens in (1, 5, 8, 9, 17, 32, 33):
            x = (2 * cuda_normal(tokens, k)).round().bfloat16()
            for dtype in (F32, torch.bfloat16):
                dirty_memory()
                y = linear(x, weight, out_dtype=dtype)
                want = reference.linear(x, memo, out_dtype=dtype)
                assert_bits(y, want, f"{kind} {n} x {k}, {tokens} tokens, {dtype}")


@by_kind
def test_f32_input(kind: str, cuda_normal: Normal) -> None:
    """To fp32's accuracy; of a single value, whose product is rounded once, to the last bit."""
    for n, k in ((300, 288), (512, 256), (256, 4096)):
        weight, exact = random_weight(kind, n, k, cuda_normal), exact_weight(kind, n, k, cuda_normal)
        for tokens in (0, 1, 3, 8, 20, 33):
            x = cuda_normal(tokens, k)
            case = f"{kind} {n} x {k}, {tokens} tokens"
            dirty_memory()
            y, want = linear(x, weight), reference.linear(x, weight)
            rms = float(want.square().mean().sqrt()) if tokens else 1.0
            # A tensor core adds up products without rounding each sum.
            assert_close(y, want, case, rtol=1e-5, atol=rms * (2e-5 if k < 1000 else 1e-4))
            assert_product(linear(x, weight, out_dtype=torch.bfloat16), want, case)
            single = torch.zeros_like(x)
            single[:, 5:6] = x[:, :1]
            y, want = linear(single, exact), reference.linear(single, exact)
            assert_close(y, want, f"{case}, one value", rtol=0.0, atol=0.0)


def check_stack(
    x: Tensor, weights: Sequence[Stored], dtypes: Sequence[torch.dtype | None], case: str, how: str = "bf16"
) -> None:
    dirty_memory()
    found = linear_stack(x, weights, activations=how, out_dtypes=dtypes)
    assert [y.dtype for y in found] == [dtype or x.dtype for dtype in dtypes], case
    wanted = reference.linear_stack(x, weights, activations=how, out_dtypes=[F32] * len(weights))
    for index, (y, want) in enumerate(zip(found, wanted, strict=True)):
        assert_product(y, want, f"{case}, {len(x)} tokens, {how}, output {index}")


def attention_stacks(kinds: str, sizes: Sizes, normal: Normal) -> list[list[Stored]]:
    """What reads u and what reads qa in a CSA layer, of the two formats named."""
    linears, others = kinds.split(", ")
    pooled = (2 * sizes.head_dim, 2 * sizes.head_dim, 2 * sizes.index_dim, 2 * sizes.index_dim)
    first = [random_weight(linears, n, sizes.hidden, normal) for n in (sizes.q_lora, sizes.head_dim)]
    first += [random_weight(others, n, sizes.hidden, normal) for n in (*pooled, sizes.index_heads)]
    queries = (sizes.heads * sizes.head_dim, sizes.index_heads * sizes.index_dim)
    return [first, [random_weight(linears, n, sizes.q_lora, normal) for n in queries]]


@by_model
@pytest.mark.parametrize("kinds", ["fp8, bf16", "nvfp4, bf16", "nvfp4, nvfp4"])
def test_stacks_of_attention(kinds: str, sizes: Sizes, cuda_normal: Normal) -> None:
    for weights, k in zip(
        attention_stacks(kinds, sizes, cuda_normal), (sizes.hidden, sizes.q_lora), strict=True
    ):
        dtypes = (None, None, *[F32] * (len(weights) - 2))
        for tokens in (1, 2, 8, 16, 32, 33):
            check_stack(cuda_normal(tokens, k).bfloat16(), weights, dtypes, f"{kinds} {sizes.name}")


@pytest.mark.parametrize("activations", ["bf16", "fp8", "nvfp4"])
@pytest.mark.parametrize("tokens", [0, 1, 7, 8, 20, 32, 33])
def test_stack_of_everything(tokens: int, activations: str, cuda_normal: Normal) -> None:
    """More matrices than a launch takes, in an order that is not the launches', some with an input scale."""
    weights = [random_weight(KINDS[i % 5], n, 544, cuda_normal) for i, n in enumerate(range(17, 300, 20))]
    for i, scale in ((0, 0.002), (5, 0.003)):
        assert isinstance(weights[i], Packed)
        weights[i] = weights[i]._replace(in_gs=torch.tensor(scale, device="cuda"))
    dtypes = [(None, F32, torch.bfloat16)[i % 3] for i in range(len(weights))]
    for x in (cuda_normal(tokens, 544).bfloat16(), cuda_normal(tokens, 544)):
        check_stack(x, weights, dtypes, f"{len(weights)} matrices, {x.dtype}", activations)


@by_model
@by_kind
@pytest.mark.parametrize("activations", ["bf16", "fp8", "nvfp4"])
def test_grouped_linear(activations: str, kind: str, sizes: Sizes, cuda_normal: Normal) -> None:
    """The model's, and groups of odd sizes."""
    few = (0, 1, 2, 8, 16, 31, 32)
    cases = [(*GROUPS[sizes.name], (*few, 33))]
    cases += [(3, 48, 192, few), (5, 32, 320, (*few, 33)), (2, 272, 64, few)] if sizes.name == "tiny" else []
    for groups, rows, k, counts in cases:
        rows += -rows % 32 if kind.startswith("fp8") else 0
        weight = random_weight(kind, groups * rows, k, cuda_normal)
        memo = once(weight)
        for tokens in counts:
            x = (cuda_normal(tokens, groups, k) * torch.exp2(2 * cuda_normal(1, groups, 1))).bfloat16()
            dirty_memory()
            y = grouped_linear(x, weight, activations=activations)
            assert y.dtype == x.dtype
            want = reference.grouped_linear(x.float(), memo, activations=activations)
            assert_product(y, want, f"{kind} {groups} x {rows} x {k}, {tokens} tokens, {activations}")


def test_what_it_cannot_take(cuda_normal: Normal) -> None:
    codes = bytes_between(cuda_normal, 0, 256, 64, 32)
    scales = torch.ones(64, 4, device="cuda").to(torch.float8_e4m3fn)
    weight, x = random_weight("bf16", 64, 64, cuda_normal), cuda_normal(8, 64).bfloat16()
    unpacked = Nvfp4(codes, scales, torch.ones((), device="cuda"))
    mxfp4 = Mxfp4(codes, scales[:, :2].contiguous().view(torch.float8_e8m0fnu))
    for inputs, matrix, words in (
        (x, unpacked, "packed .dsv4.ops.pack., found Nvfp4"),
        (x, mxfp4, "packed .dsv4.ops.pack., found Mxfp4"),
        (
            cuda_normal(8, 24).bfloat16(),
            Plain(codes[:, :24].bfloat16()),
            "K a multiple of 16, found .64, 24.",
        ),
        (cuda_normal(8, 48).bfloat16(), weight, r"expected .1 R, 48., found .64, 64."),
        (x.view(2, 4, 64), weight, "x: expected shape"),
        (cuda_normal(64, 8).bfloat16().T, weight, "contiguous"),
        (x.half(), weight, "float16"),
    ):
        with pytest.raises(AssertionError, match=words):
            linear(inputs, matrix)
        other = weight._replace(w=weight.w[:, : inputs.shape[-1]])
        with pytest.raises(AssertionError, match=words):
            linear_stack(inputs, [other, matrix], out_dtypes=(None, F32))
    shifted = torch.zeros(8 * 64 + 8, dtype=torch.bfloat16, device="cuda")[1:513].view(8, 64)
    for call in (lambda: linear(shifted, weight), lambda: linear(x, weight, out_dtype=torch.float16)):
        with pytest.raises(RuntimeError, match="gemv_mma"):
            call()
    with pytest.raises(AssertionError, match="at most 16 groups, found 17"):
        grouped_linear(cuda_normal(2, 17, 16).bfloat16(), random_weight("bf16", 272, 16, cuda_normal))
    for groups in (3, 8):  # 64 rows are no multiple of 3, nor of 8 x 16
        with pytest.raises(AssertionError, match="weight: expected"):
            grouped_linear(cuda_normal(2, groups, 64).bfloat16(), weight)
