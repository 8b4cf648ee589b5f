"""The packed layout against one written here code by code, bit by bit, and every product that reads it."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from codes import E2M1, bits
from torch import Tensor

from dsv4.ops.formats import Mxfp4, Nvfp4, Packed, dequantize, is_nvfp4, nbytes, shape_of, stored, unscaled
from dsv4.ops.gemm import grouped_linear, linear
from dsv4.ops.moe import Expert, run_experts
from dsv4.ops.pack import pack_weight, unpack_weight

KINDS = ("nvfp4", "mxfp4")
SHAPES = [(16, 256), (1, 32), (15, 224), (17, 288), (33, 544), (48, 768), (130, 64)]
BLOCK = {"nvfp4": 16, "mxfp4": 32}


def random_weight(kind: str, n: int, k: int, rng: np.random.Generator) -> Nvfp4 | Mxfp4:
    """Every byte of codes, so -0 as well, and every scale that a kernel may meet."""
    w = torch.from_numpy(rng.integers(0, 256, (n, k // 2)).astype(np.uint8))
    limit = {"nvfp4": 0x7F, "mxfp4": 137}[kind]
    scales = torch.from_numpy(rng.integers(0, limit, (n, k // BLOCK[kind])).astype(np.uint8))
    if kind == "mxfp4":
        return Mxfp4(w, scales.view(torch.float8_e8m0fnu))
    return Nvfp4(w, scales.view(torch.float8_e4m3fn), torch.tensor(0.37), torch.tensor(0.11))


def packed_by_hand(weight: Nvfp4 | Mxfp4) -> np.ndarray:
    """Unit after unit, word by word, code by code: [units, 2304 or 2176] u8."""
    w, w_sf = weight.w.numpy(), bits(weight.w_sf).numpy()
    nvfp4 = isinstance(weight, Nvfp4)
    (n, half), block = w.shape, BLOCK["nvfp4" if nvfp4 else "mxfp4"]
    k = 2 * half
    units = []

    def code(row: int, column: int) -> int:
        inside = row < n and column < k
        return int(w[row, column // 2]) >> 4 * (column % 2) & 15 if inside else 0

    def scale(row: int, group: int) -> int:
        return int(w_sf[row, group]) if row < n and group < k // block else 0

    def half_word(a: int, b: int, c: int, d: int) -> int:
        """NVFP4: signs at bits 7, 0, 15, 8, the rest at 3..1, 6..4, 11..9, 14..12.
        MXFP4: signs at 15, 12, 9, 14, the rest at 8..6, 5..3, 2..0, and 11, 10, 13."""
        if nvfp4:
            word = a // 8 << 7 | b // 8 | c // 8 << 15 | d // 8 << 8
            return word | a % 8 << 1 | b % 8 << 4 | c % 8 << 9 | d % 8 << 12
        word = a // 8 << 15 | b // 8 << 12 | c // 8 << 9 | d // 8 << 14
        return word | a % 8 << 6 | b % 8 << 3 | c % 8 | d % 8 // 2 << 10 | d % 2 << 13

    for top in range(0, n, 16):
        for left in range(0, k, 256):
            words, scales = [], []
            for q in range(4):
                for lane in range(32):
                    g, t = divmod(lane, 4)
                    for i in range(4):
                        row, column = top + g, left + 64 * q + 16 * t + 4 * i
                        even, odd = (
                            half_word(*(code(row + 8 * r, column + p + c) for c in (0, 2) for r in (0, 1)))
                            for p in (0, 1)
                        )
                        words.append(even | odd << 16)
            for g in range(8):
                for t in range(0, 4, block // 16):
                    for q in range(4):
                        group = (left + 64 * q + 16 * t) // block
                        scales += [scale(top + g, group), scale(top + g + 8, group)]
            units.append(np.concatenate((np.array(words, np.uint32).view(np.uint8), np.uint8(scales))))
    return np.stack(units)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_layout_and_inverse(kind: str, shape: tuple[int, int], rng: np.random.Generator) -> None:
    weight = random_weight(kind, *shape, rng)
    packed = pack_weight(weight)
    assert isinstance(packed, Packed) and (packed.kind, packed.n, packed.k) == (kind, *shape)
    assert np.array_equal(packed.data.numpy(), packed_by_hand(weight))
    assert_same(unpack_weight(packed), weight)


def assert_same(found: Nvfp4 | Mxfp4, want: Nvfp4 | Mxfp4) -> None:
    assert type(found) is type(want)
    for own, other in zip(found[:2], want[:2], strict=True):
        assert own.dtype == other.dtype and own.shape == other.shape and torch.equal(bits(own), bits(other))
    assert found[2:] == want[2:]


def test_widths_of_nvfp4_groups(rng: np.random.Generator) -> None:
    """K is a multiple of 16 only: rows of 8 x odd bytes, the last group alone in its pair."""
    for k in (16, 48, 272):
        weight = random_weight("nvfp4", 19, k, rng)
        packed = pack_weight(weight)
        assert np.array_equal(packed.data.numpy(), packed_by_hand(weight))
        assert_same(unpack_weight(packed), weight)


@pytest.mark.parametrize("kind", KINDS)
def test_masks_and_shifts_make_operands(kind: str, rng: np.random.Generator) -> None:
    """A kernel's masks give pairs of e2m1 * 2^-14 in fp16 (NVFP4) or e2m1 * 2^-126 in bf16 (MXFP4), with
    columns, rows and signs where they belong."""
    weight = random_weight(kind, 16, 256, rng)
    words = pack_weight(weight).data[:, :2048].contiguous().view(torch.int32).view(4, 8, 4, 4).numpy()
    q = words.view(np.uint32).astype(np.uint64)
    if kind == "nvfp4":
        upper, lower = q & 0x8E8E8E8E, q >> 3 & 0x0E0E0E0E | q << 7 & 0x80808080
        operands = [rows << shift & 0xFF00FF00 for shift in (8, 0) for rows in (upper, lower)]
    else:
        operands = [q << shift & 0x81C081C0 for shift in (0, 3, 6)]
        operands.append(q >> 3 & 0x01800180 | q >> 7 & 0x00400040 | q << 1 & 0x80008000)
    codes = weight.w.numpy()
    nibbles = np.stack((codes & 15, codes >> 4), -1).reshape(2, 8, 4, 4, 4, 4)  # half, g, q, t, i, column
    for index, operand in enumerate(operands):
        column, half = divmod(index, 2)
        for odd in (0, 1):
            bits16 = (operand >> 16 * odd & 0xFFFF).astype(np.uint16)
            if kind == "nvfp4":
                found = bits16.view(np.float16).astype(float) * 2.0**14
            else:
                found = (bits16.astype(np.uint32) << 16).view(np.float32).astype(float) * 2.0**126
            want = nibbles[half, ..., 2 * column + odd].transpose(1, 0, 2, 3)  # q, g, t, i
            assert np.array_equal(found, np.where(want & 8, -1.0, 1.0) * E2M1[want & 7])
            assert np.array_equal(np.signbit(found), want >= 8)  # -0 too


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_weight_is_the_weight(kind: str, rng: np.random.Generator) -> None:
    weight = random_weight(kind, 37, 544, rng)
    packed = pack_weight(weight)
    (matrix, gs), (want, want_gs) = unscaled(packed), unscaled(weight)
    assert torch.equal(bits(matrix), bits(want)) and gs is want_gs
    assert torch.equal(dequantize(packed), dequantize(weight))
    assert shape_of(packed) == (37, 544) and stored(packed) is packed
    assert is_nvfp4(packed) == is_nvfp4(weight) == (kind == "nvfp4")
    scalars = 8 if kind == "nvfp4" else 0
    assert nbytes(packed) == packed.data.numel() + scalars == 9 * (2048 + 4096 // BLOCK[kind]) + scalars
    if kind == "nvfp4":
        assert packed.gs is weight.w_gs and packed.in_gs is weight.in_gs
        bare = pack_weight(weight._replace(in_gs=None))
        assert bare.in_gs is None and unpack_weight(bare).in_gs is None


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_and_given_memory(kind: str, rng: np.random.Generator) -> None:
    for shape in ((0, 64), (5, 0)):
        weight = random_weight(kind, *shape, rng)
        packed = pack_weight(weight)
        assert packed.data.shape[0] == 0 and shape_of(packed) == shape
        assert_same(unpack_weight(packed), weight)
    weight = random_weight(kind, 20, 96, rng)
    want = pack_weight(weight).data
    slab = torch.full((3 * want.numel(),), 7, dtype=torch.uint8)
    out = slab[want.numel() : 2 * want.numel()].view(want.shape)
    assert pack_weight(weight, out=out).data is out and torch.equal(out, want)
    assert set(slab[: want.numel()].tolist() + slab[2 * want.numel() :].tolist()) == {7}


@pytest.mark.parametrize("activations", ["bf16", "fp8", "nvfp4"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_product_takes_it(
    kind: str, activations: str, rng: np.random.Generator, normal: Callable[..., Tensor]
) -> None:
    """The same bits as of the weight as stored: the same matrix, and both scales, come through."""
    weights = [random_weight(kind, n, k, rng) for n, k in ((40, 96), (64, 32), (32, 96), (96, 32), (32, 96))]
    packed = [pack_weight(weight) for weight in weights]
    x = normal(5, 96)
    want = linear(x, weights[0], activations=activations)
    assert want.isfinite().all() and torch.equal(linear(x, packed[0], activations=activations), want)
    groups = normal(5, 4, 32)
    want = grouped_linear(groups, weights[1], activations=activations)
    assert torch.equal(grouped_linear(groups, packed[1], activations=activations), want)
    routing, chosen = normal(5, 2), torch.tensor([[0, 1], [1, 0], [0, 1], [1, 0], [0, 1]])

    def experts(parts: list) -> Tensor:
        expert = Expert(*parts[2:])
        return run_experts(x, routing, chosen, [expert, expert], expert, limit=10.0, activations=activations)

    assert torch.equal(experts(packed), experts(weights))
