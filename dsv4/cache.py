"""State of one sequence: window ring, compressed rows, index keys, compressor tails.

Holds tensors and keeps them consistent; what goes into them is the layers' business. How many rows count
follows from the position. Sizes, formats and meaning: docs/model.md section 3.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4.config import CSA_RATIO, ModelConfig
from dsv4.numerics import Numerics
from dsv4.ops.formats import INDEX_CODES, INDEX_RECORD, KV_CODES, KV_RECORD, KV_ROPE, MAX_STEP
from dsv4.ops.rows import load_rows, store_rows


@dataclass(frozen=True)
class RowFormat:
    """How cached rows lie in memory: records (ops/formats.py), or plain rows of the activation dtype."""

    dtype: torch.dtype
    records: bool

    @staticmethod
    def of(config: ModelConfig, numerics: Numerics, device: torch.device) -> "RowFormat":
        """Records where the roundings that they hold are asked for and kernels read them: bf16 on CUDA."""
        widths = config.head_dim, config.rope_dim, config.index_head_dim
        fits = widths == (KV_CODES + KV_ROPE, KV_ROPE, INDEX_CODES)
        bf16 = numerics.torch_dtype == torch.bfloat16
        return RowFormat(numerics.torch_dtype, numerics.trained and bf16 and fits and device.type == "cuda")

    @property
    def name(self) -> str:
        """Of KV and index keys, for the memory plan."""
        return "fp8 + fp4" if self.records else str(self.dtype).removeprefix("torch.")

    def table(self, rows: int, width: int, device: torch.device) -> Tensor:
        """Memory for rows of ``width`` values."""
        if not self.records:
            return torch.zeros((rows, width), dtype=self.dtype, device=device)
        record = {KV_CODES + KV_ROPE: KV_RECORD, INDEX_CODES: INDEX_RECORD}[width]
        return torch.zeros((rows, record), dtype=torch.uint8, device=device)


def plain_rows(rows: Tensor) -> Tensor:
    """Rows of KV as attention's long form reads them: the values of records, plain rows themselves."""
    return load_rows(rows, rows.shape[0]) if rows.dtype == torch.uint8 else rows


class WindowRing:
    """The latest rows of a layer's KV; position p lies in row p mod R.

    R = W + MAX_STEP - 1: a step stores all its rows before attention, and its first token still finds the
    oldest row of its own window.
    """

    def __init__(self, window: int, rows: Tensor) -> None:
        assert rows.shape[0] == window + MAX_STEP - 1
        self.window = window
        self.rows = rows

    def store(self, kv: Tensor, positions: Tensor) -> None:
        """Rows kv [T, Dh] of ``positions`` [T], read on the device alone; T <= MAX_STEP."""
        assert kv.shape[0] <= MAX_STEP, f"{kv.shape[0]} rows at once, at most {MAX_STEP}"
        store_rows(kv.detach(), self.rows, positions)

    @property
    def has_records(self) -> bool:
        """Whether storing a row rounds it."""
        return self.rows.dtype == torch.uint8

    def extend(self, kv: Tensor, start: int) -> Tensor:
        """Store kv [T, Dh], rounded, of positions start .. start + T - 1.

        Returns [P + T, Dh]: the P = min(start, W - 1) rows before them and kv itself, oldest first.
        """
        size, end = self.rows.shape[0], start + kv.shape[0]
        before = torch.arange(max(0, start - self.window + 1), start, device=kv.device) % size
        context = torch.cat((plain_rows(self.rows)[before], kv))
        kept = min(kv.shape[0], size)
        last = torch.arange(end - kept, end, device=kv.device)
        store_rows(kv[kv.shape[0] - kept :].detach(), self.rows, last)
        return context


class CompressorState:
    """One compressor's tail, f32 [.., C] (see ``ops.compressor``), and the entries it has made, by index."""

    def __init__(
        self, ratio: int, width: int, max_context: int, form: RowFormat, device: torch.device
    ) -> None:
        self.ratio, self.kept = ratio, ratio if ratio == CSA_RATIO else 0
        shape = (2 * ratio, 2 * width) if self.kept else (ratio, width)
        self.tail_kv = torch.zeros(shape, dtype=torch.float32, device=device)
        self.tail_gate = torch.full(shape, -torch.inf, dtype=torch.float32, device=device)
        entries = max(1, max_context // ratio)
        self.rows = form.table(-(-entries // 4) * 4, width, device)  # in fours, for the indexer's fast form

    @property
    def has_records(self) -> bool:
        """Whether storing an entry rounds it."""
        return self.rows.dtype == torch.uint8

    def live_tensors(self, position: int) -> list[Tensor]:
        """What later tokens depend on before ``position``: kept and begun window, all entries."""
        tail = self.kept + position % self.ratio
        return [self.tail_kv[:tail], self.tail_gate[:tail], self.rows[: position // self.ratio]]

    def reset(self) -> None:
        """Forget the sequence: an unfilled previous window has gates of -inf."""
        self.tail_kv.zero_()
        self.tail_gate.fill_(-torch.inf)

    def store(self, entries: Tensor, slots: Tensor) -> None:
        """Entries [n, width] become the rows ``slots`` [n] i64, read on the device alone; -1: none."""
        store_rows(entries.detach(), self.rows, slots)

    def extend(self, entries: Tensor, end: int) -> Tensor:
        """Store the entries [n, width] that the tokens up to position ``end`` - 1 have completed.

        Returns the rows of all entries so far, as they are stored; new ones that carry gradients keep them.
        """
        count = end // self.ratio
        assert count <= self.rows.shape[0], f"{count} rows in a table of {self.rows.shape[0]}"
        before = count - entries.shape[0]
        self.store(entries, torch.arange(before, count, device=entries.device))
        if entries.requires_grad:
            return torch.cat((self.rows[:before], entries))
        return self.rows[:count]


class LayerCache:
    """What one attention layer remembers; ``compressed`` and ``index`` are None where it has none."""

    def __init__(
        self, config: ModelConfig, ratio: int, max_context: int, form: RowFormat, device: torch.device
    ) -> None:
        ring = form.table(config.window + MAX_STEP - 1, config.head_dim, device)
        self.window = WindowRing(config.window, ring)
        self.compressed: CompressorState | None = None
        self.index: CompressorState | None = None
        if ratio:
            self.compressed = CompressorState(ratio, config.head_dim, max_context, form, device)
        if ratio == CSA_RATIO:
            self.index = CompressorState(ratio, config.index_head_dim, max_context, form, device)

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
        form: RowFormat,
        device: torch.device | str = "cpu",
    ) -> None:
        device = torch.device(device)
        self.max_context = max_context
        self.position = 0
        self.layers = [LayerCache(config, ratio, max_context, form, device) for ratio in ratios]

    def require(self, tokens: int) -> None:
        """Assert that so many more fit: a step cannot find out, it reads its position on the device."""
        end = self.position + tokens
        assert end <= self.max_context, f"{end} tokens in a cache of {self.max_context}"

    def reset(self) -> None:
        """Start a fresh sequence. Tables need no clearing: what the position does not reach is never read."""
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
        for tensor, saved in zip(self._live_tensors(), snapshot.tensors, strict=True):
            tensor.copy_(saved)

    def _live_tensors(self) -> list[Tensor]:
        tensors = []
        for layer in self.layers:
            tensors.append(layer.window.rows)
            for state in layer.compressors:
                tensors += state.live_tensors(self.position)
        return tensors

    def tables(self) -> list[Tensor]:
        """Every table of rows: rings, entries, index keys."""
        return [owner.rows for layer in self.layers for owner in (layer.window, *layer.compressors)]

    def nbytes(self) -> int:
        """Bytes of every buffer, used or not."""
        states = [state for layer in self.layers for state in layer.compressors]
        buffers = [*self.tables(), *[tail for state in states for tail in (state.tail_kv, state.tail_gate)]]
        return sum(buffer.numel() * buffer.element_size() for buffer in buffers)
