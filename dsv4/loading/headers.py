"""Safetensors headers and shard indexes: where every tensor of a checkpoint folder lies, proved.

Reads and checks JSON only; no weight is read here, and nothing here knows the model
(docs/model.md 4).
"""

import json
import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
DTYPE_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("BF16", "F16", "I16", "U16"), 2),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
}
_MAX_HEADER = 100_000_000  # the format's own limit, in bytes
_LENGTH_BYTES = 8


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor: its shard, safetensors dtype name, shape, and bytes [start, end) of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def name_some(names: Collection[str], limit: int = 5) -> str:
    """The first few names and how many more there are, for error messages."""
    first = ", ".join(sorted(names)[:limit])
    return first if len(names) <= limit else f"{first} and {len(names) - limit} more"


def read_tensors(directory: Path) -> dict[str, TensorInfo]:
    """Every tensor of a checkpoint folder by its name on disk, from the headers of all its shards.

    Takes the shards named by the index, or the single file where there is no index. Raises
    ``FileNotFoundError`` for a missing file and ``ValueError`` for anything the format forbids, and
    where index and shards disagree.
    """
    index = directory / INDEX_FILE
    if index.is_file():
        return _read_shards(directory, index)
    single = directory / SINGLE_FILE
    if not single.is_file():
        raise FileNotFoundError(f"{directory}: neither {INDEX_FILE} nor {SINGLE_FILE} is there")
    return read_header(single)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file; every byte behind the header belongs to exactly one."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        start = _LENGTH_BYTES + length
        if size < _LENGTH_BYTES or start > size:
            raise ValueError(f"{path}: its header should end at byte {start}, but the file has {size} bytes")
        if length > _MAX_HEADER:
            raise ValueError(f"{path}: expected a header of at most {_MAX_HEADER} bytes, found {length}")
        entries = _parse_object(file.read(length), f"{path}: header")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise ValueError(f"{path}: __metadata__: expected an object, found {type(metadata).__name__}")
    tensors = {name: _tensor_info(path, name, entry, start, size) for name, entry in entries.items()}
    _check_tiling(path, tensors, start, size)
    return tensors


def _read_shards(directory: Path, index: Path) -> dict[str, TensorInfo]:
    shard_of = _weight_map(index)
    shards = sorted(set(shard_of.values()))
    missing = [shard for shard in shards if not (directory / shard).is_file()]
    if missing:
        raise FileNotFoundError(f"{index}: names shards that are not in the folder: {name_some(missing)}")
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        found = read_header(directory / shard)
        for name in found.keys() & tensors.keys():
            raise ValueError(f"{directory / shard}: {name}: also stored in {tensors[name].file.name}")
        tensors.update(found)
    _check_index(index, shard_of, tensors)
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = _parse_object(index.read_bytes(), str(index)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: weight_map: expected an object from tensor names to shard names")
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise ValueError(f"{index}: {name}: expected the name of a shard, found {shard!r:.100}")
    for shard in set(weight_map.values()):
        if Path(shard).name != shard:
            raise ValueError(f"{index}: expected names of files beside it, found {shard!r}")
    return weight_map


def _check_index(index: Path, shard_of: dict[str, str], tensors: dict[str, TensorInfo]) -> None:
    absent = {name: shard for name, shard in shard_of.items() if name not in tensors}
    if absent:
        raise ValueError(f"{index}: names tensors that no shard holds: {_with_files(absent.items())}")
    unlisted = {name: info.file.name for name, info in tensors.items() if name not in shard_of}
    if unlisted:
        raise ValueError(f"{index}: does not name tensors of the shards: {_with_files(unlisted.items())}")
    moved = {name: shard for name, shard in shard_of.items() if tensors[name].file.name != shard}
    if moved:
        raise ValueError(f"{index}: names the wrong shard for tensors: {_with_files(moved.items())}")


def _with_files(pairs: Iterable[tuple[str, str]]) -> str:
    return name_some([f"{name} ({shard})" for name, shard in pairs])


def _tensor_info(path: Path, name: str, entry: Any, data_start: int, size: int) -> TensorInfo:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{path}: {name}: expected dtype, shape and data_offsets, found {entry!r:.100}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise ValueError(f"{path}: {name}: unknown dtype {dtype!r:.100}; known are {', '.join(DTYPE_BYTES)}")
    if not _are_sizes(shape):
        raise ValueError(f"{path}: {name}: shape: expected a list of sizes, found {shape!r:.100}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{path}: {name}: data_offsets: expected a start and an end, found {offsets!r:.100}")
    start, end = data_start + offsets[0], data_start + offsets[1]
    if end > size:
        raise ValueError(f"{path}: {name}: ends at byte {end}, but the file is truncated at {size}")
    expected = math.prod(shape) * DTYPE_BYTES[dtype]
    if end - start != expected:
        raise ValueError(
            f"{path}: {name}: {dtype} {shape} needs {expected} bytes, but data_offsets hold {end - start}"
        )
    return TensorInfo(path, dtype, tuple(shape), start, end)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all([type(item) is int and item >= 0 for item in value])


def _check_tiling(path: Path, tensors: dict[str, TensorInfo], position: int, size: int) -> None:
    """The format allows neither overlaps nor gaps."""
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != position:
            fault = "overlaps the tensor before it" if info.start < position else "leaves a gap before it"
            raise ValueError(f"{path}: {name}: starts at byte {info.start}, expected {position}: it {fault}")
        position = info.end
    if position != size:
        raise ValueError(f"{path}: {size - position} bytes at the end of the file belong to no tensor")


def _parse_object(text: bytes, source: str) -> dict[str, Any]:
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:  # json's and unicode's errors are ValueErrors
        raise ValueError(f"{source}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{source}: expected a JSON object, found {type(value).__name__}")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} appears twice")
    return value
