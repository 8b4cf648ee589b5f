"""What loading costs: views instead of copies, host memory, and the check of a full-size model."""

import math
import subprocess
import sys
import time
from pathlib import Path

import torch
from checkpoints import PRESETS, encode_model, random_model, tiny_config_dict, write_checkpoint
from torch import Tensor

from dsv4.config import ModelConfig
from dsv4.loading.checkpoint import Checkpoint, check_headers
from dsv4.loading.formats import LAYOUTS
from dsv4.loading.headers import DTYPE_BYTES, SINGLE_FILE, TensorInfo
from dsv4.loading.mapping import all_slots
from dsv4.ops.formats import Weight

ROOT = Path(__file__).resolve().parent.parent
RAW = tiny_config_dict()
CONFIG = ModelConfig.from_dict(RAW)


def parts_of(value: Weight | Tensor) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [part for part in value if part is not None]


def test_tensors_are_views_of_the_file_unless_misaligned(tmp_path: Path) -> None:
    tensors = encode_model(random_model(CONFIG, seed=2), CONFIG, PRESETS["f32"])
    file = write_checkpoint(tmp_path, RAW, tensors, shards=1) / SINGLE_FILE
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    for shift in (0, 1):  # one more space in the header moves every tensor to an odd address
        padded = (length + shift).to_bytes(8, "little") + content[8 : 8 + length] + b" " * shift
        file.write_bytes(padded + content[8 + length :])
        checkpoint = Checkpoint.open(tmp_path, CONFIG)
        slots = all_slots(CONFIG, mtp=False)
        loaded = checkpoint.load(slots)
        for slot in slots:
            for part in parts_of(loaded[slot.name]):
                assert torch.equal(part, tensors[slot.stem])
                assert part.data_ptr() % part.itemsize == 0
                mapped = part.untyped_storage().nbytes() == file.stat().st_size
                assert mapped == (shift == 0), slot.name


# Prints the bytes of the model, of its largest layer, and by how much loading raised the peak.
_MEASURE = """
import sys
from pathlib import Path
from dsv4.config import ModelConfig
from dsv4.loading.checkpoint import Checkpoint
from dsv4.loading.mapping import layer_slots, trunk_slots

def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))

def groups(config):
    return [layer_slots(config, layer) for layer in range(config.num_layers)] + [trunk_slots(config)]

for directory in sys.argv[1:]:  # the first one brings all code into memory
    config = ModelConfig.from_checkpoint(directory)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory("VmRSS")
    checkpoint = Checkpoint.open(directory, config)
    kept = [checkpoint.load(slots) for slots in groups(config)]
    grown = memory("VmHWM") - before
layers = [sum(checkpoint.stored[slot.name].nbytes for slot in slots) for slots in groups(config)[:-1]]
print(checkpoint.nbytes, max(layers), grown)
"""


def test_peak_host_memory(tmp_path: Path) -> None:
    tiny = write_checkpoint(
        tmp_path / "tiny", RAW, encode_model(random_model(CONFIG, 0), CONFIG, PRESETS["nvidia"])
    )
    raw = tiny_config_dict(
        hidden_size=512,
        moe_intermediate_size=512,
        num_hidden_layers=6,
        compress_ratios=[0, 0, 4, 8, 4, 8],
        num_nextn_predict_layers=0,
    )
    config = ModelConfig.from_dict(raw)
    large = tmp_path / "large"
    write_checkpoint(large, raw, encode_model(random_model(config, 0), config, PRESETS["bf16"]))
    command = [sys.executable, "-c", _MEASURE, str(tiny), str(large)]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    model, layer, grown = map(int, output.split())
    assert layer > 13e6
    assert grown <= model + 1.2 * layer, (model, layer, grown)


def flash_headers(config: ModelConfig, preset: str) -> dict[str, TensorInfo]:
    """The header entries of a full-size checkpoint that does not exist."""
    layouts = {layout.format: layout for layout in reversed(LAYOUTS)}
    plain = {"f32": "F32", "ids": "I64", "norm": "BF16", "matrix": "BF16"}
    entries: list[tuple[str, str, tuple[int, ...]]] = []
    for slot in all_slots(config, mtp=True):
        if slot.kind == "linear":
            parts = layouts[PRESETS[preset](slot)].parts
            entries += [(slot.name + p.suffix, p.dtypes[0], p.shapes(*slot.shape)[0]) for p in parts]
        else:
            entries.append((slot.stem, plain[slot.kind], slot.shape))
    return {
        name: TensorInfo(Path("x"), dtype, shape, 0, math.prod(shape) * DTYPE_BYTES[dtype])
        for name, dtype, shape in entries
    }


def test_full_size_headers() -> None:
    config = ModelConfig.from_dict(
        tiny_config_dict(
            vocab_size=129280,
            hidden_size=4096,
            num_hidden_layers=43,
            num_attention_heads=64,
            head_dim=512,
            qk_rope_head_dim=64,
            q_lora_rank=1024,
            o_groups=8,
            o_lora_rank=1024,
            n_routed_experts=256,
            num_experts_per_tok=6,
            moe_intermediate_size=2048,
            num_hash_layers=3,
            sliding_window=128,
            compress_ratios=[0, 0] + [4, 128] * 20 + [4, 0],
            index_n_heads=64,
            index_head_dim=128,
            index_topk=512,
        )
    )
    # As published: 69,187 tensors; NVFP4 adds two scalars to each of 43 * 256 * 3 routed matrices.
    for preset, count in (("deepseek", 69187), ("nvidia", 69187 + 2 * 43 * 256 * 3)):
        tensors = flash_headers(config, preset)
        assert len(tensors) == count
        start = time.process_time()
        checked = check_headers(tensors, config, mtp=False)
        assert time.process_time() - start < 3
        assert len(checked.stored) == len(all_slots(config, mtp=False)) and checked.skipped[0] == 1575
