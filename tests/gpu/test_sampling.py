"""The sampling kernels: the cases of the CPU, and whole vocabularies against the reference."""

import math
from collections.abc import Callable

import pytest
import torch
from numeric import assert_reproducible, dirty_memory
from sampling_cases import OFF, SampleTokenCases
from torch import Tensor

from dsv4.ops.sampling import reference, sample_token

VOCAB = 129280


class TestSampleToken(SampleTokenCases):
    device = "cuda"


# Logits of many kinds from standard normal numbers.
KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "flat": torch.zeros_like,
    "nearly flat": lambda normal: 1e-3 * normal,
    "broad": lambda normal: normal,
    "peaked": lambda normal: 6 * normal,
    "steep": lambda normal: -(normal.abs() ** 3),
    "ties": lambda normal: (2 * normal).round(),
    "powers of two": lambda normal: (normal * 3).round() * math.log(2.0),
    "mostly -inf": lambda normal: torch.where(normal > 1.5, normal, -math.inf),
    "one left": lambda normal: torch.where(normal == normal.max(), 0.0, -math.inf),
}

# The reference on a GPU multiplies by the reciprocal of the temperature: powers of two are exact either way.
SETTINGS = (
    {"temperature": 0.0},
    {},
    {"temperature": 2.0},
    {"temperature": 0.25},
    {"top_k": 50},
    {"top_k": 20000},
    {"top_p": 0.9},
    {"top_p": 0.9999},
    {"min_p": 0.05},
    {"min_p": 1e-4},
    {"temperature": 0.5, "top_k": 3000, "top_p": 0.95, "min_p": 0.001},
)


@pytest.mark.parametrize("kind", KINDS)
def test_vocabulary(kind: str, cuda_normal: Callable[..., Tensor]) -> None:
    logits = KINDS[kind](cuda_normal(VOCAB))
    for number, settings in enumerate(SETTINGS):
        for position in (0, 1, 77, 2**40 + number):
            draw = OFF | settings | {"seed": 2**64 - 1 - 12345 * number, "position": position}
            dirty_memory()
            token = sample_token(logits, **draw)
            want = reference.sample_token(logits, **draw)
            assert token.shape == () and token.dtype == torch.int64
            assert int(token) == int(want), f"{kind} {draw}: expected id {int(want)}, found {int(token)}"


@pytest.mark.parametrize("vocab", [1, 2, 31, 1024, 1025, 8192, 8193, 9217, 131073, 300001])
def test_odd_vocabularies(vocab: int, cuda_normal: Callable[..., Tensor]) -> None:
    rows = cuda_normal(2, vocab)
    for logits in (rows[1], rows[1].round(), rows.view(-1)[1 : vocab + 1]):
        for settings in ({"temperature": 0.0}, {}, {"top_k": vocab}, {"top_p": 0.5, "min_p": 0.01}):
            draw = OFF | settings | {"position": vocab}
            token, want = sample_token(logits, **draw), reference.sample_token(logits, **draw)
            assert int(token) == int(want), (vocab, draw)


def test_largest_with_ties() -> None:
    """Every place of the largest logit in turn, its equals after it; -0 is equal to 0."""
    for place in (0, 1, 31, 1023, 1024, 8191, 8192, 70000, VOCAB - 1):
        logits = torch.full((VOCAB,), -1.0, device="cuda")
        logits[place:] = 0.0
        logits[place] = -0.0
        assert int(sample_token(logits, **(OFF | {"temperature": 0.0}))) == place
        logits[:place] = -math.inf
        assert int(sample_token(logits - 5, **(OFF | {"temperature": 0.0}))) == place


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_give_no_id(temperature: float) -> None:
    """The id -1 where the reference stops: a NaN of either sign or +inf anywhere, or nothing but -inf."""
    settings = OFF | {"temperature": temperature}
    for vocab in (2, 5000, VOCAB):
        for bad in (math.nan, -math.nan, math.inf):
            for place in (0, vocab - 1, vocab // 2):
                logits = torch.zeros(vocab, device="cuda")
                logits[place] = bad
                assert int(sample_token(logits, **settings)) == -1, (vocab, bad, place)
        logits = torch.full((vocab,), -math.inf, device="cuda")
        assert int(sample_token(logits, **settings)) == -1
        logits[vocab // 2] = -1e38
        assert int(sample_token(logits, **settings)) == vocab // 2


def test_reproducible(cuda_normal: Callable[..., Tensor]) -> None:
    logits = cuda_normal(VOCAB)
    for settings in ({"temperature": 0.0}, {}, {"top_p": 0.9, "min_p": 1e-4}):
        draw = OFF | settings | {"seed": 3}
        # As one element: what compares bytes takes no tensor without dimensions.
        assert_reproducible(lambda draw=draw: sample_token(logits, **draw).view(1), str(settings))


def test_what_it_cannot_take(cuda_normal: Callable[..., Tensor]) -> None:
    logits = cuda_normal(64)
    for bad, words in ((logits[::2], "contiguous"), (logits.bfloat16(), "bfloat16"), (logits[None], "shape")):
        with pytest.raises(AssertionError, match=words):
            sample_token(bad, **OFF)
    with pytest.raises(AssertionError, match="at least one token"):
        sample_token(logits[:0], **OFF)
    with pytest.raises(AssertionError, match="position"):
        sample_token(logits, **(OFF | {"position": 2**63}))
