"""The memory plan: how many bytes each part of the model takes, and where, before anything is read."""

from collections import defaultdict
from dataclasses import dataclass

import torch

from dsv4.cache import RowFormat, SequenceCache
from dsv4.config import WINDOW_ONLY, ModelConfig
from dsv4.device import free_bytes
from dsv4.loading.checkpoint import Checkpoint
from dsv4.loading.repack import is_packed, padding_bytes
from dsv4.loading.requantize import is_requantized
from dsv4.numerics import Numerics
from dsv4.ops.dispatch import REGISTRY
from dsv4.ops.gemm import KERNELS

GB = 1e9
CACHE_DEQUANTISED_MB = 256
KV_CACHE, MATRIX_CACHE, SCREEN = "KV cache", "dequantised matrices", "head, screened"


@dataclass(frozen=True)
class PlanRow:
    """One component in one format: ``place`` is "cpu" or "cuda", ``nbytes`` what it takes there."""

    component: str
    format: str
    place: str
    nbytes: int


@dataclass(frozen=True)
class Plan:
    """Everything that a load would allocate, and the memory there is for it."""

    rows: tuple[PlanRow, ...]
    max_context: int
    context_limit: int
    fixed_bytes: int
    bytes_per_token: float
    free: int
    skipped: tuple[int, int]

    @property
    def weight_bytes(self) -> int:
        return sum(row.nbytes for row in self.rows if row.component not in (KV_CACHE, MATRIX_CACHE))

    @property
    def total_bytes(self) -> int:
        return sum(row.nbytes for row in self.rows)

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.free

    def require_fit(self) -> None:
        """Raise ``ValueError`` if the memory is not there."""
        if not self.fits:
            raise ValueError(
                f"memory: expected {self.total_bytes / GB:.1f} GB free on {self.rows[0].place} for weights, "
                f"cache and {self.max_context} tokens of context, found {self.free / GB:.1f} GB"
            )


def make_plan(
    checkpoint: Checkpoint,
    numerics: Numerics,
    device: torch.device,
    max_context: int,
    cache_dequantised_mb: int,
    screen_head: bool = False,
) -> Plan:
    """The plan of loading ``checkpoint`` with these choices.

    Raises ``ValueError`` for a bad context, and for ``screen_head`` where it cannot be.
    """
    config = checkpoint.config
    if not 1 <= max_context <= config.max_context:
        raise ValueError(
            f"max_context: expected 1 to {config.max_context} tokens (max_position_embeddings), "
            f"found {max_context}"
        )
    place = device.type
    totals: dict[tuple[str, str], int] = defaultdict(int)
    for name, stored in checkpoint.stored.items():
        form, nbytes = stored.format, stored.nbytes
        if is_requantized(name, numerics.weights) and not form.startswith("nvfp4"):
            form, nbytes = "nvfp4", _nvfp4_bytes(stored.slot.shape)
        if is_packed(form, device):
            nbytes += padding_bytes(form, stored.slot.shape)
        totals[component(name), form] += nbytes
    rows = [PlanRow(part, form, place, nbytes) for (part, form), nbytes in sorted(totals.items())]
    if screen_head:
        _require_screen(checkpoint, numerics, device)
        rows.append(PlanRow(SCREEN, "int8", place, _screen_bytes(*checkpoint.stored["head"].slot.shape)))
    form = RowFormat.of(config, numerics, device)
    state = cache_bytes(config, form, max_context, mtp=checkpoint.mtp)
    rows.append(PlanRow(KV_CACHE, form.name, place, state))
    per_token = (cache_bytes(config, form, 1 << 20) - cache_bytes(config, form, 1 << 19)) / (1 << 19)
    if place == "cpu":
        rows.append(PlanRow(MATRIX_CACHE, "f32", place, cache_dequantised_mb << 20))
    return Plan(
        rows=tuple(rows),
        max_context=max_context,
        context_limit=config.max_context,
        fixed_bytes=max(0, round(state - per_token * max_context)),
        bytes_per_token=per_token,
        free=free_bytes(device),
        skipped=checkpoint.skipped,
    )


def cache_bytes(config: ModelConfig, form: RowFormat, max_context: int, *, mtp: bool = False) -> int:
    """Bytes of a sequence's state for so many tokens, with ``mtp`` that of the drafting block as well."""
    stacks = [config.compress_ratios, (WINDOW_ONLY,)] if mtp else [config.compress_ratios]
    facts = {"max_context": max_context, "form": form, "device": "meta"}
    return sum(SequenceCache(config, ratios, **facts).nbytes() for ratios in stacks)


_COMPONENTS = (
    (".attn.indexer.", "indexer"),
    (".attn.compressor.", "compressors"),
    (".attn.", "attention"),
    (".ffn.experts.", "routed experts"),
    (".ffn.shared_experts.", "shared experts"),
    (".ffn.gate", "router"),
    ("hc_", "hyper-connections"),
    ("norm", "norms"),
    ("embed", "embedding"),
    ("head", "head"),
)


def component(name: str) -> str:
    """The part of the model that slot ``name`` belongs to."""
    if name.startswith("mtp."):
        return "MTP block"
    return next(part for pattern, part in _COMPONENTS if pattern in name)


def _nvfp4_bytes(shape: tuple[int, ...]) -> int:
    n, k = shape
    return n * k // 2 + n * k // 16 + 4


def _screen_bytes(vocab: int, width: int) -> int:
    """The int8 copy of a head, padded, and three numbers a row (ops.sampling.ScreenedHead)."""
    return -(-vocab // 16) * 16 * -(-width // 512) * 512 + 12 * vocab


def _require_screen(checkpoint: Checkpoint, numerics: Numerics, device: torch.device) -> None:
    form = "nvfp4" if is_requantized("head", numerics.weights) else checkpoint.stored["head"].format
    for name, found, expected in (
        ("device", device.type, "cuda"),
        ("dtype", numerics.dtype, "bfloat16"),
        ("the head's format", form, "bf16"),
    ):
        if found != expected:
            raise ValueError(f"screen_head: expected {name} to be {expected}, found {found}")


def format_plan(plan: Plan) -> str:
    """The plan as text: a table of components, the totals, what fits, and who serves each operation."""
    place = plan.rows[0].place
    lines = [f"{'component':<22} {'format':<10} {'place':<5} {'GB':>10}"]
    lines += [f"{r.component:<22} {r.format:<10} {r.place:<5} {r.nbytes / GB:>10.3f}" for r in plan.rows]
    left = plan.free - plan.total_bytes + plan.bytes_per_token * plan.max_context
    longest = max(0, int(left / plan.bytes_per_token)) if plan.bytes_per_token else plan.context_limit
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    lines += [
        "",
        f"weights {plan.weight_bytes / GB:.1f} GB, total {plan.total_bytes / GB:.1f} GB, "
        f"free on {place} {plan.free / GB:.1f} GB: {verdict}",
        f"context {plan.max_context} tokens; state {plan.fixed_bytes / 1e6:.1f} MB + "
        f"{plan.bytes_per_token:.0f} bytes a token; memory would hold "
        f"{min(longest, plan.context_limit)} of the model's {plan.context_limit} tokens",
    ]
    if plan.skipped[0]:
        lines.append(f"skipped: {plan.skipped[0]} mtp.* tensors, {plan.skipped[1] / GB:.1f} GB")
    lines += ["", "operations:"]
    lines += [f"  {name:<28} {entry.served_by(place)}" for name, entry in sorted(REGISTRY.items())]
    if REGISTRY["gemm.linear"].served_by(place) == "kernel":
        lines += ["", "matrix products:"]
        lines += [f"  {weights:<28} {tokens:<12} tokens {kernel}" for weights, tokens, kernel in KERNELS]
    return "\n".join(lines)
