"""Training steps of the small model: losses, optimiser, CUDA graphs, held-out bits per byte."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dsv4.model import Transformer
from tools.tiny_model import TinyModel

MTP_WEIGHT = 0.3
BALANCE_STEP = 3e-3
EMA_DECAY = 0.999
WEIGHT_DECAY = 0.1
CLIP = 1.0
GRAPH_WARM_UP = 3


def losses(tiny: TinyModel, inputs: Tensor, targets: Tensor, caches: tuple[Any, Any]) -> dict[str, Tensor]:
    """Mean nats of next and drafted tokens, and the indexers' divergence: inputs, targets [T]."""
    cache, draft_cache = caches
    cache.reset()
    draft_cache.reset()
    tiny.trace.clear()
    x = tiny.model.forward(inputs, cache)
    main = F.cross_entropy(tiny.model.logits(x), targets)
    _, drafts = tiny.model.draft(x, targets, draft_cache)
    draft = F.cross_entropy(drafts[:-1], targets[1:])
    divergences = tiny.trace.indexer_kl
    index = torch.stack(divergences).sum() if divergences else main.new_zeros(())
    return {"main": main, "mtp": draft, "index": index}


class Trainer:
    """The optimiser and its step over random crops; ``tokens`` and all state live on the model's device."""

    def __init__(self, tiny: TinyModel, tokens: Tensor, length: int, *, seed: int = 0) -> None:
        self.tiny = tiny
        self.tokens = tokens
        self.length = length
        self.device = tokens.device
        self.step_count = 0
        self.seed = seed
        self.rate = torch.zeros((), device=self.device)
        self.ema_rate = torch.zeros((), device=self.device)
        self.start = torch.zeros((), dtype=torch.int64, device=self.device)
        self.sums = {name: torch.zeros((), device=self.device) for name in ("main", "mtp", "index")}
        self.caches = tiny.model.new_cache(length), tiny.model.new_draft_cache(length)
        self.ema = {name: tensor.clone() for name, tensor in tiny.state().items()}
        self.optimizer = torch.optim.AdamW(
            _groups(tiny), lr=self.rate, betas=(0.9, 0.95), fused=True, capturable=self.device.type == "cuda"
        )
        self._graphs: dict[bool, torch.cuda.CUDAGraph] = {}
        self.use_graphs = self.device.type == "cuda"

    def crop(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets [T]: BOS before ``length`` tokens from ``start`` on."""
        text = self.tokens[self.start + torch.arange(self.length, device=self.device)]
        return F.pad(text[:-1], (1, 0), value=self.tiny.config.bos_id), text

    def _body(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        parts = losses(self.tiny, *self.crop(), self.caches)
        (parts["main"] + MTP_WEIGHT * parts["mtp"] + parts["index"]).backward()
        torch.nn.utils.clip_grad_norm_(list(self.tiny.params.values()), CLIP)
        self.optimizer.step()
        with torch.no_grad():
            self.tiny.balance(BALANCE_STEP)
            self._average()
            for name, part in parts.items():
                self.sums[name] += part.detach()

    def _average(self) -> None:
        values = {name: tensor for name, tensor in self.tiny.state().items() if tensor.is_floating_point()}
        old = [self.ema[name] for name in values]
        change = torch._foreach_sub(list(values.values()), old)
        torch._foreach_mul_(change, self.ema_rate)
        torch._foreach_add_(old, change)

    def step(self, rate: float, *, dense: bool) -> None:
        """One step at learning rate ``rate``; ``dense`` keeps top-k selection off."""
        self._prepare(rate)
        trace = self.tiny.trace
        trace.training, trace.dense = True, dense
        if self.use_graphs and dense not in self._graphs:
            self._capture(dense, rate)
        elif self.use_graphs:
            self._graphs[dense].replay()
        else:
            self._body()
        trace.training = False
        self.step_count += 1

    def _prepare(self, rate: float) -> None:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step_count)
        last = self.tokens.shape[0] - self.length
        self.start.fill_(int(torch.randint(last + 1, (), generator=generator)))
        self.rate.fill_(rate)
        self.ema_rate.fill_(1 - min(EMA_DECAY, (1 + self.step_count) / (10 + self.step_count)))

    def _capture(self, dense: bool, rate: float) -> None:
        """The steps before a capture are real ones; if capturing fails, training goes on without graphs."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(GRAPH_WARM_UP):
                self._prepare(rate)
                self._body()
                self.step_count += 1
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self.step_count -= 1
        self.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._body()
            self._graphs[dense] = graph
        except RuntimeError as error:
            print(f"no CUDA graph, training without: {str(error).splitlines()[0]}", flush=True)
            torch.cuda.synchronize()
            self.use_graphs = False

    def take_sums(self) -> dict[str, float]:
        """The sums of the losses since the last call."""
        found = {name: float(value) for name, value in self.sums.items()}
        for value in self.sums.values():
            value.zero_()
        return found

    def state(self) -> dict[str, Any]:
        return {
            "model": self.tiny.state(),
            "ema": self.ema,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step_count,
        }

    def load(self, state: dict[str, Any]) -> None:
        self.tiny.load(state["model"])
        for name, tensor in self.ema.items():
            tensor.copy_(state["ema"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        self.step_count = state["step"]


def _groups(tiny: TinyModel) -> list[dict[str, Any]]:
    """Matrices decay; norms, hyper-connections, sinks and position biases do not."""
    plain = ("ape", "_fn", "_base", "_scale", "attn_sink", "norm")
    decayed = [param for name, param in tiny.params.items() if not name.endswith(plain)]
    others = [param for name, param in tiny.params.items() if name.endswith(plain)]
    return [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]


@torch.no_grad()
def windows(tokens: Tensor, length: int) -> list[tuple[Tensor, int]]:
    """(window [T], number of its last tokens that count): every token of a text counts once."""
    count = tokens.shape[0]
    assert count >= length, f"{count} held-out tokens, fewer than a window of {length}"
    found = [(tokens[first : first + length], length) for first in range(0, count - length + 1, length)]
    if count % length:
        found.append((tokens[-length:], count % length))
    return found


@torch.no_grad()
def token_nats(model: Transformer, text: Tensor) -> Tensor:
    """Nats of each token of ``text`` [T] after BOS and the tokens before it."""
    inputs = F.pad(text[:-1], (1, 0), value=model.config.bos_id)
    logits = model.logits(model.forward(inputs, model.new_cache(len(text))))
    return F.cross_entropy(logits, text, reduction="none")


def bits_per_byte(
    model: Transformer,
    tokens: Tensor,
    text_bytes: int,
    length: int,
    nats: Callable[[Transformer, Tensor], Tensor] = token_nats,
) -> float:
    """Of a held-out text of ``text_bytes`` bytes, teacher-forced in windows of ``length`` tokens."""
    total = sum(nats(model, text)[-counted:].double().sum() for text, counted in windows(tokens, length))
    return float(total) / math.log(2) / text_bytes


class Evaluator:
    """Held-out bits per byte of the averaged weights, in a CUDA graph where training uses one."""

    def __init__(self, trainer: Trainer, tokens: Tensor, text_bytes: int) -> None:
        self.trainer = trainer
        self.tokens = tokens
        self.text_bytes = text_bytes
        self.text = tokens[: trainer.length].clone()
        self.nats: Tensor | None = None
        self.graph: Any = None

    def _run(self, model: Transformer, text: Tensor) -> Tensor:
        if self.graph is None and self.trainer.use_graphs:
            self._capture(model)
        if self.graph is None or not self.trainer.use_graphs:
            return token_nats(model, text)
        self.text.copy_(text)
        self.graph.replay()
        assert self.nats is not None
        return self.nats

    def _capture(self, model: Transformer) -> None:
        token_nats(model, self.text)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.nats = token_nats(model, self.text)
            self.graph = graph
        except RuntimeError as error:
            print(f"no CUDA graph for the evaluation: {str(error).splitlines()[0]}", flush=True)
            torch.cuda.synchronize()

    def __call__(self) -> float:
        tiny = self.trainer.tiny
        kept = {name: tensor.clone() for name, tensor in tiny.state().items()}
        tiny.load(self.trainer.ema)
        tiny.trace.training = tiny.trace.dense = False
        try:
            return bits_per_byte(tiny.model, self.tokens, self.text_bytes, self.trainer.length, self._run)
        finally:
            tiny.load(kept)
