"""The README's tables of measurements, from bench/results: ``python -m bench.tables [--check]``.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``, made of ``bench/results/NAME.json``. A
file of ``bench.ops`` that the README has no table of yet gets one after the last. With ``--check`` nothing is
written: exit status 1 and a sentence if the README says anything else.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"

BLOCK = re.compile(r"<!-- table: (\S+) -->\n.*?<!-- end -->\n", re.DOTALL)


def fill(text: str, results: dict[str, dict[str, Any]]) -> str:
    """``text`` with every table made anew. ``ValueError`` for a table without its result file."""

    def block(name: str) -> str:
        if name not in results:
            raise ValueError(f"README: table {name} needs bench/results/{name}.json, which is not there")
        return f"<!-- table: {name} -->\n{render(name, results[name])}<!-- end -->\n"

    filled = BLOCK.sub(lambda match: block(match[1]), text)
    present = [match[1] for match in BLOCK.finditer(filled)]
    missing = [name for name in results if results[name]["bench"] == "ops" and name not in present]
    if not missing:
        return filled
    if not present:
        raise ValueError(f"README: no table to put that of {missing[0]} after; write its two markers")
    end = list(BLOCK.finditer(filled))[-1].end()
    return filled[:end] + "".join(f"\n{block(name)}" for name in missing) + filled[end:]


def render(name: str, result: dict[str, Any]) -> str:
    """The lines between the markers."""
    makers = {"decode": decode_table, "ops": ops_table}
    if result["bench"] not in makers:
        raise ValueError(f"{name}.json: no table is known for bench {result['bench']!r}")
    return makers[result["bench"]](name, result)


def decode_table(name: str, result: dict[str, Any]) -> str:
    rows = [decode_row(result, row) for row in result["rows"]]
    return table(["| checkpoint | machine | prefill tok/s | decode tok/s |", *rows])


def decode_row(result: dict[str, Any], row: dict[str, Any]) -> str:
    machine = f"{result['threads']} x {result['device']}"
    return f"| {row['case']} | {machine} | {row['prefill_tps']:.0f} | {row['decode_tps']:.1f} |"


def ops_table(name: str, result: dict[str, Any]) -> str:
    ceilings = result["ceilings"]
    commit = result["commit"][:12] + (" with changes" if result["dirty"] else "")
    above = (
        f"Operations on one {result['gpu']}, driver {result['driver']}, torch {result['torch']}, "
        f"commit {commit}, {result['date']} (`python -m bench.ops`, `bench/results/{name}.json`).\n"
        f"Ceilings of the same run: reading {ceilings['stream_gbs']:.0f} GB/s, copying "
        f"{ceilings['copy_gbs']:.0f} GB/s, bf16 matmul {ceilings['bf16_tflops']:.0f} TFLOPS, host to device "
        f"{ceilings['h2d_gbs']:.1f} GB/s.\n"
    )
    if not result["complete"]:
        above += "The run ended before every case was measured.\n"
    rows = [row for row in result["rows"] if row["target"] is not None]
    above += f"The {len(rows)} cases that have a target, of the {len(result['rows'])} in the file.\n"
    return above + table(["| op | case | us | GB/s (of reading) | target |", *map(ops_row, rows)])


def ops_row(row: dict[str, Any]) -> str:
    rate = f"{row['bytes'] / row['us'] / 1e3:.0f} ({row['percent']:.1f} %)"
    verdict = "met" if row["met"] else "missed"
    return f"| {row['op']} | {row['case']} | {row['us']:.2f} | {rate} | {row['target']}: {verdict} |"


def table(lines: list[str]) -> str:
    """Markdown with a blank line on both sides, as the comments around it need."""
    head, *rows = lines
    rule = "|" + "---|" * (head.count("|") - 1)
    return "\n".join(["", head, rule, *rows, "", ""])


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Every result file of a folder by its name without ``.json``."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the README differs")
    args = parser.parse_args(argv)
    text = README.read_text(encoding="utf-8")
    wanted = fill(text, read_results(RESULTS))
    if wanted == text:
        return 0
    if args.check:
        print("README.md differs from bench/results; run python -m bench.tables", file=sys.stderr)
        return 1
    README.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"error: {error}")
