"""The sampling room: known random numbers, and the choice against an independent definition."""

import math

import numpy as np
import pytest
import torch
from sampling_cases import SampleTokenCases

from dsv4.ops import sampling
from dsv4.ops.sampling import reference


class TestSampleToken(SampleTokenCases):
    device = "cpu"


pick = TestSampleToken().pick


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter: tuple, key: tuple, words: tuple) -> None:
    """The published vectors of Random123 for philox4x32 with 10 rounds."""
    assert reference.philox(counter, key) == words
    position = sum(word << (32 * index) for index, word in enumerate(counter))
    seed = key[0] | key[1] << 32
    assert sampling.uniform(seed, position) == (words[0] >> 8) / 2**24


def test_uniform_is_uniform() -> None:
    draws = np.array([sampling.uniform(7, position) for position in range(8000)])
    assert draws.min() >= 0 and draws.max() < 1
    counts = np.histogram(draws, bins=20, range=(0, 1))[0]
    assert ((counts - 400) ** 2 / 400).sum() < 45.3  # 0.999 quantile of chi-square, 19 degrees
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.04
    assert sampling.uniform(8, 0) != sampling.uniform(7, 0) != sampling.uniform(7, 1)


def test_sums_have_one_fp32_rounding_a_step() -> None:
    values = torch.rand(5000, generator=torch.Generator().manual_seed(0)) + 0.5
    total, sums = np.float32(0), []
    for value in values.numpy():
        total = np.float32(total + value)
        sums.append(total)
    assert reference._running_sum(values).numpy().tobytes() == np.array(sums).tobytes()


def test_the_last_token_kept_takes_what_rounding_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "uniform", lambda seed, position: 1 - 2**-24)
    logits = [0.0] * 49 + [-math.inf]  # 49 fp32 steps of 1/49 end at 0.99999976
    assert float(reference._running_sum(torch.full((49,), 1 / 49))[-1]) < 1 - 2**-24
    assert pick(logits) == 48


@pytest.mark.parametrize("bad", [[0.0, math.nan], [math.inf, 0.0], [-math.inf] * 2])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_are_an_internal_error(bad: list, temperature: float) -> None:
    with pytest.raises(AssertionError, match="largest logit"):
        pick(bad, temperature=temperature)
