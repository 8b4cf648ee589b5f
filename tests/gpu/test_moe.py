"""run_experts on a GPU against its reference: every format, few tokens and many."""

import functools

import numeric
import pytest
import torch
from expert_cases import Layer, bank, expert, inputs, plain, unrounded
from numeric import assert_bits, assert_close, assert_reproducible, dirty_memory
from shapes import FLASH, MODELS, PRO, TINY, Sizes
from tile_weights import Normal
from torch import Tensor

from dsv4.ops.formats import Nvfp4, Plain
from dsv4.ops.moe import Expert, ExpertBank, run_experts

# Sums in another order round some element of h the other way, which moves a whole row: by up to 2^-8 of the
# largest of some 14,000 products.
assert_gemm = functools.partial(numeric.assert_gemm, share=1e-2)
ALIKE = "nvfp4-nvfp4 mxfp4-mxfp4 fp8-fp8 bf16-bf16"
MIXED = "nvfp4-fp8 mxfp4-fp8 nvfp4-bf16 mxfp4-nvfp4 fp8-mxfp4 bf16-nvfp4"
PAIRS = [tuple(pair.split("-")) for pair in f"{ALIKE} {MIXED}".split()]
TOKENS = (1, 2, 3, 7, 8, 16, 31, 32, 33, 137)


def check(layer: Layer, sizes: Sizes, tokens: int, pattern: str, normal: Normal, case: str) -> None:
    """run_experts of random tokens against the same experts as fp32 matrices."""
    x, routing, chosen = inputs(sizes, tokens, pattern, normal)
    y = run_experts(x, routing, chosen, *layer, limit=10.0)
    want = unrounded(x, routing, chosen, *plain(*layer), limit=10.0)
    assert_gemm(y, want, f"{case}, {tokens} tokens, {pattern}")


@pytest.mark.parametrize("kinds", PAIRS, ids="-".join)
@pytest.mark.parametrize("sizes", MODELS, ids=lambda sizes: sizes.name)
def test_against_reference(sizes: Sizes, kinds: tuple[str, str], cuda_normal: Normal) -> None:
    layer = bank(sizes, *kinds, cuda_normal)
    wide = plain(*layer)
    for tokens in TOKENS:
        pattern = ("distinct", "one", "repeated")[tokens % 3] if tokens > 1 else "distinct"
        x, routing, chosen = inputs(sizes, tokens, pattern, cuda_normal)
        limit = 1.0 if tokens == 7 else 10.0
        dirty_memory()
        y = run_experts(x, routing, chosen, *layer, limit=limit)
        want = unrounded(x, routing, chosen, *wide, limit=limit)
        assert_gemm(y, want, f"{sizes.name}, {kinds}, {tokens} tokens, {pattern}")


@pytest.mark.parametrize("pattern", ["distinct", "one", "repeated"])
@pytest.mark.parametrize("tokens", [1, 2, 5, 8, 40])
def test_choices(tokens: int, pattern: str, cuda_normal: Normal) -> None:
    check(bank(TINY, "nvfp4", "fp8", cuda_normal), TINY, tokens, pattern, cuda_normal, "tiny")


@pytest.mark.parametrize("kinds", PAIRS, ids="-".join)
def test_divided_inner_widths(kinds: tuple[str, str], cuda_normal: Normal) -> None:
    """Blocks of a cluster divide the stretches of F, evenly or not, and those of another shared F."""
    for inner, shared_inner in ((512, 512), (1280, 1280), (1024, 256), (256, 1792)):
        sizes = TINY._replace(hidden=2048, expert_width=inner)  # several tiles a cluster
        layer = bank(sizes, *kinds, cuda_normal, shared_inner=shared_inner)
        for tokens in (1, 7):
            check(layer, sizes, tokens, "distinct", cuda_normal, f"{kinds}, inner {inner} and {shared_inner}")


@pytest.mark.parametrize(
    ("slots", "inner"), [(1, 256), (3, 256), (16, 256), (40, 256), (128, 256), (128, 1280), (110, 2048)]
)
def test_slots(slots: int, inner: int, cuda_normal: Normal) -> None:
    """More slots than experts: every expert several times, few tokens at once, clusters of eight blocks."""
    sizes = TINY._replace(chosen=slots, expert_width=inner)
    layer = bank(sizes, "mxfp4", "nvfp4", cuda_normal)
    for tokens in (1, 8, 9):
        check(layer, sizes, tokens, "repeated", cuda_normal, f"{slots} slots")


@pytest.mark.parametrize("kinds", [("nvfp4", "fp8"), ("mxfp4", "nvfp4"), ("bf16", "fp8")], ids="-".join)
@pytest.mark.parametrize("activations", ["fp8", "nvfp4"])
@pytest.mark.parametrize("in_gs", [None, 0.001])
def test_rounded_activations(
    in_gs: float | None, activations: str, kinds: tuple[str, str], cuda_normal: Normal
) -> None:
    layer = bank(TINY, *kinds, cuda_normal, in_gs=in_gs)
    for tokens in (1, 6, 20, 50):
        x, routing, chosen = inputs(TINY, tokens, "distinct", cuda_normal)
        run = functools.partial(run_experts, x, routing, chosen, *layer, limit=10.0)
        want = unrounded(x, routing, chosen, *layer, limit=10.0, activations=activations)
        assert_gemm(run(activations=activations), want, f"{activations}, {kinds}, {tokens} tokens")


@pytest.mark.parametrize("kinds", [("nvfp4", "nvfp4"), ("fp8", "bf16")], ids="-".join)
def test_f32_inputs(kinds: tuple[str, str], cuda_normal: Normal) -> None:
    """Nothing is rounded on the way, so that a model in f32 is one."""
    layer = bank(TINY, *kinds, cuda_normal)
    for tokens in (1, 9, 70):
        _, routing, chosen = inputs(TINY, tokens, "distinct", cuda_normal)
        x = cuda_normal(tokens, TINY.hidden)
        y = run_experts(x, routing, chosen, *layer, limit=10.0)
        want = unrounded(x, routing, chosen, *plain(*layer), limit=10.0)
        assert_close(y, want, f"{kinds}, {tokens} tokens", rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kinds", PAIRS, ids="-".join)
@pytest.mark.parametrize("sizes", MODELS, ids=lambda sizes: sizes.name)
def test_bits(sizes: Sizes, kinds: tuple[str, str], cuda_normal: Normal) -> None:
    """The same call, its graph, and each token beside any others, give the same bits."""
    layer = bank(sizes, *kinds, cuda_normal)
    x, routing, chosen = inputs(sizes, 16, "distinct", cuda_normal)
    chosen[3] = chosen[1]  # columns of the same MMA
    chosen[5] = chosen[6, 0]  # one expert in every slot

    def run(which: list[int]) -> Tensor:
        who = torch.tensor(which, device="cuda")
        return run_experts(x[who], routing[who], chosen[who], *layer, limit=10.0)

    for tokens in (1, 8):
        part = x[:tokens], routing[:tokens], chosen[:tokens]
        assert_reproducible(functools.partial(run_experts, *part, *layer, limit=10.0), f"{tokens} tokens")
    whole = run(list(range(8)))
    for rows in ([0], [3], [5], [6, 1], [5, 3, 1], [7, 6, 5, 4, 3], [1, 2, 3, 4, 5, 6, 7], list(range(16))):
        kept = [row for row in rows if row < 8]
        assert_bits(run(rows)[: len(kept)], whole[kept], f"{sizes.name}, {kinds}, tokens {rows}")


def test_in_turn_with_other_launches(cuda_normal: Normal) -> None:
    """Launches overlap: x, what is chosen and h of one call must not be read before they are written."""
    layer = bank(FLASH, "nvfp4", "fp8", cuda_normal)
    cases = [inputs(FLASH, tokens, "distinct", cuda_normal) for tokens in (1, 8, 2, 1, 1)]
    alone = []
    for case in cases:
        torch.cuda.synchronize()
        alone.append(run_experts(*case, *layer, limit=10.0))
        torch.cuda.synchronize()
    for _ in range(20):
        for case, want in zip(cases, alone, strict=True):
            y = run_experts(*(t + 0 for t in case), *layer, limit=10.0)
            assert_bits(y, want, f"{len(want)} tokens in a row of calls")


def test_no_tokens(cuda_normal: Normal) -> None:
    layer = bank(TINY, "nvfp4", "fp8", cuda_normal)
    y = run_experts(*inputs(TINY, 0, "distinct", cuda_normal), *layer, limit=10.0)
    assert y.shape == (0, TINY.hidden) and y.dtype == torch.bfloat16


def test_many_tokens_in_slices(cuda_normal: Normal) -> None:
    layer = bank(PRO, "nvfp4", "nvfp4", cuda_normal)
    x, routing, chosen = inputs(PRO, 1500, "distinct", cuda_normal)
    y = run_experts(x, routing, chosen, *layer, limit=10.0)
    for part in (slice(0, 9), slice(700, 790), slice(1490, 1500)):
        want = unrounded(x[part], routing[part], chosen[part], *plain(*layer), limit=10.0)
        assert_gemm(y[part], want, f"tokens {part}")


def test_what_it_cannot_take(cuda_normal: Normal) -> None:
    layer = bank(TINY, "nvfp4", "fp8", cuda_normal)
    x, routing, chosen = inputs(TINY, 4, "distinct", cuda_normal)
    run = functools.partial(run_experts, limit=10.0)
    other, wide = expert("fp8", cuda_normal, 256, 256), torch.zeros(4, 129, device="cuda")
    broad = expert("fp8", cuda_normal, 512, 256)
    for args, words in (
        ((x, routing, chosen, list(layer[0]), layer[1]), "tables of bank_experts"),
        ((x, routing, chosen, layer[0], broad), "shared: expected D = 256"),
        ((x[:, :128].contiguous(), routing, chosen, *layer), "with D = 256"),
        ((x.T.contiguous().T, routing, chosen, *layer), "contiguous"),
        ((x, routing, chosen.int(), *layer), "int64"),
        ((x, wide, wide.long(), *layer), "1 to 128 slots, found 129"),
    ):
        with pytest.raises(AssertionError, match=words):
            run(*args)
    experts = layer[0]
    loose = Nvfp4(
        x.new_zeros(256, 128, dtype=torch.uint8), x.new_zeros(256, 16).to(torch.float8_e4m3fn), x[0, 0]
    )
    narrow, f32 = expert("bf16", cuda_normal, 256, 128), Expert(*[Plain(cuda_normal(256, 256))] * 3)
    for made, words in (
        ([experts[0], other], "expected nvfp4 .* as of the first, found fp8"),
        ([experts[0]._replace(w3=loose)], "experts.0..w3: expected Packed, .* found Nvfp4"),
        ([narrow], "multiples of 256, found 256 and 128"),
        ([f32], "found Plain"),
    ):
        with pytest.raises(AssertionError, match=words):
            run(x, routing, chosen, ExpertBank(made, other), other)
