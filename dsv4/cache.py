"""State of one sequence: window ring, compressed rows, index keys, compressor tails.

Holds tensors and keeps them consistent; what goes into them is the layers' business. Sizes and
meaning: docs/model.md section 3.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4.config import CSA_RATIO, ModelConfig


class WindowRing:
    """The last W rows of a layer's KV; position p lives in slot p mod W."""

    def __init__(self, window: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rows = torch.zeros((window, width), dtype=dtype, device=device)

    def extend(self, kv: Tensor, start: int) -> Tensor:
        """Store kv [T, Dh] of positions start .. start + T - 1.

        Returns [P + T, Dh]: the P = min(start, W - 1) rows before them and kv itself, oldest first.
        """
        window, tokens = self.rows.shape[0], kv.shape[0]
        before = torch.arange(max(0, start - window + 1), start, device=kv.device) % window
        context = torch.cat((self.rows[before], kv))
        kept = min(tokens, window)
        slots = torch.arange(start + tokens - kept, start + tokens, device=kv.device) % window
        self.rows[slots] = kv[tokens - kept :].detach()
        return context


class Rows:
    """An append-only table of compressed entries or index keys."""

    def __init__(self, capacity: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rows = torch.zeros((capacity, width), dtype=dtype, device=device)
        self.count = 0

    def append(self, entries: Tensor) -> Tensor:
        """Add entries [n, width]; returns every row so far. Entries that carry gradients keep them."""
        first, self.count = self.count, self.count + entries.shape[0]
        assert self.count <= self.rows.shape[0], f"{self.count} rows in a table of {self.rows.shape[0]}"
        self.rows[first : self.count] = entries.detach()
        if entries.requires_grad:
            return torch.cat((self.rows[:first], entries))
        return self.rows[: self.count]


class CompressorState:
    """One compressor's tail, f32 [rows, C] (see ``ops.compressor``), and the entries it has emitted."""

    def __init__(
        self, ratio: int, width: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        overlap = ratio == CSA_RATIO
        shape = (2 * ratio, 2 * width) if overlap else (ratio, width)
        self.tail_kv = torch.zeros(shape, dtype=torch.float32, device=device)
        self.tail_gate = torch.full(shape, -torch.inf, dtype=torch.float32, device=device)
        self.entries = Rows(capacity, width, dtype, device)

    def reset(self) -> None:
        """Forget the sequence: an unfilled previous window has gates of -inf."""
        self.tail_kv.zero_()
        self.tail_gate.fill_(-torch.inf)
        self.entries.count = 0


class LayerCache:
    """What one attention layer remembers; ``compressed`` and ``index`` are None where it has none."""

    def __init__(
        self, config: ModelConfig, ratio: int, max_context: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.window = WindowRing(config.window, config.head_dim, dtype, device)
        self.compressed: CompressorState | None = None
        self.index: CompressorState | None = None
        if ratio:
            capacity = max_context // ratio
            self.compressed = CompressorState(ratio, config.head_dim, capacity, dtype, device)
        if ratio == CSA_RATIO:
            self.index = CompressorState(ratio, config.index_head_dim, capacity, dtype, device)

    @property
    def compressors(self) -> list[CompressorState]:
        return [state for state in (self.compressed, self.index) if state is not None]


@dataclass(frozen=True)
class Snapshot:
    """A copy of a sequence's state, restorable into the cache it came from."""

    position: int
    tensors: list[Tensor]


class SequenceCache:
    """The state of one sequence over a stack of attention layers with the given compress ratios."""

    def __init__(
        self,
        config: ModelConfig,
        ratios: tuple[int, ...],
        *,
        max_context: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        device = torch.device(device)
        self.max_context = max_context
        self.position = 0
        self.layers = [LayerCache(config, ratio, max_context, dtype, device) for ratio in ratios]

    def reset(self) -> None:
        """Start a fresh sequence. Ring rows need no clearing: positions before 0 are never read."""
        self.position = 0
        for layer in self.layers:
            for state in layer.compressors:
                state.reset()

    def snapshot(self) -> Snapshot:
        """A copy of everything that the next tokens depend on."""
        return Snapshot(self.position, [tensor.clone() for tensor in self._live_tensors()])

    def restore(self, snapshot: Snapshot) -> None:
        """Continue from ``snapshot`` as if nothing had come after it."""
        self.position = snapshot.position
        for layer in self.layers:
            for state in layer.compressors:
                ratio = state.tail_kv.shape[0] // (2 if layer.index is not None else 1)
                state.entries.count = self.position // ratio
        for tensor, saved in zip(self._live_tensors(), snapshot.tensors, strict=True):
            tensor.copy_(saved)

    def _live_tensors(self) -> list[Tensor]:
        tensors = []
        for layer in self.layers:
            tensors.append(layer.window.rows)
            for state in layer.compressors:
                tensors += [state.tail_kv, state.tail_gate, state.entries.rows[: state.entries.count]]
        return tensors

    def nbytes(self) -> int:
        """Bytes of every buffer, used or not."""
        total = 0
        for layer in self.layers:
            buffers = [layer.window.rows]
            for state in layer.compressors:
                buffers += [state.tail_kv, state.tail_gate, state.entries.rows]
            total += sum(buffer.numel() * buffer.element_size() for buffer in buffers)
        return total
