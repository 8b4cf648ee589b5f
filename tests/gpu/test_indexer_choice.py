"""The indexer's choice: the reference's of the kernel's own scores, bit by bit; scores and choice in one."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from indexer_cases import Normal, best_of, make_call, visible_of
from numeric import assert_bits, assert_layout, assert_reproducible, dirty_memory, without_allocator
from shapes import FLASH, MODELS, TINY, Sizes
from torch import Tensor

from dsv4 import _C
from dsv4.ops.formats import MAX_STEP
from dsv4.ops.indexer import choose_entries, launch, reference, select_topk

LARGE = pytest.mark.large


def check_choice(scores: Tensor, visible: Tensor, top_k: int, case: str) -> None:
    """On the CPU, where a stable sort knows no two zeros; scores that are not seen become NaN."""
    hidden = torch.arange(scores.shape[1], device="cuda") >= visible[:, None]
    scores = scores.masked_fill(hidden, torch.nan)
    dirty_memory()
    found = select_topk(scores, visible, top_k=top_k).cpu()
    want = reference.select_topk(scores.cpu(), visible.cpu(), top_k=top_k)
    assert_layout(found, want, case)
    wrong = (found != want).nonzero()
    if len(wrong):
        t, i = wrong[0].tolist()
        rows, (right, mine) = len(wrong[:, 0].unique()), (x[t, i : i + 4].tolist() for x in (want, found))
        raise AssertionError(
            f"{case}: {len(wrong)} choices differ in {rows} rows; first row {t}, which sees "
            f"{int(visible[t])}, at {i}: expected {right}, found {mine}"
        )


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda s: s,
    "levels, zeros of both signs": lambda s: (2 * s).round(),
    "equal": lambda s: torch.full_like(s, -3.5),
    "infinities": lambda s: torch.where(s > 1, torch.inf, torch.where(s > -1, s, -torch.inf)),
    "NaN of both signs": lambda s: torch.where(s > 1.5, torch.nan, torch.where(s < -1.5, -torch.nan, s)),
    "ascending": lambda s: s.sort(dim=-1).values,
    "one digit apart": lambda s: 1 + (s * 100).round() * 2**-23,
}


@pytest.mark.parametrize(
    ("tokens", "entries"),
    [(1, 1), (2, 63), (3, 64), (4, 65), (5, 4096), (6, 4097), (7, 8192), (4, 8193), (2, 16385)]
    + [pytest.param(*sizes, marks=LARGE) for sizes in ((8, 16384), (9, 16385), (64, 4096), (137, 701))]
    + [pytest.param(*sizes, marks=LARGE) for sizes in ((3, 40000), (9, 40001), (1, 262144), (2, 262143))],
)
def test_choice_of_own_scores(tokens: int, entries: int, cuda_normal: Normal) -> None:
    for name, kind in KINDS.items():
        scores, visible = kind(cuda_normal(tokens, entries)), visible_of(tokens, entries, cuda_normal)
        for top_k in (64, 512, 1024):
            check_choice(scores, visible, top_k, f"{name}, {top_k} of {entries}, {tokens} tokens")
    visible[-1], visible[0] = entries + 5, -3
    found, want = (select_topk(scores, limit, top_k=64) for limit in (visible, visible.clamp(0, entries)))
    assert_bits(found, want, f"{entries} entries, more visible than there are, and fewer than none")


@pytest.mark.parametrize(
    ("tokens", "entries"),
    [(3, 8196), (2, 16384), (2, 32768)]
    + [pytest.param(*sizes, marks=LARGE) for sizes in ((8, 40000), (2, 131136), (1, 262140), (8, 262144))],
)
def test_choice_by_the_best_of_groups(tokens: int, entries: int, cuda_normal: Normal) -> None:
    """Also where more groups may hold a winner than there is room for, or winners are neighbours."""
    near = {"neighbours": lambda s: s + 4 * s[:, ::100].repeat_interleave(100, dim=1)[:, : s.shape[1]]}
    for name, kind in (KINDS | near).items():
        scores, visible = kind(cuda_normal(tokens, entries)), visible_of(tokens, entries, cuda_normal)
        scores = scores.masked_fill(torch.arange(entries, device="cuda") >= visible[:, None], torch.nan)
        best = best_of(scores, visible)
        for top_k in (64, 512, 1024, 3000):
            found = torch.empty((tokens, top_k), dtype=torch.int32, device="cuda")
            dirty_memory()
            _C.select_topk(scores, best, visible, found, tokens, entries, top_k)
            want = reference.select_topk(scores.cpu(), visible.cpu(), top_k=top_k)
            assert_bits(found.cpu(), want, f"{name}, {top_k} of {entries}, {tokens} tokens")


def test_a_choice_does_not_depend_on_the_others(cuda_normal: Normal) -> None:
    """With few and with many entries, where a row may be divided; rows at any place of 16 bytes."""
    for entries in (700, 8193, 16386):
        scores = (20 * cuda_normal(MAX_STEP + 1, entries)).round()
        visible = visible_of(MAX_STEP + 1, entries, cuda_normal)
        whole = select_topk(scores, visible, top_k=512)
        for t in range(MAX_STEP + 1):
            alone = select_topk(scores[t : t + 1].clone(), visible[t : t + 1], top_k=512)
            assert_bits(alone, whole[t : t + 1], f"{entries} entries, row {t} alone")
            some = select_topk(scores[: t + 1].clone(), visible[: t + 1], top_k=512)
            assert_bits(some, whole[: t + 1], f"{entries} entries, {t + 1} rows")


@pytest.mark.parametrize("tokens", [3, 137])
@pytest.mark.parametrize("sizes", MODELS, ids=lambda sizes: sizes.name)
@pytest.mark.parametrize("keys", ["records", "bf16"])
def test_scores_and_choice(sizes: Sizes, tokens: int, keys: str, cuda_normal: Normal) -> None:
    """The choice of the kernel's scores; of the reference's, but for entries about as good as the last."""
    call = make_call(sizes.index_heads, tokens, 4500, keys, cuda_normal)
    case, form, top_k = f"{sizes.name}, {keys}, {tokens} tokens", launch.default_form(), sizes.index_topk
    dirty_memory()
    found = choose_entries(*call.operands(), top_k=top_k)
    assert_bits(found, select_topk(call.scores(form), call.visible, top_k=top_k), case)
    scores, unequal = call.want()[0].cpu(), 0
    want = reference.select_topk(scores, call.visible.cpu(), top_k=top_k)
    for t, (mine, theirs) in enumerate(zip(found.tolist(), want.tolist(), strict=True)):
        last = min((scores[t, j].item() for j in theirs if j >= 0), default=0.0)
        for j in set(mine) ^ set(theirs):
            value = scores[t, j].item()
            about = f"{case}: query {t}, entry {j}: {value}, the last one's {last}"
            assert abs(value - last) <= 2e-5 * abs(last), about
        unequal += mine != theirs
    assert unequal <= tokens // 100, f"{case}: {unequal} rows differ"


def test_parts_of_queries(monkeypatch: pytest.MonkeyPatch, cuda_normal: Normal) -> None:
    """Scores of fewer queries at a time choose the same; each part waits for the one before."""
    call = make_call(TINY.index_heads, 61, 3000, "records", cuda_normal)
    want = choose_entries(*call.operands(), top_k=64)
    for rows in (1, 7, 16, 60):
        monkeypatch.setattr(launch, "SCORE_BYTES", 4 * 3000 * rows)
        assert launch.queries_at_once(61, 3000) == {1: 1, 7: 7, 16: 16, 60: 56}[rows]
        found = choose_entries(*call.operands(), top_k=64)
        assert_bits(found, want, f"{rows} queries at a time")


@pytest.mark.parametrize("tokens", range(1, MAX_STEP + 1))
def test_a_row_of_a_step(tokens: int, cuda_normal: Normal) -> None:
    for entries in (100, 3000, 20000, 20001):
        call = make_call(TINY.index_heads, tokens, entries, "records", cuda_normal)
        whole = choose_entries(*call.operands(), top_k=64)
        for t in range(tokens):
            alone = choose_entries(*call.part(slice(t, t + 1)).operands(), top_k=64)
            assert_bits(alone, whole[t : t + 1], f"{entries} entries, row {t} of {tokens}")


@LARGE
@pytest.mark.parametrize("tokens", [1, 8, 64])
def test_reproducible(tokens: int, cuda_normal: Normal) -> None:
    for entries in (300, 4096, 16384):
        call = make_call(FLASH.index_heads, tokens, entries, "records", cuda_normal)
        case = f"{tokens} tokens, {entries} entries"
        assert_reproducible(lambda call=call: choose_entries(*call.operands(), top_k=512), case)


@pytest.mark.parametrize("entries", [4096, 16384])
def test_a_graph_reads_on_the_device_what_is_visible(entries: int, cuda_normal: Normal) -> None:
    if without_allocator():
        pytest.skip("a graph needs the allocator")
    call = make_call(FLASH.index_heads, 2, 9 * entries, "records", cuda_normal)  # of which 8 parts are no NaN
    call = replace(call, keys=call.keys[:entries].contiguous(), visible=call.visible.clone())
    call.choice(None, 512)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call.choice(None, 512)
    for visible in ((0, 1), (511, 512), (513, 2000), (entries - 1, entries), (300, 8193)):
        call.visible.copy_(torch.tensor(visible))
        graph.replay()
        found = captured.clone()
        case = f"{entries} entries, {visible} visible"
        assert_bits(found, call.choice(None, 512), f"{case}, replayed")
        assert_bits(found, select_topk(call.scores(None), call.visible, top_k=512), case)
