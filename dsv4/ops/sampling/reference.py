"""Choosing a token from logits, in plain torch: the specification of the room.

Responsible for the random numbers (Philox4x32-10) and for temperature, top-k, top-p, min-p and the
draw. Not responsible for the settings' ranges (``dsv4.sampling``) or for stop strings.
"""

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


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
