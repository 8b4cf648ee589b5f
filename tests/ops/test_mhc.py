"""The mhc room element by element in double precision."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv4.ops.mhc import mhc_boundary, mhc_head, mhc_post, mhc_pre, sinkhorn_normalize
from dsv4.ops.norm import rms_norm

EPS = NORM_EPS = 1e-6


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def balance(logits: list[list[float]], iterations: int) -> list[list[float]]:
    """Row softmax + eps and a division by column sums, then rows and columns in turn."""
    size = len(logits)
    c = []
    for row in logits:
        powers = [math.exp(value - max(row)) for value in row]
        c.append([power / sum(powers) + EPS for power in powers])

    def divide_columns() -> None:
        for k in range(size):
            total = sum(c[j][k] for j in range(size)) + EPS
            for j in range(size):
                c[j][k] /= total

    divide_columns()
    for _ in range(iterations - 1):
        for j in range(size):
            total = sum(c[j]) + EPS
            c[j] = [value / total for value in c[j]]
        divide_columns()
    return c


def mixes_of(streams: np.ndarray, fn: np.ndarray) -> list[float]:
    """fn times the streams laid end to end, over their common root mean square."""
    flat = [value for stream in streams.tolist() for value in stream]
    rms = math.sqrt(sum(value * value for value in flat) / len(flat) + NORM_EPS)
    return [sum(a * b for a, b in zip(row, flat, strict=True)) / rms for row in fn.tolist()]


def collapse(streams: np.ndarray, weights: list[float]) -> np.ndarray:
    return sum(weight * stream for weight, stream in zip(weights, streams, strict=True))


def assert_near(actual: Tensor, want: list | np.ndarray) -> None:
    assert actual.dtype == torch.float32
    np.testing.assert_allclose(actual.numpy(), np.array(want).reshape(actual.shape), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("iterations", [1, 2, 20])
@pytest.mark.parametrize("size", [1, 2, 4, 5])
@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 8.0])
def test_sinkhorn(iterations: int, size: int, spread: float, normal: Callable[..., Tensor]) -> None:
    logits = spread * normal(6, size, size)
    c = sinkhorn_normalize(logits, iterations=iterations, eps=EPS)
    assert_near(c, [balance(matrix, iterations) for matrix in logits.tolist()])


def test_sinkhorn_near_a_permutation() -> None:
    """Gaps of 60 leave nothing but eps outside the permutation, which is not a symmetric one."""
    cycle = torch.eye(4)[[1, 2, 3, 0]]
    c = sinkhorn_normalize(60 * cycle[None], iterations=20, eps=EPS)
    assert_near(c[0], balance((60 * cycle).tolist(), 20))
    assert_near(c[0], cycle.tolist())


def test_sinkhorn_ends_on_columns() -> None:
    """Few rounds leave these rows unbalanced; the columns sum to one after every round."""
    logits = torch.tensor([[[2.0, 0.0], [3.0, 0.0]]])
    for iterations in (1, 2):
        c = sinkhorn_normalize(logits, iterations=iterations, eps=EPS)[0]
        assert c.sum(dim=0).tolist() == pytest.approx([1, 1], abs=1e-5)
        assert abs(c.sum(dim=1)[0].item() - 1) > 1e-3


@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize(("m", "width"), [(4, 24), (4, 7), (2, 9)])
def test_pre(tokens: int, m: int, width: int, normal: Callable[..., Tensor]) -> None:
    x = 5 * normal(tokens, m, width)
    fn, base, scale = normal((2 + m) * m, m * width) / 3, normal((2 + m) * m), torch.tensor([0.7, 1.3, -0.9])
    u, post, comb = mhc_pre(x, fn, base, scale, iterations=20, eps=EPS, norm_eps=NORM_EPS)
    assert u.shape == (tokens, width) and post.shape == (tokens, m) and comb.shape == (tokens, m, m)
    a, b, c = scale.tolist()
    shift = base.tolist()
    for t, streams in enumerate(x.double().numpy()):
        mixes = mixes_of(streams, fn.double().numpy())
        pre = [sigmoid(mixes[i] * a + shift[i]) + EPS for i in range(m)]
        assert_near(u[t], collapse(streams, pre))
        assert_near(post[t], [2 * sigmoid(mixes[m + i] * b + shift[m + i]) for i in range(m)])
        cells = [[2 * m + m * j + k for k in range(m)] for j in range(m)]
        assert_near(comb[t], balance([[mixes[i] * c + shift[i] for i in row] for row in cells], 20))


def test_pre_of_silence() -> None:
    """Zero streams leave the biases alone; only pre carries an eps, only post a factor 2."""
    base = torch.full((24,), -100.0)
    x, fn = torch.zeros(1, 4, 3), torch.ones(24, 12)
    u, post, comb = mhc_pre(x, fn, base, torch.ones(3), iterations=20, eps=EPS, norm_eps=NORM_EPS)
    assert u.tolist() == [[0, 0, 0]]
    assert post.tolist() == [pytest.approx([0, 0, 0, 0], abs=1e-12)]
    assert_near(comb[0], [[0.25] * 4] * 4)
    _, post, _ = mhc_pre(x, fn, -base, torch.ones(3), iterations=20, eps=EPS, norm_eps=NORM_EPS)
    assert post.tolist() == [[2, 2, 2, 2]]
    ones = torch.ones(1, 4, 3)
    u, _, _ = mhc_pre(ones, 0 * fn, base, torch.ones(3), iterations=20, eps=EPS, norm_eps=NORM_EPS)
    assert u.tolist() == [pytest.approx([4 * EPS] * 3, rel=1e-5)]


@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize(("m", "width"), [(4, 11), (3, 1)])
def test_post(tokens: int, m: int, width: int, normal: Callable[..., Tensor]) -> None:
    y, x, post, comb = (
        normal(tokens, width),
        normal(tokens, m, width),
        normal(tokens, m),
        normal(tokens, m, m),
    )
    new = mhc_post(y, x, post, comb)
    assert new.shape == (tokens, m, width)
    for t in range(tokens):
        for k in range(m):
            want = post[t, k].item() * y[t].double()
            for j in range(m):
                want += comb[t, j, k].item() * x[t, j].double()
            assert_near(new[t, k], want.numpy())


def test_post_sends_row_to_column() -> None:
    """comb moves stream 0 to 1, 1 to 2 and 2 to 0: used untransposed, it would turn the other way."""
    comb = torch.tensor([[[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]])
    x = torch.tensor([[[10.0], [20.0], [30.0]]])
    new = mhc_post(torch.tensor([[1.0]]), x, torch.tensor([[0.1, 0.2, 0.3]]), comb)
    assert_near(new[0, :, 0], [30.1, 10.2, 20.3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_boundary(tokens: int, dtype: torch.dtype, normal: Callable[..., Tensor]) -> None:
    """The end of one sublayer and the beginning of the next, the norm of its input included."""
    y, x = normal(tokens, 11).to(dtype), normal(tokens, 4, 11).to(dtype)
    post, comb = normal(tokens, 4), normal(tokens, 4, 4)
    pre, norm = (normal(24, 44), normal(24), torch.tensor([0.7, 1.3, -0.9])), normal(11)
    settings = {"iterations": 20, "eps": EPS, "norm_eps": NORM_EPS}
    found = mhc_boundary(y, x, post, comb, *pre, norm, **settings)
    streams = mhc_post(y, x, post, comb)
    u, post, comb = mhc_pre(streams, *pre, **settings)
    for a, b in zip(found, (streams, rms_norm(u, norm, eps=NORM_EPS), post, comb), strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_head(tokens: int, normal: Callable[..., Tensor]) -> None:
    x, fn, base, scale = 3 * normal(tokens, 4, 13), normal(4, 52) / 4, normal(4), torch.tensor([1.7])
    z = mhc_head(x, fn, base, scale, eps=EPS, norm_eps=NORM_EPS)
    assert z.shape == (tokens, 13)
    for t, streams in enumerate(x.double().numpy()):
        mixes = mixes_of(streams, fn.double().numpy())
        weights = [sigmoid(mix * scale.item() + b) + EPS for mix, b in zip(mixes, base.tolist(), strict=True)]
        assert_near(z[t], collapse(streams, weights))


def test_bfloat16_streams_round_once(normal: Callable[..., Tensor]) -> None:
    """Every output in the streams' dtype is the fp32 result rounded; post and comb stay fp32."""
    x, y = normal(6, 4, 16).bfloat16(), normal(6, 16).bfloat16()
    fn, base, scale = normal(24, 64), normal(24), torch.ones(3)
    settings = {"eps": EPS, "norm_eps": NORM_EPS}
    u, post, comb = mhc_pre(x, fn, base, scale, iterations=20, **settings)
    wide, wide_post, wide_comb = mhc_pre(x.float(), fn, base, scale, iterations=20, **settings)
    assert torch.equal(u, wide.bfloat16())
    assert torch.equal(post, wide_post) and torch.equal(comb, wide_comb)
    assert torch.equal(mhc_post(y, x, post, comb), mhc_post(y.float(), x.float(), post, comb).bfloat16())
    head = (fn[:4], base[:4], scale[:1])
    assert torch.equal(mhc_head(x, *head, **settings), mhc_head(x.float(), *head, **settings).bfloat16())
