"""Random experts of every format, who chooses them, and their products before the last rounding."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from shapes import Sizes
from tile_weights import Normal, bytes_between
from torch import Tensor

from dsv4.ops.formats import Fp8Block, Mxfp4, Nvfp4, Plain, Weight, dequantize
from dsv4.ops.moe import Expert, ExpertBank, bank_experts, reference
from dsv4.ops.pack import pack_weight

DISTINCT = 24  # experts that are made; the tables repeat them
Layer = tuple[ExpertBank, Expert]  # the routed experts and the shared one


def weight(kind: str, normal: Normal, n: int, k: int, in_gs: float | None = None) -> Weight:
    """A random matrix [n, k] whose products of unit-variance inputs have a variance near 1."""
    if kind == "bf16":
        return Plain((normal(n, k) * k**-0.5).bfloat16())
    if kind == "nvfp4":
        scales = bytes_between(normal, 40, 64, n, k // 16).view(torch.float8_e4m3fn)
        gs = torch.tensor(k**-0.5 / 3 * float(1 + normal(1).abs()), device="cuda")
        given = None if in_gs is None else torch.tensor(in_gs * float(1 + normal(1).abs()), device="cuda")
        return pack_weight(Nvfp4(bytes_between(normal, 0, 256, n, k // 2), scales, gs, given))
    if kind == "mxfp4":
        scales = bytes_between(normal, 119, 121, n, k // 32).view(torch.float8_e8m0fnu)
        return pack_weight(Mxfp4(bytes_between(normal, 0, 256, n, k // 2), scales))
    scales = (k**-0.5 * (1 + normal(-(-n // 128), -(-k // 128)).abs())) / 2
    if n % 512 == 0:  # else f32
        scales = scales.log2().round().exp2().to(torch.float8_e8m0fnu)
    return Fp8Block(normal(n, k).to(torch.float8_e4m3fn), scales)


def expert(kind: str, normal: Normal, width: int, inner: int, in_gs: float | None = None) -> Expert:
    make = functools.partial(weight, kind, normal, in_gs=in_gs)
    return Expert(make(inner, width), make(width, inner), make(inner, width))


def bank(
    sizes: Sizes,
    routed: str,
    shared: str,
    normal: Normal,
    in_gs: float | None = None,
    shared_inner: int | None = None,
) -> Layer:
    count = min(DISTINCT, sizes.experts)
    made = [expert(routed, normal, sizes.hidden, sizes.expert_width, in_gs) for _ in range(count)]
    one = expert(shared, normal, sizes.hidden, shared_inner or sizes.expert_width, in_gs)
    experts = bank_experts([made[e * 7 % count] for e in range(sizes.experts)], one)
    assert isinstance(experts, ExpertBank) and experts.fault is None, experts
    return experts, one


def plain(experts: ExpertBank, shared: Expert) -> tuple[list[Expert], Expert]:
    """The same experts as fp32 matrices, each made once."""

    @functools.cache
    def matrices(key: int) -> Expert:
        return Expert(*(Plain(dequantize(w)) for w in by_id[key]))

    by_id = {id(e): e for e in (*experts, shared)}
    return [matrices(id(e)) for e in experts], matrices(id(shared))


def choose(sizes: Sizes, tokens: int, pattern: str, normal: Normal) -> Tensor:
    """Experts [T, K]: different ones for each token, one for all, or with repetitions in a token."""
    if pattern == "one":
        return torch.full((tokens, sizes.chosen), sizes.experts - 1, device="cuda")
    if pattern == "repeated":
        return (normal(tokens, sizes.chosen) * 4).long().abs() % 3
    return normal(tokens, sizes.experts).argsort(dim=-1)[:, : sizes.chosen].contiguous()


def inputs(sizes: Sizes, tokens: int, pattern: str, normal: Normal) -> tuple[Tensor, Tensor, Tensor]:
    x, routing = normal(tokens, sizes.hidden).bfloat16(), normal(tokens, sizes.chosen).abs()
    return x, routing, choose(sizes, tokens, pattern, normal)


def unrounded(
    x: Tensor, routing: Tensor, chosen: Tensor, experts: Sequence[Expert], shared: Expert, **options: Any
) -> Tensor:
    """reference.run_experts before its last rounding, f32."""
    total = reference.run_expert(x, shared, None, **options)
    for e in chosen.unique().tolist():
        at, slot = (chosen == e).nonzero(as_tuple=True)
        total.index_add_(0, at, reference.run_expert(x[at], experts[e], routing[at, slot], **options))
    return total
