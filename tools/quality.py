"""What every rounding costs on held-out text: bits per byte, KL and agreement, experts that change.

    python3 tools/quality.py [TEXT] [--ckpt DIR] [--bf16 DIR] [--out JSON] [--picture PNG]

TEXT defaults to the sample of held-out text in models/tiny. Everything is compared with the BF16 weights of
``--bf16`` (``bf16/`` of tools/train_tiny.py), or, without them, with the checkpoint as stored. Prints the
README's table, writes one JSON, and a bar chart if matplotlib is there (`pip install dsv4[train]`).
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import dsv4  # noqa: E402
from bench.decode import machine  # noqa: E402
from dsv4.device import resolve_device  # noqa: E402
from dsv4.layers.indexer import Indexer, IndexProducts  # noqa: E402
from dsv4.layers.moe import Router  # noqa: E402
from dsv4.loading.requantize import requantize  # noqa: E402
from dsv4.ops.indexer import select_topk  # noqa: E402

LENGTH = 2048  # tokens of a window, as in training
FAR = 512  # from this position on compressed entries reach what the window does not
BLOCK = 256  # tokens a unit of the bootstrap
RESAMPLES = 2000

Patch = Callable[[dsv4.Engine], None]


@dataclass(frozen=True)
class Variant:
    """One row: which weights, how they are loaded, and what is changed by hand afterwards."""

    title: str
    bf16: bool = False
    weights: str = "stored"
    activations: str = "bf16"
    numerics: str = "trained"
    patch: Patch | None = None


@dataclass(frozen=True)
class Run:
    """nats [T], log_probs [T, V], experts [T, layers, K] sorted; far [T]: whether from position FAR on."""

    nats: Tensor
    log_probs: Tensor
    experts: Tensor
    far: Tensor


def router_in_nvfp4(engine: dsv4.Engine) -> None:
    for layer, block in enumerate(engine.model.blocks):
        router = block.ffn.router
        router.weight = requantize(f"layers.{layer}.ffn.gate", router.weight, "nvfp4")


def window_only(engine: dsv4.Engine) -> None:
    """No query sees a compressed entry; they are still made, so that nothing else changes."""
    for block in engine.model.blocks:
        if block.attn.ratio:
            block.attn.ratio = 1 << 30  # tokens that an entry seems to wait for; the compressor has its own


def random_picks(engine: dsv4.Engine) -> None:
    """The indexers choose as many visible entries as before, at random."""
    generator = torch.Generator(engine.device).manual_seed(0)

    def choose(
        self: Indexer, products: IndexProducts, positions: Tensor, visible: Tensor, keys: Tensor
    ) -> Tensor | None:
        if products.q is None:
            return None
        scores = torch.rand((len(positions), len(keys)), generator=generator, device=positions.device)
        return select_topk(scores, visible, top_k=self.top_k)

    for block in engine.model.blocks:
        if block.attn.indexer is not None:
            block.attn.indexer.choose = choose.__get__(block.attn.indexer)


VARIANTS = (
    Variant("BF16 weights", bf16=True),
    Variant("stored mix"),
    Variant("nvfp4, W4A16", weights="nvfp4"),
    Variant("nvfp4-all, W4A16", weights="nvfp4-all"),
    Variant("stored mix, fp8 activations", activations="fp8"),
    Variant("nvfp4, W4A4", weights="nvfp4", activations="nvfp4"),
    Variant("nvfp4-all, W4A4", weights="nvfp4-all", activations="nvfp4"),
    Variant("router gate alone in NVFP4", patch=router_in_nvfp4),
    Variant("KV and indexer unrounded", numerics="exact"),
    Variant("window only", patch=window_only),
    Variant("random indexer picks", patch=random_picks),
)


@contextmanager
def recorded_experts(chosen: list[Tensor]) -> Iterator[None]:
    """Collects the sorted experts [T, K] of every score-routed layer, in order of the calls."""
    plain = Router.forward

    def forward(self: Router, x: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        routing, experts = plain(self, x, token_ids)
        if self.tid2eid is None:
            chosen.append(experts.sort(dim=-1).values.cpu())
        return routing, experts

    with mock.patch.object(Router, "forward", forward):
        yield


def run_variant(variant: Variant, args: argparse.Namespace, ids: list[int]) -> Run:
    """Teacher-force the text in windows of LENGTH tokens after BOS."""
    engine = dsv4.load(
        args.bf16 if variant.bf16 else args.ckpt,
        device=args.device,
        dtype="float32",
        weights=variant.weights,
        activations=variant.activations,
        numerics=variant.numerics,
        max_context=LENGTH,
    )
    if variant.patch is not None:
        variant.patch(engine)
    log_probs, experts, far = [], [], []
    for first in range(0, len(ids), LENGTH):
        text = ids[first : first + LENGTH]
        chosen: list[Tensor] = []
        with recorded_experts(chosen):
            logits = engine.logits([engine.config.bos_id, *text[:-1]])
        log_probs.append(logits.log_softmax(dim=-1))
        experts.append(torch.stack(chosen, dim=1))  # [T, layers, K]
        far.append(torch.arange(len(text)) >= FAR)
    stacked = torch.cat(log_probs)
    nats = -stacked.gather(1, torch.tensor(ids)[:, None]).squeeze(1)
    return Run(nats, stacked, torch.cat(experts), torch.cat(far))


def compare(run: Run, base: Run, stored: Run, bytes_per_token: float) -> dict[str, float | list[float]]:
    """One row of the table; intervals are 95 % of a bootstrap over blocks of BLOCK tokens, paired."""
    to_bits = 1 / math.log(2) / bytes_per_token
    base_probs = base.log_probs.exp()
    change = (run.nats - stored.nats)[run.far].double().numpy() * to_bits
    blocks = np.array([block.mean() for block in np.array_split(change, max(1, len(change) // BLOCK))])
    picks = np.random.default_rng(0).integers(0, len(blocks), (RESAMPLES, len(blocks)))
    return {
        "bits_per_byte": float(run.nats.double().mean()) * to_bits,
        "far_change": float(change.mean()),
        "far_change_interval": np.percentile(blocks[picks].mean(axis=1), [2.5, 97.5]).tolist(),
        "kl": float((base_probs * (base.log_probs - run.log_probs)).sum(dim=-1).mean()),
        "top1": float((run.log_probs.argmax(-1) == base.log_probs.argmax(-1)).float().mean()),
        "experts_changed": float((run.experts != stored.experts).any(dim=-1).float().mean()),
    }


def table(rows: dict[str, dict[str, float | list[float]]], base: str) -> str:
    """The README's table."""
    lines = [
        f"| weights and numerics | bits/byte | KL to {base}, nats | same top-1 | experts changed | "
        f"change from position {FAR}, bits/byte (95 %) |",
        "|---|---|---|---|---|---|",
    ]
    for title, row in rows.items():
        low, high = row["far_change_interval"]
        lines.append(
            f"| {title} | {row['bits_per_byte']:.4f} | {row['kl']:.5f} | {100 * row['top1']:.2f} % | "
            f"{100 * row['experts_changed']:.2f} % | {row['far_change']:+.4f} ({low:+.4f} to {high:+.4f}) |"
        )
    return "\n".join(lines)


def draw(rows: dict[str, dict[str, float | list[float]]], path: Path, base: str) -> None:
    """A bar chart of the KL of every row, on a logarithmic axis; needs matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"matplotlib is not installed: no {path.name}", file=sys.stderr)
        return
    bars = {title: row["kl"] for title, row in rows.items() if row["kl"] > 1e-9}
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.barh(list(bars)[::-1], list(bars.values())[::-1])
    axes.set(xscale="log", xlabel=f"KL to {base}, nats a token (held-out text)")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120)


def main(args: argparse.Namespace) -> None:
    text = Path(args.text).read_text(encoding="utf-8")
    ids = dsv4.Tokenizer.from_checkpoint(args.ckpt).encode(text)
    bytes_per_token = len(text.encode()) / len(ids)
    device = resolve_device(args.device)
    torch.backends.cuda.matmul.allow_tf32 = False
    base_title = "BF16 weights" if args.bf16 else "stored mix"
    variants = {v.title: v for v in VARIANTS if args.bf16 or not v.bf16}
    base = run_variant(variants[base_title], args, ids)
    stored = run_variant(variants["stored mix"], args, ids)
    rows = {}
    for title, variant in variants.items():
        known = {base_title: base, "stored mix": stored}
        run = known.get(title) or run_variant(variant, args, ids)
        rows[title] = compare(run, base, stored, bytes_per_token)
        print(f"{title}: {rows[title]['bits_per_byte']:.4f} bits/byte", file=sys.stderr, flush=True)
    print(table(rows, base_title))
    facts = machine(device.type) | {"bench": "quality", "text": Path(args.text).name, "tokens": len(ids)}
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(facts | {"base": base_title, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    draw(rows, Path(args.picture), base_title)


if __name__ == "__main__":
    tiny, results = ROOT / "models" / "tiny", ROOT / "bench" / "results"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", nargs="?", default=str(tiny / "held_out.txt"), metavar="TEXT")
    parser.add_argument("--ckpt", default=str(tiny), metavar="DIR")
    parser.add_argument("--bf16", metavar="DIR", help="the same weights in BF16, to compare with")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", default=str(results / "quality.json"), metavar="JSON")
    parser.add_argument("--picture", default=str(results / "quality.png"), metavar="PNG")
    main(parser.parse_args())
