"""Checkpoints as a whole: every preset and dialect loads bit for bit, and everything else is refused."""

import logging
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import (
    PRESETS,
    dequantized,
    encode_model,
    model_slots,
    random_model,
    rename,
    rename_transformers,
    tiny_config_dict,
    write_checkpoint,
)
from torch import Tensor

from dsv4.config import ModelConfig
from dsv4.loading.checkpoint import Checkpoint, check_headers
from dsv4.loading.headers import TensorInfo, read_tensors
from dsv4.loading.mapping import DIALECTS, layer_slots, to_transformers
from dsv4.ops.formats import Nvfp4, Weight, dequantize

RAW = tiny_config_dict()
CONFIG = ModelConfig.from_dict(RAW)
MODEL = random_model(CONFIG, seed=1)
ENCODED = {preset: encode_model(MODEL, CONFIG, formats) for preset, formats in PRESETS.items()}
TRUNK = [slot for slot in model_slots(CONFIG) if not slot.name.startswith("mtp.")]


def load_all(directory: Path, *, mtp: bool = False) -> dict[str, Weight | Tensor]:
    checkpoint = Checkpoint.open(directory, CONFIG, mtp=mtp)
    return checkpoint.load([stored.slot for stored in checkpoint.stored.values()])


def assert_loaded(loaded: dict[str, Weight | Tensor], expected: dict[str, Tensor]) -> None:
    """Every slot stands for exactly the ``dequantized`` tensors."""
    stems = {slot.name: slot.stem for slot in model_slots(CONFIG)}
    for name, value in loaded.items():
        found = value if isinstance(value, Tensor) else dequantize(value)
        found = found.float() if found.is_floating_point() else found
        assert torch.equal(found, expected[stems[name]]), name


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_loads(tmp_path: Path, preset: str, dialect: str) -> None:
    tensors = ENCODED[preset]
    write_checkpoint(tmp_path, RAW, rename(tensors, dialect), shards=1 if dialect == "transformers" else 3)
    checkpoint = Checkpoint.open(tmp_path, CONFIG, mtp=True)
    assert checkpoint.names == dialect and checkpoint.mtp and checkpoint.skipped == (0, 0)
    assert checkpoint.nbytes == sum(t.nbytes for t in tensors.values())
    loaded = load_all(tmp_path, mtp=True)
    assert loaded.keys() == MODEL.keys()
    assert_loaded(loaded, dequantized(tensors))
    kinds = {slot.name: slot.kind for slot in model_slots(CONFIG)}
    expected = {"norm": torch.float32, "f32": torch.float32, "ids": torch.int64}
    plain = {name: value for name, value in loaded.items() if isinstance(value, Tensor)}
    assert all(value.dtype == expected.get(kinds[name], value.dtype) for name, value in plain.items())


@pytest.mark.parametrize("preset", ["bf16", "f32"])
def test_fused_experts(tmp_path: Path, preset: str) -> None:
    tensors = rename_transformers(ENCODED[preset], fused=True)
    write_checkpoint(tmp_path, RAW, tensors)
    assert_loaded(load_all(tmp_path, mtp=True), dequantized(ENCODED[preset]))
    fused = "model.layers.2.mlp.experts.gate_up_proj"
    for name, value in (
        (fused, tensors[fused].half()),
        (fused, tensors[fused][:, 1:].contiguous()),
        ("model.layers.2.mlp.experts.0.up_proj.weight", torch.zeros(32, 64)),
        ("model.layers.2.mlp.experts.down_proj", None),
        (fused, None),
    ):
        changed = {key: tensor for key, tensor in (tensors | {name: value}).items() if tensor is not None}
        write_checkpoint(tmp_path, RAW, changed)
        with pytest.raises(ValueError, match=name):
            Checkpoint.open(tmp_path, CONFIG)


def test_names_are_distinct_and_right() -> None:
    for rename_slot in DIALECTS.values():
        assert len({rename_slot(slot.name) for slot in TRUNK}) == len(TRUNK)
    index = "self_attn.compressor.indexer"
    assert to_transformers("layers.3.attn.indexer.compressor.ape") == f"model.layers.3.{index}.position_bias"
    assert to_transformers("layers.3.ffn.experts.7.w3") == "model.layers.3.mlp.experts.7.up_proj"
    with pytest.raises(ValueError, match="mtp.0.attn.wq_a"):
        to_transformers("mtp.0.attn.wq_a")


def test_scales_of_w1_and_w3_stay_apart(tmp_path: Path) -> None:
    tensors = ENCODED["nvidia"]
    loaded = load_all(write_checkpoint(tmp_path, RAW, tensors))
    for layer in range(CONFIG.num_layers):
        w1, w3 = (f"layers.{layer}.ffn.experts.5.{leaf}" for leaf in ("w1", "w3"))
        assert isinstance(loaded[w1], Nvfp4) and loaded[w1].w_gs != loaded[w3].w_gs
        for name in (w1, w3):
            assert loaded[name].w_gs == tensors[f"{name}.weight_scale_2"]
            assert loaded[name].in_gs == tensors[f"{name}.input_scale"]


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TensorInfo]:
    return read_tensors(write_checkpoint(tmp_path_factory.mktemp("nvidia"), RAW, ENCODED["nvidia"]))


def test_random_changes_are_refused_by_name(headers: dict[str, TensorInfo]) -> None:
    chance = random.Random(0)
    names = sorted(name for name in headers if not name.endswith(".input_scale"))
    for turn in range(80):
        name = chance.choice(names)
        changed, info = dict(headers), headers[name]
        del changed[name]
        if turn % 4 == 1:
            changed[f"{name}_"] = info
        if turn % 4 == 2:
            changed[name] = replace(info, shape=(*info.shape, 2))
        if turn % 4 == 3:
            changed[name] = replace(info, dtype="F16")
        with pytest.raises(ValueError) as caught:
            check_headers(changed, CONFIG, mtp=True)
        assert name in str(caught.value), (name, turn % 4, str(caught.value))


def test_missing_and_left_over_are_counted(headers: dict[str, TensorInfo]) -> None:
    shorter = ModelConfig.from_dict(tiny_config_dict(num_hidden_layers=3, compress_ratios=[0, 4, 8]))
    with pytest.raises(ValueError, match=r"\d+ tensors belong nowhere: layers\.3\.attn\..* and \d+ more"):
        check_headers(headers, shorter, mtp=False)
    longer = ModelConfig.from_dict(tiny_config_dict(num_hidden_layers=5, compress_ratios=[0, 4, 8, 4, 0]))
    with pytest.raises(ValueError, match=r"\d+ tensors are missing: layers\.4\.attn\..* and \d+ more"):
        check_headers(headers, longer, mtp=False)
    with pytest.raises(ValueError, match=r"embed.weight: expected BF16 or F32 \[130, 64\], found BF16 \[128"):
        check_headers(headers, ModelConfig.from_dict(tiny_config_dict(vocab_size=130)), mtp=False)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="gone: no such folder"):
        Checkpoint.open(tmp_path / "gone", CONFIG)


def test_dialects_are_not_mixed(headers: dict[str, TensorInfo]) -> None:
    with pytest.raises(ValueError, match="holds no tensors"):
        check_headers({}, CONFIG, mtp=False)
    bare = {to_transformers(slot.name): headers[slot.stem] for slot in TRUNK if slot.stem in headers}
    unprefixed = {name.removeprefix("model."): info for name, info in bare.items()}
    with pytest.raises(
        ValueError, match="embed.weight .* model.embed_tokens.weight .*found none, but embed_to"
    ):
        check_headers(unprefixed, CONFIG, mtp=False)
    twice = headers | {f"{name}.weight": info for name, info in bare.items()}
    with pytest.raises(ValueError, match="found more than one of them"):
        check_headers(twice, CONFIG, mtp=False)
    sink = {"model.layers.0.self_attn.sinks": headers["layers.0.attn.attn_sink"]}
    with pytest.raises(ValueError, match="1 tensors belong nowhere: model.layers.0.self_attn.sinks"):
        check_headers(headers | sink, CONFIG, mtp=False)


def test_mtp_is_skipped_or_loaded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = ENCODED["nvidia"]
    odd = {"mtp.7.odd": torch.zeros(3, dtype=torch.float16)}
    write_checkpoint(tmp_path, RAW, tensors | odd)
    mtp = [t for name, t in (tensors | odd).items() if name.startswith("mtp.")]
    with caplog.at_level(logging.INFO):
        checkpoint = Checkpoint.open(tmp_path, CONFIG)
    assert checkpoint.skipped == (len(mtp), sum(t.nbytes for t in mtp)) and not checkpoint.mtp
    assert f"skipped {checkpoint.skipped[0]} mtp.* tensors, {checkpoint.skipped[1]} bytes" in caplog.text
    assert checkpoint.stored.keys() == {slot.name for slot in TRUNK}
    with pytest.raises(ValueError, match="1 tensors belong nowhere: mtp.7.odd"):
        Checkpoint.open(tmp_path, CONFIG, mtp=True)
    assert Checkpoint.open(tmp_path, replace(CONFIG, has_dspark=True)).skipped == checkpoint.skipped
    with pytest.raises(ValueError, match="dspark_.* DSpark"):
        Checkpoint.open(tmp_path, replace(CONFIG, has_dspark=True), mtp=True)
    bare = {name: t for name, t in tensors.items() if not name.startswith("mtp.")}
    write_checkpoint(tmp_path, RAW, bare)
    with pytest.raises(ValueError, match="no mtp.* tensor is there"):
        Checkpoint.open(tmp_path, CONFIG, mtp=True)
    assert Checkpoint.open(tmp_path, CONFIG).skipped == (0, 0)


def poke(directory: Path, name: str, data: bytes) -> None:
    """Overwrite the last bytes of a stored tensor."""
    info = read_tensors(directory)[name]
    with info.file.open("r+b") as file:
        file.seek(info.end - len(data))
        file.write(data)


def f32(value: float) -> bytes:
    return bytes(torch.tensor([value]).view(torch.uint8).tolist())


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
@pytest.mark.parametrize(
    ("preset", "leaf"),
    [("nvidia", "weight_scale_2"), ("nvidia", "input_scale"), ("compressed-tensors", "weight_global_scale")],
)
def test_bad_scalars_are_refused_on_opening(tmp_path: Path, preset: str, leaf: str, value: float) -> None:
    write_checkpoint(tmp_path, RAW, ENCODED[preset])
    name = f"layers.3.ffn.experts.2.w2.{leaf}"
    poke(tmp_path, name, f32(value))
    with pytest.raises(
        ValueError, match=rf"model-.*safetensors: {name}: expected a finite scale above 0, found"
    ):
        Checkpoint.open(tmp_path, CONFIG)


def test_reciprocal_scalar_without_an_inverse(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, RAW, ENCODED["compressed-tensors"])
    poke(tmp_path, "layers.1.ffn.experts.0.w1.input_global_scale", f32(1e-39))
    with pytest.raises(ValueError, match="layers.1.ffn.experts.0.w1.input_global_scale: expected a finite"):
        Checkpoint.open(tmp_path, CONFIG)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("layers.0.ffn.gate.tid2eid", (8).to_bytes(8, "little")),
        ("layers.0.ffn.gate.tid2eid", (-1).to_bytes(8, "little", signed=True)),
        ("layers.0.ffn.experts.1.w3.weight_scale", b"\x7f"),
        ("layers.0.attn.wq_a.weight", b"\xff"),
        ("layers.0.attn.wq_a.scale", b"\xff"),
        ("layers.0.attn.attn_sink", f32(float("nan"))),
        ("layers.0.ffn.gate.weight", b"\x80\x7f"),
        ("layers.0.ffn_norm.weight", b"\xc0\x7f"),
    ],
)
def test_bad_values_are_refused_in_their_layer(tmp_path: Path, name: str, data: bytes) -> None:
    write_checkpoint(tmp_path, RAW, ENCODED["nvidia"])
    poke(tmp_path, name, data)
    checkpoint = Checkpoint.open(tmp_path, CONFIG)
    checkpoint.load(layer_slots(CONFIG, 1))
    with pytest.raises(ValueError, match=rf"model-.*safetensors: {name}: holds "):
        checkpoint.load(layer_slots(CONFIG, 0))
