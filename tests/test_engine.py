"""The engine's promises: fresh sequences, generation, numeric choices, names that do not matter."""

import json
from pathlib import Path

import pytest
import torch
from checkpoints import (
    PRESETS,
    encode_model,
    random_model,
    rename,
    rename_transformers,
    tiny_config_dict,
    write_checkpoint,
    write_with_tokenizer,
)
from torch import Tensor

import dsv4
from dsv4.config import ModelConfig
from dsv4.ops.dispatch import use_reference
from dsv4.ops.formats import Mxfp4, Nvfp4, Plain, dequantize, stored

RAW = tiny_config_dict(vocab_size=288)
IDS = torch.randint(3, 259, (60,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_with_tokenizer(tmp_path_factory.mktemp("nvidia"))


@pytest.fixture(scope="module")
def engine(ckpt: Path) -> dsv4.Engine:
    return dsv4.load(ckpt, max_context=80, mtp=True)


def test_no_state_leaks_between_calls(engine: dsv4.Engine) -> None:
    first = engine.logits(IDS)
    tokens = list(engine.generate(IDS[:9], 20))
    engine.logits(IDS[::-1], chunk=3)
    engine.draft_logits(IDS[:30])
    assert torch.equal(engine.logits(IDS), first)
    assert list(engine.generate(IDS[:9], 20)) == tokens


def test_greedy_generation_follows_the_logits(engine: dsv4.Engine) -> None:
    generation = engine.generate(IDS[:10], 15)
    tokens = list(generation)
    assert (generation.finish, generation.ids, len(tokens)) == ("length", tokens, 15)
    logits = engine.logits(IDS[:10] + tokens, chunk=1)
    margins = logits.topk(2).values
    assert (margins[9:, 0] - margins[9:, 1]).min() > 1e-4
    assert logits[9:-1].argmax(-1).tolist() == tokens


def test_a_second_call_while_generating_raises(engine: dsv4.Engine) -> None:
    generation = engine.generate(IDS[:5], 10)
    next(generation)
    other = engine.generate(IDS[:5], 10)  # nothing runs before the first next()
    for call in (lambda: next(other), lambda: engine.logits(IDS), lambda: engine.draft_logits(IDS)):
        with pytest.raises(RuntimeError, match="still running"):
            call()
    generation.close()
    assert generation.finish == "interrupt" and len(generation.ids) == 1
    assert len(list(engine.generate(IDS[:5], 10))) == 10


def test_eos_ends_generation_and_is_not_yielded(tmp_path: Path, engine: dsv4.Engine) -> None:
    tokens = list(engine.generate(IDS[:10], 8))
    eos = next(token for i, token in enumerate(tokens) if i > 1 and token not in tokens[:i])
    stopping = dsv4.load(write_with_tokenizer(tmp_path, raw=RAW | {"eos_token_id": [1, eos]}), max_context=80)
    generation = stopping.generate(IDS[:10], 8)
    assert list(generation) == tokens[: tokens.index(eos)] and generation.finish == "eos"


def test_stop_strings_end_generation(engine: dsv4.Engine) -> None:
    settings = {"temperature": 1.0, "seed": 5}
    generation = engine.generate(IDS[:10], 40, dsv4.Sampling(**settings))
    list(generation)
    text = generation.take_text()
    stop = text[len(text) // 2 :][:2]
    generation = engine.generate(IDS[:10], 40, dsv4.Sampling(**settings, stop=(stop,)))
    list(generation)
    assert generation.finish == "stop"
    assert generation.take_text() == text[: text.index(stop)]


def test_sampling_depends_on_the_seed_alone(engine: dsv4.Engine) -> None:
    runs = [list(engine.generate(IDS[:5], 30, dsv4.Sampling(1.0, seed=seed))) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_a_draw_without_a_token_is_an_internal_error(
    engine: dsv4.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the kernel answers where the largest logit is not finite."""
    monkeypatch.setattr("dsv4.engine.sample_token", lambda logits, **settings: torch.tensor(-1))
    generation = engine.generate(IDS[:5], 3)
    with pytest.raises(AssertionError, match="position 5: the largest logit is not finite"):
        next(generation)


def test_generation_ends_when_the_context_is_full(ckpt: Path) -> None:
    small = dsv4.load(ckpt, max_context=12)
    generation = small.generate(IDS[:10], 50)
    assert len(list(generation)) == 3 and generation.finish == "length"
    with pytest.raises(ValueError, match="at most max_context = 12 tokens, found 13"):
        small.generate(IDS[:13], 1)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "the prompt is empty"),
        ([5, 288], r"position 1: expected 0 to 287 .* found 288"),
        ([-1], "position 0"),
    ],
)
def test_bad_ids_are_refused(engine: dsv4.Engine, ids: list[int], message: str) -> None:
    for call in (engine.logits, engine.draft_logits, lambda ids: engine.generate(ids, 1)):
        with pytest.raises(ValueError, match=message):
            call(ids)


def test_bad_choices_are_refused(ckpt: Path, engine: dsv4.Engine, tmp_path: Path) -> None:
    for field, value in (("weights", "int8"), ("activations", "fp16"), ("numerics", "x"), ("dtype", "f64")):
        with pytest.raises(ValueError, match=f"{field}: expected one of"):
            dsv4.load(ckpt, **{field: value})
    with pytest.raises(ValueError, match="no room 'rooter'"):
        dsv4.load(ckpt, reference=("rooter",))
    with pytest.raises(ValueError, match="max_context: expected 1 to 1024"):
        dsv4.load(ckpt, max_context=1025)
    with pytest.raises(ValueError, match="index_head_dim: expected a power of two of at least 32"):
        dsv4.load(write_with_tokenizer(tmp_path, raw=RAW | {"index_head_dim": 48}), max_context=80)
    with pytest.raises(ValueError, match="mtp=True"):
        dsv4.load(ckpt, max_context=80).draft_logits(IDS)
    with pytest.raises(ValueError, match="chunk"):
        engine.logits(IDS, chunk=0)


def test_sizes_that_the_kernels_do_not_take_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a library is looked for; ``--reference all`` needs no kernel."""
    monkeypatch.setattr(dsv4.engine, "resolve_device", lambda name: torch.device("cuda"))
    widths = {"head_dim": 512, "qk_rope_head_dim": 64, "index_head_dim": 128}
    taken = RAW | widths | {"hidden_size": 256, "moe_intermediate_size": 256}
    for field, value, expected in (
        ("hc_mult", 2, "4"),
        ("hidden_size", 8448, "a multiple of 256 up to 8192"),
        ("moe_intermediate_size", 384, "a multiple of 256"),
        ("n_routed_experts", 513, "at most 512"),
        ("head_dim", 256, "512"),
        ("qk_rope_head_dim", 32, "64"),
        ("index_head_dim", 64, "128"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(taken | {field: value}))
        words = f"{field}: expected {expected} for the CUDA kernels, found {value}"
        with pytest.raises(ValueError, match=words):
            dsv4.load(tmp_path, device="cuda")
        with pytest.raises(FileNotFoundError, match="safetensors"):
            dsv4.load(tmp_path, device="cuda", reference=("all",))


def test_names_do_not_matter(ckpt: Path, tmp_path: Path) -> None:
    config = ModelConfig.from_dict(RAW)
    expected = dsv4.load(ckpt, max_context=80).logits(IDS)
    trunk = encode_model(random_model(config, 1), config, PRESETS["nvidia"])
    for names in ("transformers", "transformers-saved"):
        directory = write_checkpoint(tmp_path / names, RAW, rename(trunk, names))
        assert torch.equal(dsv4.load(directory, max_context=80).logits(IDS), expected), names
    plain = encode_model(random_model(config, 1), config, PRESETS["bf16"])
    fused = write_checkpoint(tmp_path / "fused", RAW, rename_transformers(plain, fused=True))
    apart = write_checkpoint(tmp_path / "apart", RAW, plain)
    logits = [dsv4.load(directory, max_context=80).logits(IDS) for directory in (fused, apart)]
    assert torch.equal(*logits)


def test_lossless_nvfp4_of_mxfp4_experts_gives_the_same_bits(tmp_path: Path) -> None:
    """MXFP4's scale 2^e on both halves of its block is NVFP4 with block scale 2^(e - m), global scale 2^m."""
    config = ModelConfig.from_dict(RAW)
    tensors = encode_model(random_model(config, 1), config, PRESETS["deepseek"])
    recast = dict(tensors)
    for name in [name for name in tensors if name.startswith("layers.") and ".experts." in name]:
        stem, _, leaf = name.rpartition(".")
        if leaf == "scale":
            scale = recast.pop(name).float()
            shift = scale.amax().log2() - 8
            recast[f"{stem}.weight"] = tensors[f"{stem}.weight"].view(torch.uint8)
            blocks = (scale / 2**shift).repeat_interleave(2, dim=1)
            recast[f"{stem}.weight_scale"] = blocks.to(torch.float8_e4m3fn)
            recast[f"{stem}.weight_scale_2"] = 2**shift
            assert torch.equal(recast[f"{stem}.weight_scale"].float(), blocks)
    engines = [
        dsv4.load(write_checkpoint(tmp_path / name, RAW, data), max_context=80)
        for name, data in (("mxfp4", tensors), ("nvfp4", recast))
    ]
    kinds = [stored(engine.model.blocks[0].ffn.experts[0].w1) for engine in engines]
    assert isinstance(kinds[0], Mxfp4) and isinstance(kinds[1], Nvfp4)
    assert torch.equal(engines[0].logits(IDS), engines[1].logits(IDS))


def test_every_choice_of_activations_runs_and_differs(ckpt: Path) -> None:
    """That codes do not depend on how many tokens are fed at once is tested in tests/ops/test_gemm.py."""
    logits = {
        choice: dsv4.load(ckpt, weights="nvfp4", activations=choice, max_context=80).logits(IDS)
        for choice in ("bf16", "fp8", "nvfp4")
    }
    changes = [(logits[choice] - logits["bf16"]).abs().median() for choice in ("fp8", "nvfp4")]
    assert 0 < changes[0] < changes[1] < logits["bf16"].std()


@pytest.mark.parametrize("weights", ["nvfp4", "nvfp4-all"])
def test_weights_are_requantised_as_asked(ckpt: Path, engine: dsv4.Engine, weights: str) -> None:
    quantised = dsv4.load(ckpt, weights=weights, max_context=80)
    for old, new in zip(engine.model.blocks, quantised.model.blocks, strict=True):
        for name in ("wq_a", "wq_b", "wkv", "wo_a", "wo_b"):
            assert isinstance(stored(getattr(new.attn, name)), Nvfp4)
        assert isinstance(stored(new.ffn.router.weight), Nvfp4)
        change = dequantize(new.attn.wkv) - dequantize(old.attn.wkv)
        assert 0.01 < change.norm() / dequantize(old.attn.wkv).norm() < 0.2
    assert isinstance(stored(quantised.model.head), Nvfp4 if weights == "nvfp4-all" else Plain)
    assert not torch.equal(quantised.logits(IDS), engine.logits(IDS))


def test_bfloat16_stays_near_float32(ckpt: Path, engine: dsv4.Engine) -> None:
    half = dsv4.load(ckpt, dtype="bfloat16", numerics="exact", max_context=80).logits(IDS[:40])
    full = dsv4.load(ckpt, dtype="float32", numerics="exact", max_context=80).logits(IDS[:40])
    assert half.dtype == torch.float32
    assert 0 < (half - full).abs().median() < 0.05 * full.std()


def test_references_keep_autograd(ckpt: Path) -> None:
    """Training runs the layers as they are: every weight that takes part gets a gradient."""
    model = dsv4.load(ckpt, numerics="exact", max_context=80).model
    sink = model.blocks[1].attn.sink = model.blocks[1].attn.sink.clone().requires_grad_()
    norm = model.blocks[1].attn.compressor.norm = model.blocks[1].attn.compressor.norm.clone()
    norm.requires_grad_()
    with use_reference("all"):
        logits: Tensor = model.logits(model.forward(torch.tensor(IDS), model.new_cache(80)))
    logits.logsumexp(-1).sum().backward()
    assert sink.grad.abs().sum() > 0 and norm.grad.abs().sum() > 0
