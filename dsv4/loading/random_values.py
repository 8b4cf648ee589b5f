"""Random weights of sane magnitude, made as stored: codes and scales, nothing is quantised.

Numbers come from one seeded sequence that every tensor reads from a place of its own, so they are
copied rather than computed, and depend on the seed, the slot and the format alone. Which format a
slot has is decided in ``loading.synthetic``, where they go in ``loading.writer``.
"""

import functools
import hashlib
import math
import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dsv4.config import ModelConfig
from dsv4.loading.formats import Layout, Part
from dsv4.loading.mapping import Slot
from dsv4.ops import quant
from dsv4.ops.formats import e8m0_to_float, unpack_e2m1

# A prime above any number of rows: no two rows of one matrix read the sequence from the same place.
_PERIOD = 2097143
_WORDS = 1 << 16
_INPUT_AMAX = 8.0  # of activations behind a norm
_TOP = 2688.0  # the largest e2m1 code times the largest e4m3 scale


class Normal(NamedTuple):
    """A normal distribution rounded to ``dtype``: F32, BF16, F8_E4M3, or E2M1 in pairs."""

    dtype: str
    mean: float
    std: float


class Bytes(NamedTuple):
    """Scales of ``dtype`` (F8_E4M3 or F8_E8M0) whose bytes are uniform in [low, high)."""

    dtype: str
    low: int
    high: int


Spread = Normal | Bytes

_E4M3_SCALES = Bytes("F8_E4M3", 0x6C, 0x78)  # 96 to 240; the largest block has 448


class RandomValues:
    """The values of every slot for one seed."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        content = bytearray(random.Random(f"dsv4 synthetic {seed}").randbytes(2 * _PERIOD))
        self._words = torch.frombuffer(content, dtype=torch.uint16).int()  # [_PERIOD], below _WORDS
        self._pools: dict[Spread, Tensor] = {}

    def linear(self, slot: Slot, layout: Layout, part: Part, dtype: str, count: int) -> Iterator[Tensor]:
        """One stored part of a linear [N, K] with standard deviation about K^-0.5, as pieces in order.

        ``dtype`` and ``count`` are the part's on disk. w1 and w3 of an expert share their scalars.
        """
        codes, scales, global_scale = _spreads(layout.format, slot.shape[1] ** -0.5)
        key = f"{slot.name} {part.field}"
        if part.field == "w":
            yield from self._draw(key, codes, count)
        elif part.field == "w_sf":
            assert scales is not None, f"{layout.title} has no block scales"
            for piece in self._draw(key, scales, count):
                yield piece if scales.dtype == dtype else _PLAIN[dtype](e8m0_to_float(piece))
        else:
            centre = global_scale if part.field == "w_gs" else _INPUT_AMAX / _TOP
            value = centre * 1.25 ** (2 * self._fraction(key.replace(".w3 ", ".w1 ")) - 1)
            yield torch.tensor([1 / value if part.reciprocal else value])

    def plain(self, slot: Slot, config: ModelConfig, dtype: str) -> Iterator[Tensor]:
        """A slot that is no linear, as pieces in order."""
        if slot.kind == "ids":
            yield self._distinct_experts(slot, config.num_experts)
            return
        spreads = {
            "embed": (0.0, 1.0),
            "norm": (1.0, 0.1),
            "_fn": (0.0, slot.shape[-1] ** -0.5),
            "_base": (0.0, 1.0),
            "_scale": (1.0, 0.1),
            "attn_sink": (0.0, 1.0),
            "ape": (0.0, 0.5),
            "gate.bias": (0.0, 0.05),
        }
        mean, std = next(spread for ending, spread in spreads.items() if slot.name.endswith(ending))
        yield from self._draw(slot.name, Normal(dtype, mean, std), math.prod(slot.shape))

    def _distinct_experts(self, slot: Slot, num_experts: int) -> Tensor:
        """[V, K] i64: a token's experts are steps, coprime to their number, from one of them."""
        tokens, top_k = slot.shape
        strides = torch.tensor([s for s in range(1, num_experts + 1) if math.gcd(s, num_experts) == 1])
        start, choice = (self._take(f"{slot.name} {part}", tokens) for part in ("start", "stride"))
        stride = strides[choice % len(strides)]
        return (start[:, None] + torch.arange(top_k) * stride[:, None]) % num_experts

    def _take(self, key: str, count: int) -> Tensor:
        return torch.cat(list(self._read(self._words, key, count))).long()

    def _draw(self, key: str, spread: Spread, count: int) -> Iterator[Tensor]:
        pool = self._pools.get(spread)
        if pool is None:
            pool = self._pools[spread] = _table(spread)[self._words]
        yield from self._read(pool, key, count)

    def _read(self, pool: Tensor, key: str, count: int) -> Iterator[Tensor]:
        """``count`` elements of the endless repetition of ``pool``, from the key's place on."""
        position = int(self._fraction(key) * _PERIOD)
        while count > 0:
            piece = pool[position : position + count]
            yield piece
            count -= len(piece)
            position = 0

    def _fraction(self, key: str) -> float:
        """In [0, 1), by seed and key."""
        digest = hashlib.blake2b(f"{self._seed} {key}".encode(), digest_size=6).digest()
        return int.from_bytes(digest, "little") / 2**48


_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {"F32": Tensor.float, "BF16": Tensor.bfloat16}


@functools.cache
def _spreads(format: str, std: float) -> tuple[Spread, Bytes | None, float]:
    """Codes, block scales and global scale that give a matrix about this standard deviation."""
    if format.upper() in _PLAIN:
        return Normal(format.upper(), 0.0, std), None, 1.0
    if format.startswith("nvfp4"):
        codes = Normal("E2M1", 0.0, 2.5)
        return codes, _E4M3_SCALES, std / (_rms(codes) * _rms(_E4M3_SCALES))
    # Two neighbouring powers of two; the codes make up for the rest.
    dtype, least = {"fp8": ("F8_E4M3", 50.0), "mxfp4": ("E2M1", 1.7)}[format]
    pair = math.sqrt((1 + 4) / 2)
    exponent = math.floor(math.log2(std / (pair * least)))
    scales = Bytes("F8_E8M0", 127 + exponent, 127 + exponent + 2)
    return Normal(dtype, 0.0, std / (pair * 2**exponent)), scales, 1.0


def _table(spread: Spread) -> Tensor:
    """[_WORDS] stored elements, codes and scales as u8; a word of the sequence picks one."""
    if isinstance(spread, Bytes):
        return (spread.low + torch.arange(_WORDS) * (spread.high - spread.low) // _WORDS).to(torch.uint8)
    if spread.dtype == "E2M1":
        words = torch.arange(_WORDS)
        pairs = _quantiles(256)[torch.stack((words % 256, words // 256), dim=-1)]  # [_WORDS, 2]
        return quant.pack_e2m1((spread.mean + spread.std * pairs).float()).squeeze(-1)
    values = (spread.mean + spread.std * _quantiles(_WORDS)).float()
    if spread.dtype == "F8_E4M3":
        return quant.round_e4m3(values).view(torch.uint8)
    return _PLAIN[spread.dtype](values)


def _quantiles(count: int) -> Tensor:
    """The standard normal's, in the middle of ``count`` equally likely parts: [count] f64."""
    return torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)


def _rms(spread: Spread) -> float:
    """Root mean square of the e2m1 or e4m3 numbers that a spread's elements stand for."""
    table = _table(spread)
    values = unpack_e2m1(table) if spread.dtype == "E2M1" else table.view(torch.float8_e4m3fn).float()
    return float(values.square().mean().sqrt())
