"""The kernels of attend, all forms, against the reference on the same device."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from attention_cases import UNUSED, VALUES, WINDOW, Normal, choose
from numeric import assert_attention, assert_bits, assert_reproducible, dirty_memory
from shapes import FLASH, MODELS, TINY, Sizes
from torch import Tensor

from dsv4.ops.attention import attend, prefill, reference

TOKENS = (1, 5, 9, 17, 137, 512, 2049)
SOURCES = ("window", "CSA, chosen", "CSA, all", "HCA")
WGMMA = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs sm_90a"
)
FORMS = [pytest.param("wgmma", marks=WGMMA), "tiles", "small tiles"]


@dataclass(frozen=True)
class Chunk:
    """What attend takes; rows that no query sees are NaN."""

    q: Tensor
    window_kv: Tensor
    sink: Tensor
    positions: Tensor
    inv_freq: Tensor
    compressed: Tensor | None = None
    visible: Tensor | None = None
    selected: Tensor | None = None

    def run(self, form: str) -> Tensor:
        dirty_memory()
        return prefill.run(*self._arguments(), form=form, **self._options())

    def want(self, first: int, last: int) -> Tensor:
        """Rows first .. last - 1 of the reference in fp32, P unrounded, on tables without NaN."""
        before = self.window_kv.shape[0] - self.q.shape[0]
        rows = self.window_kv[max(0, before + first - WINDOW + 1) : before + last].nan_to_num().float()
        part = slice(first, last)
        options = self._options()
        if self.compressed is not None:
            options["compressed"] = self.compressed.nan_to_num().float()
            for name in ("visible", "selected"):
                options[name] = None if options[name] is None else options[name][part]
        q, positions = self.q[part].float(), self.positions[part]
        return reference.attend(q, rows, self.sink, positions, self.inv_freq, **options)

    def _arguments(self) -> tuple[Tensor, ...]:
        return self.q, self.window_kv, self.sink, self.positions, self.inv_freq

    def _options(self) -> dict[str, Any]:
        return {
            "window": WINDOW,
            "compressed": self.compressed,
            "visible": self.visible,
            "selected": self.selected,
        }


def make_chunk(
    sizes: Sizes, tokens: int, before: int, start: int, source: str, normal: Normal, values: float = VALUES
) -> Chunk:
    """``tokens`` queries from position ``start`` on, behind ``before`` rows of the window."""
    q = normal(tokens, sizes.heads, sizes.head_dim).bfloat16() / values
    window_kv = values * normal(before + tokens, sizes.head_dim).bfloat16()
    window_kv[: max(0, before - WINDOW + 1)] = torch.nan
    positions = torch.arange(start, start + tokens, device="cuda")
    inv_freq = normal(sizes.rope_dim // 2).sigmoid()
    chunk = Chunk(q, window_kv, normal(sizes.heads), positions, inv_freq)
    if source == "window":
        return chunk
    visible = (positions + 1) // (sizes.hca_ratio if source == "HCA" else sizes.csa_ratio)
    entries = int(visible[-1]) + UNUSED
    compressed = values * normal(entries, sizes.head_dim).bfloat16()
    compressed[-UNUSED:] = torch.nan
    if source == "CSA, chosen":
        selected = choose(visible, entries, sizes.index_topk, normal)
        seen = torch.zeros(entries + 1, dtype=torch.bool, device="cuda")
        seen[selected.flatten().long()] = True  # -1 is the last one, which does not count
        compressed[~seen[:-1]] = torch.nan
        return replace(chunk, compressed=compressed, selected=selected)
    return replace(chunk, compressed=compressed, visible=visible)


def sampled(tokens: int) -> list[tuple[int, int]]:
    """Runs of queries to compare: the first, around the first full window, in the middle, the last."""
    runs = [(0, 9), (123, 132), (tokens // 2, tokens // 2 + 3), (tokens - 9, tokens)]
    return sorted({(max(0, first), min(last, tokens)) for first, last in runs if first < tokens})


def check(chunk: Chunk, form: str, case: str) -> None:
    out = chunk.run(form)
    assert out.shape == chunk.q.shape
    for first, last in sampled(chunk.q.shape[0]):
        want = chunk.want(first, last)
        assert_attention(out[first:last], want, f"{form}, {case}, queries {first} to {last - 1}")


@pytest.mark.parametrize("form", FORMS)
def test_values_of_any_size(form: str) -> None:
    def run(values: float) -> Tensor:
        generator = torch.Generator("cuda").manual_seed(1)
        normal = partial(torch.randn, generator=generator, device="cuda")
        return make_chunk(FLASH, 70, 127, 3000, "CSA, chosen", lambda *shape: normal(shape), values).run(form)

    for factor in (8, 2**10):
        assert_bits(run(VALUES * factor), run(VALUES) * factor, f"{form}, values {factor} times as large")


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("sizes", MODELS, ids=lambda sizes: sizes.name)
@pytest.mark.parametrize("form", FORMS)
def test_against_reference(form: str, sizes: Sizes, tokens: int, cuda_normal: Normal) -> None:
    chunks = [(0, 0), (3, 3)] if tokens <= 17 else [(0, 0)]
    for before, start in [*chunks, (WINDOW - 1, 1000), (WINDOW + 70, 5000)]:
        for source in SOURCES:
            chunk = make_chunk(sizes, tokens, before, start, source, cuda_normal)
            check(chunk, form, f"{sizes.name}, {source}, {tokens} tokens behind {before} rows")


@pytest.mark.large
@pytest.mark.parametrize("sizes", MODELS, ids=lambda sizes: sizes.name)
@pytest.mark.parametrize("form", FORMS)
def test_long_context(form: str, sizes: Sizes, cuda_normal: Normal) -> None:
    for source in SOURCES[1:]:
        chunk = make_chunk(sizes, 17, WINDOW - 1, 100_000 - 17, source, cuda_normal)
        check(chunk, form, f"{sizes.name}, {source}, 17 tokens before 100,000")


@pytest.mark.parametrize("heads", [1, 16, 17, 65])
@pytest.mark.parametrize("form", FORMS)
def test_odd_heads(form: str, heads: int, cuda_normal: Normal) -> None:
    for source in SOURCES:
        chunk = make_chunk(TINY._replace(heads=heads), 7, 100, 100, source, cuda_normal)
        check(chunk, form, f"{heads} heads, {source}")


@pytest.mark.parametrize("form", FORMS)
def test_both_limits(form: str, cuda_normal: Normal) -> None:
    """With entries chosen, how many are visible does not matter; no entries at all; no queries."""
    chunk = make_chunk(TINY, 7, 127, 1000, "CSA, chosen", cuda_normal)
    both = replace(chunk, visible=torch.zeros_like(chunk.positions))
    assert_bits(both.run(form), chunk.run(form), f"{form}: visible beside selected")
    window = replace(chunk, compressed=None, selected=None)
    nothing = torch.empty(0, TINY.head_dim, dtype=torch.bfloat16, device="cuda")
    empty = replace(window, compressed=nothing, visible=torch.zeros_like(chunk.positions))
    assert_bits(empty.run(form), window.run(form), f"{form}: no entries")
    none = replace(window, q=chunk.q[:0], positions=chunk.positions[:0])
    assert none.run(form).shape == chunk.q[:0].shape


@pytest.mark.parametrize("tokens", [7, 200])
@pytest.mark.parametrize("form", FORMS)
def test_each_query_finds_its_row(form: str, tokens: int, cuda_normal: Normal) -> None:
    """Every head's query is a row of its list, times 640: the softmax is 1 there, and the row comes out."""
    for source in SOURCES:
        chunk = make_chunk(TINY, tokens, 127, 3000, source, cuda_normal)
        table, at = chunk.window_kv, 127 + torch.arange(tokens, device="cuda")[:, None]
        target = at - cuda_normal(tokens, TINY.heads).view(torch.int32).abs() % WINDOW
        if chunk.compressed is not None:
            table = torch.cat((table, chunk.compressed))
            limit = chunk.visible if chunk.selected is None else (chunk.selected >= 0).sum(dim=-1)
            place = cuda_normal(tokens, TINY.heads).view(torch.int32).abs() % limit[:, None]
            entry = place if chunk.selected is None else chunk.selected.gather(1, place.long())
            compressed = torch.arange(TINY.heads, device="cuda") % 2 == 1
            target = torch.where(compressed, chunk.window_kv.shape[0] + entry, target)
        target = target.long()
        chunk = replace(
            chunk, q=640 * table[target], inv_freq=torch.zeros_like(chunk.inv_freq), sink=0 * chunk.sink
        )
        out = chunk.run(form)
        wrong = (out != table[target]).any(dim=-1).nonzero()
        if len(wrong):
            t, h = wrong[0].tolist()
            row, found = int(target[t, h]), out[t, h]
            nearest = int((table.nan_to_num().float() @ found.nan_to_num().float()).argmax())
            columns = (found != table[row]).nonzero().flatten().tolist()
            raise AssertionError(
                f"{form}, {source}: {len(wrong)} of {target.numel()} wrong, first query {t} of head {h}: "
                f"expected row {row} of {len(table)}, nearest is {nearest}; columns {columns[:3]} .. differ"
            )


@pytest.mark.parametrize("form", FORMS)
def test_sinks(form: str, cuda_normal: Normal) -> None:
    """Sinks above every score, where outputs are small: compared in the magnitude that they else have."""
    for source in SOURCES:
        chunk = make_chunk(TINY, 7, 127, 1000, source, cuda_normal)
        for sink in (8.0, 25.0):
            high = replace(chunk, sink=chunk.sink + sink)
            out, want = high.run(form).float(), high.want(0, 7)
            scale = 0.05 / want.square().mean().sqrt()
            assert_attention(scale * out, scale * want, f"{form}, {source}, sinks of {sink}")
        none = replace(chunk, sink=torch.full_like(chunk.sink, -torch.inf))
        check(none, form, f"{source}, no sinks")
        over = replace(chunk, sink=torch.full_like(chunk.sink, 1e4))
        assert not bool(over.run(form).any()), f"{form}, {source}: sinks of 1e4"


@pytest.mark.parametrize("tokens", [5, 400])
@pytest.mark.parametrize("sizes", MODELS, ids=lambda sizes: sizes.name)
@pytest.mark.parametrize("form", FORMS)
def test_bits(form: str, sizes: Sizes, tokens: int, cuda_normal: Normal) -> None:
    """The same call again, its graph, and the last query alone."""
    for source in SOURCES:
        chunk = make_chunk(sizes, tokens, 127, 2000, source, cuda_normal)
        case = f"{form}, {sizes.name}, {source}"
        assert_reproducible(lambda chunk=chunk: chunk.run(form), case)
        last = replace(chunk, q=chunk.q[-1:], positions=chunk.positions[-1:])
        for name in ("visible", "selected"):
            limits = getattr(chunk, name)
            last = last if limits is None else replace(last, **{name: limits[-1:]})
        assert_bits(last.run(form), chunk.run(form)[-1:], f"{case}: the last query alone")


def test_default_form(cuda_normal: Normal) -> None:
    chunk = make_chunk(FLASH, 9, 127, 1000, "HCA", cuda_normal)
    out = attend(*chunk._arguments(), **chunk._options())
    assert_bits(out, chunk.run(prefill.default_form()), "attend")


def test_what_it_cannot_take(cuda_normal: Normal) -> None:
    chunk = make_chunk(TINY, 9, 127, 1000, "HCA", cuda_normal)
    for bad, words in (
        (replace(chunk, q=chunk.q.half()), "float16"),
        (replace(chunk, window_kv=chunk.window_kv[:5]), "expected at least 9 rows, found 5"),
        (replace(chunk, compressed=chunk.window_kv.float()), "float32"),
        (replace(chunk, visible=chunk.visible.int()), "int32"),
        (replace(chunk, visible=None), "visible or selected"),
        (replace(chunk, compressed=None), "without compressed"),
        (replace(chunk, q=chunk.q[..., :256].contiguous()), "512"),
    ):
        with pytest.raises(AssertionError, match=words):
            bad.run("tiles")
