"""Decode and prefill speed of one checkpoint: ``python -m bench.decode [--ckpt DIR] [--out JSON]``.

Generates greedily several times after a warm-up and reports the median. Prints the row of the README's
table and writes one JSON with the machine, the versions and every run.
"""

import argparse
import platform
import statistics
from pathlib import Path

import torch

import dsv4
from bench.harness import RESULTS, ROOT, provenance, save
from bench.tables import decode_row


def measure(ckpt: str, *, device: str, prompt_tokens: int, new_tokens: int, runs: int) -> dict[str, object]:
    """One row: medians over ``runs`` generations after one warm-up, and the runs themselves."""
    engine = dsv4.load(ckpt, device=device, max_context=prompt_tokens + new_tokens)
    prompt = [engine.config.bos_id] + [5 + i % 200 for i in range(prompt_tokens - 1)]
    decode, prefill = [], []
    for run in range(runs + 1):
        generation = engine.generate(prompt, new_tokens)
        list(generation)
        if run and generation.finish == "length":
            decode.append(generation.timings.decode_tps)
            prefill.append(generation.timings.prefill_tps)
    if not decode:
        raise ValueError(f"{ckpt}: every generation ended before {new_tokens} tokens; nothing to measure")
    return {
        "case": f"{Path(ckpt).resolve().name}, {prompt_tokens} + {new_tokens} tokens",
        "config": engine.describe(),
        "decode_tps": statistics.median(decode),
        "prefill_tps": statistics.median(prefill),
        "decode_runs": decode,
        "prefill_runs": prefill,
    }


def machine(device: str) -> dict[str, object]:
    """What the numbers belong to."""
    facts = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    models = [line.split(":")[1].strip() for line in facts if line.startswith("model name")]
    models.append(platform.machine())
    return {
        "schema": 1,
        "bench": "decode",
        "device": torch.cuda.get_device_name() if device == "cuda" else models[0],
        "threads": torch.get_num_threads(),
        **provenance(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", default=str(ROOT / "models" / "tiny"), metavar="DIR")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--out", default=RESULTS / "decode-cpu.json", type=Path, metavar="JSON")
    args = parser.parse_args()
    row = measure(
        args.ckpt,
        device=args.device,
        prompt_tokens=args.prompt_tokens,
        new_tokens=args.new_tokens,
        runs=args.runs,
    )
    result = machine(args.device) | {"rows": [row]}
    save(args.out, result)
    print(decode_row(result, row))


if __name__ == "__main__":
    main()
