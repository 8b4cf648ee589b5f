"""Brute-force rounding to e2m1, e4m3 and e8m0 in numpy, which shares no code with the package."""

from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
# Sign-less e4m3, decoded by hand: bias 7, 3 bits of mantissa, no infinity, 0x7f is NaN.
E4M3 = np.array([(c & 7) * 2.0**-9 if c < 8 else (8 + (c & 7)) * 2.0 ** ((c >> 3) - 10) for c in range(127)])
TINY = 2.0**-9  # the smallest e4m3 magnitude


def f32(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def above(value: float) -> float:
    return float(np.nextafter(np.float32(value), np.float32(np.inf)))


def below(value: float) -> float:
    return float(np.nextafter(np.float32(value), np.float32(-np.inf)))


def bits(x: Tensor) -> Tensor:
    """The bytes of a tensor, so that -0, NaN and the dtypes without arithmetic compare too."""
    return x.contiguous().view(torch.uint8)


def nibbles(packed: Tensor) -> list[int]:
    return [code for byte in packed.flatten().tolist() for code in (byte & 15, byte >> 4)]


def brute_codes(x: np.ndarray, table: np.ndarray, sign_bit: int) -> np.ndarray:
    """Codes of the nearest table entries, of two equally near ones the even code; the ends saturate."""
    distance = np.abs(np.abs(x).astype(np.float64)[..., None] - table)
    near = distance == distance.min(-1, keepdims=True)
    even = near & (np.arange(len(table)) % 2 == 0)
    best = np.where(even.any(-1), even.argmax(-1), near.argmax(-1))
    return best + sign_bit * np.signbit(x)


def brute_exponent(amax: np.ndarray, top: float) -> np.ndarray:
    """The e8m0 bytes of the smallest powers of two at least fp32(amax / top), in exact arithmetic."""
    ratios = (amax.astype(np.float32) / np.float32(top)).ravel()
    exact = [next(e for e in range(-127, 128) if Fraction(2) ** e >= Fraction(float(r))) for r in ratios]
    return np.array(exact).reshape(amax.shape) + 127


# e2m1: (value, code). Each midpoint, its neighbours, and what lies outside.
