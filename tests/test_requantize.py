"""Re-quantising at load: which slots each mode takes, and that chunking changes nothing."""

import pytest
import torch

from dsv4.loading import requantize as module
from dsv4.loading.formats import FORMATS, quantize
from dsv4.loading.requantize import is_requantized, requantize
from dsv4.numerics import WEIGHTS
from dsv4.ops.formats import Nvfp4, Plain, dequantize

LINEARS = (
    *(f"attn.{leaf}" for leaf in ("wq_a", "wq_b", "wkv", "wo_a", "wo_b", "indexer.wq_b")),
    *(f"ffn.{leaf}" for leaf in ("gate", "shared_experts.w1", "shared_experts.w2", "shared_experts.w3")),
)
PLAIN_MATRICES = (
    *(f"attn.{prefix}compressor.{leaf}" for prefix in ("", "indexer.") for leaf in ("wkv", "wgate")),
    "attn.indexer.weights_proj",
)
NEVER = (
    *(f"ffn.{leaf}" for leaf in ("experts.1.w1", "experts.12.w2", "gate.bias", "gate.tid2eid")),
    *(f"attn.{leaf}" for leaf in ("q_norm", "attn_sink", "compressor.ape", "indexer.compressor.norm")),
    *("attn_norm", "hc_attn_fn", "e_proj", "h_proj", "norm", "hc_head_fn"),
)


@pytest.mark.parametrize("block", ["layers.12.", "mtp.0."])
def test_slots_of_each_mode(block: str) -> None:
    for mode in WEIGHTS:
        assert {is_requantized(block + name, mode) for name in LINEARS} == {mode != "stored"}
        assert {is_requantized(block + name, mode) for name in PLAIN_MATRICES} == {mode == "nvfp4-all"}
        assert not any(is_requantized(block + name, mode) for name in NEVER)
        assert is_requantized("head", mode) == (mode == "nvfp4-all")
        assert not any(is_requantized(name, mode) for name in ("embed", "norm", "hc_head_fn"))


@pytest.mark.parametrize("format", FORMATS)
def test_chunks_change_nothing(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK_BYTES", 4 * 160 * 128)
    weight = quantize(torch.randn(300, 160, generator=torch.Generator().manual_seed(4)), format)
    result = requantize("layers.0.attn.wkv", weight, "nvfp4")
    if isinstance(weight, Nvfp4):
        assert result is weight
    else:
        expected = quantize(dequantize(weight), "nvfp4")
        assert isinstance(result, Nvfp4) and result.in_gs is None
        for found, part in zip(result[:3], expected[:3], strict=True):
            assert found.dtype == part.dtype
            assert torch.equal(found.flatten().view(torch.uint8), part.flatten().view(torch.uint8))


def test_other_slots_and_zeros_and_odd_widths() -> None:
    weight = Plain(torch.zeros(2, 32))
    assert requantize("layers.0.attn.wkv", weight, "stored") is weight
    assert requantize("layers.0.ffn.experts.0.w1", weight, "nvfp4-all") is weight
    zeros = requantize("head", weight, "nvfp4-all")
    assert zeros.w_gs == 1 and not dequantize(zeros).any()
    with pytest.raises(ValueError, match="^head: .* multiple of 16, found 24"):
        requantize("head", Plain(torch.ones(2, 24)), "nvfp4-all")
