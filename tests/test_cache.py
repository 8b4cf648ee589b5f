"""A sequence's state: rings and tables in any pieces, snapshots, fresh starts, and its size in bytes."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from checkpoints import random_model, tiny_config_dict
from torch import Tensor

from dsv4.cache import Rows, SequenceCache, WindowRing
from dsv4.config import ModelConfig
from dsv4.layers.block import Block
from dsv4.layers.weights import Weights
from dsv4.loading.mapping import Slot, layer_slots, trunk_slots
from dsv4.model import Transformer
from dsv4.numerics import Numerics
from dsv4.ops.formats import Plain

CPU = torch.device("cpu")


@pytest.mark.parametrize("pieces", [[30], [1] * 30, [7, 1, 8, 9, 5], [0, 3, 27, 0], [8, 8, 8, 6], [29, 1]])
def test_ring_in_any_pieces(pieces: list[int], normal: Callable[..., Tensor]) -> None:
    """Each piece gets itself and up to 7 rows before it; position p ends in slot p mod 8."""
    kv, ring, start = normal(30, 3), WindowRing(8, 3, torch.float32, CPU), 0
    for size in pieces:
        context = ring.extend(kv[start : start + size], start)
        assert torch.equal(context, kv[max(0, start - 7) : start + size])
        start += size
        for position in range(max(0, start - 8), start):
            assert torch.equal(ring.rows[position % 8], kv[position])


def test_ring_contexts_outlive_later_writes(normal: Callable[..., Tensor]) -> None:
    kv, ring = normal(20, 3), WindowRing(4, 3, torch.float32, CPU)
    context = ring.extend(kv[:10], 0)
    ring.extend(kv[10:], 10)
    assert torch.equal(context, kv[:10])


def test_rows_keep_gradients_of_new_entries_only(normal: Callable[..., Tensor]) -> None:
    """The table itself holds plain numbers; what is returned leads back to the entries just added."""
    table, old, new = Rows(5, 2, torch.float32, CPU), normal(2, 2), normal(3, 2)
    assert torch.equal(table.append(old.requires_grad_()), old)
    rows = table.append(new.requires_grad_())
    assert torch.equal(rows, torch.cat((old, new))) and table.count == 5
    assert not table.rows.requires_grad
    (rows * torch.arange(10.0).view(5, 2)).sum().backward()
    assert torch.equal(new.grad, torch.arange(4.0, 10.0).view(3, 2)) and old.grad is None


def test_rows_without_gradients_grow_in_place(normal: Callable[..., Tensor]) -> None:
    table, entries = Rows(4, 2, torch.bfloat16, CPU), normal(4, 2).bfloat16()
    for count in range(1, 5):
        assert torch.equal(table.append(entries[count - 1 : count]), entries[:count])
    assert torch.equal(table.append(entries[:0]), entries)
    with pytest.raises(AssertionError, match="5 rows in a table of 4"):
        table.append(entries[:1])


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
    cache, ids, pieces = model.new_cache(80), rng.integers(0, 128, 80), [5, 1, 1, 9]
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
                assert state.entries.count == full.entries.count
                torch.testing.assert_close(state.entries.rows, full.entries.rows, rtol=0, atol=1e-4)


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
    cache = SequenceCache(config, config.compress_ratios, max_context=37, dtype=dtype)
    sizes = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors_of(cache)
    }
    assert cache.nbytes() == sum(sizes.values()) > 0


REAL_WIDTHS = {"head_dim": 512, "qk_rope_head_dim": 64, "index_head_dim": 128, "sliding_window": 128}
FLASH = [0, 0, *[4, 128] * 20, 4]
PRO = [128, 128, *[4, 128] * 29, 4]


@pytest.mark.parametrize(("ratios", "per_token"), [(FLASH, 6880), (PRO, 9848)])
def test_bytes_of_the_released_models(ratios: list[int], per_token: int) -> None:
    """In bf16: bytes a token; and fixed, per layer, 128 KiB of window and tails of 80 or 512 KiB."""
    raw = tiny_config_dict(num_hidden_layers=len(ratios), compress_ratios=ratios, **REAL_WIDTHS)
    config = ModelConfig.from_dict(raw)

    def nbytes(tokens: int) -> int:
        facts = {"max_context": tokens, "dtype": torch.bfloat16, "device": "meta"}
        return SequenceCache(config, config.compress_ratios, **facts).nbytes()

    fixed = {0: 128, 4: 128 + 80, 128: 128 + 512}
    assert nbytes(0) == sum(fixed[ratio] for ratio in ratios) * 1024
    assert nbytes(1 << 20) - nbytes(0) == per_token << 20
