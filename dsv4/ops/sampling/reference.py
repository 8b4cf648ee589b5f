"""Choosing a token from logits, in plain torch: the specification of the room.

Responsible for the random numbers (Philox4x32-10), for temperature, top-k, top-p, min-p and the draw, and for
the greedy choice straight from the head. Not responsible for the settings' ranges (``dsv4.sampling``) or for
stop strings.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dsv4.ops.formats import Plain
from dsv4.ops.gemm import reference as gemm

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

# The int8 copy of a head: rows of a tile, columns of a block, to which all are padded; rows rounded at once.
_TILE_ROWS, _BLOCK_COLUMNS, _PADDED_COLUMNS, _ROWS_AT_ONCE = 16, 64, 512, 4096
_ROUND_UP = 1.001  # more than fp32 takes away from a norm
_SUM_ERROR = 2.0**-14  # of a logit in fp32, relative to |w| |x|: more than any order of summation needs


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 (Salmon et al. 2011): four random words from four counter and two key words.

    All words are unsigned 32-bit, the least significant word of the counter and of the key first.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (product1 >> 32) ^ c1 ^ k0,
            product1 & _MASK,
            (product0 >> 32) ^ c3 ^ k1,
            product0 & _MASK,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def uniform(seed: int, position: int) -> float:
    """See ``dsv4.ops.sampling.uniform``."""
    assert 0 <= seed < 2**64, f"seed {seed} is not a 64-bit word"
    assert 0 <= position < 2**128, f"position {position} is not a 128-bit word"
    key = (seed & _MASK, seed >> 32)
    words = [(position >> shift) & _MASK for shift in (0, 32, 64, 96)]
    return (philox((words[0], words[1], words[2], words[3]), key)[0] >> 8) * 2.0**-24


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
    """See ``dsv4.ops.sampling.sample_token``."""
    assert logits.ndim == 1 and logits.dtype == torch.float32, (logits.shape, logits.dtype)
    peak = logits.max()
    assert torch.isfinite(peak), f"the largest logit is {peak.item()}"
    if temperature == 0:
        return (logits == peak).nonzero()[0, 0]
    ranked, ids = torch.sort(logits, descending=True, stable=True)  # [V] f32, [V] i64
    # Subtracting the peak first, and a divisor that fp32 can hold, keep 0/0 and inf - inf away.
    limits = torch.finfo(torch.float32)
    weights = torch.exp((ranked - peak) / min(max(temperature, limits.tiny), limits.max))
    probs = _normalize(weights[weights > 0][: top_k or None].detach().cpu())
    if top_p < 1:
        probs = _normalize(probs[: _first(_running_sum(probs), top_p, strictly=False) + 1])
    if min_p > 0:
        probs = _normalize(probs[probs >= probs[0] * torch.tensor(min_p, dtype=torch.float32)])
    chosen = _first(_running_sum(probs), uniform(seed, position), strictly=True)
    return ids[min(chosen, len(probs) - 1)]


def _running_sum(values: Tensor) -> Tensor:
    """Sums of the first 1, 2, ... values, each step rounded to fp32, from first to last.

    ``torch.cumsum`` would carry the sum in double precision on a CPU; numpy's carries it in fp32.
    """
    return torch.from_numpy(values.numpy().cumsum())


def _normalize(weights: Tensor) -> Tensor:
    return weights / _running_sum(weights)[-1]


def _first(sums: Tensor, bound: float, *, strictly: bool) -> int:
    """The index of the first sum >= ``bound`` (> if ``strictly``), or ``len(sums)``."""
    bound_f32 = torch.tensor(bound, dtype=torch.float32)
    return int(torch.searchsorted(sums, bound_f32, right=strictly))


class ScreenedHead(NamedTuple):
    """A head ``w`` [V, D] bf16 and what tells, for half of its bytes, which rows cannot be the largest.

    Row v is about scale[v] * q[v], q int8. ``codes`` [V/16, D/64, 2, 32, 16] i8 are q as the kernel reads it:
    lane 4 g + t of MMA i of a block has columns 16 t + 8 i .. + 3 of row g and of row g + 8, then .. + 4 to
    + 7 of both; V is padded with zeros to a multiple of 16, D to one of 512. ``scale``, ``error``, ``norm``
    [V] f32: error >= |w - scale q| + 2^-14 |w|, norm >= |scale q|.
    """

    w: Tensor
    codes: Tensor
    scale: Tensor
    error: Tensor
    norm: Tensor


def screen_head(w: Tensor) -> ScreenedHead:
    parts = [_round_rows(rows) for rows in w.split(_ROWS_AT_ONCE)]
    codes, scale, error, norm = (torch.cat(part) for part in zip(*parts, strict=True))
    return ScreenedHead(w, codes, scale, error, norm)


def argmax_head(x: Tensor, head: ScreenedHead) -> Tensor:
    logits = gemm.linear(x, Plain(head.w), out_dtype=torch.float32)[0]
    peak = logits.max()
    assert torch.isfinite(peak), f"the largest logit is {peak.item()}"
    return (logits == peak).nonzero()[:1, 0]


def bound_logits(x: Tensor, head: ScreenedHead) -> tuple[Tensor, Tensor]:
    """Upper and lower bounds [V] f32 of the logits of x [1, D], those that the kernel excludes rows by."""
    vocab, width = head.w.shape
    _, exponent = torch.frexp(x.abs().max().float())
    step = torch.ldexp(torch.ones(()), (exponent - 6).clamp_min(-100).cpu()).to(x.device)
    left, parts = x[0].float() / step, []
    norm = left.norm() * _ROUND_UP * step
    for factor in (128.0, 128.0, 1.0):
        parts.append(left.round())
        left = (left - parts[-1]) * factor
    step = step / 128.0**2
    residual = (left.norm() * _ROUND_UP + 2.0**-20) * step
    q = _unpack(head.codes)[:vocab, :width].double()  # sums are exact, as those of integers
    first, second, third = (q @ part.double() for part in parts)
    values = (first * 128.0**2 + second * 128.0 + third).float() * head.scale * step
    bound = norm * head.error + residual * head.norm + 1e-34
    bound = torch.where(values.isfinite(), bound, torch.inf)
    return values + bound, values - bound


def _round_rows(w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, scale, error and norm of some rows; norms are taken in steps of the codes: none underflows."""
    scale = (w.abs().amax(dim=-1).float() / 127).clamp_min(2.0**-100)
    steps = w.float() / scale.unsqueeze(-1)
    q = steps.round().clamp(-127, 127)
    # Of _SUM_ERROR a hundredth more, for the rounding of ``steps``.
    error = _ROUND_UP * (steps - q).norm(dim=-1) + 1.01 * _SUM_ERROR * steps.norm(dim=-1)
    return _pack(q.to(torch.int8)), scale, error * scale, _ROUND_UP * q.norm(dim=-1) * scale


def _pack(q: Tensor) -> Tensor:
    """[V, D] i8 as ``ScreenedHead`` has it."""
    rows, width = q.shape
    q = F.pad(q, (0, -width % _PADDED_COLUMNS, 0, -rows % _TILE_ROWS))
    q = q.unflatten(0, (-1, 2, 8)).unflatten(-1, (-1, 4, 2, 2, 4))  # [tile, r, g, block, t, i, half, column]
    return q.permute(0, 3, 5, 2, 4, 6, 1, 7).reshape(q.shape[0], -1, 2, 32, 16)


def _unpack(codes: Tensor) -> Tensor:
    """The inverse, with the zeros."""
    tiles, blocks = codes.shape[:2]
    q = codes.view(tiles, blocks, 2, 8, 4, 2, 2, 4)  # [tile, block, i, g, t, half, r, column]
    return q.permute(0, 6, 3, 1, 4, 2, 5, 7).reshape(tiles * _TILE_ROWS, blocks * _BLOCK_COLUMNS)
