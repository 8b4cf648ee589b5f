"""The cases of ``bench.ops`` of core attention: prefill chunks, early and late; steps on cache tables."""

import sys
from typing import Any, NamedTuple

import torch

from bench.harness import ROOT, Case, Draw
from bench.matrix_cases import tokens_of
from dsv4.ops.attention import attend, attend_step
from dsv4.ops.formats import KV_RECORD, MAX_STEP, decode_rows
from dsv4.ops.rows.reference import store_rows

sys.path.insert(0, str(ROOT / "tests"))
from shapes import Sizes  # noqa: E402

WINDOW = 128


def kind_of(ratio: int, top_k: int | None) -> str:
    """A layer's, by its compress ratio and how many entries a query takes."""
    return "window" if not ratio else "HCA" if top_k is None else "CSA"


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
        kind = kind_of(self.ratio, self.top_k)
        return f"{kind}, {tokens_of(self.tokens, self.sizes)} at {self.start}"


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


# Steps: a few queries at the end of a context, on KV records. Rows that queries share are counted once.


class Step(NamedTuple):
    """``tokens`` queries at the end of ``context`` tokens; ratio and top_k as in ``Chunk``."""

    sizes: Sizes
    tokens: int
    context: int
    ratio: int = 0
    top_k: int | None = None

    @property
    def entries(self) -> int:
        return self.context // self.ratio if self.ratio else 0

    @property
    def attended(self) -> int:
        """Rows that the last query attends to."""
        entries = self.entries if self.top_k is None else min(self.entries, self.top_k)
        return min(self.context, WINDOW) + entries

    @property
    def bytes(self) -> int:
        """Rows once, where every query selects others as often as there are queries; q and the output."""
        rows, shared = self.attended, min(self.context, WINDOW) + self.tokens - 1
        if self.top_k is not None:
            rows = shared + self.tokens * (rows - min(self.context, WINDOW))
        return rows * KV_RECORD + 2 * self.tokens * self.sizes.heads * self.sizes.head_dim * 2

    @property
    def words(self) -> str:
        kind = kind_of(self.ratio, self.top_k)
        return f"{kind}, {tokens_of(self.tokens, self.sizes)}, {self.attended} rows"


def records(draw: Draw, rows: int, width: int) -> torch.Tensor:
    values = draw.normal(rows, width)
    table = torch.zeros((rows, KV_RECORD), dtype=torch.uint8, device=values.device)
    store_rows(values, table, torch.arange(rows, device=values.device))
    return table


def step_inputs(draw: Draw, step: Step) -> tuple[Any, ...]:
    """q, ring, sink, positions, frequencies, compressed records, selected."""
    sizes, width = step.sizes, step.sizes.head_dim
    q, ring = draw.normal(step.tokens, sizes.heads, width), records(draw, WINDOW + MAX_STEP - 1, width)
    positions = torch.arange(step.context - step.tokens, step.context, device=q.device)
    always = q, ring, draw.f32(sizes.heads), positions, draw.f32(sizes.rope_dim // 2).sigmoid()
    if not step.ratio:
        return *always, None, None
    compressed = records(draw, step.entries, width)
    if step.top_k is None:
        return *always, compressed, None
    visible = (positions + 1) // step.ratio
    return *always, compressed, chosen_entries(draw, visible, step.entries, step.top_k)


def decode(step: Step, target: str | None = None) -> Case:
    def call(*args: Any) -> torch.Tensor:
        *always, compressed, selected = args
        options = {"compressed": compressed, "ratio": step.ratio, "selected": selected}
        return attend_step(*always, window=WINDOW, **options)

    return Case(
        room="attention",
        op="attend_step",
        case=step.words,
        inputs=lambda draw: step_inputs(draw, step),
        call=call,
        bytes=step.bytes,
        target=target,
    )


def step_sdpa(step: Step) -> Case:
    """What torch has for comparison, without a sink: one query on rows gathered and decoded before, bf16."""

    def inputs(draw: Draw) -> tuple[torch.Tensor, ...]:
        q, ring, _, _, _, compressed, selected = step_inputs(draw, step)
        rows = compressed if selected is None else compressed[selected[0].long()]
        return q, decode_rows(torch.cat((ring[:WINDOW], rows)))

    def call(q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        keys = keys[None, None]
        return torch.nn.functional.scaled_dot_product_attention(q[:, None], keys, keys)

    assert step.tokens == 1 and step.context >= WINDOW
    return Case(
        room="attention",
        op="attend_step",
        case=f"{step.words}, torch SDPA on gathered bf16 rows",
        inputs=inputs,
        call=call,
    )


def decode_cases(flash: Sizes, pro: Sizes, large: int) -> list[Case]:
    """A context of eight times ``large``; HCA behind 128 times as many as well."""
    csa, hca, context, longest = flash.csa_ratio, flash.hca_ratio, 8 * large, 128 * large
    sparse, dense = Step(flash, 1, context, csa, flash.index_topk), Step(flash, 1, longest, hca)
    full = large == 8192  # of these sizes are the targets
    return [
        decode(Step(flash, 1, context)),
        decode(sparse, "<= 6 us" if full else None),
        step_sdpa(sparse),
        decode(sparse._replace(tokens=8)),
        decode(Step(flash, 1, context, hca)),
        decode(dense, "<= 12 us" if full else None),
        step_sdpa(dense),
        decode(dense._replace(tokens=8)),
        decode(Step(pro, 1, context, csa, pro.index_topk)),
        decode(Step(pro, 1, longest, hca)),
    ]


def attention_cases(models: tuple[Sizes, ...], large: int) -> list[Case]:
    """Those of the first model, and some of the last."""
    return prefill_cases(models[0], models[-1], large) + decode_cases(models[0], models[-1], large)
