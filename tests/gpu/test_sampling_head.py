"""The greedy choice from a screened head: against logits in double precision, among rows nearly equal."""

import math
from collections.abc import Callable

import pytest
import torch
from numeric import assert_reproducible, dirty_memory
from shapes import FLASH, MODELS, PRO, TINY, Sizes
from torch import Tensor

from dsv4.ops.sampling import argmax_head, reference, screen_head

ODD = ((1, 8), (15, 64), (17, 72), (1000, 520), (33, 8192), (4231, 1000))


def exact_logits(x: Tensor, w: Tensor) -> Tensor:
    """[V] f64."""
    return torch.cat([rows.double() @ x[0].double() for rows in w.split(8192)])


def first_of_largest(logits: Tensor) -> int:
    return int((logits == logits.max()).nonzero()[0])


def random_head(vocab: int, width: int, normal: Callable[..., Tensor]) -> Tensor:
    return torch.cat([normal(len(rows), width).bfloat16() for rows in torch.arange(vocab).split(16384)])


@pytest.mark.parametrize("sizes", MODELS, ids=lambda sizes: sizes.name)
def test_argmax_head(sizes: Sizes, cuda_normal: Callable[..., Tensor]) -> None:
    w = random_head(sizes.vocab, sizes.hidden, cuda_normal)
    head = screen_head(w)
    for turn in range(8):
        x = cuda_normal(1, sizes.hidden).bfloat16()
        if turn > 5:
            x = (w[1000 * turn % sizes.vocab].float() + 0.5 * x).bfloat16()  # as sure as a model can be
        dirty_memory()
        found = argmax_head(x, head)
        logits = exact_logits(x, w)
        best = logits.topk(2).values
        assert found.shape == (1,) and found.dtype == torch.int64
        assert best[0] - best[1] > 1e-2, f"{sizes.name} {turn}: the case is no test"
        assert int(found) == int(logits.argmax()), f"{sizes.name} {turn}: {int(found)}"
        upper, lower = reference.bound_logits(x, head)
        assert int((upper >= lower.max()).sum()) < sizes.vocab / 100, "rows that the bounds leave"


@pytest.mark.parametrize(("vocab", "width"), [*ODD, (FLASH.vocab, 256)])
def test_ties_and_odd_sizes(vocab: int, width: int, cuda_normal: Callable[..., Tensor]) -> None:
    """Logits that are exact in any order, many of them equal."""
    w = random_head(vocab, width, cuda_normal).round().clamp(-1, 1)
    for x in (cuda_normal(1, width).round(), torch.ones(1, width, device="cuda"), -w[-1:].abs()):
        x = x.bfloat16()
        assert int(argmax_head(x, screen_head(w))) == first_of_largest(exact_logits(x, w)), (vocab, width)


@pytest.mark.parametrize("width", [FLASH.hidden, PRO.hidden, TINY.hidden, 1000])
def test_rows_that_only_rounding_tells_apart(width: int, cuda_normal: Callable[..., Tensor]) -> None:
    """Rows of the same values in another order, x of ones, sums that differ in their last bits; and a few of
    many. The choice is bit by bit that among all rows, which bounds of infinity leave.
    """
    values = cuda_normal(width).abs().bfloat16()
    order = cuda_normal(5000, width).argsort(dim=-1)
    w, x = values[order], torch.ones(1, width, dtype=torch.bfloat16, device="cuda")
    few = torch.cat((w[:300], 0.5 * w, w[300:600]))
    chosen = []
    for rows in (w, few):
        head = screen_head(rows)
        everything = head._replace(error=torch.full_like(head.error, math.inf))
        chosen.append(int(argmax_head(x, head)))
        assert chosen[-1] == int(argmax_head(x, everything)), width
        logits = exact_logits(x, rows)
        assert logits.max() - logits[chosen[-1]] <= 1e-5 * values.float().sum(), width
    assert chosen[1] < 300 or chosen[1] >= 5300


def test_near_and_equal_rows(cuda_normal: Callable[..., Tensor]) -> None:
    """Copies of one row with one value a little larger here and there; one row everywhere."""
    w = cuda_normal(1, FLASH.hidden).bfloat16().expand(20000, -1).contiguous()
    x = w[:1].clone()
    assert int(argmax_head(x, screen_head(w))) == 0
    column = int(x.float().argmax())
    for place in (0, 1, 31, 32, 4223, 4224, 12345, 19999):
        other = w.clone()
        other[place:, column] *= 1.25
        assert int(argmax_head(x, screen_head(other))) == place
        other[place:] = w[0]
        other[place, column] *= 1.25
        assert int(argmax_head(x, screen_head(other))) == place


def test_zeros_and_what_is_not_finite(cuda_normal: Callable[..., Tensor]) -> None:
    """The id -1 where the reference stops; every row is looked at."""
    w, x = cuda_normal(30000, 512).bfloat16(), cuda_normal(1, 512).bfloat16()
    head = screen_head(w)
    assert int(argmax_head(torch.zeros_like(x), head)) == 0
    for scale in (1e-33, 1e30):
        scaled = (scale * x.float()).bfloat16()
        logits = exact_logits(scaled, w)
        assert int(argmax_head(scaled, head)) == int(logits.argmax()), scale
    for bad in (math.nan, -math.nan, math.inf, -math.inf):
        broken = x.clone()
        broken[0, 17] = bad
        assert int(argmax_head(broken, head)) == -1
    for bad in (math.nan, math.inf):
        for place in (0, 29999):
            broken = w.clone()
            broken[place] = bad * x[0].sign()
            assert int(argmax_head(x, screen_head(broken))) == -1, (bad, place)
    assert int(argmax_head(x, head)) == int(exact_logits(x, w).argmax())


def test_reproducible_and_in_a_row(cuda_normal: Callable[..., Tensor]) -> None:
    """Calls that overlap in a graph, of heads that leave few rows and of one that leaves all."""
    heads = [screen_head(random_head(20000, width, cuda_normal)) for width in (1024, 256)]
    heads.append(screen_head(torch.ones(3000, 256, dtype=torch.bfloat16, device="cuda")))
    calls = [(cuda_normal(1, heads[i % 3].w.shape[1]).bfloat16(), heads[i % 3]) for i in range(24)]
    want = torch.cat([reference.argmax_head(*call) for call in calls])

    def run() -> Tensor:
        return torch.cat([argmax_head(*call) for call in calls])

    assert torch.equal(run(), want)
    assert_reproducible(run, "24 calls")


def test_what_it_cannot_take(cuda_normal: Callable[..., Tensor]) -> None:
    w, x = cuda_normal(40, 64).bfloat16(), cuda_normal(2, 64).bfloat16()
    head = screen_head(w)
    for bad, words in (
        (x, "1 D"),
        (x[:1].float(), "float32"),
        (x[:1, :32].contiguous(), "expected shape"),
        (cuda_normal(1, 128).bfloat16()[:, ::2], "contiguous"),
    ):
        with pytest.raises(AssertionError, match=words):
            argmax_head(bad, head)
    odd = screen_head(w[:, :12].contiguous())
    with pytest.raises(AssertionError, match="multiple of 8"):
        argmax_head(x[:1, :12].contiguous(), odd)
