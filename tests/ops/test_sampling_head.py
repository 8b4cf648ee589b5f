"""The greedy choice from a screened head: the bounds in double precision, and what they exclude."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dsv4.ops.formats import Plain
from dsv4.ops.gemm import linear
from dsv4.ops.sampling import argmax_head, reference, screen_head

KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda w: w,
    "outliers": lambda w: torch.where(w > 3, 60 * w, w),
    "integers": torch.round,
    "one column": lambda w: torch.where(torch.arange(w.shape[1]) == 5, w, 0.0),
    "zeros": torch.zeros_like,
    "rows of all sizes": lambda w: w * torch.logspace(-35, 35, w.shape[0]).unsqueeze(1),
    "columns of all sizes": lambda w: w * torch.logspace(-30, 0, w.shape[1]),
}
INPUTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "normal": lambda x, w: x,
    "tiny": lambda x, w: 1e-36 * x,
    "large": lambda x, w: 1e30 * x,
    "columns of all sizes": lambda x, w: x * torch.logspace(-20, 3, x.shape[1]),
    "zeros": lambda x, w: 0 * x,
    "one": lambda x, w: torch.where(torch.arange(x.shape[1]) == 5, x, 0.0),
    "along a row": lambda x, w: w[:1].float(),
    "along a row's rounding": lambda x, w: (w - decoded(screen_head(w)))[1:2].float(),
}


def decoded(head: reference.ScreenedHead) -> Tensor:
    """scale * q, [V, D] f64, from the codes where docs of ``ScreenedHead`` say they stand."""
    vocab, width = head.w.shape
    q = torch.zeros(vocab, width, dtype=torch.float64)
    for row in range(vocab):
        tile, g, r = row // 16, row % 8, row % 16 // 8
        columns = torch.arange(width)
        t, i, half, byte = columns % 64 // 16, columns % 16 // 8, columns % 8 // 4, columns % 4
        q[row] = head.codes[tile, columns // 64, i, 4 * g + t, 8 * half + 4 * r + byte].double()
    return q * head.scale.double().unsqueeze(1)


def bounds(x: Tensor, head: reference.ScreenedHead) -> tuple[Tensor, Tensor]:
    """The upper and lower bounds, infinite where they overflowed: NaN excludes nothing."""
    upper, lower = reference.bound_logits(x, head)
    return upper.nan_to_num(math.inf, math.inf, -math.inf), lower.nan_to_num(-math.inf, math.inf, -math.inf)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("vocab", "width"), [(37, 200), (16, 512)])
def test_the_bounds_hold(kind: str, vocab: int, width: int, normal: Callable[..., Tensor]) -> None:
    """Of rounding, of x' and of any fp32 sum: 2^-14 |w| |x| are left for the last."""
    w = KINDS[kind](normal(vocab, width)).bfloat16()
    head = screen_head(w)
    assert head.codes.shape == (-(-vocab // 16), 8, 2, 32, 16) and head.codes.dtype == torch.int8
    exact, near = w.double(), decoded(head)
    assert bool((head.error >= (exact - near).norm(dim=1) + 2**-14 * exact.norm(dim=1)).all())
    assert bool((head.norm.double() >= near.norm(dim=1)).all())
    for words, make in INPUTS.items():
        x = make(normal(1, width), w).bfloat16()
        upper, lower = bounds(x, head)
        logits = (exact @ x[0].double()).float()
        slack = 2**-15 * exact.norm(dim=1) * x.double().norm()
        assert bool((lower.double() <= logits - slack).all()), words
        assert bool((logits + slack <= upper.double()).all()), words
        assert int(logits.argmax()) in (~(upper < lower.max())).nonzero(), words


def test_few_rows_are_left(normal: Callable[..., Tensor]) -> None:
    """Half a standard deviation of a random row's logit either way: what makes the copy worth its bytes."""
    w, x = (normal(2000, 1024) / 32).bfloat16(), normal(1, 1024).bfloat16()
    upper, lower = reference.bound_logits(x, screen_head(w))
    assert (upper - lower).median() < 0.7 and int((upper >= lower.max()).sum()) < 40


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_excludes_nothing(bad: float, normal: Callable[..., Tensor]) -> None:
    w, x = normal(40, 64).bfloat16(), normal(1, 64).bfloat16()
    broken = w.clone()
    broken[3, 7] = bad
    upper, lower = bounds(x, screen_head(broken))
    assert not upper[3] < lower.max()
    x[0, 9] = bad
    upper, lower = bounds(x, screen_head(w))
    assert not bool((upper < lower.max()).any())
    with pytest.raises(AssertionError, match="largest logit"):
        argmax_head(torch.full_like(x, math.nan), screen_head(w))


def test_argmax_head(normal: Callable[..., Tensor]) -> None:
    """The largest logit, the lowest id among equals."""
    w, x = normal(300, 64).bfloat16(), normal(1, 64).bfloat16()
    logits = linear(x, Plain(w), out_dtype=torch.float32)[0]
    found = argmax_head(x, screen_head(w))
    assert found.shape == (1,) and found.dtype == torch.int64 and int(found) == int(logits.argmax())
    w[[17, 200, 299]] = 4 * w[int(found)]
    assert int(argmax_head(x, screen_head(w))) == 17
    assert int(argmax_head(x, screen_head(torch.zeros_like(w)))) == 0
