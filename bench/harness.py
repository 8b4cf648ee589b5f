"""What the benchmarks share: the time of a call in a CUDA graph, rotated inputs, ceilings, result files.

The time of an operation is that of a CUDA graph of at least 64 launches, one after another on one stream,
divided by their number; median of 50 replays. The launches take turns on copies of the inputs that together
exceed the L2 cache four times, so that each finds its inputs in device memory, as a decode step finds its
weights; inputs too small for that take turns on 512 copies. Not responsible for what is measured
(``bench.ops``, ``gemm``, ``peers``, ``decode``) or for the README's tables (``bench.tables``).
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
READ_BLOCKS = (1, 2, 4, 8)  # a multiprocessor: grids of read_stream for few bytes


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

    def codes(self, *shape: int, low: int = 0, high: int = 256) -> Tensor:
        """Bytes of codes or scales in [low, high), u8."""
        device = self.generator.device
        return torch.randint(low, high, shape, dtype=torch.uint8, generator=self.generator, device=device)

    def distinct(self, high: int, count: int) -> Tensor:
        """``count`` different integers below ``high``, [count] i64."""
        return torch.randperm(high, generator=self.generator, device=self.generator.device)[:count].clone()


def nothing(draw: Draw) -> tuple[Any, ...]:
    return ()


@dataclass(frozen=True)
class Case:
    """One row: ``call(*inputs, *shared)``, timed.

    ``inputs`` makes one set of what takes turns, ``shared`` what every launch reads: tensors, and weights or
    lists of them (dsv4/ops/formats.py).
    ``bytes``: every distinct input and output byte once; None stands for all inputs and outputs, whole.
    """

    room: str
    op: str  # the door; several joined by " + " are timed as one
    case: str
    inputs: Callable[[Draw], tuple[Any, ...]]
    call: Callable[..., Any]
    shared: Callable[[Draw], tuple[Any, ...]] = nothing
    bytes: int | None = None
    flop: int = 0
    target: str | None = None  # "<= 6 us", ">= 75 %" of the stream rate or ">= 350 TFLOPS"

    @property
    def name(self) -> str:
        return f"{self.room}: {self.op}, {self.case}"


def size_of(item: Any) -> int:
    """Bytes of a tensor, or of all tensors in tuples and lists of tuples and lists."""
    if isinstance(item, tuple | list):
        return sum(map(size_of, item))
    return item.nbytes if isinstance(item, Tensor) else 0


def count_sets(set_bytes: int, l2_bytes: int) -> int:
    """How many sets of inputs exceed the L2 cache four times: at least 1, at most ``MAX_SETS``."""
    return min(L2_FACTOR * l2_bytes // max(set_bytes, 1) + 1, MAX_SETS)


def count_launches(sets: int) -> int:
    """A multiple of ``sets`` that is at least ``LAUNCHES``: every set is used equally often."""
    return -(-LAUNCHES // sets) * sets


def is_met(target: str | None, us: float, percent: float, **others: float) -> bool | None:
    """Whether the time, the share of the stream rate or a value by the name of its unit meets ``target``.

    None without a target.
    """
    if target is None:
        return None
    sign, bound, unit = target.split()
    value = ({"us": us, "%": percent} | others)[unit]
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


def graph_us(call: Callable[..., Any], sets: list[tuple[Any, ...]]) -> float:
    """Time of one ``call`` among dependent ones in a CUDA graph that goes round ``sets``."""

    def run(launches: int) -> None:
        for launch in range(launches):
            call(*sets[launch % len(sets)])  # outputs are dropped at once: the next call reuses their memory

    launches = count_launches(len(sets))
    graph, _ = captured(run, launches)
    return median_us(graph.replay, REPLAYS) / launches


def captured(run: Callable[[int], Any], launches: int) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A CUDA graph of ``run(launches)`` and what ``run`` returned, which every replay writes anew."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what a first call of each set loads or copies may not happen in a capture
        run(launches)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run(launches)
    return graph, outputs


def l2_bytes() -> int:
    return torch.cuda.get_device_properties(0).L2_cache_size


def read_only_us(size: int) -> float:
    """Time of a kernel that reads ``size`` bytes and does nothing else: the best of a few grids."""
    vectors = size // 16
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    sums = torch.empty(max(READ_BLOCKS) * processors, device="cuda")
    sets = [(torch.zeros(4 * vectors, device="cuda"),) for _ in range(count_sets(size, l2_bytes()))]

    def us(blocks: int) -> float:
        return graph_us(lambda x: _C.read_stream(x, sums, vectors, blocks), sets)

    return min(us(count * processors) for count in READ_BLOCKS)


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
    for _ in range(count_sets(size_of(own), l2_bytes()) - 1):
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
        "met": is_met(case.target, us, percent, TFLOPS=case.flop / us / 1e6),
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


def new_result(bench: str, **more: Any) -> dict[str, Any]:
    """The beginning of a GPU benchmark's result file; measures the ceilings."""
    result = {"schema": 1, "bench": bench, **gpu_facts(), **provenance(), "complete": False}
    return result | {"ceilings": measure_ceilings(), **more, "rows": []}


def result_path(bench: str) -> Path:
    """Where a complete run on this GPU is kept."""
    return RESULTS / f"{bench}-{gpu_slug(torch.cuda.get_device_name())}.json"


def verdict_of(row: dict[str, Any]) -> str:
    """The end of a printed row: its target, and whether it was met."""
    word = {True: "met", False: "MISSED", None: ""}[row["met"]]
    return f"{row['target'] or '':>9} {word}"


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
