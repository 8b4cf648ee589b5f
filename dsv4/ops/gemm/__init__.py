"""Linear layers on every weight format: y = x W^T with fp32 sums.

``activations`` names what quantised weights are multiplied with (docs/model.md 2.13 and 4.2):
"bf16" the input as it is; "fp8" e4m3 by blocks of 128, before FP8, MXFP4 and NVFP4 weights;
"nvfp4" e2m1 codes before NVFP4 weights and fp8 before FP8 and MXFP4. Plain weights always take the
input as it is.

``KERNELS`` says which kernel runs. Codes times block scales of quantised activations are exact in bf16, so a
kernel computes what a product of 4-bit or 8-bit operands would, up to the order of sums. Inputs of f32 are
multiplied as three bf16 terms, which is exact.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dsv4 import _C
from dsv4.ops import quant
from dsv4.ops.checks import FLOATS, Shapes
from dsv4.ops.dispatch import op
from dsv4.ops.formats import Bare, Fp8Block, Packed, Plain, Weight, is_nvfp4, shape_of, stored
from dsv4.ops.gemm import reference

FEW_TOKENS = 32  # of one launch of gemv_mma
# Weights, tokens, kernel; with any activations, on every architecture. cuBLAS is what torch multiplies with.
KERNELS = (
    ("NVFP4, MXFP4, FP8, bf16", "1 to 32", "gemv_mma"),
    ("NVFP4, MXFP4, FP8", "33 and more", "gemm_tiles"),
    ("bf16", "33 and more", "cuBLAS"),
    ("f32", "any number", "cuBLAS"),
)
MAX_MATRICES, MAX_GROUPS = 8, 16  # of one launch
KINDS = {"nvfp4": 0, "mxfp4": 1, "fp8": 2, "bf16": 3}  # as in csrc/gemm/units.cuh


@op(reference.linear, kernel=True)
def linear(
    x: Tensor,
    weight: Weight,
    *,
    activations: str = "bf16",
    out_dtype: torch.dtype | None = None,
    overlap: bool = True,
) -> Tensor:
    """y = x W^T: x [T, K], weight (N, K) -> [T, N] in ``out_dtype`` (x's dtype if None).

    Products of exact code values are summed in fp32; global scales multiply the sum, the activations'
    first, then the weight's; one rounding at the end. The result of a bf16 row is bitwise the same for every
    T <= 8. The kernels take K a multiple of 16. ``overlap``: start to read the weight while the launch
    before still runs, which must not be the one that writes it. Source: docs/model.md 2.6, 4.2.
    """
    return linear_stack(
        x, (weight,), activations=activations, out_dtypes=(out_dtype or x.dtype,), overlap=overlap
    )[0]


@op(reference.linear_stack, kernel=True)
def linear_stack(
    x: Tensor,
    weights: Sequence[Weight],
    *,
    activations: str = "bf16",
    out_dtypes: Sequence[torch.dtype | None],
    overlap: bool = True,
) -> tuple[Tensor, ...]:
    """``linear`` with each of ``weights`` (N_i, K) on the same x [T, K] -> [T, N_i] in ``out_dtypes``.

    One launch for up to 32 tokens and eight matrices that take x in the same form. Source: docs/model.md 2.6.
    """
    Shapes().check("x", x, "T K", FLOATS)
    bare = [stored(weight) for weight in weights]
    dtypes = [dtype or x.dtype for dtype in out_dtypes]
    outs: list[Tensor | None] = [None] * len(bare)
    for form, members in _by_operand(bare, activations).items():
        operand, scale = _operand(x, form, bare[members[0]])
        results = _multiply(
            operand, scale, [bare[i] for i in members], [dtypes[i] for i in members], overlap=overlap
        )
        for i, result in zip(members, results, strict=True):
            outs[i] = result
    return tuple(out for out in outs if out is not None)


@op(reference.grouped_linear, kernel=True)
def grouped_linear(x: Tensor, weight: Weight, *, activations: str = "bf16", overlap: bool = True) -> Tensor:
    """The block-diagonal output projection wo_a: x [T, G, K], weight (G * R, K) -> [T, G * R] in x's dtype.

    Rows g*R .. (g+1)*R - 1 of the weight see group g. Its input is never rounded to FP8; an NVFP4 weight
    takes NVFP4 activations, whose per-token scale spans all groups. The kernels take R a multiple
    of 16 (FP8: of 32) and up to 16 groups.
    Source: docs/model.md 2.12, 2.13.
    """
    Shapes().check("x", x, "T G K", FLOATS)
    bare, groups = stored(weight), x.shape[1]
    form = "nvfp4" if activations == "nvfp4" and is_nvfp4(bare) else "bf16"
    operand, scale = _operand(x.flatten(1), form, bare)
    return _multiply(operand, scale, [bare], [x.dtype], groups=groups, overlap=overlap)[0]


def _by_operand(weights: Sequence[Bare], activations: str) -> dict[object, list[int]]:
    """Which weights see x in the same form: as it is, in FP8, or in NVFP4 with the same global scale."""
    groups: dict[object, list[int]] = {}
    for i, weight in enumerate(weights):
        form: object = "bf16"
        if not isinstance(weight, Plain) and activations != "bf16":
            form = "fp8"
            if activations == "nvfp4" and is_nvfp4(weight):
                form = ("nvfp4", None if weight.in_gs is None else weight.in_gs.data_ptr())
        groups.setdefault(form, []).append(i)
    return groups


def _operand(x: Tensor, form: object, weight: Bare) -> tuple[Tensor, Tensor | None]:
    """x [T, K] in the form that a weight sees, and the global scale of each token, [T, 1] f32 or None."""
    if form == "bf16":
        return x, None
    if form == "fp8":
        return quant.round_fp8(x), None
    return quant.round_nvfp4(x, weight.in_gs)


def _multiply(
    x: Tensor,
    token_scale: Tensor | None,
    weights: Sequence[Bare],
    dtypes: Sequence[torch.dtype],
    *,
    groups: int = 1,
    overlap: bool = True,
) -> list[Tensor]:
    """The products of x [T, G K] in its final form with matrices (N, K)."""
    tokens, columns = x.shape[0], x.shape[1] // groups
    for weight in weights:
        n, k = shape_of(weight)
        assert k == columns and n % groups == 0, f"weight: expected ({groups} R, {columns}), found ({n}, {k})"
        assert k % 16 == 0, f"weight: expected K a multiple of 16, found ({n}, {k})"
        step = 32 if isinstance(weight, Fp8Block) else 16
        assert groups == 1 or n // groups % step == 0, f"weight: expected {groups} x {step} R rows, found {n}"
        assert groups <= MAX_GROUPS, f"x: expected at most {MAX_GROUPS} groups, found {groups}"
    if x.dtype == torch.float32 and not all(_is_f32(weight) for weight in weights):
        return _multiply_f32(x, token_scale, weights, dtypes, groups=groups, overlap=overlap)
    outs = [x.new_empty(tokens, shape_of(w)[0], dtype=d) for w, d in zip(weights, dtypes, strict=True)]
    if tokens == 0:
        return outs
    few = [i for i, weight in enumerate(weights) if tokens <= FEW_TOKENS and not _is_f32(weight)]
    for start in range(0, len(few), MAX_MATRICES):
        part = few[start : start + MAX_MATRICES]
        _launch_few(x, token_scale, [weights[i] for i in part], [outs[i] for i in part], groups, overlap)
    for i in set(range(len(weights))) - set(few):
        _launch_many(x, token_scale, weights[i], outs[i], groups)
    return outs


def _launch_few(
    x: Tensor,
    token_scale: Tensor | None,
    weights: Sequence[Bare],
    outs: Sequence[Tensor],
    groups: int,
    overlap: bool,
) -> None:
    order = sorted(range(len(weights)), key=lambda i: _kind(weights[i]))  # matrices of a format side by side
    data = [_data(weights[i]) for i in order]
    scales = [_scales(weights[i]) for i in order]
    _C.gemv_mma(
        x,
        token_scale,
        data,
        [codes if scale is None else scale for codes, scale in zip(data, scales, strict=True)],
        [outs[i] for i in order],
        [_kind(weights[i]) for i in order],
        [outs[i].shape[1] for i in order],
        x.shape[0],
        x.shape[1] // groups,
        groups,
        overlap,
    )


def _launch_many(x: Tensor, token_scale: Tensor | None, weight: Bare, out: Tensor, groups: int) -> None:
    tokens, columns, rows = x.shape[0], x.shape[1] // groups, out.shape[1] // groups
    if isinstance(weight, Plain):
        a = x.to(weight.w.dtype).view(tokens, groups, columns).transpose(0, 1)  # [G, T, K]
        b = weight.w.view(groups, rows, columns).transpose(1, 2)  # [G, K, R]
        y = torch.bmm(a, b, out_dtype=torch.float32) if weight.w.dtype == torch.bfloat16 else torch.bmm(a, b)
        out.view(tokens, groups, rows).copy_(y.transpose(0, 1))
        return
    gs = weight.gs if isinstance(weight, Packed) else None
    scales = weight.w_sf if isinstance(weight, Fp8Block) else None
    sizes = (_kind(weight), tokens, rows, columns, groups, x.shape[1], out.shape[1])
    _C.gemm_tiles(x, _data(weight), scales, token_scale, gs, out, *sizes)


def _multiply_f32(
    x: Tensor,
    token_scale: Tensor | None,
    weights: Sequence[Bare],
    dtypes: Sequence[torch.dtype],
    *,
    groups: int,
    overlap: bool,
) -> list[Tensor]:
    """x f32 as three bf16 terms: three times the tokens, sums in fp32."""
    scale = None if token_scale is None else token_scale.repeat(3, 1)
    f32 = [torch.float32] * len(weights)
    terms = torch.cat(bf16_terms(x))
    products = _multiply(terms, scale, weights, f32, groups=groups, overlap=overlap)
    sums = [y[2] + y[1] + y[0] for y in (product.unflatten(0, (3, -1)) for product in products)]
    return [y.to(dtype) for y, dtype in zip(sums, dtypes, strict=True)]


def bf16_terms(x: Tensor) -> tuple[Tensor, ...]:
    """Three bf16 tensors of eight bits each whose sum is x f32, but below 2^-110; the largest first."""
    terms, rest = [], x
    for _ in range(3):
        terms.append(rest.bfloat16())
        rest = (rest - terms[-1].float()).nan_to_num(0.0, 0.0, 0.0)  # of infinity nothing is left
    return tuple(terms)


def _is_f32(weight: Bare) -> bool:
    return isinstance(weight, Plain) and weight.w.dtype == torch.float32


def _kind(weight: Bare) -> int:
    """The format's number; an assertion for a 4-bit weight that was not packed."""
    assert isinstance(weight, Packed | Fp8Block | Plain), (
        f"weight: expected one that the loader packed (dsv4.ops.pack), found {type(weight).__name__}"
    )
    if isinstance(weight, Packed):
        return KINDS[weight.kind]
    return KINDS["fp8" if isinstance(weight, Fp8Block) else "bf16"]


def _data(weight: Bare) -> Tensor:
    return weight.data if isinstance(weight, Packed) else weight.w


def _scales(weight: Bare) -> Tensor | None:
    """What gemv_mma reads beside the codes: NVFP4's global scale, FP8's block scales."""
    return weight.gs if isinstance(weight, Packed) else getattr(weight, "w_sf", None)
