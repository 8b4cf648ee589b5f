"""The experts of a layer as the kernels find them: tables of addresses and scales in device memory.

Which experts a token needs is known on the device alone, so kernels find their weights without the host.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsv4.ops.formats import Fp8Block, Packed, Plain, Weight, shape_of, stored
from dsv4.ops.gemm import KINDS
from dsv4.ops.moe.reference import Expert

MATRICES = ("w1", "w3", "w2")  # in the order of the tables
MAX_EXPERTS = 512  # of a layer, of the kernels for many tokens
COLUMN_STEP = 256  # the kernels take whole units of every kind


class Side(NamedTuple):
    """Experts of one shape, the routed ones or the shared one: w1 and w3 [inner, width], w2 [width, inner].

    ``addresses`` [E, 3, 2] i64: of each matrix and of the scales of its FP8 blocks; ``global_scales`` [E, 3]
    f32; ``in_scales`` [E, 3] f32, the global scales of NVFP4 activations, NaN where every token has its own,
    or None if that is so everywhere. Of w1 and w3, and of w2: the ``kinds``, and whether the FP8 scales are
    e8m0 (else f32).
    """

    addresses: Tensor
    global_scales: Tensor
    in_scales: Tensor | None
    kinds: tuple[int, int]
    e8m0: tuple[bool, bool]
    count: int
    width: int
    inner: int

    def form(self, matrix: int) -> tuple[int, bool]:
        """Kind and e8m0 of matrix 0 (w1), 1 (w3) or 2 (w2)."""
        return self.kinds[matrix == 2], self.e8m0[matrix == 2]

    def shape(self, matrix: int) -> tuple[int, int]:
        """Rows and columns of the same."""
        return (self.width, self.inner) if matrix == 2 else (self.inner, self.width)

    def is_nvfp4(self, matrix: int) -> bool:
        return self.form(matrix)[0] == KINDS["nvfp4"]

    def is_plain(self, matrix: int) -> bool:
        return self.form(matrix)[0] == KINDS["bf16"]


class ExpertBank(Sequence[Expert]):
    """The routed experts of a layer with their tables, and those of the shared expert or of several.

    ``fault`` is a sentence if there is no kernel for the routed experts; then they have no tables, and the
    reference alone can run them.
    """

    def __init__(self, experts: Sequence[Expert], shared: Expert) -> None:
        self._experts = tuple(experts)
        self._shared: dict[int, tuple[Expert, str | None, Side | None]] = {}
        self.fault = _find_fault(self._experts, "experts")
        if self.fault is None and len(experts) > MAX_EXPERTS:
            self.fault = f"experts: expected at most {MAX_EXPERTS}, found {len(experts)}"
        self._routed = _make_side(self._experts) if self.fault is None else None
        self._add_shared(shared)

    def __getitem__(self, index: Any) -> Any:
        return self._experts[index]

    def __len__(self) -> int:
        return len(self._experts)

    def sides(self, shared: Expert) -> tuple[Side, Side]:
        """Tables of the routed experts and of a shared one; made at the first call for one that is new."""
        assert self._routed is not None, self.fault
        if id(shared) not in self._shared:
            self._add_shared(shared)
        _, fault, side = self._shared[id(shared)]
        assert side is not None, fault
        assert side.width == self._routed.width, (
            f"shared: expected D = {self._routed.width} as of the routed experts, found {side.width}"
        )
        return self._routed, side

    def _add_shared(self, shared: Expert) -> None:
        fault = _find_fault((shared,), "shared")
        self._shared[id(shared)] = (shared, fault, _make_side((shared,)) if fault is None else None)


def bank_experts(experts: Sequence[Expert], shared: Expert) -> Sequence[Expert]:
    """An ``ExpertBank`` of experts on a GPU, for ``run_experts``; the experts as they are on the CPU."""
    on_gpu = len(experts) > 0 and _storage(experts[0].w1)[1].is_cuda
    return ExpertBank(experts, shared) if on_gpu else experts


def _storage(weight: Weight) -> tuple[str, Tensor, Tensor | None]:
    """The kind of a weight, one of ``KINDS`` if kernels read it, its matrix, and the scales of FP8 blocks."""
    weight = stored(weight)
    if isinstance(weight, Packed):
        return weight.kind, weight.data, None
    if isinstance(weight, Fp8Block):
        return "fp8", weight.w, weight.w_sf
    kind = "bf16" if isinstance(weight, Plain) and weight.w.dtype == torch.bfloat16 else type(weight).__name__
    return kind, weight.w, None


def _find_fault(experts: tuple[Expert, ...], name: str) -> str | None:
    """Why no kernel takes these experts, if so."""
    first = experts[0]
    width, inner = shape_of(first.w2)
    if width % COLUMN_STEP or inner % COLUMN_STEP:
        return f"{name}: expected D and F multiples of {COLUMN_STEP}, found {width} and {inner}"
    for index, expert in enumerate(experts):
        for part in MATRICES:
            weight = getattr(expert, part)
            like = first.w2 if part == "w2" else first.w1
            kind, data, scales = _storage(weight)
            wanted, _, wanted_scales = _storage(like)
            if kind not in KINDS:
                return f"{name}[{index}].{part}: expected Packed, Fp8Block or bf16 weights, found {kind}"
            shape = (width, inner) if part == "w2" else (inner, width)
            where, found = f"{name}[{index}].{part}", f"{kind} {list(shape_of(weight))}"
            if kind != wanted or shape_of(weight) != shape:
                return f"{where}: expected {wanted} {list(shape)} as of the first, found {found}"
            if scales is not None and scales.dtype != wanted_scales.dtype:
                return f"{where}: expected scales of {wanted_scales.dtype}, found {scales.dtype}"
            if not all(t is None or (t.is_cuda and t.is_contiguous()) for t in (data, scales)):
                return f"{where}: expected contiguous CUDA tensors"
            if data.data_ptr() % 16:
                return f"{where}: expected an address that is a multiple of 16"
    return None


def _make_side(experts: tuple[Expert, ...]) -> Side:
    weights = [[stored(getattr(expert, part)) for part in MATRICES] for expert in experts]
    parts = [[_storage(weight) for weight in row] for row in weights]
    device = parts[0][0][1].device
    pointers = [[[t.data_ptr() if t is not None else 0 for t in part[1:]] for part in row] for row in parts]
    one, nan = torch.tensor([1.0, torch.nan], device=device).unbind()
    gs = [one if getattr(w, "gs", None) is None else w.gs for row in weights for w in row]
    in_gs = [getattr(w, "in_gs", None) for row in weights for w in row]
    given = [scale for scale in in_gs if scale is not None]
    width, inner = shape_of(weights[0][2])
    forms = [(KINDS[kind], sf is not None and sf.dtype == torch.float8_e8m0fnu) for kind, _, sf in parts[0]]
    side = Side(
        torch.tensor(pointers, dtype=torch.int64, device=device),
        torch.stack(gs).view(-1, len(MATRICES)),
        torch.stack([nan if s is None else s for s in in_gs]).view(-1, len(MATRICES)) if given else None,
        (forms[0][0], forms[2][0]),
        (forms[0][1], forms[2][1]),
        len(experts),
        width,
        inner,
    )
    if device.type == "cuda":
        # Kernels read these while the launch before them may still run (csrc/common/overlap.cuh).
        torch.cuda.current_stream(device).synchronize()
    return side
