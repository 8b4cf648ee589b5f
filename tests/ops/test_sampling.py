"""The sampling room: known random numbers, and the choice against an independent definition."""

import math

import numpy as np
import pytest
import torch

from dsv4.ops import sampling
from dsv4.ops.sampling import reference

OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0, "position": 0}


def pick(logits: list | np.ndarray | torch.Tensor, **settings: float) -> int:
    token = sampling.sample_token(torch.as_tensor(logits, dtype=torch.float32), **(OFF | settings))
    assert token.shape == () and token.dtype == torch.int64
    return int(token)


def kept(logits: list | np.ndarray, **settings: float) -> set[int]:
    """The tokens that come up in many draws; each of those here has a good chance in every draw."""
    return {pick(logits, position=position, **settings) for position in range(200)}


def expected_token(logits: np.ndarray, **settings: float) -> int:
    """The definition, token by token; written for clarity, sharing no code with the reference."""
    f32 = np.float32
    s = OFF | settings
    rank = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if s["temperature"] == 0:
        return rank[0]
    scaled = [f32(f32(logits[token] - logits[rank[0]]) / f32(s["temperature"])) for token in rank]
    weights = [weight for weight in torch.tensor(np.array(scaled)).exp().numpy() if weight > 0]

    def renormalize(values: list[np.float32]) -> list[np.float32]:
        total = f32(0)
        for value in values:
            total = f32(total + value)
        return [f32(value / total) for value in values]

    probs = renormalize(weights[: s["top_k"]] if s["top_k"] else weights)
    if s["top_p"] < 1:
        total, length = f32(0), 0
        while length < len(probs) and total < f32(s["top_p"]):
            total = f32(total + probs[length])
            length += 1
        probs = renormalize(probs[:length])
    if s["min_p"] > 0:
        probs = renormalize([p for p in probs if p >= f32(f32(s["min_p"]) * probs[0])])
    total = f32(0)
    for index, prob in enumerate(probs):
        total = f32(total + prob)
        if total > f32(sampling.uniform(s["seed"], s["position"])):
            return rank[index]
    return rank[len(probs) - 1]


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


SETTINGS = {
    "plain": {},
    "hot": {"temperature": 3.7},
    "cold": {"temperature": 0.13},
    "greedy": {"temperature": 0.0, "top_k": 3},
    "top-k": {"top_k": 5},
    "top-p": {"top_p": 0.7},
    "min-p": {"min_p": 0.2},
    "all": {"temperature": 1.6, "top_k": 30, "top_p": 0.85, "min_p": 0.03},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_against_the_definition(name: str) -> None:
    rng = np.random.default_rng(sum(map(ord, name)))
    seen = set()
    for position in range(120):
        logits = (rng.standard_normal(137) * rng.choice([0.1, 1, 5])).astype(np.float32)
        if position % 2:
            logits = np.round(logits)  # many ties
        draw = {"seed": int(rng.integers(2**64, dtype=np.uint64)), "position": position}
        token = pick(logits, **SETTINGS[name], **draw)
        assert token == expected_token(logits, **SETTINGS[name], **draw), (name, position)
        seen.add(token)
    assert len(seen) > 20


def test_sums_have_one_fp32_rounding_a_step() -> None:
    values = torch.rand(5000, generator=torch.Generator().manual_seed(0)) + 0.5
    total, sums = np.float32(0), []
    for value in values.numpy():
        total = np.float32(total + value)
        sums.append(total)
    assert reference._running_sum(values).numpy().tobytes() == np.array(sums).tobytes()


def test_ties_go_to_the_lowest_id() -> None:
    tied = [0.0, 2.0, 1.0, 2.0, 1.0, 1.0]
    assert pick(tied, temperature=0.0) == 1
    assert kept(tied, top_k=1) == {1} and kept(tied, top_k=2) == {1, 3}
    assert kept(tied, top_k=4) == {1, 2, 3, 4}
    assert kept([0.0] * 8, top_p=0.5) == {0, 1, 2, 3}
    assert kept([0.0] * 8, top_p=0.5001) == {0, 1, 2, 3, 4}
    assert kept([0.0] * 8, top_p=1e-9) == {0}


def test_filters_alone_and_in_order() -> None:
    logits = np.log(np.array([0.1, 0.4, 0.2, 0.3]))
    assert kept(logits) == kept(logits, top_k=9) == kept(logits, top_k=4) == {0, 1, 2, 3}
    assert kept(logits, top_k=2) == {1, 3}
    assert kept(logits, top_p=0.6) == {1, 3} and kept(logits, top_p=0.71) == {1, 2, 3}
    assert kept(logits, min_p=0.51) == {1, 3} and kept(logits, min_p=1.0) == {1}
    # Top-p sees what top-k left: 0.4 / 0.7 of it reaches 0.55, 0.4 of the whole would not.
    assert kept(logits, top_k=2, top_p=0.55) == {1} and kept(logits, top_p=0.55) == {1, 3}
    # The temperature comes first: at 4 all are nearly equal, so min-p keeps more.
    assert kept(logits, min_p=0.6, temperature=4.0) == {0, 1, 2, 3}


def test_frequencies_are_the_probabilities() -> None:
    probs = np.array([0.05, 0.3, 0.15, 0.5])
    draws = [pick(np.log(probs), seed=3, position=position) for position in range(2000)]
    counts = np.bincount(draws, minlength=4)
    assert ((counts - 2000 * probs) ** 2 / (2000 * probs)).sum() < 16.3  # 0.999, 3 degrees
    flat = np.sqrt(probs) / np.sqrt(probs).sum()
    assert ((counts - 2000 * flat) ** 2 / (2000 * flat)).sum() > 60
    draws = [pick(np.log(probs), temperature=2.0, position=position) for position in range(2000)]
    counts = np.bincount(draws, minlength=4)
    assert ((counts - 2000 * flat) ** 2 / (2000 * flat)).sum() < 16.3


def test_extreme_logits() -> None:
    huge, inf = 3e38, math.inf
    for temperature in (0.0, 1e-45, 1e-300, 1.0):
        assert pick([-huge, huge, 0.0], temperature=temperature) == 1
        assert pick([-inf, 1.0, -inf], temperature=temperature) == 1
    assert kept([-inf, 1.0, -huge, 1.0], temperature=1e39) == {1, 2, 3}
    assert kept([5.0, 5.0 + 1e-6, -inf], temperature=1e300) == {0, 1}
    assert kept([0.0, -200.0, -1.0], top_p=0.9999999) == {0, 2}
    assert pick([7.0]) == 0
    rest = [-math.inf] * 3 + [0.0] * 3
    assert {pick(rest, seed=seed) for seed in range(200)} == {3, 4, 5}


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
