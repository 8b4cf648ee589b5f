"""Presets cut to fewer layers stay sensible models."""

import pytest

from dsv4.config import ModelConfig
from dsv4.loading.presets import PRESETS, preset


def test_cut_presets() -> None:
    cut, shorter = preset("flash", 4), preset("pro", 2)
    assert cut["num_hidden_layers"] == 4
    assert (cut["compress_ratios"], cut["num_hash_layers"]) == ([0, 0, 4, 128, 0], 3)
    assert (shorter["compress_ratios"], shorter["num_hash_layers"]) == ([128, 128, 0], 1)
    assert preset("tiny", 1)["num_hash_layers"] == 0 and preset("flash", 43) == preset("flash")
    assert all(ModelConfig.from_dict(preset(name, n)).num_layers == n for name in PRESETS for n in (1, 2, 4))
    preset("tiny")["rope_scaling"]["factor"] = 1
    assert PRESETS["tiny"]["rope_scaling"]["factor"] == 16


@pytest.mark.parametrize(("name", "layers"), [("mini", None), ("tiny", 0), ("tiny", 5), ("flash", -1)])
def test_bad_presets(name: str, layers: int | None) -> None:
    with pytest.raises(ValueError, match="expected"):
        preset(name, layers)
