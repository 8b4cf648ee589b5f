"""How numbers are represented while the model runs: four independent choices, passed as arguments."""

from dataclasses import dataclass

import torch

WEIGHTS = ("stored", "nvfp4", "nvfp4-all")
ACTIVATIONS = ("bf16", "fp8", "nvfp4")
NUMERICS = ("trained", "exact")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Numerics:
    """The numeric choices of one engine (docs/model.md 2.13 and 4.2).

    ``weights``: as stored, or re-quantised to NVFP4 at load; ``activations``: what linears with
    quantised weights read; ``numerics``: with ("trained") or without ("exact") the roundings of KV
    cache and indexer; ``dtype``: of the activations between operations.
    """

    weights: str = "stored"
    activations: str = "bf16"
    numerics: str = "trained"
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        fields = ("weights", WEIGHTS), ("activations", ACTIVATIONS), ("numerics", NUMERICS), ("dtype", DTYPES)
        for field, known in fields:
            found = getattr(self, field)
            if found not in known:
                raise ValueError(f"{field}: expected one of {', '.join(known)}, found {found!r}")

    @property
    def trained(self) -> bool:
        return self.numerics == "trained"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]
