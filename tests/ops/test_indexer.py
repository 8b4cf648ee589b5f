"""The indexer room: scores head by head, choices by sorting lists."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv4.ops.formats import INDEX_RECORD, decode_rows
from dsv4.ops.indexer import choose_entries, reference, select_topk
from dsv4.ops.indexer import index_scores as scores_of_visible
from dsv4.ops.rows import store_rows


def index_scores(q: Tensor, keys: Tensor, weights: Tensor) -> Tensor:
    """Of all entries."""
    return scores_of_visible(q, keys, weights, torch.full((q.shape[0],), keys.shape[0]))


def expected_scores(q: Tensor, keys: Tensor, weights: Tensor) -> np.ndarray:
    """sum_h w_h max(q_h . k_j, 0)."""
    queries, rows, factors = (x.double().numpy() for x in (q, keys, weights))
    scores = np.zeros((len(queries), len(rows)))
    for t, heads in enumerate(queries):
        for j, key in enumerate(rows):
            for h, query in enumerate(heads):
                scores[t, j] += factors[t, h] * max(float(query @ key), 0.0)
    return scores


def expected_choice(scores: list[float], visible: int, top_k: int) -> list[int]:
    """The best of the first ``visible`` entries, the lower index among equals, in order, padded with -1."""
    order = sorted(sorted(range(visible), key=lambda j: (-scores[j], j))[:top_k])
    return order + [-1] * (min(top_k, len(scores)) - len(order))


@pytest.fixture(params=[1 << 24, 40, 1])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows at once, a few rows at a time, one by one."""
    monkeypatch.setattr(reference, "BLOCK_ELEMENTS", request.param)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize(("tokens", "heads", "width", "entries"), [(7, 3, 16, 5), (1, 4, 8, 9), (9, 1, 5, 1)])
def test_scores(tokens: int, heads: int, width: int, entries: int, normal: Callable[..., Tensor]) -> None:
    q, keys, weights = normal(tokens, heads, width), normal(entries, width), normal(tokens, heads)
    assert (weights < 0).any() or heads == 1
    scores = index_scores(q, keys, weights)
    assert scores.shape == (tokens, entries) and scores.dtype == torch.float32
    np.testing.assert_allclose(scores.numpy(), expected_scores(q, keys, weights), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("tokens", "entries"), [(0, 4), (0, 0), (3, 0)])
def test_no_tokens_or_no_entries(tokens: int, entries: int, normal: Callable[..., Tensor]) -> None:
    scores = index_scores(normal(tokens, 2, 8), normal(entries, 8), normal(tokens, 2))
    assert scores.shape == (tokens, entries) and scores.dtype == torch.float32
    chosen = select_topk(scores, torch.zeros(tokens, dtype=torch.int64), top_k=2)
    assert chosen.tolist() == [[-1] * min(2, entries)] * tokens


def test_bfloat16_operands_are_multiplied_in_float32(normal: Callable[..., Tensor]) -> None:
    q, keys, weights = normal(5, 3, 64).bfloat16(), normal(6, 64).bfloat16(), normal(5, 3)
    scores = index_scores(q, keys, weights)
    assert scores.dtype == torch.float32
    np.testing.assert_allclose(scores.numpy(), expected_scores(q, keys, weights), rtol=1e-5, atol=2e-5)


def test_relu_comes_before_the_weight() -> None:
    """Dots of 2 and -3, weights of -1 and -10: -2, not +28; all heads cut give exactly 0."""
    q = torch.tensor([[[2.0], [-3.0]], [[-1.0], [-1.0]]])
    scores = index_scores(q, torch.ones(1, 1), torch.tensor([[-1.0, -10.0], [5.0, -5.0]]))
    assert scores.tolist() == [[-2.0], [0.0]]


@pytest.mark.parametrize("top_k", [1, 4, 50, 60])
def test_topk_of_the_visible(top_k: int, rng: np.random.Generator, normal: Callable[..., Tensor]) -> None:
    """Anything from no to all 50 entries visible; the best entries overall are hidden from most rows."""
    scores = normal(60, 50) + torch.arange(50)
    visible = rng.integers(0, 51, 60)
    visible[:3] = 0, 50, 1
    chosen = select_topk(scores, torch.from_numpy(visible), top_k=top_k)
    assert chosen.dtype == torch.int32
    want = [expected_choice(row, int(v), top_k) for row, v in zip(scores.tolist(), visible, strict=True)]
    assert chosen.tolist() == want


def test_ties_go_to_the_lowest_index(rng: np.random.Generator) -> None:
    """Four levels over 64 entries; zeros of either sign are equal, as relu and negative weights make them."""
    levels = rng.integers(-1, 3, (40, 64)).astype(np.float32)
    levels[:, ::2] *= -1  # turns half of the zeros into -0.0
    visible = rng.integers(0, 65, 40)
    chosen = select_topk(torch.from_numpy(levels), torch.from_numpy(visible), top_k=20)
    want = [expected_choice(row, int(v), 20) for row, v in zip(levels.tolist(), visible, strict=True)]
    assert chosen.tolist() == want


def test_negative_scores_beat_hidden_entries() -> None:
    scores = torch.tensor([[-1e30, -5.0, 9.0, 9.0]]).expand(3, 4)
    chosen = select_topk(scores, torch.tensor([2, 1, 0]), top_k=3)
    assert chosen.tolist() == [[0, 1, -1], [0, -1, -1], [-1, -1, -1]]


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("top_k", [1, 4, 30])
def test_choice(top_k: int, rng: np.random.Generator, normal: Callable[..., Tensor]) -> None:
    """Scores and choice in one, on a table with NaN where nothing is visible."""
    q, keys, weights = normal(9, 3, 16), normal(20, 16), normal(9, 3)
    visible = torch.from_numpy(rng.integers(0, 14, 9))
    visible[:2] = torch.tensor([0, 13])
    want = [
        expected_choice(row, int(v), top_k)
        for row, v in zip(expected_scores(q, keys, weights).tolist(), visible, strict=True)
    ]
    keys[13:] = torch.nan
    chosen = choose_entries(q, keys, weights, visible, top_k=top_k)
    assert chosen.dtype == torch.int32 and chosen.tolist() == want


@pytest.mark.parametrize("tokens", [0, 2])
def test_choice_of_nothing(tokens: int, normal: Callable[..., Tensor]) -> None:
    visible = torch.zeros(tokens, dtype=torch.int64)
    chosen = choose_entries(normal(tokens, 2, 8), normal(5, 8), normal(tokens, 2), visible, top_k=3)
    assert chosen.tolist() == [[-1] * 3] * tokens


def test_index_records_are_their_values(normal: Callable[..., Tensor]) -> None:
    table = torch.zeros(6, INDEX_RECORD, dtype=torch.uint8)
    store_rows(normal(6, 128).bfloat16(), table, torch.arange(6))
    q, weights = normal(3, 4, 128).bfloat16(), normal(3, 4)
    assert torch.equal(index_scores(q, table, weights), index_scores(q, decode_rows(table), weights))
