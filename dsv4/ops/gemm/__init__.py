"""Linear layers on every weight format: y = x W^T with fp32 sums.

``activations`` names what quantised weights are multiplied with (docs/model.md 2.13 and 4.2):
"bf16" the input as it is; "fp8" e4m3 by blocks of 128, before FP8, MXFP4 and NVFP4 weights;
"nvfp4" e2m1 codes before NVFP4 weights and fp8 before FP8 and MXFP4. Plain weights always take the
input as it is.
"""

import torch
from torch import Tensor

from dsv4.ops.dispatch import op
from dsv4.ops.formats import Weight
from dsv4.ops.gemm import reference


@op(reference.linear)
def linear(
    x: Tensor, weight: Weight, *, activations: str = "bf16", out_dtype: torch.dtype | None = None
) -> Tensor:
    """y = x W^T: x [T, K], weight (N, K) -> [T, N] in ``out_dtype`` (x's dtype if None).

    Products of exact code values are summed in fp32; global scales multiply the sum, the activations'
    first, then the weight's; one rounding at the end. Source: docs/model.md 2.6, 4.2.
    """


@op(reference.grouped_linear)
def grouped_linear(x: Tensor, weight: Weight, *, activations: str = "bf16") -> Tensor:
    """The block-diagonal output projection wo_a: x [T, G, K], weight (G * R, K) -> [T, G * R] in x's dtype.

    Rows g*R .. (g+1)*R - 1 of the weight see group g. Its input is never rounded to FP8; an NVFP4 weight
    takes NVFP4 activations, whose per-token scale spans all groups. Source: docs/model.md 2.12, 2.13.
    """
