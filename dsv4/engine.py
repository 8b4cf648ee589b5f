"""One sequence at a time: load, prefill, decode, generate. Owns the model and the sequence's cache."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dsv4 import _C
from dsv4.config import CSA_RATIO, ModelConfig
from dsv4.device import resolve_device
from dsv4.loading.assemble import assemble
from dsv4.loading.checkpoint import Checkpoint
from dsv4.model import Transformer
from dsv4.numerics import Numerics
from dsv4.ops.dispatch import expand_rooms, use_reference
from dsv4.ops.formats import INDEX_CODES, KV_CODES, KV_ROPE
from dsv4.ops.sampling import sample_token
from dsv4.plan import CACHE_DEQUANTISED_MB, make_plan
from dsv4.progress import Progress
from dsv4.sampling import Sampling
from dsv4.tokenizer import TextStream, Tokenizer

PREFILL_CHUNK = 512
DEFAULT_MAX_CONTEXT = 8192


@dataclass
class Timings:
    """Seconds; the rates are tokens a second over the phase that made them."""

    load_s: float = 0.0
    prefill_s: float = 0.0
    ttft_s: float = 0.0
    decode_s: float = 0.0
    prompt_tokens: int = 0
    new_tokens: int = 0

    @property
    def prefill_tps(self) -> float:
        return self.prompt_tokens / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tps(self) -> float:
        """The first token comes out of prefill; decoding makes the rest."""
        return (self.new_tokens - 1) / self.decode_s if self.decode_s and self.new_tokens > 1 else 0.0

    def as_dict(self) -> dict[str, float]:
        names = ("load_s", "prefill_s", "ttft_s", "decode_s", "prefill_tps", "decode_tps")
        return {name: getattr(self, name) for name in names}


class Engine:
    """A loaded model and the state of the one sequence it works on.

    Every call starts a fresh sequence; calls that need the model while a generation runs raise
    ``RuntimeError``.
    """

    def __init__(
        self,
        model: Transformer,
        numerics: Numerics,
        tokenizer: Tokenizer | None,
        *,
        max_context: int,
        reference: Sequence[str] = (),
        load_s: float = 0.0,
    ) -> None:
        self.model = model
        self.config = model.config
        self.numerics = numerics
        self.tokenizer = tokenizer
        self.max_context = max_context
        self.reference = tuple(sorted(expand_rooms(reference)))
        self.load_s = load_s
        self.cache = model.new_cache(max_context)
        self._busy = False

    @property
    def device(self) -> torch.device:
        return self.model.device

    def describe(self) -> dict[str, object]:
        """The choices this engine was loaded with, for reports."""
        return {
            **dataclasses.asdict(self.numerics),
            "device": self.device.type,
            "reference": list(self.reference),
        }

    def logits(self, token_ids: Sequence[int], chunk: int | None = None) -> Tensor:
        """Teacher-forced logits of a fresh sequence, CPU f32 [T, V]: row t predicts token t + 1.

        ``chunk``: tokens a forward pass; None takes all in one prefill, 1 goes through decode. Raises
        ``ValueError`` for ids that are empty, outside the vocabulary, or longer than the context.
        """
        ids = self._check_ids(token_ids)
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk: expected at least 1 token, found {chunk}")
        with self._exclusive(), self._running():
            self.cache.reset()
            pieces = ids.split(chunk or len(token_ids))
            return torch.cat(
                [self.model.logits(self.model.forward(part, self.cache)).cpu() for part in pieces]
            )

    def draft_logits(self, token_ids: Sequence[int]) -> Tensor:
        """What the MTP block drafts, CPU f32 [T - 1, V]: row t, from the streams at t and token t + 1,
        predicts token t + 2. Needs ``load(..., mtp=True)`` and at least 2 ids; otherwise ``ValueError``.
        """
        ids = self._check_ids(token_ids)
        if self.model.mtp is None:
            raise ValueError("draft_logits: expected a model loaded with mtp=True, found one without")
        if len(token_ids) < 2:
            raise ValueError("draft_logits: expected at least 2 token ids, found 1")
        with self._exclusive(), self._running():
            self.cache.reset()
            streams = self.model.forward(ids[:-1], self.cache)
            _, logits = self.model.draft(streams, ids[1:], self.model.new_draft_cache(len(token_ids)))
            return logits.cpu()

    def generate(
        self,
        token_ids: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        *,
        progress: Progress | None = None,
    ) -> "Generation":
        """Continue token_ids: an iterator of new ids, ended by eos, a stop string or the length.

        Defaults to greedy. The end-of-sequence id is not yielded. Generation also ends with "length" when
        the context is full. Raises ``ValueError`` for bad ids or a prompt that fills the context.
        """
        ids = self._check_ids(token_ids)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected at least 1, found {max_new_tokens}")
        sampling = sampling or Sampling()
        if self.model.screened is not None and sampling.temperature:
            raise ValueError(
                f"screen_head: expected greedy sampling (temperature 0), found {sampling.temperature}"
            )
        if sampling.stop and self.tokenizer is None:
            raise ValueError("stop: expected a checkpoint with tokenizer.json to find stop strings with")
        return Generation(self, ids, max_new_tokens, sampling, progress)

    def prefill(self, ids: Tensor, progress: Progress | None = None) -> Tensor:
        """Start a fresh sequence with ids [S]; logits [V] f32 of the token after it."""
        self.cache.reset()
        for part in ids.split(PREFILL_CHUNK):
            with self._running():
                streams = self.model.forward(part, self.cache)
            if progress is not None:
                progress(self.cache.position, ids.shape[0])
        with self._running():
            return self.model.logits(streams[-1:])[0]

    def decode_one(self, token_id: int) -> Tensor:
        """Append one token to the sequence; logits [V] f32 of the token after it."""
        with self._running():
            ids = torch.tensor([token_id], device=self.device)
            return self.model.logits(self.model.forward(ids, self.cache))[0]

    def decode_greedy(self, token_id: int) -> int:
        """Append one token; the id of the largest logit after it, from the screened head."""
        with self._running():
            ids = torch.tensor([token_id], device=self.device)
            token = int(self.model.greedy(self.model.forward(ids, self.cache)))
        assert token >= 0, f"position {self.cache.position}: the largest logit is not finite"
        return token

    def _check_ids(self, token_ids: Sequence[int]) -> Tensor:
        if len(token_ids) == 0:
            raise ValueError("the prompt is empty: expected at least one token id, found none")
        for position, token in enumerate(token_ids):
            if not 0 <= token < self.config.vocab_size:
                raise ValueError(
                    f"token id at position {position}: expected 0 to {self.config.vocab_size - 1} "
                    f"(vocab_size {self.config.vocab_size}), found {token}"
                )
        if len(token_ids) > self.max_context:
            raise ValueError(
                f"the prompt is too long: expected at most max_context = {self.max_context} tokens, "
                f"found {len(token_ids)}"
            )
        return torch.tensor(token_ids, dtype=torch.int64, device=self.device)

    @contextmanager
    def _running(self) -> Iterator[None]:
        with torch.inference_mode(), use_reference(*self.reference):
            yield

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        self._acquire()
        try:
            yield
        finally:
            self._busy = False

    def _acquire(self) -> None:
        if self._busy:
            raise RuntimeError("a generation is still running on this engine; finish or close() it first")
        self._busy = True


class Generation:
    """The iterator that ``Engine.generate`` returns.

    ``finish`` is None while it runs, then "eos", "length", "stop", or "interrupt" if it was closed early;
    ``ids`` the new ids so far; ``timings`` the seconds. The engine is held from the first ``next`` on.
    """

    def __init__(
        self, engine: Engine, ids: Tensor, max_new_tokens: int, sampling: Sampling, progress: Progress | None
    ) -> None:
        self.ids: list[int] = []
        self.finish: str | None = None
        self.timings = Timings(load_s=engine.load_s, prompt_tokens=ids.shape[0])
        self._stream = TextStream(engine.tokenizer, sampling.stop) if engine.tokenizer else None
        self._text = ""
        self._steps = self._run(engine, ids, max_new_tokens, sampling, progress)

    def __iter__(self) -> "Generation":
        return self

    def __next__(self) -> int:
        return next(self._steps)

    def close(self) -> None:
        """End the generation and release the engine."""
        self._steps.close()
        self.finish = self.finish or "interrupt"

    def take_text(self) -> str:
        """The text that became certain since the last call: whole characters, nothing of a stop string.

        Empty without a tokenizer.
        """
        text, self._text = self._text, ""
        return text

    def _run(
        self, engine: Engine, ids: Tensor, max_new_tokens: int, sampling: Sampling, progress: Progress | None
    ) -> Iterator[int]:
        with engine._exclusive():
            started = time.perf_counter()
            token = self._sample(engine.prefill(ids, progress), sampling, ids.shape[0])
            limit = min(max_new_tokens, engine.max_context - ids.shape[0] + 1)
            while True:
                now = time.perf_counter() - started
                if not self.ids:
                    self.timings.prefill_s = self.timings.ttft_s = now
                self.timings.decode_s = now - self.timings.prefill_s
                if token in engine.config.eos_ids:
                    break
                self.ids.append(token)
                self.timings.new_tokens = len(self.ids)
                self._push(token)
                if self._stream is not None and self._stream.stopped:
                    self.finish = "stop"
                elif len(self.ids) == limit:
                    self.finish = "length"
                if self.finish is not None:
                    self._flush()
                yield token
                if self.finish is not None:
                    return
                if engine.model.screened is None:
                    token = self._sample(engine.decode_one(token), sampling, ids.shape[0] + len(self.ids))
                else:
                    token = engine.decode_greedy(token)
            self.finish = "eos"
            self._flush()

    @staticmethod
    def _sample(logits: Tensor, sampling: Sampling, position: int) -> int:
        token = int(
            sample_token(
                logits,
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                min_p=sampling.min_p,
                seed=sampling.seed,
                position=position,
            )
        )
        assert token >= 0, f"position {position}: the largest logit is not finite"
        return token

    def _push(self, token: int) -> None:
        if self._stream is not None:
            self._text += self._stream.push(token)

    def _flush(self) -> None:
        if self._stream is not None:
            self._text += self._stream.finish()


def load(
    ckpt: str | Path,
    *,
    device: str = "cpu",
    weights: str = "stored",
    activations: str = "bf16",
    numerics: str = "trained",
    dtype: str | None = None,
    max_context: int = DEFAULT_MAX_CONTEXT,
    reference: Sequence[str] = (),
    mtp: bool = False,
    screen_head: bool = False,
    cache_dequantised_mb: int = CACHE_DEQUANTISED_MB,
    progress: Progress | None = None,
) -> Engine:
    """Load a DeepSeek-V4 checkpoint folder.

    device "auto" | "cpu" | "cuda"; weights "stored" | "nvfp4" | "nvfp4-all"; activations "bf16" | "fp8" |
    "nvfp4"; numerics "trained" | "exact"; dtype "bfloat16" | "float32" of the activations (None: float32 on
    CPU, bfloat16 on CUDA); max_context in tokens; reference: rooms to run on their references; mtp: load the
    MTP block for ``draft_logits``; screen_head: generate greedily only, on CUDA, from an int8 copy of a bf16
    head. Everything is checked before any weight is read. Raises ``FileNotFoundError`` or ``ValueError`` with
    a sentence that names what is wrong.
    """
    started = time.perf_counter()
    place = resolve_device(device)
    choices = Numerics(weights, activations, numerics, dtype or default_dtype(place))
    config = ModelConfig.from_checkpoint(ckpt)
    if choices.trained:
        _require_index_blocks(config)
    on_references = expand_rooms(reference)
    if place.type == "cuda" and on_references != expand_rooms(["all"]):
        _require_kernel_shapes(config)
        _C.load_library()  # built here if need be, before anything is read
    checkpoint = Checkpoint.open(ckpt, config, mtp=mtp)
    plan = make_plan(checkpoint, choices, place, max_context, cache_dequantised_mb, screen_head)
    plan.require_fit()
    has_tokenizer = (Path(ckpt) / "tokenizer.json").exists()
    tokenizer = Tokenizer.from_checkpoint(ckpt) if has_tokenizer else None
    model = assemble(checkpoint, choices, place, cache_dequantised_mb=cache_dequantised_mb, progress=progress)
    if screen_head:
        model.screen_head()
    return Engine(
        model,
        choices,
        tokenizer,
        max_context=max_context,
        reference=reference,
        load_s=time.perf_counter() - started,
    )


def default_dtype(device: torch.device) -> str:
    """The dtype of activations where the user names none."""
    return "float32" if device.type == "cpu" else "bfloat16"


def _require_index_blocks(config: ModelConfig) -> None:
    """The indexer's Hadamard rotation and FP4 blocks of 32 fit powers of two only (docs/model.md 2.13)."""
    width = config.index_head_dim
    if CSA_RATIO in config.compress_ratios and (width < 32 or width & (width - 1)):
        raise ValueError(
            f"index_head_dim: expected a power of two of at least 32 for numerics 'trained', found {width}"
        )


def _require_kernel_shapes(config: ModelConfig) -> None:
    """The sizes that the CUDA kernels take; everything else about shapes is an argument of theirs."""
    index_width, has_indexer = config.index_head_dim, CSA_RATIO in config.compress_ratios
    hidden = config.hidden_size
    rules = (
        ("hc_mult", config.num_streams, lambda n: n == 4, "4"),
        ("hidden_size", hidden, lambda n: n % 256 == 0 and n <= 8192, "a multiple of 256 up to 8192"),
        ("moe_intermediate_size", config.expert_width, lambda n: n % 256 == 0, "a multiple of 256"),
        ("n_routed_experts", config.num_experts, lambda n: n <= 512, "at most 512"),
        ("o_groups", config.o_groups, lambda n: n <= 16, "at most 16"),
        ("head_dim", config.head_dim, lambda n: n == KV_CODES + KV_ROPE, "512"),
        ("qk_rope_head_dim", config.rope_dim, lambda n: n == KV_ROPE, "64"),
        ("index_head_dim", index_width, lambda n: not has_indexer or n == INDEX_CODES, "128"),
    )
    for name, found, holds, expected in rules:
        if not holds(found):
            raise ValueError(
                f"config.json: {name}: expected {expected} for the CUDA kernels, found {found}; "
                "use --device cpu or --reference all"
            )
