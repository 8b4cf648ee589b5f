"""The cases of ``bench.ops`` of the indexer: steps at the end of long contexts, a late prefill chunk."""

import sys
from typing import Any, NamedTuple

import torch

from bench.harness import ROOT, Case, Draw
from bench.matrix_cases import tokens_of
from dsv4.ops.formats import INDEX_CODES, INDEX_RECORD
from dsv4.ops.indexer import choose_entries, index_scores, select_topk

sys.path.insert(0, str(ROOT / "tests"))
from shapes import Sizes  # noqa: E402

BF16, I32, F32, I64 = 2, 4, 4, 8  # bytes


class Queries(NamedTuple):
    """``tokens`` queries at the end of ``context`` tokens; index keys are records, as many as are visible."""

    sizes: Sizes
    tokens: int
    context: int

    @property
    def entries(self) -> int:
        return self.context // self.sizes.csa_ratio

    @property
    def visible(self) -> list[int]:
        """Entries that each query sees."""
        start = self.context - self.tokens
        return [(position + 1) // self.sizes.csa_ratio for position in range(start, self.context)]

    @property
    def input_bytes(self) -> int:
        """Keys once; queries, weights and visible."""
        heads = self.tokens * self.sizes.index_heads
        return self.entries * INDEX_RECORD + heads * (INDEX_CODES * BF16 + F32) + self.tokens * I64

    @property
    def score_bytes(self) -> int:
        return F32 * sum(self.visible)

    @property
    def choice_bytes(self) -> int:
        return I32 * self.tokens * min(self.sizes.index_topk, self.entries)

    @property
    def flop(self) -> int:
        return 2 * INDEX_CODES * self.sizes.index_heads * sum(self.visible)

    @property
    def words(self) -> str:
        return f"{tokens_of(self.tokens, self.sizes)}, {self.entries} entries"


def visible_of(queries: Queries, draw: Draw) -> torch.Tensor:
    return torch.tensor(queries.visible, device=draw.generator.device)


def operands(queries: Queries, draw: Draw) -> tuple[torch.Tensor, ...]:
    """q, records of any codes with scales about 1, weights, visible."""
    sizes, entries = queries.sizes, queries.entries
    scales = INDEX_RECORD - INDEX_CODES // 2
    keys = torch.cat(
        (draw.codes(entries, INDEX_CODES // 2), draw.codes(entries, scales, low=125, high=129)), 1
    )
    q = draw.normal(queries.tokens, sizes.index_heads, INDEX_CODES)
    return q, keys, draw.f32(queries.tokens, sizes.index_heads), visible_of(queries, draw)


def case_of(op: str, queries: Queries, words: str = "", **more: Any) -> Case:
    return Case(room="indexer", op=op, case=queries.words + words, **more)


def both(queries: Queries, target: str | None = None) -> Case:
    return case_of(
        "choose_entries",
        queries,
        inputs=lambda draw: operands(queries, draw),
        call=lambda *args: choose_entries(*args, top_k=queries.sizes.index_topk),
        bytes=queries.input_bytes + queries.choice_bytes,
        flop=queries.flop,
        target=target,
    )


def scores(queries: Queries) -> Case:
    return case_of(
        "index_scores",
        queries,
        inputs=lambda draw: operands(queries, draw),
        call=index_scores,
        bytes=queries.input_bytes + queries.score_bytes,
        flop=queries.flop,
    )


def choice(queries: Queries) -> Case:
    return case_of(
        "select_topk",
        queries,
        inputs=lambda draw: (draw.f32(queries.tokens, queries.entries), visible_of(queries, draw)),
        call=lambda *args: select_topk(*args, top_k=queries.sizes.index_topk),
        bytes=queries.score_bytes + queries.tokens * I64 + queries.choice_bytes,
    )


def torch_topk(queries: Queries) -> Case:
    """What torch has for comparison: all entries visible, ties in no promised order, unsorted."""
    top_k = min(queries.sizes.index_topk, queries.entries)
    return case_of(
        "select_topk",
        queries,
        ", torch.topk",
        inputs=lambda draw: (draw.f32(queries.tokens, queries.entries),),
        call=lambda values: values.topk(top_k, sorted=False).indices,
    )


def indexer_cases(models: tuple[Sizes, ...], large: int) -> list[Case]:
    """Contexts of 2, 16 and 128 times ``large``; the last ``large`` tokens of 8 times as many."""
    flash, pro, full = models[0], models[-1], large == 8192  # of these sizes are the targets
    cases = []
    for context, target in ((2 * large, "<= 8 us"), (16 * large, "<= 12 us"), (128 * large, "<= 25 us")):
        step = Queries(flash, 1, context)
        cases += [both(step, target if full else None), scores(step), choice(step), torch_topk(step)]
    cases += [both(Queries(flash, 8, 16 * large)), both(Queries(flash, 8, 128 * large))]
    if pro is not flash:
        cases += [both(Queries(pro, 1, 16 * large)), both(Queries(pro, 1, 128 * large))]
    chunk = Queries(flash, large, 8 * large)
    return [
        *cases,
        both(chunk, "<= 4500 us" if full else None),
        scores(chunk),
        choice(chunk),
        torch_topk(chunk),
    ]
