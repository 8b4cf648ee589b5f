"""``bench.gemm`` and ``bench.peers`` without a GPU: sizes, the fit, chains, peers' weights, their tables."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gemm, harness, peers, tables
from bench.gemm import BITS, HEAD, MEGABYTES, fit_line, fits_of, next_input, row_of, shapes_of, target_of
from bench.harness import Draw, is_met, save
from bench.peers import PEERS, Peer, error_of, int4_dense, load_peers
from bench.tables import RESULTS, read_results, render
from bench.weights import random_weight, weight_bytes
from dsv4.ops.formats import shape_of, stored
from dsv4.ops.gemm import linear

STREAM_GBS = 4000.0
LINE = {"isolated": (2.0, 3600.0), "chained": (0.5, 3600.0), "read": (1.7, 4000.0)}  # us, GB/s
CEILINGS = {"stream_gbs": STREAM_GBS, "copy_gbs": 3900.0, "bf16_tflops": 790.0, "h2d_gbs": 55.0}
HEAD_FIELDS = {"schema": 1, "gpu": "NVIDIA X9", "driver": "1.2", "torch": "3.4", "commit": "a" * 40}
HEAD_FIELDS |= {"dirty": False, "date": "2026-01-31", "complete": True, "ceilings": CEILINGS}


@pytest.fixture(autouse=True)
def cache_of_50_mb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "l2_bytes", lambda: 50 << 20)


def made_up_rows(kinds: tuple[str, ...] = tuple(BITS)) -> list[dict[str, Any]]:
    """Times on a line for every shape; eight tokens take 1.1, 32 take 1.5 times as long."""
    rows = []
    for kind in kinds:
        for n, k in shapes_of(kind):
            for mode, (a, gbs) in LINE.items():
                us = a + weight_bytes(kind, n, k) / gbs / 1e3
                for tokens, ratio in {1: 1.0, 8: 1.1, 32: 1.5}.items():
                    if tokens == 1 or mode != "read":
                        times = {"us": ratio * us, "one_us": us, "stream_gbs": STREAM_GBS}
                        rows.append(row_of(mode, kind, tokens, n, k, **times))
    return rows


def gemm_result() -> dict[str, Any]:
    rows = made_up_rows()
    return {"bench": "gemm", **HEAD_FIELDS, "fits": fits_of(rows, STREAM_GBS), "rows": rows}


def peer_row(peer: str, tokens: int, us: float) -> dict[str, Any]:
    kind, size = PEERS[peer].kind, PEERS[peer].bytes(1536, 4096)
    row = {"peer": peer, "kind": kind, "n": 1536, "k": 4096, "tokens": tokens, "us": us, "bytes": size}
    percent = 100 * size / us / 1e3 / STREAM_GBS
    return row | {"percent": round(percent, 2), "error": 0.002, "sets": 60, "way": ""}


def peers_result() -> dict[str, Any]:
    rows = [peer_row("dsv4", 1, 4.0), peer_row("bf16", 1, 8.0), peer_row("humming", 1, 5.0)]
    rows += [peer_row("bf16", 8, 9.0), peer_row("dsv4", 8, 4.5)]
    return {"bench": "peers", **HEAD_FIELDS, "peers": ["dsv4", "bf16", "humming"], "rows": rows}


@pytest.mark.parametrize("kind", BITS)
def test_sizes(kind: str) -> None:
    """From 2 to 128 MB, in whole blocks of every format, with an output long enough for the next input."""
    shapes = shapes_of(kind)
    assert len(set(shapes)) == len(shapes)
    for n, k in shapes:
        assert n >= k and n % 128 == k % 256 == 0
    sizes = [weight_bytes(kind, n, k) / 1e6 for n, k in shapes]
    assert sizes == sorted(sizes)
    for megabytes in MEGABYTES:
        assert min(abs(size / megabytes - 1) for size in sizes) < 0.06
    assert (HEAD in shapes) == (kind == "nvfp4")


def test_targets() -> None:
    def of(mode: str, tokens: int = 1, kind: str = "nvfp4") -> dict[float, str | None]:
        shapes = ((3456, 1024), (3456, 2048), (8192, 4096), (13952, 4096), (24576, 4096), HEAD)
        found = (weight_bytes(kind, n, k) / 1e6 for n, k in shapes)
        return {
            round(size): target_of(mode, kind, tokens, *shape)
            for size, shape in zip(found, shapes, strict=True)
        }

    assert of("chained") == {
        2: None,
        4: ">= 45 %",
        19: ">= 74 %",
        32: ">= 80 %",
        57: ">= 80 %",
        298: ">= 80 %",
    }
    assert list(of("isolated").values()) == [None, None, "<= 6.9 us", None, "<= 16.5 us", "<= 78 us"]
    assert set(of("isolated", 8).values()) == {"<= 1.15 x"} and set(of("isolated", 32).values()) == {None}
    assert set(of("read").values()) == {None} and set(of("isolated", kind="fp8").values()) == {None}


def test_the_fit_weighs_relative_errors() -> None:
    line = [(size, 1.7 + size / 4.55e6) for size in (2_000_000, 19_000_000, 128_000_000)]
    a, gbs, worst = fit_line(line)
    assert math.isclose(a, 1.7) and math.isclose(gbs, 4550) and worst < 1e-12
    off = [(size, us * factor) for (size, us), factor in zip(line, (1.02, 0.98, 1.02), strict=True)]
    a, _, worst = fit_line(off)
    assert abs(a - 1.7) < 0.1 and worst < 0.03


def test_rows_and_fits() -> None:
    """The head is no point of the fit; read-only rows are one fit of their own."""
    rows = made_up_rows()
    fits = {fit["kind"]: fit for fit in fits_of(rows, STREAM_GBS)}
    assert set(fits) == {"read", *BITS} and fits["read"]["targets"] == []
    assert fits["nvfp4"]["points"] == len(shapes_of("nvfp4")) - 1
    assert fits["bf16"]["a_us"] == 2.0 and abs(fits["bf16"]["percent"] - 90.0) < 0.1
    assert fits["nvfp4"]["met"] == [True, True] and fits["nvfp4"]["targets"] == ["<= 2.2 us", ">= 88 %"]
    assert {row["met"] for row in rows if row["target"] == "<= 1.15 x"} == {True}
    assert gemm.line_of(rows[-1]) and fits_of(rows[:2], STREAM_GBS) == []


@pytest.mark.parametrize("kind", BITS)
def test_a_chain_keeps_its_scale(kind: str) -> None:
    """As long as a graph: values neither vanish nor overflow."""
    draw = Draw("cpu")
    x, weights = draw.normal(8, 256), [random_weight(draw, kind, 512, 256) for _ in range(4)]
    y = x
    for launch in range(harness.LAUNCHES):
        step = next_input(y, x)
        assert step.shape == x.shape and step.data_ptr() == y.data_ptr()
        y = linear(step, weights[launch % len(weights)])
    assert 0.1 < y.float().std().item() < 10


def test_int4_codes() -> None:
    """w = (code - 8) x scale + zero of the group; even columns in high nibbles."""
    codes = torch.tensor([[0x8F] * 16, [0x09] * 16], dtype=torch.uint8)  # N 2, K 32
    scales = torch.tensor([[[2.0, 1.0], [4.0, 0.5]]]).bfloat16()  # one group
    rows = int4_dense(codes, scales)[:, :3].tolist()
    assert rows == [[1.0, 15.0, 1.0], [-31.5, 4.5, -31.5]]


def test_peers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Bytes of weights and scales; what codes stand for; a missing package is a line, no failure."""
    sizes = {name: 8 * peer.bytes(256, 512) / (256 * 512) for name, peer in PEERS.items()}
    assert sizes == {"dsv4": 4.5, "bf16": 16, "int4-g32": 5, "int4-g64": 4.5, "humming": 4.5, "triton": 4.5}
    x = Draw("cpu").normal(3, 512)
    for name in ("dsv4", "bf16"):
        matrix = PEERS[name].matrix(Draw("cpu"), 256, 512)
        (call,) = PEERS[name].calls(3, matrix.weights).values()
        assert error_of(call(x, matrix.weights), x.float() @ matrix.dense().T) < 5e-3
    assert shape_of(stored(PEERS["triton"].matrix(Draw("cpu"), 32, 64).weights)) == (32, 64)
    assert not error_of(torch.full((2,), torch.nan), torch.ones(2)) <= peers.LARGEST_ERROR

    def missing() -> None:
        raise ImportError("No module named 'elsewhere'")

    monkeypatch.setitem(PEERS, "elsewhere", Peer("nvfp4", *[missing] * 4))
    assert load_peers(["bf16", "elsewhere"]) == ["bf16"]
    assert capsys.readouterr().err == "elsewhere: skipped, No module named 'elsewhere'\n"


def test_rows_of_two_runs_of_peers(tmp_path: Path) -> None:
    """Each with its commit and date, in a fixed order; a newer one replaces an older; the table says so."""
    path, newer = tmp_path / "peers-x9.json", {"commit": "b" * 40, "date": "2026-02-01"}
    save(path, peers_result())
    result = peers_result() | newer | {"peers": ["dsv4", "triton"], "rows": [], "complete": False}
    peers.start_from(result, path)
    for row in (peer_row("triton", 1, 9.0), peer_row("dsv4", 8, 4.25)):
        peers.add_row(result, row)
    assert result["peers"] == ["dsv4", "bf16", "humming", "triton"] and not result["complete"]
    found = [(row["peer"], row["tokens"], row["us"], row["commit"][0]) for row in result["rows"]]
    assert found == [
        ("dsv4", 1, 4.0, "a"),
        ("dsv4", 8, 4.25, "b"),
        ("bf16", 1, 8.0, "a"),
        ("bf16", 8, 9.0, "a"),
        ("humming", 1, 5.0, "a"),
        ("triton", 1, 9.0, "b"),
    ]
    text = render("peers-x9", result)
    assert "commit bbbbbbbbbbbb, 2026-02-01" in text and " are of a run of commit bbbb" not in text
    assert "4 of 6 times are of a run of commit aaaaaaaaaaaa, 2026-01-31.\n" in text
    with pytest.raises(AssertionError, match="expected rows of NVIDIA Y7"):
        peers.start_from(result | {"gpu": "NVIDIA Y7"}, path)


def test_tables() -> None:
    text = render("gemm-x9", gemm_result())
    assert "| nvfp4 | 2.00 | 3600 (90.0 %) | 0 % | <= 2.2 us: met, >= 88 %: met |\n" in text
    assert "| read only | 1.70 | 4000 (100.0 %) | 0 % |  |\n" in text
    assert (
        "| isolated | 8192 x 4096 nvfp4 | 1 | 18.9 | 7.24 (1.00) | 2606 (65.2 %) | <= 6.9 us: missed |\n"
        in text
    )
    assert "| isolated | 8192 x 4096 nvfp4 | 8 | 18.9 | 7.97 (1.10) | " in text and "\n\n\n" not in text
    text = render("peers-x9", peers_result())
    assert "| matrix | tokens | dsv4, us (of reading) | bf16, us | humming, us |\n" in text
    assert "| 1536 x 4096 | 1 | 4.0 (22 %) | 8.0 (0.50) | 5.0 (0.80) |\n" in text
    assert "| 1536 x 4096 | 8 | 4.5 (20 %) | 9.0 (0.50) | - |\n" in text
    results = {"gemm-x9": gemm_result(), "peers-x9": peers_result()}
    page = tables.fill("<!-- table: gemm-x9 -->\n<!-- end -->\n", results)
    assert page.count("<!-- table: peers-x9 -->") == 1 and tables.fill(page, results) == page


def check_gemm(result: dict[str, Any]) -> None:
    """Numbers that agree with each other."""
    stream_gbs = result["ceilings"]["stream_gbs"]
    for row in result["rows"]:
        assert row["bytes"] == weight_bytes(row["kind"], row["n"], row["k"]), row
        percent = 100 * row["bytes"] / row["us"] / 1e3 / stream_gbs
        assert abs(percent - row["percent"]) <= 0.01 + 0.001 * percent, row
        assert row["met"] == is_met(row["target"], row["us"], row["percent"], x=row["ratio"]), row
    for fit, made in zip(result["fits"], fits_of(result["rows"], stream_gbs), strict=True):
        assert fit["kind"] == made["kind"] and math.isclose(fit["gbs"], made["gbs"], rel_tol=0.01), fit
        assert abs(fit["a_us"] - made["a_us"]) < 0.05, fit


@pytest.mark.parametrize("path", [None, *RESULTS.glob("gemm-*.json")], ids=str)
def test_results_of_bench_gemm(path: Path | None, tmp_path: Path) -> None:
    if path is None:
        save(tmp_path / "gemm-x9.json", gemm_result())
        check_gemm(read_results(tmp_path)["gemm-x9"])
    else:
        check_gemm(read_results(path.parent)[path.stem])


@pytest.mark.parametrize("path", list(RESULTS.glob("peers-*.json")), ids=str)
def test_results_of_bench_peers(path: Path) -> None:
    result = read_results(path.parent)[path.stem]
    assert result["peers"][0] == peers.OURS
    for row in result["rows"]:
        assert row["bytes"] == PEERS[row["peer"]].bytes(row["n"], row["k"]), row
        assert row["error"] <= peers.LARGEST_ERROR and row["us"] > 0, row
