"""The attention sublayer: projections, window and compressed KV, core attention, grouped output."""

import torch
from torch import Tensor

from dsv4.cache import LayerCache
from dsv4.config import CSA_RATIO, ModelConfig
from dsv4.layers.compressor import Compressor
from dsv4.layers.indexer import Indexer, IndexProducts
from dsv4.layers.rope import inverse_frequencies
from dsv4.layers.weights import Weights
from dsv4.numerics import Numerics
from dsv4.ops.attention import attend
from dsv4.ops.gemm import grouped_linear, linear, linear_stack
from dsv4.ops.norm import rms_norm
from dsv4.ops.quant import round_kv
from dsv4.ops.rope import apply_rope, rms_norm_rope


class Attention:
    """Window-only, CSA or HCA attention by compress ratio. Docs: docs/model.md 2.6 to 2.12."""

    def __init__(self, config: ModelConfig, numerics: Numerics, ratio: int, weights: Weights) -> None:
        self.config = config
        self.ratio = ratio
        self.activations = numerics.activations
        self.trained = numerics.trained
        self.sink = weights.tensor("attn_sink")
        self.inv_freq = inverse_frequencies(config, ratio, self.sink.device)
        self.wq_a = weights.matrix("wq_a")
        self.q_norm = weights.tensor("q_norm")
        self.wq_b = weights.matrix("wq_b")
        self.wkv = weights.matrix("wkv")
        self.kv_norm = weights.tensor("kv_norm")
        self.wo_a = weights.matrix("wo_a")
        self.wo_b = weights.matrix("wo_b")
        self.compressor: Compressor | None = None
        self.indexer: Indexer | None = None
        if ratio:
            self.compressor = Compressor(config, numerics, ratio, self.inv_freq, weights.scope("compressor"))
        if ratio == CSA_RATIO:
            self.indexer = Indexer(config, numerics, self.inv_freq, weights.scope("indexer"))
        # The matrices that read u, one launch at decode: wq_a, wkv, the compressor's, the indexer's.
        owners = [owner for owner in (self.compressor, self.indexer) if owner is not None]
        pooled = [matrix for owner in owners for matrix in owner.matrices]
        self.from_u = (self.wq_a, self.wkv, *pooled)
        self.dtypes_from_u = (None, None, *[torch.float32] * len(pooled))

    def forward(self, u: Tensor, positions: Tensor, cache: LayerCache, start: int) -> Tensor:
        """u [T, D] of positions start .. start + T - 1 -> [T, D]; extends ``cache``."""
        eps, heads = self.config.norm_eps, self.config.num_heads
        qa, kv, *pooled = linear_stack(
            u, self.from_u, activations=self.activations, out_dtypes=self.dtypes_from_u
        )
        qa = rms_norm(qa, self.q_norm, eps=eps)  # [T, q_lora]
        q, index_q = self._queries(qa, start + u.shape[0])
        q = rms_norm_rope(q.unflatten(-1, (heads, -1)), None, positions, self.inv_freq, eps=eps)  # [T, H, Dh]
        kv = self._round(rms_norm_rope(kv, self.kv_norm, positions, self.inv_freq, eps=eps))  # [T, Dh]
        window_kv = cache.window.extend(kv, start)  # [P + T, Dh]
        compressed, visible, selected = self._compressed(pooled, index_q, positions, cache, start)
        o = attend(
            q,
            window_kv,
            self.sink,
            window=self.config.window,
            compressed=compressed,
            visible=visible,
            selected=selected,
        )  # [T, H, Dh]
        o = apply_rope(o, positions, self.inv_freq, inverse=True)
        groups = o.flatten(1).unflatten(-1, (self.config.o_groups, -1))  # [T, G, H Dh / G]
        z = grouped_linear(groups, self.wo_a, activations=self.activations)  # [T, G R]
        return linear(z, self.wo_b, activations=self.activations)

    def _queries(self, qa: Tensor, end: int) -> tuple[Tensor, Tensor | None]:
        """q [T, H Dh] of the latent qa [T, q_lora]; the indexer's [T, Hi Di] if it ``chooses``, else None."""
        if self.indexer is None or not self.indexer.chooses(end):
            return linear(qa, self.wq_b, activations=self.activations), None
        both = (self.wq_b, self.indexer.wq_b)
        q, index_q = linear_stack(qa, both, activations=self.activations, out_dtypes=(None, None))
        return q, index_q

    def _compressed(
        self,
        pooled: list[Tensor],
        index_q: Tensor | None,
        positions: Tensor,
        cache: LayerCache,
        start: int,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """All entries so far [C, Dh], how many each query sees [T], and the indexer's choice [T, I].

        pooled: the products of u with the compressor's and the indexer's matrices. Entries are emitted before
        attention: an entry is visible to the token that completes it.
        """
        if self.compressor is None:
            return None, None, None
        assert cache.compressed is not None
        kv, gate, *indexed = pooled
        entries = self._round(self.compressor.forward(kv, gate, cache.compressed, start))
        entries = cache.compressed.entries.append(entries)
        visible = torch.div(positions + 1, self.ratio, rounding_mode="floor")  # [T]
        if self.indexer is None:
            return entries, visible, None
        assert cache.index is not None
        products = IndexProducts(*indexed, index_q)
        return entries, visible, self.indexer.forward(products, positions, visible, cache.index, start)

    def _round(self, kv: Tensor) -> Tensor:
        return round_kv(kv, rope_dim=self.config.rope_dim) if self.trained else kv
