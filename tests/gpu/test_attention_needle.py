"""Keys planted up to a million tokens back in a synthetic cache are chosen by the indexer and attended to.

No trained weights: an index key that is one of the query's directions scores above all random ones, and of
the chosen rows the one that a head's query points at takes the whole softmax: the head's output is this row.
"""

from typing import NamedTuple

import pytest
import torch
from indexer_cases import Normal
from numeric import assert_attention
from shapes import MODELS, TINY, Sizes
from torch import Tensor

from dsv4.ops.attention import attend, attend_step
from dsv4.ops.formats import INDEX_RECORD, KV_RECORD, MAX_STEP, decode_rows
from dsv4.ops.indexer import choose_entries
from dsv4.ops.quant import round_index
from dsv4.ops.rows import load_rows, store_rows

WINDOW, RING = 128, 128 + MAX_STEP - 1
# As shares of the context: the first entries, one of each quarter, the last entries.
PLACES = (0.0, 1e-3, 0.13, 0.41, 0.66, 0.9, 1.0)
NEEDLE = 4.0  # times a direction of the index queries
POINTED = 8.0  # times the row that a head looks for


class Cache(NamedTuple):
    """The tables of a CSA layer; ``needles`` are the entries planted, ``directions`` what their keys are."""

    index: Tensor  # [C, 68]
    kv: Tensor  # [C, 592]
    ring: Tensor  # [R, 592]
    needles: list[int]
    directions: Tensor  # [n, Di]


def records(rows: Tensor, record: int) -> Tensor:
    table = torch.full((rows.shape[0], record), 0xFF, dtype=torch.uint8, device="cuda")
    store_rows(rows.bfloat16(), table, torch.arange(rows.shape[0], device="cuda"))
    return table


def make_cache(sizes: Sizes, context: int, normal: Normal) -> Cache:
    """Behind the last entry of ``context`` tokens stands a better needle, which nobody may see, then NaN."""
    entries = context // sizes.csa_ratio
    needles = [round(place * (entries - 1)) for place in PLACES]
    directions, keys = normal(len(needles), sizes.index_dim), normal(entries + 9, sizes.index_dim)
    keys[needles] = NEEDLE * directions
    keys[entries] = 4 * NEEDLE * directions.sum(dim=0)
    index, kv = records(keys, INDEX_RECORD), records(normal(entries + 9, sizes.head_dim), KV_RECORD)
    index[entries + 1 :], kv[entries:] = 0xFF, 0xFF
    return Cache(index, kv, records(normal(RING, sizes.head_dim), KV_RECORD), needles, directions)


def query(sizes: Sizes, cache: Cache, tokens: int, normal: Normal) -> tuple[Tensor, Tensor, Tensor]:
    """Index queries, their weights, and queries of attention: head h looks for needle h mod n."""
    targets = torch.arange(sizes.index_heads, device="cuda") % len(cache.needles)
    q = cache.directions[targets] + 0.1 * normal(tokens, sizes.index_heads, sizes.index_dim)
    factor = (sizes.index_dim * sizes.index_heads) ** -0.5
    weights = torch.full((tokens, sizes.index_heads), factor, device="cuda")
    rows = decode_rows(cache.kv[cache.needles])
    return round_index(q.bfloat16()), weights, POINTED * rows[torch.arange(sizes.heads) % len(cache.needles)]


@pytest.mark.parametrize("tokens", [1, 5, MAX_STEP, MAX_STEP + 4])
@pytest.mark.parametrize("sizes", MODELS, ids=lambda sizes: sizes.name)
def test_needles_are_found(sizes: Sizes, tokens: int, cuda_normal: Normal) -> None:
    """By steps, which read the tables as they are stored, and by a chunk of more tokens on plain rows."""
    context = 20_000 if sizes is TINY else 1_000_000
    cache = make_cache(sizes, context, cuda_normal)
    positions = torch.arange(context - tokens, context, device="cuda")
    visible = (positions + 1) // sizes.csa_ratio
    index_q, weights, rows = query(sizes, cache, tokens, cuda_normal)
    selected = choose_entries(index_q, cache.index, weights, visible, top_k=sizes.index_topk)
    case = f"{sizes.name}, {tokens} tokens"
    for t, chosen in enumerate(selected.tolist()):
        wanted = {j for j in cache.needles if j < int(visible[t])}
        assert wanted <= set(chosen), f"{case}: query {t} misses entries {sorted(wanted - set(chosen))}"
        assert max(chosen) < int(visible[t]), f"{case}: query {t} sees entry {max(chosen)}"
    q = rows.expand(tokens, -1, -1).contiguous()
    sink, no_turn = torch.zeros(sizes.heads, device="cuda"), torch.zeros(sizes.rope_dim // 2, device="cuda")
    if tokens <= MAX_STEP:
        options = {"window": WINDOW, "compressed": cache.kv, "ratio": sizes.csa_ratio, "selected": selected}
        out = attend_step(q, cache.ring, sink, positions, no_turn, **options)
    else:
        window_kv = cuda_normal(WINDOW - 1 + tokens, sizes.head_dim).bfloat16()
        plain = load_rows(cache.kv, context // sizes.csa_ratio)
        options = {"window": WINDOW, "compressed": plain, "selected": selected}
        out = attend(q, window_kv, sink, positions, no_turn, **options)
    # The last needle may be hidden from the first of several tokens.
    seen = [h for h in range(sizes.heads) if cache.needles[h % len(cache.needles)] < int(visible[0])]
    assert_attention(out[:, seen], q[:, seen] / POINTED, f"{case}: outputs of heads {seen}")
