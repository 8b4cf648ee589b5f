"""Writes checkpoint folders: shards, index, config and tokenizer, streamed and all or nothing.

The one place that knows how a checkpoint is laid out on disk. What the tensors hold is the caller's
business: ``loading.synthetic`` makes random ones, an export hands over trained ones. Files are read
in ``loading.headers`` and ``loading.checkpoint`` (docs/model.md 4).
"""

import functools
import json
import math
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from dsv4.loading.formats import LAYOUTS, Layout
from dsv4.loading.headers import DTYPE_BYTES, INDEX_FILE
from dsv4.loading.mapping import Slot
from dsv4.progress import Progress

GB = 1e9
DEFAULT_SHARD_GB = 5.0

_DTYPE_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e8m0fnu: "F8_E8M0",
}
_PLAIN_DTYPES = {"matrix": "BF16", "norm": "BF16", "f32": "F32", "ids": "I64"}
_HEADER_ALIGNMENT = 8


@dataclass(frozen=True)
class Entry:
    """One tensor to write: its name on disk, safetensors dtype name, shape, and how to get its data.

    ``pieces`` is called when the tensor's turn comes; the bytes of the tensors it yields, one after
    the other, are the data, so that a large tensor never has to exist as a whole.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[Tensor]]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> "Entry":
        """The entry of a tensor that exists already."""
        return cls(name, _DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), lambda: (tensor,))

    @functools.cached_property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]

    @functools.cached_property
    def is_scalar(self) -> bool:
        return math.prod(self.shape) == 1


def write_checkpoint(
    directory: str | Path,
    entries: Iterable[Entry],
    *,
    config: Mapping[str, Any],
    tokenizer: str,
    shard_gb: float = DEFAULT_SHARD_GB,
    headers_only: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write ``entries`` in their order to ``directory``, with ``config`` and the text of tokenizer.json.

    Shards hold at most ``shard_gb`` GB of tensor data, or one tensor. With ``headers_only`` only
    headers and tensors of one element are written; all other data is a hole that takes no disk
    space and reads as zeros. Everything is written to a folder beside ``directory`` that is renamed
    at the end, and removed should anything go wrong. Raises ``ValueError`` if ``directory`` is there
    and not empty, if ``shard_gb`` is not above 0, or if the disk is too small.
    """
    directory = Path(directory).resolve()
    _require_vacant(directory)
    if not 0 < shard_gb < math.inf:
        raise ValueError(f"shard size: expected a number of GB above 0, found {shard_gb}")
    shards = _split(entries, int(shard_gb * GB))
    total = sum(entry.nbytes for shard in shards for entry in shard)
    if not headers_only:
        _require_space(directory, total)
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = directory.parent / f".{directory.name}.{uuid.uuid4().hex}.partial"
    partial.mkdir()
    try:
        report = _counter(total, progress)
        weight_map = {}
        for number, shard in enumerate(shards, 1):
            path = partial / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            weight_map |= {entry.name: path.name for entry in shard}
            with path.open("wb") as file:
                _write_shard(file, shard, headers_only, report)
        _write_json(partial / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
        _write_json(partial / "config.json", config)
        (partial / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
        partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@functools.cache
def find_layout(format: str, scale_suffix: str | None = None) -> Layout:
    """The layout that stores a linear in ``format``: the usual one, or the one with ``scale_suffix``."""
    found = (
        layout
        for layout in LAYOUTS
        if layout.format == format and scale_suffix in (None, *(part.suffix for part in layout.parts))
    )
    layout = next(found, None)
    if layout is None:
        raise ValueError(
            f"weight format: expected one that can be stored, found {format!r} {scale_suffix or ''}"
        )
    return layout


def expected_parts(slot: Slot, layout: Layout | None = None) -> list[tuple[str, str, tuple[int, ...]]]:
    """(suffix, dtype, shape) of the tensors that store ``slot``; a linear in ``layout``, in its order.

    Optional parts are included. Raises ``ValueError`` where the layout does not fit the width.
    Source: docs/model.md 4.1 to 4.3.
    """
    if slot.kind != "linear":
        return [(slot.stem.removeprefix(slot.name), _PLAIN_DTYPES[slot.kind], slot.shape)]
    assert layout is not None, f"{slot.name}: a linear needs a layout"
    n, k = slot.shape
    if k % layout.multiple:
        raise ValueError(
            f"{slot.name}: {layout.title} needs a width in multiples of {layout.multiple}, found {k}"
        )
    # Reciprocal scalars are stored as [1], the others as [] (the first of the shapes allowed).
    return [
        (part.suffix, part.dtypes[0], part.shapes(n, k)[1 if part.reciprocal else 0]) for part in layout.parts
    ]


def _require_vacant(directory: Path) -> None:
    if directory.is_dir():
        content = sorted(path.name for path in directory.iterdir())
        if content:
            raise ValueError(f"{directory}: expected a new or empty folder, found {len(content)} files in it")
    elif directory.exists():
        raise ValueError(f"{directory}: expected a new or empty folder, found a file")


def _require_space(directory: Path, total: int) -> None:
    free = shutil.disk_usage(next(parent for parent in directory.parents if parent.is_dir())).free
    if free < total:
        raise ValueError(
            f"{directory}: expected {total / GB:.1f} GB of free disk space, found {free / GB:.1f} GB"
        )


def _split(entries: Iterable[Entry], limit: int) -> list[list[Entry]]:
    """Consecutive entries by shards; inside a shard large dtypes come first, so that all are aligned.

    One-element tensors of a dtype are neighbours: without the other data they take few disk blocks.
    """
    shards: list[list[Entry]] = []
    room = -1
    names = set()
    for entry in entries:
        assert entry.name not in names, f"{entry.name} is written twice"
        names.add(entry.name)
        if entry.nbytes > room:
            shards.append([])
            room = limit
        shards[-1].append(entry)
        room -= entry.nbytes
    return [sorted(shard, key=lambda e: (-DTYPE_BYTES[e.dtype], e.is_scalar)) for shard in shards]


def _write_shard(
    file: BinaryIO, shard: list[Entry], headers_only: bool, report: Callable[[int], None]
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in shard:
        start, end = end, end + entry.nbytes
        header[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    file.write(len(text).to_bytes(8, "little") + text)
    data_start = file.tell()
    at_entry = True
    for entry in shard:
        if headers_only and not entry.is_scalar:
            at_entry = False
            continue
        if not at_entry:
            file.seek(data_start + header[entry.name]["data_offsets"][0])
            at_entry = True
        written = 0
        for data in _raw_bytes(entry.pieces()):
            file.write(data)
            written += len(data)
            report(len(data))
        assert written == entry.nbytes, f"{entry.name}: {entry.nbytes} bytes announced, {written} written"
    file.truncate(data_start + end)


def _raw_bytes(pieces: Iterable[Tensor]) -> Iterator[memoryview]:
    for piece in pieces:
        yield memoryview(piece.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _counter(total: int, progress: Progress | None) -> Callable[[int], None]:
    done = 0

    def report(more: int) -> None:
        nonlocal done
        done += more
        if progress is not None:
            progress(done, total)

    return report


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
