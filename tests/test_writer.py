"""The writer of checkpoint folders: the layout of shards, all or nothing, and which parts a slot has."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from dsv4.loading.formats import FORMATS, encode, quantize
from dsv4.loading.headers import INDEX_FILE, read_tensors
from dsv4.loading.mapping import Slot
from dsv4.loading.writer import Entry, expected_parts, find_layout, write_checkpoint


def test_writer_lays_out_shards_that_the_library_reads(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((i + 1, 3), i, dtype=torch.uint8) for i in range(20)}
    tensors |= {"f": torch.tensor(1.5), "b": torch.ones(7, dtype=torch.bfloat16), "i": torch.arange(300)}
    entries = [Entry.of(name, tensor) for name, tensor in tensors.items()]
    write_checkpoint(tmp_path / "new" / "ckpt", entries, config={"a": 1}, tokenizer="{}", shard_gb=1e-7)
    directory = tmp_path / "new" / "ckpt"
    index = json.loads((directory / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(entry.nbytes for entry in entries)
    assert index["weight_map"].keys() == tensors.keys()
    found = read_tensors(directory)
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            assert all(torch.equal(file.get_tensor(name), tensors[name]) for name in names)
        assert len(names) == 1 or sum(found[name].nbytes for name in names) <= 100
    assert all(info.start % tensors[name].element_size() == 0 for name, info in found.items())


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failed_write_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    def fail() -> Iterator[Tensor]:
        assert any(tmp_path.iterdir())
        yield torch.zeros(4)
        raise error

    entries = [Entry.of("a", torch.zeros(1000)), Entry("b", "F32", (8,), fail)]
    with pytest.raises(type(error)):
        write_checkpoint(tmp_path / "ckpt", entries, config={}, tokenizer="{}")
    assert not any(tmp_path.iterdir())
    write_checkpoint(tmp_path / "ckpt", entries[:1], config={}, tokenizer="{}")
    with pytest.raises(ValueError, match="expected a new or empty folder, found 4 files"):
        write_checkpoint(tmp_path / "ckpt", entries[:1], config={}, tokenizer="{}")
    huge = Entry("c", "U8", (10**18,), tuple)
    with pytest.raises(ValueError, match=r"expected 1000000000.0 GB of free disk space, found \d"):
        write_checkpoint(tmp_path / "huge", [huge], config={}, tokenizer="{}")
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]


@pytest.mark.parametrize("format", FORMATS)
def test_expected_parts_are_those_of_encode(format: str) -> None:
    """The shapes announced from the table are the shapes of real weights."""
    matrix = torch.randn(160, 192, generator=torch.Generator().manual_seed(0))
    weight = quantize(matrix, format, input_scale=torch.tensor(0.01))
    entries = [Entry.of(suffix, tensor) for suffix, tensor in encode(weight, format).items()]
    parts = expected_parts(Slot("a", (160, 192), "linear"), find_layout(format))
    assert parts == [(entry.name, entry.dtype, entry.shape) for entry in entries]


def test_layouts() -> None:
    suffixes = (".scale", ".weight_scale", ".weight_scale_inv")
    assert [find_layout("fp8", suffix).parts[1].suffix for suffix in suffixes] == list(suffixes)
    assert find_layout("fp8").parts[1].suffix == ".scale"
    for wrong in (("int4", None), ("mxfp4", ".weight_scale")):
        with pytest.raises(ValueError, match=f"weight format: .* found '{wrong[0]}'"):
            find_layout(*wrong)
    assert expected_parts(Slot("norm", (5,), "norm")) == [(".weight", "BF16", (5,))]
    assert expected_parts(Slot("a.tid2eid", (5, 2), "ids")) == [("", "I64", (5, 2))]
    with pytest.raises(ValueError, match="a: NVFP4 .* multiples of 16, found 24"):
        expected_parts(Slot("a", (8, 24), "linear"), find_layout("nvfp4"))
