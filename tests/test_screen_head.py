"""``screen_head`` in engine, plan and driver. What is chosen: tests/ops/test_sampling_head.py."""

from pathlib import Path

import pytest
import torch
from checkpoints import write_with_tokenizer

import dsv4
from dsv4.config import ModelConfig
from dsv4.loading.checkpoint import Checkpoint
from dsv4.numerics import Numerics
from dsv4.plan import make_plan
from single_shot_inference import main, parse_args

IDS = [5, 9, 200, 31, 77, 12]


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_with_tokenizer(tmp_path_factory.mktemp("nvidia"))


def test_generation_is_the_same(ckpt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = dsv4.load(ckpt, dtype="bfloat16", max_context=80)
    want = list(engine.generate(IDS, 20))
    engine.model.screen_head()
    monkeypatch.setattr(engine, "decode_one", None)
    assert list(engine.generate(IDS, 20)) == want
    with pytest.raises(ValueError, match=r"screen_head: expected greedy sampling .* found 0.5"):
        engine.generate(IDS, 20, dsv4.Sampling(0.5))


def test_a_choice_without_a_token_is_an_internal_error(ckpt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = dsv4.load(ckpt, dtype="bfloat16", max_context=80)
    monkeypatch.setattr("dsv4.model.argmax_head", lambda x, head: torch.tensor([-1]))
    engine.model.screen_head()
    generation = engine.generate(IDS, 3)
    next(generation)
    with pytest.raises(AssertionError, match="position 7: the largest logit is not finite"):
        next(generation)


def test_where_it_cannot_be(ckpt: Path) -> None:
    checkpoint = Checkpoint.open(ckpt, ModelConfig.from_checkpoint(ckpt))
    cuda = torch.device("cuda")
    for numerics, device, words in (
        (Numerics(dtype="bfloat16"), torch.device("cpu"), "device to be cuda, found cpu"),
        (Numerics(dtype="float32"), cuda, "dtype to be bfloat16, found float32"),
        (Numerics("nvfp4-all", dtype="bfloat16"), cuda, "the head's format to be bf16, found nvfp4"),
    ):
        with pytest.raises(ValueError, match=f"screen_head: expected {words}"):
            make_plan(checkpoint, numerics, device, 64, 0, screen_head=True)
    with pytest.raises(ValueError, match="screen_head: expected device to be cuda"):
        dsv4.load(ckpt, screen_head=True, max_context=80)
    args = parse_args(["--ckpt", str(ckpt), "--screen-head", "--temperature", "0.7"])
    with pytest.raises(ValueError, match=r"--screen-head: expected --temperature 0, found 0.7"):
        main(args)
    with pytest.raises(ValueError, match="screen_head: expected device to be cuda"):
        main(
            parse_args(
                ["--ckpt", str(ckpt), "--screen-head", "--device", "cpu", "--dry-run", "--max-context", "64"]
            )
        )


def test_the_plan_counts_the_copy(ckpt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsv4.plan.free_bytes", lambda device: 1 << 40)
    checkpoint = Checkpoint.open(ckpt, ModelConfig.from_checkpoint(ckpt))
    numerics = Numerics(dtype="bfloat16")
    plain, screened = (
        make_plan(checkpoint, numerics, torch.device("cuda"), 64, 0, screen_head=on) for on in (False, True)
    )
    (row,) = set(screened.rows) - set(plain.rows)
    engine = dsv4.load(ckpt, dtype="bfloat16", max_context=64)
    engine.model.screen_head()
    copies = engine.model.screened[1:]
    assert row.nbytes == sum(part.nbytes for part in copies) == screened.total_bytes - plain.total_bytes
