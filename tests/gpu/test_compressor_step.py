"""compress_step against compress_kv, whose bits it has: any position of a window, steps of up to 8 tokens."""

import pytest
import torch
from compressor_cases import CSA, EPS, HCA, INDEX, ODD, Kind, Normal, fresh_tail, name, tail_at, weights
from numeric import assert_bits, assert_reproducible, dirty_memory, without_allocator
from torch import Tensor

from dsv4.ops.compressor import compress_kv, compress_step, reference
from dsv4.ops.formats import MAX_STEP

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])


def positions_from(start: int, tokens: int) -> Tensor:
    return torch.arange(start, start + tokens, device="cuda")


def compare(kind: Kind, tokens: int, start: int, dtype: torch.dtype, normal: Normal) -> None:
    case = f"{kind} {tokens=} {start=} {dtype}"
    kv, gate = normal(tokens, kind.channels), normal(tokens, kind.channels)
    (ape, norm, inv_freq), tail = weights(kind, normal), tail_at(kind, start, normal)
    options = {"overlap": kind.overlap, "eps": EPS, "dtype": dtype}
    ours, theirs = (tuple(t.clone() for t in tail) for _ in range(2))
    dirty_memory()
    entries, slots = compress_step(
        kv, gate, ape, *ours, norm, inv_freq, positions_from(start, tokens), **options
    )
    want = compress_kv(kv, gate, ape, *theirs, norm, inv_freq, start=start, **options)
    new, most = want.shape[0], -(-tokens // kind.ratio)
    first = start // kind.ratio
    indices = [first + i if i < new else -1 for i in range(most)]
    assert entries.shape == (most, kind.width) and slots.tolist() == indices, f"{case}: {slots.tolist()}"
    assert_bits(entries[:new].contiguous(), want, case)
    assert_bits(ours[0], theirs[0], f"{case}: values in the tail")
    assert_bits(ours[1], theirs[1], f"{case}: gates in the tail")


@DTYPES
@pytest.mark.parametrize("tokens", range(MAX_STEP + 1))
@pytest.mark.parametrize("kind", [CSA, INDEX, HCA, *ODD], ids=name)
def test_step_has_the_bits_of_a_chunk(
    kind: Kind, tokens: int, dtype: torch.dtype, cuda_normal: Normal
) -> None:
    ratio = kind.ratio
    edges = (0, 1, ratio - 2, ratio - 1, ratio, 2 * ratio - 1, 1000 * ratio + ratio // 2)
    for start in kind.starts if kind in (CSA, INDEX, HCA) else edges:
        compare(kind, tokens, start, dtype, cuda_normal)


@pytest.mark.parametrize("kind", [CSA, INDEX, HCA], ids=name)
def test_a_graph_of_one_token_serves_a_sequence(kind: Kind, cuda_normal: Normal) -> None:
    """Captured once at position 0 and replayed over two windows, against one chunk of the whole."""
    if without_allocator():
        pytest.skip("a graph needs the allocator")
    tokens = 2 * kind.ratio + 1
    kv, gate = cuda_normal(tokens, kind.channels), cuda_normal(tokens, kind.channels)
    ape, norm, inv_freq = weights(kind, cuda_normal)
    options = {"overlap": kind.overlap, "eps": EPS, "dtype": torch.bfloat16}
    tail, whole = fresh_tail(kind), fresh_tail(kind)
    want = compress_kv(kv, gate, ape, *whole, norm, inv_freq, start=0, **options)
    one_kv, one_gate, position = kv[:1].clone(), gate[:1].clone(), positions_from(0, 1)
    inputs = (one_kv, one_gate, ape, *tail, norm, inv_freq, position)
    compress_step(*inputs, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        entries, slots = compress_step(*inputs, **options)
    for tensor, fresh in zip(tail, fresh_tail(kind), strict=True):
        tensor.copy_(fresh)
    for t in range(tokens):
        one_kv.copy_(kv[t : t + 1]), one_gate.copy_(gate[t : t + 1]), position.fill_(t)
        graph.replay()
        emits = (t + 1) % kind.ratio == 0
        index = t // kind.ratio
        assert slots.tolist() == [index if emits else -1], f"{kind} {t=}"
        if emits:
            assert_bits(entries, want[index : index + 1], f"{kind} {t=}")
    live = kind.before + tokens % kind.ratio
    for found, expected in zip(tail, whole, strict=True):
        assert_bits(found[:live], expected[:live], f"{kind}: tail")


@pytest.mark.parametrize("kind", [CSA, INDEX, HCA], ids=name)
def test_the_same_call_gives_the_same_bits(kind: Kind, cuda_normal: Normal) -> None:
    ape, norm, inv_freq = weights(kind, cuda_normal)
    for tokens, start in ((1, 4 * kind.ratio - 1), (8, 4 * kind.ratio - 3)):
        kv, gate = cuda_normal(tokens, kind.channels), cuda_normal(tokens, kind.channels)
        tail, positions = tail_at(kind, start, cuda_normal), positions_from(start, tokens)
        options = {"overlap": kind.overlap, "eps": EPS, "dtype": torch.bfloat16}
        new = (start + tokens) // kind.ratio - start // kind.ratio

        def call(
            kv: Tensor = kv,
            gate: Tensor = gate,
            tail: tuple[Tensor, Tensor] = tail,
            positions: Tensor = positions,
            options: dict = options,
            new: int = new,
        ) -> tuple[Tensor, ...]:
            copy = tuple(t.clone() for t in tail)
            entries, slots = compress_step(kv, gate, ape, *copy, norm, inv_freq, positions, **options)
            return entries[:new], slots, *copy

        assert_reproducible(call, f"{kind} {tokens=} {start=}")


def test_step_against_the_reference(cuda_normal: Normal) -> None:
    """Same indices, and zeros where the reference has entries that no token completes."""
    kind, options = CSA, {"overlap": True, "eps": EPS, "dtype": torch.float32}
    ape, norm, inv_freq = weights(kind, cuda_normal)
    for start in range(8, 12):
        kv, gate = cuda_normal(5, kind.channels), cuda_normal(5, kind.channels)
        tail, positions = tail_at(kind, start, cuda_normal), positions_from(start, 5)
        copies = [tuple(t.clone() for t in tail) for _ in range(2)]
        found, want = (
            room(kv, gate, ape, *copy, norm, inv_freq, positions, **options)
            for room, copy in zip((compress_step, reference.compress_step), copies, strict=True)
        )
        assert_bits(found[1], want[1], f"{start=}")
        new = int((want[1] >= 0).sum())
        assert (found[0][:new] - want[0][:new]).abs().max() < 1e-4 and not want[0][new:].any()


def test_what_it_cannot_take(cuda_normal: Normal) -> None:
    kind = Kind(4, 8, True, 4)
    ape, norm, inv_freq = weights(kind, cuda_normal)
    options = {"overlap": True, "eps": EPS, "dtype": torch.float32}
    for tokens, positions, words in (
        (9, positions_from(0, 9), "at most 8 tokens, found 9"),
        (2, positions_from(0, 3), "positions: expected shape"),
        (2, positions_from(0, 2).int(), "positions: expected torch.int64"),
    ):
        kv, gate = cuda_normal(tokens, kind.channels), cuda_normal(tokens, kind.channels)
        with pytest.raises(AssertionError, match=words):
            compress_step(kv, gate, ape, *fresh_tail(kind), norm, inv_freq, positions, **options)
