"""The router room against scores and choices computed token by token in double precision."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv4.ops.formats import MatrixCache, Nvfp4, Plain, Weight, dequantize
from dsv4.ops.gemm import linear
from dsv4.ops.pack import pack_weight
from dsv4.ops.quant import quantize_nvfp4
from dsv4.ops.router import gate_logits, hash_gate, route_hash, route_topk, topk_gate


def score(logit: float) -> float:
    """sqrt(log(1 + e^logit)), written so that nothing overflows or cancels."""
    return math.sqrt(max(logit, 0.0) + math.log1p(math.exp(-abs(logit))))


def best(values: list[float], count: int) -> list[int]:
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]


def weights_of(logits: list[float], experts: list[int], scale: float) -> list[float]:
    chosen = [score(logits[e]) for e in experts]
    return [value / sum(chosen) * scale for value in chosen]


def assert_weights(weights: Tensor, want: list[list[float]]) -> None:
    assert weights.dtype == torch.float32
    np.testing.assert_allclose(weights.numpy(), np.array(want).reshape(weights.shape), rtol=2e-6, atol=1e-30)


@pytest.mark.parametrize("tokens", [0, 1, 37])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gate_logits(tokens: int, dtype: torch.dtype, normal: Callable[..., Tensor]) -> None:
    """Products and sums keep fp32, whatever the dtypes; the cached matrix of a CPU model gives the same."""
    x, w = normal(tokens, 40).to(dtype), normal(9, 40).bfloat16()
    logits = gate_logits(x, Plain(w))
    assert logits.shape == (tokens, 9) and logits.dtype == torch.float32
    want = x.double().numpy() @ w.double().numpy().T
    np.testing.assert_allclose(logits.numpy(), want, rtol=1e-5, atol=1e-5)
    assert torch.equal(gate_logits(x, MatrixCache(1 << 20).wrap(Plain(w))), logits)


@pytest.mark.parametrize("tokens", [0, 1, 37])
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (8, 2), (137, 6), (256, 6), (8, 8)])
def test_topk_gate(tokens: int, num_experts: int, top_k: int, normal: Callable[..., Tensor]) -> None:
    logits, bias = 4 * normal(tokens, num_experts), normal(num_experts)
    weights, experts = topk_gate(logits, bias, top_k=top_k, scale=2.5)
    assert experts.shape == (tokens, top_k) and experts.dtype == torch.int64
    want_experts, want_weights = [], []
    for row in logits.tolist():
        biased = [score(logit) + b for logit, b in zip(row, bias.tolist(), strict=True)]
        chosen = best(biased, top_k)
        want_experts.append(chosen)
        want_weights.append(weights_of(row, chosen, 2.5))
    assert experts.tolist() == want_experts
    assert_weights(weights, want_weights)


def test_extreme_logits() -> None:
    """softplus neither overflows at 100 nor loses its tail at -80; at 20 its two branches meet."""
    logits = [100.0, 50.0, 20.5, 20.0, 19.5, 0.0, -19.5, -30.0, -80.0, -100.0]
    weights, experts = topk_gate(torch.tensor([logits]), torch.zeros(10), top_k=10, scale=1.5)
    assert experts.tolist() == [list(range(10))]
    want = weights_of(logits, list(range(10)), 1.5)
    assert_weights(weights[:, :9], [want[:9]])
    assert weights[0, 9].item() == pytest.approx(want[9], rel=0.05)  # e^-100 is subnormal in fp32


@pytest.mark.parametrize("logit", [-80.0, -20.0, 0.0, 100.0])
def test_equal_logits_share_the_scale(logit: float) -> None:
    """However small the scores, they are renormalised: six equal ones get a sixth of the scale each."""
    weights, experts = topk_gate(torch.full((2, 9), logit), torch.zeros(9), top_k=6, scale=1.5)
    assert experts.tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    assert_weights(weights, [[0.25] * 6] * 2)


def test_ties_go_to_the_lowest_index(rng: np.random.Generator) -> None:
    """Many experts at few levels of the same score."""
    levels = rng.integers(0, 3, (40, 64))
    _, experts = topk_gate(torch.from_numpy(levels).float(), torch.zeros(64), top_k=10, scale=1.0)
    for row, chosen in zip(levels.tolist(), experts.tolist(), strict=True):
        assert chosen == best(row, 10)


def test_bias_selects_only() -> None:
    """A large bias brings in the worst expert and orders it first; its weight stays that of its score."""
    logits, bias = torch.tensor([[3.0, 2.0, 1.0, -4.0]]), torch.tensor([0.0, 0.0, 0.0, 50.0])
    weights, experts = topk_gate(logits, bias, top_k=2, scale=1.0)
    assert experts.tolist() == [[3, 0]]
    assert_weights(weights, [weights_of(logits[0].tolist(), [3, 0], 1.0)])


@pytest.mark.parametrize("tokens", [0, 1, 37])
def test_hash_gate(tokens: int, rng: np.random.Generator, normal: Callable[..., Tensor]) -> None:
    """The table's experts in the table's order, weighted as by score; the logits choose nothing."""
    logits, ids = 4 * normal(tokens, 16), rng.integers(0, 50, tokens)
    table = np.array([rng.permutation(16)[:6] for _ in range(50)])
    weights, experts = hash_gate(logits, torch.from_numpy(ids), torch.from_numpy(table), scale=1.5)
    assert experts.dtype == torch.int64
    assert experts.tolist() == [table[token].tolist() for token in ids]
    rows = zip(logits.tolist(), ids, strict=True)
    assert_weights(weights, [weights_of(row, table[token].tolist(), 1.5) for row, token in rows])


def gates(normal: Callable[..., Tensor]) -> dict[str, Weight]:
    """A gate of 24 experts in every form, width 48."""
    w, global_scale = normal(24, 48).bfloat16(), torch.tensor(1 / 2048)
    nvfp4 = Nvfp4(*quantize_nvfp4(w.float(), global_scale), global_scale)
    cached = MatrixCache(1 << 20).wrap(Plain(w))
    return {"plain": Plain(w), "nvfp4": nvfp4, "packed": pack_weight(nvfp4), "cached": cached}


@pytest.mark.parametrize("form", ["plain", "nvfp4", "packed", "cached"])
def test_routing_from_the_input(form: str, normal: Callable[..., Tensor]) -> None:
    """From x to weights and experts, for few tokens and many: double precision from the gate's values."""
    weight, bias = gates(normal)[form], normal(24)
    matrix = dequantize(weight).double()
    for tokens in (0, 1, 8, 9, 20):
        x, ids = normal(tokens, 48).bfloat16(), torch.arange(tokens)
        table = torch.stack([torch.arange(t, t + 5) for t in range(20)])
        rows = (x.double() @ matrix.T).tolist()
        weights, experts = route_topk(x, weight, bias, top_k=6, scale=1.5)
        want = [best([score(v) + b for v, b in zip(row, bias.tolist(), strict=True)], 6) for row in rows]
        assert experts.shape == (tokens, 6) and experts.tolist() == want
        for found, row, chosen in zip(weights, rows, want, strict=True):
            np.testing.assert_allclose(found.numpy(), weights_of(row, chosen, 1.5), rtol=2e-5)
        weights, experts = route_hash(x, weight, ids, table, scale=2.5)
        assert experts.tolist() == table[:tokens].tolist()
        for found, row, chosen in zip(weights, rows, experts.tolist(), strict=True):
            np.testing.assert_allclose(found.numpy(), weights_of(row, chosen, 2.5), rtol=2e-5)


@pytest.mark.parametrize("activations", ["bf16", "fp8", "nvfp4"])
def test_activations_meet_quantised_gates_only(activations: str, normal: Callable[..., Tensor]) -> None:
    """A plain gate sees the input as it is, an NVFP4 one what ``activations`` makes of it."""
    forms, bias, x = gates(normal), normal(24), normal(5, 48).bfloat16()
    for form, weight in forms.items():
        logits = gate_logits(x, weight, activations=activations)
        changed = not torch.equal(logits, gate_logits(x, weight))
        assert changed == (form in ("nvfp4", "packed") and activations != "bf16")
        assert torch.equal(logits, linear(x, weight, activations=activations, out_dtype=torch.float32))
        found = route_topk(x, weight, bias, top_k=4, scale=1.0, activations=activations)
        for part, want in zip(found, topk_gate(logits, bias, top_k=4, scale=1.0), strict=True):
            assert torch.equal(part, want)
