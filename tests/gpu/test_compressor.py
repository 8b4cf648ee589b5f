"""The compressor's kernel against its reference: every length and cut, CSA, its index keys, and HCA."""

import pytest
import torch
from compressor_cases import CSA, CUTS, EPS, HCA, INDEX, ODD, Kind, Normal, fresh_tail, name, tail_at, weights
from numeric import assert_bits, assert_layout, assert_reproducible, assert_rounded, dirty_memory
from torch import Tensor

from dsv4.ops.compressor import compress_kv, reference

LENGTHS = (1, 3, 4, 5, 7, 8, 9, 127, 128, 129, 137, 300, 4001)
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])


def assert_entries(actual: Tensor, want: Tensor, case: str) -> None:
    """In bf16 a rounding may fall otherwise here and there, and a rotation spreads it over a pair."""
    if want.dtype == torch.float32:
        assert_rounded(actual, want, case)
        return
    assert_layout(actual, want, case)
    if not want.numel():
        return
    a, b = actual.float(), want.float()
    assert bool(a.isfinite().all()), f"{case}: NaN or infinity"
    size = b.unflatten(-1, (-1, 2)).norm(dim=-1, keepdim=True).expand(-1, -1, 2).flatten(-2)
    worst = ((a - b).abs() - 1.5e-2 * size).max().item()
    assert worst <= 1e-2, f"{case}: a difference of {worst:.3e} above 1.5 % of the pair"
    flips = (actual != want).float().mean().item()
    assert want.numel() < 10_000 or flips < 5e-3, f"{case}: {flips:.2%} of all values differ"


def compare(
    kind: Kind, tokens: int, start: int, dtype: torch.dtype, normal: Normal, spread: float = 1.0
) -> None:
    case = f"{kind} {tokens=} {start=} {dtype} {spread=}"
    kv, gate = normal(tokens, kind.channels), spread * normal(tokens, kind.channels)
    (ape, norm, inv_freq), tail = weights(kind, normal), tail_at(kind, start, normal)
    options = {"start": start, "overlap": kind.overlap, "eps": EPS, "dtype": dtype}
    ours, theirs = (tuple(t.clone() for t in tail) for _ in range(2))
    dirty_memory()
    entries = compress_kv(kv, gate, ape, *ours, norm, inv_freq, **options)
    want = reference.compress_kv(kv, gate, ape, *theirs, norm, inv_freq, **options)
    assert_entries(entries, want, case)
    assert_bits(ours[0], theirs[0], f"{case}: values in the tail")
    assert_bits(ours[1], theirs[1], f"{case}: gates in the tail")


@DTYPES
@pytest.mark.parametrize("tokens", (0, *LENGTHS))
@pytest.mark.parametrize("kind", [CSA, INDEX, HCA], ids=name)
def test_compress_kv(kind: Kind, tokens: int, dtype: torch.dtype, cuda_normal: Normal) -> None:
    for start in kind.starts:
        compare(kind, tokens, start, dtype, cuda_normal)


@pytest.mark.parametrize("kind", ODD, ids=name)
def test_odd_sizes(kind: Kind, cuda_normal: Normal) -> None:
    ratio = kind.ratio
    for start in (0, 1, ratio - 1, ratio, 2 * ratio + 1, 1000 * ratio + ratio // 2):
        for tokens in sorted({1, 2, ratio - 1, ratio, ratio + 1, 2 * ratio, 3 * ratio + 2, 7 * ratio + 1}):
            for dtype in (torch.bfloat16, torch.float32):
                compare(kind, tokens, start, dtype, cuda_normal)


@pytest.mark.parametrize("kind", [CSA, INDEX, HCA], ids=name)
def test_one_slot_may_win(kind: Kind, cuda_normal: Normal) -> None:
    for spread in (30.0, 300.0):
        compare(kind, 300, 5, torch.float32, cuda_normal, spread)


def feed(
    kind: Kind, pieces: list[int], inputs: tuple[Tensor, ...], dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, ...]:
    """A fresh sequence in pieces: all entries, and what is live of the tail."""
    kv, gate, ape, norm, inv_freq = inputs
    tail, start, entries = fresh_tail(kind), 0, []
    options = {"overlap": kind.overlap, "eps": EPS, "dtype": dtype}
    for size in pieces:
        part = slice(start, start + size)
        new = compress_kv(kv[part], gate[part], ape, *tail, norm, inv_freq, start=start, **options)
        entries.append(new)
        start += size
    live = kind.before + start % kind.ratio
    return torch.cat(entries), tail[0][:live], tail[1][:live]


def sequence(kind: Kind, tokens: int, normal: Normal) -> tuple[Tensor, ...]:
    ape, norm, inv_freq = weights(kind, normal)
    return normal(tokens, kind.channels), normal(tokens, kind.channels), ape, norm, inv_freq


@pytest.mark.large
@DTYPES
@pytest.mark.parametrize("kind", CUTS, ids=name)
def test_any_cut_gives_the_same_bits(kind: Kind, dtype: torch.dtype, cuda_normal: Normal) -> None:
    tokens = min(12 * kind.ratio + kind.ratio // 2, 700)
    inputs, generator = sequence(kind, tokens, cuda_normal), torch.Generator().manual_seed(tokens)
    whole = feed(kind, [tokens], inputs, dtype)
    splits = [[1] * tokens, [kind.ratio] * (tokens // kind.ratio) + [tokens % kind.ratio]]
    for _ in range(20):
        cuts = torch.randint(tokens + 1, (6,), generator=generator).sort().values
        splits.append(torch.diff(cuts, prepend=torch.tensor([0]), append=torch.tensor([tokens])).tolist())
    for pieces in splits:
        parts = ("entries", "values", "gates")
        for part, a, b in zip(parts, feed(kind, pieces, inputs, dtype), whole, strict=True):
            assert_bits(a.contiguous(), b, f"{kind} {part}, pieces {pieces}")


@pytest.mark.parametrize("kind", CUTS, ids=name)
def test_the_same_call_gives_the_same_bits(kind: Kind, cuda_normal: Normal) -> None:
    """Twice, and in a graph: prefill, one token that completes a window, one that does not."""
    ape, norm, inv_freq = weights(kind, cuda_normal)
    for tokens, start in ((300, 3), (1, 4 * kind.ratio - 1), (1, 4 * kind.ratio)):
        kv, gate = cuda_normal(tokens, kind.channels), cuda_normal(tokens, kind.channels)
        tail = tail_at(kind, start, cuda_normal)
        options = {"start": start, "overlap": kind.overlap, "eps": EPS, "dtype": torch.bfloat16}

        def call(
            kv: Tensor = kv, gate: Tensor = gate, tail: tuple[Tensor, Tensor] = tail, options: dict = options
        ) -> tuple[Tensor, ...]:
            new = tuple(t.clone() for t in tail)
            return compress_kv(kv, gate, ape, *new, norm, inv_freq, **options), *new

        assert_reproducible(call, f"{kind} {tokens=} {start=}")


@pytest.mark.parametrize("kind", [CSA, INDEX, Kind(3, 24, True, 24)], ids=name)
@pytest.mark.parametrize("value", [1e30, torch.inf, torch.nan])
def test_the_first_window_has_none_before_it(kind: Kind, value: float, cuda_normal: Normal) -> None:
    """Gates of -inf shut out what a former sequence left in the tail, be it no number."""
    kv, gate, ape, norm, inv_freq = sequence(kind, 2 * kind.ratio, cuda_normal)
    options = {"start": 0, "overlap": True, "eps": EPS, "dtype": torch.float32}
    clean, dirty = fresh_tail(kind), fresh_tail(kind)
    dirty[0].fill_(value)
    want = compress_kv(kv, gate, ape, *clean, norm, inv_freq, **options)
    assert_bits(compress_kv(kv, gate, ape, *dirty, norm, inv_freq, **options), want, f"{kind} {value}")
    assert bool(want.isfinite().all())


def test_what_it_cannot_take(cuda_normal: Normal) -> None:
    kind = Kind(4, 8, True, 4)
    kv, gate, ape, norm, inv_freq = sequence(kind, 6, cuda_normal)
    options = {"start": 0, "overlap": True, "eps": EPS, "dtype": torch.float32}
    good = {"kv": kv, "gate": gate, "ape": ape, "norm": norm, "inv_freq": inv_freq}
    good |= dict(zip(("tail_kv", "tail_gate"), fresh_tail(kind), strict=True))
    for change, words in (
        ({"kv": kv.repeat(1, 2)[:, ::2]}, "kv: expected a contiguous"),
        ({"gate": gate[:5]}, "gate: expected shape"),
        ({"tail_kv": good["tail_kv"][:4]}, "tail_kv: expected shape"),
        ({"ape": ape.bfloat16()}, "ape: expected torch.float32"),
        ({"inv_freq": cuda_normal(5)}, "multiple of 8 channels"),
        ({"dtype": torch.half}, "dtype: expected"),
    ):
        with pytest.raises(AssertionError, match=words):
            compress_kv(**{**good, **options, **change})
