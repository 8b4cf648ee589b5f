"""One layer of the model: attention and mixture of experts, each between hyper-connections."""

from torch import Tensor

from dsv4.cache import LayerCache
from dsv4.config import ModelConfig
from dsv4.layers.attention import Attention
from dsv4.layers.mhc import Entry, HyperConnection
from dsv4.layers.moe import Moe
from dsv4.layers.weights import Weights
from dsv4.numerics import Numerics


class Block:
    """Docs: docs/model.md 2.2. Between two sublayers, of one block or of two, stands one hyper-connection."""

    def __init__(
        self, config: ModelConfig, numerics: Numerics, *, ratio: int, hashed: bool, weights: Weights
    ) -> None:
        self.attn_hc = HyperConnection(config, "attn", weights)
        self.ffn_hc = HyperConnection(config, "ffn", weights)
        self.attn = Attention(config, numerics, ratio, weights.scope("attn"))
        self.ffn = Moe(config, numerics, hashed, weights.scope("ffn"))

    def forward(
        self, entry: Entry, token_ids: Tensor, positions: Tensor, cache: LayerCache, start: int
    ) -> tuple[Entry, Tensor]:
        """From the way into attention to the way into the experts and their output y [T, D].

        token_ids [T], positions [T] = start .. start + T - 1. The next block's ``attn_hc.follow`` takes both
        results; after the last block, ``Entry.leave``.
        """
        y = self.attn.forward(entry.u, positions, cache, start)
        entry = self.ffn_hc.follow(entry, y)
        return entry, self.ffn.forward(entry.u, token_ids)


def run_blocks(
    x: Tensor,
    blocks: list[Block],
    token_ids: Tensor,
    positions: Tensor,
    caches: list[LayerCache],
    start: int,
) -> Tensor:
    """Streams x [T, M, D] through a stack of blocks -> [T, M, D]."""
    entry, y = blocks[0].attn_hc.enter(x), None
    for block, cache in zip(blocks, caches, strict=True):
        if y is not None:
            entry = block.attn_hc.follow(entry, y)
        entry, y = block.forward(entry, token_ids, positions, cache, start)
    return entry.leave(y)
