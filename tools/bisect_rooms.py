"""Where a model's kernels and references part: the first operation whose outputs differ more than they may.

    python -m tools.bisect_rooms [--ckpt DIR] [--against ROOM,...] [--reference ROOM,...] [--chunk N] ...

Runs random tokens through the model twice, a layer at a time: with the rooms of --against (default: all) on
their references, and with all kernels; the rooms of --reference run on their references both times. After
each operation the kernel's outputs are compared with the reference's and then overwritten by them: every
operation gets the same inputs both times, and a difference is its own, not an earlier one's. Each run has its
own cache. Prints the first difference and ends with 1, or the largest error of every room and ends with 0.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dsv4
from dsv4.cache import SequenceCache
from dsv4.device import DEVICES
from dsv4.layers.block import Block, run_blocks
from dsv4.model import Transformer
from dsv4.numerics import ACTIVATIONS, DTYPES, WEIGHTS
from dsv4.ops.dispatch import REGISTRY, Op, listen, use_reference
from dsv4.ops.embed import embed_streams

TINY = Path(__file__).resolve().parent.parent / "models" / "tiny"
# Relative to the larger of an element and its tensor's root mean square; see docs/architecture.md section 6.
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 2e-2}
SUM_TOLERANCE = 1e-3  # fp32 results of rooms that sum thousands of products
SUMS = ("gemm", "moe", "indexer", "attention")
# Of indices, how many may differ, where two scores tie but for their last bits: 2, or one in 1000.
TIES, TIE_SHARE = 2, 1e-3
INDICES = (torch.int32, torch.int64)

Step = Callable[[Any, SequenceCache], Tensor]


@dataclass(frozen=True)
class Finding:
    """One output of one operation: its error (of integers and codes, the share that differs) and bound."""

    place: str
    op: Op
    output: int
    error: float
    tolerance: float

    @property
    def is_fault(self) -> bool:
        return not self.error <= self.tolerance

    def __str__(self) -> str:
        return (
            f"{self.place}: {self.op.room}.{self.op.name}, output {self.output}: "
            f"error {self.error:.2e}, tolerance {self.tolerance:.2e}"
        )


def steps(model: Transformer, ids: Tensor, start: int) -> Iterator[tuple[str, Step]]:
    """``Transformer.forward`` and ``logits`` in pieces: name, and a function of the streams so far.

    Each block runs as a stack of its own: from streams to streams, which a whole pass makes at its end alone.
    """
    positions = torch.arange(start, start + ids.shape[0], device=ids.device)
    streams, dtype = model.config.num_streams, model.dtype
    yield "embedding", lambda _, cache: embed_streams(ids, model.embed, num_streams=streams, dtype=dtype)
    for index, block in enumerate(model.blocks):

        def layer(x: Tensor, cache: SequenceCache, index: int = index, block: Block = block) -> Tensor:
            return run_blocks(x, [block], ids, positions, [cache.layers[index]], start)

        yield f"layer {index}", layer
    yield "head", lambda x, cache: model.logits(x)


def compare(
    model: Transformer,
    ids: Tensor,
    *,
    chunk: int,
    reference: Sequence[str] = (),
    against: Sequence[str] = ("all",),
) -> Iterator[Finding]:
    """Every output of every operation, in the order of the operations."""
    trusted, tested = (model.new_cache(ids.shape[0]) for _ in range(2))
    for piece in ids.split(chunk):
        start, last = trusted.position, None
        for name, step in steps(model, piece, start):
            place = f"{name}, tokens {start} to {start + piece.shape[0] - 1}"
            wanted: list[tuple[Op, list[Tensor]]] = []
            with use_reference(*reference, *against), listen(keep_in(wanted)):
                following = step(last, trusted)
            findings: list[Finding] = []
            with use_reference(*reference), listen(compare_with(wanted, place, findings)):
                step(last, tested)
            assert not wanted, f"{place}: {wanted[0][0].room}.{wanted[0][0].name} ran only on its reference"
            yield from findings
            yield from stored(place, trusted, tested)
            last = following
        trusted.position = tested.position = start + piece.shape[0]


def stored(place: str, trusted: SequenceCache, tested: SequenceCache) -> Iterator[Finding]:
    """What was stored of equal rows, which has no outputs; the tested cache gets the trusted one's bytes."""
    for one, other in zip(tested.tables(), trusted.tables(), strict=True):
        share = (as_bytes(one) != as_bytes(other)).double().mean().item()
        yield Finding(place, REGISTRY["rows.store_rows"], 0, share, 0.0)
        if share:
            one.copy_(other)


def keep_in(outputs: list[tuple[Op, list[Tensor]]]) -> Callable[[Op, Any], None]:
    """A listener that appends what each operation returns; while it is kept, no kernel gets its memory."""
    return lambda op, result: outputs.append((op, tensors(result)))


def compare_with(
    wanted: list[tuple[Op, list[Tensor]]], place: str, findings: list[Finding]
) -> Callable[[Op, Any], None]:
    """A listener that takes each operation's outputs off the front of ``wanted`` and puts them in place."""
    compared = []  # kept, see ``keep_in``

    def listener(op: Op, result: Any) -> None:
        if not wanted or wanted[0][0] is not op:
            return  # called by a kernel's door: a part of the operation that comes next
        want = wanted.pop(0)[1]
        compared.append(want)
        found = tensors(result)
        kinds, expected = ([(tuple(t.shape), t.dtype) for t in outputs] for outputs in (found, want))
        assert kinds == expected, f"{place}: {op.room}.{op.name}: expected {expected}, found {kinds}"
        for output, (error, tolerance) in enumerate(errors(op.room, found, want)):
            findings.append(Finding(place, op, output, error, tolerance))
        for mine, other in zip(found, want, strict=True):
            if not torch.equal(as_bytes(mine), as_bytes(other)):
                mine.copy_(other)

    return listener


def tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [tensor for part in result for tensor in tensors(part)] if isinstance(result, tuple) else []


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def errors(room: str, found: list[Tensor], want: list[Tensor]) -> Iterator[tuple[float, float]]:
    """Error and tolerance of each output; values that belong to differing indices are not compared."""
    alike: Tensor | None = None  # [T] rows whose indices agree
    for mine, other in zip(found, want, strict=True):
        if mine.dtype in INDICES and mine.dim() > 1:
            alike = (mine == other).flatten(1).all(1)
    for mine, other in zip(found, want, strict=True):
        if mine.numel() == 0:
            yield 0.0, 0.0
        elif mine.dtype in INDICES:
            share = (mine != other).double().mean().item()
            yield share, max(TIES / mine.numel(), TIE_SHARE)
        elif mine.dtype not in TOLERANCE:  # codes and scales
            yield (as_bytes(mine) != as_bytes(other)).double().mean().item(), 0.0
        else:
            if alike is not None and alike.shape[0] == mine.shape[0]:
                mine, other = mine[alike], other[alike]
            summed = mine.dtype == torch.float32 and room in SUMS
            yield float_error(mine, other), SUM_TOLERANCE if summed else TOLERANCE[mine.dtype]


def float_error(found: Tensor, want: Tensor) -> float:
    """The largest difference, relative to the larger of the element and the tensor's root mean square."""
    found, want = found.double(), want.double()
    finite = want.isfinite()
    if not torch.equal(found.isfinite(), finite) or not torch.equal(found[~finite], want[~finite]):
        return float("inf")
    found, want = found[finite], want[finite]
    if found.numel() == 0 or torch.equal(found, want):
        return 0.0
    scale = want.abs().clamp_min(want.square().mean().sqrt())
    return ((found - want).abs() / scale).nan_to_num(nan=0.0, posinf=float("inf")).max().item()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    rooms = {"type": lambda text: text.split(","), "metavar": "ROOM,..."}
    parser.add_argument("--ckpt", default=str(TINY), metavar="DIR")
    parser.add_argument("--against", default=["all"], help="rooms to compare with their references", **rooms)
    parser.add_argument("--reference", default=[], help="rooms on their references both times", **rooms)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--chunk", type=int, default=128, help="tokens of one forward pass; 1: decoding")
    parser.add_argument("--device", choices=DEVICES, default="cuda")
    parser.add_argument("--weights", choices=WEIGHTS, default="stored")
    parser.add_argument("--activations", choices=ACTIVATIONS, default="bf16")
    parser.add_argument("--dtype", choices=DTYPES)
    args = parser.parse_args(argv)
    engine = dsv4.load(
        args.ckpt,
        device=args.device,
        weights=args.weights,
        activations=args.activations,
        dtype=args.dtype,
        max_context=args.tokens,
    )
    generator = torch.Generator().manual_seed(20260131)
    ids = torch.randint(engine.config.vocab_size, (args.tokens,), generator=generator).to(engine.device)
    largest: dict[str, Finding] = {}
    with torch.inference_mode():
        for finding in compare(
            engine.model, ids, chunk=args.chunk, reference=args.reference, against=args.against
        ):
            if finding.is_fault:
                print(finding)
                return 1
            before = largest.setdefault(finding.op.room, finding)
            largest[finding.op.room] = max(before, finding, key=lambda one: one.error / (one.tolerance or 1))
    for room in sorted(largest):
        print(largest[room])
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
