"""Linear layers on every weight format in plain torch: fp32 products of the dequantised codes."""

import torch
from torch import Tensor

from dsv4.ops.formats import Nvfp4, Plain, Weight, stored, unpack_e2m1, unscaled
from dsv4.ops.quant import reference as quant


def linear(
    x: Tensor, weight: Weight, *, activations: str = "bf16", out_dtype: torch.dtype | None = None
) -> Tensor:
    operand, input_scale = quantize_input(x, weight, activations)
    matrix, global_scale = unscaled(weight)
    return _scale(operand @ matrix.T, input_scale, global_scale).to(out_dtype or x.dtype)


def grouped_linear(x: Tensor, weight: Weight, *, activations: str = "bf16") -> Tensor:
    tokens, groups, width = x.shape
    if activations == "fp8":
        activations = "bf16"
    if not isinstance(stored(weight), Nvfp4):
        activations = "bf16"
    operand, input_scale = quantize_input(x.flatten(1), weight, activations)
    matrix, global_scale = unscaled(weight)  # [G * R, K]
    blocks = matrix.view(groups, -1, width)  # [G, R, K]
    y = torch.einsum("tgk,grk->tgr", operand.view(tokens, groups, width), blocks).flatten(1)
    return _scale(y, input_scale, global_scale).to(x.dtype)


def quantize_input(x: Tensor, weight: Weight, activations: str) -> tuple[Tensor, Tensor | None]:
    """What the product reads of x [T, K]: exact fp32 values of its codes, and gsa (f32, [] or [T, 1])."""
    inner = stored(weight)
    if activations == "bf16" or isinstance(inner, Plain):
        return x.float(), None
    if activations == "nvfp4" and isinstance(inner, Nvfp4):
        scale = quant.nvfp4_global_scale(x, per_token=True) if inner.in_gs is None else inner.in_gs
        codes, block_scale = quant.quantize_nvfp4(x, scale)
        values = unpack_e2m1(codes).unflatten(-1, (block_scale.shape[-1], -1))
        return (values * block_scale.float().unsqueeze(-1)).flatten(-2), scale
    return quant.round_fp8(x.float()), None


def _scale(y: Tensor, input_scale: Tensor | None, global_scale: Tensor | None) -> Tensor:
    if input_scale is not None:
        y = y * input_scale
    return y if global_scale is None else y * global_scale
