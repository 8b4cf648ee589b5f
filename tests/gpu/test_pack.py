"""The pack kernels against their references, bit by bit, and a model that is packed while it is loaded."""

import gc
from pathlib import Path

import pytest
import torch
from numeric import assert_bits, assert_reproducible, dirty_memory
from shapes import MODELS, Sizes
from torch import Tensor

from dsv4.config import ModelConfig
from dsv4.loading.assemble import assemble
from dsv4.loading.checkpoint import Checkpoint
from dsv4.numerics import Numerics
from dsv4.ops.formats import Mxfp4, Nvfp4, Packed, dequantize
from dsv4.ops.gemm import reference as gemm
from dsv4.ops.pack import pack_weight, reference, unpack_weight
from dsv4.plan import make_plan

TINY = Path(__file__).resolve().parent.parent.parent / "models" / "tiny"
KINDS = pytest.mark.parametrize("kind", ["nvfp4", "mxfp4"])
ODD = [(1, 32), (15, 32), (17, 64), (31, 288), (33, 544), (130, 992), (1000, 96), (16, 1024), (300, 7168)]


def random_weight(kind: str, n: int, k: int) -> Nvfp4 | Mxfp4:
    """Every byte of codes, and every scale that a kernel may meet."""
    generator = torch.Generator("cuda").manual_seed(n * 100003 + k)

    def draw(high: int, width: int) -> Tensor:
        return torch.randint(high, (n, width), generator=generator, device="cuda", dtype=torch.uint8)

    if kind == "mxfp4":
        return Mxfp4(draw(256, k // 2), draw(137, k // 32).view(torch.float8_e8m0fnu))
    scalars = torch.tensor([0.37, 0.11], device="cuda")
    return Nvfp4(draw(256, k // 2), draw(127, k // 16).view(torch.float8_e4m3fn), scalars[0], scalars[1])


def requested(when: str) -> int:
    """Bytes asked of the allocator, "current" or "peak", before it rounds them up."""
    return torch.cuda.memory_stats()[f"requested_bytes.all.{when}"]


def assert_kernels(weight: Nvfp4 | Mxfp4, case: str) -> None:
    """Both directions; outputs start as poison, so padding that is not written is seen."""
    dirty_memory()
    packed = pack_weight(weight)
    want = reference.pack_weight(weight)
    assert_bits(packed.data, want.data, case)
    assert packed[2:] == want[2:] and packed.kind == want.kind
    dirty_memory()
    again = unpack_weight(packed)
    assert type(again) is type(weight) and again[2:] == weight[2:]
    for index in (0, 1):
        assert_bits(again[index], weight[index], f"{case}, unpacked, output {index}")
    assert_bits(reference.unpack_weight(packed).w, weight.w, f"{case}, by the reference")


@KINDS
@pytest.mark.parametrize("sizes", MODELS, ids=lambda sizes: sizes.name)
def test_matrices_of_the_models(kind: str, sizes: Sizes) -> None:
    """Experts, query projections, the indexer's queries, a router, the output projection's first half."""
    shapes = [
        (sizes.expert_width, sizes.hidden),
        (sizes.hidden, sizes.expert_width),
        (sizes.q_lora, sizes.hidden),
        (sizes.heads * sizes.head_dim // 8, sizes.q_lora),
        (sizes.index_heads * sizes.index_dim, sizes.q_lora),
        (sizes.experts, sizes.hidden),
        (1024, 4096),
    ]
    for shape in shapes:
        assert_kernels(random_weight(kind, *shape), f"{kind} {sizes.name} {shape}")


@KINDS
def test_odd_shapes(kind: str) -> None:
    for shape in ODD:
        assert_kernels(random_weight(kind, *shape), f"{kind} {shape}")
    if kind == "nvfp4":
        for shape in ((1, 16), (19, 48), (40, 272), (128, 4112)):  # rows of 8 x odd bytes
            assert_kernels(random_weight(kind, *shape), f"{kind} {shape}")


@KINDS
def test_nothing(kind: str) -> None:
    for shape in ((0, 64), (5, 0)):
        packed = pack_weight(random_weight(kind, *shape))
        assert packed.data.shape[0] == 0 and unpack_weight(packed).w.shape == (shape[0], shape[1] // 2)


@KINDS
def test_bits_and_given_memory(kind: str) -> None:
    weight = random_weight(kind, 200, 544)
    packed = pack_weight(weight)
    assert_reproducible(lambda: pack_weight(weight).data, kind)
    assert_reproducible(lambda: unpack_weight(packed)[:2], kind)
    size = packed.data.numel()
    slab = torch.full((3 * size,), 7, dtype=torch.uint8, device="cuda")
    out = slab[size : 2 * size].view(packed.data.shape)
    assert pack_weight(weight, out=out).data is out
    assert_bits(out, packed.data, kind)
    assert bool((slab[:size] == 7).all()) and bool((slab[2 * size :] == 7).all())


@pytest.mark.allocator
@KINDS
def test_no_memory_beyond_the_output(kind: str) -> None:
    weight = random_weight(kind, 2048, 4096)
    torch.cuda.reset_peak_memory_stats()
    before = requested("current")
    packed = pack_weight(weight)
    assert requested("peak") - before == packed.data.numel()


@KINDS
@pytest.mark.parametrize("activations", ["bf16", "nvfp4"])
def test_products_of_a_packed_weight(kind: str, activations: str) -> None:
    """The references read it on the GPU too, and see the same matrix."""
    weight = random_weight(kind, 96, 544)
    packed = pack_weight(weight)
    assert_bits(dequantize(packed), dequantize(weight), kind)
    x = torch.linspace(-3, 5, 7 * 544, device="cuda").view(7, 544)
    found, want = (gemm.linear(x, w, activations=activations) for w in (packed, weight))
    assert_bits(found, want, f"{kind} {activations}")


def test_what_it_cannot_take() -> None:
    nvfp4, mxfp4 = random_weight("nvfp4", 16, 64), random_weight("mxfp4", 16, 64)
    packed = pack_weight(nvfp4)
    shifted = torch.zeros(16 * 32 + 8, dtype=torch.uint8, device="cuda")[1 : 16 * 32 + 1].view(16, 32)
    for call, words in (
        (lambda: pack_weight(nvfp4._replace(w=nvfp4.w[:, ::2])), "contiguous"),
        (lambda: pack_weight(nvfp4._replace(w=nvfp4.w.int())), "w: expected torch.uint8"),
        (lambda: pack_weight(nvfp4._replace(w_sf=nvfp4.w_sf[:, :2].contiguous())), "w_sf: expected shape"),
        (lambda: pack_weight(mxfp4._replace(w_sf=mxfp4.w_sf.view(torch.uint8))), "w_sf: expected"),
        (lambda: pack_weight(random_weight("nvfp4", 4, 24)), "K a multiple of 16"),
        (lambda: pack_weight(random_weight("mxfp4", 4, 48)), "K a multiple of 32"),
        (lambda: pack_weight(nvfp4, out=packed.data[:, :2176].contiguous()), "out: expected shape"),
        (lambda: unpack_weight(packed._replace(n=17)), "data: expected shape"),
    ):
        with pytest.raises(AssertionError, match=words):
            call()
    with pytest.raises(RuntimeError, match="misaligned"):
        pack_weight(nvfp4._replace(w=shifted))


@pytest.mark.allocator
@pytest.mark.parametrize("mode", ["stored", "nvfp4-all"])
def test_a_model_is_packed_and_planned(mode: str) -> None:
    """4-bit matrices arrive packed; weights take what the plan says, norms twice that, as they become f32."""
    config, device = ModelConfig.from_checkpoint(TINY), torch.device("cuda")
    checkpoint, numerics = Checkpoint.open(TINY, config), Numerics(weights=mode)
    gc.collect()
    before = requested("current")
    model = assemble(checkpoint, numerics, device, cache_dequantised_mb=0)
    experts = [expert for block in model.blocks for expert in block.ffn.experts]
    assert all(isinstance(weight, Packed) for expert in experts for weight in expert)
    assert isinstance(model.head, Packed) == (mode == "nvfp4-all")
    taken = requested("current") - before
    planned = make_plan(checkpoint, numerics, device, 64, 0).weight_bytes
    norms = sum(stored.nbytes for stored in checkpoint.stored.values() if stored.slot.kind == "norm")
    assert planned <= taken <= planned + norms + 10_000, f"{planned} planned, {taken} taken"
