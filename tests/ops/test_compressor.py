"""The compressor room window by window and channel by channel, fed in any pieces."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv4.ops.compressor import compress_kv, compress_step, pool_windows

KINDS = [(4, True), (4, False), (8, False)]  # ratio, overlap: CSA, and HCA at small ratios


def fresh_tail(ratio: int, channels: int, overlap: bool) -> tuple[Tensor, Tensor]:
    shape = (2 * ratio if overlap else ratio, channels)
    return torch.zeros(shape), torch.full(shape, -torch.inf)


def pooled(slots: list[tuple[float, float]]) -> float:
    """Softmax of the gates times the values: slots of (gate, value)."""
    top = max(gate for gate, _ in slots)
    powers = [math.exp(gate - top) for gate, _ in slots]
    return sum(power * value for power, (_, value) in zip(powers, slots, strict=True)) / sum(powers)


def expected_entries(kv: Tensor, gate: Tensor, ape: Tensor, overlap: bool) -> np.ndarray:
    """The entries of a whole sequence, from the definition."""
    ratio, channels = ape.shape
    width = channels // 2 if overlap else channels
    values = kv.double().tolist()
    gates = [
        [g + a for g, a in zip(gate[i].tolist(), ape[i % ratio].tolist(), strict=True)]
        for i in range(len(values))
    ]
    entries = np.zeros((len(values) // ratio, width))
    for j in range(len(entries)):
        for d in range(width):
            own = width + d if overlap else d
            slots = [(gates[i][own], values[i][own]) for i in range(ratio * j, ratio * (j + 1))]
            if overlap and j > 0:
                slots += [(gates[i][d], values[i][d]) for i in range(ratio * (j - 1), ratio * j)]
            entries[j, d] = pooled(slots)
    return entries


def live_rows(tail: Tensor, ratio: int, overlap: bool, tokens: int) -> Tensor:
    """The rows that later tokens depend on: the previous window (CSA) and the pending tokens."""
    first = ratio if overlap else 0
    return torch.cat((tail[:first], tail[first : first + tokens % ratio]))


def feed(
    pieces: list[int], kv: Tensor, gate: Tensor, ape: Tensor, overlap: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """A sequence in pieces: its entries, and the live tail after it."""
    ratio, start, entries = ape.shape[0], 0, []
    tail_kv, tail_gate = fresh_tail(ratio, ape.shape[1], overlap)
    for size in pieces:
        part = slice(start, start + size)
        new = pool_windows(kv[part], gate[part], ape, tail_kv, tail_gate, start=start, overlap=overlap)
        assert new.shape[0] == (start + size) // ratio - start // ratio
        entries.append(new)
        start += size
    live = [live_rows(tail, ratio, overlap, start) for tail in (tail_kv, tail_gate)]
    return torch.cat(entries), live[0], live[1]


@pytest.mark.parametrize(("ratio", "overlap"), KINDS)
@pytest.mark.parametrize("tokens", [0, 1, 3, 4, 7, 8, 9, 33])
@pytest.mark.parametrize("spread", [1.0, 300.0])
def test_entries(
    ratio: int, overlap: bool, tokens: int, spread: float, normal: Callable[..., Tensor]
) -> None:
    """A spread of 300 lets one slot win outright and would overflow a softmax without its maximum."""
    channels = 6
    kv, gate, ape = normal(tokens, channels), spread * normal(tokens, channels), normal(ratio, channels)
    entries, _, _ = feed([tokens], kv, gate, ape, overlap)
    assert entries.dtype == torch.float32
    assert entries.shape == (tokens // ratio, channels // 2 if overlap else channels)
    np.testing.assert_allclose(
        entries.numpy(), expected_entries(kv, gate, ape, overlap), rtol=1e-5, atol=1e-6 + 1e-7 * spread
    )


def test_the_ratio_of_hca(normal: Callable[..., Tensor]) -> None:
    kv, gate, ape = normal(300, 3), normal(300, 3), normal(128, 3)
    entries, tail_kv, _ = feed([300], kv, gate, ape, False)
    np.testing.assert_allclose(entries.numpy(), expected_entries(kv, gate, ape, False), rtol=1e-5, atol=1e-6)
    assert torch.equal(tail_kv, kv[256:])


@pytest.mark.parametrize(("ratio", "overlap"), KINDS)
def test_any_split_gives_the_same(
    ratio: int, overlap: bool, rng: np.random.Generator, normal: Callable[..., Tensor]
) -> None:
    tokens, channels = 41, 10
    kv, gate, ape = normal(tokens, channels), normal(tokens, channels), normal(ratio, channels)
    want = feed([tokens], kv, gate, ape, overlap)
    splits = [[1] * tokens, [ratio] * 5 + [tokens - 5 * ratio], [0, 1, 0, tokens - 1, 0]]
    for _ in range(20):
        cuts = sorted(rng.integers(0, tokens + 1, 6).tolist())
        splits.append(np.diff([0, *cuts, tokens]).tolist())
    for pieces in splits:
        entries, tail_kv, tail_gate = feed(pieces, kv, gate, ape, overlap)
        torch.testing.assert_close(entries, want[0], rtol=1e-6, atol=1e-6)
        assert torch.equal(tail_kv, want[1]) and torch.equal(tail_gate, want[2]), pieces


@pytest.mark.parametrize(("ratio", "overlap"), KINDS)
def test_tail_after_every_length(ratio: int, overlap: bool, normal: Callable[..., Tensor]) -> None:
    """Pending tokens with their biased gates; with overlap the last full window before them."""
    kv, gate, ape = normal(20, 4), normal(20, 4), normal(ratio, 4)
    biased = torch.stack([gate[i] + ape[i % ratio] for i in range(20)])
    for tokens in range(20):
        _, tail_kv, tail_gate = feed([tokens], kv[:tokens], gate[:tokens], ape, overlap)
        full = tokens - tokens % ratio
        kept = slice(max(full - ratio, 0) if overlap else full, tokens)
        if overlap and full == 0:
            assert torch.equal(tail_gate[:ratio], torch.full((ratio, 4), -torch.inf))
            tail_kv, tail_gate = tail_kv[ratio:], tail_gate[ratio:]
        assert torch.equal(tail_kv, kv[kept]) and torch.equal(tail_gate, biased[kept]), tokens


def test_first_window_ignores_the_previous_rows(normal: Callable[..., Tensor]) -> None:
    """Gates of -inf shut them out, whatever values a former sequence left there."""
    kv, gate, ape = normal(4, 6), normal(4, 6), normal(4, 6)
    tail_kv, tail_gate = fresh_tail(4, 6, True)
    tail_kv[:4] = 1e30
    entry = pool_windows(kv, gate, ape, tail_kv, tail_gate, start=0, overlap=True)
    np.testing.assert_allclose(entry.numpy(), expected_entries(kv, gate, ape, True), rtol=1e-5, atol=1e-6)


def test_position_bias_enters_the_gate_alone(normal: Callable[..., Tensor]) -> None:
    """Values of one give entries of one, however strong the bias, which picks slot 2 of a ramp."""
    ones, zeros = torch.ones(8, 2), torch.zeros(8, 2)
    ape = 50 * torch.eye(4)[2][:, None].expand(4, 2)
    entries, _, _ = feed([8], ones, zeros, ape, False)
    np.testing.assert_allclose(entries.numpy(), np.ones((2, 2)), rtol=1e-6)
    ramp = torch.arange(8.0)[:, None].expand(8, 2)
    entries, _, _ = feed([3, 5], ramp, zeros, ape, False)
    np.testing.assert_allclose(entries.numpy(), [[2, 2], [6, 6]], rtol=1e-6)


def test_csa_takes_series_a_from_the_window_before() -> None:
    """Channel 0 holds series A, channel 1 series B; equal gates average what is there."""
    series = torch.stack((torch.arange(12.0), 100 + torch.arange(12.0)), dim=1)
    entries, _, _ = feed([5, 7], series, torch.zeros(12, 2), torch.zeros(4, 2), True)
    want = [[101.5], [(1.5 + 105.5) / 2], [(5.5 + 109.5) / 2]]
    np.testing.assert_allclose(entries.numpy(), want, rtol=1e-6)


@pytest.mark.parametrize(("ratio", "overlap"), KINDS)
def test_compressed_entries(
    ratio: int, overlap: bool, rng: np.random.Generator, normal: Callable[..., Tensor]
) -> None:
    """Pooled windows, normalised, their last pairs rotated by the first position; from any pieces."""
    tokens, width, pairs, eps = 5 * ratio + 2, 8, 3, 1e-6
    channels = 2 * width if overlap else width
    kv, gate, ape = normal(tokens, channels), normal(tokens, channels), normal(ratio, channels)
    norm, inv_freq = 1 + 0.3 * normal(width), torch.tensor([1.0, 0.3, 0.01])
    want = expected_entries(kv, gate, ape, overlap)
    want = want / np.sqrt((want**2).mean(axis=1, keepdims=True) + eps) * norm.double().numpy()
    first = width - 2 * pairs
    turned = want[:, first::2] + 1j * want[:, first + 1 :: 2]
    turned *= np.exp(1j * ratio * np.arange(len(want))[:, None] * inv_freq.double().numpy())
    want[:, first::2], want[:, first + 1 :: 2] = turned.real, turned.imag
    for pieces in (
        [tokens],
        [1] * tokens,
        np.diff([0, *sorted(rng.integers(0, tokens, 4)), tokens]).tolist(),
    ):
        tail_kv, tail_gate = fresh_tail(ratio, channels, overlap)
        start, entries = 0, []
        for size in pieces:
            part = slice(start, start + size)
            inputs = (kv[part], gate[part], ape, tail_kv, tail_gate, norm, inv_freq)
            entries.append(compress_kv(*inputs, start=start, overlap=overlap, eps=eps, dtype=torch.float32))
            start += size
        np.testing.assert_allclose(torch.cat(entries).numpy(), want, rtol=1e-4, atol=1e-5)


def test_compressed_entries_are_rounded_three_times(normal: Callable[..., Tensor]) -> None:
    """To bf16 before the norm, after it, and after the rotation."""
    kv, gate, ape, norm = normal(4, 16), normal(4, 16), normal(4, 16), normal(8)
    pooled = pool_windows(kv, gate, ape, *fresh_tail(4, 16, True), start=0, overlap=True).bfloat16().float()
    want = (pooled / (pooled.square().mean() + 1e-6).sqrt() * norm).bfloat16().float()
    a, b, angle = want[:, 6], want[:, 7], torch.tensor(4 * 0.7)
    want[:, 6:] = torch.stack((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), dim=-1)
    tail_kv, tail_gate = fresh_tail(4, 16, True)
    inputs = (kv, gate, ape, tail_kv, tail_gate, norm, torch.tensor([0.7]))
    entry = compress_kv(*inputs, start=4, overlap=True, eps=1e-6, dtype=torch.bfloat16)
    assert torch.equal(entry, want.bfloat16())


@pytest.mark.parametrize(("ratio", "overlap"), KINDS)
@pytest.mark.parametrize("tokens", [0, 1, 3, 8])
def test_step_is_the_chunk(ratio: int, overlap: bool, tokens: int, normal: Callable[..., Tensor]) -> None:
    """Every position of a window: the completed entries and their indices, -1 for the others."""
    channels = 16 if overlap else 8
    for start in range(2 * ratio, 3 * ratio):
        kv, gate, ape, norm = (normal(n, channels) for n in (tokens, tokens, ratio, 1))
        tails = [[normal(2 * ratio if overlap else ratio, channels) for _ in range(2)]]
        tails.append([tail.clone() for tail in tails[0]])
        rest, options = (norm[0, :8], torch.tensor([1.0, 0.3])), {"overlap": overlap, "eps": 1e-6}
        want = compress_kv(kv, gate, ape, *tails[0], *rest, start=start, dtype=torch.bfloat16, **options)
        positions = torch.arange(start, start + tokens)
        found, slots = compress_step(
            kv, gate, ape, *tails[1], *rest, positions, dtype=torch.bfloat16, **options
        )
        new, most = len(want), -(-tokens // ratio)
        assert found.shape == (most, 8) and torch.equal(found[:new], want)
        assert slots.tolist() == [start // ratio + i for i in range(new)] + [-1] * (most - new)
        assert all(map(torch.equal, *tails))
