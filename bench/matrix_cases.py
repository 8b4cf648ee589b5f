"""The cases of ``bench.ops`` that multiply with weights: gemm, moe, pack, and the router in one launch."""

import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench.harness import ROOT, Case, Draw
from bench.weights import random_nvfp4, random_packed, random_weight, weight_bytes
from dsv4.ops import gemm, moe, pack, router
from dsv4.ops.formats import Plain
from dsv4.ops.moe import Expert

sys.path.insert(0, str(ROOT / "tests"))
from shapes import Sizes  # noqa: E402

GATE_SCALE = 1.5
SWIGLU_LIMIT = 10.0
DISTINCT = 96  # experts of a layer that have memory of their own; the others are these again
STEP_TOKENS = (1, 8, 32)
FORMATS = ("mxfp4", "fp8", "bf16")  # of one matrix, beside NVFP4


def tokens_of(tokens: int, sizes: Sizes | None = None) -> str:
    """Like "Flash, 8 tokens"; without the model where both have the same shape."""
    count = "1 token" if tokens == 1 else f"{tokens} tokens"
    return f"{sizes.name.capitalize()}, {count}" if sizes else count


# Linear. The matrices of a layer, two of one input as one, six experts' gate and up as one, and the head.


def shapes_of(sizes: Sizes) -> list[tuple[int, int]]:
    d = sizes.hidden
    low = (sizes.q_lora + sizes.head_dim, d)  # wq_a, wkv
    return [
        low,
        (2 * sizes.expert_width, d),
        (d, 2 * d),  # wo_b
        (2 * d, d),  # wo_a
        (sizes.heads * sizes.head_dim, sizes.q_lora),  # wq_b
        (sizes.chosen * 2 * sizes.expert_width, d),
        (sizes.vocab, d),
    ]


def linear(tokens: int, n: int, k: int, kind: str = "nvfp4", *, target: str | None = None) -> Case:
    return Case(
        room="gemm",
        op="linear",
        case=f"{n} x {k} {kind}, {tokens_of(tokens)}",
        inputs=lambda draw: (draw.normal(tokens, k), random_weight(draw, kind, n, k)),
        call=gemm.linear,
        flop=2 * tokens * n * k,
        target=target,
    )


def linear_cases(sizes: Sizes, large: int) -> list[Case]:
    shapes, (n, k) = shapes_of(sizes), (2 * sizes.hidden, sizes.hidden)
    cases = [linear(tokens, *shape) for shape in shapes for tokens in STEP_TOKENS]
    cases += [linear(tokens, n, k, kind) for kind in FORMATS for tokens in (1, 8)]
    return cases + [linear(large, *shape, target=">= 350 TFLOPS") for shape in ((n, k), (k, n))]


# Experts. A layer's experts stay; every launch takes others of them, and a shared expert of its own.


def random_expert(draw: Draw, sizes: Sizes, kind: str = "nvfp4") -> Expert:
    d, f = sizes.hidden, sizes.expert_width
    w1, w3 = (random_weight(draw, kind, f, d) for _ in range(2))
    return Expert(w1, random_weight(draw, kind, d, f), w3)


def random_layer(draw: Draw, sizes: Sizes, shared: str) -> Sequence[Expert]:
    distinct = [random_expert(draw, sizes) for _ in range(min(sizes.experts, DISTINCT))]
    layer = [distinct[e % len(distinct)] for e in range(sizes.experts)]
    return moe.bank_experts(layer, random_expert(draw, sizes, shared))


def distinct_experts(tokens: int, sizes: Sizes) -> int:
    """How many experts so many tokens choose: 44 of 48 choices at eight tokens, all below."""
    slots = tokens * sizes.chosen
    return slots - slots // 12


def choices(launch: int, tokens: int, sizes: Sizes) -> torch.Tensor:
    """Experts [T, K] i64 of a launch: those after the launch before's; none twice for a token."""
    distinct = distinct_experts(tokens, sizes)
    slots = torch.arange(tokens * sizes.chosen).remainder(distinct)
    pool = min(sizes.experts, DISTINCT)
    return (launch * distinct + slots).remainder(pool).view(tokens, sizes.chosen)


def experts_bytes(sizes: Sizes, tokens: int, shared: str) -> int:
    """The weights of every chosen expert and of the shared one, once; the tokens in and out."""
    d, f = sizes.hidden, sizes.expert_width
    size = distinct_experts(tokens, sizes) * 3 * weight_bytes("nvfp4", f, d) + 3 * weight_bytes(shared, f, d)
    return size + tokens * (2 * 2 * d + sizes.chosen * (4 + 8))


def run_experts(sizes: Sizes, tokens: int, shared: str, target: str) -> Case:
    launches = itertools.count()

    def inputs(draw: Draw) -> tuple[Any, ...]:
        x, routing = draw.normal(tokens, sizes.hidden), draw.f32(tokens, sizes.chosen).softmax(dim=-1)
        chosen = choices(next(launches), tokens, sizes).to(x.device)
        return x, routing.mul_(GATE_SCALE), chosen, random_expert(draw, sizes, shared)

    def call(
        x: torch.Tensor, routing: torch.Tensor, chosen: torch.Tensor, own: Expert, layer: Sequence[Expert]
    ) -> torch.Tensor:
        return moe.run_experts(x, routing, chosen, layer, own, limit=SWIGLU_LIMIT)

    words = f"{sizes.name.capitalize()}, {distinct_experts(tokens, sizes)} routed + shared {shared}"
    return Case(
        room="moe",
        op="run_experts",
        case=f"{words}, {tokens_of(tokens)}",
        inputs=inputs,
        shared=lambda draw: (random_layer(draw, sizes, shared),),
        call=call,
        bytes=experts_bytes(sizes, tokens, shared),
        flop=2 * tokens * (sizes.chosen + 1) * 3 * sizes.expert_width * sizes.hidden,
        target=target,
    )


def expert_cases(flash: Sizes, pro: Sizes) -> list[Case]:
    return [
        run_experts(flash, 1, "nvfp4", "<= 29 us"),
        run_experts(flash, 1, "fp8", "<= 32 us"),
        run_experts(flash, 8, "nvfp4", "<= 175 us"),
        run_experts(pro, 1, "nvfp4", "<= 70 us"),
    ]


# The rest: the router in one launch, and what a load does.


def gate_inputs(draw: Draw, sizes: Sizes, tokens: int) -> tuple[torch.Tensor, Plain]:
    weight = Plain(draw.normal(sizes.experts, sizes.hidden).mul_(sizes.hidden**-0.5))
    return draw.normal(tokens, sizes.hidden), weight


def route_target(sizes: Sizes, tokens: int) -> str | None:
    """Of one launch that routes, whoever chooses."""
    return "<= 5 us" if tokens == 1 and sizes.name == "flash" else None


def route_topk(sizes: Sizes, tokens: int) -> Case:
    return Case(
        room="router",
        op="route_topk",
        case=tokens_of(tokens, sizes),
        inputs=lambda draw: (*gate_inputs(draw, sizes, tokens), draw.f32(sizes.experts, scale=0.1)),
        call=lambda x, weight, bias: router.route_topk(x, weight, bias, top_k=sizes.chosen, scale=GATE_SCALE),
        flop=2 * tokens * sizes.experts * sizes.hidden,
        target=route_target(sizes, tokens),
    )


def route_hash(sizes: Sizes, tokens: int) -> Case:
    """One table for all launches, of which each reads the rows of its own tokens."""
    experts, width, chosen = sizes.experts, sizes.hidden, sizes.chosen
    return Case(
        room="router",
        op="route_hash",
        case=tokens_of(tokens, sizes),
        inputs=lambda draw: (*gate_inputs(draw, sizes, tokens), draw.integers(sizes.vocab, tokens)),
        shared=lambda draw: (draw.integers(experts, sizes.vocab, chosen),),
        call=lambda x, weight, ids, table: router.route_hash(x, weight, ids, table, scale=GATE_SCALE),
        bytes=2 * width * (experts + tokens) + tokens * (8 + chosen * (8 + 4 + 8)),
        flop=2 * tokens * experts * width,
        target=route_target(sizes, tokens),
    )


def pack_cases(sizes: Sizes) -> list[Case]:
    n, k = sizes.expert_width, sizes.hidden

    def case(op: Callable[..., Any], weight: Callable[[Draw], Any]) -> Case:
        return Case(
            room="pack",
            op=op.__name__,
            case=f"{n} x {k} nvfp4",
            inputs=lambda draw: (weight(draw),),
            call=op,
        )

    stored = case(pack.pack_weight, lambda draw: random_nvfp4(draw, n, k))
    packed = case(pack.unpack_weight, lambda draw: random_packed(draw, "nvfp4", n, k))
    return [stored, packed]


def matrix_cases(models: tuple[Sizes, ...], large: int) -> list[Case]:
    """Those of the first model, and one token's experts and router of the last."""
    flash, pro = models[0], models[-1]
    cases = [route(*of) for route in (route_topk, route_hash) for of in ((flash, 1), (flash, 8), (pro, 1))]
    cases += linear_cases(flash, large) + expert_cases(flash, pro)
    return cases + pack_cases(flash)
