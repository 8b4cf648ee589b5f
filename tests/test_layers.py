"""How attention layers group their matrix products: those of one input are one operation."""

from pathlib import Path

import pytest
import torch

import dsv4
from dsv4.config import CSA_RATIO, WINDOW_ONLY
from dsv4.ops.dispatch import Op, listen
from dsv4.ops.formats import MAX_STEP

TINY = Path(__file__).resolve().parents[1] / "models" / "tiny"
MOST = 8  # matrices of one launch


@pytest.fixture(scope="module")
def engine() -> dsv4.Engine:
    return dsv4.load(TINY, max_context=300)


@pytest.mark.parametrize(("tokens", "context"), [(1, 300), (1, 200), (9, 300), (300, 300)])
def test_products_of_one_input_are_one_operation(engine: dsv4.Engine, tokens: int, context: int) -> None:
    """Index queries are made only where there are more entries than the indexer chooses, or, in a step, where
    there may come to be more."""
    found: dict[int, list[tuple[str, int]]] = {}
    positions, cache = torch.arange(tokens), engine.model.new_cache(context)
    u = torch.randn(tokens, engine.config.hidden_size, generator=torch.Generator().manual_seed(0))
    for block, state in zip(engine.model.blocks, cache.layers, strict=True):
        products = found.setdefault(block.attn.ratio, [])
        products.clear()

        def listener(op: Op, result: object, products: list[tuple[str, int]] = products) -> None:
            if op.room == "gemm":
                products.append((op.name, len(result) if isinstance(result, tuple) else 1))

        with torch.inference_mode(), listen(listener):
            block.attn.forward(u.to(engine.model.dtype), positions, state, 0)
    output = [("grouped_linear", 1), ("linear", 1)]
    reach = context if tokens <= MAX_STEP else tokens
    chooses = reach // CSA_RATIO > engine.config.index_topk
    assert found.keys() > {WINDOW_ONLY, CSA_RATIO}
    for ratio, products in found.items():
        matrices = {WINDOW_ONLY: 2, CSA_RATIO: 7}.get(ratio, 4)
        assert matrices <= MOST
        queries = ("linear_stack", 2) if ratio == CSA_RATIO and chooses else ("linear", 1)
        assert products == [("linear_stack", matrices), queries, *output], ratio
