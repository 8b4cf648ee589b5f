"""tools/quality.py on a little text: the comparisons say what they should, and the files are written."""

import argparse
import json
from pathlib import Path

import pytest

from tools import quality

TINY = Path(__file__).resolve().parent.parent / "models" / "tiny"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    directory = tmp_path_factory.mktemp("quality")
    text = directory / "text.txt"
    text.write_text((TINY / "held_out.txt").read_text(encoding="utf-8")[:1800], encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "FAR", 300)
        patch.setattr(quality, "BLOCK", 32)
        quality.main(
            argparse.Namespace(
                text=str(text),
                ckpt=str(TINY),
                bf16=None,
                device="cpu",
                out=str(directory / "q.json"),
                picture=str(directory / "q.png"),
            )
        )
    return json.loads((directory / "q.json").read_text(encoding="utf-8"))["rows"]


def test_the_base_differs_in_nothing_from_itself(rows: dict[str, dict]) -> None:
    base = rows["stored mix"]
    assert (base["kl"], base["top1"], base["experts_changed"], base["far_change"]) == (0, 1, 0, 0)


def test_every_variant_changes_something(rows: dict[str, dict]) -> None:
    others = {title: row for title, row in rows.items() if title != "stored mix"}
    assert len(others) == len(quality.VARIANTS) - 2  # without --bf16 that row is left out
    assert all(row["kl"] > 1e-6 for row in others.values()), others


def test_the_order_of_the_losses(rows: dict[str, dict]) -> None:
    assert rows["nvfp4, W4A16"]["kl"] < rows["nvfp4, W4A4"]["kl"] < rows["window only"]["kl"]
    low, high = rows["window only"]["far_change_interval"]
    assert 0 < low < rows["window only"]["far_change"] < high
    assert rows["router gate alone in NVFP4"]["experts_changed"] > 0
