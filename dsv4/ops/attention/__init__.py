"""Core attention: one softmax over window and compressed entries, with a sink."""

from torch import Tensor

from dsv4.ops.attention import reference
from dsv4.ops.dispatch import op


@op(reference.attend)
def attend(
    q: Tensor,
    window_kv: Tensor,
    sink: Tensor,
    *,
    window: int,
    compressed: Tensor | None = None,
    visible: Tensor | None = None,
    selected: Tensor | None = None,
) -> Tensor:
    """Attention of T consecutive queries; keys are values, one KV head serves all query heads.

    q [T, H, Dh]; window_kv [P + T, Dh]: the P rows before the first query, then the queries' own, oldest
    first; query t sees itself and the ``window`` - 1 rows before it. compressed [C, Dh]: either all
    entries j < visible[t] (visible [T] i64), or the entries selected[t] (selected [T, I] i64, -1 for none).
    sink [H] f32, unscaled, joins the denominator only. Scores q . k * Dh^-0.5 -> [T, H, Dh] in q's dtype,
    still rotated: the caller applies the inverse RoPE. Source: docs/model.md 2.7, 2.10.
    """
