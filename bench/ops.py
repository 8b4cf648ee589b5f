"""Time of every operation on this GPU: ``python -m bench.ops [--room R ...] [--minutes N] [--out JSON]``.

Measures the machine's ceilings, then each case of ``bench.cases`` in the manner of ``bench.harness``. A full
run writes ``bench/results/ops-<gpu>.json`` row by row; one of some rooms prints only, unless ``--out`` names
a file. Then ``python -m bench.tables`` brings the README up to date.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bench import harness
from bench.cases import all_cases
from bench.harness import Case
from dsv4.device import resolve_device


def run_cases(
    cases: Iterable[Case],
    measure: Callable[[Case], dict[str, Any]],
    record: Callable[[dict[str, Any]], None],
    *,
    end: float,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Measure until the clock reaches ``end``; returns how many cases failed, which stops no other case."""
    failed = 0
    for case in cases:
        if clock() >= end:
            print(f"--minutes: stopped before {case.name}", file=sys.stderr)
            break
        try:
            row = measure(case)
        except (AssertionError, RuntimeError) as error:  # a kernel's door, or CUDA
            failed += 1
            print(f"{case.name}: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        record(row)
    return failed


def destination(full: Path, args: argparse.Namespace) -> Path | None:
    """Where the rows go; None: nowhere. ``ValueError`` where a short run would replace a complete file."""
    if args.out is not None:
        return args.out
    if args.room:
        return None
    short = args.minutes < math.inf
    if short and full.is_file() and json.loads(full.read_text(encoding="utf-8"))["complete"]:
        raise ValueError(f"--minutes: {full} is complete and the run may not be; name a file with --out")
    return full


def line_of(row: dict[str, Any]) -> str:
    words = f"{row['room']:10} {row['op']:24} {row['case']:36}"
    return f"{words} {row['us']:9.2f} us {row['percent']:6.1f} %  {harness.verdict_of(row)}".rstrip()


def main(argv: list[str] | None = None) -> int:
    started, cases = time.monotonic(), all_cases()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--room", nargs="+", choices=sorted({case.room for case in cases}), metavar="R")
    parser.add_argument("--minutes", type=float, default=math.inf, metavar="N")
    parser.add_argument("--out", type=Path, metavar="JSON")
    args = parser.parse_args(argv)
    resolve_device("cuda")
    path = destination(harness.result_path("ops"), args)
    result = harness.new_result("ops")
    print(f"{result['gpu']}, driver {result['driver']}, torch {result['torch']}: {result['ceilings']}")

    def record(row: dict[str, Any]) -> None:
        print(line_of(row), flush=True)
        result["rows"].append(row)
        result["complete"] = len(result["rows"]) == len(cases)
        if path:
            harness.save(path, result)

    stream_gbs = result["ceilings"]["stream_gbs"]
    chosen = [case for case in cases if not args.room or case.room in args.room]
    failed = run_cases(
        chosen, lambda case: harness.measure(case, stream_gbs), record, end=started + 60 * args.minutes
    )
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"error: {error}")
