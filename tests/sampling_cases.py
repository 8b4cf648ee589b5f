"""The cases of sample_token that hold on every device, against an independent definition.

``tests/ops/test_sampling.py`` runs them on the CPU, ``tests/gpu/test_sampling.py`` on a GPU.
"""

import math

import numpy as np
import pytest
import torch

from dsv4.ops import sampling

OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0, "position": 0}


def expected_token(logits: np.ndarray, device: str, **settings: float) -> int:
    """The definition, token by token; written for clarity, sharing no code with the reference.

    Only exp is the device's own: it may differ in the last bit from one to the other.
    """
    f32 = np.float32
    s = OFF | settings
    rank = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if s["temperature"] == 0:
        return rank[0]
    scaled = [f32(f32(logits[token] - logits[rank[0]]) / f32(s["temperature"])) for token in rank]
    powers = torch.tensor(np.array(scaled), device=device).exp().cpu().numpy()
    weights = [weight for weight in powers if weight > 0]

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


class SampleTokenCases:
    """A test file names the device in a subclass."""

    device: str

    def pick(self, logits: list | np.ndarray | torch.Tensor, **settings: float) -> int:
        on_device = torch.as_tensor(logits, dtype=torch.float32).to(self.device)
        token = sampling.sample_token(on_device, **(OFF | settings))
        assert token.shape == () and token.dtype == torch.int64 and token.device == on_device.device
        return int(token)

    def kept(self, logits: list | np.ndarray, **settings: float) -> set[int]:
        """The tokens that come up in many draws; each of those here has a good chance in every draw."""
        return {self.pick(logits, position=position, **settings) for position in range(200)}

    @pytest.mark.parametrize("name", SETTINGS)
    def test_against_the_definition(self, name: str) -> None:
        rng = np.random.default_rng(sum(map(ord, name)))
        seen = set()
        for position in range(120):
            logits = (rng.standard_normal(137) * rng.choice([0.1, 1, 5])).astype(np.float32)
            if position % 2:
                logits = np.round(logits)  # many ties
            draw = {"seed": int(rng.integers(2**64, dtype=np.uint64)), "position": position}
            token = self.pick(logits, **SETTINGS[name], **draw)
            assert token == expected_token(logits, self.device, **SETTINGS[name], **draw), (name, position)
            seen.add(token)
        assert len(seen) > 20

    def test_ties_go_to_the_lowest_id(self) -> None:
        tied = [0.0, 2.0, 1.0, 2.0, 1.0, 1.0]
        assert self.pick(tied, temperature=0.0) == 1
        assert self.kept(tied, top_k=1) == {1} and self.kept(tied, top_k=2) == {1, 3}
        assert self.kept(tied, top_k=4) == {1, 2, 3, 4}
        assert self.kept([0.0] * 8, top_p=0.5) == {0, 1, 2, 3}
        assert self.kept([0.0] * 8, top_p=0.5001) == {0, 1, 2, 3, 4}
        assert self.kept([0.0] * 8, top_p=1e-9) == {0}

    def test_filters_alone_and_in_order(self) -> None:
        logits = np.log(np.array([0.1, 0.4, 0.2, 0.3]))
        assert self.kept(logits) == self.kept(logits, top_k=9) == self.kept(logits, top_k=4) == {0, 1, 2, 3}
        assert self.kept(logits, top_k=2) == {1, 3}
        assert self.kept(logits, top_p=0.6) == {1, 3} and self.kept(logits, top_p=0.71) == {1, 2, 3}
        assert self.kept(logits, min_p=0.51) == {1, 3} and self.kept(logits, min_p=1.0) == {1}
        # Top-p sees what top-k left: 0.4 / 0.7 of it reaches 0.55, 0.4 of the whole would not.
        assert self.kept(logits, top_k=2, top_p=0.55) == {1} and self.kept(logits, top_p=0.55) == {1, 3}
        # The temperature comes first: at 4 all are nearly equal, so min-p keeps more.
        assert self.kept(logits, min_p=0.6, temperature=4.0) == {0, 1, 2, 3}

    def test_frequencies_are_the_probabilities(self) -> None:
        probs = np.array([0.05, 0.3, 0.15, 0.5])
        draws = [self.pick(np.log(probs), seed=3, position=position) for position in range(2000)]
        counts = np.bincount(draws, minlength=4)
        assert ((counts - 2000 * probs) ** 2 / (2000 * probs)).sum() < 16.3  # 0.999, 3 degrees
        flat = np.sqrt(probs) / np.sqrt(probs).sum()
        assert ((counts - 2000 * flat) ** 2 / (2000 * flat)).sum() > 60
        draws = [self.pick(np.log(probs), temperature=2.0, position=position) for position in range(2000)]
        counts = np.bincount(draws, minlength=4)
        assert ((counts - 2000 * flat) ** 2 / (2000 * flat)).sum() < 16.3

    def test_extreme_logits(self) -> None:
        huge, inf = 3e38, math.inf
        for temperature in (0.0, 1e-45, 1e-300, 1.0):
            assert self.pick([-huge, huge, 0.0], temperature=temperature) == 1
            assert self.pick([-inf, 1.0, -inf], temperature=temperature) == 1
        assert self.kept([-inf, 1.0, -huge, 1.0], temperature=1e39) == {1, 2, 3}
        assert self.kept([5.0, 5.0 + 1e-6, -inf], temperature=1e300) == {0, 1}
        assert self.kept([0.0, -200.0, -1.0], top_p=0.9999999) == {0, 2}
        assert self.pick([7.0]) == 0
        rest = [-math.inf] * 3 + [0.0] * 3
        assert {self.pick(rest, seed=seed) for seed in range(200)} == {3, 4, 5}

    def test_the_smallest_and_the_largest_random_number(self) -> None:
        """0 draws the first token; what rounding leaves at the other end goes to the last token kept."""
        smallest, largest = 14883995, 38471471
        assert sampling.uniform(0, smallest) == 0 and sampling.uniform(0, largest) == 1 - 2**-24
        logits = [0.0] * 49 + [-math.inf]  # 49 fp32 steps of 1/49 end at 0.99999976
        assert self.pick(logits, position=smallest) == 0 and self.pick(logits, position=largest) == 48
