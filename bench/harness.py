"""What the benchmarks share: the time of a call in a CUDA graph, rotated inputs, ceilings, result files.

The time of an operation is that of a CUDA graph of at least 64 launches, one after another on one stream,
divided by their number; median of 50 replays. The launches take turns on copies of the inputs that together
exceed the L2 cache four times, so that each finds its inputs in device memory, as a decode step finds its
weights; inputs too small for that take turns on 512 copies. Not responsible for what is measured
(``bench.ops``, ``bench.decode``) or for the README's tables (``bench.tables``).
"""

import datetime
import json
import os
import shutil
import statistics
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv4 import _C
from dsv4.ops.dispatch import REGISTRY

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"

LAUNCHES = 64  # at least, in one graph
MAX_SETS = 512  # copies of the inputs, at most
REPLAYS = 50
L2_FACTOR = 4
STREAM_BYTES = 4 << 30
STREAM_BLOCKS = 8  # a multiprocessor: as many of csrc/bench/read_stream.cu as run at once


class Draw:
    """Random tensors on one device, from one seed."""

    def __init__(self, device: str, seed: int = 20260131) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        values = torch.randn(shape, generator=self.generator, device=self.generator.device)
        return values.to(dtype)

    def f32(self, *shape: int, scale: float = 1.0) -> Tensor:
        return self.normal(*shape, dtype=torch.float32).mul_(scale)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator, device=self.generator.device)

    def distinct(self, high: int, count: int) -> Tensor:
        """``count`` different integers below ``high``, [count] i64."""
        return torch.randperm(high, generator=self.generator, device=self.generator.device)[:count].clone()


def nothing(draw: Draw) -> tuple[Tensor, ...]:
    return ()


@dataclass(frozen=True)
class Case:
    """One row: ``call(*inputs, *shared)``, timed.

    ``inputs`` makes one set of the tensors that take turns, ``shared`` those that every launch reads.
    ``bytes``: every distinct input and output byte once; None stands for all inputs and outputs, whole.
    """

    room: str
    op: str  # the door; several joined by " + " are timed as one
    case: str
    inputs: Callable[[Draw], tuple[Tensor, ...]]
    call: Callable[..., Any]
    shared: Callable[[Draw], tuple[Tensor, ...]] = nothing
    bytes: int | None = None
    flop: int = 0
    target: str | None = None  # "<= 6 us" or ">= 75 %" of the stream rate

    @property
    def name(self) -> str:
        return f"{self.room}: {self.op}, {self.case}"


def size_of(tensors: Tensor | tuple[Tensor, ...]) -> int:
    """Bytes of one tensor or several."""
    return sum(t.nbytes for t in (tensors if isinstance(tensors, tuple) else (tensors,)))


def count_sets(set_bytes: int, l2_bytes: int) -> int:
    """How many sets of inputs exceed the L2 cache four times: at least 1, at most ``MAX_SETS``."""
    return min(L2_FACTOR * l2_bytes // max(set_bytes, 1) + 1, MAX_SETS)


def count_launches(sets: int) -> int:
    """A multiple of ``sets`` that is at least ``LAUNCHES``: every set is used equally often."""
    return -(-LAUNCHES // sets) * sets


def is_met(target: str | None, us: float, percent: float) -> bool | None:
    """Whether the time or the share of the stream rate meets ``target``; None without one."""
    if target is None:
        return None
    sign, bound, unit = target.split()
    value = {"us": us, "%": percent}[unit]
    return {"<=": value <= float(bound), ">=": value >= float(bound)}[sign]


def median_us(run: Callable[[], Any], repeats: int) -> float:
    """Median time of ``run`` on the GPU, by events around each of ``repeats`` runs, after three more."""
    for _ in range(3):
        run()
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, stop in pairs:
        start.record()
        run()
        stop.record()
    torch.cuda.synchronize()
    return 1e3 * statistics.median(start.elapsed_time(stop) for start, stop in pairs)


def graph_us(call: Callable[..., Any], sets: list[tuple[Tensor, ...]]) -> float:
    """Time of one ``call`` among dependent ones in a CUDA graph that goes round ``sets``."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what a first call loads or allocates may not happen in a capture
        for inputs in sets[:3]:
            call(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    launches = count_launches(len(sets))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in range(launches):
            call(*sets[launch % len(sets)])  # outputs are dropped at once: the next call reuses their memory
    return median_us(graph.replay, REPLAYS) / launches


def measure(case: Case, stream_gbs: float) -> dict[str, Any]:
    """One row of the results; ``AssertionError`` where no kernel stands behind the case."""
    for door in case.op.split(" + "):
        entry = REGISTRY.get(f"{case.room}.{door}")
        assert entry and entry.served_by("cuda") == "kernel", f"{case.room}.{door} has no kernel"
    draw = Draw("cuda")
    shared, own = case.shared(draw), case.inputs(draw)
    outputs = case.call(*own, *shared)
    moved = size_of(own) + size_of(shared) + size_of(outputs) if case.bytes is None else case.bytes
    del outputs
    sets = [(*own, *shared)]
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    for _ in range(count_sets(size_of(own), l2_bytes) - 1):
        sets.append((*case.inputs(draw), *shared))
    return row_of(case, graph_us(case.call, sets), moved, stream_gbs) | {"sets": len(sets)}


def row_of(case: Case, us: float, moved: int, stream_gbs: float) -> dict[str, Any]:
    percent = 100 * moved / us / 1e3 / stream_gbs  # bytes a microsecond / 1e3 = GB/s
    return {
        "room": case.room,
        "op": case.op,
        "case": case.case,
        "us": round(us, 3),
        "bytes": moved,
        "flop": case.flop,
        "percent": round(percent, 2),
        "target": case.target,
        "met": is_met(case.target, us, percent),
    }


def measure_ceilings() -> dict[str, float]:
    """What this machine can do: reading and copying device memory, bf16 matmul, copying from the host."""

    def us(call: Callable[[], Any]) -> float:
        return median_us(lambda: [call() for _ in range(8)], 10) / 8

    blocks = STREAM_BLOCKS * torch.cuda.get_device_properties(0).multi_processor_count
    x, sums = torch.empty(STREAM_BYTES // 4, device="cuda").normal_(), torch.empty(blocks, device="cuda")
    left, right = x.chunk(2)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    host = torch.empty(256 << 20, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(host.numel(), dtype=torch.uint8, device="cuda")
    return {
        "stream_gbs": round(x.nbytes / us(lambda: _C.read_stream(x, sums, x.numel() // 4, blocks)) / 1e3, 1),
        "copy_gbs": round(x.nbytes / us(lambda: right.copy_(left)) / 1e3, 1),
        "bf16_tflops": round(2 * 8192**3 / us(lambda: a @ b) / 1e6, 1),
        "h2d_gbs": round(host.nbytes / us(lambda: device.copy_(host, non_blocking=True)) / 1e3, 2),
    }


def provenance() -> dict[str, Any]:
    """What code ran on which torch. In a tree without its history: commit "unknown", dirty None."""
    commit, changes = _output("git", "rev-parse", "--verify", "HEAD"), _output("git", "status", "--porcelain")
    return {
        "torch": torch.__version__,
        "commit": commit or "unknown",
        "dirty": changes != "" if commit else None,
        "date": datetime.date.today().isoformat(),
    }


def gpu_facts() -> dict[str, str]:
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {"gpu": torch.cuda.get_device_name(), "driver": driver.partition("\n")[0] or "unknown"}


def gpu_slug(name: str) -> str:
    """The first word of a GPU's name with a digit in it: h100 of "NVIDIA H100 80GB HBM3"."""
    return next(word for word in name.lower().split() if any(letter.isdigit() for letter in word))


def _output(*command: str) -> str:
    """What a command prints, or nothing where it is absent or fails."""
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def save(path: Path, result: dict[str, Any]) -> None:
    """Write a result file, one line a row, in one step: a reader never sees half of it."""
    fields = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in result.items() if key != "rows"]
    rows = ",\n".join(f"  {json.dumps(row)}" for row in result["rows"])
    text = ",\n".join([*fields, f' "rows": [\n{rows}\n ]'])
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.part")
    scratch.write_text(f"{{\n{text}\n}}\n", encoding="utf-8")
    os.replace(scratch, path)
