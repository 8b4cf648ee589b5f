"""The door of the sampling room: the next token from the logits of one position.

Responsible for random numbers, filters and the draw, and for the greedy choice straight from the head, whose
result is a token and whose logits nobody sees. Not responsible for checking the user's settings
(``dsv4.sampling``) or for what the model computes.
"""

import torch
from torch import Tensor

from dsv4 import _C
from dsv4.ops.checks import Shapes
from dsv4.ops.dispatch import op
from dsv4.ops.sampling import reference
from dsv4.ops.sampling.reference import ScreenedHead


@op(reference.uniform)
def uniform(seed: int, position: int) -> float:
    """The random number of one position of one generation, a multiple of 2^-24 in [0, 1).

    Philox4x32-10 with the 64-bit ``seed`` as key and ``position`` as 128-bit counter (low words
    first in both); the upper 24 bits of the first word of output. Nothing is carried from one
    position to the next, so any position can be drawn again alone. Source: docs/model.md 5.
    """


@op(reference.sample_token, kernel=True)
def sample_token(
    logits: Tensor,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
    position: int,
) -> Tensor:
    """The id chosen from ``logits`` [V] f32, as a 0-dimensional i64 tensor on the same device.

    ``temperature`` 0: the largest logit, the lowest id among equals. Otherwise tokens are ranked by
    descending logit, equal ones by ascending id, and weighted exp((logit - largest) / temperature);
    the temperature is first brought into the range of normal fp32 numbers, and tokens of weight 0
    are never chosen. The filters act in this order, each on the probabilities that the one before
    left, renormalised:

    * ``top_k`` > 0 keeps the first k (0: off);
    * ``top_p`` < 1 keeps the shortest prefix whose cumulative probability reaches p (1: off);
    * ``min_p`` > 0 keeps probabilities >= min_p times the largest (0: off).

    The choice is the first token whose cumulative probability exceeds ``uniform(seed, position)``;
    if rounding leaves none, the last one kept. All numbers are fp32; every sum, also that of a
    renormalisation, runs in rank order with one rounding a step.

    The settings' ranges are those of ``dsv4.sampling.Sampling``. A largest logit that is not finite
    (a NaN or +inf anywhere, or nothing but -inf) is an internal error: ``AssertionError``; on CUDA the
    id -1, of which the caller makes one. On CUDA ``position`` < 2^63. Source: docs/model.md 5.
    """
    shapes = Shapes()
    shapes.check("logits", logits, "V", torch.float32)
    vocab = shapes["V"]
    assert vocab >= 1, "logits: expected at least one token, found none"
    out = torch.empty((), dtype=torch.int64, device=logits.device)
    if temperature == 0:
        _C.sample_largest(logits, out, vocab)
        return out
    assert 0 <= seed < 2**64, f"seed: expected a 64-bit word, found {seed}"
    assert 0 <= position < 2**63, f"position: expected less than 2^63, found {position}"
    ranked, ids = torch.sort(logits, descending=True, stable=True)
    limits = torch.finfo(torch.float32)
    temperature = min(max(temperature, limits.tiny), limits.max)
    signed_seed = seed - 2**64 if seed >= 2**63 else seed  # the binding's integers
    _C.sample_ranked(
        ranked, ids, out, vocab, temperature, min(top_k, vocab), top_p, min_p, signed_seed, position
    )
    return out


@op(reference.screen_head)
def screen_head(w: Tensor) -> ScreenedHead:
    """A head w [V, D] bf16 with its int8 copy and the bounds that ``argmax_head`` reads; once, at load.

    A row's scale is its largest magnitude / 127, in fp32; codes are rounded to nearest, ties to even.
    Source: docs/model.md 5.
    """


@op(reference.argmax_head, kernel=True)
def argmax_head(x: Tensor, head: ScreenedHead) -> Tensor:
    """The id [1] i64 of the largest logit of x [1, D] bf16, the lowest id among equals.

    Logits are products of x and ``head.w`` with fp32 sums. The kernel reads the int8 copy, and of ``head.w``
    only rows that may be the largest by their bounds, at worst all; its choice is that among all rows. A
    largest logit that is not finite is an ``AssertionError``; on CUDA the id -1. D is a multiple of 8 up to
    8192. The launches overlap with the one before, which must not write the head; two calls must not run at
    the same time, on two streams. Source: docs/model.md 5.
    """
    shapes = Shapes()
    shapes.check("x", x, "1 D", torch.bfloat16)
    shapes.check("w", head.w, "V D", torch.bfloat16)
    for name in ("scale", "error", "norm"):
        shapes.check(name, getattr(head, name), "V", torch.float32)
    vocab, width = shapes["V"], shapes["D"]
    assert vocab >= 1 and width % 8 == 0, f"w: expected rows of a multiple of 8, found {[vocab, width]}"
    Shapes(R=-(-vocab // 16)).check("codes", head.codes, "R B 2 32 16", torch.int8)
    upper = torch.empty(vocab, dtype=torch.float32, device=x.device)
    out = torch.empty(1, dtype=torch.int64, device=x.device)
    codes, padded = head.codes.view(torch.uint8), head.codes.shape[1] * 64
    _C.argmax_head(x, head.w, codes, head.scale, head.error, head.norm, upper, out, vocab, width, padded)
    return out
