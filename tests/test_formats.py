"""Storage formats: hand-made literals, round trips, refusals by headers and by values."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsv4.loading.formats import FORMATS, SUFFIXES, StoredSlot, assemble, encode, quantize, resolve
from dsv4.loading.headers import TensorInfo
from dsv4.loading.mapping import Slot
from dsv4.loading.values import ValueChecks
from dsv4.ops.formats import Fp8Block, Mxfp4, Nvfp4, Plain, Weight, dequantize, shape_of

E4M3, E8M0, BF16 = torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.bfloat16
DTYPES = {
    E4M3: "F8_E4M3",
    E8M0: "F8_E8M0",
    BF16: "BF16",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int64: "I64",
}
# Every e2m1 code once, low nibble first, and its value.
CODES = [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]
VALUES = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


def raw(data: list, dtype: torch.dtype) -> Tensor:
    """A tensor from its bytes."""
    return torch.tensor(data, dtype=torch.uint8).view(dtype)


def store(shape: tuple[int, int], tensors: dict[str, Tensor]) -> StoredSlot:
    """``tensors`` (by suffix) proved as the linear ``x`` of ``shape``."""
    infos = {s: tensors[s] for s in SUFFIXES if s in tensors}
    infos = {s: TensorInfo(Path("f"), DTYPES[t.dtype], tuple(t.shape), 0, t.nbytes) for s, t in infos.items()}
    return resolve(Slot("x", shape, "linear"), "x", infos)


def read(shape: tuple[int, int], tensors: dict[str, Tensor]) -> Weight:
    checks = ValueChecks()
    weight = assemble(store(shape, tensors), tensors, checks)
    checks.finish()
    return weight


def nvfp4(n: int = 2, k: int = 32) -> dict[str, Tensor]:
    return {
        ".weight": torch.zeros(n, k // 2, dtype=torch.uint8),
        ".weight_scale": torch.ones(n, k // 16).to(E4M3),
        ".weight_scale_2": torch.tensor(1.0),
        ".input_scale": torch.tensor(1.0),
    }


def fp8(n: int, k: int, scale: Tensor, suffix: str = ".scale") -> dict[str, Tensor]:
    return {".weight": torch.ones(n, k).to(E4M3), suffix: scale}


def assert_same(found: Weight, expected: Weight) -> None:
    assert type(found) is type(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.dtype == other.dtype and one.shape == other.shape
            assert torch.equal(one.flatten().view(torch.uint8), other.flatten().view(torch.uint8))


def test_nvfp4_literal() -> None:
    tensors = {
        ".weight": raw([CODES + CODES], torch.uint8),
        ".weight_scale": raw([[0x38, 0x41]], E4M3),  # 1 and 2.25
        ".weight_scale_2": torch.tensor(0.5),
        ".input_scale": torch.tensor(0.25),
    }
    weight = read((1, 32), tensors)
    assert isinstance(weight, Nvfp4) and weight.in_gs == 0.25
    assert dequantize(weight).tolist() == [[0.5 * v for v in VALUES] + [1.125 * v for v in VALUES]]
    del tensors[".input_scale"]
    assert read((1, 32), tensors).in_gs is None


def test_compressed_tensors_scalars_are_reciprocals() -> None:
    tensors = {
        ".weight_packed": raw([CODES], torch.uint8),
        ".weight_scale": raw([[0x38]], E4M3),
        ".weight_global_scale": torch.tensor([3.0]),
        ".input_global_scale": torch.tensor([8.0]),
    }
    weight = read((1, 16), tensors)
    assert weight.w_gs.shape == () and weight.w_gs == torch.tensor(1.0) / 3 and weight.in_gs == 0.125
    assert torch.equal(dequantize(weight)[0], torch.tensor(VALUES) * (torch.tensor(1.0) / 3))
    again = encode(weight._replace(w_gs=torch.tensor(0.25)), "nvfp4-ct")
    assert again[".weight_global_scale"].tolist() == [4.0] and again[".input_global_scale"].tolist() == [8.0]


@pytest.mark.parametrize("container", [torch.uint8, torch.int8])
def test_mxfp4_literal(container: torch.dtype) -> None:
    tensors = {".weight": raw([CODES + CODES], container), ".scale": raw([[129]], E8M0)}
    weight = read((1, 32), tensors)
    assert isinstance(weight, Mxfp4) and weight.w.dtype == torch.uint8
    assert dequantize(weight).tolist() == [[4 * v for v in VALUES + VALUES]]


@pytest.mark.parametrize(
    ("suffix", "dtype"),
    [
        (".scale", E8M0),
        (".scale", torch.float32),
        (".weight_scale_inv", torch.float32),
        (".weight_scale_inv", BF16),
        (".weight_scale_inv", E8M0),
        (".weight_scale", BF16),
        (".weight_scale", torch.float32),
    ],
)
def test_fp8_literal(suffix: str, dtype: torch.dtype) -> None:
    scale = torch.tensor([[1.0, 2.0], [0.5, 4.0]])
    stored = raw([[127, 128], [126, 129]], E8M0) if dtype == E8M0 else scale.to(dtype)
    weight = read((130, 132), fp8(130, 132, stored, suffix))
    assert isinstance(weight, Fp8Block)
    assert weight.w_sf.dtype == (E8M0 if dtype == E8M0 else torch.float32)
    matrix = dequantize(weight)  # the stored scale multiplies, whatever it is called
    assert matrix[127, 127] == 1 and matrix[127, 128] == 2
    assert matrix[128, 127] == 0.5 and matrix[129, 131] == 4


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_plain_literal(dtype: torch.dtype) -> None:
    weight = read((2, 2), {".weight": torch.tensor([[1.5, -2.0], [0.0, 3.0]], dtype=dtype)})
    assert isinstance(weight, Plain) and weight.w.dtype == dtype
    assert dequantize(weight).tolist() == [[1.5, -2.0], [0.0, 3.0]]


@pytest.mark.parametrize("format", FORMATS)
def test_quantise_encode_assemble_round_trip(format: str) -> None:
    matrix = torch.randn(136, 160, generator=torch.Generator().manual_seed(3))
    scale = torch.tensor(2.0**-9) if format == "nvfp4-ct" else None  # its reciprocal is exact
    weight = quantize(matrix, format, global_scale=scale)
    assert shape_of(weight) == (136, 160)
    assert_same(read((136, 160), encode(weight, format)), weight)
    error = (dequantize(weight) - matrix).abs().max() / matrix.abs().max()
    assert error <= {"f32": 0.0, "bf16": 0.004, "fp8": 0.1}.get(format, 0.2)


def test_quantise_zeros_and_unknown_formats() -> None:
    weight = quantize(torch.zeros(2, 32), "nvfp4")
    assert weight.w_gs == 1 and not dequantize(read((2, 32), encode(weight, "nvfp4"))).any()
    with pytest.raises(ValueError, match="expected one of nvfp4, .* found 'int4'"):
        quantize(torch.zeros(2, 32), "int4")
    for format, wrong in (("mxfp4", weight), ("f32", quantize(torch.zeros(2, 32), "bf16"))):
        with pytest.raises(ValueError, match=f"format {format} cannot store a"):
            encode(wrong, format)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({".weight_scale_2": None}, r"x\.weight_scale_2 is missing; found \.weight U8 \[2, 16\]"),
        ({".weight_scale": None}, r"x\.weight_scale is missing"),
        ({".weight": None}, r"x\.weight is missing"),
        ({".scale": torch.ones(2, 1).to(E8M0)}, r"x\.scale does not belong there"),
        ({".weight": torch.zeros(2, 16, dtype=torch.int8)}, r"x\.weight: expected U8, found I8"),
        ({".weight_scale_2": torch.tensor(1.0, dtype=BF16)}, r"x\.weight_scale_2: expected F32, found BF16"),
        ({".weight_scale_2": torch.ones(2)}, r"x\.weight_scale_2: expected shape \[\] .* found F32 \[2\]"),
        ({".weight_scale": torch.ones(2, 1).to(E4M3)}, r"x\.weight_scale: expected shape \[2, 2\]"),
        ({".weight": torch.zeros(2, 32, dtype=torch.uint8)}, r"expected shape \[2, 16\] for a \[2, 32\]"),
    ],
)
def test_nvfp4_refusals(change: dict[str, Tensor | None], complaint: str) -> None:
    tensors = {suffix: t for suffix, t in (nvfp4() | change).items() if t is not None}
    with pytest.raises(ValueError, match=f"^f: .*{complaint}"):
        store((2, 32), tensors)


@pytest.mark.parametrize(
    ("shape", "tensors", "complaint"),
    [
        ((2, 24), nvfp4(2, 24), "x: NVFP4 .* multiple of 16, found 24"),
        ((2, 32), {".weight": torch.zeros(2, 32, dtype=torch.float16)}, "x.weight: expected .* found F16"),
        ((2, 32), {".weight": torch.zeros(2, 32).to(E4M3)}, "x.scale is missing"),
        ((2, 32), {".weight": torch.zeros(2, 16, dtype=torch.uint8)}, "x.scale is missing"),
        ((2, 32), {".scale": torch.ones(2, 1).to(E8M0)}, "x.weight is missing"),
        (
            (2, 32),
            {".weight": torch.zeros(32, 2)},
            r"expected shape \[2, 32\] .* found F32 \[32, 2\]",
        ),
        ((2, 32), fp8(2, 32, torch.tensor(1.0), ".weight_scale"), r"x.weight_scale: expected shape \[1, 1\]"),
        ((2, 32), fp8(2, 32, torch.ones(2, 1), ".weight_scale"), r"found F32 \[2, 1\]"),
        (
            (2, 32),
            fp8(2, 32, torch.ones(1, 1)) | {".weight_scale": torch.ones(1, 1)},
            "does not belong there",
        ),
    ],
)
def test_other_refusals(shape: tuple[int, int], tensors: dict[str, Tensor], complaint: str) -> None:
    with pytest.raises(ValueError, match=f"^f: .*{complaint}"):
        store(shape, tensors)


@pytest.mark.parametrize(
    ("tensors", "suffix", "bad"),
    [
        (nvfp4(), ".weight_scale", [0x7F, 0xFF, 0x81, 0xB8]),
        ({".weight": torch.zeros(2, 16, dtype=torch.int8), ".scale": raw([[1], [2]], E8M0)}, ".scale", [255]),
        (fp8(2, 32, raw([[127]], E8M0)), ".scale", [255]),
        (fp8(2, 32, raw([[127]], E8M0)), ".weight", [0x7F, 0xFF]),
        (fp8(2, 32, torch.ones(1, 1)), ".scale", [math.nan, math.inf, -1.0]),
        (
            fp8(2, 32, torch.ones(1, 1, dtype=BF16), ".weight_scale"),
            ".weight_scale",
            [math.nan, math.inf, -1.0],
        ),
        ({".weight": torch.ones(2, 32)}, ".weight", [math.nan, math.inf, -math.inf]),
        ({".weight": torch.ones(2, 32, dtype=BF16)}, ".weight", [math.nan, math.inf, -math.inf]),
    ],
)
def test_bad_values_are_refused(tensors: dict[str, Tensor], suffix: str, bad: list[float]) -> None:
    for value in [0, *bad]:
        changed = tensors[suffix].clone()
        byte_wise = changed.itemsize == 1
        (changed.view(torch.uint8) if byte_wise else changed)[-1, -1] = value
        if value == 0:
            read((2, 32), tensors | {suffix: changed})  # zero is legal everywhere
            continue
        with pytest.raises(ValueError, match=rf"^f: x{suffix}: holds "):
            read((2, 32), tensors | {suffix: changed})
