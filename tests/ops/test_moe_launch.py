"""How run_experts is put together on a GPU, with torch in place of the kernels: tables, slices, roundings."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsv4.loading.formats import quantize
from dsv4.ops.formats import Fp8Block, Packed, Plain, Weight, dequantize
from dsv4.ops.moe import Expert, ExpertBank, bank, bank_experts, launch, reference, run_experts
from dsv4.ops.pack import pack_weight

WIDTH = 256


class Kernels:
    """The kernels' contracts (csrc/launchers.h) in torch; weights are found by their addresses."""

    def __init__(self, experts: list[Expert]) -> None:
        self.by_address: dict[int, Weight] = {}
        for expert in experts:
            for weight in expert:
                self.by_address[bank._storage(weight)[1].data_ptr()] = weight
        self.calls: list[tuple[str, int]] = []

    def matrix(self, addresses: Tensor, expert: int, part: int, kind: int) -> Tensor:
        weight = self.by_address[int(addresses[expert, part, 0])]
        data, scales = bank._storage(weight)[1:]
        assert bank.KINDS[bank._storage(weight)[0]] == kind
        assert int(addresses[expert, part, 1]) == (0 if scales is None else scales.data_ptr())
        return dequantize(weight._replace(gs=torch.ones(())) if isinstance(weight, Packed) else weight)

    def group_by_expert(
        self, chosen: Tensor, offset: Tensor, order: Tensor, place: Tensor, pairs: int, experts: int
    ) -> None:
        assert chosen.is_contiguous() and chosen.numel() == pairs
        order[:] = chosen.flatten().argsort(stable=True)
        place[order.long()] = torch.arange(pairs, dtype=torch.int32)
        offset[0] = 0
        offset[1:] = chosen.flatten().bincount(minlength=experts).cumsum(0)

    def gemm_tiles_experts(
        self,
        x: Tensor,
        index: Tensor | None,
        offset: Tensor,
        addresses: Tensor,
        gs: Tensor,
        token_scale: Tensor | None,
        out: Tensor,
        *rest: int,
    ) -> None:
        kind, _, part, pairs, experts, slots, rows, columns, x_stride, out_stride = rest
        assert x.dtype == torch.bfloat16 and x.shape[1] == columns == x_stride
        assert out.shape == (pairs, rows) and out_stride == rows
        self.calls.append(("gemm", pairs))
        for e in range(experts):
            for p in range(int(offset[e]), int(offset[e + 1])):
                row = p if index is None else int(index[p]) // slots
                y = self.matrix(addresses, e, part, kind) @ x[row].float()
                out[p] = y * (1 if token_scale is None else token_scale[row]) * gs[e, part]

    def swiglu_pairs(
        self,
        gate: Tensor,
        up: Tensor,
        routing: Tensor | None,
        order: Tensor,
        h: Tensor,
        pairs: int,
        width: int,
        limit: float,
    ) -> None:
        assert gate.shape == up.shape == h.shape == (pairs, width)
        weight = 1.0 if routing is None else routing.flatten()[order.long()].unsqueeze(-1)
        h.copy_(reference.swiglu(gate, up, limit=limit) * weight)

    def sum_slots(
        self, down: Tensor, place: Tensor, shared: Tensor, out: Tensor, tokens: int, slots: int, width: int
    ) -> None:
        assert out.shape == shared.shape == (tokens, width)
        out.copy_(down[place.long()].view(tokens, slots, width).sum(1) + shared)

    def experts_gate_up(
        self, x: Tensor, shared_x: Tensor, routing: Tensor, chosen: Tensor, *rest: Tensor | float
    ) -> None:
        a, gs, shared_a, shared_gs, h, shared_h = rest[:6]
        tokens, slots, width, inner, shared_inner, kind, _, shared_kind, _, limit, overlap = rest[7:]
        assert (
            rest[6] == len(a)
            and overlap
            and tokens <= 8
            and tokens * slots <= 128
            and (tokens, width) == x.shape
        )
        assert h.shape == (tokens * slots, inner) and shared_h.shape == (tokens, shared_inner)
        self.calls.append(("few", tokens))
        for pair in range(tokens * slots):
            e, row = int(chosen.flatten()[pair]), x[pair // slots].float()
            gate, up = (self.matrix(a, e, part, kind) @ row * gs[e, part] for part in (0, 1))
            h[pair] = reference.swiglu(gate, up, limit=limit) * routing.flatten()[pair]
        gate, up = (
            shared_x.float() @ self.matrix(shared_a, 0, m, shared_kind).T * shared_gs[0, m] for m in (0, 1)
        )
        shared_h[:] = reference.swiglu(gate, up, limit=limit)

    def experts_down(self, h: Tensor, shared_h: Tensor, chosen: Tensor, *rest: Tensor | int) -> None:
        a, gs, shared_a, shared_gs, out, experts = rest[:6]
        tokens, slots, width, inner, shared_inner, kind, _, shared_kind, _, overlap = rest[6:]
        assert experts == len(a) and overlap
        assert h.shape == (tokens * slots, inner) and shared_h.shape == (tokens, shared_inner)
        assert out.shape == (tokens, width)
        pairs = [
            self.matrix(a, int(e), 2, kind) @ row.float() for e, row in zip(chosen.flatten(), h, strict=True)
        ]
        scaled = torch.stack(pairs) * gs[chosen.flatten(), 2].unsqueeze(-1)
        last = shared_h.float() @ self.matrix(shared_a, 0, 2, shared_kind).T * shared_gs[0, 2]
        out.copy_(scaled.view(tokens, slots, width).sum(1) + last)


def make_expert(normal: Callable[..., Tensor], form: str, inner: int, in_gs: float | None) -> Expert:
    given = None if in_gs is None else torch.tensor(in_gs)
    shapes = ((inner, WIDTH), (WIDTH, inner), (inner, WIDTH))
    if form == "bf16":
        return Expert(*(Plain((normal(*shape) / 16).bfloat16()) for shape in shapes))
    weights = [quantize(normal(*shape) / 16, form, input_scale=given) for shape in shapes]
    return Expert(*(w if isinstance(w, Fp8Block) else pack_weight(w) for w in weights))


@pytest.mark.parametrize(
    ("tokens", "dtype", "activations", "calls"),
    [
        (1, torch.bfloat16, "bf16", [("few", 1)]),
        (11, torch.bfloat16, "bf16", [("few", 8), ("few", 3)]),
        (3, torch.bfloat16, "fp8", [("few", 3)]),
        (
            33,
            torch.bfloat16,
            "bf16",
            [("gemm", 34)] * 3 + [("gemm", 17)] * 3 + [("gemm", 32)] * 3 + [("gemm", 16)] * 3,
        ),
        (2, torch.bfloat16, "nvfp4", [("gemm", 4)] * 3 + [("gemm", 2)] * 3),
        (2, torch.float32, "bf16", [("gemm", 4)] * 9 + [("gemm", 2)] * 9),
    ],
)
@pytest.mark.parametrize("forms", [("nvfp4", "fp8"), ("mxfp4", "nvfp4"), ("fp8", "bf16")], ids="-".join)
@pytest.mark.parametrize("in_gs", [None, 0.002])
def test_launches(
    in_gs: float | None,
    forms: tuple[str, str],
    tokens: int,
    dtype: torch.dtype,
    activations: str,
    calls: list[tuple[str, int]],
    normal: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    experts = [make_expert(normal, forms[0], 256, in_gs) for _ in range(5)]
    shared = make_expert(normal, forms[1], 512, in_gs)
    kernels = Kernels([*experts, shared])
    monkeypatch.setattr(launch, "_C", kernels)
    sides = bank._make_side(tuple(experts)), bank._make_side((shared,))
    monkeypatch.setattr(launch, "WORKSPACE_BYTES", 17 * (256 * 10 * 2 + 512 * 10 + 4 * 256) + 1)
    x, routing = normal(tokens, WIDTH).to(dtype), normal(tokens, 2).abs()
    chosen = (normal(tokens, 2) * 9).long().abs() % 5
    few = tokens <= launch.FEW_TOKENS and dtype == torch.bfloat16 and activations != "nvfp4"
    run = launch.run_few if few else launch.run_many
    y = run(x, routing, chosen, sides, limit=2.0, activations=activations)
    want = reference.run_experts(x, routing, chosen, experts, shared, limit=2.0, activations=activations)
    assert y.dtype == dtype
    torch.testing.assert_close(y, want, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-3)
    assert kernels.calls == calls or activations == "nvfp4" and forms[0] != "nvfp4" and kernels.calls


def test_a_bank_is_a_sequence_and_says_why_it_has_no_tables(normal: Callable[..., Tensor]) -> None:
    experts = [make_expert(normal, "nvfp4", 256, None) for _ in range(3)]
    shared = make_expert(normal, "fp8", 256, None)
    assert bank_experts(experts, shared) is experts
    made = ExpertBank(experts, shared)
    assert len(made) == 3 and made[1] is experts[1] and list(made) == experts
    assert made.fault == "experts[0].w1: expected contiguous CUDA tensors"
    with pytest.raises(AssertionError, match="contiguous CUDA tensors"):
        made.sides(shared)
    x, routing, chosen = normal(2, WIDTH), normal(2, 1), torch.tensor([[2], [0]])
    y = run_experts(x, routing, chosen, made, shared, limit=1.0)
    assert torch.equal(y, run_experts(x, routing, chosen, experts, shared, limit=1.0))


def test_kinds_are_those_of_the_kernels() -> None:
    header = Path(bank.__file__).resolve().parents[3] / "csrc" / "gemm" / "units.cuh"
    names = re.search(r"enum class Kind : int \{ ([\w, ]+) \}", header.read_text(encoding="utf-8"))
    assert names is not None and names[1].split(", ") == list(bank.KINDS)
