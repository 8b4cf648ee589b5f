"""The weights handed to a layer's constructor: every one is taken exactly once, by name."""

from torch import Tensor

from dsv4.ops.formats import Weight


class Weights:
    """A view of ``tensors`` below ``prefix``; scopes share one dictionary, which ``take`` empties."""

    def __init__(self, tensors: dict[str, Weight | Tensor], prefix: str = "") -> None:
        self._tensors = tensors
        self._prefix = prefix

    def scope(self, name: str) -> "Weights":
        """The weights below ``name``."""
        return Weights(self._tensors, f"{self._prefix}{name}.")

    def matrix(self, name: str) -> Weight:
        """Take a linear's weight."""
        weight = self._tensors.pop(self._prefix + name)
        assert not isinstance(weight, Tensor), f"{self._prefix}{name} is no matrix"
        return weight

    def tensor(self, name: str) -> Tensor:
        """Take a plain tensor."""
        tensor = self._tensors.pop(self._prefix + name)
        assert isinstance(tensor, Tensor), f"{self._prefix}{name} is no plain tensor"
        return tensor

    def assert_empty(self) -> None:
        """Every weight was taken."""
        assert not self._tensors, f"weights that no layer took: {sorted(self._tensors)[:5]}"
