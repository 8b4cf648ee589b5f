"""The moe room against experts evaluated one token and one slot at a time."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv4.loading.formats import quantize
from dsv4.ops.formats import Plain, dequantize
from dsv4.ops.gemm import linear
from dsv4.ops.moe import Expert, run_experts


def random_expert(normal: Callable[..., Tensor], width: int, inner: int) -> Expert:
    return Expert(Plain(normal(inner, width)), Plain(normal(width, inner)), Plain(normal(inner, width)))


def scalar_expert(w1: float, w2: float, w3: float) -> Expert:
    return Expert(*(Plain(torch.tensor([[w]])) for w in (w1, w2, w3)))


def hidden_of(x: list[float], expert: Expert, limit: float) -> list[float]:
    """silu(min(w1 x, limit)) * clamp(w3 x), channel by channel."""
    hidden = []
    for gate_row, up_row in zip(dequantize(expert.w1).tolist(), dequantize(expert.w3).tolist(), strict=True):
        gate = min(sum(a * b for a, b in zip(gate_row, x, strict=True)), limit)
        up = max(-limit, min(sum(a * b for a, b in zip(up_row, x, strict=True)), limit))
        silu = gate / (1 + math.exp(-gate)) if gate > -700 else 0.0
        hidden.append(silu * up)
    return hidden


def expected_sum(
    x: Tensor, routing: Tensor, chosen: Tensor, experts: list[Expert], shared: Expert, limit: float
) -> np.ndarray:
    out = np.zeros(x.shape)
    for t, row in enumerate(x.tolist()):
        parts = [(experts[e], w) for e, w in zip(chosen[t].tolist(), routing[t].tolist(), strict=True)]
        for expert, weight in [*parts, (shared, 1.0)]:
            hidden = np.array(hidden_of(row, expert, limit)) * weight
            out[t] += dequantize(expert.w2).double().numpy() @ hidden
    return out


@pytest.mark.parametrize(("tokens", "slots"), [(0, 2), (1, 1), (1, 6), (7, 3)])
@pytest.mark.parametrize("limit", [0.7, 10.0])
def test_routed_and_shared_experts(
    tokens: int, slots: int, limit: float, rng: np.random.Generator, normal: Callable[..., Tensor]
) -> None:
    """A limit of 0.7 clamps most channels, 10 almost none."""
    experts = [random_expert(normal, 12, 20) for _ in range(9)]
    shared = random_expert(normal, 12, 28)
    x, routing = normal(tokens, 12), torch.from_numpy(rng.random((tokens, slots))).float()
    order = [rng.permutation(9)[:slots] for _ in range(tokens)]
    chosen = torch.from_numpy(np.array(order, dtype=np.int64).reshape(tokens, slots))
    y = run_experts(x, routing, chosen, experts, shared, limit=limit)
    assert y.shape == x.shape and y.dtype == torch.float32
    want = expected_sum(x, routing, chosen, experts, shared, limit)
    np.testing.assert_allclose(y.numpy(), want, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("gate", "up", "hidden"),
    [
        (50.0, 1.0, 10.0),  # the gate is cut at 10 before silu, and silu(10) is nearly 10
        (-50.0, 1.0, 0.0),  # it has no lower bound: cut at -10, silu would leave -0.00045
        (50.0, 30.0, 100.0),
        (50.0, -30.0, -100.0),  # the other factor is cut on both sides
        (2.0, 3.0, 2.0 / (1 + math.exp(-2.0)) * 3.0),
    ],
)
def test_clamp(gate: float, up: float, hidden: float) -> None:
    expert, none = scalar_expert(gate, 1.0, up), scalar_expert(0.0, 0.0, 0.0)
    x, one, first = torch.ones(1, 1), torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64)
    routed = run_experts(x, one, first, [expert], none, limit=10.0)
    shared = run_experts(x, one, first, [none], expert, limit=10.0)
    assert routed.item() == pytest.approx(hidden, rel=1e-4, abs=1e-12)
    assert shared.item() == routed.item()


def test_routing_weight_enters_before_the_one_rounding(normal: Callable[..., Tensor]) -> None:
    """With unit matrices the output is the hidden value: bf16(silu(x) x w), not bf16(bf16(silu(x) x) w)."""
    unit, nothing = Plain(torch.eye(64)), Plain(torch.zeros(64, 64))
    x, routing = normal(8, 64).bfloat16(), torch.full((8, 1), 0.3)
    chosen = torch.zeros(8, 1, dtype=torch.int64)
    y = run_experts(x, routing, chosen, [Expert(unit, unit, unit)], Expert(*[nothing] * 3), limit=10.0)
    assert y.dtype == torch.bfloat16
    wide = x.double()
    activation = wide / (1 + torch.exp(-wide)) * wide
    assert torch.equal(y, (activation * routing.double()).float().bfloat16())
    assert not torch.equal(y, (activation.float().bfloat16() * routing).bfloat16())


def test_slots_are_summed_in_order_and_the_shared_expert_last() -> None:
    """Beside 2^24, fp32 drops a 1: the result tells the order of the sum. Ids run against the slots."""
    big, one = 2.0**24, 1.0

    def total(slots: list[float], shared: float) -> float:
        # silu(64) is exactly 64, so an expert of w2 = c / 64 yields c.
        experts = [scalar_expert(64.0, c / 64, 1.0) for c in reversed(slots)]
        chosen = torch.arange(len(slots) - 1, -1, -1)[None]
        last = scalar_expert(64.0, shared / 64, 1.0)
        routing = torch.ones(1, len(slots))
        return run_experts(torch.ones(1, 1), routing, chosen, experts, last, limit=100.0).item()

    assert total([big, one, -big], 0.0) == 0
    assert total([big, -big, one], 0.0) == 1
    assert total([one, big, -big], 0.0) == 0
    assert total([big, -big], one) == 1


def test_only_chosen_experts_are_read(normal: Callable[..., Tensor]) -> None:
    """Every token chooses expert 2; the others are not even there."""
    expert, shared, x = random_expert(normal, 6, 5), random_expert(normal, 6, 5), normal(9, 6)
    routing, chosen = normal(9, 1), torch.full((9, 1), 2)
    y = run_experts(x, routing, chosen, [None, None, expert, None], shared, limit=10.0)
    want = expected_sum(x, routing, chosen, [shared, shared, expert], shared, 10.0)
    np.testing.assert_allclose(y.numpy(), want, rtol=1e-5, atol=1e-5)


def test_a_token_may_choose_an_expert_twice(normal: Callable[..., Tensor]) -> None:
    """A checkpoint's hash table promises no distinct experts; every slot counts."""
    expert, shared, x = random_expert(normal, 6, 5), random_expert(normal, 6, 5), normal(2, 6)
    routing, chosen = torch.tensor([[0.5, 0.25], [0.1, 0.9]]), torch.zeros(2, 2, dtype=torch.int64)
    y = run_experts(x, routing, chosen, [expert], shared, limit=10.0)
    want = expected_sum(x, routing, chosen, [expert], shared, 10.0)
    np.testing.assert_allclose(y.numpy(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["nvfp4", "mxfp4", "fp8"])
@pytest.mark.parametrize("activations", ["bf16", "fp8", "nvfp4"])
def test_every_matrix_reads_rounded_inputs(
    form: str, activations: str, normal: Callable[..., Tensor]
) -> None:
    """Both products of both kinds of expert, as the gemm room (tested by itself) computes them."""

    def expert() -> Expert:
        parts = (normal(32, 64), normal(64, 32), normal(32, 64))
        return Expert(*(quantize(w / 8, form, input_scale=torch.tensor(0.002)) for w in parts))

    routed, shared, x = expert(), expert(), normal(4, 64)
    routing, want = torch.tensor([[0.5], [1.0], [0.1], [2.0]]), torch.zeros(4, 64)
    for part, weight in ((routed, routing), (shared, torch.ones(4, 1))):
        gate, up = (linear(x, w, activations=activations).clamp(max=10) for w in (part.w1, part.w3))
        hidden = gate * torch.sigmoid(gate) * up.clamp(min=-10) * weight
        want += linear(hidden, part.w2, activations=activations)
    y = run_experts(
        x,
        routing,
        torch.zeros(4, 1, dtype=torch.int64),
        [routed],
        shared,
        limit=10.0,
        activations=activations,
    )
    np.testing.assert_allclose(y.numpy(), want.numpy(), rtol=1e-5, atol=1e-4)
