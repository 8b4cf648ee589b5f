"""A checkpoint folder: proved against the config before any weight is read, then read by slots.

``check_headers`` compares what the shards hold with the model's slots; ``Checkpoint`` adds the
files to it. Formats are known to ``loading.formats`` and names to ``loading.mapping`` (docs/model.md 4).
"""

import logging
import mmap
import struct
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dsv4.config import ModelConfig
from dsv4.loading.formats import (
    RECIPROCAL_SUFFIXES,
    SCALAR_SUFFIXES,
    SUFFIXES,
    StoredSlot,
    assemble,
    read_plain,
    resolve,
)
from dsv4.loading.headers import TensorInfo, name_some, read_tensors
from dsv4.loading.mapping import DIALECTS, Slot, all_slots, to_transformers
from dsv4.loading.values import ValueChecks
from dsv4.ops.formats import Weight

logger = logging.getLogger(__name__)

_MTP_PREFIX = "mtp."
_LARGEST_F32 = torch.finfo(torch.float32).max
_TORCH_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I8": torch.int8,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
}


class CheckedHeaders(NamedTuple):
    """What ``check_headers`` found: the dialect, every slot's storage, and (count, bytes) of skipped mtp.*"""

    names: str
    stored: dict[str, StoredSlot]
    skipped: tuple[int, int]


def check_headers(tensors: dict[str, TensorInfo], config: ModelConfig, *, mtp: bool) -> CheckedHeaders:
    """Prove that the stored ``tensors`` are exactly the model: nothing missing, nothing left over.

    With ``mtp`` the MTP block is part of the model; without it ``mtp.*`` is set aside whatever it
    holds. Looks at names, dtypes and shapes only. Raises ``ValueError`` naming files and tensors.
    """
    if not tensors:
        raise ValueError("the checkpoint holds no tensors")
    directory = next(iter(tensors.values())).file.parent
    names = _detect_names(tensors, directory)
    remaining = dict(tensors)
    skipped = (0, 0)
    if mtp:
        _require_mtp(tensors, config, directory)
    else:
        sizes = [remaining.pop(name).nbytes for name in tensors if name.startswith(_MTP_PREFIX)]
        skipped = (len(sizes), sum(sizes))
    stored = _take_fused_experts(remaining, config) if names == "transformers" else {}
    missing = []
    for slot in all_slots(config, mtp=mtp):
        if slot.name in stored:
            continue
        stem = _stem(slot, names)
        suffixes = SUFFIXES if slot.kind == "linear" else (slot.stem.removeprefix(slot.name),)
        parts = {suffix: remaining.pop(stem + suffix) for suffix in suffixes if stem + suffix in remaining}
        if parts:
            stored[slot.name] = resolve(slot, stem, parts)
        else:
            missing.append(stem + slot.stem.removeprefix(slot.name))
    _require_complete(directory, missing, remaining)
    return CheckedHeaders(names, stored, skipped)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose headers, names, shapes and scalar scales have been proved.

    ``mtp``: whether the MTP block is part of ``stored``; ``names``: one of ``mapping.DIALECTS``;
    ``stored``: every slot's storage by slot name; ``skipped``: (count, bytes) of ``mtp.*`` tensors
    that will not be loaded.
    """

    directory: Path
    config: ModelConfig
    mtp: bool
    names: str
    stored: dict[str, StoredSlot]
    skipped: tuple[int, int]

    @classmethod
    def open(cls, directory: str | Path, config: ModelConfig, *, mtp: bool = False) -> "Checkpoint":
        """Check everything that can be checked without reading weights.

        Raises ``FileNotFoundError`` for a missing folder, index or shard, and ``ValueError`` naming
        file, tensor, expected and found for everything else.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise FileNotFoundError(f"{directory}: no such folder; expected a checkpoint folder")
        tensors = read_tensors(directory)
        if not tensors:
            raise ValueError(f"{directory}: the checkpoint holds no tensors")
        names, stored, skipped = check_headers(tensors, config, mtp=mtp)
        _check_scalars(stored.values())
        if skipped[0]:
            logger.info("%s: skipped %d mtp.* tensors, %d bytes", directory, *skipped)
        return cls(directory, config, mtp, names, stored, skipped)

    @property
    def nbytes(self) -> int:
        """Bytes on disk of everything that can be loaded."""
        return sum(stored.nbytes for stored in self.stored.values())

    def load(self, slots: Iterable[Slot], device: torch.device | str = "cpu") -> dict[str, Weight | Tensor]:
        """Read exactly these slots, check their values, and return them by slot name.

        Linears are ``Weight``; matrices are as stored, norms and "f32" slots f32, ids int64. On the
        CPU whatever needs no conversion is a view of the mapped file, which lives as long as one of
        its views. Raises ``ValueError`` naming file and tensor for NaN, infinite or negative
        scales, non-finite weights, and ids that are no expert.
        """
        files: dict[Path, Tensor] = {}
        checks = ValueChecks()
        loaded: dict[str, Weight | Tensor] = {}
        for slot in slots:
            stored = self.stored[slot.name]
            tensors = {suffix: _read(info, files).to(device) for suffix, info in stored.parts.items()}
            if slot.kind == "linear":
                loaded[slot.name] = assemble(stored, tensors, checks)
            else:
                (tensor,) = tensors.values()
                loaded[slot.name] = read_plain(stored, tensor, self.config.num_experts, checks)
        checks.finish()
        return loaded


def _detect_names(tensors: dict[str, TensorInfo], directory: Path) -> str:
    """The dialect: its embedding and its first norm are there, whichever others are."""
    marks = {
        names: [f"{rename(slot)}.weight" for slot in ("embed", "layers.0.attn_norm")]
        for names, rename in DIALECTS.items()
    }
    found = [names for names, mark in marks.items() if all(name in tensors for name in mark)]
    if len(found) == 1:
        return found[0]
    state = "more than one of them" if found else f"none, but {name_some(tensors)}"
    expected = "; ".join(f"{' and '.join(mark)} ({names} names)" for names, mark in marks.items())
    raise ValueError(f"{directory}: expected one of {expected}; found {state}")


def _require_mtp(tensors: dict[str, TensorInfo], config: ModelConfig, directory: Path) -> None:
    if config.has_dspark:
        raise ValueError(
            f"{directory}: config.json has dspark_* fields: this checkpoint's drafter is DSpark, in three "
            "stages, not the MTP block; load it without mtp"
        )
    if not any(name.startswith(_MTP_PREFIX) for name in tensors):
        raise ValueError(f"{directory}: the MTP block was asked for, but no mtp.* tensor is there")


def _stem(slot: Slot, names: str) -> str:
    """The slot's name on disk without suffix; the MTP block has DeepSeek's names only."""
    return slot.name if slot.name.startswith(_MTP_PREFIX) else DIALECTS[names](slot.name)


def _take_fused_experts(remaining: dict[str, TensorInfo], config: ModelConfig) -> dict[str, StoredSlot]:
    """Take transformers' fused expert tensors out of ``remaining``, sliced into the slots they hold.

    ``gate_up_proj`` is [E, 2F, D] with w1's rows first and ``down_proj`` [E, D, F], BF16 or FP32.
    """
    d, f = config.hidden_size, config.expert_width
    stored: dict[str, StoredSlot] = {}
    for layer in range(config.num_layers):
        experts = f"layers.{layer}.ffn.experts"
        gate_up, down = (f"{to_transformers(experts)}.{leaf}" for leaf in ("gate_up_proj", "down_proj"))
        found = {stem: remaining.pop(stem) for stem in (gate_up, down) if stem in remaining}
        if len(found) == 1:
            ((present, info),) = found.items()
            absent = down if present == gate_up else gate_up
            raise ValueError(f"{info.file}: {present} is there, but {absent} is missing")
        for stem, matrices, shape in ((gate_up, ("w1", "w3"), (f, d)), (down, ("w2",), (d, f))):
            if stem in found:
                stored |= _slice_experts(experts, stem, found[stem], config.num_experts, matrices, shape)
    return stored


def _slice_experts(
    experts: str,
    stem: str,
    info: TensorInfo,
    num_experts: int,
    matrices: tuple[str, ...],
    shape: tuple[int, int],
) -> dict[str, StoredSlot]:
    """The slots ``experts.e.matrix`` of a fused tensor [E, len(matrices) * N, K]; a slice has no suffix."""
    count = num_experts * len(matrices)
    fused = (num_experts, len(matrices) * shape[0], shape[1])
    if info.dtype not in ("BF16", "F32") or info.shape != fused:
        raise ValueError(f"{info.file}: {stem}: expected BF16 or F32 {list(fused)}, found {info}")
    size = info.nbytes // count
    stored = {}
    for i in range(count):
        expert, part = divmod(i, len(matrices))
        start = info.start + i * size
        piece = TensorInfo(info.file, info.dtype, shape, start, start + size)
        name = f"{experts}.{expert}.{matrices[part]}"
        slot = Slot(name, shape, "linear")
        stored[name] = StoredSlot(slot, info.dtype.lower(), f"{stem}[{expert}]", {"": piece})
    return stored


def _require_complete(directory: Path, missing: list[str], left: dict[str, TensorInfo]) -> None:
    complaints = []
    if missing:
        complaints.append(f"{len(missing)} tensors are missing: {name_some(missing)}")
    if left:
        complaints.append(f"{len(left)} tensors belong nowhere: {name_some(left)}")
    if complaints:
        raise ValueError(f"{directory}: the tensors are not those of config.json: {'; '.join(complaints)}")


def _check_scalars(stored: Iterable[StoredSlot]) -> None:
    """Global scales are finite and positive, and so are the inverses of reciprocal ones."""
    by_file: dict[Path, list[tuple[StoredSlot, str]]] = defaultdict(list)
    for slot in stored:
        for suffix in SCALAR_SUFFIXES & slot.parts.keys():
            by_file[slot.parts[suffix].file].append((slot, suffix))
    for path, scalars in by_file.items():
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            for slot, suffix in scalars:
                (value,) = struct.unpack_from("<f", content, slot.parts[suffix].start)
                good = 0 < value <= _LARGEST_F32
                if good and suffix in RECIPROCAL_SUFFIXES:
                    good = 1 / value <= _LARGEST_F32
                if not good:
                    raise ValueError(f"{slot.where(suffix)}: expected a finite scale above 0, found {value}")


def _read(info: TensorInfo, files: dict[Path, Tensor]) -> Tensor:
    """The tensor as a view of its mapped file; copied only where its bytes are misaligned."""
    content = files.get(info.file)
    if content is None:
        storage = torch.UntypedStorage.from_file(str(info.file), False, info.file.stat().st_size)
        content = files[info.file] = torch.empty(0, dtype=torch.uint8).set_(storage)
    dtype = _TORCH_DTYPES[info.dtype]
    data = content[info.start : info.end]
    if info.start % dtype.itemsize:
        data = data.clone()
    return data.view(dtype).view(info.shape)
