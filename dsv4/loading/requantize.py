"""Weights re-quantised to NVFP4 at load: which slots each mode takes, and how.

Routed experts stay as stored in every mode, and so does whatever is no matrix product: embedding,
norms, position biases, mHC, sinks, selection biases (docs/model.md 4.2).
"""

import re
from collections.abc import Iterator

import torch

from dsv4.loading.formats import nonzero_scale
from dsv4.numerics import WEIGHTS
from dsv4.ops import quant
from dsv4.ops.formats import (
    FP8_BLOCK,
    NVFP4_BLOCK,
    Fp8Block,
    Mxfp4,
    Nvfp4,
    Plain,
    Weight,
    dequantize,
    shape_of,
    stored,
)

_BLOCK = r"(layers\.\d+|mtp\.0)\."
_LINEARS = (
    rf"{_BLOCK}attn\.(wq_a|wq_b|wkv|wo_a|wo_b)",
    rf"{_BLOCK}attn\.indexer\.wq_b",
    rf"{_BLOCK}ffn\.shared_experts\.w[123]",
    rf"{_BLOCK}ffn\.gate",
)
_PLAIN_MATRICES = (
    rf"{_BLOCK}attn\.(indexer\.)?compressor\.(wkv|wgate)",
    rf"{_BLOCK}attn\.indexer\.weights_proj",
    "head",
)
_TAKEN = {
    "stored": None,
    "nvfp4": re.compile("|".join(_LINEARS)),
    "nvfp4-all": re.compile("|".join(_LINEARS + _PLAIN_MATRICES)),
}
_CHUNK_BYTES = 16 << 20  # of fp32 values

assert tuple(_TAKEN) == WEIGHTS, f"requantize knows {tuple(_TAKEN)}, numerics {WEIGHTS}"


def is_requantized(name: str, mode: str) -> bool:
    """Whether ``mode`` (one of ``numerics.WEIGHTS``) wants slot ``name`` in NVFP4, however it is stored."""
    taken = _TAKEN[mode]
    return taken is not None and taken.fullmatch(name) is not None


def requantize(name: str, weight: Weight, mode: str) -> Weight:
    """``weight`` of slot ``name`` as ``mode`` wants it.

    A slot the mode takes becomes NVFP4 with its own global scale amax / 2688, from the dequantised
    fp32 matrix; one that is NVFP4 already, and any other slot, is returned as it is. Raises
    ``ValueError`` for a width that is no multiple of 16. Source: docs/model.md 4.2.
    """
    inner = stored(weight)
    if isinstance(inner, Nvfp4) or not is_requantized(name, mode):
        return weight
    _, k = shape_of(inner)
    if k % NVFP4_BLOCK:
        raise ValueError(
            f"{name}: weights={mode!r} needs a width that is a multiple of {NVFP4_BLOCK}, found {k}"
        )
    scales = [quant.nvfp4_global_scale(dequantize(rows), per_token=False) for rows in _row_chunks(inner)]
    global_scale = nonzero_scale(torch.stack(scales).amax())
    chunks = [quant.quantize_nvfp4(dequantize(rows), global_scale) for rows in _row_chunks(inner)]
    codes, block_scales = zip(*chunks, strict=True)
    return Nvfp4(torch.cat(codes), _cat_bytes(block_scales), global_scale)


def _row_chunks(weight: Plain | Mxfp4 | Fp8Block) -> Iterator[Plain | Mxfp4 | Fp8Block]:
    """Views of consecutive rows, whole FP8 blocks each, small enough to dequantise."""
    n, k = shape_of(weight)
    rows = max(_CHUNK_BYTES // (4 * k) // FP8_BLOCK, 1) * FP8_BLOCK
    for start in range(0, n, rows):
        stop = min(start + rows, n)
        if isinstance(weight, Plain):
            yield Plain(weight.w[start:stop])
        elif isinstance(weight, Mxfp4):
            yield Mxfp4(weight.w[start:stop], weight.w_sf[start:stop])
        else:
            blocks = slice(start // FP8_BLOCK, -(-stop // FP8_BLOCK))
            yield Fp8Block(weight.w[start:stop], weight.w_sf[blocks])


def _cat_bytes(scales: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Concatenate fp8 tensors by their bytes."""
    return torch.cat([scale.view(torch.uint8) for scale in scales]).view(torch.float8_e4m3fn)
