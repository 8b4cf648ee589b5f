"""Synthetic checkpoints: every format loads, values are sane, sizes are the released ones."""

import dataclasses
import gc
import random
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from checkpoints import tiny_config_dict
from torch import Tensor

from dsv4.chat import ASSISTANT, END_THINK, THINK, USER
from dsv4.config import ModelConfig
from dsv4.loading import synthetic
from dsv4.loading.checkpoint import Checkpoint, check_headers
from dsv4.loading.headers import TensorInfo, read_tensors
from dsv4.loading.mapping import all_slots
from dsv4.loading.presets import preset
from dsv4.loading.requantize import is_requantized
from dsv4.loading.synthetic import NAMES, POLICIES, layout_of, make_tokenizer, write_synthetic
from dsv4.ops.formats import Nvfp4, Plain, Weight, dequantize
from dsv4.tokenizer import BOS, EOS, Tokenizer

SMALL = tiny_config_dict(vocab_size=300)
TINY = Path(__file__).resolve().parents[1] / "models" / "tiny"


@pytest.fixture(scope="module", autouse=True)
def no_collector() -> Iterator[None]:
    """Headers are many objects and no garbage: looking for some takes a third of the time."""
    gc.disable()
    yield
    gc.enable()


def load(directory: Path) -> tuple[Checkpoint, dict[str, Weight | Tensor]]:
    """Open and read everything, the MTP block included where the config has one."""
    config = ModelConfig.from_checkpoint(directory)
    checkpoint = Checkpoint.open(directory, config, mtp=config.num_mtp_layers > 0)
    return checkpoint, checkpoint.load(all_slots(config, mtp=checkpoint.mtp))


def same(a: Weight | Tensor, b: Weight | Tensor) -> bool:
    """Equal bits; FP8 scales may be stored in another dtype."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    return torch.equal(dequantize(a), dequantize(b)) and getattr(a, "in_gs", None) == getattr(
        b, "in_gs", None
    )


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("format", POLICIES)
def test_loads_with_nothing_missing_or_left_over(tmp_path: Path, format: str, names: str) -> None:
    write_synthetic(tmp_path / "ckpt", SMALL, format=format, names=names)
    checkpoint, loaded = load(tmp_path / "ckpt")
    assert checkpoint.names == names and checkpoint.mtp == (names == "deepseek")
    assert checkpoint.skipped == (0, 0)
    expected = ModelConfig.from_dict(SMALL | {"synthetic": True})
    mtp_layers = expected.num_mtp_layers if names == "deepseek" else 0
    assert checkpoint.config == dataclasses.replace(expected, num_mtp_layers=mtp_layers)
    assert loaded.keys() == {slot.name for slot in all_slots(expected, mtp=names == "deepseek")}
    for slot in all_slots(expected, mtp=checkpoint.mtp):
        layout = layout_of(slot, format)
        assert layout is None or checkpoint.stored[slot.name].format == layout.format


def test_all_nvfp4_takes_what_the_loader_would_requantise() -> None:
    for slot in all_slots(ModelConfig.from_dict(preset("tiny")), mtp=True):
        layout = layout_of(slot, "all-nvfp4")
        taken = is_requantized(slot.name, "nvfp4-all") or ".experts." in slot.name
        assert (layout is not None and layout.format == "nvfp4") == taken, slot.name


@pytest.mark.parametrize("format", ["nvidia", "deepseek"])
def test_values_depend_on_seed_and_slot_alone(tmp_path: Path, format: str) -> None:
    variants = {"a": {}, "b": {"shard_gb": 1e-4}, "c": {"names": "transformers"}, "d": {"seed": 1}}
    weights = {}
    for name, options in variants.items():
        write_synthetic(tmp_path / name, SMALL, format=format, **options)
        weights[name] = load(tmp_path / name)[1]
    assert (
        len(list((tmp_path / "a").glob("*.safetensors")))
        == 1
        < len(list((tmp_path / "b").glob("*.safetensors")))
    )
    for slot, value in weights["a"].items():
        assert same(value, weights["b"][slot]), slot
        assert slot.startswith("mtp.") or same(value, weights["c"][slot]), slot
        assert not same(value, weights["d"][slot]), slot
    write_synthetic(tmp_path / "again", SMALL, format=format)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("format", POLICIES)
def test_magnitudes(tmp_path: Path, format: str) -> None:
    write_synthetic(tmp_path / "ckpt", preset("tiny"), format=format)
    checkpoint, loaded = load(tmp_path / "ckpt")
    for name, value in loaded.items():
        if isinstance(value, Tensor):
            continue
        matrix = dequantize(value)
        assert 0.7 < matrix.std() * matrix.shape[1] ** 0.5 < 1.4, name
        assert matrix.mean().abs() < 0.1 * matrix.std(), name
        assert len(torch.unique(matrix, dim=0)) == len(matrix), name
        if not isinstance(value, Plain) and value.w_sf.numel() > 9:
            assert len(value.w_sf.view(torch.uint8).unique()) > 1, name
        if isinstance(value, Nvfp4):
            assert 4 < value.in_gs * 2688 < 16, name
    w1, w3 = (loaded[f"layers.0.ffn.experts.0.{w}"] for w in ("w1", "w3"))
    if isinstance(w1, Nvfp4):
        assert w1.w_gs == w3.w_gs and w1.in_gs == w3.in_gs and not torch.equal(w1.w, w3.w)
    assert 0.9 < loaded["embed"].float().std() < 1.1
    assert 0.8 < loaded["norm"].mean() < 1.2 and loaded["norm"].min() > 0
    chosen = loaded["layers.0.ffn.gate.tid2eid"].sort(dim=1).values
    assert (chosen.diff(dim=1) > 0).all()
    assert chosen.flatten().bincount(minlength=checkpoint.config.num_experts).min() > 0


def headers_of(directory: Path, name: str, format: str) -> tuple[dict[str, TensorInfo], ModelConfig]:
    write_synthetic(directory, preset(name), format=format, headers_only=True)
    assert sum(path.stat().st_blocks * 512 for path in directory.iterdir()) < 60e6
    return read_tensors(directory), ModelConfig.from_checkpoint(directory)


@pytest.fixture(scope="module")
def flash(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, TensorInfo], ModelConfig]:
    return headers_of(tmp_path_factory.mktemp("flash") / "ckpt", "flash", "deepseek")


def test_flash_and_pro_have_the_released_sizes(
    flash: tuple[dict[str, TensorInfo], ModelConfig], tmp_path: Path
) -> None:
    pro = headers_of(tmp_path / "pro", "pro", "deepseek")
    for (tensors, config), count, gigabytes in ((flash, 69_187, 159.6), (pro, 145_116, 864.7)):
        assert len(tensors) == count
        assert sum(info.nbytes for info in tensors.values()) / 1e9 == pytest.approx(gigabytes, rel=1e-3)
        assert len(check_headers(tensors, config, mtp=True).stored) == len(all_slots(config, mtp=True))


def test_flash_of_nvidia_opens_from_headers_alone(tmp_path: Path) -> None:
    _, config = headers_of(tmp_path / "flash", "flash", "nvidia")
    checkpoint = Checkpoint.open(tmp_path / "flash", config)
    assert checkpoint.nbytes / 1e9 == pytest.approx(164.7, rel=1e-3)
    assert checkpoint.skipped[0] == 69_187 - 67_612
    assert checkpoint.skipped[1] / 1e9 == pytest.approx(3.6, rel=1e-2)


def removed(tensors: dict[str, TensorInfo], name: str) -> None:
    del tensors[name]


def renamed(tensors: dict[str, TensorInfo], name: str) -> None:
    tensors[name + "_"] = tensors.pop(name)


def reshaped(tensors: dict[str, TensorInfo], name: str) -> None:
    first, *rest = tensors[name].shape
    tensors[name] = dataclasses.replace(tensors[name], shape=(first + 1, *rest))


CHANGES = (removed, renamed, reshaped)


@pytest.mark.parametrize("change", CHANGES)
def test_one_wrong_tensor_is_refused_by_name(
    flash: tuple[dict[str, TensorInfo], ModelConfig], change: Callable[[dict[str, TensorInfo], str], None]
) -> None:
    tensors, config = flash
    names = random.Random(0).sample(sorted(tensors), 50)
    for name in names[CHANGES.index(change) :: len(CHANGES)]:
        broken = dict(tensors)
        change(broken, name)
        with pytest.raises(ValueError, match=re.escape(name)):
            check_headers(broken, config, mtp=True)


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="format: expected one of nvidia, .* found 'int4'"):
        write_synthetic(tmp_path / "a", SMALL, format="int4")
    with pytest.raises(ValueError, match="names: expected one of deepseek, transformers, found 'vllm'"):
        write_synthetic(tmp_path / "a", SMALL, format="bf16", names="vllm")
    with pytest.raises(ValueError, match="vocab_size: expected at least 271 .* found 128"):
        write_synthetic(tmp_path / "a", SMALL | {"vocab_size": 128}, format="bf16")
    with pytest.raises(ValueError, match="one ratio for all HCA layers, found"):
        mixed = SMALL | {"compress_ratios": [0, 4, 8, 16, 0]}
        write_synthetic(tmp_path / "a", mixed, format="bf16", names="transformers")
    narrow = SMALL | {"moe_intermediate_size": 24}
    with pytest.raises(ValueError, match=r"experts\.0\.w2: NVFP4 .* multiples of 16, found 24"):
        write_synthetic(tmp_path / "a", narrow, format="nvidia")
    assert not any(tmp_path.iterdir())


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    """The exit code of the command."""
    monkeypatch.setattr(sys, "argv", ["synthetic", *arguments])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(synthetic.__file__, run_name="__main__")
    return exit.value.code


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "ckpt")
    options = ("--layers", "2", "--format", "bf16", "--names", "transformers", "--headers-only", "--out", out)
    assert run(monkeypatch, *options) == 0
    assert load(Path(out))[0].config.compress_ratios == (0, 4)
    assert capsys.readouterr() == ("", "")
    mistakes = {
        ("--out", out): "expected a new or empty folder, found 4 files",
        ("--out", out + "2", "--preset", "huge"): "--preset: invalid choice: 'huge'",
        ("--out", out + "2", "--layers", "0"): "layers: expected 1 to 4 for preset tiny, found 0",
        ("--out", out + "2", "--shard-gb", "0"): "shard size: expected a number of GB above 0, found 0.0",
        ("--out", str(tmp_path / "ckpt/config.json/x")): "config.json",
        (): "--out",
    }
    for options, message in mistakes.items():
        assert run(monkeypatch, *options) == 2
        error = capsys.readouterr().err
        assert message in error and error.startswith("error: ") and error.count("\n") == 1, error
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]


def test_tokenizer() -> None:
    for vocab_size, user in ((129280, 128803), (271, 259)):
        tokenizer = Tokenizer(make_tokenizer(vocab_size), "tokenizer.json", vocab_size)
        text = f"{BOS}a\n中{USER}{ASSISTANT}{THINK}x{END_THINK}{EOS}"
        ids = tokenizer.encode(text)
        assert ids[0] == 0 and ids[-1] == 1 and tokenizer.pad_id == 2
        assert [i for i in ids if i >= 259] == [
            user,
            *(tokenizer.token_id(t) for t in (ASSISTANT, THINK, END_THINK)),
        ]
        assert tokenizer.decode(ids) == text and len(ids) == 6 + len("a\n中x".encode())
        assert tokenizer.decode(ids, skip_special=True) == f"a\n中{THINK}x{END_THINK}"
        assert max(tokenizer.backend.get_vocab().values()) < vocab_size
        by_byte = sorted(tokenizer.token_bytes(i) for i in range(3, 259))
        assert by_byte == [bytes([byte]) for byte in range(256)]


def test_the_tiny_model_of_the_repository() -> None:
    assert sum(path.stat().st_size for path in TINY.iterdir()) <= 28e6
    checkpoint, _ = load(TINY)
    assert checkpoint.config.compress_ratios == (0, 4, 128, 4) and checkpoint.mtp
    assert Tokenizer.from_checkpoint(TINY).vocab_size <= checkpoint.config.vocab_size
