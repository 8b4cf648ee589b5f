"""Checks of values, made while weights stream in: nothing that is no number reaches a layer.

Every check is a reduction without temporaries on the device where the tensor lies; the verdicts
are read together, so that a layer costs one synchronisation. Which check fits which tensor is
decided in ``loading.formats`` (docs/model.md 4).
"""

import torch
from torch import Tensor

_E4M3_NAN = 0x7F  # and 0xFF with the sign bit
_E8M0_NAN = 0xFF


class ValueChecks:
    """Verdicts collected by the methods below and read by ``finish``; ``where`` names file and tensor."""

    def __init__(self) -> None:
        self._messages: list[str] = []
        self._verdicts: list[Tensor] = []

    def finite(self, x: Tensor, where: str) -> None:
        """No NaN or infinity: x bf16 or f32."""
        low, high = torch.aminmax(x)
        self._require(low.isfinite() & high.isfinite(), f"{where}: holds NaN or infinite values")

    def scales(self, x: Tensor, where: str) -> None:
        """Block scales, bf16 or f32: finite and at least 0; a block of zeros may have 0."""
        low, high = torch.aminmax(x)
        self._require((low >= 0) & high.isfinite(), f"{where}: holds NaN, infinite or negative scales")

    def e4m3_scales(self, x: Tensor, where: str) -> None:
        """Block scales, e4m3: neither NaN nor a sign bit."""
        self._require(x.view(torch.uint8).amax() < _E4M3_NAN, f"{where}: holds NaN or negative scales")

    def e8m0_scales(self, x: Tensor, where: str) -> None:
        """Block scales, e8m0: no byte 255."""
        self._require(x.view(torch.uint8).amax() < _E8M0_NAN, f"{where}: holds NaN scales (byte 255)")

    def e4m3_codes(self, x: Tensor, where: str) -> None:
        """FP8 weights: neither NaN code; 0x7f is the largest signed byte, 0xff the largest unsigned."""
        signed, unsigned = x.view(torch.int8).amax(), x.view(torch.uint8).amax()
        self._require((signed < _E4M3_NAN) & (unsigned < 0xFF), f"{where}: holds NaN (byte 0x7f or 0xff)")

    def ids(self, x: Tensor, limit: int, where: str) -> None:
        """Indices, int64: all of [0, limit)."""
        low, high = torch.aminmax(x)
        self._require((low >= 0) & (high < limit), f"{where}: holds ids outside 0..{limit - 1}")

    def finish(self) -> None:
        """Raise ``ValueError`` with the first complaint, if any."""
        if not self._verdicts:
            return
        passed = torch.stack(self._verdicts).tolist()
        for message, good in zip(self._messages, passed, strict=True):
            if not good:
                raise ValueError(message)

    def _require(self, verdict: Tensor, message: str) -> None:
        self._verdicts.append(verdict)
        self._messages.append(message)
