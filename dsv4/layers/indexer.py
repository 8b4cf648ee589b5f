"""The lightning indexer of a CSA layer: its own keys, queries from the query latent, top-k choice."""

from typing import NamedTuple

from torch import Tensor

from dsv4.cache import CompressorState
from dsv4.config import CSA_RATIO, ModelConfig
from dsv4.layers.compressor import Compressor
from dsv4.layers.weights import Weights
from dsv4.numerics import Numerics
from dsv4.ops.indexer import choose_entries
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

    def chooses(self, entries: int) -> bool:
        """Whether so many entries are more than a query takes; if not, none is scored."""
        return entries > self.top_k

    def forward(
        self, products: IndexProducts, positions: Tensor, visible: Tensor, state: CompressorState, start: int
    ) -> Tensor | None:
        """The chosen entries [T, top_k] i32 of each query (-1: none), or None when all visible ones are.

        visible [T] i64. The keys of the entries that the tokens complete are stored in any case.
        """
        keys = self.compressor.forward(products.kv, products.gate, state, start)  # [n, Di]
        keys = state.extend(self.rounded(keys, state), start + positions.shape[0])  # [C, Di or 68]
        return self.choose(products, positions, visible, keys)

    def step(
        self, products: IndexProducts, positions: Tensor, visible: Tensor, state: CompressorState
    ) -> Tensor | None:
        """``forward`` of up to ``MAX_STEP`` tokens, over the whole table, by positions on the device."""
        keys, slots = self.compressor.step(products.kv, products.gate, state, positions)
        state.store(self.rounded(keys, state), slots)
        return self.choose(products, positions, visible, state.rows)

    def rounded(self, keys: Tensor, state: CompressorState) -> Tensor:
        """Keys [n, Di] as ``state`` takes them: records rotate and round what they store."""
        return round_index(keys) if self.trained and not state.has_records else keys

    def choose(
        self, products: IndexProducts, positions: Tensor, visible: Tensor, keys: Tensor
    ) -> Tensor | None:
        """The chosen of ``keys`` [C, Di or 68], which are those of all entries; None: every visible one."""
        if products.q is None:
            return None
        q, weights = self.queries(products.q, products.weights, positions)
        return choose_entries(q, keys, weights, visible, top_k=self.top_k)

    def queries(self, q: Tensor, weights: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The finished queries [T, Hi, Di] of products q [T, Hi Di], and their weights with their factor."""
        q = apply_rope(q.unflatten(-1, (self.heads, self.head_dim)), positions, self.inv_freq)  # [T, Hi, Di]
        return round_index(q) if self.trained else q, weights * (self.head_dim * self.heads) ** -0.5
