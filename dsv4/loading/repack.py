"""The layouts that kernels read: which weights of a model are packed at load, and what packing adds.

On CUDA every NVFP4 and MXFP4 matrix becomes ``Packed`` (ops/pack), once it has been checked and
re-quantised. FP8, BF16 and F32 matrices stay as stored, and so do the scales of FP8, e8m0 or f32: of those
a lane of a kernel takes 16 consecutive columns as they lie. On the CPU nothing is packed: the references
read every format.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from dsv4.ops.formats import BLOCK_OF, Mxfp4, Nvfp4, Weight, packed_shape, shape_of
from dsv4.ops.pack import pack_weight

# The largest byte of a scale that kernels can read: e4m3 without sign or NaN; e8m0 up to 2^9, so that a scale
# times 2^118 is a finite bf16.
LARGEST_SCALE = {Nvfp4: 0x7E, Mxfp4: 136}
SLAB_BYTES = 128_000_000


def is_packed(format: str, device: torch.device) -> bool:
    """Whether a matrix in ``format`` (one of ``loading.formats.FORMATS``) is packed on ``device``."""
    return device.type == "cuda" and format.partition("-")[0] in BLOCK_OF


def padding_bytes(format: str, shape: tuple[int, ...]) -> int:
    """What a matrix [N, K] in a packed ``format`` takes more than as stored: units are whole."""
    n, k = shape
    kind = format.partition("-")[0]
    return math.prod(packed_shape(kind, n, k)) - n * k // 2 - n * k // BLOCK_OF[kind]


def repack(weights: dict[str, Weight | Tensor], slab_bytes: int = SLAB_BYTES) -> None:
    """Replace every NVFP4 and MXFP4 matrix of ``weights``, by slot name, by its packed form.

    They are packed one behind the other into slabs of up to ``slab_bytes``, a larger one into its own, since
    torch's allocator would put four of 4.7 MB into 21 MB. Beside the sources no more than one slab is there
    that is not full. Raises ``ValueError`` naming the slot for a scale that no kernel could read.
    """
    names = [name for name, weight in weights.items() if isinstance(weight, Nvfp4 | Mxfp4)]
    _check_scales({name: weights[name] for name in names})
    sizes = {name: packed_shape(_kind(weights[name]), *shape_of(weights[name])) for name in names}
    for group in _group(sizes, slab_bytes):
        total = sum(math.prod(sizes[name]) for name in group)
        slab = torch.empty(total, dtype=torch.uint8, device=weights[group[0]].w.device)
        parts = slab.split([math.prod(sizes[name]) for name in group])
        for name, part in zip(group, parts, strict=True):
            weights[name] = pack_weight(weights[name], out=part.view(sizes[name]))


def _kind(weight: Nvfp4 | Mxfp4) -> str:
    return "nvfp4" if isinstance(weight, Nvfp4) else "mxfp4"


def _group(sizes: dict[str, tuple[int, int]], limit: int) -> Iterator[list[str]]:
    """Names in their order, in groups of up to ``limit`` bytes or of one."""
    group: list[str] = []
    used = 0
    for name, size in sizes.items():
        if group and used + math.prod(size) > limit:
            yield group
            group, used = [], 0
        group.append(name)
        used += math.prod(size)
    if group:
        yield group


def _check_scales(weights: dict[str, Nvfp4 | Mxfp4]) -> None:
    """Read together, with one synchronisation. (What checks stored values lets larger e8m0 bytes pass.)"""
    if not weights:
        return
    largest = torch.stack([weight.w_sf.view(torch.uint8).amax() for weight in weights.values()]).tolist()
    for (name, weight), found in zip(weights.items(), largest, strict=True):
        limit = LARGEST_SCALE[type(weight)]
        if found > limit:
            kind = "e4m3" if isinstance(weight, Nvfp4) else "e8m0"
            raise ValueError(f"{name}: expected {kind} scales up to byte {limit} to pack, found {found}")
