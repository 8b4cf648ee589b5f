"""Whole attention layers of each kind on the GPU: graphs and rows of a step, snapshots, steps against chunks.

Flash's attention (64 heads of 512, 64 index heads of 128, window 128) on a narrow model with random weights.
"""

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from checkpoints import tiny_config_dict
from numeric import assert_bits, without_allocator
from torch import Tensor

from dsv4.cache import RowFormat, SequenceCache
from dsv4.config import ModelConfig
from dsv4.layers.attention import Attention
from dsv4.layers.weights import Weights
from dsv4.loading.mapping import Slot, layer_slots
from dsv4.numerics import Numerics
from dsv4.ops.formats import MAX_STEP, Plain, Weight

CONFIG = ModelConfig.from_dict(
    tiny_config_dict(
        num_hidden_layers=3,
        compress_ratios=[0, 4, 128, 0],
        hidden_size=256,
        num_attention_heads=64,
        head_dim=512,
        qk_rope_head_dim=64,
        q_lora_rank=256,
        o_groups=8,
        o_lora_rank=64,
        sliding_window=128,
        index_n_heads=64,
        index_head_dim=128,
        index_topk=64,  # from position 260 on there is a choice
    )
)
KINDS = pytest.mark.parametrize("kind", ["window", "csa", "hca"])
CONTEXT = 640
# Before the first HCA entry (position 127) and the first wrap of the ring (position 135); the tests
# pass both twice.
START = 120


class Layer(NamedTuple):
    """A layer with its cache, and inputs u [CONTEXT, D] for it."""

    attention: Attention
    cache: SequenceCache
    u: Tensor

    def forward(self, start: int, tokens: int) -> Tensor:
        """The next tokens: outputs [tokens, D]. A step is told a wrong start, which it must not look at."""
        positions = torch.arange(start, start + tokens, device="cuda")
        told = start if tokens > MAX_STEP else -(10**9)
        out = self.attention.forward(
            self.u[start : start + tokens].contiguous(), positions, self.cache.layers[0], told
        )
        self.cache.position = start + tokens
        return out

    def run(self, start: int, pieces: list[int]) -> Tensor:
        outputs = []
        for tokens in pieces:
            outputs.append(self.forward(start, tokens))
            start += tokens
        return torch.cat(outputs)


def make_layer(kind: str, numerics: Numerics, seed: int = 1) -> Layer:
    generator = torch.Generator("cuda").manual_seed(seed)

    def value(slot: Slot) -> Weight | Tensor:
        noise = torch.randn(slot.shape, generator=generator, device="cuda")
        if slot.kind == "linear":
            return Plain((noise * slot.shape[1] ** -0.5).to(numerics.torch_dtype))
        return 1 + 0.1 * noise if slot.kind == "norm" else 0.5 * noise

    index = ("window", "csa", "hca").index(kind)
    prefix = f"layers.{index}.attn."
    slots = [slot for slot in layer_slots(CONFIG, index) if slot.name.startswith(prefix)]
    weights = Weights({slot.name: value(slot) for slot in slots})
    ratio = CONFIG.ratio(index)
    attention = Attention(CONFIG, numerics, ratio, weights.scope(f"layers.{index}.attn"))
    weights.assert_empty()
    form = RowFormat.of(CONFIG, numerics, torch.device("cuda"))
    cache = SequenceCache(CONFIG, (ratio,), max_context=CONTEXT, form=form, device="cuda")
    u = torch.randn((CONTEXT, CONFIG.hidden_size), generator=generator, device="cuda")
    return Layer(attention, cache, u.to(numerics.torch_dtype))


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def assert_state(layer: Layer, want: list[Tensor], case: str) -> None:
    for index, (found, kept) in enumerate(zip(layer.cache.snapshot().tensors, want, strict=True)):
        assert_bits(found, kept, f"{case}, tensor {index} of the cache")


@pytest.mark.skipif(without_allocator(), reason="a graph needs the allocator")
@pytest.mark.parametrize("tokens", [1, MAX_STEP])
@KINDS
def test_a_graph_of_a_step(kind: str, tokens: int) -> None:
    """Captured once, replayed at 200 positions: over two wraps of the ring and two HCA entries."""
    layer, steps = make_layer(kind, Numerics()), 200 // tokens
    layer.forward(0, START)
    saved = layer.cache.snapshot()
    want = layer.run(START, [tokens] * steps)
    state = layer.cache.snapshot().tensors
    layer.cache.restore(saved)
    u = layer.u[:tokens].clone()
    positions = torch.arange(tokens, device="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer.attention.forward(u, positions, layer.cache.layers[0], -1)
    for step in range(steps):
        at = START + step * tokens
        u.copy_(layer.u[at : at + tokens])
        positions.copy_(torch.arange(at, at + tokens, device="cuda"))
        out.fill_(torch.nan)
        graph.replay()
        assert_bits(out, want[at - START : at - START + tokens], f"{kind}, {tokens} tokens from {at} on")
    layer.cache.position = START + steps * tokens
    assert_state(layer, state, f"{kind}, {tokens} tokens")


@pytest.mark.parametrize("tokens", range(2, MAX_STEP + 1))
@KINDS
def test_rows_of_a_step(kind: str, tokens: int) -> None:
    """Row t of a step has the bits of the step with this token alone, and so has the cache."""
    layer, count = make_layer(kind, Numerics()), 168 // tokens * tokens
    layer.forward(0, START)
    saved = layer.cache.snapshot()
    want = layer.run(START, [1] * count)
    state = layer.cache.snapshot().tensors
    layer.cache.restore(saved)
    found = layer.run(START, [tokens] * (count // tokens))
    for t in range(count):
        assert_bits(found[t], want[t], f"{kind}, row {t % tokens} of {tokens}, position {START + t}")
    assert_state(layer, state, f"{kind}, {tokens} tokens")


@KINDS
def test_snapshot_and_restore(kind: str) -> None:
    """200 tokens, over a wrap of the ring and an HCA entry, then again from the snapshot: the same bits."""
    layer = make_layer(kind, Numerics())
    layer.forward(0, START)
    saved = layer.cache.snapshot()
    want = layer.run(START, [1] * 200)
    state = layer.cache.snapshot().tensors
    layer.cache.restore(saved)
    layer.run(START, [8, 100, 3, 9])  # something else in between
    layer.cache.restore(saved)
    assert_bits(layer.run(START, [1] * 200), want, kind)
    assert_state(layer, state, kind)
    layer.cache.reset()
    fresh = make_layer(kind, Numerics())
    assert_bits(layer.run(0, [20, 1, 1]), fresh.run(0, [20, 1, 1]), f"{kind}, a fresh sequence")


@pytest.mark.parametrize("pieces", [[1] * 320, [8] * 40, [9] * 30 + [50], [50, 8, 1, 100, 3, 138, 20]])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@KINDS
def test_grown_in_pieces(kind: str, dtype: str, pieces: list[int]) -> None:
    """Steps and chunks against one prefill, up to the roundings of other matrix kernels and near ties."""
    numerics = Numerics(dtype=dtype, numerics="exact" if dtype == "float32" else "trained")
    layer = make_layer(kind, numerics)
    want = layer.forward(0, 320).double()
    layer.cache.reset()
    found = layer.run(0, pieces).double()
    assert bool(found.isfinite().all()), f"{kind} {dtype}: NaN or infinity"
    error = (found - want).norm(dim=1) / want.norm(dim=1)
    mean, worst = float(error.mean()), int(error.argmax())
    limits = (1e-4, 1e-3) if dtype == "float32" else (1e-2, 1e-1)
    assert mean < limits[0] and float(error[worst]) < limits[1], (
        f"{kind} {dtype}: mean relative error {mean:.2e}, {float(error[worst]):.2e} at position {worst}"
    )
