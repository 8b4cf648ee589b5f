"""Products of few tokens against other libraries': ``python -m bench.peers [--peers P ...] [--only N ...]``.

Every peer multiplies 1, 8 and 32 tokens with each matrix of Flash, timed as in ``bench.harness``: launches
one after another, weights rotating over more than four times the L2. Bytes are weights and scales. A peer's
result is first compared with the product of the weights that its codes stand for. A peer whose package is
missing is skipped. A run of all peers on all matrices writes ``bench/results/peers-<gpu>.json``, or what
``--out`` names; with ``--add`` any run puts its rows in the file, where the others stay.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench import harness
from bench.cases import FLASH
from bench.harness import Draw
from bench.matrix_cases import STEP_TOKENS, shapes_of
from bench.weights import random_nvfp4, weight_bytes
from dsv4.device import resolve_device
from dsv4.ops.formats import Nvfp4, dequantize
from dsv4.ops.gemm import linear
from dsv4.ops.pack import pack_weight

LARGEST_ERROR = 1e-2  # |y - reference| / |reference|
OURS = "dsv4"
# What a wrong result, CUDA, or another library and its compiler may raise: the other peers go on.
FAILURES = (AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError)
FAILURES += (TypeError, ValueError, subprocess.SubprocessError)


@dataclass(frozen=True)
class Matrix:
    """Weights as a peer reads them, and the fp32 matrix [N, K] that they stand for."""

    weights: Any
    dense: Callable[[], Tensor]


@dataclass(frozen=True)
class Peer:
    """One library's way to multiply.

    ``load`` imports what is needed and may raise ImportError; ``calls(tokens, weights)`` gives one or
    several functions ``call(x, weights)`` by name, of which the fastest counts.
    """

    kind: str  # "nvfp4", "int4" or "bf16"
    bytes: Callable[[int, int], int]
    matrix: Callable[[Draw, int, int], Matrix]
    calls: Callable[[int, Any], dict[str, Callable[[Tensor, Any], Tensor]]]
    load: Callable[[], Any] = lambda: None


def only(call: Callable[[Tensor, Any], Tensor]) -> Callable[[int, Any], dict[str, Any]]:
    return lambda tokens, weights: {"": call}


# What is multiplied: BF16, NVFP4 as stored, packed by us or by humming, and int4 by groups.


def bf16_matrix(draw: Draw, n: int, k: int) -> Matrix:
    weight = draw.normal(n, k).mul_(k**-0.5)
    return Matrix(weight, weight.float)


def stored_matrix(draw: Draw, n: int, k: int) -> Matrix:
    weight = random_nvfp4(draw, n, k)
    return Matrix(weight, partial(dequantize, weight))


def packed_matrix(draw: Draw, n: int, k: int) -> Matrix:
    weight = random_nvfp4(draw, n, k)
    return Matrix(pack_weight(weight), partial(dequantize, weight))


def int4_bytes(group: int, n: int, k: int) -> int:
    """Codes, and a bf16 scale and zero a group."""
    return n * k // 2 + 2 * 2 * n * (k // group)


def int4_dense(codes: Tensor, scales: Tensor) -> Tensor:
    """Codes [N, K/2] u8, even columns in the high nibbles, scales and zeros [K/group, N, 2] -> [N, K] f32."""
    values = torch.stack((codes >> 4, codes & 15), dim=-1).flatten(1).float() - 8
    scale, zero = scales.float().transpose(0, 1).unbind(-1)  # [N, K/group]
    blocks = values.unflatten(1, (scale.shape[1], -1))
    return (blocks * scale.unsqueeze(-1) + zero.unsqueeze(-1)).flatten(1)


def int4_matrix(group: int, draw: Draw, n: int, k: int) -> Matrix:
    codes = draw.codes(n, k // 2)
    scales = draw.f32(k // group, n, 2).abs().mul_(k**-0.5 / 8).bfloat16()
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    return Matrix((packed, scales), partial(int4_dense, codes, scales))


def int4_linear(group: int, x: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
    packed, scales = weights
    return torch.ops.aten._weight_int4pack_mm(x, packed, group, scales)


def int4(group: int) -> Peer:
    return Peer(
        "int4", partial(int4_bytes, group), partial(int4_matrix, group), only(partial(int4_linear, group))
    )


def load_humming() -> None:
    """With nvcc, whose code is faster at most sizes than that of its default compiler."""
    os.environ.setdefault("HUMMING_COMPILER", "nvcc")
    import humming.layer  # noqa: F401


def humming_matrix(draw: Draw, n: int, k: int) -> Matrix:
    from humming.layer import HummingLayer

    weight = random_nvfp4(draw, n, k)
    config = {"quant_method": "modelopt", "quant_algo": "nvfp4"}
    layer = HummingLayer(shape_n=n, shape_k=k, weight_config=config, torch_dtype=torch.bfloat16).cuda()
    parts = {"weight": weight.w, "weight_scale": weight.w_sf, "weight_scale_2": weight.w_gs.view(1)}
    layer.load_from_tensors(parts)
    layer.transform()
    return Matrix(layer, partial(dequantize, weight))


def humming_calls(tokens: int, layer: Any) -> dict[str, Callable[[Tensor, Any], Tensor]]:
    """With the configuration that it chooses for so many tokens; the first call compiles."""
    from humming.tune import get_heuristics_config

    config = get_heuristics_config(layer.humming_config, shape_m=tokens)
    return {"": lambda x, layer: layer(x, tuning_config=config)}


def load_triton() -> None:
    import triton  # noqa: F401


def triton_calls(tokens: int, weight: Nvfp4) -> dict[str, Callable[[Tensor, Any], Tensor]]:
    from bench import triton_nvfp4

    def call(config: triton_nvfp4.Config, x: Tensor, weight: Nvfp4) -> Tensor:
        return triton_nvfp4.linear(x, weight, config)

    configs = triton_nvfp4.configs_for(tokens)
    return {" ".join(map(str, config)): partial(call, config) for config in configs}


NVFP4_BYTES = partial(weight_bytes, "nvfp4")
PEERS = {
    OURS: Peer("nvfp4", NVFP4_BYTES, packed_matrix, only(linear)),
    "bf16": Peer("bf16", partial(weight_bytes, "bf16"), bf16_matrix, only(F.linear)),
    "int4-g32": int4(32),
    "int4-g64": int4(64),
    "humming": Peer("nvfp4", NVFP4_BYTES, humming_matrix, humming_calls, load_humming),
    "triton": Peer("nvfp4", NVFP4_BYTES, stored_matrix, triton_calls, load_triton),
}


def load_peers(names: list[str]) -> list[str]:
    """Those whose packages are there; a line for each other."""
    found = []
    for name in names:
        try:
            PEERS[name].load()
        except ImportError as error:
            print(f"{name}: skipped, {error}", file=sys.stderr)
        else:
            found.append(name)
    return found


def error_of(y: Tensor, want: Tensor) -> float:
    """|y - want| / |want|; NaN where y has one."""
    return ((y.float() - want).norm() / want.norm()).item()


def measure_peer(name: str, n: int, k: int, stream_gbs: float) -> Iterator[dict[str, Any]]:
    """A row a number of tokens. ``AssertionError`` where a result is wrong."""
    peer, draw = PEERS[name], Draw("cuda")
    size = peer.bytes(n, k)
    matrices = [peer.matrix(draw, n, k) for _ in range(harness.count_sets(size, harness.l2_bytes()))]
    dense = matrices[0].dense()
    for tokens in STEP_TOKENS:
        x = draw.normal(tokens, k)
        want, sets = x.float() @ dense.T, [(x, matrix.weights) for matrix in matrices]
        times, errors = {}, {}
        for way, call in peer.calls(tokens, matrices[0].weights).items():
            errors[way] = error_of(call(*sets[0]), want)
            assert errors[way] <= LARGEST_ERROR, f"{tokens} tokens, {way}: a relative error of {errors[way]}"
            times[way] = harness.graph_us(call, sets)
        way = min(times, key=times.__getitem__)
        row = {"peer": name, "kind": peer.kind, "n": n, "k": k, "tokens": tokens, "us": round(times[way], 3)}
        row |= {"bytes": size, "percent": round(100 * size / times[way] / 1e3 / stream_gbs, 2)}
        yield row | {"error": round(errors[way], 6), "sets": len(sets), "way": way}


def line_of(row: dict[str, Any]) -> str:
    shape = f"{row['n']} x {row['k']}, {row['tokens']} tokens"
    numbers = f"{row['us']:8.2f} us {row['percent']:5.1f} %  error {row['error']:.1e}"
    return f"{row['peer']:8} {shape:26} {numbers}  {row['way']}".rstrip()


def place_of(row: dict[str, Any]) -> tuple[int, int, int]:
    """What was measured, as its place in a file: matrix, tokens, peer."""
    matrix = shapes_of(FLASH).index((row["n"], row["k"]))
    return matrix, list(PEERS).index(row["peer"]), row["tokens"]


def add_row(result: dict[str, Any], row: dict[str, Any]) -> None:
    """Put a row in its place, instead of an older one, with the file's commit and date if it has none."""
    stamped = {key: result[key] for key in ("commit", "date")} | row
    others = [other for other in result["rows"] if place_of(other) != place_of(row)]
    result["rows"] = sorted([*others, stamped], key=place_of)
    result["complete"] = len(result["rows"]) == len(shapes_of(FLASH)) * len(PEERS) * len(STEP_TOKENS)


def start_from(result: dict[str, Any], path: Path) -> None:
    """Take over the peers and rows of the file of an earlier run."""
    before = json.loads(path.read_text(encoding="utf-8"))
    assert before["gpu"] == result["gpu"], f"{path}: expected rows of {result['gpu']}, found {before['gpu']}"
    result["peers"] = [name for name in PEERS if name in {*before["peers"], *result["peers"]}]
    for row in before["rows"]:
        add_row(result, {key: before[key] for key in ("commit", "date")} | row)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    rows_of_all = list(dict.fromkeys(n for n, _ in shapes_of(FLASH)))
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS), metavar="P")
    only = {"choices": rows_of_all, "default": rows_of_all, "help": "matrices of so many rows"}
    parser.add_argument("--only", nargs="+", type=int, metavar="N", **only)
    parser.add_argument("--add", action="store_true", help="keep what the file has of other runs")
    parser.add_argument("--out", type=Path, metavar="JSON")
    args = parser.parse_args(argv)
    resolve_device("cuda")
    names, failed = load_peers([name for name in PEERS if name in args.peers]), 0
    whole = set(args.peers) == set(PEERS) and set(args.only) == set(rows_of_all)
    path = args.out or (harness.result_path("peers") if whole or args.add else None)
    result = harness.new_result("peers", peers=names)
    if path and args.add and path.is_file():
        start_from(result, path)
    for n, k in (shape for shape in shapes_of(FLASH) if shape[0] in args.only):
        for name in names:
            try:
                for row in measure_peer(name, n, k, result["ceilings"]["stream_gbs"]):
                    print(line_of(row), flush=True)
                    add_row(result, row)
                    if path:
                        harness.save(path, result)
            except FAILURES as error:
                failed += 1
                print(f"{name}, {n} x {k}: {type(error).__name__}: {error}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
