"""The storage formats of a linear's weight: recognised from the keys present, read, and written.

One table, ``LAYOUTS``, says which tensors a format stores under which suffix, dtype and shape.
``resolve`` proves a slot against it from headers alone, ``assemble`` makes the weight of
``ops.formats`` from the tensors read, ``encode`` is its inverse for writers, and ``quantize`` makes
a weight from a plain matrix. Files are read in ``loading.checkpoint`` (docs/model.md 4).
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4.loading.headers import TensorInfo
from dsv4.loading.mapping import Slot
from dsv4.loading.values import ValueChecks
from dsv4.ops import quant
from dsv4.ops.formats import (
    FP8_BLOCK,
    MXFP4_BLOCK,
    NVFP4_BLOCK,
    Fp8Block,
    Mxfp4,
    Nvfp4,
    Plain,
    Weight,
)
from dsv4.ops.formats import stored as without_cache


@dataclass(frozen=True)
class Part:
    """One stored tensor of a format: the weight's ``field`` it becomes, and what may be found there.

    ``block`` is how many (rows, columns) of the matrix one stored element covers, rounded up; None
    means one scalar, stored as [] or [1]. A ``reciprocal`` scalar is inverted on the way in and out.
    """

    suffix: str
    field: str
    dtypes: tuple[str, ...]
    block: tuple[int, int] | None
    optional: bool = False
    reciprocal: bool = False

    def shapes(self, n: int, k: int) -> tuple[tuple[int, ...], ...]:
        """The shapes allowed for a matrix [n, k]."""
        if self.block is None:
            return (), (1,)
        rows, columns = self.block
        return ((-(-n // rows), -(-k // columns)),)


@dataclass(frozen=True)
class Layout:
    """One way to store a matrix [N, K], K a multiple of ``multiple``."""

    format: str
    title: str
    parts: tuple[Part, ...]
    multiple: int = 1


def _fp8(suffix: str, dtypes: tuple[str, ...]) -> Layout:
    scale = Part(suffix, "w_sf", dtypes, (FP8_BLOCK, FP8_BLOCK))
    return Layout("fp8", "FP8 in 128x128 blocks", (Part(".weight", "w", ("F8_E4M3",), (1, 1)), scale))


def _plain(name: str, title: str, dtype: str) -> Layout:
    return Layout(name, title, (Part(".weight", "w", (dtype,), (1, 1)),))


# The first layout of a format is the one that is written.
LAYOUTS = (
    Layout(
        "nvfp4",
        "NVFP4 (ModelOpt)",
        (
            Part(".weight", "w", ("U8",), (1, 2)),
            Part(".weight_scale", "w_sf", ("F8_E4M3",), (1, NVFP4_BLOCK)),
            Part(".weight_scale_2", "w_gs", ("F32",), None),
            Part(".input_scale", "in_gs", ("F32",), None, optional=True),
        ),
        NVFP4_BLOCK,
    ),
    Layout(
        "nvfp4-ct",
        "NVFP4 (compressed-tensors)",
        (
            Part(".weight_packed", "w", ("U8",), (1, 2)),
            Part(".weight_scale", "w_sf", ("F8_E4M3",), (1, NVFP4_BLOCK)),
            Part(".weight_global_scale", "w_gs", ("F32",), None, reciprocal=True),
            Part(".input_global_scale", "in_gs", ("F32",), None, optional=True, reciprocal=True),
        ),
        NVFP4_BLOCK,
    ),
    Layout(
        "mxfp4",
        "MXFP4",
        (
            Part(".weight", "w", ("I8", "U8"), (1, 2)),
            Part(".scale", "w_sf", ("F8_E8M0",), (1, MXFP4_BLOCK)),
        ),
        MXFP4_BLOCK,
    ),
    _fp8(".scale", ("F8_E8M0", "F32")),
    _fp8(".weight_scale_inv", ("F32", "BF16", "F8_E8M0")),  # multiplies, whatever its name says
    _fp8(".weight_scale", ("BF16", "F32")),
    _plain("bf16", "BF16", "BF16"),
    _plain("f32", "FP32", "F32"),
)
FORMATS = tuple(dict.fromkeys(layout.format for layout in LAYOUTS))
SUFFIXES = tuple(dict.fromkeys(part.suffix for layout in LAYOUTS for part in layout.parts))
RECIPROCAL_SUFFIXES = frozenset(part.suffix for layout in LAYOUTS for part in layout.parts if part.reciprocal)
SCALAR_SUFFIXES = frozenset(part.suffix for layout in LAYOUTS for part in layout.parts if part.block is None)

# A matrix that is a slice of a fused tensor has no suffix.
_FIELDS = {"": "w"} | {part.suffix: part.field for layout in LAYOUTS for part in layout.parts}
_TYPES: dict[str, type[Plain | Nvfp4 | Mxfp4 | Fp8Block]] = {
    "nvfp4": Nvfp4,
    "nvfp4-ct": Nvfp4,
    "mxfp4": Mxfp4,
    "fp8": Fp8Block,
    "bf16": Plain,
    "f32": Plain,
}
_PLAIN_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32}
_KIND_DTYPES = {
    "matrix": ("BF16", "F32"),
    "norm": ("BF16", "F32"),
    "f32": ("F32", "BF16"),
    "ids": ("I64",),
}


@dataclass(frozen=True)
class StoredSlot:
    """How a slot is stored: format, name on disk without suffix, and its tensors by suffix.

    ``format`` is one of ``FORMATS``, or "i64" for ids. Slots that are no linear have one part.
    """

    slot: Slot
    format: str
    stem: str
    parts: dict[str, TensorInfo]

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.parts.values())

    def where(self, suffix: str) -> str:
        """File and tensor name, for messages."""
        return f"{self.parts[suffix].file}: {self.stem}{suffix}"


def resolve(slot: Slot, stem: str, parts: dict[str, TensorInfo]) -> StoredSlot:
    """Prove that ``parts`` (suffix -> header entry, in the order of ``SUFFIXES``) store ``slot``.

    Raises ``ValueError`` naming file, tensor, expected and found. Source: docs/model.md 4.1 to 4.3.
    """
    if slot.kind != "linear":
        return _resolve_plain(slot, stem, parts)
    layout = _find_layout(tuple((suffix, info.dtype) for suffix, info in parts.items()))
    if layout is None:
        raise ValueError(_explain(stem, parts))
    n, k = slot.shape
    if k % layout.multiple:
        info = next(iter(parts.values()))
        raise ValueError(
            f"{info.file}: {stem}: {layout.title} needs a width that is a multiple of {layout.multiple}, "
            f"found {k} in config.json"
        )
    for part in layout.parts:
        info = parts.get(part.suffix)
        if info is not None and info.shape not in part.shapes(n, k):
            raise ValueError(
                f"{info.file}: {stem}{part.suffix}: expected shape {list(part.shapes(n, k)[0])} for a "
                f"[{n}, {k}] matrix in {layout.title}, found {info}"
            )
    return StoredSlot(slot, layout.format, stem, parts)


def assemble(stored: StoredSlot, tensors: Mapping[str, Tensor], checks: ValueChecks) -> Weight:
    """The weight of a linear from its tensors by suffix, as they lie on disk (dtypes and shapes proved).

    Codes and e8m0 or f32 scales are views of ``tensors``; bf16 scales become f32, and scalars
    become []. Reciprocal scalars are inverted once, in fp32. Values are handed to ``checks``.
    """
    fields = {}
    for suffix, tensor in tensors.items():
        field = _FIELDS[suffix]
        _check(checks, field, tensor, stored.where(suffix))
        if suffix in SCALAR_SUFFIXES:
            tensor = tensor.reshape(())
            tensor = tensor.reciprocal() if suffix in RECIPROCAL_SUFFIXES else tensor
        elif tensor.dtype == torch.int8:
            tensor = tensor.view(torch.uint8)
        elif field == "w_sf" and tensor.dtype == torch.bfloat16:
            tensor = tensor.float()
        fields[field] = tensor
    return _TYPES[stored.format](**fields)


def read_plain(stored: StoredSlot, tensor: Tensor, limit: int, checks: ValueChecks) -> Tensor:
    """A slot that is no linear: a matrix as stored, norms and "f32" in f32, ids in int64 below ``limit``."""
    (suffix,) = stored.parts
    if stored.slot.kind == "ids":
        checks.ids(tensor, limit, stored.where(suffix))
        return tensor
    checks.finite(tensor, stored.where(suffix))
    return tensor if stored.slot.kind == "matrix" else tensor.float()


def encode(weight: Weight, format: str) -> dict[str, Tensor]:
    """The tensors of ``weight`` as ``format`` stores them, by suffix: the inverse of ``assemble``.

    MXFP4 codes are written as int8 and compressed-tensors scalars as [1], as their producers do.
    The latter are reciprocals, so a global scale may come back one unit in the last place off.
    """
    weight = without_cache(weight)
    layout = _layout_of(format)
    dtype = layout.parts[0].dtypes[0]
    fits = isinstance(weight, _TYPES[format])
    if not fits or (isinstance(weight, Plain) and weight.w.dtype != _PLAIN_DTYPES[dtype]):
        raise ValueError(f"format {format} cannot store a {type(weight).__name__} of {weight.w.dtype}")
    tensors = {}
    for part in layout.parts:
        tensor = getattr(weight, part.field)
        if tensor is None:
            continue
        if part.reciprocal:
            tensor = tensor.reciprocal().reshape(1)
        tensors[part.suffix] = tensor.view(torch.int8) if dtype == "I8" and part.field == "w" else tensor
    return tensors


def quantize(
    matrix: Tensor,
    format: str,
    *,
    global_scale: Tensor | None = None,
    input_scale: Tensor | None = None,
) -> Weight:
    """The weight nearest to ``matrix`` [N, K] f32 in ``format``, for writers and tests.

    ``global_scale`` [] f32 (NVFP4 only): amax / 2688 of this matrix unless given, so that w1 and w3
    can share one. ``input_scale`` [] f32 is stored with it. Source: docs/model.md 4.1 and 4.2.
    """
    kind = _TYPES[_layout_of(format).format]
    if kind is Nvfp4:
        scale = nonzero_scale(quant.nvfp4_global_scale(matrix, per_token=False))
        scale = scale if global_scale is None else global_scale
        return Nvfp4(*quant.quantize_nvfp4(matrix, scale), scale, input_scale)
    if kind is Mxfp4:
        return Mxfp4(*quant.quantize_mxfp4(matrix))
    if kind is Fp8Block:
        return Fp8Block(*quant.quantize_fp8_block(matrix))
    return Plain(matrix.to(_PLAIN_DTYPES[format.upper()]))


def nonzero_scale(global_scale: Tensor) -> Tensor:
    """1 where the global scale is zero, as of a matrix of zeros: a stored one is always positive."""
    return torch.where(global_scale > 0, global_scale, torch.ones_like(global_scale))


def _layout_of(format: str) -> Layout:
    if format not in FORMATS:
        raise ValueError(f"weight format: expected one of {', '.join(FORMATS)}, found {format!r}")
    return next(layout for layout in LAYOUTS if layout.format == format)


def _resolve_plain(slot: Slot, stem: str, parts: dict[str, TensorInfo]) -> StoredSlot:
    ((suffix, info),) = parts.items()
    dtypes = _KIND_DTYPES[slot.kind]
    if info.dtype not in dtypes or info.shape != slot.shape:
        expected = f"{' or '.join(dtypes)} {list(slot.shape)}"
        raise ValueError(f"{info.file}: {stem}{suffix}: expected {expected}, found {info}")
    return StoredSlot(slot, info.dtype.lower(), stem, parts)


@functools.cache
def _find_layout(found: tuple[tuple[str, str], ...]) -> Layout | None:
    """The layout that stores exactly these (suffix, dtype) pairs."""
    return next((layout for layout in LAYOUTS if not _faults(layout, dict(found))), None)


def _faults(layout: Layout, found: Mapping[str, str]) -> list[str]:
    """What keeps tensors of these dtypes by suffix from being ``layout``; empty if nothing does."""
    known = {part.suffix: part for part in layout.parts}
    faults = [
        f"{suffix} is missing" for suffix, part in known.items() if suffix not in found and not part.optional
    ]
    for suffix, dtype in found.items():
        if suffix not in known:
            faults.append(f"{suffix} does not belong there")
        elif dtype not in known[suffix].dtypes:
            faults.append(f"{suffix}: expected {' or '.join(known[suffix].dtypes)}, found {dtype}")
    return faults


def _explain(stem: str, parts: dict[str, TensorInfo]) -> str:
    """Why these tensors are no format, measured against the nearest one."""
    found = {suffix: info.dtype for suffix, info in parts.items()}
    layout = min(LAYOUTS, key=lambda layout: len(_faults(layout, found)))
    faults = "; ".join(stem + fault for fault in _faults(layout, found))
    listing = ", ".join(f"{suffix} {info}" for suffix, info in parts.items())
    file = next(iter(parts.values())).file
    return f"{file}: {stem}: no known format; for {layout.title}, {faults}; found {listing}"


def _check(checks: ValueChecks, field: str, tensor: Tensor, where: str) -> None:
    """Block scales and float weights; 4-bit codes are all valid, scalars were checked before."""
    if field == "w_sf":
        by_dtype = {torch.float8_e4m3fn: checks.e4m3_scales, torch.float8_e8m0fnu: checks.e8m0_scales}
        by_dtype.get(tensor.dtype, checks.scales)(tensor, where)
    elif tensor.dtype == torch.float8_e4m3fn:
        checks.e4m3_codes(tensor, where)
    elif field == "w" and tensor.is_floating_point():
        checks.finite(tensor, where)
