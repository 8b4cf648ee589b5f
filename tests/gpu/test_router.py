"""The router kernels against their references."""

import math
from collections.abc import Callable

import pytest
import torch
from numeric import assert_bits, assert_close, assert_reproducible, assert_small_fp32, dirty_memory
from router_checks import assert_choice
from shapes import FLASH, MODELS, TOKENS, Sizes
from torch import Tensor

from dsv4.ops.formats import Plain
from dsv4.ops.router import gate_logits, hash_gate, reference, topk_gate

FLOATS = (torch.bfloat16, torch.float32)


def check_topk_gate(logits: Tensor, bias: Tensor, top_k: int, case: str, *, ties: bool = False) -> None:
    dirty_memory()
    found = topk_gate(logits, bias, top_k=top_k, scale=2.5)
    assert_choice(found, logits, bias, case, top_k=top_k, scale=2.5, ties=ties)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("sizes", MODELS, ids=lambda sizes: sizes.name)
def test_topk_gate(sizes: Sizes, tokens: int, cuda_normal: Callable[..., Tensor]) -> None:
    logits, bias = 3 * cuda_normal(tokens, sizes.experts), 0.3 * cuda_normal(sizes.experts)
    check_topk_gate(logits, bias, sizes.chosen, f"{sizes.name}, {tokens} tokens")


@pytest.mark.parametrize(
    ("experts", "top_k"),
    [(1, 1), (8, 2), (8, 8), (33, 5), (128, 40), (137, 6), (512, 8), (513, 3), (1000, 1000), (1024, 9)],
)
def test_odd_sizes(experts: int, top_k: int, cuda_normal: Callable[..., Tensor]) -> None:
    logits, bias = 3 * cuda_normal(5, experts), cuda_normal(experts)
    check_topk_gate(logits, bias, top_k, f"{top_k} of {experts}")


@pytest.mark.parametrize("sizes", MODELS, ids=lambda sizes: sizes.name)
def test_ties_go_to_the_lowest_index(sizes: Sizes, cuda_normal: Callable[..., Tensor]) -> None:
    """Few levels of logits; equal logits and few levels of bias; experts that a bias of -inf excludes."""
    logits, none = cuda_normal(40, sizes.experts).round(), torch.zeros(sizes.experts, device="cuda")
    check_topk_gate(logits, none, sizes.chosen, f"{sizes.name}: levels of logits", ties=True)
    check_topk_gate(0 * logits, logits[0], sizes.chosen, f"{sizes.name}: levels of bias", ties=True)
    some = torch.arange(sizes.experts, device="cuda") % 3 == 1
    check_topk_gate(0 * logits, torch.where(some, 0.0, -math.inf), sizes.chosen, "-inf", ties=True)


def test_extreme_logits() -> None:
    logits = torch.tensor(
        [[100.0, 50.0, 20.5, 20.0, 19.5, 0.0, -19.5, -30.0, -80.0], [-80.0] * 9, [3e38] + [-1e30] * 8],
        device="cuda",
    )
    check_topk_gate(logits, torch.zeros(9, device="cuda"), 9, "extreme logits", ties=True)


def test_nan_chooses_experts_that_exist() -> None:
    logits = torch.full((3, FLASH.experts), math.nan, device="cuda")
    logits[1] = -math.nan
    logits.view(torch.int32)[2] = -1
    _, experts = topk_gate(logits, torch.zeros(FLASH.experts, device="cuda"), top_k=6, scale=1.0)
    assert int(experts.min()) >= 0 and int(experts.max()) < FLASH.experts
    assert bool((experts.sort(dim=-1).values.diff(dim=-1) > 0).all())


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("sizes", MODELS, ids=lambda sizes: sizes.name)
def test_hash_gate(sizes: Sizes, tokens: int, cuda_normal: Callable[..., Tensor]) -> None:
    logits = 3 * cuda_normal(tokens, sizes.experts)
    table = cuda_normal(sizes.vocab // 8, sizes.experts).argsort(dim=-1)[:, : sizes.chosen].contiguous()
    ids = cuda_normal(tokens).view(torch.int32).long() % len(table)
    dirty_memory()
    weights, experts = hash_gate(logits, ids, table, scale=1.5)
    want_weights, want_experts = reference.hash_gate(logits, ids, table, scale=1.5)
    case = f"{sizes.name}, {tokens} tokens"
    assert_bits(experts, want_experts, f"{case}: experts")
    assert_small_fp32(weights, want_weights, f"{case}: weights")


def test_hash_gate_of_many_experts(cuda_normal: Callable[..., Tensor]) -> None:
    logits, table = cuda_normal(4, 100), cuda_normal(9, 100).argsort(dim=-1)[:, :70].contiguous()
    ids = torch.tensor([8, 0, 3, 3], device="cuda")
    weights, experts = hash_gate(logits, ids, table, scale=1.0)
    want_weights, want_experts = reference.hash_gate(logits, ids, table, scale=1.0)
    assert_bits(experts, want_experts, "70 of 100")
    assert_small_fp32(weights, want_weights, "70 of 100")


@pytest.mark.parametrize("tokens", [*TOKENS, 2, 4, 16, 17])
@pytest.mark.parametrize("sizes", MODELS, ids=lambda sizes: sizes.name)
def test_gate_logits(sizes: Sizes, tokens: int, cuda_normal: Callable[..., Tensor]) -> None:
    x, w = cuda_normal(tokens, sizes.hidden), cuda_normal(sizes.experts, sizes.hidden) * sizes.hidden**-0.5
    for dtype in FLOATS:
        for stored in FLOATS:
            a, weight = x.to(dtype), Plain(w.to(stored))
            dirty_memory()
            y = gate_logits(a, weight)
            want = reference.gate_logits(a, weight)
            # A tensor core adds up products without rounding each sum.
            atol = 2e-5 if tokens <= 16 else 1e-4
            assert_close(y, want, f"{sizes.name}, {tokens} tokens, {dtype}, {stored}", rtol=1e-5, atol=atol)


@pytest.mark.parametrize("width", [8, 40, 1000, 8200, 20000])
def test_odd_widths(width: int, cuda_normal: Callable[..., Tensor]) -> None:
    x, w = cuda_normal(5, width), cuda_normal(3, width) * width**-0.5
    for dtype in FLOATS:
        a, weight = x.to(dtype), Plain(w.to(dtype))
        assert_small_fp32(gate_logits(a, weight), reference.gate_logits(a, weight), f"width {width} {dtype}")


@pytest.mark.parametrize("sizes", MODELS, ids=lambda sizes: sizes.name)
def test_bits(sizes: Sizes, cuda_normal: Callable[..., Tensor]) -> None:
    """The same call, its graph, and each row alone, give the same bits."""
    x, bias = cuda_normal(16, sizes.hidden).bfloat16(), cuda_normal(sizes.experts)
    weight = Plain((cuda_normal(sizes.experts, sizes.hidden) * sizes.hidden**-0.5).bfloat16())

    def route(tokens: int) -> tuple[Tensor, ...]:
        logits = gate_logits(x[:tokens], weight)
        return logits, *topk_gate(logits, bias, top_k=sizes.chosen, scale=1.5)

    assert_reproducible(lambda: route(16), sizes.name)
    whole = route(16)
    for t in (1, 2, 3, 4, 5, 7, 8, 15):
        for part, all_rows in zip(route(t), whole, strict=True):
            assert_bits(part, all_rows[:t], f"{sizes.name}: {t} tokens")
    ids, table = torch.arange(16, device="cuda"), whole[2]
    assert_reproducible(lambda: hash_gate(whole[0], ids, table, scale=1.5), f"{sizes.name}: hash_gate")


def test_what_it_cannot_take(cuda_normal: Callable[..., Tensor]) -> None:
    logits, bias = cuda_normal(8, 8), cuda_normal(8)
    ids, table = torch.arange(8, device="cuda"), torch.zeros(8, 2, dtype=torch.int64, device="cuda")
    for bad, words in ((logits.T, "contiguous"), (logits.bfloat16(), "bfloat16")):
        with pytest.raises(AssertionError, match=words):
            topk_gate(bad, bias, top_k=2, scale=1.0)
        with pytest.raises(AssertionError, match=words):
            hash_gate(bad, ids, table, scale=1.0)
    with pytest.raises(AssertionError, match="top_k: expected 1 to 8 experts, found 9"):
        topk_gate(logits, bias, top_k=9, scale=1.0)
    with pytest.raises(AssertionError, match="at most 1024 experts"):
        topk_gate(cuda_normal(1, 1025), cuda_normal(1025), top_k=2, scale=1.0)
    for x, weight, words in (
        (logits.T, Plain(logits), "contiguous"),
        (logits, Plain(logits.half()), "float16"),
        (cuda_normal(2, 12), Plain(cuda_normal(3, 12)), "multiple of 8"),
    ):
        with pytest.raises(AssertionError, match=words):
            gate_logits(x, weight)
