"""Linear layers on every weight format in plain torch: fp32 products of the dequantised codes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dsv4.ops.formats import Plain, Weight, is_nvfp4, stored, unscaled
from dsv4.ops.quant import reference as quant


def linear(
    x: Tensor,
    weight: Weight,
    *,
    activations: str = "bf16",
    out_dtype: torch.dtype | None = None,
    overlap: bool = True,
) -> Tensor:
    operand, input_scale = quantize_input(x, weight, activations)
    matrix, global_scale = unscaled(weight)
    return _scale(operand @ matrix.T, input_scale, global_scale).to(out_dtype or x.dtype)


def linear_stack(
    x: Tensor,
    weights: Sequence[Weight],
    *,
    activations: str = "bf16",
    out_dtypes: Sequence[torch.dtype | None],
    overlap: bool = True,
) -> tuple[Tensor, ...]:
    each = zip(weights, out_dtypes, strict=True)
    return tuple(linear(x, w, activations=activations, out_dtype=dtype) for w, dtype in each)


def grouped_linear(x: Tensor, weight: Weight, *, activations: str = "bf16", overlap: bool = True) -> Tensor:
    tokens, groups, width = x.shape
    if activations == "fp8":
        activations = "bf16"
    if not is_nvfp4(weight):
        activations = "bf16"
    operand, input_scale = quantize_input(x.flatten(1), weight, activations)
    matrix, global_scale = unscaled(weight)  # [G * R, K]
    blocks = matrix.view(groups, -1, width)  # [G, R, K]
    y = torch.einsum("tgk,grk->tgr", operand.view(tokens, groups, width), blocks).flatten(1)
    return _scale(y, input_scale, global_scale).to(x.dtype)


def quantize_input(x: Tensor, weight: Weight, activations: str) -> tuple[Tensor, Tensor | None]:
    """What the product reads of x [T, K]: exact fp32 values of its codes, and gsa ([T, 1] f32)."""
    inner = stored(weight)
    if activations == "bf16" or isinstance(inner, Plain):
        return x.float(), None
    if activations == "nvfp4" and is_nvfp4(inner):
        values, scale = quant.round_nvfp4(x, inner.in_gs)
        return values.float(), scale
    return quant.round_fp8(x.float()), None


def _scale(y: Tensor, input_scale: Tensor | None, global_scale: Tensor | None) -> Tensor:
    if input_scale is not None:
        y = y * input_scale
    return y if global_scale is None else y * global_scale
