"""The numeric contract of docs/architecture.md section 6: how close a kernel must be to its reference.

Every check compares shape, dtype and the places of NaN and infinity first, and names the case when it fails.
"""

import os
from collections.abc import Callable

import torch
from torch import Tensor


def poison(*tensors: Tensor) -> None:
    """Fill memory with NaN (or 0xff), so that an element that a kernel leaves unwritten cannot look right."""
    for tensor in tensors:
        tensor.view(-1).view(torch.uint8).fill_(0xFF)


def without_allocator() -> bool:
    """Whether torch's caching allocator is off, as under compute-sanitizer."""
    return "PYTORCH_NO_CUDA_MEMORY_CACHING" in os.environ


def dirty_memory(device: torch.device | str = "cuda") -> None:
    """Fill what the allocator will hand out next: outputs that a kernel allocates start as NaN.

    Not where every tensor has an allocation of its own (``without_allocator``): nothing is handed out again.
    """
    if without_allocator():
        return
    sizes = (1 << 9, 1 << 14, 1 << 20, 1 << 26)
    poison(*(torch.empty(size, dtype=torch.uint8, device=device) for size in sizes))


def assert_layout(actual: Tensor, want: Tensor, case: str) -> None:
    """Same shape, dtype and contiguous strides."""
    shapes = tuple(want.shape), tuple(actual.shape)
    assert actual.shape == want.shape, f"{case}: expected shape {shapes[0]}, found {shapes[1]}"
    assert actual.dtype == want.dtype, f"{case}: expected {want.dtype}, found {actual.dtype}"
    assert actual.is_contiguous(), f"{case}: expected contiguous memory, found strides {actual.stride()}"


def assert_bits(actual: Tensor, want: Tensor, case: str) -> None:
    """Equal bit by bit: codes, scales, indices, and what is promised to be reproducible."""
    assert_layout(actual, want, case)
    if actual.numel() == 0:
        return
    size = actual.element_size()
    a, b = (_bytes_of(t) for t in (actual, want.to(actual.device)))
    wrong = (a != b).view(-1, size).any(dim=-1)
    count = int(wrong.sum())
    if count:
        at = int(wrong.nonzero()[0])
        found, expected = actual.flatten()[at], want.flatten()[at]
        raise AssertionError(
            f"{case}: {count} of {wrong.numel()} elements differ, first at flat index {at}: "
            f"expected {expected.float().item()}, found {found.float().item()}"
        )


def _bytes_of(tensor: Tensor) -> Tensor:
    """A copy: one element may have stride 0, which cannot be viewed as bytes."""
    return tensor.flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8)


def assert_close(actual: Tensor, want: Tensor, case: str, *, rtol: float, atol: float) -> None:
    """|actual - want| <= atol + rtol |want| everywhere."""
    assert_layout(actual, want, case)
    if actual.numel() == 0:
        return
    a, b = actual.double(), want.to(actual.device).double()
    assert torch.equal(a.isfinite(), b.isfinite()), f"{case}: NaN or infinity where the reference has none"
    excess = (a - b).abs() - (atol + rtol * b.abs())
    excess = excess.nan_to_num(0.0)
    worst = int(excess.flatten().argmax())
    if float(excess.max()) > 0:
        expected, found = b.flatten()[worst].item(), a.flatten()[worst].item()
        raise AssertionError(
            f"{case}: {int((excess > 0).sum())} of {excess.numel()} elements differ by more than {rtol=} "
            f"{atol=}, worst at flat index {worst}: expected {expected}, found {found}"
        )


def assert_small_fp32(actual: Tensor, want: Tensor, case: str) -> None:
    """Sinkhorn, gate scores, mixes."""
    assert_close(actual, want, case, rtol=1e-5, atol=2e-5)


def assert_rounded(actual: Tensor, want: Tensor, case: str, exact: Tensor | None = None) -> None:
    """Element-wise and norm results: of fp32 to 1e-5, of bf16 to 1e-2.

    ``exact``, the same unrounded: a bf16 result is at most twice as far from it as the reference's is.
    """
    if actual.dtype == torch.float32:
        assert_close(actual, want, case, rtol=1e-5, atol=1e-5)
        return
    assert_close(actual, want, case, rtol=1e-2, atol=1e-2)
    if exact is not None and actual.numel():
        exact = exact.to(actual.device).double()
        found, allowed = ((t.to(exact.device).double() - exact).abs().mean() for t in (actual, want))
        assert found <= 2 * allowed + 1e-12, f"{case}: mean error {found:.3e}, the reference's {allowed:.3e}"


def calc_diff(actual: Tensor, want: Tensor) -> float:
    """1 - 2 <x, y> / (<x, x> + <y, y>) in double: about the squared relative error."""
    x, y = actual.double(), want.double()
    return float(1 - 2 * (x * y).sum() / ((x * x).sum() + (y * y).sum()).clamp(min=1e-300))


def assert_gemm(actual: Tensor, want: Tensor, case: str, share: float = 1e-3) -> None:
    """A matrix product [..., N] of dequantised operands, in any dtype; ``want`` is the fp32 one.

    An element may differ by 2^-8 of itself and ``share`` of its row's rms.
    """
    assert_layout(actual, want.to(actual.dtype), case)
    if actual.numel() == 0:
        return
    x, y = actual.double(), want.to(actual.device).double()
    assert torch.equal(x.isfinite(), y.isfinite()), f"{case}: NaN or infinity where the reference has none"
    rms = y.square().mean(dim=-1, keepdim=True).sqrt()
    excess = (x - y).abs() - (2**-8 * y.abs() + share * rms)
    worst = int(excess.flatten().argmax())
    count = int((excess > 0).sum())
    assert count == 0, (
        f"{case}: {count} of {excess.numel()} elements differ by more than 2^-8 and {share} of their "
        f"row's rms, worst at flat index {worst}: expected {y.flatten()[worst]}, found {x.flatten()[worst]}"
    )
    if float(y.abs().max()) > 0:
        difference = calc_diff(x, y)
        assert difference < 2e-6, f"{case}: calc_diff {difference:.3e}, expected less than 2e-6"


def assert_attention(actual: Tensor, want: Tensor, case: str) -> None:
    """Outputs [.., H, Dh] of attention: an element may differ by 1e-3 and 2.01/128 of itself, the whole by an
    angle of 1 - cos < 5e-6."""
    assert_layout(actual, want.to(actual.dtype), case)
    if actual.numel() == 0:
        return
    x, y = actual.double(), want.to(actual.device).double()
    assert torch.equal(x.isfinite(), y.isfinite()), f"{case}: NaN or infinity where the reference has none"
    excess = (x - y).abs() - (1e-3 + 2.01 / 128 * y.abs())
    count = int((excess > 0).sum())
    if count:
        at = (excess > 0).nonzero()
        first, worst = at[0].tolist(), int(excess.argmax())
        touched = [len(at[:, dim].unique()) for dim in range(at.shape[1])]
        raise AssertionError(
            f"{case}: {count} of {excess.numel()} elements differ by more than 1e-3 and 2.01/128, first at "
            f"{first}, at {touched} indices of each dimension; worst: expected {y.flatten()[worst]}, found "
            f"{x.flatten()[worst]}"
        )
    cosine = float((x * y).sum() / (x.norm() * y.norm()).clamp(min=1e-300))
    assert 1 - cosine < 5e-6, f"{case}: 1 - cosine {1 - cosine:.3e}, expected less than 5e-6"


def assert_reproducible(call: Callable[[], Tensor | tuple[Tensor, ...]], case: str) -> None:
    """The same call twice, and its replay in a CUDA graph, give the same bits."""
    first = _tensors(call())
    for index, (a, b) in enumerate(zip(first, _tensors(call()), strict=True)):
        assert_bits(b, a, f"{case}: called again, output {index}")
    if without_allocator():
        return  # a graph needs it
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _tensors(call())
    for tensor in captured:
        if tensor.numel():
            poison(tensor)
    graph.replay()
    for index, (a, b) in enumerate(zip(first, captured, strict=True)):
        assert_bits(b, a, f"{case}: replayed in a graph, output {index}")


def _tensors(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)
