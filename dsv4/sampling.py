"""How the next token is chosen: the user's settings, checked once.

Responsible for the settings only; the choice itself is the operation ``dsv4.ops.sampling``.
"""

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sampling:
    """Settings of one generation. Raises ``ValueError`` naming the field that is out of range.

    ``temperature`` 0 is greedy and ignores the filters. The filters apply in the order
    temperature, ``top_k`` (0: off), ``top_p`` (1: off), ``min_p`` (0: off). The same ``seed`` gives
    the same tokens. Generation ends before the first of the ``stop`` strings.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        t, p, m = self.temperature, self.top_p, self.min_p
        _require("temperature", t, "a finite number >= 0", _real(t) and t >= 0)
        _require("top_k", self.top_k, "an integer >= 0", _integer(self.top_k) and self.top_k >= 0)
        _require("top_p", p, "a number in (0, 1]", _real(p) and 0 < p <= 1)
        _require("min_p", m, "a number in [0, 1]", _real(m) and 0 <= m <= 1)
        seed_ok = _integer(self.seed) and 0 <= self.seed < 2**64
        _require("seed", self.seed, "an integer in [0, 2^64)", seed_ok)
        stop_ok = isinstance(self.stop, tuple) and all(isinstance(s, str) and s for s in self.stop)
        _require("stop", self.stop, "a tuple of strings, none empty", stop_ok)


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _real(value: Any) -> bool:
    return _integer(value) or (isinstance(value, float) and math.isfinite(value))


def _require(field: str, value: Any, expected: str, holds: bool) -> None:
    if not holds:
        raise ValueError(f"{field}: expected {expected}, found {value!r}")
