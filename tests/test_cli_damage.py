"""A checkpoint that is damaged in any way is refused by the driver with one sentence and exit code 2."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_with_tokenizer
from driver import refused, run
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_with_tokenizer(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def broken(ckpt: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, for a test to damage."""
    return Path(shutil.copytree(ckpt, tmp_path / "ckpt"))


def damage_config(**changes: Any) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        raw = json.loads((directory / "config.json").read_text(encoding="utf-8")) | changes
        (directory / "config.json").write_text(json.dumps(raw), encoding="utf-8")

    return damage


def damage_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        for shard in directory.glob("*.safetensors"):
            tensors = load_file(shard)
            if name in tensors:
                changed = change(tensors.pop(name))
                save_file(tensors if changed is None else tensors | {name: changed}, shard)

    return damage


def damage_file(name: str, content: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda directory: (directory / name).write_bytes(content((directory / name).read_bytes())) and None


def add_tensor(directory: Path) -> None:
    index = json.loads((directory / "model.safetensors.index.json").read_text(encoding="utf-8"))
    save_file({"layers.9.extra": torch.ones(2)}, directory / "extra.safetensors")
    index["weight_map"]["layers.9.extra"] = "extra.safetensors"
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


SHARD = "model-00001-of-00002.safetensors"
EXPERT = "layers.2.ffn.experts.3.w1"
DAMAGE: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no checkpoint": (lambda d: (d / "config.json").unlink(), ("config.json", "not found")),
    "config is broken JSON": (
        damage_file("config.json", lambda b: b[:-5]),
        ("config.json", "not valid JSON"),
    ),
    "another model": (damage_config(model_type="deepseek_v3"), ("deepseek_v3", "DeepSeek-V4 only")),
    "config disagrees": (damage_config(q_lora_rank=64), ("wq_a", "[64, 64]", "[32, 64]")),
    "config lacks a field": (damage_config(o_groups=None), ("o_groups", "missing")),
    "truncated shard": (damage_file(SHARD, lambda b: b[:-100]), (SHARD,)),
    "corrupt header": (damage_file(SHARD, lambda b: b[:8] + b"[" + b[9:]), (SHARD, "JSON")),
    "header longer than the file": (
        damage_file(SHARD, lambda b: struct.pack("<Q", 1 << 40) + b[8:]),
        (SHARD, "header"),
    ),
    "missing shard": (lambda d: (d / SHARD).unlink(), (SHARD,)),
    "broken index": (damage_file("model.safetensors.index.json", lambda b: b"{"), ("index.json", "JSON")),
    "missing tensor": (
        damage_tensor(f"{EXPERT}.weight_scale_2", lambda t: None),
        (f"{EXPERT}.weight_scale_2",),
    ),
    "wrong shape": (damage_tensor("norm.weight", lambda t: t[1:].clone()), ("norm.weight", "[63]", "[64]")),
    "wrong dtype": (damage_tensor("norm.weight", lambda t: t.half()), ("norm.weight", "F16")),
    "tensor left over": (add_tensor, ("layers.9.extra",)),
    "bad global scale": (
        damage_tensor(f"{EXPERT}.weight_scale_2", lambda t: -t),
        (f"{EXPERT}.weight_scale_2", "above 0"),
    ),
    "bad block scale": (
        damage_tensor(f"{EXPERT}.weight_scale", lambda t: torch.full_like(t, torch.nan)),
        (f"{EXPERT}.weight_scale", "NaN"),
    ),
    "weights that are no numbers": (
        damage_tensor("head.weight", lambda t: t * torch.inf),
        ("head.weight", "NaN"),
    ),
    "broken tokenizer": (damage_file("tokenizer.json", lambda b: b[: len(b) // 2]), ("tokenizer.json",)),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), ("tokenizer.json", "not found")),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_checkpoint_is_refused_with_a_sentence(case: str, broken: Path) -> None:
    damage, expected = DAMAGE[case]
    damage(broken)
    refused(run("--ckpt", broken, "--prompt", "Hello"), *expected)
