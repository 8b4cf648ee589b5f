"""From trained weights to a checkpoint folder: tokenizer, calibration, storage formats, writing."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import AddedToken
from torch import Tensor
from torch.nn import functional as F

from dsv4.config import ModelConfig
from dsv4.loading.formats import encode, nonzero_scale, quantize
from dsv4.loading.mapping import all_slots
from dsv4.loading.synthetic import deepseek_config, layout_of, make_tokenizer
from dsv4.loading.writer import Entry, write_checkpoint
from dsv4.ops import quant
from dsv4.tokenizer import BOS, EOS, PAD
from tools.tiny_model import TinyModel

LARGEST = 6.0 * 448.0  # of NVFP4, in units of the global scale
CALIBRATION_TOKENS = 16384


def train_tokenizer(text: str, vocab_size: int) -> tokenizers.Tokenizer:
    """A byte-level BPE of ``vocab_size`` entries at most: three specials, bytes, merges, V4's tokens."""
    special = make_tokenizer(1024).get_added_tokens_decoder()
    later = [special[i] for i in sorted(special) if special[i].content not in (BOS, EOS, PAD)]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - len(later),
        special_tokens=[AddedToken(token, normalized=False) for token in (BOS, EOS, PAD)],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([text], trainer)
    for token in later:
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
    return backend


def encode_text(
    backend: tokenizers.Tokenizer, text: str, *, variants: int = 1, dropout: float = 0.0
) -> Tensor:
    """The text's ids; ``variants`` times, all but the first with merges left out at random."""
    pieces = [backend.encode(text, add_special_tokens=False).ids]
    if dropout:
        backend.model.dropout = dropout
        pieces += [backend.encode(text, add_special_tokens=False).ids for _ in range(variants - 1)]
        backend.model.dropout = None
    return torch.tensor([token for piece in pieces for token in piece])


@torch.no_grad()
def calibrate(tiny: TinyModel, tokens: Tensor, length: int) -> dict[str, Tensor]:
    """The largest input of each routed expert over the first ``CALIBRATION_TOKENS``, [2, E] by layer:
    of w1 and w3, and of w2. An expert that was never chosen gets its layer's largest."""
    tiny.trace.calibrate = True
    for stack in tiny.stacks.values():
        stack.amax.zero_()
    for text in tokens[:CALIBRATION_TOKENS].split(length):
        if len(text) == length:
            inputs = F.pad(text[:-1], (1, 0), value=tiny.config.bos_id)
            tiny.trace.clear()
            tiny.model.forward(inputs, tiny.model.new_cache(length))
    tiny.trace.calibrate = False
    found = {}
    for prefix, stack in tiny.stacks.items():
        largest = stack.amax.amax(dim=1, keepdim=True).expand_as(stack.amax)
        found[prefix] = torch.where(stack.amax > 0, stack.amax, largest).cpu()
    return found


def export(
    slots: Mapping[str, Tensor],
    raw: Mapping[str, Any],
    tokenizer: str,
    directory: Path,
    *,
    format: str = "nvidia",
    amax: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the weights of ``slots`` (by slot name) in a storage policy of ``loading.synthetic``.

    ``raw`` is the config.json without quantisation, ``amax`` comes from ``calibrate`` and is needed where
    routed experts become NVFP4. Raises as ``write_checkpoint`` does.
    """
    config = ModelConfig.from_dict(dict(raw))
    entries = []
    for slot in all_slots(config, mtp=True):
        value = slots[slot.name].detach().cpu()
        layout = layout_of(slot, format)
        if layout is None:
            kept = {"matrix": torch.bfloat16, "norm": torch.bfloat16, "ids": torch.int64}
            entries.append(Entry.of(slot.stem, value.to(kept.get(slot.kind, torch.float32))))
            continue
        scales = {}
        if layout.format == "nvfp4":
            assert amax is not None, "NVFP4 experts need calibrated inputs"
            scales = _expert_scales(slot.name, slots, amax)
        weight = quantize(value.float(), layout.format, **scales)
        parts = encode(weight, layout.format)
        entries += [Entry.of(slot.name + suffix, tensor) for suffix, tensor in parts.items()]
    stated = {key: value for key, value in deepseek_config(raw, config, format).items() if key != "synthetic"}
    write_checkpoint(directory, entries, config=stated, tokenizer=tokenizer)


def _expert_scales(name: str, slots: Mapping[str, Tensor], amax: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Global and input scale of a routed expert's matrix; w1 and w3 share theirs."""
    prefix, expert, matrix = name.rpartition("experts.")[0] + "experts.", *name.split(".")[-2:]
    names = [name] if matrix == "w2" else [f"{prefix}{expert}.{w}" for w in ("w1", "w3")]
    scale = torch.stack(
        [quant.nvfp4_global_scale(slots[n].detach().cpu().float(), per_token=False) for n in names]
    ).amax()
    inputs = amax[prefix][1 if matrix == "w2" else 0, int(expert)]
    return {"global_scale": nonzero_scale(scale), "input_scale": nonzero_scale(inputs / LARGEST)}
