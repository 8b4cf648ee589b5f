"""A sequence's state: rings and tables in any pieces, snapshots, fresh starts, and its size in bytes."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from checkpoints import random_model, tiny_config_dict
from torch import Tensor

from dsv4.cache import CompressorState, RowFormat, SequenceCache, WindowRing
from dsv4.config import ModelConfig
from dsv4.layers.block import Block
from dsv4.layers.weights import Weights
from dsv4.loading.mapping import Slot, layer_slots, trunk_slots
from dsv4.model import Transformer
from dsv4.numerics import Numerics
from dsv4.ops.formats import MAX_STEP, Plain
from dsv4.plan import cache_bytes

CPU = torch.device("cpu")


F32 = RowFormat(torch.float32, records=False)


def ring_of(window: int, width: int) -> WindowRing:
    return WindowRing(window, F32.table(window + MAX_STEP - 1, width, CPU))


@pytest.mark.parametrize("pieces", [[30], [1] * 30, [7, 1, 8, 9, 5], [0, 3, 27, 0], [8, 8, 8, 6], [29, 1]])
@pytest.mark.parametrize("steps", [False, True])
def test_ring_in_any_pieces(pieces: list[int], steps: bool, normal: Callable[..., Tensor]) -> None:
    """Each chunk gets itself and up to 3 rows before it; position p ends in slot p mod 11, of a step too."""
    kv, ring, start = normal(30, 8), ring_of(4, 8), 0
    for size in pieces:
        piece = kv[start : start + size]
        if steps and size <= MAX_STEP:
            ring.store(piece, torch.arange(start, start + size))
        else:
            assert torch.equal(ring.extend(piece, start), kv[max(0, start - 3) : start + size])
        start += size
        for position in range(max(0, start - 11), start):
            assert torch.equal(ring.rows[position % 11], kv[position])


def test_a_step_leaves_the_window_before_it(normal: Callable[..., Tensor]) -> None:
    """Whatever of 8 tokens is rejected afterwards, the next token finds its window: no copy is needed."""
    kv, ring = normal(40, 8), ring_of(4, 8)
    ring.extend(kv[:32], 0)
    ring.store(kv[32:], torch.arange(32, 40))
    for position in range(29, 40):
        assert torch.equal(ring.rows[position % 11], kv[position])


def test_ring_contexts_outlive_later_writes(normal: Callable[..., Tensor]) -> None:
    kv, ring = normal(40, 8), ring_of(4, 8)
    context = ring.extend(kv[:20], 0)
    ring.extend(kv[20:], 20)
    assert torch.equal(context, kv[:20])


def test_rows_keep_gradients_of_new_entries_only(normal: Callable[..., Tensor]) -> None:
    """The table itself holds plain numbers; what is returned leads back to the entries just added."""
    state, old, new = CompressorState(8, 2, 40, F32, CPU), normal(2, 2), normal(3, 2)
    assert torch.equal(state.extend(old.requires_grad_(), 16), old)
    rows = state.extend(new.requires_grad_(), 41)
    assert torch.equal(rows, torch.cat((old, new)))
    assert not state.rows.requires_grad
    (rows * torch.arange(10.0).view(5, 2)).sum().backward()
    assert torch.equal(new.grad, torch.arange(4.0, 10.0).view(3, 2)) and old.grad is None


def test_rows_without_gradients_grow_in_place(normal: Callable[..., Tensor]) -> None:
    form = RowFormat(torch.bfloat16, records=False)
    state, entries = CompressorState(8, 2, 32, form, CPU), normal(4, 2).bfloat16()
    for count in range(1, 5):
        rows = state.extend(entries[count - 1 : count], 8 * count)
        assert torch.equal(rows, entries[:count]) and rows.data_ptr() == state.rows.data_ptr()
    assert torch.equal(state.extend(entries[:0], 39), entries)
    with pytest.raises(AssertionError, match="5 rows in a table of 4"):
        state.extend(entries[:1], 40)


def test_more_tokens_than_the_cache_holds(model: Transformer, rng: np.random.Generator) -> None:
    """A step does not look at its position, so the model does, before it writes."""
    cache, ids = model.new_cache(20), rng.integers(0, 128, 21)
    run(model, cache, ids[:20], [20])
    with pytest.raises(AssertionError, match="21 tokens in a cache of 20"):
        run(model, cache, ids[20:], [1])


def tiny_model(numerics: str) -> Transformer:
    """Random weights; a window-only, two CSA and an HCA layer, window 8, 4 chosen entries."""
    raw = tiny_config_dict(num_hidden_layers=4, compress_ratios=[0, 4, 8, 4], sliding_window=8, index_topk=4)
    config, choices = ModelConfig.from_dict(raw), Numerics(numerics=numerics, dtype="float32")
    values = random_model(config, seed=5)

    def weights(slots: list[Slot]) -> Weights:
        linear = {slot.name for slot in slots if slot.kind == "linear"}
        return Weights({s.name: Plain(values[s.name]) if s.name in linear else values[s.name] for s in slots})

    blocks = []
    for layer in range(config.num_layers):
        scope = weights(layer_slots(config, layer)).scope(f"layers.{layer}")
        facts = {"ratio": config.ratio(layer), "hashed": config.is_hash_layer(layer)}
        blocks.append(Block(config, choices, weights=scope, **facts))
    return Transformer(config, choices, weights(trunk_slots(config)), blocks)


@pytest.fixture(scope="module", params=["trained", "exact"])
def model(request: pytest.FixtureRequest) -> Transformer:
    return tiny_model(request.param)


def run(model: Transformer, cache: SequenceCache, ids: np.ndarray, pieces: list[int]) -> Tensor:
    """The logits of ids [T] fed in pieces, [T, V]."""
    with torch.inference_mode():
        parts = torch.from_numpy(ids).split(pieces)
        return torch.cat([model.logits(model.forward(part, cache)) for part in parts])


def state_of(cache: SequenceCache) -> list[Tensor]:
    """A copy of every number in the cache that later tokens can read."""
    return [tensor.clone() for tensor in cache.snapshot().tensors]


@pytest.mark.parametrize("before", [0, 3, 8, 23, 41])
def test_restore_continues_bit_for_bit(before: int, model: Transformer, rng: np.random.Generator) -> None:
    """Whatever was fed after the snapshot: entries emitted, windows moved, the whole ring overwritten."""
    cache, ids, pieces = model.new_cache(90), rng.integers(0, 128, 80), [5, 1, 1, 9]
    if before:
        run(model, cache, ids[:before], [before])
    snapshot = cache.snapshot()
    kept = [tensor.clone() for tensor in snapshot.tensors]
    want = run(model, cache, ids[before : before + 16], pieces)
    state = state_of(cache)
    for other in (rng.integers(0, 128, 40), rng.integers(0, 128, 2)):
        cache.restore(snapshot)
        assert cache.position == before
        run(model, cache, other, [len(other)])
        cache.restore(snapshot)
        assert torch.equal(run(model, cache, ids[before : before + 16], pieces), want)
        assert all(map(torch.equal, state_of(cache), state))
    assert all(map(torch.equal, snapshot.tensors, kept))


def test_restore_after_a_reset(model: Transformer, rng: np.random.Generator) -> None:
    cache, ids = model.new_cache(60), rng.integers(0, 128, 60)
    run(model, cache, ids[:21], [21])
    snapshot = cache.snapshot()
    want = run(model, cache, ids[21:30], [1] * 9)
    cache.reset()
    run(model, cache, ids[30:40], [10])
    cache.restore(snapshot)
    assert torch.equal(run(model, cache, ids[21:30], [1] * 9), want)


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 9, 30])
def test_reset_leaves_no_trace(tokens: int, model: Transformer, rng: np.random.Generator) -> None:
    """Also of a sequence that left pending tokens, before one too short to complete a window."""
    ids, used = rng.integers(0, 128, 31 + tokens), model.new_cache(40)
    run(model, used, ids[:31], [31])
    used.reset()
    fresh = model.new_cache(40)
    pieces = [1] * min(tokens, 3) + [tokens - 3] * (tokens > 3)
    assert torch.equal(run(model, used, ids[31:], pieces), run(model, fresh, ids[31:], pieces))
    assert used.position == fresh.position == tokens


def test_pieces_leave_the_state_of_one_go(rng: np.random.Generator) -> None:
    """Rings, entries and index keys, up to the sums of matrix products of other shapes."""
    model, ids = tiny_model("exact"), rng.integers(0, 128, 37)
    whole = model.new_cache(40)
    want = run(model, whole, ids, [37])
    for pieces in ([1] * 37, [3, 4, 5, 25], [36, 1]):
        cache = model.new_cache(40)
        torch.testing.assert_close(run(model, cache, ids, pieces), want, rtol=0, atol=1e-4)
        for layer, other in zip(cache.layers, whole.layers, strict=True):
            torch.testing.assert_close(layer.window.rows, other.window.rows, rtol=0, atol=1e-4)
            for state, full in zip(layer.compressors, other.compressors, strict=True):
                torch.testing.assert_close(state.rows, full.rows, rtol=0, atol=1e-4)


def tensors_of(value: object) -> list[Tensor]:
    """Every tensor reachable through attributes and lists."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list):
        return [tensor for item in value for tensor in tensors_of(item)]
    return (
        [t for item in vars(value).values() for t in tensors_of(item)] if hasattr(value, "__dict__") else []
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nbytes_is_the_sum_of_all_buffers(dtype: torch.dtype) -> None:
    config = ModelConfig.from_dict(tiny_config_dict())
    form = RowFormat(dtype, records=False)
    cache = SequenceCache(config, config.compress_ratios, max_context=37, form=form)
    sizes = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors_of(cache)
    }
    assert cache.nbytes() == sum(sizes.values()) > 0


REAL_WIDTHS = {"head_dim": 512, "qk_rope_head_dim": 64, "index_head_dim": 128, "sliding_window": 128}
FLASH = [0, 0, *[4, 128] * 20, 4]
PRO = [128, 128, *[4, 128] * 29, 4]


RECORDS, BF16 = RowFormat(torch.bfloat16, records=True), RowFormat(torch.bfloat16, records=False)


@pytest.mark.parametrize(
    ("ratios", "form", "per_token"),
    [(FLASH, BF16, 6880), (PRO, BF16, 9848), (FLASH, RECORDS, 3557.5), (PRO, RECORDS, 5093.375)],
)
def test_bytes_of_the_released_models(ratios: list[int], form: RowFormat, per_token: float) -> None:
    """Bytes a token; fixed, per layer, a ring of 135 rows and tails of 80 or 512 KiB. 1M tokens of Flash take
    less than 4.2 GB."""
    raw = tiny_config_dict(num_hidden_layers=len(ratios), compress_ratios=ratios, **REAL_WIDTHS)
    config = ModelConfig.from_dict(raw)
    found = RowFormat.of(config, Numerics(dtype="bfloat16"), torch.device("cuda"))
    assert found == RECORDS
    row, tokens = (592 if form.records else 1024), 1 << 20
    fixed = {0: 0, 4: 80 * 1024, 128: 512 * 1024}
    state = sum(fixed[ratio] + 135 * row for ratio in ratios)
    assert cache_bytes(config, form, tokens) == state + per_token * tokens
    drafts = cache_bytes(config, form, tokens, mtp=True) - cache_bytes(config, form, tokens)
    assert drafts == 135 * row
    assert ratios != FLASH or not form.records or cache_bytes(config, form, tokens) < 4.2e9
