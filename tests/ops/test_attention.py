"""The attention room query by query: every attended row listed, one softmax with a sink over all."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv4.ops.attention import attend as turned_attend
from dsv4.ops.attention import attend_step, reference
from dsv4.ops.formats import KV_RECORD, decode_rows
from dsv4.ops.rope import apply_rope
from dsv4.ops.rows import store_rows

HEADS, WIDTH = 3, 16
NO_TURN = torch.zeros(1)  # inverse frequencies: nothing turns


def attend(q: Tensor, window_kv: Tensor, sink: Tensor, **options: Any) -> Tensor:
    """Without the rotation of the output, which has tests of its own."""
    positions = torch.arange(window_kv.shape[0] - q.shape[0], window_kv.shape[0])
    return turned_attend(q, window_kv, sink, positions, NO_TURN, **options)


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


def test_the_output_turns_back_before_it_is_rounded(normal: Callable[..., Tensor]) -> None:
    q, rows, sink = normal(5, HEADS, WIDTH).bfloat16(), normal(9, WIDTH).bfloat16(), normal(HEADS)
    positions, inv_freq = torch.arange(1000, 1005), torch.tensor([1.0, 0.3, 0.01])
    found = turned_attend(q, rows, sink, positions, inv_freq, window=4)
    plain = expected_attention(q, rows, sink, 4, rows[:0], [[]] * 5)
    want = apply_rope(torch.from_numpy(plain), positions, inv_freq, inverse=True)
    assert (found.double() - want).abs().max() < 2**-8 * want.abs().max()
    assert torch.equal(found, found.float().bfloat16()) and found.dtype == torch.bfloat16


def ring_of(rows: Tensor, last: int, size: int) -> Tensor:
    """rows [P, W] of positions 0 .. P - 1 in a ring, NaN where the window of ``last`` positions ends."""
    ring = torch.full((size, rows.shape[1]), torch.nan, dtype=rows.dtype)
    for position in range(max(0, len(rows) - last), len(rows)):
        ring[position % size] = rows[position]
    return ring


@pytest.mark.parametrize("tokens", [1, 3, 8])
@pytest.mark.parametrize("before", [0, 2, 5, 30])
@pytest.mark.parametrize("kind", ["window", "visible", "selected"])
def test_step(
    tokens: int, before: int, kind: str, rng: np.random.Generator, normal: Callable[..., Tensor]
) -> None:
    """On a ring and a table that hold NaN wherever nobody looks; each query as if it were alone."""
    window, ratio, end = 5, 4, before + tokens
    q, rows, sink = 2 * normal(tokens, HEADS, WIDTH), normal(end, WIDTH), normal(HEADS)
    positions, inv_freq = torch.arange(before, end), torch.tensor([1.0, 0.3])
    ring = ring_of(rows, window - 1 + tokens, window + 7)
    options: dict[str, Any] = {"window": window}
    chosen: list[list[int]] = [[] for _ in range(tokens)]
    entries = torch.full((12, WIDTH), torch.nan)
    if kind != "window":
        entries[: end // ratio] = normal(end // ratio, WIDTH)
        chosen = [list(range((p + 1) // ratio)) for p in range(before, end)]
        options |= {"compressed": entries, "ratio": ratio}
    if kind == "selected":
        chosen = [sorted(rng.permutation(len(seen))[:3].tolist()) for seen in chosen]
        options["selected"] = torch.tensor([row + [-1] * (3 - len(row)) for row in chosen], dtype=torch.int32)
    found = attend_step(q, ring, sink, positions, inv_freq, **options)
    plain = expected_attention(q, rows, sink, window, entries, chosen)
    want = apply_rope(torch.from_numpy(plain), positions, inv_freq, inverse=True)
    assert_near(found, want.numpy())
    for t in range(tokens):
        part = {"selected": options["selected"][t : t + 1]} if kind == "selected" else {}
        alone = attend_step(q[t : t + 1], ring, sink, positions[t : t + 1], inv_freq, **{**options, **part})
        assert torch.equal(alone[0], found[t])


def test_step_on_records(normal: Callable[..., Tensor]) -> None:
    """As on the rows that the records stand for."""
    ring, entries = (torch.zeros(n, KV_RECORD, dtype=torch.uint8) for n in (11, 4))
    for table in (ring, entries):
        store_rows(normal(len(table), 512).bfloat16(), table, torch.arange(len(table)))
    q, sink, positions = normal(2, HEADS, 512).bfloat16(), normal(HEADS), torch.tensor([14, 15])
    rest = (sink, positions, torch.tensor([1.0, 0.3]))
    found = attend_step(q, ring, *rest, window=4, compressed=entries, ratio=4)
    want = attend_step(q, decode_rows(ring), *rest, window=4, compressed=decode_rows(entries), ratio=4)
    assert torch.equal(found, want) and bool(found.isfinite().all())
