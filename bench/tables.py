"""The README's tables of measurements, from bench/results: ``python -m bench.tables [--check]``.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``, made of ``bench/results/NAME.json``. A
file of a GPU benchmark that the README has no table of yet gets one after the last. With ``--check`` nothing
is written: exit status 1 and a sentence if the README says anything else.
"""

import argparse
import json
import re
import sys
from collections import Counter
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
    missing = [name for name in results if results[name]["bench"] in GPU_TABLES and name not in present]
    if not missing:
        return filled
    if not present:
        raise ValueError(f"README: no table to put that of {missing[0]} after; write its two markers")
    end = list(BLOCK.finditer(filled))[-1].end()
    return filled[:end] + "".join(f"\n{block(name)}" for name in missing) + filled[end:]


def render(name: str, result: dict[str, Any]) -> str:
    """The lines between the markers."""
    makers = {"decode": decode_table} | GPU_TABLES
    if result["bench"] not in makers:
        raise ValueError(f"{name}.json: no table is known for bench {result['bench']!r}")
    return makers[result["bench"]](name, result)


def decode_table(name: str, result: dict[str, Any]) -> str:
    rows = [decode_row(result, row) for row in result["rows"]]
    return table(["| checkpoint | machine | prefill tok/s | decode tok/s |", *rows])


def decode_row(result: dict[str, Any], row: dict[str, Any]) -> str:
    machine = f"{result['threads']} x {result['device']}"
    return f"| {row['case']} | {machine} | {row['prefill_tps']:.0f} | {row['decode_tps']:.1f} |"


def machine_of(words: str, name: str, result: dict[str, Any]) -> str:
    """What was measured, on what, and what that can do."""
    ceilings = result["ceilings"]
    commit = result["commit"][:12] + (" with changes" if result["dirty"] else "")
    text = (
        f"{words} on one {result['gpu']}, driver {result['driver']}, torch {result['torch']}, "
        f"commit {commit}, {result['date']} (`python -m bench.{result['bench']}`, "
        f"`bench/results/{name}.json`).\n"
        f"Ceilings of the same run: reading {ceilings['stream_gbs']:.0f} GB/s, copying "
        f"{ceilings['copy_gbs']:.0f} GB/s, bf16 matmul {ceilings['bf16_tflops']:.0f} TFLOPS, host to device "
        f"{ceilings['h2d_gbs']:.1f} GB/s.\n"
    )
    return text if result["complete"] else f"{text}The run ended before every case was measured.\n"


def ops_table(name: str, result: dict[str, Any]) -> str:
    rows = [row for row in result["rows"] if row["target"] is not None]
    above = machine_of("Operations", name, result)
    above += f"The {len(rows)} cases that have a target, of the {len(result['rows'])} in the file.\n"
    return above + table(["| op | case | us | GB/s (of reading) | target |", *map(ops_row, rows)])


def ops_row(row: dict[str, Any]) -> str:
    rate = f"{row['bytes'] / row['us'] / 1e3:.0f} ({row['percent']:.1f} %)"
    if row["target"].endswith(" TFLOPS"):
        rate = f"{row['flop'] / row['us'] / 1e6:.0f} TFLOPS"
    verdict = verdict_of(row["target"], row["met"])
    return f"| {row['op']} | {row['case']} | {row['us']:.2f} | {rate} | {verdict} |"


def verdict_of(target: str, met: bool) -> str:
    return f"{target}: {'met' if met else 'missed'}"


def gemm_table(name: str, result: dict[str, Any]) -> str:
    """The fits, and the rows that have a target."""
    fits = [
        "| weights | a, us | B, GB/s (of reading) | largest error | target |",
        *map(fit_row, result["fits"]),
    ]
    rows = [row for row in result["rows"] if row["target"] is not None]
    head = "| launches | matrix | tokens | MB | us (one token = 1) | GB/s (of reading) | target |"
    above = machine_of("`linear` in a chain of launches", name, result)
    above += "Isolated launches of one token on 2 to 130 MB, as t = a + bytes / B:\n"
    return above + table(fits) + table([head, *map(gemm_row, rows)])[1:]


def fit_row(fit: dict[str, Any]) -> str:
    kind = "read only" if fit["kind"] == "read" else fit["kind"]
    verdicts = ", ".join(map(verdict_of, fit["targets"], fit["met"]))
    rate = f"{fit['gbs']:.0f} ({fit['percent']:.1f} %)"
    return f"| {kind} | {fit['a_us']:.2f} | {rate} | {100 * fit['worst']:.0f} % | {verdicts} |"


def gemm_row(row: dict[str, Any]) -> str:
    matrix = (
        f"{row['mode']} | {row['n']} x {row['k']} {row['kind']} | {row['tokens']} | {row['bytes'] / 1e6:.1f}"
    )
    rate = f"{row['bytes'] / row['us'] / 1e3:.0f} ({row['percent']:.1f} %)"
    verdict = verdict_of(row["target"], row["met"])
    return f"| {matrix} | {row['us']:.2f} ({row['ratio']:.2f}) | {rate} | {verdict} |"


def peers_table(name: str, result: dict[str, Any]) -> str:
    """A line a matrix and number of tokens: our time, every other's, and ours divided by it."""
    ours, *others = result["peers"]
    cases: dict[tuple[int, int, int], dict[str, dict[str, Any]]] = {}
    for row in result["rows"]:
        cases.setdefault((row["n"], row["k"], row["tokens"]), {})[row["peer"]] = row
    head = f"| matrix | tokens | {ours}, us (of reading) | {' | '.join(f'{peer}, us' for peer in others)} |"
    above = machine_of("Products of few tokens", name, result)
    for (commit, date), count in Counter(map(run_of, result["rows"])).items():
        if commit and (commit, date) != run_of(result):
            above += f"{count} of {len(result['rows'])} times are of a run of commit {commit[:12]}, {date}.\n"
    above += f"In brackets behind another's time: that of {ours} divided by it.\n"
    lines = [peers_row(case, rows, ours, others) for case, rows in cases.items()]
    return above + table([head, *lines])


def run_of(part: dict[str, Any]) -> tuple[str | None, str | None]:
    """Commit and date of a file, or of a row that has its own."""
    return part.get("commit"), part.get("date")


def peers_row(
    case: tuple[int, int, int], rows: dict[str, dict[str, Any]], ours: str, others: list[str]
) -> str:
    n, k, tokens = case
    us = rows[ours]["us"] if ours in rows else None
    cells = [f"{n} x {k}", str(tokens), f"{us:.1f} ({rows[ours]['percent']:.0f} %)" if us else "-"]
    for peer in others:
        cell = f"{rows[peer]['us']:.1f}" if peer in rows else "-"
        cells.append(f"{cell} ({us / rows[peer]['us']:.2f})" if us and peer in rows else cell)
    return f"| {' | '.join(cells)} |"


GPU_TABLES = {"ops": ops_table, "gemm": gemm_table, "peers": peers_table}


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
