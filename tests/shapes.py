"""The sizes of the three models that every kernel takes: Flash, Pro and the embedded tiny checkpoint.

Parity tests run all three, benchmarks the first two.
"""

from typing import NamedTuple


class Sizes(NamedTuple):
    """Letters as in docs/architecture.md section 7; facts as in docs/model.md section 1."""

    name: str
    hidden: int  # D
    heads: int  # H
    q_lora: int
    experts: int  # E
    chosen: int  # K
    expert_width: int  # F
    index_heads: int
    index_topk: int
    vocab: int
    head_dim: int = 512
    rope_dim: int = 64
    index_dim: int = 128
    streams: int = 4
    csa_ratio: int = 4
    hca_ratio: int = 128


FLASH = Sizes("flash", 4096, 64, 1024, 256, 6, 2048, 64, 512, 129280)
PRO = Sizes("pro", 7168, 128, 1536, 384, 6, 3072, 64, 1024, 129280)
TINY = Sizes("tiny", 256, 4, 256, 16, 2, 256, 32, 64, 1024)
MODELS = (FLASH, PRO, TINY)

TOKENS = (0, 1, 7, 137, 4001)
