"""From a checked checkpoint to a model, one layer at a time."""

import torch
from torch import Tensor

from dsv4.layers.block import Block
from dsv4.layers.mtp import MtpBlock
from dsv4.layers.weights import Weights
from dsv4.loading.checkpoint import Checkpoint
from dsv4.loading.mapping import Slot, layer_slots, mtp_slots, trunk_slots
from dsv4.loading.repack import repack
from dsv4.loading.requantize import requantize
from dsv4.model import Transformer
from dsv4.numerics import Numerics
from dsv4.ops.formats import MatrixCache, Plain, Weight
from dsv4.progress import Progress


def assemble(
    checkpoint: Checkpoint,
    numerics: Numerics,
    device: torch.device,
    *,
    cache_dequantised_mb: int,
    progress: Progress | None = None,
) -> Transformer:
    """Read every slot once and build the model on ``device``.

    Each layer's weights are checked, moved, re-quantised and, on CUDA, packed before the next layer is read,
    so the host holds at most the model and one layer more, a GPU the model and one slab of packed matrices.
    On the CPU up to ``cache_dequantised_mb`` MiB of dequantised matrices are kept. Raises ``ValueError``
    naming file and tensor for bad values.
    """
    config = checkpoint.config
    matrices = MatrixCache(cache_dequantised_mb << 20) if device.type == "cpu" else None
    done = 0

    def read(slots: list[Slot]) -> Weights:
        nonlocal done
        loaded = checkpoint.load(slots, device)
        done += sum(checkpoint.stored[slot.name].nbytes for slot in slots)
        if progress is not None:
            progress(done, checkpoint.nbytes)
        for name in loaded:  # in place: what is replaced is freed at once
            loaded[name] = _prepare(name, loaded[name], numerics, matrices)
        if device.type == "cuda":
            repack(loaded)
        return Weights(loaded)

    blocks = []
    for layer in range(config.num_layers):
        weights = read(layer_slots(config, layer))
        hashed = config.is_hash_layer(layer)
        blocks.append(
            Block(
                config,
                numerics,
                ratio=config.ratio(layer),
                hashed=hashed,
                weights=weights.scope(f"layers.{layer}"),
            )
        )
        weights.assert_empty()
    mtp = None
    if checkpoint.mtp:
        weights = read(mtp_slots(config))
        mtp = MtpBlock(config, numerics, weights.scope("mtp.0"))
        weights.assert_empty()
    weights = read(trunk_slots(config))
    model = Transformer(config, numerics, weights, blocks, mtp)
    weights.assert_empty()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what matrices were before they were packed
    return model


def _prepare(
    name: str, value: Weight | Tensor, numerics: Numerics, matrices: MatrixCache | None
) -> Weight | Tensor:
    if isinstance(value, Tensor):
        return value
    value = requantize(name, value, numerics.weights)
    already_fp32 = isinstance(value, Plain) and value.w.dtype == torch.float32
    return value if matrices is None or already_fp32 else matrices.wrap(value)
