"""The kernels of attend_step against the reference on the same device."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from attention_cases import UNUSED, VALUES, WINDOW, Normal, choose
from numeric import (
    assert_attention,
    assert_bits,
    assert_close,
    assert_reproducible,
    dirty_memory,
    without_allocator,
)
from shapes import FLASH, MODELS, PRO, TINY, Sizes
from torch import Tensor

from dsv4.ops.attention import attend_step, reference, step
from dsv4.ops.formats import KV_RECORD, MAX_STEP, decode_rows
from dsv4.ops.rows.reference import store_rows

RING = WINDOW + MAX_STEP - 1
SOURCES = ("window", "CSA, chosen", "CSA, all", "HCA")
CONTEXTS = (1, 3, 4, 127, 128, 129, 511, 2047, 2049, 8191)
FORMATS = ("records", "bf16", "f32")


@dataclass(frozen=True)
class Call:
    """What attend_step takes; rows that no query sees are NaN, or bytes of 0xff."""

    q: Tensor
    window_rows: Tensor
    sink: Tensor
    positions: Tensor
    inv_freq: Tensor
    compressed: Tensor | None = None
    ratio: int = 0
    selected: Tensor | None = None

    def options(self) -> dict[str, Any]:
        return {
            "window": WINDOW,
            "compressed": self.compressed,
            "ratio": self.ratio,
            "selected": self.selected,
        }

    def run(self, splits: int = 0) -> Tensor:
        dirty_memory()
        always = self.q, self.window_rows, self.sink, self.positions, self.inv_freq
        return step.run(*always, **self.options(), splits=splits)

    def want(self) -> Tensor:
        """The reference in fp32, P unrounded, of the values that the tables hold."""
        options = self.options()
        if self.compressed is not None:
            options["compressed"] = decode_rows(self.compressed).float()
        rows = decode_rows(self.window_rows).float()
        return reference.attend_step(
            self.q.float(), rows, self.sink, self.positions, self.inv_freq, **options
        )

    def alone(self, t: int) -> "Call":
        selected = None if self.selected is None else self.selected[t : t + 1].contiguous()
        return replace(self, q=self.q[t : t + 1], positions=self.positions[t : t + 1], selected=selected)


def table_of(rows: Tensor, seen: Tensor, form: str) -> Tensor:
    """rows [N, 512] f32 in a format, those not seen poisoned."""
    if form == "records":
        table = torch.zeros((rows.shape[0], KV_RECORD), dtype=torch.uint8, device="cuda")
        store_rows(rows.bfloat16(), table, torch.arange(rows.shape[0], device="cuda"))
        table[~seen] = 0xFF
        return table
    table = rows.bfloat16() if form == "bf16" else rows.clone()
    table[~seen] = torch.nan
    return table


def make_call(
    sizes: Sizes,
    tokens: int,
    context: int,
    source: str,
    form: str,
    normal: Normal,
    capacity: int = 0,
    values: float = VALUES,
) -> Call:
    """``tokens`` queries, the last one at the end of ``context`` tokens, or fewer where there are less.

    ``capacity``: compressed rows, if more than are needed.
    """
    tokens = min(tokens, context)
    positions = torch.arange(context - tokens, context, device="cuda")
    seen = torch.zeros(RING, dtype=torch.bool, device="cuda")
    seen[torch.arange(max(0, context - tokens - WINDOW + 1), context, device="cuda") % RING] = True
    q = normal(tokens, sizes.heads, sizes.head_dim) / values
    q = q if form == "f32" else q.bfloat16()
    ring = table_of(values * normal(RING, sizes.head_dim), seen, form)
    call = Call(q, ring, normal(sizes.heads), positions, normal(sizes.rope_dim // 2).sigmoid())
    if source == "window":
        return call
    ratio = sizes.hca_ratio if source == "HCA" else sizes.csa_ratio
    visible = (positions + 1) // ratio
    entries = max(int(visible[-1]) + UNUSED, capacity)
    seen = torch.arange(entries, device="cuda") < visible[-1]
    selected = None
    if source == "CSA, chosen":
        selected = choose(visible, entries, sizes.index_topk, normal)
        seen = torch.zeros(entries + 1, dtype=torch.bool, device="cuda")
        seen[selected.flatten().long()] = True  # -1 is the last one, which does not count
        seen = seen[:-1]
    compressed = table_of(values * normal(entries, sizes.head_dim), seen, form)
    return replace(call, compressed=compressed, ratio=ratio, selected=selected)


def check(call: Call, case: str, splits: int = 0) -> Tensor:
    found, want = call.run(splits), call.want()
    if call.q.dtype == torch.float32:
        assert_close(found, want, case, rtol=1e-4, atol=1e-4)
    else:
        assert_attention(found, want, case)
    return found


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("sizes", MODELS, ids=lambda sizes: sizes.name)
def test_contexts(sizes: Sizes, source: str, form: str, cuda_normal: Normal) -> None:
    for context in CONTEXTS:
        call = make_call(sizes, 3, context, source, form, cuda_normal)
        check(call, f"{sizes.name}, {source}, {form}, context {context}")


@pytest.mark.parametrize("form", ["records", "bf16"])
@pytest.mark.parametrize("sizes", [FLASH, PRO], ids=lambda sizes: sizes.name)
def test_long_contexts(sizes: Sizes, form: str, cuda_normal: Normal) -> None:
    """Of selected entries, and of all: 8,192 of HCA at 1M tokens."""
    for context, source in ((100_000, "CSA, chosen"), (100_000, "HCA"), (1 << 20, "HCA")):
        call = make_call(sizes, 2, context, source, form, cuda_normal)
        check(call, f"{sizes.name}, {source}, {form}, context {context}")


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("sizes", [FLASH, TINY], ids=lambda sizes: sizes.name)
def test_a_row_does_not_depend_on_the_others(
    sizes: Sizes, source: str, form: str, cuda_normal: Normal
) -> None:
    """At contexts where the queries differ in what they see; with the capacity of 8 and of 16 blocks."""
    for context, capacity in ((8, 0), (131, 0), (515, 0), (515, 4096)):
        whole = make_call(sizes, MAX_STEP, context, source, form, cuda_normal, capacity)
        for tokens in range(1, MAX_STEP + 1):
            selected = None if whole.selected is None else whole.selected[:tokens].contiguous()
            some = replace(whole, q=whole.q[:tokens], positions=whole.positions[:tokens], selected=selected)
            case = f"{sizes.name}, {source}, {form}, context {context}, capacity {capacity}, {tokens} tokens"
            found = check(some, case)
            assert_bits(found[-1:], whole.alone(tokens - 1).run(), f"{case}: the last alone")
            assert_bits(found[:1], whole.alone(0).run(), f"{case}: the first alone")


@pytest.mark.parametrize("form", ["records", "bf16"])
def test_values_of_any_size(form: str) -> None:
    def run(values: float) -> Tensor:
        generator = torch.Generator("cuda").manual_seed(1)
        normal = partial(torch.randn, generator=generator, device="cuda")
        return make_call(FLASH, 3, 3000, "CSA, chosen", form, lambda *shape: normal(shape), 0, values).run()

    for factor in (8, 2**10):
        assert_bits(run(VALUES * factor), run(VALUES) * factor, f"{form}, values {factor} times as large")


@pytest.mark.parametrize("splits", [8, 16])
@pytest.mark.parametrize("form", ["records", "bf16"])
def test_both_sizes_of_clusters(form: str, splits: int, cuda_normal: Normal) -> None:
    """Also with less rows than blocks: some have none."""
    for context in (1, 9, 130, 3000):
        call = make_call(FLASH, 1, context, "CSA, all", form, cuda_normal)
        check(call, f"{form}, {splits} blocks, context {context}", splits)


@pytest.mark.large
@pytest.mark.parametrize("form", FORMATS)
def test_sinks(form: str, cuda_normal: Normal) -> None:
    """One that takes nearly all, takes all, or does not count."""
    call = make_call(FLASH, 2, 600, "CSA, all", form, cuda_normal)
    for value in (12.0, -1e4, -torch.inf):
        check(replace(call, sink=torch.full_like(call.sink, value)), f"{form}, sinks of {value}")
    found = replace(call, sink=torch.full_like(call.sink, 1e4)).run()
    assert not found.any(), f"{form}: sinks of 1e4 leave {found.abs().max()}"


@pytest.mark.parametrize("form", FORMATS)
def test_few_heads(form: str, cuda_normal: Normal) -> None:
    """Heads that do not fill a tile, or that begin another."""
    for heads in (1, 15, 17):
        call = make_call(FLASH._replace(heads=heads), 2, 300, "CSA, all", form, cuda_normal)
        check(call, f"{form}, {heads} heads")


@pytest.mark.large
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("source", SOURCES)
def test_reproducible(source: str, form: str, cuda_normal: Normal) -> None:
    call = make_call(FLASH, 4, 3000, source, form, cuda_normal)
    always = call.q, call.window_rows, call.sink, call.positions, call.inv_freq
    assert_reproducible(lambda: attend_step(*always, **call.options()), f"{source}, {form}")


@pytest.mark.parametrize("form", FORMATS)
def test_a_graph_reads_positions_on_the_device(form: str, cuda_normal: Normal) -> None:
    if without_allocator():
        pytest.skip("a graph needs the allocator")
    call = make_call(FLASH, 2, 5000, "HCA", form, cuda_normal)
    # Every row is a number, so that any position may be asked for.
    ring = table_of(VALUES * cuda_normal(RING, 512), torch.ones(RING, dtype=torch.bool, device="cuda"), form)
    call = replace(call, window_rows=ring, positions=call.positions.clone())
    call.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call.run()
    for last in (1, 127, 128, 300, 4997):
        call.positions.copy_(torch.arange(last - 1, last + 1, device="cuda"))
        graph.replay()
        found = captured.clone()
        assert_bits(found, call.run(), f"{form}: replayed at position {last}")
