"""The whole model on the GPU against the CPU, and the bits that docs/architecture.md section 6 promises."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from numeric import assert_bits
from torch import Tensor

import dsv4
from dsv4.engine import Engine

TINY = Path(__file__).resolve().parent.parent.parent / "models" / "tiny"
POSITIONS = 2000


@cache
def tiny(device: str, dtype: str, reference: tuple[str, ...] = ()) -> Engine:
    context = POSITIONS + 64
    return dsv4.load(TINY, device=device, dtype=dtype, max_context=context, reference=reference, mtp=True)


@cache
def token_ids() -> list[int]:
    text = (TINY / "held_out.txt").read_text(encoding="utf-8")
    engine = tiny("cpu", "float32")
    return engine.tokenizer.encode("<｜begin▁of▁sentence｜>" + text[: 6 * POSITIONS])[:POSITIONS]


@cache
def cpu_logits(dtype: str) -> Tensor:
    threads = torch.get_num_threads()
    torch.set_num_threads(8)
    try:
        return tiny("cpu", dtype).logits(token_ids(), chunk=500)
    finally:
        torch.set_num_threads(threads)


def divergence(want: Tensor, found: Tensor) -> tuple[float, int]:
    """Mean KL(want || found) in nats, and how many top-1 tokens differ where want's margin exceeds 0.1."""
    p, q = want.double().log_softmax(-1), found.double().log_softmax(-1)
    best = want.topk(2).values
    clear = best[:, 0] - best[:, 1] > 0.1
    differ = (want.argmax(-1) != found.argmax(-1)) & clear
    return float((p.exp() * (p - q)).sum(-1).mean()), int(differ.sum())


@pytest.mark.large
@pytest.mark.parametrize(
    ("dtype", "chunk"),
    [("float32", 1), ("float32", 7), ("float32", 512), ("float32", None), ("bfloat16", 1), ("bfloat16", 512)],
)
def test_tiny_against_cpu(
    dtype: str, chunk: int | None, record_property: Callable[[str, object], None]
) -> None:
    """2,000 teacher-forced positions, chunked and token by token.

    In bf16 a rounding now and then turns the choice of an expert or entry, as it does between f32 and bf16
    on a CPU, where one of these positions differs as well; in f32 nothing may.
    """
    assert len(token_ids()) == POSITIONS
    found = tiny("cuda", dtype).logits(token_ids(), chunk=chunk)
    kl, differ = divergence(cpu_logits(dtype), found)
    record_property("kl", kl)
    record_property("top1_differ", differ)
    print(f"{dtype} chunk {chunk}: KL {kl:.3e} nats, {differ} top-1 tokens differ at a margin above 0.1")
    assert kl < 1e-3
    assert differ <= (0 if dtype == "float32" else 2)


@pytest.mark.large
def test_kernels_against_references_on_the_gpu() -> None:
    """In f32 no rounding hides an error of a kernel. Tensor cores do not round every sum to nearest."""
    ids = token_ids()[:700]
    kernels = tiny("cuda", "float32").logits(ids, chunk=64)
    references = tiny("cuda", "float32", ("all",)).logits(ids, chunk=64)
    kl, differ = divergence(references, kernels)
    assert kl < 1e-5 and differ == 0


def test_repetition_and_a_fresh_sequence_after_another() -> None:
    engine, ids = tiny("cuda", "bfloat16"), token_ids()[:150]
    first = engine.logits(ids, chunk=8)
    engine.logits(ids[70:], chunk=3)
    assert_bits(engine.logits(ids, chunk=8), first, "after another sequence")


@pytest.mark.parametrize("step", [2, 3, 7, 8])
def test_rows_of_a_step(step: int) -> None:
    """Steps of up to 8 tokens against token by token, over both compressors' emissions.

    Each kernel keeps the bits of a row (the rooms' tests). Attention runs on its reference, whose bits change
    with the shape, so the whole model is compared closely only.
    """
    engine, ids = tiny("cuda", "float32"), token_ids()[:140]
    single, several = engine.logits(ids, chunk=1), engine.logits(ids, chunk=step)
    kl, differ = divergence(single, several)
    assert kl < 1e-5 and differ == 0


def test_snapshot_and_restore() -> None:
    engine, ids = tiny("cuda", "bfloat16"), token_ids()
    cache, model = engine.cache, engine.model

    def decode(tokens: list[int]) -> Tensor:
        return torch.stack([engine.decode_one(token) for token in tokens])

    engine.prefill(torch.tensor(ids[:123], device="cuda"))
    with torch.inference_mode():
        saved = cache.snapshot()
    first = decode(ids[123:323])  # wraps the window ring and completes an HCA entry
    with torch.inference_mode():
        cache.restore(saved)
    assert_bits(decode(ids[123:323]), first, "after restore")
    assert model.config.window < 200


def test_greedy_text_and_sampling() -> None:
    """The same tokens again, and the same as on the CPU: sampling has one definition."""
    engine = tiny("cuda", "float32")
    ids = engine.tokenizer.encode("<｜begin▁of▁sentence｜>ROMEO:")
    greedy = [list(engine.generate(ids, 40)) for _ in range(2)]
    assert greedy[0] == greedy[1] == list(tiny("cpu", "float32").generate(ids, 40))
    settings = dsv4.Sampling(temperature=0.8, top_k=50, top_p=0.9, seed=7)
    sampled = [list(tiny(device, "float32").generate(ids, 40, settings)) for device in ("cuda", "cpu")]
    assert sampled[0] == sampled[1]


def test_drafts() -> None:
    ids = token_ids()[:300]
    found, want = (tiny(device, "float32").draft_logits(ids) for device in ("cuda", "cpu"))
    kl, differ = divergence(want, found)
    assert kl < 1e-5 and differ == 0
