"""Core attention: one softmax over window and compressed entries, with a sink, then the inverse RoPE.

``attend_step`` is for up to ``MAX_STEP`` tokens (ops/formats.py): it reads the window ring and the tables of
the cache as they are stored, and positions on the device alone. ``attend`` is for longer chunks: plain rows.
"""

import torch
from torch import Tensor

from dsv4.ops.attention import prefill, reference, step
from dsv4.ops.dispatch import op


@op(reference.attend, kernel=True)
def attend(
    q: Tensor,
    window_kv: Tensor,
    sink: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    *,
    window: int,
    compressed: Tensor | None = None,
    visible: Tensor | None = None,
    selected: Tensor | None = None,
) -> Tensor:
    """Attention of T consecutive queries; keys are values, one KV head serves all query heads.

    q [T, H, Dh], bf16 or f32; window_kv [P + T, Dh] like q: the P rows before the first query, then the
    queries' own, oldest first; query t sees itself and the ``window`` - 1 rows before it. compressed [C, Dh]
    like q: either all entries j < visible[t] (visible [T] i64), or the entries selected[t] (selected [T, I]
    i32, ascending, -1s behind them). Rows that no query sees do not matter, be they NaN. sink [H] f32,
    unscaled, joins the denominator only. Scores q . k * Dh^-0.5 and all sums fp32; P is rounded to q's dtype
    before it meets the values, the denominator sums P unrounded. Returns [T, H, Dh] in q's dtype, rounded
    once, behind the inverse RoPE of the last Dr values by positions[t] (positions [T] i64, inv_freq [Dr/2]
    f32). Source: docs/model.md 2.7, 2.10.
    """
    run = step.run_chunk_f32 if q.dtype == torch.float32 else prefill.run
    return run(
        q,
        window_kv,
        sink,
        positions,
        inv_freq,
        window=window,
        compressed=compressed,
        visible=visible,
        selected=selected,
    )


@op(reference.attend_step, kernel=True)
def attend_step(
    q: Tensor,
    window_rows: Tensor,
    sink: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    *,
    window: int,
    compressed: Tensor | None = None,
    ratio: int = 0,
    selected: Tensor | None = None,
) -> Tensor:
    """``attend`` for at most ``MAX_STEP`` queries, on the tables of the cache; capturable in a CUDA graph.

    q [T, H, Dh], bf16 or f32. Tables are plain rows of q's dtype, or KV records of 592 u8 (ops/formats.py).
    window_rows [R, Dh or 592], R >= ``window`` + T - 1: position p lies in row p mod R, and query t at p =
    positions[t] sees positions max(0, p - window + 1) .. p, its own included. compressed [C, Dh or 592]:
    either all entries j < (p + 1) // ``ratio``, or the entries selected[t] (selected [T, I] i32, ascending,
    -1s behind them). Other rows do not matter, be they NaN. sink [H] f32, positions [T] i64, inv_freq [Dr/2]
    f32; sums, roundings and the inverse RoPE as for ``attend``, but that P keeps 11 bits where it meets codes
    of records -> [T, H, Dh] in q's dtype. Row t has the bits that a call with this query alone gives. Source:
    docs/model.md 2.7, 2.10, 3.
    """
    return step.run(
        q,
        window_rows,
        sink,
        positions,
        inv_freq,
        window=window,
        compressed=compressed,
        ratio=ratio,
        selected=selected,
    )
