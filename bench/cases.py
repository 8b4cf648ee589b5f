"""The cases of ``bench.ops``: the operations' inputs at the sizes of Flash and Pro, bytes, flop, targets."""

import sys
from collections.abc import Callable
from typing import Any

import torch

from bench.attention_cases import attention_cases
from bench.harness import ROOT, Case, Draw
from bench.indexer_cases import indexer_cases
from bench.matrix_cases import matrix_cases, tokens_of
from dsv4.ops import compressor, embed, mhc, norm, quant, rope, router, sampling
from dsv4.ops.formats import Plain

sys.path.insert(0, str(ROOT / "tests"))
from shapes import FLASH, PRO, Sizes  # noqa: E402

LARGE = 8192  # tokens of a prefill chunk
EPS = 1e-6
GATE_SCALE = 1.5
BF16, F32 = 2, 4  # bytes


def if_large(tokens: int, target: str) -> str | None:
    return target if tokens == LARGE else None


def if_one(tokens: int, target: str) -> str | None:
    return target if tokens == 1 else None


# Norm and RoPE. Queries have no weight, the KV row has one.


def rms_norm(sizes: Sizes, tokens: int) -> Case:
    return Case(
        room="norm",
        op="rms_norm",
        case=tokens_of(tokens, sizes),
        inputs=lambda draw: (draw.normal(tokens, sizes.hidden), 1 + draw.f32(sizes.hidden, scale=0.3)),
        call=lambda x, weight: norm.rms_norm(x, weight, eps=EPS),
        target=if_large(tokens, ">= 80 %"),
    )


def angles(draw: Draw, sizes: Sizes, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions [T] i64 and frequencies [Dr/2] f32."""
    return draw.distinct(1 << 16, tokens), draw.f32(sizes.rope_dim // 2).sigmoid()


def query_norm_rope(sizes: Sizes, tokens: int) -> Case:
    shape = (tokens, sizes.heads, sizes.head_dim)
    return Case(
        room="rope",
        op="rms_norm_rope",
        case=f"queries, {tokens_of(tokens, sizes)}",
        inputs=lambda draw: (draw.normal(*shape), *angles(draw, sizes, tokens)),
        call=lambda x, positions, inv_freq: rope.rms_norm_rope(x, None, positions, inv_freq, eps=EPS),
    )


def kv_norm_rope(sizes: Sizes, tokens: int) -> Case:
    def inputs(draw: Draw) -> tuple[torch.Tensor, ...]:
        weight = 1 + draw.f32(sizes.head_dim, scale=0.3)
        return draw.normal(tokens, sizes.head_dim), weight, *angles(draw, sizes, tokens)

    return Case(
        room="rope",
        op="rms_norm_rope",
        case=f"KV, {tokens_of(tokens)}",
        inputs=inputs,
        call=lambda *args: rope.rms_norm_rope(*args, eps=EPS),
    )


def output_rope(sizes: Sizes, tokens: int) -> Case:
    shape = (tokens, sizes.heads, sizes.head_dim)
    return Case(
        room="rope",
        op="apply_rope",
        case=f"attention output, {tokens_of(tokens, sizes)}",
        inputs=lambda draw: (draw.normal(*shape), *angles(draw, sizes, tokens)),
        call=lambda x, positions, inv_freq: rope.apply_rope(x, positions, inv_freq, inverse=True),
    )


# Quantisation.


def quantize_rows(op: Callable[..., Any]) -> Callable[[Sizes, int], Case]:
    """The case of an operation that takes a token's hidden values alone."""

    def make(sizes: Sizes, tokens: int) -> Case:
        return Case(
            room="quant",
            op=op.__name__,
            case=tokens_of(tokens, sizes),
            inputs=lambda draw: (draw.normal(tokens, sizes.hidden),),
            call=op,
            target=if_large(tokens, ">= 80 %"),
        )

    return make


def quantize_nvfp4(sizes: Sizes, tokens: int) -> Case:
    def inputs(draw: Draw) -> tuple[torch.Tensor, ...]:
        x = draw.normal(tokens, sizes.hidden)
        return x, x.abs().amax().float() / 2688

    return Case(
        room="quant",
        op="quantize_nvfp4",
        case=f"given scale, {tokens_of(tokens, sizes)}",
        inputs=inputs,
        call=quant.quantize_nvfp4,
        target=if_large(tokens, ">= 80 %"),
    )


def round_kv(sizes: Sizes, tokens: int) -> Case:
    return Case(
        room="quant",
        op="round_kv",
        case=tokens_of(tokens),
        inputs=lambda draw: (draw.normal(tokens, sizes.head_dim),),
        call=lambda kv: quant.round_kv(kv, rope_dim=sizes.rope_dim),
    )


def round_index(sizes: Sizes, tokens: int) -> Case:
    return Case(
        room="quant",
        op="round_index",
        case=f"queries, {tokens_of(tokens)}",
        inputs=lambda draw: (draw.normal(tokens, sizes.index_heads, sizes.index_dim),),
        call=quant.round_index,
    )


# Router: the two launches of a score layer together and apart, and the table of a hash layer.


def gate_inputs(draw: Draw, sizes: Sizes, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    weight = draw.f32(sizes.experts, sizes.hidden, scale=sizes.hidden**-0.5).bfloat16()
    return draw.normal(tokens, sizes.hidden), weight


def topk(logits: torch.Tensor, bias: torch.Tensor, sizes: Sizes) -> Any:
    return router.topk_gate(logits, bias, top_k=sizes.chosen, scale=GATE_SCALE)


def gate(sizes: Sizes, tokens: int) -> Case:
    return Case(
        room="router",
        op="gate_logits + topk_gate",
        case=tokens_of(tokens, sizes),
        inputs=lambda draw: (*gate_inputs(draw, sizes, tokens), draw.f32(sizes.experts, scale=0.1)),
        call=lambda x, weight, bias: topk(router.gate_logits(x, Plain(weight)), bias, sizes),
        flop=2 * tokens * sizes.experts * sizes.hidden,
        target=if_one(tokens, "<= 8 us"),
    )


def gate_logits(sizes: Sizes, tokens: int) -> Case:
    return Case(
        room="router",
        op="gate_logits",
        case=tokens_of(tokens, sizes),
        inputs=lambda draw: gate_inputs(draw, sizes, tokens),
        call=lambda x, weight: router.gate_logits(x, Plain(weight)),
        flop=2 * tokens * sizes.experts * sizes.hidden,
    )


def topk_gate(sizes: Sizes, tokens: int) -> Case:
    return Case(
        room="router",
        op="topk_gate",
        case=tokens_of(tokens, sizes),
        inputs=lambda draw: (draw.f32(tokens, sizes.experts), draw.f32(sizes.experts, scale=0.1)),
        call=lambda logits, bias: topk(logits, bias, sizes),
        target=if_one(tokens, "<= 2.5 us"),
    )


def hash_gate(sizes: Sizes, tokens: int) -> Case:
    """Of the logits only the K chosen count, of the table only the tokens' rows."""

    def inputs(draw: Draw) -> tuple[torch.Tensor, ...]:
        table = draw.integers(sizes.experts, sizes.vocab, sizes.chosen)
        return draw.f32(tokens, sizes.experts), draw.integers(sizes.vocab, tokens), table

    return Case(
        room="router",
        op="hash_gate",
        case=tokens_of(tokens, sizes),
        inputs=inputs,
        call=lambda logits, ids, table: router.hash_gate(logits, ids, table, scale=GATE_SCALE),
        bytes=tokens * (8 + sizes.chosen * (F32 + 8) + sizes.chosen * (F32 + 8)),
    )


# Hyper-connections: post of one sublayer, pre and norm of the next.


def mhc_boundary(sizes: Sizes, tokens: int) -> Case:
    m, d = sizes.streams, sizes.hidden
    rows = (2 + m) * m

    def inputs(draw: Draw) -> tuple[torch.Tensor, ...]:
        post, comb = 2 * draw.f32(tokens, m).sigmoid(), draw.f32(tokens, m, m).softmax(dim=-1)
        fn, base = draw.f32(rows, m * d, scale=(m * d) ** -0.5), draw.f32(rows)
        scale, weight = draw.f32(3).sigmoid(), 1 + draw.f32(d, scale=0.3)
        return draw.normal(tokens, d), draw.normal(tokens, m, d), post, comb, fn, base, scale, weight

    return Case(
        room="mhc",
        op="mhc_boundary",
        case=tokens_of(tokens, sizes),
        inputs=inputs,
        call=lambda *args: mhc.mhc_boundary(*args, iterations=20, eps=EPS, norm_eps=EPS),
        flop=2 * tokens * d * (m * (m + 1) + rows * m + m),  # post, projection, collapse
        target=if_one(tokens, "<= 6 us") or if_large(tokens, ">= 75 %"),
    )


# Compressors: single tokens at a position that does or does not complete a window, and a prefill chunk.


def compressed_bytes(tokens: int, start: int, ratio: int, width: int, rope_dim: int) -> int:
    """What ``compress_kv`` must move: new rows, tail rows that matter or change, constants, bf16 entries."""
    overlap = ratio < 128
    channels = width * (2 if overlap else 1)
    emitted = (start + tokens) // ratio - start // ratio
    pending, left = start % ratio, (start + tokens) % ratio
    rows = tokens + (left if emitted else tokens)  # read; written to the unfinished window
    if emitted:
        rows += pending
    values = rows * channels
    if emitted and overlap:
        values += ratio * width + ratio * channels  # series Ca of the window before; the new window before
    constants = min(tokens, ratio) * channels + (width + rope_dim // 2 if emitted else 0)
    return F32 * (2 * values + constants) + BF16 * emitted * width  # twice: kv and gate


def compress(words: str, tokens: int, start: int, ratio: int, width: int, rope_dim: int) -> Case:
    overlap = ratio < 128
    channels, rows = (2 * width, 2 * ratio) if overlap else (width, ratio)

    def inputs(draw: Draw) -> tuple[torch.Tensor, ...]:
        new = draw.f32(tokens, channels), draw.f32(tokens, channels), draw.f32(ratio, channels)
        tail = draw.f32(rows, channels), draw.f32(rows, channels)
        return *new, *tail, 1 + draw.f32(width, scale=0.3), draw.f32(rope_dim // 2).sigmoid()

    return Case(
        room="compressor",
        op="compress_kv",
        case=f"{words}, {tokens_of(tokens)}",
        inputs=inputs,
        call=lambda *args: compressor.compress_kv(
            *args, start=start, overlap=overlap, eps=EPS, dtype=torch.bfloat16
        ),
        bytes=compressed_bytes(tokens, start, ratio, width, rope_dim),
        target=if_one(tokens, "<= 4 us"),
    )


def compress_cases(sizes: Sizes, large: int) -> list[Case]:
    csa, hca, rope_dim = sizes.csa_ratio, sizes.hca_ratio, sizes.rope_dim
    return [
        compress("CSA, emits", 1, 2 * csa - 1, csa, sizes.head_dim, rope_dim),
        compress("CSA index, emits", 1, 2 * csa - 1, csa, sizes.index_dim, rope_dim),
        compress("HCA", 1, hca // 2, hca, sizes.head_dim, rope_dim),
        compress("HCA, emits", 1, hca - 1, hca, sizes.head_dim, rope_dim),
        compress("CSA", large, 0, csa, sizes.head_dim, rope_dim),
        compress("CSA index", large, 0, csa, sizes.index_dim, rope_dim),
        compress("HCA", large, 0, hca, sizes.head_dim, rope_dim),
    ]


# Both ends of the model.


def sample(words: str, vocab: int, temperature: float, **filters: float) -> Case:
    settings = {"top_k": 0, "top_p": 1.0, "min_p": 0.0} | filters
    return Case(
        room="sampling",
        op="sample_token",
        case=words,
        inputs=lambda draw: (draw.f32(vocab, scale=3.0),),
        call=lambda logits: sampling.sample_token(
            logits, temperature=temperature, **settings, seed=1, position=7
        ),
    )


def sample_cases(sizes: Sizes) -> list[Case]:
    filters = {"top_k": 50, "top_p": 0.95, "min_p": 0.05}
    return [
        sample("greedy", sizes.vocab, 0.0),
        sample("temperature 0.8", sizes.vocab, 0.8),
        sample("temperature 0.8, top-k 50, top-p 0.95, min-p 0.05", sizes.vocab, 0.8, **filters),
    ]


def argmax_head(sizes: Sizes) -> Case:
    """Bytes are those of the screening; of the head itself only a few rows are read."""
    vocab, width = sizes.vocab, sizes.hidden

    def inputs(draw: Draw) -> tuple[torch.Tensor, sampling.ScreenedHead]:
        weight = draw.normal(vocab, width).mul_(width**-0.5)
        return draw.normal(1, width), sampling.screen_head(weight)

    return Case(
        room="sampling",
        op="argmax_head",
        case=f"{sizes.name.capitalize()}, greedy",
        inputs=inputs,
        call=sampling.argmax_head,
        bytes=BF16 * width + vocab * (width + 3 * F32) + 8,
        flop=2 * vocab * width,
    )


def embed_streams(sizes: Sizes, tokens: int) -> Case:
    """One table for all; each launch has other tokens."""
    row = sizes.hidden * BF16
    return Case(
        room="embed",
        op="embed_streams",
        case=tokens_of(tokens, sizes),
        inputs=lambda draw: (draw.distinct(sizes.vocab, tokens),),
        shared=lambda draw: (draw.normal(sizes.vocab, sizes.hidden),),
        call=lambda ids, table: embed.embed_streams(
            ids, table, num_streams=sizes.streams, dtype=torch.bfloat16
        ),
        bytes=tokens * (8 + row + sizes.streams * row),
    )


FEW, MORE = (1, LARGE), (1, 8, LARGE)
OF_EACH_MODEL: tuple[tuple[Callable[[Sizes, int], Case], tuple[int, ...]], ...] = (
    (rms_norm, MORE),
    (query_norm_rope, FEW),
    (output_rope, FEW),
    (quantize_rows(quant.quantize_nvfp4_tokens), FEW),
    (quantize_nvfp4, FEW),
    (quantize_rows(quant.round_nvfp4), MORE),
    (quantize_rows(quant.quantize_fp8), FEW),
    (gate, MORE),
    (gate_logits, FEW),
    (topk_gate, MORE),
    (hash_gate, FEW),
    (mhc_boundary, MORE),
    (embed_streams, FEW),
)
OF_ANY_MODEL = (kv_norm_rope, round_kv, round_index)


def all_cases(models: tuple[Sizes, ...] = (FLASH, PRO), large: int = LARGE) -> list[Case]:
    """Every case, room by room; ``large`` stands in for ``LARGE`` tokens."""
    cases = [
        make(sizes, min(tokens, large))
        for make, counts in OF_EACH_MODEL
        for sizes in models
        for tokens in counts
    ]
    cases += [make(models[0], min(tokens, large)) for make in OF_ANY_MODEL for tokens in FEW]
    cases += compress_cases(models[0], large) + sample_cases(models[0]) + [argmax_head(models[0])]
    cases += matrix_cases(models, large) + attention_cases(models, large) + indexer_cases(models, large)
    rooms = list(dict.fromkeys(case.room for case in cases))
    return sorted(cases, key=lambda case: rooms.index(case.room))
