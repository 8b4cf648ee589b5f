"""How tests/test_mutations.py puts a fault into a loaded engine for one test.

Where a layer calls an operation (``edit`` its arguments, ``wrap`` it), or in what was loaded
(``assign``); below these, the faults that take more than a line.
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from pytest import MonkeyPatch
from torch import Tensor
from torch.nn import functional as F

from dsv4.cache import SequenceCache
from dsv4.config import CSA_RATIO
from dsv4.engine import Engine
from dsv4.layers import attention, indexer, moe
from dsv4.layers.rope import inverse_frequencies
from dsv4.ops.attention import reference as attention_reference
from dsv4.ops.compressor import reference as pool_reference
from dsv4.ops.formats import Nvfp4, Weight, stored
from dsv4.ops.gemm import linear
from dsv4.ops.rope import reference as rope_reference

Inject = Callable[[Engine, MonkeyPatch], None]
Arguments = dict[str, Any]


class Fault(NamedTuple):
    """How to inject it, and where it shows: numerics, drafts instead of logits, tokens a forward pass."""

    inject: Inject
    numerics: str = "exact"
    draft: bool = False
    chunk: int | None = None


def wrap(owner: Any, name: str, function: Callable[..., Any]) -> Inject:
    """``function(original, ...)`` takes the place of ``owner.name``; a function as owner finds them."""

    def inject(engine: Engine, monkeypatch: MonkeyPatch) -> None:
        for place in owner(engine) if inspect.isfunction(owner) else [owner]:
            monkeypatch.setattr(place, name, partial(function, getattr(place, name)))

    return inject


def edit(owner: Any, name: str, **changes: Callable[[Arguments], Any]) -> Inject:
    """``owner.name`` gets other arguments: each change maps all of them to a new value of its own."""

    def edited(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(original).bind(*args, **kwargs)
        bound.apply_defaults()
        bound.arguments.update({key: change(bound.arguments) for key, change in changes.items()})
        return original(*bound.args, **bound.kwargs)

    return wrap(owner, name, edited)


def assign(
    owners: Callable[[Engine], Iterable[Any]], name: str, value: Callable[[Engine, Any], Any]
) -> Inject:
    """Attribute ``name`` of what was loaded becomes ``value(engine, owner)``."""

    def inject(engine: Engine, monkeypatch: MonkeyPatch) -> None:
        for owner in owners(engine):
            monkeypatch.setattr(owner, name, value(engine, owner))

    return inject


def both(first: Inject, second: Inject) -> Inject:
    def inject(engine: Engine, monkeypatch: MonkeyPatch) -> None:
        first(engine, monkeypatch)
        second(engine, monkeypatch)

    return inject


def indexers(engine: Engine) -> list[Any]:
    return [block.attn.indexer for block in engine.model.blocks if block.attn.indexer]


def window_layers(engine: Engine) -> list[Any]:
    return [block.attn for block in engine.model.blocks if not block.attn.ratio]


def drafter(engine: Engine) -> list[Any]:
    return [engine.model.mtp]


def compressed_layers(engine: Engine) -> list[Any]:
    """Everything in them that rotates."""
    layers = [block.attn for block in engine.model.blocks if block.attn.ratio]
    scorers = indexers(engine)
    return layers + [layer.compressor for layer in layers] + scorers + [i.compressor for i in scorers]


def frequencies(**config: Callable[[Any], Any]) -> Callable[[Engine, Any], Tensor]:
    """The compressed layers' frequencies under a changed configuration."""

    def value(engine: Engine, owner: Any) -> Tensor:
        changes = {name: change(engine.config) for name, change in config.items()}
        return inverse_frequencies(dataclasses.replace(engine.config, **changes), CSA_RATIO)

    return value


def see(later: int) -> Inject:
    """Compressed entries become visible ``later`` entries later."""

    def visible(a: Arguments) -> Tensor | None:
        return None if a["visible"] is None else a["visible"] - later

    return both(edit(attention, "attend", visible=visible), edit(indexer, "choose_entries", visible=visible))


def weigh_by_latent(engine: Engine, monkeypatch: MonkeyPatch) -> None:
    """The index weights are products of qa instead of u."""
    latents: list[Tensor] = []

    def norm(original: Callable[..., Tensor], *args: Any, **rest: Any) -> Tensor:
        latents.append(original(*args, **rest))
        return latents[-1]

    def queries(
        matrix: Weight, original: Callable[..., Any], q: Tensor, _: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        return original(q, linear(latents[-1], matrix), positions)

    wrap(attention, "rms_norm", norm)(engine, monkeypatch)
    for layer in indexers(engine):
        wrap(layer, "queries", partial(queries, layer.weights_proj))(engine, monkeypatch)


def score_without_relu(_: Any, q: Tensor, keys: Tensor, weights: Tensor, visible: Tensor) -> Tensor:
    return torch.einsum("th,thd,cd->tc", weights, q, keys)


def interleave_heads(a: Arguments, heads: int = 4) -> Tensor:
    """Group g takes the heads g, g + G, ... instead of consecutive ones."""
    tokens, groups, _ = a["x"].shape
    return a["x"].reshape(tokens, heads // groups, groups, -1).transpose(1, 2).reshape(a["x"].shape)


def rotate_halves(original: Callable[..., Tensor], x: Tensor, *args: Any, **rest: Any) -> Tensor:
    """Pairs (i, i + Dr/2) instead of (2i, 2i + 1)."""
    half = args[1].shape[0]
    order = torch.arange(x.shape[-1])
    order[-2 * half :] = order[-2 * half :].view(2, half).T.flatten()
    return original(x[..., order], *args, **rest)[..., order.argsort()]


def attention_ropes(engine: Engine) -> list[Any]:
    """Where the attention layers' rotations are found: of their output, and those that follow a norm."""
    return [attention_reference, rope_reference]


def rotate_only_queries(
    original: Callable[..., Tensor], x: Tensor, weight: Tensor | None, *args: Any, **rest: Any
) -> Tensor:
    """No norm where it has no weight."""
    return rope_reference.apply_rope(x, *args) if weight is None else original(x, weight, *args, **rest)


def swap_series(name: str) -> Callable[[Arguments], Tensor]:
    """Ca and Cb exchanged, the halves of the channels where windows overlap."""
    return lambda a: a[name].roll(a[name].shape[-1] // 2, -1) if a["overlap"] else a[name]


def edit_pooling(**changes: Callable[[Arguments], Any]) -> Inject:
    return edit(pool_reference, "pool_windows", **changes)


def forget(rows: Callable[[Arguments], range]) -> Inject:
    """The tail's ``rows`` are lost between two forward passes."""

    def tail_gate(a: Arguments) -> Tensor:
        return a["tail_gate"].index_fill_(0, torch.tensor(rows(a), dtype=torch.int64), -torch.inf)

    return edit_pooling(tail_gate=tail_gate)


def keep_tails(engine: Engine, monkeypatch: MonkeyPatch) -> None:
    """A new sequence starts with the compressor tails of the one before."""

    def reset(cache: SequenceCache) -> None:
        cache.position = 0

    engine.logits(list(range(2, 25)))
    monkeypatch.setattr(SequenceCache, "reset", reset)


def unnormalised(
    original: Callable[..., tuple[Tensor, Tensor]], logits: Tensor, *args: Any, scale: float, **rest: Any
) -> tuple[Tensor, Tensor]:
    experts = original(logits, *args, scale=scale, **rest)[1]
    return F.softplus(logits).sqrt().gather(-1, experts) * scale, experts


def biased(
    original: Callable[..., tuple[Tensor, Tensor]], logits: Tensor, bias: Tensor, *, scale: float, **rest: Any
) -> tuple[Tensor, Tensor]:
    """The selection bias takes part in the routing weights."""
    experts = original(logits, bias, scale=scale, **rest)[1]
    chosen = (F.softplus(logits).sqrt() + bias).gather(-1, experts)
    return chosen / chosen.sum(-1, keepdim=True) * scale, experts


def rows_first(_: Callable[..., Tensor], logits: Tensor, *, iterations: int, eps: float) -> Tensor:
    c = logits.softmax(-1) + eps
    for axis in [-1, *[-2, -1] * (iterations - 1)]:
        c = c / (c.sum(axis, keepdim=True) + eps)
    return c


def without_eps(original: Callable[..., tuple[Tensor, ...]], x: Tensor, *args: Any, **rest: Any) -> Any:
    u, post, comb = original(x, *args, **rest)
    return u - rest["eps"] * x.sum(1), post, comb


def fold_input_scale(original: Callable[..., Any], weight: Weight) -> tuple[Tensor, Tensor | None]:
    matrix, scale = original(weight)
    return matrix, scale * stored(weight).in_gs if isinstance(stored(weight), Nvfp4) else scale


def share_scale(_: Engine, layer: moe.Moe) -> list[moe.Expert]:
    """w3 gets w1's global scale."""
    experts = layer.experts
    return [e._replace(w3=stored(e.w3)._replace(w_gs=stored(e.w1).w_gs)) for e in experts]
