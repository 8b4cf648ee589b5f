"""``linear`` at a decode step's sizes: ``python -m bench.gemm [--kinds K ...] [--out JSON]``.

A launch's input is the first T x K values of the output of the launch before, and the weights rotate as in
``bench.harness``. Rows are *isolated*, each launch beginning after the one before has ended, or *chained*,
launches overlapping (csrc/common/overlap.cuh): both must end in the same bits. Beside them stand the times of
a kernel that only reads the same bytes. The isolated times of 2 to 128 MB are fitted by t = a + bytes / B. A
run of all kinds writes ``bench/results/gemm-<gpu>.json``. Matrices with N < K, whose output is too short for
the next input, are cases of ``bench.ops`` instead.
"""

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import harness
from bench.harness import Draw, is_met
from bench.weights import random_weight, weight_bytes
from dsv4.device import resolve_device
from dsv4.ops.formats import Bare
from dsv4.ops.gemm import linear

BITS = {"nvfp4": 4.5, "fp8": 8.0, "bf16": 16.0}  # a weight, block scales included
MEGABYTES = (2.0, 4.0, 9.4, 18.9, 32.0, 56.6, 128.0)
WIDTHS = (4096, 2048, 1024)  # K
ROWS = 128  # N is a multiple
FLASH_SHAPES = ((4096, 4096), (8192, 4096), (32768, 1024), (24576, 4096))  # with N >= K; all but the head
HEAD = (129280, 4096)
TOKENS = (1, 8, 32)
FIT_BYTES = 130_000_000  # largest matrix of the fit
LATENCY_TARGET = "<= 2.2 us"  # a
RATE_TARGETS = {"nvfp4": ">= 88 %", "fp8": ">= 90 %", "bf16": ">= 90 %"}  # B, of the stream rate
ISOLATED_TARGETS = {
    (8192, 4096): "<= 6.9 us",
    (32768, 1024): "<= 6.9 us",
    (24576, 4096): "<= 16.5 us",
    HEAD: "<= 78 us",
}
CHAINED_TARGETS = ((30e6, ">= 80 %"), (18e6, ">= 74 %"), (3.9e6, ">= 45 %"))  # from so many bytes on
EIGHT_TARGET = "<= 1.15 x"  # eight tokens in times of one


def shape_of_size(megabytes: float, bits: float) -> tuple[int, int]:
    """A matrix [N, K] of about this size: the widest K of ``WIDTHS`` that leaves N >= K."""
    weights = megabytes * 8e6 / bits
    k = next((k for k in WIDTHS if weights / k >= k), WIDTHS[-1])
    return round(weights / k / ROWS) * ROWS, k


def shapes_of(kind: str) -> list[tuple[int, int]]:
    """The matrices to measure, by size; Flash's among those of NVFP4."""
    shapes = [shape_of_size(megabytes, BITS[kind]) for megabytes in MEGABYTES]
    if kind == "nvfp4":
        shapes += [*FLASH_SHAPES, HEAD]
    return sorted(set(shapes), key=lambda shape: (shape[0] * shape[1], shape))


def target_of(mode: str, kind: str, tokens: int, n: int, k: int) -> str | None:
    if kind != "nvfp4" or mode == "read":
        return None
    if tokens == 8:
        return EIGHT_TARGET if mode == "isolated" else None
    if tokens > 1:
        return None
    if mode == "isolated":
        return ISOLATED_TARGETS.get((n, k))
    size = weight_bytes(kind, n, k)
    return next((target for least, target in CHAINED_TARGETS if size >= least), None)


def row_of(
    mode: str, kind: str, tokens: int, n: int, k: int, *, us: float, one_us: float, stream_gbs: float
) -> dict[str, Any]:
    """One row; ``one_us``: what one token takes."""
    size = weight_bytes(kind, n, k)
    percent = 100 * size / us / 1e3 / stream_gbs
    ratio = us / one_us
    target = target_of(mode, kind, tokens, n, k)
    row = {"mode": mode, "kind": kind, "n": n, "k": k, "tokens": tokens, "us": round(us, 3), "bytes": size}
    row |= {"percent": round(percent, 2), "ratio": round(ratio, 4)}
    row["sets"] = harness.count_sets(size, harness.l2_bytes())
    return row | {"target": target, "met": is_met(target, us, percent, x=ratio)}


def fit_line(points: Iterable[tuple[int, float]]) -> tuple[float, float, float]:
    """t = a + bytes / B by least squares of the relative errors: a in us, B in GB/s, the largest error."""
    rows = [(1 / us, size / us) for size, us in points]  # a * row[0] + b * row[1] = 1
    aa, ab, bb = (sum(row[i] * row[j] for row in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    a1, b1 = (sum(row[i] for row in rows) for i in (0, 1))
    determinant = aa * bb - ab * ab
    a, b = (a1 * bb - b1 * ab) / determinant, (b1 * aa - a1 * ab) / determinant
    return a, 1e-3 / b, max(abs(a * one + b * size - 1) for one, size in rows)


def fit_of(name: str, rows: Iterable[dict[str, Any]], stream_gbs: float) -> dict[str, Any]:
    """The fit of ``rows`` up to 130 MB; ``name`` is a kind of weight, or "read"."""
    points = [(row["bytes"], row["us"]) for row in rows if row["bytes"] <= FIT_BYTES]
    a, gbs, worst = fit_line(points)
    percent = 100 * gbs / stream_gbs
    targets = (LATENCY_TARGET, RATE_TARGETS[name]) if name in RATE_TARGETS else ()
    fit = {"kind": name, "a_us": round(a, 3), "gbs": round(gbs, 1), "percent": round(percent, 2)}
    fit |= {"worst": round(worst, 4), "points": len(points)}
    return fit | {"targets": list(targets), "met": [is_met(target, a, percent) for target in targets]}


def fits_of(rows: list[dict[str, Any]], stream_gbs: float) -> list[dict[str, Any]]:
    """Of every kind at one token, isolated, and of reading alone."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["tokens"] == 1 and row["mode"] != "chained":
            groups.setdefault("read" if row["mode"] == "read" else row["kind"], []).append(row)
    return [fit_of(name, group, stream_gbs) for name, group in groups.items() if len(group) > 2]


def next_input(y: Tensor, x: Tensor) -> Tensor:
    """As many values of the output ``y`` as ``x`` has, in its shape: a view."""
    return y.flatten()[: x.numel()].view(x.shape)


def chain_us(weights: list[Bare], x: Tensor, *, overlap: bool) -> tuple[float, Tensor]:
    """Time of one launch, and the last output of a replay."""

    def run(launches: int) -> Tensor:
        y = x
        for launch in range(launches):
            y = linear(next_input(y, x), weights[launch % len(weights)], overlap=overlap)
        return y

    launches = harness.count_launches(len(weights))
    graph, y = harness.captured(run, launches)
    us = harness.median_us(graph.replay, harness.REPLAYS) / launches
    return us, y.clone()


def measure_shape(
    kind: str, n: int, k: int, stream_gbs: float, record: Callable[[dict[str, Any]], None]
) -> None:
    """All rows of one matrix. ``AssertionError`` where a chain runs away or overlapping changes its end."""
    draw, size = Draw("cuda"), weight_bytes(kind, n, k)
    read_us = harness.read_only_us(size)
    record(row_of("read", kind, 1, n, k, us=read_us, one_us=read_us, stream_gbs=stream_gbs))
    weights = [random_weight(draw, kind, n, k) for _ in range(harness.count_sets(size, harness.l2_bytes()))]
    one: dict[str, float] = {}
    for tokens in TOKENS:
        x, ends = draw.normal(tokens, k), {}
        for mode in ("isolated", "chained"):
            us, ends[mode] = chain_us(weights, x, overlap=mode == "chained")
            one.setdefault(mode, us)
            record(row_of(mode, kind, tokens, n, k, us=us, one_us=one[mode], stream_gbs=stream_gbs))
        spread = ends["isolated"].float().std().item()
        assert 1e-3 < spread < 1e3, f"{tokens} tokens: the last output's deviation is {spread}"
        same = torch.equal(ends["isolated"], ends["chained"])
        assert same, f"{tokens} tokens: overlapping launches change the result"


def line_of(row: dict[str, Any]) -> str:
    shape = f"{row['n']} x {row['k']}, {row['tokens']} tokens"
    words = f"{row['mode']:8} {row['kind']:5} {shape:25} {row['bytes'] / 1e6:6.1f} MB"
    numbers = f"{row['us']:8.2f} us {row['percent']:5.1f} % {row['ratio']:5.2f} x"
    return f"{words} {numbers}  {harness.verdict_of(row)}".rstrip()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", choices=list(BITS), default=list(BITS), metavar="K")
    parser.add_argument("--out", type=Path, metavar="JSON")
    args = parser.parse_args(argv)
    resolve_device("cuda")
    complete, failed = set(args.kinds) == set(BITS), 0
    path = args.out or (harness.result_path("gemm") if complete else None)
    result = harness.new_result("gemm", fits=[])
    stream_gbs = result["ceilings"]["stream_gbs"]

    def record(row: dict[str, Any]) -> None:
        print(line_of(row), flush=True)
        result["rows"].append(row)

    for kind in args.kinds:
        for n, k in shapes_of(kind):
            try:
                measure_shape(kind, n, k, stream_gbs, record)
            except (AssertionError, RuntimeError) as error:
                failed += 1
                print(f"{kind} {n} x {k}: {type(error).__name__}: {error}", file=sys.stderr)
    result["fits"] = fits_of(result["rows"], stream_gbs)
    result["complete"] = complete and not failed
    for fit in result["fits"]:
        print(f"{fit['kind']}: t = {fit['a_us']} us + bytes / {fit['gbs']} GB/s ({fit['percent']} %), {fit}")
    if path:
        harness.save(path, result)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
