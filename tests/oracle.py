"""Independent token-by-token decoder for DeepSeek-V4, used as the reference of the tests.

Plain float32 torch on the CPU, written from the model specification alone and sharing no code with
the package under test. Histories are plain growing lists: no ring buffers, no compressor tails.
"""

import itertools
import math
from collections import defaultdict
from typing import Any, NamedTuple

import torch
from torch import Tensor

CSA_RATIO = 4


class Format(NamedTuple):
    """A small float format with a power-of-two scale per block of consecutive values."""

    top: float  # largest finite value
    mantissa: int  # explicit mantissa bits
    min_exponent: int  # exponent of the smallest normal binade
    floor: float  # lower bound of a block's amax


FP8 = Format(448.0, 3, -6, 1e-4)  # e4m3
FP4 = Format(6.0, 1, 0, 6.0 * 2.0**-126)  # e2m1


def round_blocks(x: Tensor, block: int, fmt: Format) -> tuple[Tensor, float]:
    """Round the last axis of x block by block to fmt and back; a last partial block is allowed.

    Returns with it the smallest distance in steps to another rounding or another block scale.
    """
    blocks = torch.nn.functional.pad(x, (0, -x.shape[-1] % block)).unflatten(-1, (-1, block))
    amax = blocks.abs().amax(-1, keepdim=True).clamp(min=fmt.floor)
    fraction, exponent = torch.frexp(amax / fmt.top)  # scale = 2 ** ceil(log2(amax / top))
    scale = torch.ldexp(torch.ones_like(amax), exponent - (fraction == 0.5).int())
    y = (blocks / scale).clamp(-fmt.top, fmt.top)
    binade = (torch.frexp(y).exponent - 1).clamp(min=fmt.min_exponent)
    step = torch.ldexp(torch.ones_like(y), binade - fmt.mantissa)
    rounded = (torch.round(y / step) * step * scale).flatten(-2)[..., : x.shape[-1]]  # ties to even
    peak, spacing = amax / scale, 2.0 ** (math.floor(math.log2(fmt.top)) - fmt.mantissa)
    # A block's maximum lies in (top/2, top] of its scale; past either end the scale changes.
    ends = torch.minimum(fmt.top - peak, 2 * peak - fmt.top).abs() / spacing
    ends = torch.where(amax > fmt.floor, ends, 0.5)  # no change of scale at the floor
    nearest = torch.minimum(((y / step).abs().frac() - 0.5).abs().min(), ends.min())
    return rounded, float(nearest)


def hadamard(size: int) -> Tensor:
    """The orthonormal Walsh-Hadamard matrix in Sylvester order (size a power of two)."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix * size**-0.5


def rope_frequencies(dims: int, base: float, scaling: dict[str, Any] | None) -> Tensor:
    """Angular frequency of each rotated pair in float64, with YaRN when scaling is given."""
    freqs = base ** (-torch.arange(0, dims, 2, dtype=torch.float64) / dims)
    if not scaling:
        return freqs
    if scaling["type"] != "yarn":
        raise ValueError(f"unknown rope scaling {scaling['type']!r}")
    original = scaling["original_max_position_embeddings"]

    def correction(rotations: float) -> float:
        return dims * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(correction(scaling["beta_fast"])), 0)
    high = min(math.ceil(correction(scaling["beta_slow"])), dims - 1)
    ramp = (torch.arange(dims // 2, dtype=torch.float64) - low) / (high - low or 0.001)
    ramp = ramp.clamp(0, 1)
    return freqs / scaling["factor"] * ramp + freqs * (1 - ramp)


def rope(x: Tensor, position: int, freqs: Tensor) -> Tensor:
    """Rotate the interleaved pairs of the last 2*len(freqs) dims; position < 0 rotates back."""
    angle = position * freqs
    cos, sin = angle.cos().float(), angle.sin().float()
    plain, rotated = x.split([x.shape[-1] - 2 * len(freqs), 2 * len(freqs)], -1)
    a, b = rotated[..., 0::2], rotated[..., 1::2]
    pairs = torch.stack([a * cos - b * sin, a * sin + b * cos], -1)
    return torch.cat([plain, pairs.flatten(-2)], -1)


class Oracle:
    """DeepSeek-V4 decoded one token at a time.

    config is the parsed config.json in DeepSeek field names and weights the dequantised tensors
    under their names on disk. numerics="trained" adds the roundings of the KV cache and of the
    indexer that the model was trained with; activations="fp8" rounds the input of every linear
    named in quantized (names without ".weight"; the grouped wo_a never rounds its input).

    flips holds, after a call, the smallest margin of each position and site over all layers. Sites
    "window", "compressed", "index_q" and "index_k" (trained numerics) and "activation" (inputs of
    quantised linears) are roundings, at most half a quantisation step; "indexer" and "router" are
    top-k choices (gap between the last chosen and the first rejected score over the largest
    magnitude; absent where nothing is rejected). Index queries exist only where there is a choice.
    """

    def __init__(
        self,
        config: dict[str, Any],
        weights: dict[str, Tensor],
        *,
        numerics: str = "exact",
        activations: str = "bf16",
        quantized: frozenset[str] = frozenset(),
    ) -> None:
        if numerics not in ("exact", "trained") or activations not in ("bf16", "fp8"):
            raise ValueError(f"unknown numerics {numerics!r} or activations {activations!r}")
        self.config, self.trained = config, numerics == "trained"
        self.weights = {k: v.float() if v.is_floating_point() else v for k, v in weights.items()}
        self.quantized = quantized if activations == "fp8" else frozenset()
        dims, scaling = config["qk_rope_head_dim"], config.get("rope_scaling")
        self._window_freqs = rope_frequencies(dims, config["rope_theta"], None)
        self._compress_freqs = rope_frequencies(dims, config["compress_rope_theta"], scaling)
        self._hadamard = hadamard(config["index_head_dim"]) if self.trained else torch.empty(0)
        self._reset()

    @property
    def flips(self) -> list[tuple[int, str, float]]:
        """The closest decisions of the last call, by position."""
        return [(t, site, value) for (t, site), value in sorted(self._margins.items())]

    @torch.no_grad()
    def logits(self, ids: list[int]) -> Tensor:
        """Logits [T, V] of a fresh sequence; row t follows token t."""
        self._reset()
        return torch.stack([self._head("", self._trunk(tok, t)) for t, tok in enumerate(ids)])

    @torch.no_grad()
    def draft_logits(self, ids: list[int]) -> Tensor:
        """MTP logits [T-1, V]: row t takes the streams at t and token t+1, at position t."""
        self._reset()
        rows = []
        for t, (token, following) in enumerate(itertools.pairwise(ids)):
            x = self._rms(self._trunk(token, t), "mtp.0.hnorm")
            e = self._rms(self.weights["embed.weight"][following], "mtp.0.enorm")
            x = self._linear(e, "mtp.0.e_proj") + self._linear(x, "mtp.0.h_proj")
            rows.append(self._head("mtp.0.", self._block("mtp.0.", x, t, 0, None)))
        return torch.stack(rows)

    def _reset(self) -> None:
        """Start a fresh sequence: drop every history and every recorded margin."""
        self._t = 0
        self._history: dict[str, list[Tensor]] = defaultdict(list)
        self._margins: dict[tuple[int, str], float] = {}

    def _note(self, t: int, site: str, value: float) -> None:
        self._margins[t, site] = min(value, self._margins.get((t, site), math.inf))

    def _simulate(self, x: Tensor, block: int, fmt: Format, t: int, site: str) -> Tensor:
        """Round x to fmt and note how close the nearest decision was."""
        rounded, nearest = round_blocks(x, block, fmt)
        self._note(t, site, nearest)
        return rounded

    def _top(self, scores: Tensor, k: int, t: int, site: str) -> Tensor:
        """Indices of the k largest scores; the lowest index wins a tie."""
        ranked, order = torch.sort(scores, descending=True, stable=True)
        if k < len(scores):
            largest = float(scores.abs().max())
            self._note(t, site, float(ranked[k - 1] - ranked[k]) / largest if largest else 0.0)
        return order[:k]

    def _linear(self, x: Tensor, name: str) -> Tensor:
        if name in self.quantized:
            x = self._simulate(x, 128, FP8, self._t, "activation")
        return x @ self.weights[name + ".weight"].T

    def _rms(self, x: Tensor, name: str | None = None) -> Tensor:
        """RMS normalisation over the last axis, unweighted without a name."""
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config["rms_norm_eps"])
        return x if name is None else x * self.weights[name + ".weight"]

    def _trunk(self, token: int, t: int) -> Tensor:
        """The residual streams after the last trunk layer for one more token."""
        self._t = t
        x = self.weights["embed.weight"][token].repeat(self.config["hc_mult"], 1)
        for i in range(self.config["num_hidden_layers"]):
            routed_by = token if i < self.config["num_hash_layers"] else None
            x = self._block(f"layers.{i}.", x, t, self.config["compress_ratios"][i], routed_by)
        return x

    def _head(self, prefix: str, x: Tensor) -> Tensor:
        """Collapse the streams and project to the vocabulary (the head itself is shared)."""
        mix = self.weights[prefix + "hc_head_fn"] @ self._rms(x.flatten())
        mix = mix * self.weights[prefix + "hc_head_scale"] + self.weights[prefix + "hc_head_base"]
        z = (mix.sigmoid() + self.config["hc_eps"]) @ x
        return self._linear(self._rms(z, prefix + "norm"), "head")

    def _block(self, prefix: str, x: Tensor, t: int, ratio: int, routed_by: int | None) -> Tensor:
        """One layer on the streams x; routed_by is the token id in hash-routed layers."""
        post, comb, u = self._hc_pre(prefix + "hc_attn_", x)
        y = self._attention(prefix + "attn.", self._rms(u, prefix + "attn_norm"), t, ratio)
        x = post[:, None] * y + comb.T @ x  # comb: row = source stream, column = destination
        post, comb, u = self._hc_pre(prefix + "hc_ffn_", x)
        y = self._moe(prefix + "ffn.", self._rms(u, prefix + "ffn_norm"), t, routed_by)
        return post[:, None] * y + comb.T @ x

    def _hc_pre(self, prefix: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Hyper-connection weights (post, comb) and the sublayer input u."""
        n, eps = self.config["hc_mult"], self.config["hc_eps"]
        mix = self.weights[prefix + "fn"] @ self._rms(x.flatten())
        scale, base = self.weights[prefix + "scale"], self.weights[prefix + "base"]
        pre = (mix[:n] * scale[0] + base[:n]).sigmoid() + eps
        post = 2 * (mix[n : 2 * n] * scale[1] + base[n : 2 * n]).sigmoid()
        comb = (mix[2 * n :] * scale[2] + base[2 * n :]).view(n, n).softmax(1) + eps
        comb = comb / (comb.sum(0) + eps)
        for _ in range(self.config["hc_sinkhorn_iters"] - 1):
            comb = comb / (comb.sum(1, keepdim=True) + eps)
            comb = comb / (comb.sum(0) + eps)
        return post, comb, pre @ x

    def _round_kv(self, kv: Tensor, t: int, site: str) -> Tensor:
        """Training-time rounding of a KV entry; the rotated dims stay as they are."""
        if not self.trained:
            return kv
        plain, rotated = kv.tensor_split([len(kv) - self.config["qk_rope_head_dim"]])
        return torch.cat([self._simulate(plain, 64, FP8, t, site), rotated])

    def _round_index(self, x: Tensor, t: int, site: str) -> Tensor:
        """Training-time Hadamard rotation and rounding of indexer queries and keys."""
        return self._simulate(x @ self._hadamard, 32, FP4, t, site) if self.trained else x

    def _attention(self, prefix: str, u: Tensor, t: int, ratio: int) -> Tensor:
        cfg, heads, dim = self.config, self.config["num_attention_heads"], self.config["head_dim"]
        freqs = self._compress_freqs if ratio else self._window_freqs
        qa = self._rms(self._linear(u, prefix + "wq_a"), prefix + "q_norm")
        q = rope(self._rms(self._linear(qa, prefix + "wq_b").view(heads, dim)), t, freqs)
        kv = rope(self._rms(self._linear(u, prefix + "wkv"), prefix + "kv_norm"), t, freqs)
        self._history[prefix + "window"].append(self._round_kv(kv, t, "window"))
        keys = torch.stack(self._history[prefix + "window"][-cfg["sliding_window"] :])
        if ratio:  # an entry is visible from the token on that completes it
            compressed = self._history[prefix + "compressed"]
            if (entry := self._compress(prefix + "compressor.", u, t, ratio)) is not None:
                compressed.append(self._round_kv(entry, t, "compressed"))
            csa = ratio == CSA_RATIO
            chosen = self._index(prefix + "indexer.", u, qa, t) if csa else slice(None)
            if compressed:
                keys = torch.cat([keys, torch.stack(compressed)[chosen]])
        scores = q @ keys.T * dim**-0.5
        sink = self.weights[prefix + "attn_sink"][:, None]
        p = torch.cat([scores, sink], 1).softmax(1)[:, :-1]  # the sink has no value vector
        o = rope(p @ keys, -t, freqs).reshape(cfg["o_groups"], -1)
        wo_a = self.weights[prefix + "wo_a.weight"].view(cfg["o_groups"], cfg["o_lora_rank"], -1)
        return self._linear(torch.einsum("gri,gi->gr", wo_a, o).flatten(), prefix + "wo_b")

    def _compress(self, prefix: str, u: Tensor, t: int, ratio: int) -> Tensor | None:
        """Take token t in; return the entry it completes (after norm and RoPE), if any."""
        kvs, gates = self._history[prefix + "kv"], self._history[prefix + "gate"]
        kvs.append(self._linear(u, prefix + "wkv"))
        gates.append(self._linear(u, prefix + "wgate") + self.weights[prefix + "ape"][t % ratio])
        if (t + 1) % ratio:
            return None
        width = len(self.weights[prefix + "norm.weight"])
        span = 2 * ratio if ratio == CSA_RATIO else ratio
        kv, gate = torch.stack(kvs[-span:]), torch.stack(gates[-span:])
        if ratio == CSA_RATIO:  # previous tokens (none at first) by half one, current by half two
            kv, gate = (torch.cat([x[:-ratio, :width], x[-ratio:, width:]]) for x in (kv, gate))
        pooled = (gate.softmax(0) * kv).sum(0)
        return rope(self._rms(pooled, prefix + "norm"), t + 1 - ratio, self._compress_freqs)

    def _index(self, prefix: str, u: Tensor, qa: Tensor, t: int) -> Tensor | slice:
        """Compressed entries that token t attends to, as an index into the list of them."""
        cfg, heads, dim = self.config, self.config["index_n_heads"], self.config["index_head_dim"]
        keys = self._history[prefix + "keys"]
        if (key := self._compress(prefix + "compressor.", u, t, CSA_RATIO)) is not None:
            keys.append(self._round_index(key, t, "index_k"))
        if len(keys) <= cfg["index_topk"]:
            return slice(None)
        q = rope(self._linear(qa, prefix + "wq_b").view(heads, dim), t, self._compress_freqs)
        q = self._round_index(q, t, "index_q")
        weights = self._linear(u, prefix + "weights_proj") * (dim**-0.5 * heads**-0.5)
        scores = weights @ (q @ torch.stack(keys).T).relu()
        return self._top(scores, cfg["index_topk"], t, "indexer")

    def _moe(self, prefix: str, x: Tensor, t: int, routed_by: int | None) -> Tensor:
        """Experts scored by sqrt(softplus); the bias takes part in the selection only."""
        scores = torch.logaddexp(self._linear(x, prefix + "gate"), torch.zeros(())).sqrt()
        if routed_by is None:
            biased = scores + self.weights[prefix + "gate.bias"]
            chosen = self._top(biased, self.config["num_experts_per_tok"], t, "router")
        else:
            chosen = self.weights[prefix + "gate.tid2eid"][routed_by]
        weights = scores[chosen] / scores[chosen].sum() * self.config["routed_scaling_factor"]
        y = self._expert(prefix + "shared_experts.", x)
        for expert, weight in zip(chosen.tolist(), weights, strict=True):
            y = y + self._expert(f"{prefix}experts.{expert}.", x, weight)
        return y

    def _expert(self, prefix: str, x: Tensor, weight: Tensor | float = 1.0) -> Tensor:
        limit = self.config["swiglu_limit"]
        gate = self._linear(x, prefix + "w1").clamp(max=limit)
        up = self._linear(x, prefix + "w3").clamp(-limit, limit)
        return self._linear(torch.nn.functional.silu(gate) * up * weight, prefix + "w2")
