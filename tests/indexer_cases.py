"""What the tests of the indexer's kernels share: queries, keys and weights, and what they must give."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from numeric import assert_layout, dirty_memory, poison
from torch import Tensor

from dsv4.ops.formats import INDEX_CODES, INDEX_RECORD, decode_rows
from dsv4.ops.indexer import launch
from dsv4.ops.quant.reference import round_index
from dsv4.ops.rows.reference import store_rows

Normal = Callable[..., Tensor]


@dataclass(frozen=True)
class Call:
    """What index_scores takes; keys that no query sees are NaN, or bytes of 0xff."""

    q: Tensor
    keys: Tensor
    weights: Tensor
    visible: Tensor

    def operands(self) -> tuple[Tensor, ...]:
        return self.q, self.keys, self.weights, self.visible

    def part(self, rows: slice) -> "Call":
        q, weights, visible = (x[rows].contiguous() for x in (self.q, self.weights, self.visible))
        return Call(q, self.keys, weights, visible)

    def scores(self, form: str | None) -> Tensor:
        dirty_memory()
        return launch.score(*self.operands(), form=form)

    def choice(self, form: str | None, top_k: int) -> Tensor:
        dirty_memory()
        return launch.choose(*self.operands(), top_k=top_k, form=form)

    def want(self) -> tuple[Tensor, Tensor]:
        """Scores [T, C] f64, and the sums of their terms' magnitudes."""
        keys, rows = decode_rows(self.keys).nan_to_num().double(), []
        for q, weights in zip(self.q.double(), self.weights.double(), strict=True):
            dots = torch.relu(q @ keys.T)
            rows.append((weights @ dots, weights.abs() @ dots))
        scores, sums = zip(*rows, strict=True)
        return torch.stack(scores), torch.stack(sums)

    def seen(self) -> Tensor:
        return torch.arange(self.keys.shape[0], device="cuda") < self.visible[:, None]


def visible_of(tokens: int, most: int, normal: Normal) -> Tensor:
    """Anything from 0 to ``most``; the last query sees all of it, the first of several nothing."""
    visible = normal(tokens).view(torch.int32).abs() % (most + 1)
    visible[0], visible[-1] = 0, most
    return visible.long()


def make_call(heads: int, tokens: int, entries: int, keys: str, normal: Normal) -> Call:
    """The last ninth of the entries is not seen; keys are of different magnitudes, some zeros."""
    most = entries - entries // 9
    rows = normal(entries, INDEX_CODES) * torch.exp2(2 * normal(entries, 1))
    rows[1::50] = 0
    q, table = normal(tokens, heads, INDEX_CODES), rows if keys == "f32" else rows.bfloat16()
    q = q if keys == "f32" else q.bfloat16()
    if keys == "records":
        q, table = round_index(q), torch.zeros((entries, INDEX_RECORD), dtype=torch.uint8, device="cuda")
        store_rows(rows.bfloat16(), table, torch.arange(entries, device="cuda"))
    poison(table[most:])
    return Call(q, table, normal(tokens, heads), visible_of(tokens, most, normal))


def best_of(scores: Tensor, visible: Tensor) -> Tensor:
    """What index_scores leaves of every 16 entries: [T, 4 ceil(C / 64)] i32, -1 where none is seen."""
    entries = scores.shape[1]
    bits = (scores + 0.0).view(torch.int32).long() & 0xFFFFFFFF
    keys = torch.where(bits >> 31 == 1, 0xFFFFFFFF - bits, bits + 0x80000000)
    keys = keys.masked_fill(scores.isnan(), 0xFFFFFFFF)
    keys = keys.masked_fill(torch.arange(entries, device=scores.device) >= visible[:, None], -1)
    keys = torch.nn.functional.pad(keys, (0, -entries % 64), value=-1)
    return keys.unflatten(1, (-1, 16)).amax(dim=2).to(torch.int32)


def check_scores(call: Call, form: str | None, case: str, rtol: float = 1e-5) -> Tensor:
    """Within ``rtol`` of the largest sum of terms of the row; returns the kernel's."""
    found, (want, sums) = call.scores(form), call.want()
    assert_layout(found, want.float(), case)
    seen = call.seen()
    limit = rtol * sums.masked_fill(~seen, 0).amax(dim=1, keepdim=True)
    wrong = (seen & ~((found - want).abs() <= limit)).nonzero()  # NaN is wrong
    if len(wrong):
        (t, j), at = wrong[0].tolist(), [len(wrong[:, dim].unique()) for dim in (0, 1)]
        raise AssertionError(
            f"{case}: {len(wrong)} of {int(seen.sum())} scores differ by more than {rtol} of the "
            f"row's largest sum of terms, at {at[0]} queries and {at[1]} entries; first query {t}, "
            f"entry {j}: expected {want[t, j]}, found {found[t, j]}, sum {sums[t, j]}"
        )
    return found
