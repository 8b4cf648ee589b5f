"""The trained checkpoint models/tiny: pinned greedy text, its quality, and the demonstration."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from driver import run

import dsv4
from tools.quality import window_only

TINY = Path(__file__).resolve().parent.parent / "models" / "tiny"
MARGIN = 1e-2  # between the two best logits: far more than fp32 summation order can move

GREEDY = {
    "First Citizen:\nWe are": (
        " a bawd, and I'll be accusation of the\nduke.\n\nFirst Senator:\nI'll believe you.\n\nFirst"
    ),
    "JULIET:\nO": (
        ", I'll not believe me, and I will not be\nAnd till I believe me to my body.\n\nJULIET:\nI'll"
    ),
    "What news": "?\n\nProvost:\nI am a business, sir, I'll be so.\n\nProvost:\nI'll believe you,",
}


@pytest.fixture(scope="module")
def engine() -> dsv4.Engine:
    return dsv4.load(TINY, device="cpu", max_context=2048, mtp=True)


def bits_per_byte(engine: dsv4.Engine, ids: list[int], first: int = 0) -> float:
    """Of ids[first:], teacher-forced after BOS and everything before."""
    log_probs = engine.logits([engine.config.bos_id, *ids[:-1]]).log_softmax(-1)
    nats = -log_probs.gather(1, torch.tensor(ids)[:, None])[first:].sum()
    return float(nats) / math.log(2) / len(engine.tokenizer.decode(ids[first:]).encode())


@pytest.mark.parametrize("prompt", GREEDY)
def test_greedy_continuation_is_pinned(engine: dsv4.Engine, prompt: str) -> None:
    ids = [engine.config.bos_id, *engine.tokenizer.encode(prompt)]
    tokens = list(engine.generate(ids, 40))
    best = engine.logits(ids + tokens, chunk=1)[len(ids) - 1 : -1].topk(2).values
    assert (best[:, 0] - best[:, 1]).min() > MARGIN
    assert engine.tokenizer.decode(tokens) == GREEDY[prompt]


def test_held_out_text_is_predicted_and_entries_help(engine: dsv4.Engine) -> None:
    """The whole held-out text is measured by tools/quality.py (README); this is its first 1,400 tokens."""
    ids = engine.tokenizer.encode((TINY / "held_out.txt").read_text(encoding="utf-8"))[:1400]
    assert bits_per_byte(engine, ids) < 2.0
    near = dsv4.load(TINY, device="cpu", max_context=2048)
    window_only(near)
    assert bits_per_byte(near, ids, 512) > bits_per_byte(engine, ids, 512) + 0.02


def test_mtp_drafts_the_model_s_own_choice(engine: dsv4.Engine) -> None:
    text = (TINY / "held_out.txt").read_text(encoding="utf-8")
    ids = [engine.config.bos_id, *engine.tokenizer.encode(text)[:600]]
    drafts = engine.draft_logits(ids).argmax(-1)  # row t: token t + 2
    own = engine.logits(ids).argmax(-1)  # row t: token t + 1
    assert (drafts[:-1] == own[1:-1]).float().mean() > 0.5


def test_the_demonstration_prints_recognisable_text() -> None:
    done = run("--temperature", "0.7", "--json")  # what `make demo` runs, as JSON
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert len(result["ids"]) >= 200
    known = set(re.findall(r"[a-z]+", (TINY / "held_out.txt").read_text(encoding="utf-8").lower()))
    words = re.findall(r"[a-z]+", result["text"].lower())
    assert sum(word in known for word in words) > 0.7 * len(words)
    assert "random" not in done.stderr
    assert json.loads(run("--temperature", "0.7", "--json").stdout)["text"] == result["text"]
