"""The cases of ``bench.ops`` of core attention: prefill chunks, at the first tokens and behind many."""

import sys
from typing import Any, NamedTuple

import torch

from bench.harness import ROOT, Case, Draw
from dsv4.ops.attention import attend

sys.path.insert(0, str(ROOT / "tests"))
from shapes import Sizes  # noqa: E402

WINDOW = 128


# Prefill: a chunk of queries on plain rows. Operations are counted for the entries that queries attend to.


class Chunk(NamedTuple):
    """``tokens`` queries from position ``start`` on, of a layer with compress ratio ``ratio``, 0 for none.

    ``top_k`` limits the entries of a query, ``None``: every visible one.
    """

    sizes: Sizes
    tokens: int
    start: int
    ratio: int = 0
    top_k: int | None = None

    @property
    def before(self) -> int:
        """Window rows older than the first query."""
        return min(self.start, WINDOW - 1)

    @property
    def entries(self) -> int:
        return (self.start + self.tokens) // self.ratio if self.ratio else 0

    def attended(self, position: int) -> int:
        """Rows that the query at ``position`` attends to."""
        entries = (position + 1) // self.ratio if self.ratio else 0
        if self.top_k is not None:
            entries = min(entries, self.top_k)
        return min(position + 1, WINDOW) + entries

    @property
    def flop(self) -> int:
        rows = sum(map(self.attended, range(self.start, self.start + self.tokens)))
        return 4 * self.sizes.heads * self.sizes.head_dim * rows

    @property
    def words(self) -> str:
        kind = "window" if not self.ratio else "HCA" if self.top_k is None else "CSA"
        return f"{kind}, {self.sizes.name.capitalize()}, {self.tokens} tokens at {self.start}"


def chosen_entries(draw: Draw, visible: torch.Tensor, entries: int, top_k: int) -> torch.Tensor:
    """Of each query's visible entries random ones, [T, I] i32, ascending, -1s behind them."""
    scores = draw.f32(visible.shape[0], entries)
    hidden = torch.arange(entries, device=scores.device) >= visible[:, None]
    chosen = scores.masked_fill_(hidden, -torch.inf).topk(min(top_k, entries)).indices
    chosen = chosen.masked_fill(hidden.gather(1, chosen), entries).sort(dim=-1).values
    return chosen.masked_fill(chosen == entries, -1).int()


def chunk_inputs(draw: Draw, chunk: Chunk) -> tuple[Any, ...]:
    """q, window rows, sink, positions, frequencies, compressed rows, visible, selected."""
    sizes, width = chunk.sizes, chunk.sizes.head_dim
    q, rows = draw.normal(chunk.tokens, sizes.heads, width), draw.normal(chunk.before + chunk.tokens, width)
    positions = torch.arange(chunk.start, chunk.start + chunk.tokens, device=q.device)
    always = q, rows, draw.f32(sizes.heads), positions, draw.f32(sizes.rope_dim // 2).sigmoid()
    if not chunk.ratio:
        return *always, None, None, None
    compressed, visible = draw.normal(chunk.entries, width), (positions + 1) // chunk.ratio
    if chunk.top_k is None:
        return *always, compressed, visible, None
    return *always, compressed, None, chosen_entries(draw, visible, chunk.entries, chunk.top_k)


def prefill(chunk: Chunk, target: str | None = None) -> Case:
    def call(*args: Any) -> torch.Tensor:
        *always, compressed, visible, selected = args
        return attend(*always, window=WINDOW, compressed=compressed, visible=visible, selected=selected)

    return Case(
        room="attention",
        op="attend",
        case=chunk.words,
        inputs=lambda draw: chunk_inputs(draw, chunk),
        call=call,
        flop=chunk.flop,
        target=target,
    )


def gathered_sdpa(chunk: Chunk) -> Case:
    """What torch has for comparison, without a sink: every query's rows gathered, its heads a sequence."""

    def call(*args: Any) -> torch.Tensor:
        q, rows, _, positions, _, compressed, _, selected = args
        age = torch.arange(WINDOW - 1, -1, -1, device=q.device)
        own = chunk.before + torch.arange(chunk.tokens, device=q.device)
        keys = torch.cat((rows[own[:, None] - age], compressed[selected]), dim=1)[:, None]  # [T, 1, n, Dh]
        return torch.nn.functional.scaled_dot_product_attention(q.unsqueeze(1), keys, keys)

    assert chunk.before == WINDOW - 1 and chunk.attended(chunk.start) == WINDOW + (chunk.top_k or 0)
    return Case(
        room="attention",
        op="attend",
        case=f"{chunk.words}, torch SDPA on gathered rows",
        inputs=lambda draw: chunk_inputs(draw, chunk),
        call=call,
        flop=chunk.flop,
    )


def prefill_cases(flash: Sizes, pro: Sizes, large: int) -> list[Case]:
    """``large`` tokens at the beginning and at the end of eight times as many."""
    csa, hca = flash.csa_ratio, flash.hca_ratio
    some, late = large // 8, 7 * large
    full = Chunk(flash, some, max(late, csa * flash.index_topk), csa, flash.index_topk)
    return [
        prefill(Chunk(flash, large, 0)),
        prefill(Chunk(flash, large, 0, csa, flash.index_topk), ">= 350 TFLOPS"),
        prefill(Chunk(flash, large, 0, hca), ">= 230 TFLOPS"),
        prefill(Chunk(flash, large, late, hca), ">= 350 TFLOPS"),
        prefill(full),
        gathered_sdpa(full),
        prefill(full._replace(sizes=pro, start=max(late, csa * pro.index_topk), top_k=pro.index_topk)),
    ]


def attention_cases(models: tuple[Sizes, ...], large: int) -> list[Case]:
    """Those of the first model, and a chunk of the last."""
    return prefill_cases(models[0], models[-1], large)
