"""The score kernels of the indexer, all forms, against fp64."""

from dataclasses import replace

import pytest
import torch
from indexer_cases import Normal, best_of, check_scores, make_call
from numeric import assert_bits, poison
from shapes import FLASH, TINY, Sizes

from dsv4 import _C
from dsv4.ops.formats import INDEX_CODES, INDEX_RECORD
from dsv4.ops.indexer import index_scores, launch, reference, select_topk

LARGE = pytest.mark.large
WGMMA = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs sm_90a"
)
FORMS = pytest.mark.parametrize("form", [pytest.param("wgmma", marks=WGMMA), "mma"])
FORMATS = pytest.mark.parametrize("keys", ["records", "bf16"])


@FORMS
@FORMATS
@pytest.mark.parametrize("tokens", [*range(1, 10), 64, 137])
@pytest.mark.parametrize("sizes", [FLASH, TINY], ids=lambda sizes: sizes.name)
def test_scores(sizes: Sizes, tokens: int, keys: str, form: str, cuda_normal: Normal) -> None:
    for entries in (1, 63, 64, 65, 700):
        call = make_call(sizes.index_heads, tokens, entries, keys, cuda_normal)
        check_scores(call, form, f"{sizes.name}, {keys}, {form}, {tokens} tokens, {entries} entries")


@FORMS
@FORMATS
@pytest.mark.parametrize(
    ("tokens", "entries"),
    [(3, 4096), *(pytest.param(*sizes, marks=LARGE) for sizes in ((9, 16385), (2, 40000), (1, 262144)))],
)
def test_many_entries(tokens: int, entries: int, keys: str, form: str, cuda_normal: Normal) -> None:
    call = make_call(FLASH.index_heads, tokens, entries, keys, cuda_normal)
    check_scores(call, form, f"{keys}, {form}, {tokens} tokens, {entries} entries")


@FORMS
@FORMATS
def test_numbers_of_heads(keys: str, form: str, cuda_normal: Normal) -> None:
    """Heads that do not fill a slot of 64, or begin a second one."""
    for heads in (1, 7, 63, 65, 100, 128):
        for tokens in (1, 5):
            call = make_call(heads, tokens, 300, keys, cuda_normal)
            check_scores(call, form, f"{keys}, {form}, {heads} heads, {tokens} tokens")


@pytest.mark.parametrize("tokens", [1, 7, 137])
def test_f32(tokens: int, cuda_normal: Normal) -> None:
    for heads, entries in ((1, 1), (17, 127), (64, 129), (130, 700)):
        call, case = make_call(heads, tokens, entries, "f32", cuda_normal), f"{tokens=} {heads=} {entries=}"
        scores = check_scores(call, None, case)
        assert_bits(call.choice(None, 64), select_topk(scores, call.visible, top_k=64), case)


@FORMS
@FORMATS
@pytest.mark.parametrize("tokens", [1, 6, 64])
def test_integers(tokens: int, keys: str, form: str, cuda_normal: Normal) -> None:
    """Where all sums are exact, scores and whole choices are equal to the reference's, ties included."""
    entries, heads = 3000, FLASH.index_heads
    call = make_call(heads, tokens, entries, keys, cuda_normal)
    table = cuda_normal(entries, INDEX_CODES).clamp(-3, 3).round().bfloat16()
    if keys == "records":
        table = (64 * cuda_normal(entries, INDEX_RECORD)).to(torch.int64).to(torch.uint8)
        table[:, -4:] = 127 + table[:, -4:] % 3
    q = cuda_normal(tokens, heads, INDEX_CODES).clamp(-2, 2).round().bfloat16()
    call = replace(call, q=q, keys=table, weights=cuda_normal(tokens, heads).round())
    check_scores(call, form, f"{keys}, {form}, {tokens} tokens", rtol=0)
    want = reference.select_topk(call.want()[0].float().cpu(), call.visible.cpu(), top_k=512)
    assert_bits(call.choice(form, 512), want, f"{keys}, {form}, {tokens} tokens: choice")


@FORMS
@FORMATS
def test_only_what_is_asked_for_is_written(keys: str, form: str, cuda_normal: Normal) -> None:
    """Not scores of entries that are not seen, or of queries that see no more than ``least``."""
    for tokens in (5, 20):
        call = make_call(FLASH.index_heads, tokens, 700, keys, cuda_normal)
        out, scores = torch.empty((tokens, 700), device="cuda"), call.scores(form).view(torch.int32)
        for least in (0, 300, 700):
            best = torch.full((tokens, 44), -1, dtype=torch.int32, device="cuda") if tokens == 5 else None
            poison(out)
            _C.index_scores(*call.operands(), out, best, *call.q.shape[:2], 700, least, form == "mma")
            written = call.seen() & (call.visible > least)[:, None]
            want = torch.where(written, scores, -1)
            assert_bits(out.view(torch.int32), want, f"{keys}, {form}, {tokens} tokens, {least=}")
            if best is not None:
                seen = torch.where(call.visible > least, call.visible, 0)
                assert_bits(best, best_of(out, seen), f"{keys}, {form}, {least=}: best of 16")


@FORMS
@FORMATS
def test_a_score_depends_on_its_query_and_key_alone(keys: str, form: str, cuda_normal: Normal) -> None:
    """Beside any other queries, among any others, in any place of the table."""
    whole = make_call(FLASH.index_heads, 20, 900, keys, cuda_normal)
    whole = replace(whole, visible=torch.full_like(whole.visible, 800))
    scores = whole.scores(form)[:, :800].contiguous()
    for first, last in ((0, 1), (0, 8), (3, 4), (5, 12), (19, 20)):
        some = whole.part(slice(first, last)).scores(form)[:, :800].contiguous()
        assert_bits(some, scores[first:last], f"{keys}, {form}, queries {first} to {last}")
    moved = replace(whole, keys=whole.keys[100:800].clone(), visible=whole.visible - 100)
    assert_bits(moved.scores(form), scores[:, 100:].contiguous(), f"{keys}, {form}, without the first 100")


def test_default_form(cuda_normal: Normal) -> None:
    call = make_call(TINY.index_heads, 3, 200, "records", cuda_normal)
    call = replace(call, visible=torch.full_like(call.visible, 100))
    found, want = index_scores(*call.operands()), call.scores(launch.default_form())
    assert_bits(found[:, :100].contiguous(), want[:, :100].contiguous(), "index_scores")


def test_nothing(cuda_normal: Normal) -> None:
    """No tokens, no entries."""
    call = make_call(TINY.index_heads, 3, 9, "bf16", cuda_normal)
    for some in (call.part(slice(0, 0)), replace(call, keys=call.keys[:0])):
        shape = (some.q.shape[0], some.keys.shape[0])
        assert index_scores(*some.operands()).shape == shape
        assert some.choice("mma", 4).shape == (shape[0], min(4, shape[1]))


def test_what_they_cannot_take(cuda_normal: Normal) -> None:
    call = make_call(TINY.index_heads, 3, 200, "records", cuda_normal)
    many = make_call(129, 1, 9, "bf16", cuda_normal)
    for bad, words in (
        (replace(call, q=call.q.half()), "float16"),
        (replace(call, q=call.q.float()), "uint8"),
        (replace(call, q=call.q[..., :64].contiguous()), "128"),
        (replace(call, keys=call.keys[:, :64].contiguous()), "68"),
        (replace(call, weights=call.weights.bfloat16()), "bfloat16"),
        (replace(call, weights=call.weights[:2]), "T = 3"),
        (replace(call, visible=call.visible.int()), "int32"),
        (many, "1 to 128 heads, found 129"),
    ):
        with pytest.raises(AssertionError, match=words):
            bad.scores("mma")
    with pytest.raises(AssertionError, match="one of"):
        call.scores("tiles")
    with pytest.raises(AssertionError, match="top_k: expected at least 1, found 0"):
        call.choice("mma", 0)
