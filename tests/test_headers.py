"""Safetensors headers and shard indexes: what is read, and everything that the format forbids."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsv4.loading.headers import INDEX_FILE, SINGLE_FILE, TensorInfo, read_header, read_tensors

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def write_shard(path: Path, header: Any, data: int, length: int | None = None) -> Path:
    """A file with ``header`` as JSON (or bytes as they are), its stated length, and ``data`` zero bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + text + bytes(data))
    return path


def header() -> dict[str, Any]:
    return {
        "__metadata__": {"format": "pt"},
        "a": entry("F32", [2], 0, 8),
        "b": entry("U8", [2, 2], 8, 12),
        "c": entry("F8_E8M0", [0], 12, 12),
        "d": entry("BF16", [], 12, 14),
    }


def test_a_good_header(tmp_path: Path) -> None:
    path = write_shard(tmp_path / SINGLE_FILE, header(), 14)
    start = path.stat().st_size - 14
    assert read_tensors(tmp_path) == {
        "a": TensorInfo(path, "F32", (2,), start, start + 8),
        "b": TensorInfo(path, "U8", (2, 2), start + 8, start + 12),
        "c": TensorInfo(path, "F8_E8M0", (0,), start + 12, start + 12),
        "d": TensorInfo(path, "BF16", (), start + 12, start + 14),
    }
    assert read_header(write_shard(path, {}, 0)) == {}


@pytest.mark.parametrize(
    ("name", "change", "complaint"),
    [
        ("b", entry("U8", [2, 2], 8, 15), "truncated"),
        ("a", entry("F32", [3], 0, 8), r"F32 \[3\] needs 12 bytes, but data_offsets hold 8"),
        ("b", entry("F4", [2, 4], 8, 12), "unknown dtype 'F4'"),
        ("b", entry([], [2, 2], 8, 12), "unknown dtype"),
        ("b", entry("U8", [-2, -2], 8, 12), "shape: expected a list of sizes"),
        ("b", entry("U8", [4.0], 8, 12), "shape: expected a list of sizes"),
        ("b", entry("U8", [2, 2], 12, 8), "data_offsets: expected a start and an end"),
        ("b", entry("U8", [2, 2], 8, -1), "data_offsets: expected a start and an end"),
        ("b", entry("U8", [2, 2], 4, 8), r"starts at byte \d+, expected \d+: it overlaps"),
        ("d", entry("BF16", [], 10, 12), "starts at byte .*: it overlaps"),
        ("a", entry("F32", [1], 4, 8), "starts at byte .*: it leaves a gap"),
        ("b", entry("U8", [2], 8, 10), None),
        ("b", {"dtype": "U8", "shape": [4]}, "expected dtype, shape and data_offsets"),
        ("b", [1], "expected dtype, shape and data_offsets"),
    ],
)
def test_bad_entries(tmp_path: Path, name: str, change: Any, complaint: str | None) -> None:
    path = write_shard(tmp_path / SINGLE_FILE, header() | {name: change}, 14)
    # Without a complaint of its own, the entry makes the next tensor stand behind a gap.
    expected = rf"{SINGLE_FILE}: {name}: .*{complaint}" if complaint else "it leaves a gap"
    with pytest.raises(ValueError, match=expected):
        read_header(path)


@pytest.mark.parametrize(
    ("text", "data", "length", "complaint"),
    [
        (b"", 0, 10**12, "header should end at byte 1000000000008, but the file has 8 bytes"),
        (header(), 0, 1 << 20, "header should end at byte"),
        (header(), 13, None, "truncated"),
        (header(), 20, None, "6 bytes at the end of the file belong to no tensor"),
        (b"{", 0, None, "header: not valid JSON"),
        (b"\xff\xfe{}", 0, None, "header: not valid JSON"),
        (b"[" * 100_000, 0, None, "header: not valid JSON"),
        (b"[]", 0, None, "header: expected a JSON object, found list"),
        (b'{"a": 1, "a": 2}', 0, None, "key 'a' appears twice"),
        (b'{"__metadata__": 3}', 0, None, "__metadata__: expected an object, found int"),
    ],
)
def test_bad_files(tmp_path: Path, text: Any, data: int, length: int | None, complaint: str) -> None:
    path = write_shard(tmp_path / SINGLE_FILE, text, data, length)
    with pytest.raises(ValueError, match=f"{SINGLE_FILE}: .*{complaint}"):
        read_header(path)


@pytest.mark.parametrize("size", [0, 7])
def test_files_too_short_for_a_header(tmp_path: Path, size: int) -> None:
    (tmp_path / SINGLE_FILE).write_bytes(bytes(size))
    with pytest.raises(ValueError, match=f"{SINGLE_FILE}: .*the file has {size} bytes"):
        read_header(tmp_path / SINGLE_FILE)


def sharded(directory: Path) -> dict[str, str]:
    """Two good shards, and the index that belongs to them."""
    write_shard(directory / ONE, {"a": entry("U8", [1], 0, 1), "b": entry("U8", [1], 1, 2)}, 2)
    write_shard(directory / TWO, {"c": entry("U8", [1], 0, 1)}, 1)
    return {"a": ONE, "b": ONE, "c": TWO}


def write_index(directory: Path, index: Any) -> None:
    text = index if isinstance(index, bytes) else json.dumps(index).encode()
    (directory / INDEX_FILE).write_bytes(text)


def test_shards_by_index(tmp_path: Path) -> None:
    write_index(tmp_path, {"metadata": {"total_size": 3}, "weight_map": sharded(tmp_path)})
    assert {name: info.file.name for name, info in read_tensors(tmp_path).items()} == sharded(tmp_path)


@pytest.mark.parametrize(
    ("index", "complaint"),
    [
        (b"{", "not valid JSON"),
        ([], "expected a JSON object"),
        ({}, "weight_map: expected an object"),
        ({"weight_map": []}, "weight_map: expected an object"),
        ({"weight_map": {}}, "weight_map: expected an object"),
        ({"weight_map": {"a": 1}}, "a: expected the name of a shard, found 1"),
        ({"weight_map": {"a": "../x.safetensors"}}, "found '../x.safetensors'"),
        (b'{"weight_map": {"a": "x", "a": "y"}}', "key 'a' appears twice"),
    ],
)
def test_bad_indexes(tmp_path: Path, index: Any, complaint: str) -> None:
    write_index(tmp_path, index)
    with pytest.raises(ValueError, match=f"{INDEX_FILE}: .*{complaint}"):
        read_tensors(tmp_path)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda listed: listed | {"x": TWO}, rf"names tensors that no shard holds: x \({TWO}\)"),
        (lambda listed: {"a": ONE, "c": TWO}, rf"does not name tensors of the shards: b \({ONE}\)"),
        (lambda listed: listed | {"b": TWO}, rf"names the wrong shard for tensors: b \({TWO}\)"),
    ],
)
def test_index_and_shards_disagree(tmp_path: Path, change: Callable, complaint: str) -> None:
    write_index(tmp_path, {"weight_map": change(sharded(tmp_path))})
    with pytest.raises(ValueError, match=f"{INDEX_FILE}: {complaint}"):
        read_tensors(tmp_path)


def test_missing_and_duplicate(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"neither {INDEX_FILE} nor {SINGLE_FILE}"):
        read_tensors(tmp_path)
    listed = sharded(tmp_path)
    write_index(tmp_path, {"weight_map": listed | {"x": "gone.safetensors"}})
    with pytest.raises(FileNotFoundError, match=f"{INDEX_FILE}: .* not in the folder: gone.safetensors"):
        read_tensors(tmp_path)
    write_index(tmp_path, {"weight_map": listed})
    write_shard(tmp_path / TWO, {"a": entry("U8", [1], 0, 1), "c": entry("U8", [1], 1, 2)}, 2)
    with pytest.raises(ValueError, match=f"{TWO}: a: also stored in {ONE}"):
        read_tensors(tmp_path)
