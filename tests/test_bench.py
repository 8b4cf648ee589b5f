"""The benchmarks without a GPU: arithmetic, when a run stops, where it writes, every case's call."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from shapes import TINY

from bench import ops
from bench.cases import LARGE, all_cases, compressed_bytes
from bench.harness import Case, Draw, count_launches, count_sets, gpu_slug, is_met, save, size_of

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


def test_gpu_names() -> None:
    names = {"NVIDIA H200": "h200", "NVIDIA H100 80GB HBM3": "h100", "NVIDIA RTX PRO 6000 Blackwell": "6000"}
    assert {name: gpu_slug(name) for name in names} == names


def test_bytes_are_those_of_inputs_and_outputs() -> None:
    case = find("rms_norm", "Flash, 8 tokens")
    inputs = case.inputs(Draw("cpu"))
    assert size_of(inputs) + size_of(case.call(*inputs)) == 2 * 8 * 4096 * 2 + 4 * 4096
    assert find("hash_gate", "Flash, 1 token").bytes == 8 + 6 * (4 + 8) + 6 * (4 + 8)
    assert find("embed_streams", "Pro, 1 token").bytes == 8 + 5 * 7168 * 2


def test_bytes_of_a_compressor() -> None:
    """kv and gate each: new rows, tail rows read, tail rows written; then ape, norm, frequencies, entries."""
    hca = 4 * (2 * (1 * 512 + 1 * 512) + 512)
    assert compressed_bytes(1, 64, 128, 512, 64) == hca
    emits = 4 * (2 * (1 + 127) * 512 + 512 + 512 + 32) + 2 * 512
    assert compressed_bytes(1, 127, 128, 512, 64) == emits
    csa = 4 * (2 * ((1 + 3) * 1024 + 4 * 512 + 4 * 1024) + 1024 + 512 + 32) + 2 * 512
    assert compressed_bytes(1, 7, 4, 512, 64) == csa


def test_cases_have_names_of_their_own_and_the_targets() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    targets = {(case.op, case.case): case.target for case in CASES if case.target}
    assert targets["mhc_boundary", "Flash, 1 token"] == targets["mhc_boundary", "Pro, 1 token"] == "<= 6 us"
    assert targets["mhc_boundary", "Pro, 8192 tokens"] == ">= 75 %"
    assert targets["gate_logits + topk_gate", "Pro, 1 token"] == "<= 8 us"
    assert targets["topk_gate", "Flash, 1 token"] == "<= 2.5 us"
    assert targets["quantize_fp8", "Flash, 8192 tokens"] == targets["rms_norm", "Pro, 8192 tokens"]
    assert targets["quantize_nvfp4", "given scale, Pro, 8192 tokens"] == ">= 80 %"
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
