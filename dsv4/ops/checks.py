"""What a kernel's door checks of its tensors: shape by letters, dtype, device, contiguity.

The letters are those of docs/architecture.md section 7. A failed check is a mistake of ours or of a caller
of the operation, never of a user's input: ``AssertionError`` with argument, expected and found.
"""

import torch
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float32)


class Shapes:
    """The sizes that letters stand for within one call; ``check`` binds or compares them."""

    def __init__(self, **known: int) -> None:
        self._sizes = known

    def __getitem__(self, letter: str) -> int:
        return self._sizes[letter]

    def check(
        self, name: str, tensor: Tensor, shape: str, dtypes: torch.dtype | tuple[torch.dtype, ...]
    ) -> None:
        """``shape``: letters or numbers, one a dimension; a first ``...`` stands for any dimensions."""
        dtypes = dtypes if isinstance(dtypes, tuple) else (dtypes,)
        assert tensor.is_cuda, f"{name}: expected a CUDA tensor, found one on {tensor.device}"
        wanted = " or ".join(map(str, dtypes))
        assert tensor.dtype in dtypes, f"{name}: expected {wanted}, found {tensor.dtype}"
        strides = tensor.stride()
        assert tensor.is_contiguous(), f"{name}: expected a contiguous tensor, found strides {strides}"
        dims, sizes = shape.split(), tuple(tensor.shape)
        if dims[0] == "...":
            dims, sizes = dims[1:], sizes[len(sizes) - len(dims) + 1 :]
        assert len(dims) == len(sizes), f"{name}: expected shape [{shape}], found {list(tensor.shape)}"
        for letter, size in zip(dims, sizes, strict=True):
            expected = int(letter) if letter.isdigit() else self._sizes.setdefault(letter, size)
            assert size == expected, (
                f"{name}: expected shape [{shape}] with {letter} = {expected}, found {list(tensor.shape)}"
            )
