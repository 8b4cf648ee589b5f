"""The settings of sampling: what is accepted, and what is refused in which words."""

import dataclasses
import math

import pytest

from dsv4.sampling import Sampling


def test_defaults_are_greedy_and_frozen() -> None:
    settings = Sampling()
    assert dataclasses.astuple(settings) == (0.0, 0, 1.0, 0.0, 0, ())
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.seed = 1


def test_limits_are_accepted() -> None:
    Sampling(temperature=0, top_k=0, top_p=1e-9, min_p=0, seed=0, stop=("a",))
    Sampling(temperature=1e30, top_k=10**9, top_p=1, min_p=1, seed=2**64 - 1, stop=("a", "\n\n"))


@pytest.mark.parametrize(
    ("field", "expected", "values"),
    [
        ("temperature", "a finite number >= 0", [-0.1, math.nan, math.inf, -math.inf, "1", None]),
        ("top_k", "an integer >= 0", [-1, 1.0, True, None]),
        ("top_p", r"a number in \(0, 1\]", [0, 0.0, -0.5, 1.01, math.nan, math.inf, True, "1"]),
        ("min_p", r"a number in \[0, 1\]", [-1e-9, 1.01, math.nan, False, None]),
        ("seed", r"an integer in \[0, 2\^64\)", [-1, 2**64, 1.5, True, None]),
        ("stop", "a tuple of strings, none empty", ["a", ["a"], ("a", ""), (1,), None]),
    ],
)
def test_values_out_of_range(field: str, expected: str, values: list) -> None:
    for value in values:
        with pytest.raises(ValueError, match=f"^{field}: expected {expected}, found ") as caught:
            Sampling(**{field: value})
        assert str(caught.value).endswith(repr(value))
