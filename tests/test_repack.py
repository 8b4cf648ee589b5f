"""Packing at load: which matrices, in what memory, what is refused; the plan counts the same bytes."""

import weakref
from pathlib import Path

import pytest
import torch
from checkpoints import PRESETS, encode_model, model_slots, random_model, tiny_config_dict, write_checkpoint
from torch import Tensor

from dsv4 import plan as planning
from dsv4.config import ModelConfig
from dsv4.loading import repack as module
from dsv4.loading.checkpoint import Checkpoint
from dsv4.loading.formats import FORMATS, quantize
from dsv4.loading.repack import is_packed, padding_bytes, repack
from dsv4.loading.requantize import requantize
from dsv4.numerics import WEIGHTS, Numerics
from dsv4.ops.formats import Mxfp4, Nvfp4, Packed, Weight, dequantize, nbytes
from dsv4.ops.pack import pack_weight

RAW = tiny_config_dict()
CONFIG = ModelConfig.from_dict(RAW)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PACKED_FORMATS = {"nvfp4", "nvfp4-ct", "mxfp4"}


@pytest.fixture(scope="module", params=["nvidia", "deepseek"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    tensors = encode_model(random_model(CONFIG, seed=5), CONFIG, PRESETS[request.param])
    directory: Path = write_checkpoint(tmp_path_factory.mktemp(request.param), RAW, tensors)
    return Checkpoint.open(directory, CONFIG, mtp=True)


def load(checkpoint: Checkpoint, mode: str) -> dict[str, Weight | Tensor]:
    loaded = checkpoint.load(model_slots(CONFIG))
    return {n: w if isinstance(w, Tensor) else requantize(n, w, mode) for n, w in loaded.items()}


def test_formats_and_places() -> None:
    for format in FORMATS:
        assert is_packed(format, CUDA) == (format in PACKED_FORMATS) and not is_packed(format, CPU)


@pytest.mark.parametrize("mode", WEIGHTS)
def test_every_4_bit_matrix_of_a_checkpoint(checkpoint: Checkpoint, mode: str) -> None:
    before, after = load(checkpoint, mode), load(checkpoint, mode)
    repack(after, slab_bytes=20_000)
    assert after.keys() == before.keys()
    kinds = set()
    for name, weight in before.items():
        if isinstance(weight, Nvfp4 | Mxfp4):
            found = after[name]
            assert isinstance(found, Packed) and torch.equal(dequantize(found), dequantize(weight)), name
            kinds.add(found.kind)
        elif isinstance(weight, Tensor):
            assert torch.equal(after[name], weight)
        else:
            assert type(after[name]) is type(weight) and torch.equal(
                dequantize(after[name]), dequantize(weight)
            )
    requantised = {"nvfp4"} if mode != "stored" else set()
    assert kinds == requantised | {stored.format for stored in checkpoint.stored.values()} & PACKED_FORMATS


@pytest.mark.parametrize("mode", WEIGHTS)
def test_the_plan_counts_what_is_allocated(
    checkpoint: Checkpoint, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding counts, tiny matrices being mostly padding; FP8 and plain weights take what they took."""
    monkeypatch.setattr(planning, "free_bytes", lambda device: 1 << 40)
    weights = load(checkpoint, mode)
    on_cpu, on_cuda = (planning.make_plan(checkpoint, Numerics(mode), d, 64, 0) for d in (CPU, CUDA))
    assert on_cpu.weight_bytes == allocated(weights, checkpoint)
    repack(weights)
    assert on_cuda.weight_bytes == allocated(weights, checkpoint) > on_cpu.weight_bytes


def allocated(weights: dict[str, Weight | Tensor], checkpoint: Checkpoint) -> int:
    """Of matrices what they hold, of other tensors what is stored: norms are planned as they are on disk."""
    sizes = {
        n: checkpoint.stored[n].nbytes if isinstance(w, Tensor) else nbytes(w) for n, w in weights.items()
    }
    return sum(sizes.values())


def test_padding() -> None:
    assert padding_bytes("nvfp4", (2048, 4096)) == padding_bytes("mxfp4", (7168, 3072)) == 0
    assert padding_bytes("nvfp4-ct", (17, 272)) == 4 * 2304 - 17 * 272 * 9 // 16
    assert padding_bytes("mxfp4", (1, 32)) == 2176 - 16 - 1


def test_slabs_and_what_exists_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 7 matrices of 2304 bytes and one of 9216 in slabs of 5000; a matrix is let go when it is packed."""
    shapes = [(16, 256)] * 3 + [(32, 512)] + [(16, 256)] * 4
    matrices = [quantize(torch.randn(shape), "nvfp4") for shape in shapes]
    weights: dict[str, Weight | Tensor] = {f"w{i}": matrix for i, matrix in enumerate(matrices)}
    weights["norm"] = torch.ones(3)
    alive = [weakref.ref(matrix.w) for matrix in matrices]
    del matrices
    counts = []

    def watched(weight: Nvfp4 | Mxfp4, *, out: Tensor) -> Packed:
        counts.append(sum(ref() is not None for ref in alive))
        return pack_weight(weight, out=out)

    monkeypatch.setattr(module, "pack_weight", watched)
    repack(weights, slab_bytes=5000)
    assert counts == [8, 7, 6, 5, 4, 3, 2, 1] and all(ref() is None for ref in alive)
    slabs = [weights[f"w{i}"].data.untyped_storage() for i in range(8)]
    assert [slab.nbytes() for slab in slabs] == [4608, 4608, 2304, 9216, 4608, 4608, 4608, 4608]
    pointers = [slab.data_ptr() for slab in slabs]
    assert [pointers.index(pointer) for pointer in pointers] == [0, 0, 2, 3, 4, 4, 6, 6]
    repack(weights)  # nothing is left to pack
    repack({})


@pytest.mark.parametrize(
    ("format", "byte", "good"), [("mxfp4", 137, 136), ("nvfp4", 0x7F, 0x7E), ("nvfp4", 0x80, 0)]
)
def test_scales_that_no_kernel_reads(format: str, byte: int, good: int) -> None:
    kind = {"mxfp4": "e8m0", "nvfp4": "e4m3"}[format]
    for value in (good, byte):
        weights: dict[str, Weight | Tensor] = {n: quantize(torch.ones(4, 64), format) for n in ("a", "b.w2")}
        weights["b.w2"].w_sf.view(torch.uint8)[3, 1] = value
        if value == good:
            repack(weights)
            continue
        with pytest.raises(
            ValueError, match=rf"^b\.w2: expected {kind} scales up to byte \d+ .* found {byte}$"
        ):
            repack(weights)
        assert not any(isinstance(weight, Packed) for weight in weights.values())
