"""The router in one launch: against its reference and the two launches, beside other tokens, in a row."""

import math
from collections.abc import Callable

import pytest
import torch
from numeric import assert_bits, assert_reproducible, assert_small_fp32, dirty_memory
from router_checks import assert_choice
from shapes import FLASH, MODELS, PRO, TINY, Sizes
from torch import Tensor

from dsv4.ops.formats import Nvfp4, Packed, Plain
from dsv4.ops.pack import pack_weight
from dsv4.ops.quant import nvfp4_global_scale, quantize_nvfp4
from dsv4.ops.router import gate_logits, hash_gate, reference, route_hash, route_topk, topk_gate

SCALE = 1.5
FEW = (0, 1, 2, 3, 5, 8)
KINDS = ("bf16", "nvfp4", "nvfp4 with input scale")


def make_gate(kind: str, w: Tensor) -> Plain | Packed:
    if kind == "bf16":
        return Plain(w.bfloat16())
    in_gs = torch.tensor(1 / 700, device="cuda") if kind.endswith("scale") else None
    global_scale = nvfp4_global_scale(w, per_token=False)
    return pack_weight(Nvfp4(*quantize_nvfp4(w, global_scale), global_scale, in_gs))


def random_gate(
    sizes: Sizes, normal: Callable[..., Tensor], kind: str = "bf16"
) -> tuple[Plain | Packed, Tensor]:
    weight = make_gate(kind, normal(sizes.experts, sizes.hidden) * sizes.hidden**-0.5)
    return weight, 0.3 * normal(sizes.experts)


@pytest.mark.parametrize("activations", ["bf16", "nvfp4", "fp8"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", MODELS, ids=lambda sizes: sizes.name)
def test_route_topk(sizes: Sizes, kind: str, activations: str, cuda_normal: Callable[..., Tensor]) -> None:
    weight, bias = random_gate(sizes, cuda_normal, kind)
    for tokens in (*FEW, 9, 40):
        x = 3 * cuda_normal(tokens, sizes.hidden).bfloat16()
        dirty_memory()
        found = route_topk(x, weight, bias, top_k=sizes.chosen, scale=SCALE, activations=activations)
        logits = reference.gate_logits(x, weight, activations=activations)
        case = f"{sizes.name}, {kind}, {activations}, {tokens} tokens"
        assert_choice(found, logits, bias, case, top_k=sizes.chosen, scale=SCALE)


@pytest.mark.parametrize("kind", ["bf16", "nvfp4"])
@pytest.mark.parametrize("sizes", MODELS, ids=lambda sizes: sizes.name)
def test_route_hash(sizes: Sizes, kind: str, cuda_normal: Callable[..., Tensor]) -> None:
    weight, _ = random_gate(sizes, cuda_normal, kind)
    table = cuda_normal(1000, sizes.experts).argsort(dim=-1)[:, : sizes.chosen].contiguous()
    for tokens in (*FEW, 9):
        x, ids = cuda_normal(tokens, sizes.hidden).bfloat16(), 997 - 3 * torch.arange(tokens, device="cuda")
        dirty_memory()
        weights, experts = route_hash(x, weight, ids, table, scale=SCALE)
        want_weights, want_experts = reference.route_hash(x, weight, ids, table, scale=SCALE)
        case = f"{sizes.name}, {kind}, {tokens} tokens"
        assert_bits(experts, want_experts, f"{case}: experts")
        assert_small_fp32(weights, want_weights, f"{case}: weights")


@pytest.mark.parametrize(
    ("experts", "width", "top_k"),
    [(1, 8, 1), (15, 40, 3), (17, 1000, 17), (255, 4096, 32), (257, 72, 6), (385, 7168, 8), (512, 8192, 9)],
)
def test_ties_and_odd_sizes(experts: int, width: int, top_k: int, cuda_normal: Callable[..., Tensor]) -> None:
    """Logits that are exact in any order, many of them equal: bit for bit what the two launches give."""
    x, w = (cuda_normal(size, width).round().clamp(-2, 2).bfloat16() for size in (8, experts))
    weight, bias = Plain(w), (2 * cuda_normal(experts)).round() / 2
    logits = gate_logits(x, weight)
    assert torch.equal(logits, reference.gate_logits(x, weight))
    found = route_topk(x, weight, bias, top_k=top_k, scale=SCALE)
    case = f"{top_k} of {experts}, width {width}"
    assert_choice(found, logits, bias, case, top_k=top_k, scale=SCALE, ties=True)
    for part, want in zip(found, topk_gate(logits, bias, top_k=top_k, scale=SCALE), strict=True):
        assert_bits(part, want, f"{case}: the two launches")
    if experts >= 17:
        table = cuda_normal(8, experts).argsort(dim=-1)[:, :top_k].contiguous()
        ids = torch.arange(8, device="cuda")
        hashed = route_hash(x, weight, ids, table, scale=SCALE)
        for part, want in zip(hashed, hash_gate(logits, ids, table, scale=SCALE), strict=True):
            assert_bits(part, want, f"{case}: hash_gate")


@pytest.mark.parametrize("kind", ["bf16", "nvfp4"])
@pytest.mark.parametrize("sizes", MODELS, ids=lambda sizes: sizes.name)
def test_a_token_is_the_same_beside_others(
    sizes: Sizes, kind: str, cuda_normal: Callable[..., Tensor]
) -> None:
    weight, bias = random_gate(sizes, cuda_normal, kind)
    x = cuda_normal(8, sizes.hidden).bfloat16()

    def route(first: int, last: int) -> tuple[Tensor, Tensor]:
        return route_topk(x[first:last], weight, bias, top_k=sizes.chosen, scale=SCALE, activations="nvfp4")

    assert_reproducible(lambda: route(0, 8), sizes.name)
    whole = route(0, 8)
    for first, last in ((0, 1), (7, 8), (2, 4), (3, 8), (0, 7)):
        for part, rows in zip(route(first, last), whole, strict=True):
            assert_bits(part, rows[first:last], f"{sizes.name}: tokens {first} to {last - 1}")


@pytest.mark.allocator
def test_launches_in_a_row(cuda_normal: Callable[..., Tensor]) -> None:
    """Launches of all sizes and token counts overlap in a graph; none finds what another left."""
    gates = {sizes: random_gate(sizes, cuda_normal) for sizes in MODELS}
    calls = []
    for turn in range(96):
        sizes, tokens = (FLASH, TINY, PRO, FLASH)[turn % 4], (1, 8, 2, 1, 5)[turn % 5]
        x = cuda_normal(tokens, sizes.hidden).bfloat16()
        calls.append((sizes, x * (turn % 7 != 3)))  # at times sums that are zero

    def run(part: list[tuple[Sizes, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        return [route_topk(x, *gates[s], top_k=s.chosen, scale=SCALE) for s, x in part]

    want = []
    for call in calls:
        want += run([call])
        torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(calls)
    for _ in range(3):
        for outputs in captured:
            for part in outputs:
                part.fill_(-1)
        graph.replay()
        torch.cuda.synchronize()
        for number, (outputs, wanted) in enumerate(zip(captured, want, strict=True)):
            for part, expected in zip(outputs, wanted, strict=True):
                assert_bits(part, expected, f"launch {number} of a graph")


def test_zeros_and_nan(cuda_normal: Callable[..., Tensor]) -> None:
    """Zero sums arrive; tokens of NaN and infinities choose experts that exist, and harm no other token."""
    weight, _ = random_gate(FLASH, cuda_normal)
    none = torch.zeros(FLASH.experts, device="cuda")
    x = cuda_normal(8, FLASH.hidden).bfloat16()
    x[1], x[3], x[5], x[6] = 0.0, math.nan, math.inf, -math.nan
    weights, experts = route_topk(x, weight, none, top_k=6, scale=SCALE)
    assert experts[1].tolist() == [0, 1, 2, 3, 4, 5]
    assert_small_fp32(weights[1], torch.full((6,), SCALE / 6, device="cuda"), "zeros")
    assert 0 <= int(experts.min()) and int(experts.max()) < FLASH.experts
    assert bool((experts.sort(dim=-1).values.diff(dim=-1) > 0).all())
    alone = route_topk(x[4:5], weight, none, top_k=6, scale=SCALE)
    assert_bits(weights[4:5], alone[0], "beside NaN: weights")
    assert_bits(experts[4:5], alone[1], "beside NaN: experts")


def test_what_goes_by_two_launches(cuda_normal: Callable[..., Tensor]) -> None:
    weight, bias = random_gate(FLASH, cuda_normal)
    for x in (cuda_normal(2, FLASH.hidden), cuda_normal(9, FLASH.hidden).bfloat16()):
        logits = gate_logits(x, weight)
        two = topk_gate(logits, bias, top_k=6, scale=SCALE)
        for part, want in zip(route_topk(x, weight, bias, top_k=6, scale=SCALE), two, strict=True):
            assert_bits(part, want, f"{x.dtype}, {len(x)} tokens")


def test_what_it_cannot_take(cuda_normal: Callable[..., Tensor]) -> None:
    x, w, bias = cuda_normal(2, 24).bfloat16(), cuda_normal(8, 24).bfloat16(), cuda_normal(8)
    for bad_x, bad_w, bad_bias, top_k, words in (
        (x.T.contiguous().T, w, bias, 2, "contiguous"),
        (x[:, :16].contiguous(), w, bias, 2, "E D"),
        (x, w, bias[:7], 2, "bias: expected shape"),
        (x, w, bias.bfloat16(), 2, "bfloat16"),
        (x, w, bias, 9, "top_k: expected 1 to 8 experts, found 9"),
        (x[:, :12].contiguous(), w[:, :12].contiguous(), bias, 2, "multiple of 8"),
    ):
        with pytest.raises(AssertionError, match=words):
            route_topk(bad_x, Plain(bad_w), bad_bias, top_k=top_k, scale=SCALE)
