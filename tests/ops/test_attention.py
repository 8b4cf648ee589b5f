"""The attention room query by query: every attended row listed, one softmax with a sink over all."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv4.ops.attention import attend, reference

HEADS, WIDTH = 3, 16


def expected_attention(
    q: Tensor,
    window_kv: Tensor,
    sink: Tensor,
    window: int,
    compressed: Tensor,
    chosen: Sequence[Sequence[int]],
) -> np.ndarray:
    """Window rows by position, then the chosen entries; weights are rounded to q's dtype, their sum not."""
    queries, rows, entries = (x.double().numpy() for x in (q, window_kv, compressed))
    before = len(rows) - len(queries)
    out = np.zeros(queries.shape)
    for t, heads in enumerate(queries):
        now = before + t
        keys = [rows[p] for p in range(max(0, now - window + 1), now + 1)] + [entries[j] for j in chosen[t]]
        for h, query in enumerate(heads):
            scores = [float(query @ key) / math.sqrt(len(query)) for key in keys]
            top = max(*scores, sink[h].item())
            powers = [math.exp(score - top) for score in scores]
            total = sum(powers) + math.exp(sink[h].item() - top)
            rounded = torch.tensor(powers).to(q.dtype).tolist()
            out[t, h] = sum(power * key for power, key in zip(rounded, keys, strict=True)) / total
    return out


def assert_near(o: Tensor, want: np.ndarray) -> None:
    assert o.shape == want.shape and o.dtype == torch.float32
    np.testing.assert_allclose(o.numpy(), want, rtol=2e-5, atol=2e-6)


@pytest.fixture(params=[1 << 24, 100, 1])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All queries at once, a few at a time, one by one."""
    monkeypatch.setattr(reference, "BLOCK_ELEMENTS", request.param)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("window", [1, 2, 8])
@pytest.mark.parametrize("before", [0, 1, 6, 7, 8, 12])
@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 21])
def test_window(window: int, before: int, tokens: int, normal: Callable[..., Tensor]) -> None:
    """The window counts the query itself; rows before the first query may be fewer or more than needed."""
    q, rows, sink = 2 * normal(tokens, HEADS, WIDTH), normal(before + tokens, WIDTH), normal(HEADS)
    want = expected_attention(q, rows, sink, window, rows[:0], [[]] * tokens)
    assert_near(attend(q, rows, sink, window=window), want)


def test_window_edge() -> None:
    """One query over eight rows, all alike but for their values: the mean is that of the last five."""
    rows = torch.zeros(8, 2)
    rows[:, 1] = torch.tensor([1e3, 1e3, 1e3, 1.0, 2.0, 3.0, 4.0, 5.0])
    o = attend(torch.zeros(1, 1, 2), rows, torch.tensor([-1e4]), window=5)
    assert o.tolist() == [[[0.0, 3.0]]]


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("before", [0, 5])
def test_visible_entries(before: int, rng: np.random.Generator, normal: Callable[..., Tensor]) -> None:
    """Each query sees its own number of leading entries, none and all of them included."""
    tokens, entries = 11, 9
    q, rows = 2 * normal(tokens, HEADS, WIDTH), normal(before + tokens, WIDTH)
    compressed, sink = normal(entries, WIDTH), normal(HEADS)
    visible = rng.integers(0, entries + 1, tokens)
    visible[:2] = 0, entries
    o = attend(q, rows, sink, window=4, compressed=compressed, visible=torch.from_numpy(visible))
    assert_near(o, expected_attention(q, rows, sink, 4, compressed, [range(v) for v in visible]))


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("slots", [1, 4, 9])
def test_selected_entries(slots: int, rng: np.random.Generator, normal: Callable[..., Tensor]) -> None:
    """-1 anywhere in a row means no entry; a selection stands above the visible counts given with it."""
    tokens, entries = 13, 9
    q, rows = 2 * normal(tokens, HEADS, WIDTH), normal(3 + tokens, WIDTH)
    compressed, sink = normal(entries, WIDTH), normal(HEADS)
    selected = np.array([rng.permutation(entries)[:slots] for _ in range(tokens)])
    selected[rng.random(selected.shape) < 0.4] = -1
    selected[5] = -1
    o = attend(
        q,
        rows,
        sink,
        window=4,
        compressed=compressed,
        visible=torch.full((tokens,), entries),
        selected=torch.from_numpy(selected),
    )
    chosen = [[j for j in row if j >= 0] for row in selected.tolist()]
    assert_near(o, expected_attention(q, rows, sink, 4, compressed, chosen))


def test_no_entries_yet(normal: Callable[..., Tensor]) -> None:
    """An empty table of entries is as good as none."""
    q, rows, sink = normal(3, HEADS, WIDTH), normal(3, WIDTH), normal(HEADS)
    visible = torch.zeros(3, dtype=torch.int64)
    o = attend(q, rows, sink, window=4, compressed=rows[:0], visible=visible)
    assert torch.equal(o, attend(q, rows, sink, window=4))


@pytest.mark.parametrize("before", [0, 4])
def test_no_tokens(before: int, normal: Callable[..., Tensor]) -> None:
    o = attend(normal(0, HEADS, WIDTH), normal(before, WIDTH), normal(HEADS), window=4)
    assert o.shape == (0, HEADS, WIDTH) and o.dtype == torch.float32


@pytest.mark.parametrize("size", [-50.0, 0.0, 50.0, 80.0])
def test_sink(size: float, normal: Callable[..., Tensor]) -> None:
    """A dominating sink leaves a tiny output in proportion, a negligible one the plain softmax."""
    q, rows, compressed = normal(6, HEADS, WIDTH), normal(8, WIDTH), normal(4, WIDTH)
    sink, visible = torch.full((HEADS,), size), torch.full((6,), 4)
    o = attend(q, rows, sink, window=3, compressed=compressed, visible=visible)
    want = expected_attention(q, rows, sink, 3, compressed, [range(4)] * 6)
    scale = np.abs(want).max()
    np.testing.assert_allclose(o.numpy() / scale, want / scale, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("size", [-1e4, 1e4])
def test_extreme_sink_and_scores(size: float, normal: Callable[..., Tensor]) -> None:
    """Nothing overflows: the sink takes everything, or the best of huge scores does."""
    q, rows = 100 * normal(4, HEADS, WIDTH), 10 * normal(4, WIDTH)
    o = attend(q, rows, torch.full((HEADS,), size), window=4)
    want = (
        np.zeros(o.shape)
        if size > 0
        else expected_attention(q, rows, -1e4 * torch.ones(HEADS), 4, rows[:0], [[]] * 4)
    )
    assert_near(o, want)


def test_each_head_has_its_own_sink() -> None:
    """Equal scores of 0: a sink of log(n) counts as n further rows with nothing in them."""
    sink = torch.tensor([0.0, math.log(3.0), -1e4])
    o = attend(torch.zeros(1, 3, 2), torch.ones(1, 2), sink, window=4)
    np.testing.assert_allclose(o[0, :, 0].numpy(), [1 / 2, 1 / 4, 1], rtol=1e-6)


def test_bfloat16(rng: np.random.Generator, normal: Callable[..., Tensor]) -> None:
    """Scores and sums stay in fp32; the weights are rounded before they meet the values, then the output."""
    q, rows, compressed = (x.bfloat16() for x in (normal(40, HEADS, 64), normal(50, 64), normal(10, 64)))
    sink, visible = normal(HEADS), rng.integers(0, 11, 40)
    o = attend(q, rows, sink, window=16, compressed=compressed, visible=torch.from_numpy(visible))
    assert o.dtype == torch.bfloat16
    want = expected_attention(q, rows, sink, 16, compressed, [range(v) for v in visible])
    np.testing.assert_allclose(o.double().numpy(), want, rtol=2.0**-8, atol=2e-4)
