"""The README's tables against the result files they are made of, and the form of those files."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench import tables
from bench.cases import all_cases
from bench.harness import is_met, row_of, save
from bench.tables import RESULTS, fill, read_results

RESULT_FILES = sorted(RESULTS.glob("*.json"))
HEAD = {"schema", "bench", "gpu", "driver", "torch", "commit", "dirty", "date", "complete", "ceilings"}
CEILINGS = {"stream_gbs", "copy_gbs", "bf16_tflops", "h2d_gbs"}
ROW = {"room", "op", "case", "us", "bytes", "flop", "percent", "target", "met", "sets"}

MARKERS = "Before.\n\n<!-- table: decode-x -->\nold\n<!-- end -->\n\nAfter.\n"


def ops_result(**changes: Any) -> dict[str, Any]:
    """A made-up result file of ``bench.ops``."""
    row = {"room": "norm", "op": "rms_norm", "case": "Flash, 8192 tokens", "us": 40.0, "bytes": 134_217_728}
    row |= {"flop": 0, "percent": 83.88, "target": ">= 80 %", "met": True, "sets": 4}
    other = row | {"case": "Flash, 1 token", "us": 2.5, "bytes": 32768, "percent": 0.33}
    head = {"schema": 1, "bench": "ops", "gpu": "NVIDIA X9", "driver": "1.2", "torch": "3.4"}
    head |= {"commit": "a" * 40, "dirty": False, "date": "2026-01-31", "complete": True}
    ceilings = {"stream_gbs": 4000.4, "copy_gbs": 3900.0, "bf16_tflops": 790.6, "h2d_gbs": 55.34}
    late = other | {"case": "Flash, 8 tokens", "target": "<= 2 us", "met": False}
    rows = [row, other | {"target": None, "met": None}, late]
    return head | {"ceilings": ceilings, "rows": rows} | changes


def decode_result() -> dict[str, Any]:
    row = {"case": "tiny, 1 + 2 tokens", "prefill_tps": 1234.5, "decode_tps": 6.78}
    return {"schema": 1, "bench": "decode", "threads": 3, "device": "CPU", "rows": [row]}


def test_the_readme_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    status = tables.main(["--check"])
    assert status == 0, capsys.readouterr().err


def test_a_table_replaces_what_stood_between_its_markers() -> None:
    filled = fill(MARKERS, {"decode-x": decode_result()})
    assert filled == (
        "Before.\n\n<!-- table: decode-x -->\n\n"
        "| checkpoint | machine | prefill tok/s | decode tok/s |\n|---|---|---|---|\n"
        "| tiny, 1 + 2 tokens | 3 x CPU | 1234 | 6.8 |\n"
        "\n<!-- end -->\n\nAfter.\n"
    )
    assert fill(filled, {"decode-x": decode_result()}) == filled


def test_operations_get_a_table_of_their_own() -> None:
    """After the last table the first time, in its place from then on; only cases that have a target."""
    results = {"decode-x": decode_result(), "ops-x9": ops_result()}
    filled = fill(MARKERS, results)
    block = (
        "<!-- table: ops-x9 -->\n"
        "Operations on one NVIDIA X9, driver 1.2, torch 3.4, commit aaaaaaaaaaaa, 2026-01-31 "
        "(`python -m bench.ops`, `bench/results/ops-x9.json`).\n"
        "Ceilings of the same run: reading 4000 GB/s, copying 3900 GB/s, bf16 matmul 791 TFLOPS, "
        "host to device 55.3 GB/s.\n"
        "The 2 cases that have a target, of the 3 in the file.\n"
        "\n| op | case | us | GB/s (of reading) | target |\n|---|---|---|---|---|\n"
        "| rms_norm | Flash, 8192 tokens | 40.00 | 3355 (83.9 %) | >= 80 %: met |\n"
        "| rms_norm | Flash, 8 tokens | 2.50 | 13 (0.3 %) | <= 2 us: missed |\n"
        "\n<!-- end -->\n"
    )
    assert filled.endswith(f"<!-- end -->\n\n{block}\nAfter.\n")
    assert fill(filled, results) == filled
    changed = fill(filled, results | {"ops-x9": ops_result(dirty=True, complete=False)})
    assert "commit aaaaaaaaaaaa with changes, " in changed
    assert "The run ended before every case was measured.\n" in changed
    assert changed.count("<!-- table: ops-x9 -->") == 1


def test_what_cannot_be_filled() -> None:
    for text, results, words in (
        (MARKERS, {}, "decode-x needs bench/results/decode-x.json"),
        (MARKERS, {"decode-x": {"bench": "quality"}}, "no table is known for bench 'quality'"),
        ("No table.\n", {"ops-x9": ops_result()}, "no table to put that of ops-x9 after"),
    ):
        with pytest.raises(ValueError, match=words):
            fill(text, results)


def test_check_and_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(MARKERS, encoding="utf-8")
    save(tmp_path / "decode-x.json", decode_result())
    monkeypatch.setattr(tables, "README", readme)
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.main(["--check"]) == 1 and readme.read_text(encoding="utf-8") == MARKERS
    assert "run python -m bench.tables" in capsys.readouterr().err
    assert tables.main([]) == 0 and tables.main(["--check"]) == 0
    assert "| 3 x CPU |" in readme.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", RESULT_FILES, ids=lambda path: path.stem)
def test_result_files(path: Path) -> None:
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["schema"] == 1 and result["bench"] == path.stem.split("-")[0]
    assert {"torch", "commit", "dirty", "date"} <= set(result) and result["rows"]
    if result["bench"] == "ops":
        check_ops(result)


def check_ops(result: dict[str, Any]) -> None:
    """All keys of schema 1, and numbers that agree with each other."""
    assert set(result) == HEAD | {"rows"} and set(result["ceilings"]) == CEILINGS
    names = [(row["room"], row["op"], row["case"]) for row in result["rows"]]
    assert len(set(names)) == len(names)
    for row in result["rows"]:
        assert set(row) == ROW, row
        percent = 100 * row["bytes"] / row["us"] / 1e3 / result["ceilings"]["stream_gbs"]
        assert abs(percent - row["percent"]) <= 0.01 + 0.001 * percent, row
        tflops = row["flop"] / row["us"] / 1e6
        assert row["met"] == is_met(row["target"], row["us"], row["percent"], TFLOPS=tflops), row


def test_what_bench_ops_writes_is_of_schema_1(tmp_path: Path) -> None:
    """A row made from a measured time, through the file."""
    rows = [row_of(case, 3.14159, 1000, 4000.0) | {"sets": 1} for case in all_cases()]
    save(tmp_path / "ops-x9.json", ops_result(rows=rows))
    result = read_results(tmp_path)["ops-x9"]
    check_ops(result)
    assert result["rows"][0]["us"] == 3.142 and result["rows"][0]["percent"] == 0.01
