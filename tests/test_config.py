"""ModelConfig from DeepSeek's and transformers' config.json, and the sentences for what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import DeepseekV4Config

from dsv4.config import ModelConfig, Yarn
from dsv4.loading.presets import PRESETS, preset

NAN = float("nan")
NUMBERS = "hc_eps rms_norm_eps rope_theta compress_rope_theta swiglu_limit routed_scaling_factor".split()
INTEGERS = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads head_dim qk_rope_head_dim q_lora_rank"
    " o_groups o_lora_rank n_routed_experts num_experts_per_tok moe_intermediate_size num_hash_layers"
    " sliding_window index_n_heads index_head_dim index_topk hc_mult hc_sinkhorn_iters"
    " max_position_embeddings"
).split()
RELEASED_EXTRAS = {
    "expert_dtype": "fp4",
    "initializer_range": 0.02,
    "use_cache": True,
    "transformers_version": "4.57.1",
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
}
DSPARK = {
    "compress_ratios": PRESETS["flash"]["compress_ratios"] + [0, 0],
    "dspark_block_size": 5,
    "dspark_noise_token_id": 128799,
    "dspark_target_layer_ids": [40, 41, 42],
    "dspark_markov_rank": 256,
}


def read(raw: dict[str, Any]) -> ModelConfig:
    return ModelConfig.from_dict(raw)


def refusal(raw: dict[str, Any]) -> str:
    with pytest.raises(ValueError) as caught:
        read(raw)
    return str(caught.value)


def tiny(**changes: Any) -> dict[str, Any]:
    """The tiny preset with changed fields; None leaves a field out."""
    return {key: value for key, value in (preset("tiny") | changes).items() if value is not None}


def hf(**changes: Any) -> dict[str, Any]:
    """The tiny preset as transformers writes it."""
    return DeepseekV4Config.from_dict(tiny()).to_dict() | changes


def test_flash() -> None:
    config = read(preset("flash") | RELEASED_EXTRAS)
    assert (config.num_layers, config.hidden_size, config.num_heads) == (43, 4096, 64)
    assert (config.q_lora_rank, config.o_groups, config.o_lora_rank) == (1024, 8, 1024)
    assert (config.num_experts, config.expert_width, config.experts_per_token) == (256, 2048, 6)
    assert (config.index_heads, config.index_head_dim, config.index_topk) == (64, 128, 512)
    assert (config.head_dim, config.rope_dim, config.window) == (512, 64, 128)
    assert (config.routed_scale, config.swiglu_limit) == (1.5, 10.0)
    assert (config.rope_theta, config.compress_rope_theta) == (10000.0, 160000.0)
    assert config.yarn == Yarn(16.0, 65536, 32.0, 1.0)
    assert [config.compress_ratios.count(ratio) for ratio in (0, 4, 128)] == [2, 21, 20]
    assert [config.ratio(layer) for layer in (0, 1, 2, 3, 42, 43)] == [0, 0, 4, 128, 4, 0]
    assert [config.is_hash_layer(layer) for layer in (0, 2, 3)] == [True, True, False]
    assert (config.bos_id, config.eos_ids, config.num_mtp_layers) == (0, (1,), 1)
    assert not config.has_dspark and not config.synthetic


def test_pro() -> None:
    config = read(preset("pro"))
    assert (config.num_layers, config.hidden_size, config.num_heads) == (61, 7168, 128)
    assert (config.q_lora_rank, config.o_groups, config.expert_width) == (1536, 16, 3072)
    assert (config.num_experts, config.index_topk, config.routed_scale) == (384, 1024, 2.5)
    assert [config.compress_ratios.count(ratio) for ratio in (0, 4, 128)] == [0, 30, 31]
    assert [config.ratio(layer) for layer in (0, 1, 2, 60, 61)] == [128, 128, 4, 4, 0]


def test_dspark_release_keeps_the_trunk() -> None:
    assert len(DSPARK["compress_ratios"]) == 46
    config = read(preset("flash") | DSPARK)
    assert config.has_dspark and config.compress_ratios == read(preset("flash")).compress_ratios


@pytest.mark.parametrize("name", PRESETS)
def test_transformers_conversion_is_equal(name: str, tmp_path: Path) -> None:
    raw = preset(name) | RELEASED_EXTRAS | (DSPARK if name == "flash" else {})
    converted = DeepseekV4Config.from_dict(raw)
    fields = converted.to_dict()
    assert "compress_ratios" not in fields and "compress" in fields["rope_parameters"]
    assert read(fields) == read(raw)
    converted.save_pretrained(tmp_path)
    assert ModelConfig.from_checkpoint(tmp_path) == read(raw)


def test_transformers_other_rates_and_names() -> None:
    changed = DeepseekV4Config.from_dict(tiny(compress_rate_hca=16)).to_dict()
    assert read(changed).compress_ratios == (0, 4, 16, 4)
    assert read(tiny(num_local_experts=16, n_routed_experts=None)) == read(tiny())


YARN = PRESETS["tiny"]["rope_scaling"]


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {**YARN, "rope_type": "yarn", "type": None}},
        {"rope_scaling": {**YARN, "beta_fast": None, "mscale": 1.0, "attention_factor": 1}},
        {"rope_scaling": None, "rope_parameters": {**YARN, "rope_theta": 10000}, "rope_theta": None},
        {"rope_parameters": {"partial_rotary_factor": 0.125}, "qk_rope_head_dim": None},
        {"compress_rates": {"heavily_compressed_attention": 128}, "bos_token_id": None, "eos_token_id": None},
        {"num_hash_layers": 1, "mlp_layer_types": ["hash_moe"] + ["moe"] * 3},
        {"expert_dtype": "fp8", "eos_token_id": [1], "num_local_experts": 16, "partial_rotary_factor": 0.125},
    ],
)
def test_equal_spellings(changes: dict[str, Any]) -> None:
    assert read(tiny(**changes)) == read(tiny())


def test_no_yarn() -> None:
    assert read(tiny(rope_scaling=None)).yarn is None
    assert read(tiny(rope_scaling={"type": "default"})).yarn is None


def test_nested_theta_wins_as_in_transformers() -> None:
    nested = {"main": {"rope_type": "default", "rope_theta": 500.0}, "compress": {"rope_theta": 700.0}}
    config = read(tiny(rope_scaling=None, rope_parameters=nested))
    assert (config.rope_theta, config.compress_rope_theta) == (500.0, 700.0)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "deepseek_v32", "deepseek_v41", "llama", 4, ["a"]])
def test_other_models_are_refused(model_type: object) -> None:
    message = refusal(tiny(model_type=model_type))
    assert f"found {model_type!r}" in message and message.endswith("runs DeepSeek-V4 only")


def test_refusal_says_what_differs() -> None:
    assert "Engram" in refusal({"model_type": "deepseek_v41", "text_config": {}})
    assert "latent attention" in refusal({"model_type": "deepseek_v3"})


@pytest.mark.parametrize("field", [*INTEGERS, *NUMBERS, "compress_ratios", "model_type"])
def test_missing_field_names_itself(field: str) -> None:
    message = refusal(tiny(**{field: None}))
    assert message.startswith("config.json: ") and f"field {field} " in message and "is missing" in message


@pytest.mark.parametrize("value", [True, 2.0, "4", -1, NAN, [4]])
@pytest.mark.parametrize("field", [*INTEGERS, "bos_token_id", "num_nextn_predict_layers"])
def test_not_an_integer(field: str, value: object) -> None:
    assert f"config.json: {field}: expected" in refusal(tiny(**{field: value}))


@pytest.mark.parametrize("value", [True, "1", 0, -1.0, NAN, float("inf"), pytest.param(10**400, id="huge")])
@pytest.mark.parametrize("field", NUMBERS)
def test_not_a_number(field: str, value: object) -> None:
    assert f"config.json: {field}: expected" in refusal(tiny(**{field: value}))


def yarn(**changes: Any) -> dict[str, Any]:
    return tiny(rope_scaling={**YARN, **changes})


# One wrong value each, and what the complaint begins with otherwise.
WRONG = {
    **{"num_local_experts": 8, "index_head_dim": 32, "o_groups": 3, "num_experts_per_tok": 17},
    **{"scoring_func": "sigmoid", "norm_topk_prob": False, "num_key_value_heads": 4, "n_shared_experts": 2},
    **{"tie_word_embeddings": True, "bos_token_id": 1280},
}
CONTRADICTIONS = {
    **{field: [tiny(**{field: value})] for field, value in WRONG.items()},
    "layer_types": [
        hf(compress_ratios=[0, 4, 4, 4]),
        hf(layer_types=["sliding_attention"]),
        hf(layer_types=["full_attention"] * 4),
        hf(layer_types=[["sliding_attention"]] * 4),
    ],
    "compress_rates: ": [hf(compress_rates=[4, 128])],
    "compress_rates.compressed": [hf(compress_rates={"compressed_sparse_attention": 8})],
    "compress_rates.heavily": [hf(compress_rates={"heavily_compressed_attention": 4})],
    "compress_ratios": [
        tiny(compress_ratios=r) for r in ([0, 4, 128], [1, 4, 128, 4], [False, 4, 128, 4], 4)
    ],
    "num_hash_layers": [hf(num_hash_layers=2), hf(num_hash_layers=True)],
    "mlp_layer_types": [hf(mlp_layer_types=["hash_moe"]), hf(mlp_layer_types=["moe"] * 3 + ["hash_moe"])],
    "qk_rope_head_dim": [
        tiny(partial_rotary_factor=0.25),
        tiny(rope_parameters={"main": {"partial_rotary_factor": 0.5}}),
        tiny(qk_rope_head_dim=63),
        tiny(qk_rope_head_dim=514),
    ],
    "eos_token_id": [tiny(eos_token_id=ids) for ids in ([1, 1280], True, [], -1)],
    "rope_scaling: attention_factor": [yarn(attention_factor=1.277)],
    "rope_scaling: mscale": [yarn(mscale=0.707)],
    "rope_scaling: factor": [yarn(factor=NAN)],
    "rope_scaling: field factor is missing": [yarn(factor=None)],
    "rope_scaling.rope_type": [yarn(type="linear"), yarn(rope_type="default")],
    "field rope_scaling.rope_type is missing": [yarn(type=None)],
    "rope_scaling: expected an object": [tiny(rope_scaling="yarn")],
    "rope_parameters: expected an object": [tiny(rope_parameters=["yarn"])],
    "rope_parameters.main: expected an object": [tiny(rope_parameters={"main": 1})],
    "rope_parameters.main.rope_type": [tiny(rope_parameters={"main": {"rope_type": "yarn"}})],
    "rope_parameters: expected what rope_scaling": [
        tiny(rope_parameters={**YARN, "factor": 8}),
        tiny(rope_parameters={"type": "default"}),
    ],
}


@pytest.mark.parametrize(
    ("start", "raw"), [(key, raw) for key, raws in CONTRADICTIONS.items() for raw in raws]
)
def test_contradiction_names_the_field(start: str, raw: dict[str, Any]) -> None:
    assert refusal(raw).startswith(f"config.json: {start}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"model_type": ', "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[1, 2]", "expected a JSON object, found list"),
        (b"{}", "field model_type is missing"),
        (json.dumps(tiny(hc_eps=NAN)).encode(), "hc_eps: expected a finite number"),
    ],
)
def test_bad_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        ModelConfig.from_checkpoint(tmp_path)
    assert str(path) in str(caught.value)


def test_missing_folder_and_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        ModelConfig.from_checkpoint(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="config.json: not found"):
        ModelConfig.from_checkpoint(tmp_path)
