"""The kernels of the indexer: which one runs, what they check, and their workspace. Keys of 128 values."""

import torch
from torch import Tensor

from dsv4 import _C
from dsv4.ops.checks import FLOATS, Shapes
from dsv4.ops.formats import INDEX_CODES, INDEX_RECORD, MAX_STEP

FORMS = ("wgmma", "mma")
MAX_HEADS = 128  # of bf16 queries
MAX_ENTRIES = 1 << 30
SCORE_BYTES = 1 << 28  # of the scores that are kept at once
TILE = 8  # queries that a block takes; parts of a call are a multiple of so many
GROUP = 16  # entries whose best score is kept for the choice of a step,
BEST_ENTRIES = (8192, 1 << 18)  # of more than so many entries and up to so many


def score(q: Tensor, keys: Tensor, weights: Tensor, visible: Tensor, *, form: str | None = None) -> Tensor:
    """``index_scores`` on CUDA; tests name a ``form``, one of ``FORMS``. Source: docs/model.md 2.10, 2.11."""
    tokens, _, entries = _sizes(q, keys, weights, visible)
    out = q.new_empty((tokens, entries), dtype=torch.float32)
    if out.numel():
        _score_into(out, None, q, keys, weights, visible, 0, form)
    return out


def select(scores: Tensor, visible: Tensor, *, top_k: int) -> Tensor:
    """``select_topk`` on CUDA. Source: docs/model.md 2.10, 2.11."""
    shapes = Shapes()
    shapes.check("scores", scores, "T C", torch.float32)
    shapes.check("visible", visible, "T", torch.int64)
    tokens, entries = shapes["T"], shapes["C"]
    _check_choice(entries, top_k)
    out = visible.new_empty((tokens, min(top_k, entries)), dtype=torch.int32)
    if out.numel():
        _C.select_topk(scores, None, visible, out, tokens, entries, top_k)
    return out


def choose(
    q: Tensor, keys: Tensor, weights: Tensor, visible: Tensor, *, top_k: int, form: str | None = None
) -> Tensor:
    """``choose_entries`` on CUDA; tests name a ``form``. Source: docs/model.md 2.10, 2.11."""
    tokens, _, entries = _sizes(q, keys, weights, visible)
    _check_choice(entries, top_k)
    out = visible.new_empty((tokens, min(top_k, entries)), dtype=torch.int32)
    if not out.numel():
        return out
    rows, needed = queries_at_once(tokens, entries), entries > top_k
    scores = q.new_empty((rows if needed else 0, entries), dtype=torch.float32)
    best = _new_best(q, entries) if needed else None
    for first in range(0, tokens, rows):
        part = slice(first, min(first + rows, tokens))
        if needed:
            _score_into(scores, best, q[part], keys, weights[part], visible[part], top_k, form)
        _C.select_topk(scores, best, visible[part], out[part], part.stop - first, entries, top_k)
    return out


def queries_at_once(tokens: int, entries: int) -> int:
    """How many of ``tokens`` queries are scored before the best entries are chosen."""
    rows = max(1, SCORE_BYTES // (4 * entries))
    return min(tokens, rows if rows < TILE else rows - rows % TILE)


def default_form() -> str:
    """What bf16 queries run on on the current device."""
    return "wgmma" if torch.cuda.get_device_capability() == (9, 0) else "mma"


def _new_best(q: Tensor, entries: int) -> Tensor | None:
    """Room for the best score of every ``GROUP`` entries of a row, in whole fours, or None where unused."""
    few, most = BEST_ENTRIES
    if q.dtype != torch.bfloat16 or q.shape[0] > MAX_STEP or not few < entries <= most or entries % 4:
        return None
    return q.new_empty((q.shape[0], 4 * -(-entries // (4 * GROUP))), dtype=torch.int32)


def _score_into(
    out: Tensor,
    best: Tensor | None,
    q: Tensor,
    keys: Tensor,
    weights: Tensor,
    visible: Tensor,
    least: int,
    form: str | None,
) -> None:
    """Scores of the queries that see more than ``least`` entries; all sizes are positive and checked."""
    tensors, numbers = (q, keys, weights, visible, out), (*q.shape[:2], keys.shape[0], least)
    if q.dtype == torch.float32:
        assert form is None, f"form: expected None for float32, found {form!r}"
        _C.index_scores_f32(*tensors, *numbers)
        return
    form = form or default_form()
    assert form in FORMS, f"form: expected one of {FORMS}, found {form!r}"
    _C.index_scores(*tensors, best, *numbers, form == "mma")


def _sizes(q: Tensor, keys: Tensor, weights: Tensor, visible: Tensor) -> tuple[int, int, int]:
    """T, Hi and C; everything is checked."""
    shapes = Shapes()
    shapes.check("q", q, f"T H {INDEX_CODES}", FLOATS)
    records = keys.dtype == torch.uint8 and q.dtype == torch.bfloat16
    width, dtype = (INDEX_RECORD, torch.uint8) if records else (INDEX_CODES, q.dtype)
    shapes.check("keys", keys, f"C {width}", dtype)
    shapes.check("weights", weights, "T H", torch.float32)
    shapes.check("visible", visible, "T", torch.int64)
    tokens, heads, entries = shapes["T"], shapes["H"], shapes["C"]
    limited = q.dtype == torch.bfloat16
    assert heads > 0 and (heads <= MAX_HEADS or not limited), (
        f"q: expected 1 to {MAX_HEADS} heads, found {heads}"
    )
    return tokens, heads, entries


def _check_choice(entries: int, top_k: int) -> None:
    assert top_k > 0, f"top_k: expected at least 1, found {top_k}"
    assert entries <= MAX_ENTRIES, f"expected at most {MAX_ENTRIES} entries, found {entries}"
