"""The memory plan of the cache: what it says, what is allocated, and what the released models need."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from dsv4 import plan as planning
from dsv4.cache import RowFormat, SequenceCache
from dsv4.config import WINDOW_ONLY, ModelConfig
from dsv4.loading.presets import preset
from dsv4.numerics import Numerics

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CONTEXTS = (1, 3, 100, 8192, 131_072, 1 << 20)
# Rows of a window ring; bytes of a layer's tails by its ratio, f32 values and gates.
RING = 128 + 7
TAILS = {0: 0, 4: 4 * 2 * 8 * (2 * 512 + 2 * 128), 128: 4 * 2 * 128 * 512}


def config_of(model: str) -> ModelConfig:
    return ModelConfig.from_dict(preset(model))


def plan_of(
    config: ModelConfig, numerics: Numerics, device: torch.device, max_context: int, mtp: bool = False
) -> planning.Plan:
    """As of a checkpoint without weights."""
    checkpoint = SimpleNamespace(config=config, stored={}, mtp=mtp, skipped=(0, 0))
    return planning.make_plan(checkpoint, numerics, device, max_context, 0)


def allocated(cache: SequenceCache) -> int:
    """Bytes of every tensor in the cache, found by its attributes."""

    def tensors(value: object) -> list[Tensor]:
        if isinstance(value, Tensor):
            return [value]
        items = value if isinstance(value, list) else getattr(value, "__dict__", {}).values()
        return [tensor for item in items for tensor in tensors(item)]

    return sum(tensor.untyped_storage().nbytes() for tensor in tensors(cache))


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "free_bytes", lambda device: 1 << 40)


@pytest.mark.parametrize("mtp", [False, True])
@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
@pytest.mark.parametrize("model", ["flash", "pro", "tiny"])
def test_the_plan_is_what_is_allocated(model: str, device: torch.device, mtp: bool) -> None:
    """On tensors without memory, for every format; the printed line adds up to within 2 %."""
    config = config_of(model)
    for numerics in (Numerics(), Numerics(numerics="exact"), Numerics(dtype="float32")):
        form = RowFormat.of(config, numerics, device)
        for tokens in CONTEXTS:
            if tokens > config.max_context:
                continue
            plan = plan_of(config, numerics, device, tokens, mtp)
            stacks = [config.compress_ratios, (WINDOW_ONLY,)] if mtp else [config.compress_ratios]
            found = sum(
                allocated(SequenceCache(config, ratios, max_context=tokens, form=form, device="meta"))
                for ratios in stacks
            )
            (row,) = [row for row in plan.rows if row.component == planning.KV_CACHE]
            assert row.nbytes == found and row.format == form.name
            assert abs(plan.fixed_bytes + plan.bytes_per_token * tokens - found) <= 0.02 * found


@pytest.mark.parametrize(("model", "limit"), [("flash", 4.2e9), ("pro", 6e9)])
def test_a_million_tokens(model: str, limit: float) -> None:
    """Records of 592 and 68 bytes, from first principles; and no more than was promised for Flash."""
    config, tokens = config_of(model), 1 << 20
    row = {0: 0, 4: (592 + 68) / 4, 128: 592 / 128}
    want = sum(RING * 592 + TAILS[ratio] + row[ratio] * tokens for ratio in config.compress_ratios)
    found = plan_of(config, Numerics(), CUDA, tokens)
    assert found.total_bytes == want < limit
    assert found.bytes_per_token == sum(row[ratio] for ratio in config.compress_ratios)


def test_the_format_is_printed() -> None:
    config = config_of("flash")
    for numerics, device, words in (
        (Numerics(), CUDA, "fp8 + fp4"),
        (Numerics(numerics="exact"), CUDA, "bfloat16"),
        (Numerics(dtype="float32"), CUDA, "float32"),
        (Numerics(), CPU, "bfloat16"),
    ):
        text = planning.format_plan(plan_of(config, numerics, device, 8192))
        (line,) = [line for line in text.splitlines() if line.startswith("KV cache")]
        assert line.split("  ")[0] == "KV cache" and f" {words} " in line
