"""Of rooms whose tests would take compute-sanitizer too long: the few that `--small` keeps (gpu_session.py).

Together they start every kernel of the room in each of its forms: formats, types, tiles, widths, blocks that
work alone or in clusters. The sanitizer looks at accesses, not at values, so one case of a form says what
many would; most of a run's time goes to the references and comparisons around the kernels.
"""

# File -> test function -> the cases that are kept, by their ids; none stands for all of them.
Chosen = dict[str, dict[str, tuple[str, ...]]]

FORMATS = ("nvfp4", "mxfp4", "fp8", "bf16")
PAIRS = (*zip(FORMATS, FORMATS, strict=True), ("mxfp4", "fp8"), ("bf16", "nvfp4"))  # of experts

GEMM: Chosen = {
    "test_gemm.py": {
        "test_exact": FORMATS,  # 1 to 32 tokens, parts of the columns, ends of tiles
        "test_activations": ("nvfp4-nvfp4-tiny",),  # scales of tokens
        "test_stack_of_everything": ("7-nvfp4", "32-bf16"),
        "test_grouped_linear": ("nvfp4-nvfp4-tiny", "bf16-fp8-tiny"),
    },
    "test_gemm_bits.py": {
        "test_more_tokens_are_reproducible": tuple(f"{t}-{kind}" for t in (16, 32) for kind in FORMATS),
        "test_every_scale_and_code": ("1", "8"),
    },
    "test_gemm_tiles.py": {
        "test_exact": tuple(f"{kind}-257" for kind in FORMATS),  # small and medium tiles
        "test_bits": tuple(f"{kind}-4001" for kind in FORMATS),  # large ones
        "test_against_fp32": ("nvfp4-tiny-5",),  # scales of tokens, bf16 results
        "test_odd_groups": ("nvfp4", "fp8"),
        "test_strides": ("nvfp4",),
    },
}
MOE: Chosen = {
    "test_moe.py": {
        "test_against_reference": tuple(f"tiny-{a}-{b}" for a, b in PAIRS),
        "test_slots": ("40-256",),  # tokens in parts
        "test_divided_inner_widths": ("nvfp4-nvfp4", "nvfp4-fp8"),  # blocks of down in clusters
    },
    "test_moe_tiles.py": {
        "test_group_by_expert": ("tiny-spread",),
        "test_exact": tuple(f"{kind}-skewed" for kind in FORMATS),  # narrow and large tiles
        "test_against_fp32": ("nvfp4-tiny-40",),  # scales of tokens, bf16 results
        "test_swiglu_pairs": ("7-10.0",),
        "test_sum_slots": ("7-dtype0", "7-dtype1"),
    },
}
SAMPLING: Chosen = {
    "test_sampling.py": {
        "test_the_smallest_and_the_largest_random_number": (),
        "test_vocabulary": ("ties",),
        "test_odd_vocabularies": ("1", "1025", "131073"),
    },
    "test_sampling_head.py": {
        "test_argmax_head": ("tiny",),
        "test_ties_and_odd_sizes": ("1-8", "15-64", "17-72", "1000-520", "33-8192", "4231-1000"),
        "test_rows_that_only_rounding_tells_apart": ("256",),  # many rows are left
    },
}
COMPRESSOR: Chosen = {
    "test_compressor.py": {
        "test_compress_kv": ("csa4x512-9-bf16", "csa4x128-9-f32", "hca128x512-137-bf16", "hca128x512-3-f32"),
        "test_the_same_call_gives_the_same_bits": (),  # odd sizes too
    },
}
QUANT: Chosen = {
    "test_quant.py": {
        # Many rows; rows that a block has in registers; rows that it reads twice.
        "test_nvfp4": tuple(
            f"{case}-{t}" for case in ("tiny-4001", "flash-7", "pro-7") for t in ("bf16", "f32")
        ),
        "test_global_scale_of_any_width": ("shape0-bf16", "shape2-f32", "shape3-bf16"),
        "test_fp8": ("flash-7-bf16", "tiny-7-f32"),
        "test_fp8_of_any_width": (
            "1-16-bf16",
            "200-48-f32",
            "448-64-bf16",
            "528-128-f32",
            "10000-1000-bf16",
        ),
        "test_hadamard": ("32-7-bf16", "64-7-f32", "128-7-bf16", "256-7-f32"),
    },
}
ATTENTION: Chosen = {
    # Whole layers, and a million rows: nothing that the kernels' own tests do not start.
    "test_attention_layer.py": {},
    "test_attention_needle.py": {},
    "test_attention_prefill.py": {
        "test_against_reference": ("wgmma-tiny-1", "tiles-tiny-5", "small tiles-tiny-1"),
        "test_odd_heads": ("wgmma-65", "tiles-16", "small tiles-17"),
        "test_both_limits": (),
    },
    "test_attention_step.py": {
        "test_contexts": tuple(
            f"tiny-{case}" for case in ("window-records", "CSA, chosen-bf16", "CSA, all-f32", "HCA-records")
        ),
        "test_both_sizes_of_clusters": ("records-8", "bf16-16"),
        "test_few_heads": (),
    },
}
CHOSEN: Chosen = GEMM | MOE | SAMPLING | COMPRESSOR | QUANT | ATTENTION


def is_chosen(file: str, name: str) -> bool | None:
    """Whether a file's test "test_a" or "test_a[case]" is kept; None where this table does not say."""
    if file not in CHOSEN:
        return None
    function, _, case = name.partition("[")
    cases = CHOSEN[file].get(function)
    return cases is not None and (not cases or case.removesuffix("]") in cases)
