"""The transformer: embedding, blocks, head. The main path; no kernels and no loading in here."""

import torch
from torch import Tensor

from dsv4.cache import RowFormat, SequenceCache
from dsv4.config import WINDOW_ONLY, ModelConfig
from dsv4.layers.block import Block, run_blocks
from dsv4.layers.mhc import HyperHead
from dsv4.layers.mtp import MtpBlock
from dsv4.layers.weights import Weights
from dsv4.numerics import Numerics
from dsv4.ops.embed import embed_streams
from dsv4.ops.formats import Plain, stored
from dsv4.ops.gemm import linear
from dsv4.ops.norm import rms_norm
from dsv4.ops.sampling import ScreenedHead, argmax_head, screen_head


class Transformer:
    """DeepSeek-V4's trunk and, if given, its MTP block. Docs: docs/model.md section 2."""

    def __init__(
        self,
        config: ModelConfig,
        numerics: Numerics,
        trunk: Weights,
        blocks: list[Block],
        mtp: MtpBlock | None = None,
    ) -> None:
        self.config = config
        self.dtype = numerics.torch_dtype
        self.numerics = numerics
        self.activations = numerics.activations
        self.embed = trunk.tensor("embed")
        self.norm = trunk.tensor("norm")
        self.head = trunk.matrix("head")
        self.screened: ScreenedHead | None = None
        self.hc_head = HyperHead(config, trunk)
        self.blocks = blocks
        self.mtp = mtp

    @property
    def device(self) -> torch.device:
        return self.embed.device

    def new_cache(self, max_context: int) -> SequenceCache:
        """Buffers for one sequence of at most ``max_context`` tokens."""
        return self._cache(self.config.compress_ratios, max_context)

    def new_draft_cache(self, max_context: int) -> SequenceCache:
        """The MTP block's own buffers for one sequence."""
        return self._cache((WINDOW_ONLY,), max_context)

    def _cache(self, ratios: tuple[int, ...], max_context: int) -> SequenceCache:
        form = RowFormat.of(self.config, self.numerics, self.device)
        return SequenceCache(self.config, ratios, max_context=max_context, form=form, device=self.device)

    def forward(self, token_ids: Tensor, cache: SequenceCache) -> Tensor:
        """The streams [T, M, D] after the last block for token_ids [T], which continue ``cache``."""
        start, tokens = cache.position, token_ids.shape[0]
        cache.require(tokens)
        positions = torch.arange(start, start + tokens, device=token_ids.device)
        x = embed_streams(token_ids, self.embed, num_streams=self.config.num_streams, dtype=self.dtype)
        x = run_blocks(x, self.blocks, token_ids, positions, cache.layers, start)
        cache.position = start + tokens
        return x

    def logits(self, x: Tensor) -> Tensor:
        """Streams x [T, M, D] -> logits [T, V] f32."""
        return linear(self._leave(x), self.head, activations=self.activations, out_dtype=torch.float32)

    def screen_head(self) -> None:
        """Make the copy of the bf16 head that ``greedy`` reads, half as large."""
        head = stored(self.head)
        assert isinstance(head, Plain), f"head: expected Plain, found {type(head).__name__}"
        self.screened = screen_head(head.w)

    def greedy(self, x: Tensor) -> Tensor:
        """Streams x [1, M, D] -> the id [1] i64 of the largest logit; after ``screen_head``."""
        assert self.screened is not None, "loaded without screen_head"
        return argmax_head(self._leave(x), self.screened)

    def _leave(self, x: Tensor) -> Tensor:
        """Streams x [T, M, D] -> what the head reads, [T, D]."""
        return rms_norm(self.hc_head.forward(x), self.norm, eps=self.config.norm_eps)

    def draft(self, x: Tensor, next_ids: Tensor, cache: SequenceCache) -> tuple[Tensor, Tensor]:
        """The MTP block on the trunk's streams x [T, M, D] and the tokens after them, next_ids [T].

        Returns its streams [T, M, D], which feed the next draft of a chain, and logits [T, V] f32 of the
        tokens after ``next_ids``. ``cache`` is the block's own (``new_draft_cache``).
        """
        assert self.mtp is not None, "loaded without the MTP block"
        start, tokens = cache.position, next_ids.shape[0]
        cache.require(tokens)
        positions = torch.arange(start, start + tokens, device=next_ids.device)
        embedding = self.embed[next_ids].to(self.dtype)
        x, z = self.mtp.forward(x, embedding, next_ids, positions, cache.layers[0], start)
        cache.position = start + tokens
        return x, linear(z, self.head, activations=self.activations, out_dtype=torch.float32)
