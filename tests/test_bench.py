"""``bench.ops`` without a GPU: arithmetic, when a run stops, where it writes, every case's call."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from shapes import FLASH, PRO, TINY

from bench import ops
from bench.attention_cases import Chunk
from bench.cases import LARGE, all_cases, compressed_bytes
from bench.harness import Case, Draw, count_launches, count_sets, gpu_slug, is_met, save, size_of
from bench.indexer_cases import Queries
from bench.matrix_cases import choices, distinct_experts, experts_bytes
from bench.weights import random_weight, weight_bytes
from dsv4.ops.formats import dequantize, nbytes, shape_of

CASES = all_cases()
SMALL = all_cases((TINY,), large=136)  # two windows of HCA are not complete
MIB = 1 << 20


def find(op: str, case: str) -> Case:
    (found,) = [entry for entry in CASES if (entry.op, entry.case) == (op, case)]
    return found


def test_sets_exceed_the_l2_cache_four_times() -> None:
    assert [count_sets(size, 50 * MIB) for size in (MIB, 100 * MIB, 200 * MIB, 201 * MIB)] == [201, 3, 2, 1]
    assert count_sets(8, 50 * MIB) == count_sets(0, 50 * MIB) == 512
    for size in (400_000, MIB, 3 * MIB + 5, 77 * MIB, 300 * MIB):
        assert count_sets(size, 50 * MIB) * size > 200 * MIB or count_sets(size, 50 * MIB) == 512


def test_every_set_is_launched_equally_often() -> None:
    assert [count_launches(sets) for sets in (1, 3, 32, 33, 64, 65, 512)] == [64, 66, 64, 66, 64, 65, 512]


def test_targets() -> None:
    assert is_met(None, 1.0, 50.0) is None
    assert is_met("<= 6 us", 6.0, 0.0) is True and is_met("<= 6 us", 6.01, 99.0) is False
    assert is_met("<= 2.5 us", 2.6, 0.0) is False
    assert is_met(">= 75 %", 0.0, 75.0) is True and is_met(">= 75 %", 0.0, 74.9) is False
    assert is_met(">= 350 TFLOPS", 1.0, 0.0, TFLOPS=350.0) is True
    assert is_met("<= 1.15 x", 1.0, 0.0, x=1.16) is False
    with pytest.raises(KeyError):
        is_met(">= 350 TFLOPS", 1.0, 0.0)


def test_gpu_names() -> None:
    names = {"NVIDIA H200": "h200", "NVIDIA H100 80GB HBM3": "h100", "NVIDIA RTX PRO 6000 Blackwell": "6000"}
    assert {name: gpu_slug(name) for name in names} == names


def test_bytes_are_those_of_inputs_and_outputs() -> None:
    case = find("rms_norm", "Flash, 8 tokens")
    inputs = case.inputs(Draw("cpu"))
    assert size_of(inputs) + size_of(case.call(*inputs)) == 2 * 8 * 4096 * 2 + 4 * 4096
    w = random_weight(Draw("cpu"), "nvfp4", 16, 256)
    assert size_of((inputs[0], [w, (w, None)])) == 8 * 4096 * 2 + 2 * (2304 + 4)
    assert find("hash_gate", "Flash, 1 token").bytes == 8 + 6 * (4 + 8) + 6 * (4 + 8)
    assert find("embed_streams", "Pro, 1 token").bytes == 8 + 5 * 7168 * 2
    routed = 2 * 4096 * (256 + 8) + 8 * (8 + 6 * 8 + 6 * (4 + 8))
    assert find("route_hash", "Flash, 8 tokens").bytes == routed
    assert find("argmax_head", "Flash, greedy").bytes == 2 * 4096 + 129280 * (4096 + 3 * 4) + 8


def test_bytes_of_a_compressor() -> None:
    """kv and gate each: new rows, tail rows read, tail rows written; then ape, norm, frequencies, entries."""
    hca = 4 * (2 * (1 * 512 + 1 * 512) + 512)
    assert compressed_bytes(1, 64, 128, 512, 64) == hca
    emits = 4 * (2 * (1 + 127) * 512 + 512 + 512 + 32) + 2 * 512
    assert compressed_bytes(1, 127, 128, 512, 64) == emits
    csa = 4 * (2 * ((1 + 3) * 1024 + 4 * 512 + 4 * 1024) + 1024 + 512 + 32) + 2 * 512
    assert compressed_bytes(1, 7, 4, 512, 64) == csa


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp4", "fp8", "bf16"])
@pytest.mark.parametrize("shape", [(256, 512), (128, 1024), (384, 2048)])
def test_random_weights_have_unit_gain(kind: str, shape: tuple[int, int]) -> None:
    """Of the expected size, finite, and of deviation K^-0.5; powers of two come within a factor 2^0.5."""
    weight = random_weight(Draw("cpu"), kind, *shape)
    assert shape_of(weight) == shape
    assert nbytes(weight) - weight_bytes(kind, *shape) == (4 if kind == "nvfp4" else 0)
    gain = dequantize(weight).square().mean().sqrt().item() * math.sqrt(shape[1])
    assert abs(math.log2(gain)) <= (0.5 if kind == "mxfp4" else 0.02)


def test_a_launch_finds_other_experts_than_the_one_before() -> None:
    assert [distinct_experts(tokens, FLASH) for tokens in (1, 8)] == [6, 44]
    for sizes, tokens in ((FLASH, 1), (FLASH, 8), (PRO, 1), (TINY, 8)):
        before: set[int] = set()
        for launch in range(5):
            chosen = choices(launch, tokens, sizes)
            assert chosen.shape == (tokens, sizes.chosen) and chosen.dtype == torch.int64
            assert all(len(set(row)) == sizes.chosen for row in chosen.tolist())
            now = set(chosen.flatten().tolist())
            assert len(now) == distinct_experts(tokens, sizes) and max(now) < sizes.experts
            assert sizes is TINY or not now & before
            before = now


def test_bytes_of_experts() -> None:
    """An expert of Flash: 3 x 2048 x 4096 weights, 4.5 bits each in NVFP4; in FP8 8 bits and block scales."""
    nvfp4 = 3 * 2048 * 4096 * 9 // 16
    around = 2 * 4096 * 2 + 6 * 12
    assert experts_bytes(FLASH, 1, "nvfp4") == 7 * nvfp4 + around
    assert experts_bytes(FLASH, 1, "fp8") == 6 * nvfp4 + 3 * (2048 * 4096 + 16 * 32) + around
    assert experts_bytes(FLASH, 8, "nvfp4") == 45 * nvfp4 + 8 * around
    assert weight_bytes("mxfp4", 2048, 4096) == 2048 * 4096 * 17 // 32


def test_operations_of_attention() -> None:
    """1 to 128 window rows, and an entry of every 4 or 128 tokens, seen by the token that completes it."""
    csa, hca = Chunk(FLASH, 8192, 0, 4, 512), Chunk(FLASH, 2, 126, 128)
    assert [csa.attended(position) for position in (0, 3, 127, 128, 8191)] == [1, 5, 160, 160, 640]
    assert hca.flop == 4 * 64 * 512 * (127 + 129) and hca.before == 126 and hca.entries == 1
    assert Chunk(FLASH, 1, 9).flop == 4 * 64 * 512 * 10


def test_bytes_and_operations_of_the_indexer() -> None:
    """Records of 68 bytes once; of 6 queries at the end of 11 tokens, ratio 4, two see 1 entry, four 2."""
    queries = Queries(FLASH, 6, 11)
    assert queries.entries == 2 and queries.visible == [1, 1, 2, 2, 2, 2]
    assert queries.input_bytes == 2 * 68 + 6 * (64 * (256 + 4) + 8)
    assert queries.score_bytes == 10 * 4 and queries.choice_bytes == 6 * 2 * 4
    assert queries.flop == 10 * 64 * 128 * 2


def test_cases_have_names_of_their_own_and_the_targets() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    targets = {(case.op, case.case): case.target for case in CASES if case.target}
    assert targets["mhc_boundary", "Flash, 1 token"] == targets["mhc_boundary", "Pro, 1 token"] == "<= 6 us"
    assert targets["mhc_boundary", "Pro, 8192 tokens"] == ">= 75 %"
    assert targets["gate_logits + topk_gate", "Pro, 1 token"] == "<= 8 us"
    assert targets["topk_gate", "Flash, 1 token"] == "<= 2.5 us"
    assert targets["quantize_fp8", "Flash, 8192 tokens"] == targets["rms_norm", "Pro, 8192 tokens"]
    assert targets["quantize_nvfp4", "given scale, Pro, 8192 tokens"] == ">= 80 %"
    assert targets["route_topk", "Flash, 1 token"] == targets["route_hash", "Flash, 1 token"] == "<= 5 us"
    assert ("linear", "8192 x 4096 nvfp4, 1 token") not in targets  # of launches apart: bench.gemm
    assert targets["linear", "8192 x 4096 nvfp4, 8192 tokens"] == ">= 350 TFLOPS"
    assert targets["attend", "CSA, Flash, 8192 tokens at 0"] == ">= 350 TFLOPS"
    assert targets["choose_entries", "Flash, 1 token, 262144 entries"] == "<= 25 us"
    assert targets["choose_entries", "Flash, 8192 tokens, 16384 entries"] == "<= 4500 us"
    experts = [case.target for case in CASES if case.room == "moe"]
    assert experts == ["<= 29 us", "<= 32 us", "<= 175 us", "<= 70 us"]
    steps = [case for case in CASES if case.room == "compressor" and str(LARGE) not in case.case]
    assert [case.target for case in steps] == ["<= 4 us"] * 4


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_every_case_runs_on_its_reference(case: Case) -> None:
    """The calls fit their doors, and the counted bytes are not more than there are."""
    draw = Draw("cpu")
    inputs, shared = case.inputs(draw), case.shared(draw)
    outputs = case.call(*inputs, *shared)
    assert size_of(outputs) > 0 or "HCA, 1 token" in case.case
    assert case.bytes is None or 0 < case.bytes <= 2 * size_of((*inputs, *shared)) + size_of(outputs)


Row = dict[str, object]


def rows_until(end: float, measure: Callable[[Case], Row]) -> tuple[int, list[Row]]:
    """Failures and rows of a run on a clock that advances one second a look."""
    ticks, rows = iter(range(1000)), []
    failed = ops.run_cases(CASES[:5], measure, rows.append, end=end, clock=lambda: next(ticks))
    return failed, rows


def test_a_run_stops_in_time_and_survives_failures(capsys: pytest.CaptureFixture[str]) -> None:
    def measure(case: Case) -> Row:
        assert case is not CASES[1], "no kernel"
        return {"case": case.name}

    names = [{"case": case.name} for case in CASES[:5]]
    assert rows_until(math.inf, measure) == (1, names[:1] + names[2:])
    assert f"{CASES[1].name}: AssertionError: no kernel" in capsys.readouterr().err
    assert rows_until(3, measure) == (1, [names[0], names[2]])
    assert f"stopped before {CASES[3].name}" in capsys.readouterr().err
    assert rows_until(0, measure) == (0, [])


def test_where_rows_go(tmp_path: Path) -> None:
    """A run that may be short replaces no complete file unless that file is named."""
    full = tmp_path / "ops-x9.json"

    def destination(**given: object) -> Path | None:
        args = {"room": None, "minutes": math.inf, "out": None} | given
        return ops.destination(full, argparse.Namespace(**args))

    assert destination() == destination(minutes=3.0) == full
    assert destination(room=["mhc"]) is None
    assert destination(room=["mhc"], out=full) == full
    save(full, {"complete": False, "rows": []})
    assert destination(minutes=3.0) == full
    save(full, {"complete": True, "rows": []})
    assert destination() == destination(minutes=3.0, out=full) == full
    with pytest.raises(ValueError, match="name a file with --out"):
        destination(minutes=3.0)
