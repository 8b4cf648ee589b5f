"""The engine against the independent decoder of tests/oracle.py, on whole prompts.

Both work in fp32 and agree to 1e-5, as long as they round alike. But a value that lies half-way
between two codes, up to fp32 noise, may go either way, and from there on the two sequences differ by
whole quantisation steps; with a hundred rounded rows a token every prompt has such a place. So the
oracle is made to follow: where its own value is such a tie, it continues with the row that the engine
rounded to (``Follower``). Nothing else is forgiven, and the positions behind a tie are compared too.
"""

from collections import defaultdict
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import checkpoints
import oracle
import pytest
import torch
from torch import Tensor

import dsv4.layers.indexer
import dsv4.ops.quant.reference
from dsv4.config import ModelConfig
from dsv4.engine import load

TOLERANCE = 1e-4  # measured: 6e-6
# Inputs of a rounding differ between engine and oracle by up to 5e-7 of the row's largest value.
TIE = 3e-6
# Scores of experts and index entries differ by up to 3e-6 of the largest one. Choices are not followed:
# the positions from the first closer choice on are left out, at most a third of a prompt.
CLEAR_CHOICE = 1e-5
CHOICES = ("router", "indexer")

# Every kind of layer, both routers; compressed entries outnumber index_topk from position 35 on. Some
# rows end in a part of a rounding block: 80 values of a KV row by 64, 160 inputs of wo_b by 128.
RAW_CONFIG = checkpoints.tiny_config_dict(
    head_dim=96,
    o_lora_rank=80,
    sliding_window=16,
    compress_ratios=[0, 4, 16, 4, 0],
    index_n_heads=32,  # few heads often give several entries a score of exactly 0
    index_topk=8,
)
CONFIG = ModelConfig.from_dict(RAW_CONFIG)
PROMPT = torch.randint(2, 128, (150,), generator=torch.Generator().manual_seed(1)).tolist()
DRAFT_PROMPT = PROMPT[:80]


class Follower(oracle.Oracle):
    """An oracle that takes the engine's side in ties. ``rows``: what the engine rounded, by width."""

    def __init__(self, *args: Any, rows: dict[int, Tensor], **choices: Any) -> None:
        super().__init__(*args, **choices)
        self.rows = rows
        self.known = {row.numpy().tobytes() for table in rows.values() for row in table}
        self.rounded = self.followed = 0

    def _simulate(self, x: Tensor, block: int, fmt: oracle.Format, t: int, site: str) -> Tensor:
        own = super()._simulate(x, block, fmt, t, site) + 0.0  # no -0, whose bytes differ
        flat = zip(x.view(-1, x.shape[-1]), own.view(-1, x.shape[-1]), strict=True)
        return torch.stack([self._follow(*pair) for pair in flat]).view(x.shape)

    def _follow(self, x: Tensor, own: Tensor) -> Tensor:
        """The engine's row nearest to ``own``, if it rounds x as well as ``own`` does, up to TIE."""
        self.rounded += 1
        if own.numpy().tobytes() in self.known or len(x) not in self.rows:
            return own
        table = self.rows[len(x)]
        nearest = table[(table - own).abs().amax(-1).argmin()]
        if ((nearest - x).abs() > (own - x).abs() + TIE * x.abs().max()).any():
            return own
        self.followed += 1
        return nearest


def record_roundings(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[Tensor]]:
    """Collects every row that the engine rounds from now on, by width."""
    rows: dict[int, list[Tensor]] = defaultdict(list)

    def recorded(original: Callable[..., Tensor], x: Tensor, **settings: Any) -> Tensor:
        rounded = original(x, **settings)
        rows[x.shape[-1]].append(rounded.flatten(0, -2) + 0.0)
        return rounded

    for module, name in ((dsv4.ops.quant.reference, "round_fp8"), (dsv4.layers.indexer, "round_index")):
        monkeypatch.setattr(module, name, partial(recorded, getattr(module, name)))
    return rows


@cache
def tensors_of(preset: str) -> dict[str, Tensor]:
    return checkpoints.encode_model(
        checkpoints.random_model(CONFIG, seed=0), CONFIG, checkpoints.PRESETS[preset]
    )


def quantized_linears(preset: str) -> frozenset[str]:
    form = checkpoints.PRESETS[preset]
    slots = checkpoints.model_slots(CONFIG)
    return frozenset(s.name for s in slots if s.kind == "linear" and form(s) not in ("bf16", "f32"))


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Writes a preset's checkpoint once."""

    @cache
    def write(preset: str) -> Path:
        directory = tmp_path_factory.mktemp(preset)
        return checkpoints.write_checkpoint(directory, RAW_CONFIG, tensors_of(preset))

    return write


def assert_agrees(found: Tensor, expected: Tensor, decoder: Follower) -> None:
    """``found`` [T, V] agrees with the oracle's ``expected`` up to the first choice that is not clear."""
    unclear = [t for t, site, margin in decoder.flips if site in CHOICES and margin < CLEAR_CHOICE]
    end = min(unclear, default=len(expected))
    margins: dict[str, float] = {}
    for t, site, margin in decoder.flips:
        if t < end:
            margins[site] = min(margin, margins.get(site, margin))
    difference = (found - expected).abs().amax(-1)[:end]
    report = (
        f"max |d| {difference.max():.1e} over {end} positions, at {int(difference.argmax())}; "
        f"{decoder.followed} of {decoder.rounded} rounded rows followed; smallest margins {margins}"
    )
    assert found.shape == expected.shape and end >= len(expected) * 2 // 3, report
    assert difference.max() <= TOLERANCE, report
    assert decoder.followed <= decoder.rounded // 100, report


def compare(
    path: Path,
    preset: str,
    numerics: str,
    activations: str,
    ids: list[int],
    *,
    chunk: int | None = None,
    draft: bool = False,
) -> None:
    choices = {"numerics": numerics, "activations": activations}
    engine = load(path, dtype="float32", max_context=256, mtp=draft, **choices)
    with pytest.MonkeyPatch.context() as monkeypatch:
        rows = record_roundings(monkeypatch)
        found = engine.draft_logits(ids) if draft else engine.logits(ids, chunk)
    decoder = Follower(
        RAW_CONFIG,
        checkpoints.dequantized(tensors_of(preset)),
        quantized=quantized_linears(preset),
        rows={width: torch.cat(parts) for width, parts in rows.items()},
        **choices,
    )
    expected = decoder.draft_logits(ids) if draft else decoder.logits(ids)
    assert (decoder.rounded > 0) == (numerics == "trained" or activations == "fp8")
    assert_agrees(found, expected, decoder)


@pytest.mark.parametrize(
    ("preset", "numerics", "activations", "chunk"),
    [
        ("nvidia", "exact", "bf16", None),
        ("nvidia", "exact", "bf16", 1),
        ("nvidia", "trained", "bf16", None),
        ("nvidia", "trained", "bf16", 7),
        ("nvidia", "trained", "bf16", 1),
        ("nvidia", "exact", "fp8", 7),
        ("nvidia", "trained", "fp8", None),
        ("nvidia", "trained", "fp8", 1),
        ("deepseek", "trained", "fp8", 7),
        ("bf16", "exact", "bf16", 7),
        ("bf16", "trained", "bf16", None),
    ],
)
def test_logits(
    checkpoint_of: Callable[[str], Path], preset: str, numerics: str, activations: str, chunk: int | None
) -> None:
    compare(checkpoint_of(preset), preset, numerics, activations, PROMPT, chunk=chunk)


@pytest.mark.parametrize("activations", ["bf16", "fp8"])
@pytest.mark.parametrize("numerics", ["exact", "trained"])
def test_draft_logits(checkpoint_of: Callable[[str], Path], numerics: str, activations: str) -> None:
    compare(checkpoint_of("nvidia"), "nvidia", numerics, activations, DRAFT_PROMPT, draft=True)
