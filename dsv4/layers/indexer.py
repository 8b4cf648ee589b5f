"""The lightning indexer of a CSA layer: its own keys, queries from the query latent, top-k choice."""

from typing import NamedTuple

from torch import Tensor

from dsv4.cache import CompressorState
from dsv4.config import CSA_RATIO, ModelConfig
from dsv4.layers.compressor import Compressor
from dsv4.layers.weights import Weights
from dsv4.numerics import Numerics
from dsv4.ops.indexer import index_scores, select_topk
from dsv4.ops.quant import round_index
from dsv4.ops.rope import apply_rope


class IndexProducts(NamedTuple):
    """What an indexer reads of T tokens: products of their input u and query latent qa with its matrices."""

    kv: Tensor  # [T, 2 Di] f32
    gate: Tensor  # [T, 2 Di] f32
    weights: Tensor  # [T, Hi] f32, without their factor
    q: Tensor | None  # [T, Hi Di], of qa; None where every visible entry is chosen


class Indexer:
    """Its owner multiplies u with ``matrices`` and, where it ``chooses``, qa with ``wq_b``.

    Docs: docs/model.md 2.11.
    """

    def __init__(self, config: ModelConfig, numerics: Numerics, inv_freq: Tensor, weights: Weights) -> None:
        self.heads = config.index_heads
        self.head_dim = config.index_head_dim
        self.top_k = config.index_topk
        self.inv_freq = inv_freq
        self.trained = numerics.trained
        self.wq_b = weights.matrix("wq_b")
        self.weights_proj = weights.matrix("weights_proj")
        self.compressor = Compressor(config, numerics, CSA_RATIO, inv_freq, weights.scope("compressor"))
        self.matrices = (*self.compressor.matrices, self.weights_proj)

    def chooses(self, tokens: int) -> bool:
        """Whether so many tokens have more entries than a query takes; if not, none is scored."""
        return tokens // CSA_RATIO > self.top_k

    def forward(
        self, products: IndexProducts, positions: Tensor, visible: Tensor, state: CompressorState, start: int
    ) -> Tensor | None:
        """The chosen entries [T, top_k] of each query (-1: none), or None when all visible ones are.

        visible [T] i64. The keys of the entries that the tokens complete are stored in any case.
        """
        keys = self.compressor.forward(products.kv, products.gate, state, start)  # [n, Di]
        keys = state.entries.append(round_index(keys) if self.trained else keys)  # [C, Di]
        if products.q is None:
            return None
        scores = self.scores(products.q, products.weights, positions, keys)
        return select_topk(scores, visible, top_k=self.top_k)

    def scores(self, q: Tensor, weights: Tensor, positions: Tensor, keys: Tensor) -> Tensor:
        """The score of every key [C, Di] for every query, [T, C] f32, future entries included."""
        q = apply_rope(q.unflatten(-1, (self.heads, self.head_dim)), positions, self.inv_freq)  # [T, Hi, Di]
        q = round_index(q) if self.trained else q
        return index_scores(q, keys, weights * (self.head_dim * self.heads) ** -0.5)
