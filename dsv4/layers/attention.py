"""The attention sublayer: projections, window and compressed KV, core attention, grouped output."""

import torch
from torch import Tensor

from dsv4.cache import LayerCache, plain_rows
from dsv4.config import CSA_RATIO, ModelConfig
from dsv4.layers.compressor import Compressor
from dsv4.layers.indexer import Indexer, IndexProducts
from dsv4.layers.rope import inverse_frequencies
from dsv4.layers.weights import Weights
from dsv4.numerics import Numerics
from dsv4.ops.attention import attend, attend_step
from dsv4.ops.formats import MAX_STEP
from dsv4.ops.gemm import grouped_linear, linear, linear_stack
from dsv4.ops.norm import rms_norm
from dsv4.ops.quant import round_kv
from dsv4.ops.rope import rms_norm_rope


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
        """u [T, D] of positions start .. start + T - 1 -> [T, D]; extends ``cache``.

        Of up to ``MAX_STEP`` tokens the position is read on the device alone, so that a CUDA graph of the
        step can be replayed at any other: ``start`` is then not used.
        """
        eps, heads, tokens = self.config.norm_eps, self.config.num_heads, u.shape[0]
        is_step = tokens <= MAX_STEP
        qa, kv, *pooled = linear_stack(
            u, self.from_u, activations=self.activations, out_dtypes=self.dtypes_from_u
        )
        qa = rms_norm(qa, self.q_norm, eps=eps)  # [T, q_lora]
        q, index_q = self._queries(qa, cache, None if is_step else start + tokens)
        q = rms_norm_rope(q.unflatten(-1, (heads, -1)), None, positions, self.inv_freq, eps=eps)  # [T, H, Dh]
        kv = rms_norm_rope(kv, self.kv_norm, positions, self.inv_freq, eps=eps)  # [T, Dh]
        if is_step:
            o = self._step(q, kv, pooled, index_q, positions, cache)  # [T, H, Dh]
        else:
            o = self._chunk(q, kv, pooled, index_q, positions, cache, start)  # [T, H, Dh]
        groups = o.flatten(1).unflatten(-1, (self.config.o_groups, -1))  # [T, G, H Dh / G]
        z = grouped_linear(groups, self.wo_a, activations=self.activations)  # [T, G R]
        return linear(z, self.wo_b, activations=self.activations)

    def _queries(self, qa: Tensor, cache: LayerCache, end: int | None) -> tuple[Tensor, Tensor | None]:
        """q [T, H Dh] of the latent qa [T, q_lora]; the indexer's [T, Hi Di] if it ``chooses``, else None.

        It has ``end`` tokens to choose among or, without a number, as many as the cache may come to hold.
        """
        if self.indexer is not None:
            assert cache.index is not None
            entries = cache.index.rows.shape[0] if end is None else end // self.ratio
            if self.indexer.chooses(entries):
                both = (self.wq_b, self.indexer.wq_b)
                q, index_q = linear_stack(qa, both, activations=self.activations, out_dtypes=(None, None))
                return q, index_q
        return linear(qa, self.wq_b, activations=self.activations), None

    def _step(
        self,
        q: Tensor,
        kv: Tensor,
        pooled: list[Tensor],
        index_q: Tensor | None,
        positions: Tensor,
        cache: LayerCache,
    ) -> Tensor:
        """Attention of q [T, H, Dh] on the cache's tables, after the tokens' rows kv [T, Dh] and the entries
        that they complete have been stored: an entry is visible to the token that completes it.

        pooled: the products of u with the compressor's and the indexer's matrices.
        """
        cache.window.store(kv if cache.window.has_records else self._round(kv), positions)
        compressed, selected = None, None
        if self.compressor is not None:
            assert cache.compressed is not None
            gate, state = pooled[1], cache.compressed
            entries, slots = self.compressor.step(pooled[0], gate, state, positions)
            state.store(entries if state.has_records else self._round(entries), slots)
            compressed = state.rows
        if self.indexer is not None:
            assert cache.index is not None
            products = IndexProducts(*pooled[2:], index_q)
            selected = self.indexer.step(products, positions, self._visible(positions), cache.index)
        return attend_step(
            q,
            cache.window.rows,
            self.sink,
            positions,
            self.inv_freq,
            window=self.config.window,
            compressed=compressed,
            ratio=self.ratio,
            selected=selected,
        )

    def _chunk(
        self,
        q: Tensor,
        kv: Tensor,
        pooled: list[Tensor],
        index_q: Tensor | None,
        positions: Tensor,
        cache: LayerCache,
        start: int,
    ) -> Tensor:
        """As ``_step``, on plain rows, of more tokens, from position ``start`` on."""
        window_kv = cache.window.extend(self._round(kv), start)  # [P + T, Dh]
        compressed, visible, selected = None, None, None
        end = start + q.shape[0]
        if self.compressor is not None:
            assert cache.compressed is not None
            gate, state = pooled[1], cache.compressed
            entries = self.compressor.forward(pooled[0], gate, state, start)
            rows = state.extend(entries if state.has_records else self._round(entries), end)
            compressed = plain_rows(rows)  # [C, Dh]
            visible = self._visible(positions)
        if self.indexer is not None:
            assert cache.index is not None and visible is not None
            products = IndexProducts(*pooled[2:], index_q)
            selected = self.indexer.forward(products, positions, visible, cache.index, start)
        return attend(
            q,
            window_kv,
            self.sink,
            positions,
            self.inv_freq,
            window=self.config.window,
            compressed=compressed,
            visible=visible,
            selected=selected,
        )

    def _visible(self, positions: Tensor) -> Tensor:
        """How many entries each query sees, [T] i64."""
        return torch.div(positions + 1, self.ratio, rounding_mode="floor")

    def _round(self, kv: Tensor) -> Tensor:
        return round_kv(kv, rope_dim=self.config.rope_dim) if self.trained else kv
