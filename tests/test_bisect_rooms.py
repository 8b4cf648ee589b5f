"""The search for the first wrong operation, on CPU: what stands for a kernel is a function made here."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import dsv4
import dsv4.layers.attention
import dsv4.layers.mhc
import dsv4.layers.moe
from dsv4.ops import dispatch
from dsv4.ops.dispatch import Op, op
from dsv4.ops.norm import reference as norm_reference
from dsv4.ops.router import reference as router_reference
from tools.bisect_rooms import TINY, Finding, compare, errors, float_error, main

TOKENS, CHUNK = 24, 10


@pytest.fixture(scope="module")
def engine() -> dsv4.Engine:
    return dsv4.load(TINY, max_context=TOKENS)


@pytest.fixture
def as_kernel(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any], Callable[..., Any]], Any]:
    """Makes a pair of functions an operation of room "probe" whose first runs in the place of a kernel."""
    monkeypatch.setattr(dispatch, "REGISTRY", dict(dispatch.REGISTRY))
    monkeypatch.setattr(dispatch, "_on_cuda", lambda args: True)

    def make(kernel: Callable[..., Any], reference: Callable[..., Any]) -> Callable[..., Any]:
        kernel.__module__ = "dsv4.ops.probe"
        return op(reference, kernel=True)(kernel)

    return make


def run(engine: dsv4.Engine, against: tuple[str, ...] = ("all",)) -> Iterator[Finding]:
    others = [room for room in dispatch.rooms() if room != "probe"]
    ids = torch.arange(TOKENS) * 37 % engine.config.vocab_size
    return compare(engine.model, ids, chunk=CHUNK, reference=others, against=against)


def first_fault(findings: Iterator[Finding]) -> Finding:
    with torch.inference_mode():
        return next(finding for finding in findings if finding.is_fault)


def test_references_agree_with_themselves(engine: dsv4.Engine) -> None:
    with torch.inference_mode():
        findings = list(run(engine))
    assert findings and all(finding.error == 0 for finding in findings)
    places = list(dict.fromkeys(finding.place for finding in findings))
    layers = [f"layer {index}" for index in range(len(engine.model.blocks))]
    for start, end in ((0, 9), (10, 19), (20, 23)):
        for name in ("embedding", *layers, "head"):
            assert f"{name}, tokens {start} to {end}" == places.pop(0)
    seen = {finding.op.room for finding in findings}
    assert seen >= {"embed", "mhc", "norm", "rope", "gemm", "attention", "router", "moe", "compressor"}


def test_a_wrong_kernel_is_named(
    engine: dsv4.Engine, as_kernel: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the second chunk on, weights of one token are swapped."""

    def route_topk(x: Tensor, *args: Any, **rest: Any) -> tuple[Tensor, Tensor]:
        weights, experts = router_reference.route_topk(x, *args, **rest)
        if x.shape[0] == 4:
            weights[-1] = weights[-1].flip(0)
        return weights, experts

    monkeypatch.setattr(dsv4.layers.moe, "route_topk", as_kernel(route_topk, router_reference.route_topk))
    routed = next(i for i, block in enumerate(engine.model.blocks) if block.ffn.router.bias is not None)
    finding = first_fault(run(engine))
    assert finding.place == f"layer {routed}, tokens 20 to 23"
    assert (finding.op.room, finding.op.name, finding.output) == ("probe", "route_topk", 0)
    assert 3e-5 == finding.tolerance < finding.error < 1
    assert str(finding).startswith(f"{finding.place}: probe.route_topk, output 0: error ")


def test_errors_do_not_travel(
    engine: dsv4.Engine, as_kernel: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel within its bound makes nothing else differ: what comes next gets the reference's values."""

    def rms_norm(x: Tensor, weight: Tensor | None, *, eps: float) -> Tensor:
        return norm_reference.rms_norm(x, weight, eps=eps) * (1 + 2e-5)

    probe = as_kernel(rms_norm, norm_reference.rms_norm)
    for module in (dsv4.layers.mhc, dsv4.layers.attention):
        monkeypatch.setattr(module, "rms_norm", probe)
    with torch.inference_mode():
        findings = list(run(engine))
    differing = [finding for finding in findings if finding.error]
    assert {finding.op.room for finding in differing} == {"probe"} and len(differing) > 3
    assert not any(finding.is_fault for finding in findings)


def test_rooms_that_are_not_compared(
    engine: dsv4.Engine, as_kernel: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def rms_norm(x: Tensor, weight: Tensor | None, *, eps: float) -> Tensor:
        return norm_reference.rms_norm(x, weight, eps=eps) * 2

    monkeypatch.setattr(dsv4.layers.mhc, "rms_norm", as_kernel(rms_norm, norm_reference.rms_norm))
    with torch.inference_mode():
        assert not any(finding.is_fault for finding in run(engine, against=("mhc",)))
    assert first_fault(run(engine, against=("mhc", "probe"))).op.name == "rms_norm"


def test_parts_of_a_kernel_are_skipped(
    engine: dsv4.Engine, as_kernel: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A door may call doors that its reference does not."""
    monkeypatch.setattr(dispatch, "_on_cuda", lambda args: True)
    part = as_kernel(norm_reference.rms_norm, norm_reference.rms_norm)

    def whole(x: Tensor, weight: Tensor | None, *, eps: float) -> Tensor:
        return part(x, weight, eps=eps)

    monkeypatch.setattr(dsv4.layers.mhc, "rms_norm", as_kernel(whole, norm_reference.rms_norm))
    with torch.inference_mode():
        names = {finding.op.name for finding in run(engine) if finding.op.room == "probe"}
    assert names == {"whole"}


def test_error_of_floats() -> None:
    """Relative to the element or the tensor's rms, whichever is larger; NaN and infinity by place."""
    want = torch.tensor([1.0, -1.0, 1.0, 100.0])
    rms = want.square().mean().sqrt().item()
    for at, error in ((0, 0.5 / rms), (3, 0.5 / 100)):
        found = want.clone()
        found[at] += 0.5
        assert float_error(found, want) == pytest.approx(error)
    infinite = torch.tensor([1.0, -torch.inf])
    assert float_error(infinite, infinite) == 0
    for other in (torch.inf, torch.nan, 0.0):
        assert float_error(torch.tensor([1.0, other]), infinite) == float("inf")
    assert float_error(torch.ones(2), torch.zeros(2)) == float("inf")
    assert float_error(torch.empty(0), torch.empty(0)) == 0


def test_errors_by_kind() -> None:
    def of(room: str, found: list[Tensor], want: list[Tensor]) -> list[tuple[float, float]]:
        return list(errors(room, found, want))

    codes = torch.zeros(4, 8, dtype=torch.uint8)
    assert of("quant", [codes], [codes]) == [(0, 0)]
    assert of("quant", [codes + 1], [codes]) == [(1, 0)]
    values = torch.ones(3, dtype=torch.bfloat16)
    assert of("norm", [values], [values]) == [(0, 2e-2)]
    assert of("norm", [values.float()], [values.float()]) == [(0, 3e-5)]
    assert of("gemm", [values.float()], [values.float()]) == [(0, 1e-3)]
    # Two scores that tie: two indices change places, and the weights of that row with them.
    experts, weights = torch.arange(6).view(3, 2), torch.rand(3, 2)
    flipped, other = experts.clone(), weights.clone()
    flipped[1], other[1] = experts[1].flip(0), weights[1].flip(0)
    assert of("router", [other, flipped], [weights, experts]) == [(0, 3e-5), (2 / 6, 2 / 6)]
    assert of("router", [weights, experts.flip(0)], [weights, experts]) == [(0, 3e-5), (4 / 6, 2 / 6)]


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cpu", "--tokens", "8", "--chunk", "5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 9 and all(": error 0.00e+00, tolerance " in line for line in lines)


def test_a_finding_is_a_fault_beyond_its_tolerance_or_without_a_number() -> None:
    def is_fault(error: float) -> bool:
        return Finding("head", Op("gemm", "linear", len, True), 0, error, 1e-3).is_fault

    assert [is_fault(error) for error in (0.0, 1e-3, 1.1e-3, float("inf"), float("nan"))] == [
        *(False, False, True, True, True)
    ]
