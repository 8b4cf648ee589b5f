"""The small model that tools/train_tiny.py trains: its parameters, and the project's layers under autograd.

The layers are the engine's own. Three operations have a twin here that computes the same without a host
sync, so that a whole training step fits in one CUDA graph: all experts at once, attention in one piece,
and a table of FP4 values that stays on the device. tests/test_train_tiny.py compares them.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dsv4.config import ModelConfig
from dsv4.layers import attention, moe
from dsv4.layers.block import Block
from dsv4.layers.indexer import Indexer, IndexProducts
from dsv4.layers.mhc import Entry
from dsv4.layers.mtp import MtpBlock
from dsv4.layers.weights import Weights
from dsv4.loading.mapping import Slot, all_slots
from dsv4.model import Transformer
from dsv4.numerics import Numerics
from dsv4.ops.dispatch import use_reference
from dsv4.ops.formats import E2M1_VALUES, Plain, Weight
from dsv4.ops.gemm import linear
from dsv4.ops.indexer import index_scores, select_topk
from dsv4.ops.moe.reference import Expert, run_expert, swiglu
from dsv4.ops.quant import reference as quant_reference
from dsv4.ops.rope import apply_rope

HIDDEN = -1e9  # an index score that no softmax sees


@dataclasses.dataclass
class Trace:
    """How the layers run now, and what they left behind since ``clear``.

    ``dense``: attend to every visible entry; ``mask_entries``: to none. ``indexer_kl`` holds one divergence
    and, with ``measure``, ``coverage`` two attention masses (of the picks, of a random choice) a CSA layer.
    """

    dropout: float = 0.0
    training: bool = False
    dense: bool = False
    mask_entries: bool = False
    measure: bool = False
    calibrate: bool = False
    scores: Tensor | None = None
    indexer_kl: list[Tensor] = dataclasses.field(default_factory=list)
    coverage: list[tuple[Tensor, Tensor]] = dataclasses.field(default_factory=list)

    def clear(self) -> None:
        self.scores = None
        self.indexer_kl.clear()
        self.coverage.clear()

    def drop(self, y: Tensor) -> Tensor:
        return F.dropout(y, self.dropout) if self.training and self.dropout else y


class Stacked:
    """All routed experts of a layer as three tensors [E, N, K], with the load and amax of the last passes."""

    def __init__(self, w1: Tensor, w2: Tensor, w3: Tensor, trace: Trace) -> None:
        self.w1, self.w2, self.w3 = w1, w2, w3
        self.trace = trace
        self.load = torch.zeros(w1.shape[0], device=w1.device)
        self.amax = torch.zeros(2, w1.shape[0], device=w1.device)  # inputs of w1 and w3, inputs of w2


def run_stacked(
    x: Tensor, routing: Tensor, chosen: Tensor, experts: Stacked, shared: Expert, *, limit: float
) -> Tensor:
    """``ops.moe.run_experts`` in fp32 with every expert on every token, at weight 0 where not chosen."""
    count, width, dim = experts.w1.shape
    weight = x.new_zeros((x.shape[0], count)).scatter(1, chosen, routing)
    gate = (x @ experts.w1.view(-1, dim).T).unflatten(1, (count, width))
    up = (x @ experts.w3.view(-1, dim).T).unflatten(1, (count, width))
    hidden = swiglu(gate, up, limit=limit) * weight.unsqueeze(-1)  # [T, E, F]
    y = hidden.flatten(1) @ experts.w2.transpose(1, 2).reshape(-1, dim)
    with torch.no_grad():
        used = torch.zeros_like(weight).scatter(1, chosen, 1.0)
        experts.load.copy_(used.sum(dim=0))
        if experts.trace.calibrate:
            inputs = (x.abs().amax(dim=1, keepdim=True) * used).amax(dim=0)
            seen = torch.stack((inputs, hidden.abs().amax(dim=2).amax(dim=0)))
            experts.amax.copy_(torch.maximum(experts.amax, seen))
    return y + run_expert(x, shared, None, limit=limit)


def attend_whole(
    trace: Trace,
    q: Tensor,
    kv: Tensor,
    sink: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    *,
    window: int,
    compressed: Tensor | None = None,
    visible: Tensor | None = None,
    selected: Tensor | None = None,
) -> Tensor:
    """``ops.attention.attend`` for a fresh sequence whose length is a multiple of the window.

    Selected entries are a mask over all of them. With the indexer's scores in ``trace``, compares them with
    the attention that all visible entries would get.
    """
    tokens, heads, width = q.shape
    scale = width**-0.5
    padded = F.pad(kv, (0, 0, window, 0)).unflatten(0, (-1, window))  # [blocks + 1, W, Dh]
    near = torch.cat((padded[:-1], padded[1:]), dim=1)  # [blocks, 2 W, Dh]
    blocks = q.reshape(-1, window * heads, width)
    local = (blocks @ near.mT * scale).view(tokens, heads, 2 * window)
    local = local.masked_fill(~_window_mask(tokens, window, q.device)[:, None], -math.inf)
    parts = [local, sink[:, None].expand(tokens, heads, 1)]
    entries = 0
    if compressed is not None and compressed.shape[0] and not trace.mask_entries:
        assert visible is not None
        entries = compressed.shape[0]
        seen = torch.arange(entries, device=q.device) < visible[:, None]
        far = (q.flatten(0, 1) @ compressed.T * scale).view(tokens, heads, entries)
        if trace.scores is not None:
            _compare(trace, parts, far.detach(), seen, selected)
        chosen = seen if selected is None else _chosen(selected, entries)
        parts.append(far.masked_fill(~chosen[:, None], -math.inf))
    trace.scores = None
    p = torch.cat(parts, dim=-1).softmax(dim=-1)
    out = (p[..., : 2 * window].reshape(-1, window * heads, 2 * window) @ near).view_as(q)
    if entries:
        out = out + (p[..., 2 * window + 1 :].flatten(0, 1) @ compressed).view_as(q)
    return apply_rope(out, positions, inv_freq, inverse=True)


def _window_mask(tokens: int, window: int, device: torch.device) -> Tensor:
    """[T, 2 W]: which rows of its block and the block before a query attends to."""
    positions = torch.arange(tokens, device=device)[:, None]
    keys = torch.arange(2 * window, device=device)
    age = positions % window + window - keys
    return (age >= 0) & (age < window) & (positions - age >= 0)


def _chosen(selected: Tensor, entries: int) -> Tensor:
    mask = torch.zeros((selected.shape[0], entries + 1), dtype=torch.bool, device=selected.device)
    return mask.scatter(1, selected.masked_fill(selected < 0, entries).long(), True)[:, :entries]


def _compare(trace: Trace, parts: list[Tensor], far: Tensor, seen: Tensor, selected: Tensor | None) -> None:
    """The divergence of the index scores from the attention over all visible entries, summed over heads."""
    assert trace.scores is not None
    with torch.no_grad():
        seen_far = far.masked_fill(~seen[:, None], -math.inf)
        every = torch.cat((*(part.detach() for part in parts), seen_far), dim=-1)
        mass = every.softmax(dim=-1)[..., -far.shape[-1] :].sum(dim=1)  # [T, C]
        total = mass.sum(dim=1, keepdim=True)
        target = mass / total.clamp_min(1e-20)
    guess = trace.scores.masked_fill(~seen, HIDDEN).log_softmax(dim=-1)
    divergence = (torch.xlogy(target, target) - target * guess).sum(dim=1)
    some = seen[:, 0]
    trace.indexer_kl.append((divergence * some).sum() / some.sum())
    if trace.measure and selected is not None:
        visible, picks = seen.sum(dim=1), (selected >= 0).sum(dim=1)
        binds = visible > picks
        picked = (target * _chosen(selected, seen.shape[1])).sum(dim=1)
        trace.coverage.append((picked[binds].sum(), (picks[binds] / visible[binds]).sum()))


class Apart(Plain):
    """An indexer's matrix. Its input is detached: index scores train the indexers alone."""


class TracedIndexer:
    """An indexer that scores all entries and leaves the scores in the trace."""

    def __init__(self, inner: Indexer, trace: Trace) -> None:
        self.inner = inner
        self.wq_b = inner.wq_b
        self.trace = trace

    def chooses(self, entries: int) -> bool:
        return entries > 0

    def forward(
        self, products: IndexProducts, positions: Tensor, visible: Tensor, state: Any, start: int
    ) -> Tensor | None:
        inner = self.inner
        keys = inner.compressor.forward(products.kv, products.gate, state, start)
        keys = state.extend(inner.rounded(keys, state), start + positions.shape[0])
        if products.q is None:
            return None
        q, weights = inner.queries(products.q, products.weights, positions)
        self.trace.scores = scores = index_scores(q, keys, weights, visible)
        if self.trace.dense or keys.shape[0] <= inner.top_k:
            return None
        return select_topk(scores.detach(), visible, top_k=inner.top_k)


class Dropped:
    """A sublayer with dropout on its output."""

    def __init__(self, inner: Any, trace: Trace) -> None:
        self.inner = inner
        self.trace = trace

    def forward(self, *args: Any) -> Tensor:
        return self.trace.drop(self.inner.forward(*args))


class DroppedStreams(Dropped):
    """The way into the first block, with dropout on the embedding: the same in all streams."""

    def enter(self, x: Tensor) -> Entry:
        return self.inner.enter(x * self.trace.drop(torch.ones_like(x[:, :1])))


class TinyModel:
    """Parameters by slot name (experts stacked under ``...experts.w1``), buffers, and the model on them."""

    def __init__(self, config: ModelConfig, device: torch.device, *, seed: int = 0) -> None:
        self.config = config
        self.trace = Trace()
        generator = torch.Generator().manual_seed(seed)
        tensors: dict[str, Tensor] = {}
        self.buffers: dict[str, Tensor] = {}
        slots = all_slots(config, mtp=True)
        for slot in slots:
            value = initial(slot, config, generator).to(device)
            (self.buffers if slot.name.endswith(("gate.bias", "tid2eid")) else tensors)[slot.name] = value
        for name in [name for name in tensors if ".experts.0.w" in name]:
            stack = [tensors.pop(name.replace(".0.w", f".{e}.w")) for e in range(config.num_experts)]
            tensors[name.replace(".0.w", ".w")] = torch.stack(stack)
        self.params = {name: torch.nn.Parameter(value) for name, value in tensors.items()}
        self.stacks: dict[str, Stacked] = {}
        self.model = self._build()

    def slots(self, values: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """A tensor for every slot, experts apart; of ``values`` (as from ``state``) if given."""
        values = self.state() if values is None else values
        found = {}
        for name, value in values.items():
            if ".experts.w" in name:
                names = [name.replace(".experts.w", f".experts.{e}.w") for e in range(len(value))]
                found |= dict(zip(names, value.detach(), strict=True))
            else:
                found[name] = value
        return found

    def state(self) -> dict[str, Tensor]:
        """Parameters and buffers themselves, by name."""
        return {name: param.detach() for name, param in self.params.items()} | self.buffers

    @torch.no_grad()
    def load(self, values: dict[str, Tensor]) -> None:
        """Copy ``values`` into the parameters and buffers, in place."""
        for name, tensor in self.state().items():
            tensor.copy_(values[name])

    def _build(self) -> Transformer:
        config, numerics = self.config, Numerics(dtype="float32", numerics="trained")
        kinds = {slot.name: slot.kind for slot in all_slots(config, mtp=True)}
        tensors = self.slots() | {k: v for k, v in self.params.items() if k in kinds}
        linears = [k for k in tensors if kinds[k] == "linear"]
        matrices = {k: (Apart if ".indexer." in k else Plain)(tensors[k]) for k in linears}
        weights = Weights(tensors | matrices)
        blocks = []
        for layer in range(config.num_layers):
            ratio, hashed = config.ratio(layer), config.is_hash_layer(layer)
            scope = weights.scope(f"layers.{layer}")
            blocks.append(Block(config, numerics, ratio=ratio, hashed=hashed, weights=scope))
            self._instrument(blocks[-1], f"layers.{layer}.ffn.experts.")
        mtp = MtpBlock(config, numerics, weights.scope("mtp.0"))
        self._instrument(mtp.block, "mtp.0.ffn.experts.")
        model = Transformer(config, numerics, weights, blocks, mtp)
        blocks[0].attn_hc = DroppedStreams(blocks[0].attn_hc, self.trace)
        weights.assert_empty()
        return model

    def _instrument(self, block: Any, prefix: str) -> None:
        stack = Stacked(*(self.params[f"{prefix}w{i}"] for i in (1, 2, 3)), self.trace)
        self.stacks[prefix] = block.ffn.experts = stack
        if block.attn.indexer is not None:
            block.attn.indexer = TracedIndexer(block.attn.indexer, self.trace)
        block.attn = Dropped(block.attn, self.trace)
        block.ffn = Dropped(block.ffn, self.trace)

    @torch.no_grad()
    def balance(self, step: float) -> None:
        """Raise the selection bias of experts below the mean load by ``step``, lower that of the others."""
        for prefix, stack in self.stacks.items():
            bias = self.buffers.get(prefix.replace("experts.", "gate.bias"))
            if bias is not None:
                bias += step * torch.sign(stack.load.mean() - stack.load)


@contextmanager
def substitutes(trace: Trace) -> Iterator[None]:
    """Inside, the layers use this file's operations where they fit, and the references elsewhere."""
    run_experts, attend, unpack = moe.run_experts, attention.attend, quant_reference.unpack_e2m1
    linear_stack = attention.linear_stack
    tables: dict[torch.device, Tensor] = {}

    def experts(x: Tensor, routing: Tensor, chosen: Tensor, some: Any, shared: Expert, **how: Any) -> Tensor:
        if isinstance(some, Stacked):
            return run_stacked(x, routing, chosen, some, shared, limit=how["limit"])
        return run_experts(x, routing, chosen, some, shared, **how)

    def whole(q: Tensor, kv: Tensor, *others: Tensor, window: int, **entries: Any) -> Tensor:
        if kv.shape[0] != q.shape[0] or q.shape[0] % window or q.dtype != torch.float32:
            return attend(q, kv, *others, window=window, **entries)
        return attend_whole(trace, q, kv, *others, window=window, **entries)

    def products(x: Tensor, weights: Sequence[Weight], *, out_dtypes: Any, **how: Any) -> tuple[Tensor, ...]:
        """Of indexers' matrices with a detached input."""
        inputs = [x.detach() if isinstance(weight, Apart) else x for weight in weights]
        each = zip(inputs, weights, out_dtypes, strict=True)
        return tuple(linear(own, weight, out_dtype=dtype, **how) for own, weight, dtype in each)

    def unpack_e2m1(codes: Tensor) -> Tensor:
        if codes.device not in tables:
            tables[codes.device] = torch.tensor(E2M1_VALUES, device=codes.device)
        pairs = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)
        return tables[codes.device][pairs.int()]

    moe.run_experts, attention.attend, quant_reference.unpack_e2m1 = experts, whole, unpack_e2m1
    attention.linear_stack = products
    try:
        with use_reference("all"):
            yield
    finally:
        moe.run_experts, attention.attend, quant_reference.unpack_e2m1 = run_experts, attend, unpack
        attention.linear_stack = linear_stack


def initial(slot: Slot, config: ModelConfig, generator: torch.Generator) -> Tensor:
    """The first value of a slot."""
    name, shape, m = slot.name, slot.shape, config.num_streams
    if slot.kind == "ids":
        return hash_table(*shape, config.num_experts, generator)
    if slot.kind == "norm":
        return torch.ones(shape)
    if name.endswith("_scale"):
        return torch.full(shape, 0.1)
    if name.endswith(("hc_attn_base", "hc_ffn_base")):
        return _first_base(name, m, generator)
    if slot.kind == "f32" and not name.endswith("_fn"):
        return torch.zeros(shape)
    std = shape[-1] ** -0.5
    if name == "embed":
        std = 0.7
    elif name == "head" or name.endswith(("wo_b", "w2")):
        std *= 0.5
    return torch.randn(shape, generator=generator) * std


def _first_base(name: str, m: int, generator: torch.Generator) -> Tensor:
    """Each site reads mostly one stream, writes to all unequally, and leaves the streams apart."""
    layer = int(next(part for part in name.split(".") if part.isdigit()))
    read = torch.full((m,), -1.0)
    read[(2 * layer + ("ffn" in name)) % m] = 1.0
    write = 0.5 * torch.randn(m, generator=generator)
    return torch.cat((read, write, (4.0 * torch.eye(m)).flatten()))


def hash_table(tokens: int, top_k: int, experts: int, generator: torch.Generator) -> Tensor:
    """[V, K] i64: distinct experts for every token, each expert for about as many tokens."""
    start = torch.randperm(tokens, generator=generator) % experts
    strides = torch.tensor([s for s in range(1, experts + 1) if math.gcd(s, experts) == 1])
    stride = strides[torch.randint(len(strides), (tokens,), generator=generator)]
    return (start[:, None] + torch.arange(top_k) * stride[:, None]) % experts
