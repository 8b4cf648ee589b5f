"""What the card of the small model says about it, measured on held-out text."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dsv4.engine import load
from tools.tiny_model import TinyModel
from tools.tiny_steps import bits_per_byte, token_nats, windows

FAR = 512  # from this position on entries reach what the window does not


@torch.no_grad()
def measure(tiny: TinyModel, tokens: Tensor, text_bytes: int, length: int) -> dict[str, float]:
    """Bits per byte, use of compressed entries, coverage of the indexer, expert loads, MTP agreement."""
    trace = tiny.trace
    trace.training = trace.dense = False
    share = text_bytes / len(tokens)  # bytes a token, for parts of the text
    far = {}
    for masked in (False, True):
        trace.mask_entries = masked
        nats = [token_nats(tiny.model, text)[FAR:] for text, counted in windows(tokens, length)]
        far[masked] = float(torch.cat(nats).mean()) / math.log(2) / share if len(tokens) > FAR else 0.0
    trace.mask_entries = False
    loads = {prefix: torch.zeros_like(stack.load) for prefix, stack in tiny.stacks.items()}
    covered, agreed, compared = torch.zeros(2, dtype=torch.float64), 0, 0
    trace.measure = True
    for text, _ in windows(tokens, length):
        trace.clear()
        same = _agreement(tiny, text)
        agreed, compared = agreed + int(same.sum()), compared + len(same)
        for prefix, stack in tiny.stacks.items():
            loads[prefix] += stack.load
        for picked, random in trace.coverage:
            covered += torch.tensor([float(picked), float(random)], dtype=torch.float64)
    trace.measure = False
    scored = [load / load.sum() for prefix, load in loads.items() if _by_score(tiny, prefix)]
    return {
        "bits_per_byte_trained": bits_per_byte(tiny.model, tokens, text_bytes, length),
        "far_bits_per_byte": far[False],
        "far_bits_per_byte_without_entries": far[True],
        "entries_gain": far[True] - far[False],
        "index_coverage_over_random": float(covered[0] / covered[1]) if covered[1] else 0.0,
        "least_expert_share_of_tokens": min(float(load.min()) for load in scored)
        * tiny.config.experts_per_token,
        "mtp_agreement": agreed / compared,
    }


def _agreement(tiny: TinyModel, text: Tensor) -> Tensor:
    """Whether the block's first choice for a position is the model's own, [T - 1]."""
    inputs = F.pad(text[:-1], (1, 0), value=tiny.config.bos_id)
    x = tiny.model.forward(inputs, tiny.model.new_cache(len(text)))
    own = tiny.model.logits(x).argmax(dim=-1)
    _, drafts = tiny.model.draft(x, text, tiny.model.new_draft_cache(len(text)))
    return drafts.argmax(dim=-1)[:-1] == own[1:]


def _by_score(tiny: TinyModel, prefix: str) -> bool:
    return prefix.replace("experts.", "gate.bias") in tiny.buffers


def measure_stored(directory: Path, tokens: Tensor, text_bytes: int, length: int) -> float:
    """Held-out bits per byte of an exported checkpoint, in fp32 between operations."""
    engine = load(directory, device=tokens.device.type, dtype="float32", max_context=length)
    with torch.no_grad():
        return bits_per_byte(engine.model, tokens, text_bytes, length)


def card(numbers: Mapping[str, float], facts: Mapping[str, Any]) -> str:
    """README.md of the exported model."""
    rows = "\n".join(f"| {name.replace('_', ' ')} | {value:.4f} |" for name, value in numbers.items())
    return f"""# A small DeepSeek-V4

A DeepSeek-V4 of {facts["parameters"] / 1e6:.1f} million parameters with every kind of layer of the large
ones, for tests of this project. It writes lines that look like Shakespeare's plays and is good for nothing
else.

## Data
The file `{facts["text"]}` ({facts["text_bytes"]} bytes; tinyshakespeare, plays by William Shakespeare,
public domain). The last 10 % was held out. The byte-level BPE of {facts["vocab_size"]} entries saw the
other 90 % only.

## Training
`tools/train_tiny.py`: {facts["steps"]} steps of {facts["length"]} tokens in {facts["minutes"]:.1f} minutes
on {facts["device"]}, with the reference layers under autograd in fp32 (TF32 products), dropout
{facts["dropout"]}, BPE dropout {facts["bpe_dropout"]}. The weights are a moving average; of the averages
evaluated during training, the one with the fewest held-out bits per byte was kept, so the held-out text
chose the moment to stop. The indexers learned the attention over compressed entries, first with dense
attention, then with top-k.

## Numbers
On the held-out text, in windows of {facts["length"]} tokens after BOS:

| | |
|---|---|
{rows}

"far" is from position {FAR} of a window on. Coverage is the attention mass of the indexers' picks over that
of a random choice of as many entries. "stored" is this folder; "bf16" the same weights in BF16.

## Storage
NVIDIA's layout: routed experts NVFP4 with `input_scale` calibrated on training text, attention and shared
experts FP8 blocks, MTP experts MXFP4, router, compressors, embedding and head BF16, hyper-connections FP32.

## Licence
The weights are under this project's MIT licence; the training text is in the public domain.
"""
