"""The sizes of the model's linears, and some that it does not have."""

from shapes import Sizes

GROUPS = {
    "flash": (8, 1024, 4096),
    "pro": (16, 1024, 4096),
    "tiny": (2, 256, 1024),
}  # of rows x columns: wo_a
ODD = ((300, 272), (17, 48), (5, 16), (1000, 7152), (33, 544), (130, 992), (72, 1040))


def matrices(sizes: Sizes) -> list[tuple[int, int]]:
    """Rows and columns of every linear (docs/model.md 4.1) but ``wo_a`` and the head."""
    d, low, (groups, rank, _) = sizes.hidden, sizes.q_lora, GROUPS[sizes.name]
    of_d = (low, sizes.head_dim, 2 * sizes.head_dim, 2 * sizes.index_dim, sizes.index_heads, sizes.experts)
    of_low = (sizes.heads * sizes.head_dim, sizes.index_heads * sizes.index_dim)
    others = {(d, d), (sizes.expert_width, d), (d, sizes.expert_width), (d, groups * rank)}
    return sorted({(n, d) for n in of_d} | {(n, low) for n in of_low} | others)


def odd_matrices(kind: str) -> list[tuple[int, int]]:
    """``ODD``, but columns of MXFP4 are a multiple of 32."""
    return [(n, -(-k // 32) * 32) if kind == "mxfp4" else (n, k) for n, k in ODD]
