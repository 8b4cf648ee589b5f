"""tools/train_tiny.py on a CPU: a much smaller model learns, is exported, and continues where it stopped."""

import json
import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tiny_config_dict
from torch import Tensor

from dsv4.config import ModelConfig
from dsv4.engine import load
from dsv4.ops.attention import reference as attention_reference
from dsv4.ops.formats import Plain
from dsv4.ops.moe import reference as moe_reference
from dsv4.ops.quant import reference as quant_reference
from tools import train_tiny
from tools.tiny_model import Stacked, TinyModel, Trace, attend_whole, run_stacked, substitutes
from tools.tiny_steps import Trainer, losses

LENGTH = 96
RAW = tiny_config_dict(
    vocab_size=320,
    q_lora_rank=64,
    o_lora_rank=64,
    sliding_window=16,
    compress_ratios=[0, 4, 16, 4, 0],
    index_topk=8,
    max_position_embeddings=65536,
)
CONFIG = ModelConfig.from_dict(RAW)


def corpus() -> str:
    """Sentences of few words with a fixed grammar."""
    generator = torch.Generator().manual_seed(3)
    who, does, what = ("the cat", "a dog", "my king"), ("sees", "eats", "loves"), ("fish", "gold", "bread")

    def pick(words: tuple[str, ...]) -> str:
        return words[int(torch.randint(len(words), (), generator=generator))]

    return "".join(f"{pick(who)} {pick(does)} {pick(what)}.\n" for _ in range(600))


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("train")
    (folder / "text.txt").write_text(corpus(), encoding="utf-8")
    choices = {"tokens": LENGTH, "vocab": 320, "dropout": 0.1, "evaluate-every": 50}
    choices |= {"rate": 5e-3, "warm-up": 5}
    named = [word for name, value in choices.items() for word in (f"--{name}", str(value))]
    return [str(folder / "text.txt"), "--out-dir", str(folder / "out"), "--device", "cpu", *named]


@pytest.fixture(scope="module")
def run(arguments: list[str]) -> train_tiny.Run:
    return train_tiny.main([*arguments, "--steps", "60"], RAW)


def test_loss_falls_below_the_unigram_entropy(run: train_tiny.Run) -> None:
    counts = Counter(run.train_tokens.tolist())
    total = sum(counts.values())
    entropy = -sum(n / total * math.log(n / total) for n in counts.values())
    assert run.rows[-1]["loss"] < entropy, (run.rows, entropy)
    with (run.out / "loss.csv").open() as file:
        assert len(file.readlines()) == 1 + len(run.rows)


def test_export_gives_the_trained_logits(run: train_tiny.Run) -> None:
    stated = json.loads((run.out / "tiny" / "config.json").read_text())
    assert "synthetic" not in stated and (run.out / "tiny" / "README.md").is_file()
    ids = run.held_tokens[:LENGTH].tolist()
    with substitutes(run.tiny.trace), torch.no_grad():
        own = run.tiny.model.logits(
            run.tiny.model.forward(run.held_tokens[:LENGTH], run.tiny.model.new_cache(LENGTH))
        )
    for folder, tolerance in (("bf16", 0.05), ("tiny", 0.35)):
        engine = load(run.out / folder, mtp=True)
        found = engine.logits(ids)
        assert (found - own).norm() < tolerance * own.norm(), folder
        assert engine.draft_logits(ids).shape == (LENGTH - 1, RAW["vocab_size"])
        assert engine.tokenizer is not None
        assert engine.tokenizer.decode(engine.tokenizer.encode("the cat eats\n")) == "the cat eats\n"
        assert (engine.tokenizer.bos_id, engine.tokenizer.eos_id) == (0, 1)


def test_routed_experts_share_scales_and_have_calibrated_inputs(run: train_tiny.Run) -> None:
    moe = load(run.out / "tiny").model.blocks[1].ffn
    for expert in moe.experts:
        w1, w2, w3 = (getattr(w, "weight", w) for w in expert)
        assert w1.in_gs == w3.in_gs and w1.w_gs == w3.w_gs
        assert 0 < w2.in_gs < 1 and 0 < w1.in_gs < 1


def test_resume_continues(run: train_tiny.Run, arguments: list[str]) -> None:
    again = train_tiny.main([*arguments, "--steps", "62", "--resume"], RAW)
    assert again.trainer.step_count == 62
    assert again.rows[: len(run.rows)] == run.rows
    assert again.tokenizer == run.tokenizer
    assert again.rows[-1]["loss"] < run.rows[0]["loss"]


def test_every_parameter_gets_a_gradient() -> None:
    tiny = TinyModel(CONFIG, torch.device("cpu"))
    tokens = torch.randint(3, CONFIG.vocab_size, (LENGTH,), generator=torch.Generator().manual_seed(0))
    caches = tiny.model.new_cache(LENGTH), tiny.model.new_draft_cache(LENGTH)
    with substitutes(tiny.trace):
        parts = losses(tiny, tokens, tokens.roll(-1), caches)
    sum(parts.values()).backward()
    missing = [
        name for name, param in tiny.params.items() if param.grad is None or not bool(param.grad.any())
    ]
    assert not missing


def test_index_divergence_reaches_only_the_indexers() -> None:
    tiny = TinyModel(CONFIG, torch.device("cpu"))
    tokens = torch.arange(3, 3 + LENGTH)
    caches = tiny.model.new_cache(LENGTH), tiny.model.new_draft_cache(LENGTH)
    with substitutes(tiny.trace):
        losses(tiny, tokens, tokens, caches)["index"].backward()
    reached = {name for name, param in tiny.params.items() if param.grad is not None and param.grad.any()}
    assert reached == {name for name in tiny.params if ".indexer." in name}


def test_stacked_experts_equal_the_reference(normal: Callable[..., Tensor]) -> None:
    w1, w2, w3 = 3 * normal(4, 24, 16), normal(4, 16, 24), 3 * normal(4, 24, 16)
    experts = [moe_reference.Expert(*map(Plain, parts)) for parts in zip(w1, w2, w3, strict=True)]
    x, routing = normal(10, 16), normal(10, 2).abs()
    chosen = torch.stack((torch.arange(10) % 3, torch.full((10,), 3)), dim=1)  # expert 3 is always second
    stack = Stacked(w1, w2, w3, Trace())
    found = run_stacked(x, routing, chosen, stack, experts[0], limit=2.0)
    expected = moe_reference.run_experts(x, routing, chosen, experts, experts[0], limit=2.0)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-4)
    assert stack.load.tolist() == [4, 3, 3, 10]


@pytest.mark.parametrize("kind", ["window", "all", "selected"])
def test_whole_attention_equals_the_reference(normal: Callable[..., Tensor], kind: str) -> None:
    q, kv, sink = normal(48, 4, 32), normal(48, 32), normal(4)
    entries: dict[str, Any] = {}
    if kind != "window":
        visible = torch.arange(1, 49) // 4
        entries = {"compressed": normal(12, 32), "visible": visible}
    if kind == "selected":
        picks = torch.arange(4).expand(48, 4) * 2
        entries["selected"] = picks.masked_fill(picks >= visible[:, None], -1)
    inputs = (q, kv, sink, torch.arange(48), torch.tensor([1.0, 0.3]))
    want = attention_reference.attend(*inputs, window=16, **entries)
    found = attend_whole(Trace(), *inputs, window=16, **entries)
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-4)


def test_roundings_pass_gradients(normal: Callable[..., Tensor]) -> None:
    for rounding in (partial(quant_reference.round_kv, rope_dim=16), quant_reference.round_fp8):
        x = normal(3, 144).requires_grad_()
        rounding(x).sum().backward()
        assert torch.equal(rounding(x).detach(), rounding(x.detach())) and bool((x.grad == 1).all())
    x, weight = normal(3, 64).requires_grad_(), normal(3, 64)
    (quant_reference.round_index(x) * weight).sum().backward()
    torch.testing.assert_close(x.grad, quant_reference.rotate_hadamard(weight))


def test_selection_bias_moves_against_the_load() -> None:
    tiny = TinyModel(CONFIG, torch.device("cpu"))
    trainer = Trainer(tiny, torch.randint(3, 300, (500,)), LENGTH)
    with substitutes(tiny.trace):
        trainer.step(1e-3, dense=True)
    for prefix, stack in tiny.stacks.items():
        bias = tiny.buffers.get(prefix.replace("experts.", "gate.bias"))
        if bias is not None:
            assert torch.equal(bias.sign(), (stack.load.mean() - stack.load).sign())
            assert stack.load.sum() == LENGTH * CONFIG.experts_per_token


def test_a_missing_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        train_tiny.main([str(tmp_path / "none.txt"), "--out-dir", str(tmp_path / "out")], RAW)
