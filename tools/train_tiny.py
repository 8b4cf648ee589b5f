"""Train a small DeepSeek-V4 on a text file and export it.

    python3 tools/train_tiny.py TEXT --out-dir DIR [--minutes M] [--resume]

The model is the preset "tiny" of dsv4/loading/presets.py with a tokenizer of its own. DIR receives the
training state (every minute; --resume continues from it), loss.csv, loss.png, the exported checkpoint
`tiny/` in NVIDIA's layout with its card, the same weights in BF16 in `bf16/`, and quality.json. The last
tenth of the text is held out. A CUDA device is used if there is one. loss.png needs matplotlib
(`pip install dsv4[train]`); without it a sentence is printed and the CSV stays.
"""

import argparse
import csv
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import tokenizers  # noqa: E402

from dsv4.config import ModelConfig  # noqa: E402
from dsv4.loading.presets import preset  # noqa: E402
from tools.tiny_export import calibrate, encode_text, export, train_tokenizer  # noqa: E402
from tools.tiny_model import TinyModel, substitutes  # noqa: E402
from tools.tiny_quality import card, measure, measure_stored  # noqa: E402
from tools.tiny_steps import Evaluator, Trainer  # noqa: E402

HELD_OUT = 0.1
LAST_RATE = 0.1
DENSE_SHARE = 0.15
BPE_VARIANTS = 12
REPORT_STEPS = 50
SAVE_SECONDS = 60.0
STATE, CURVE = "state.pt", "loss.csv"
COLUMNS = ("step", "seconds", "loss", "mtp_loss", "index_kl", "rate", "held_out_bits_per_byte")


class Run:
    """One training run: data, model, trainer, and what is written about it."""

    def __init__(self, args: argparse.Namespace, raw: dict[str, Any]) -> None:
        self.args = args
        self.out = Path(args.out_dir)
        self.out.mkdir(parents=True, exist_ok=True)
        self.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        text = Path(args.text).read_text(encoding="utf-8")
        cut = int(len(text) * (1 - HELD_OUT))
        self.text_bytes, self.held_bytes = len(text.encode()), len(text[cut:].encode())
        saved = self._saved()
        if saved is None:
            self.backend = train_tokenizer(text[:cut], raw["vocab_size"])
        else:
            self.backend, raw = tokenizers.Tokenizer.from_str(saved["tokenizer"]), saved["config"]
        self.raw = raw
        self.tokenizer = self.backend.to_str()
        self.train_tokens = encode_text(self.backend, text[:cut]).to(self.device)
        dropped = encode_text(self.backend, text[:cut], variants=BPE_VARIANTS, dropout=args.bpe_dropout)
        self.held_tokens = encode_text(self.backend, text[cut:]).to(self.device)
        self.tiny = TinyModel(ModelConfig.from_dict(raw), self.device, seed=args.seed)
        self.tiny.trace.dropout = args.dropout
        self.trainer = Trainer(self.tiny, dropped.to(self.device), args.tokens, seed=args.seed)
        self.trainer.use_graphs &= not args.eager
        self.evaluate = Evaluator(self.trainer, self.held_tokens, self.held_bytes)
        self.best: dict[str, Tensor] | None = None
        self.best_bits = math.inf
        self.rows: list[dict[str, float]] = []
        self.seconds = 0.0
        if saved is not None:
            self._restore(saved)
        print(
            f"{self.device}: {sum(p.numel() for p in self.tiny.params.values()) / 1e6:.1f} M parameters, "
            f"{len(self.train_tokens)} training and {len(self.held_tokens)} held-out tokens, "
            f"{self.held_bytes / len(self.held_tokens):.2f} bytes a token",
            flush=True,
        )

    def _saved(self) -> dict[str, Any] | None:
        path = self.out / STATE
        if not (self.args.resume or self.args.export_only):
            return None
        return torch.load(path, map_location="cpu", weights_only=True)

    def _restore(self, saved: dict[str, Any]) -> None:
        self.trainer.load(saved["trainer"])
        if saved["best"] is not None:
            self.best = {name: tensor.to(self.device) for name, tensor in saved["best"].items()}
        self.best_bits, self.rows, self.seconds = saved["best_bits"], saved["rows"], saved["seconds"]

    def save(self) -> None:
        """The state, all or nothing, and the curve."""
        state = {
            "trainer": self.trainer.state(),
            "best": self.best,
            "best_bits": self.best_bits,
            "rows": self.rows,
            "seconds": self.seconds,
            "tokenizer": self.tokenizer,
            "config": self.raw,
        }
        partial = self.out / f"{STATE}.partial"
        torch.save(state, partial)
        os.replace(partial, self.out / STATE)
        with (self.out / CURVE).open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)

    def progress(self) -> float:
        if self.args.steps:
            return self.trainer.step_count / self.args.steps
        return self.seconds / (60 * self.args.minutes)

    def train(self) -> None:
        """Until the steps or minutes are used up; the state is saved whatever ends it."""
        before, last_save, tick = self.seconds, time.monotonic(), time.monotonic()
        since, evaluated = self.trainer.step_count, self.trainer.step_count
        try:
            while (progress := self.progress()) < 1:
                rate = self.args.rate * learning_rate(self.trainer.step_count, progress, self.args.warm_up)
                self.trainer.step(rate, dense=progress < DENSE_SHARE)
                now = self.trainer.step_count
                if now - since >= REPORT_STEPS or self.progress() >= 1:
                    due = now - evaluated >= self.args.evaluate_every
                    evaluated = now if due else evaluated
                    self.report(now - since, rate, due)
                    since = now
                    if time.monotonic() - last_save > SAVE_SECONDS:
                        self.save()
                        last_save = time.monotonic()
                self.seconds = before + time.monotonic() - tick
            self.rows[-1]["held_out_bits_per_byte"] = self.judge()
        finally:
            self.save()

    def report(self, steps: int, rate: float, due: bool) -> None:
        """A line of progress and a row of the curve; with ``due`` the held-out text is scored."""
        sums = {name: total / steps for name, total in self.trainer.take_sums().items()}
        values = (self.trainer.step_count, self.seconds, sums["main"], sums["mtp"], sums["index"], rate, "")
        row: dict[str, Any] = dict(zip(COLUMNS, values, strict=True))
        if due:
            row["held_out_bits_per_byte"] = self.judge()
        speed = 0.0
        if self.rows and self.seconds > self.rows[-1]["seconds"]:
            speed = steps * self.args.tokens / (self.seconds - self.rows[-1]["seconds"])
        self.rows.append(row)
        held = f", held out {row['held_out_bits_per_byte']:.4f} bits/byte" if due else ""
        print(
            f"step {row['step']}, {self.seconds:.0f} s: loss {sums['main']:.3f}, mtp {sums['mtp']:.3f}, "
            f"index {sums['index']:.3f}, rate {rate:.1e}, {speed:.0f} tok/s{held}",
            flush=True,
        )

    def judge(self) -> float:
        """Held-out bits per byte of the averaged weights, which are kept if none were better."""
        bits = self.evaluate()
        if bits < self.best_bits:
            self.best_bits = bits
            self.best = {name: tensor.clone() for name, tensor in self.trainer.ema.items()}
        return bits

    def facts(self) -> dict[str, Any]:
        return {
            "parameters": sum(p.numel() for p in self.tiny.params.values()),
            "text": Path(self.args.text).name,
            "text_bytes": self.text_bytes,
            "vocab_size": self.raw["vocab_size"],
            "steps": self.trainer.step_count,
            "length": self.args.tokens,
            "minutes": self.seconds / 60,
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "a CPU",
            "dropout": self.args.dropout,
            "bpe_dropout": self.args.bpe_dropout,
        }

    def finish(self) -> None:
        """Export the best weights twice, measure them, write card, quality.json and the picture."""
        self.tiny.load(self.best if self.best is not None else self.trainer.ema)
        trace = self.tiny.trace
        trace.training = trace.dense = False
        slots = self.tiny.slots()
        amax = calibrate(self.tiny, self.train_tokens, self.args.tokens)
        bf16 = Path(self.args.export_bf16 or self.out / "bf16")
        stored = self.out / "tiny"
        for folder in (bf16, stored):
            shutil.rmtree(folder, ignore_errors=True)
        export(slots, self.raw, self.tokenizer, bf16, format="bf16")
        export(slots, self.raw, self.tokenizer, stored, amax=amax)
        draw(self.out / CURVE, self.out / "loss.png")
        with torch.no_grad():
            held = self.held_tokens, self.held_bytes, self.args.tokens
            numbers = measure(self.tiny, *held)
            numbers["bits_per_byte_bf16"] = measure_stored(bf16, *held)
            numbers["bits_per_byte_stored"] = measure_stored(stored, *held)
        numbers["stored_over_bf16"] = numbers["bits_per_byte_stored"] / numbers["bits_per_byte_bf16"]
        (self.out / "quality.json").write_text(json.dumps(numbers, indent=2) + "\n")
        (stored / "README.md").write_text(card(numbers, self.facts()), encoding="utf-8")
        for name, value in numbers.items():
            print(f"{name}: {value:.4f}", flush=True)


def learning_rate(step: int, progress: float, warm_up: int) -> float:
    """Linear warm-up by steps, then half a cosine wave down to ``LAST_RATE``."""
    falling = LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * min(progress, 1)))
    return min(1.0, (step + 1) / warm_up) * falling


def draw(curve: Path, path: Path) -> None:
    """The CSV ``curve`` as a picture: losses and held-out bits per byte over steps; needs matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"matplotlib is not installed: no {path.name}; the numbers are in {curve}", flush=True)
        return
    with curve.open(newline="") as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    labels = {
        "loss": ("-", "next token, nats"),
        "mtp_loss": ("-", "MTP block, nats"),
        "index_kl": ("-", "indexers' divergence, nats"),
        "held_out_bits_per_byte": ("k.-", "held out, bits a byte"),
    }
    for name, (style, label) in labels.items():
        points = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
        axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1)
    axes.set(xlabel="step", ylim=(0, 7))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", metavar="TEXT", help="a UTF-8 text file")
    parser.add_argument("--out-dir", required=True, metavar="DIR")
    parser.add_argument("--minutes", type=float, default=7.5, help="of training (default 7.5)")
    parser.add_argument("--steps", type=int, default=0, help="train by steps instead of minutes")
    parser.add_argument("--tokens", type=int, default=2048, help="a step, in one sequence (default 2048)")
    parser.add_argument("--vocab", type=int, default=1024, help="entries of the tokenizer")
    parser.add_argument("--rate", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--warm-up", type=int, default=200, metavar="STEPS", help="of the learning rate")
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--bpe-dropout", type=float, default=0.1, help="merges left out of training text")
    parser.add_argument("--evaluate-every", type=int, default=500, metavar="STEPS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="default: cuda if there is a device, else cpu")
    parser.add_argument("--eager", action="store_true", help="no CUDA graph")
    parser.add_argument("--resume", action="store_true", help="continue from DIR's state")
    parser.add_argument("--export-only", action="store_true", help="export from DIR's state, do not train")
    parser.add_argument("--export-bf16", metavar="DIR", help="where the BF16 copy goes (default DIR/bf16)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, raw: dict[str, Any] | None = None) -> Run:
    """Train and export; ``raw`` is a config.json other than the preset's (tests)."""
    args = parse_args(argv)
    raw = preset("tiny") if raw is None else raw
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    run = Run(args, raw | {"vocab_size": args.vocab})
    with substitutes(run.tiny.trace):
        if not args.export_only:
            run.train()
        run.finish()
    return run


if __name__ == "__main__":
    main()
