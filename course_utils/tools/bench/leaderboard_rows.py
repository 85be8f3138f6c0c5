"""The rows of `course leaderboard`: every method at its usual and its neighbouring settings.

A method that lands later joins by a line here; a test asks for one of each. Groups have 32 or 64 weights,
which divide the widths of both models. What is most wanted comes first: what is interrupted goes on there.
"""

from typing import NamedTuple

PACKED, INT8, DECODED = "packed codes", "int8 products", "decoded, then float"


class Entry(NamedTuple):
    """A row to measure."""

    name: str
    spec: str  # as `course bench quantize` takes it
    stored: str
    kernel: str  # what multiplies
    algorithm: str  # how the codes are chosen
    small: bool = False  # for models below `LARGE` weights alone: hours on a larger one


LARGE = 30e6
ROWS = (
    Entry(
        "affine_w4g64", "affine:n_bits=4,group_size=64", "4 bits, groups of 64", PACKED, "nearest"
    ),
    Entry("affine_w8", "affine:n_bits=8,group_size=row", "8 bits, rows", PACKED, "nearest"),
    Entry("gptq_w4g64", "gptq:n_bits=4,group_size=64", "4 bits, groups of 64", PACKED, "GPTQ"),
    Entry("awq_w4g64", "awq:n_bits=4,group_size=64", "4 bits, groups of 64", PACKED, "AWQ"),
    Entry("hqq_w4g64", "hqq:n_bits=4,group_size=64", "4 bits, groups of 64", PACKED, "HQQ"),
    Entry("nf4", "nf4", "NF4 in blocks of 64, scales in 8 bits", PACKED, "nearest"),
    Entry("llm_int8", "llm_int8", "int8 rows and inputs, large inputs float", INT8, "nearest"),
    Entry("smoothquant", "smoothquant", "int8 rows and inputs", INT8, "SmoothQuant"),
    Entry(
        "affine_w4g32", "affine:n_bits=4,group_size=32", "4 bits, groups of 32", PACKED, "nearest"
    ),
    Entry("gptq_w4g32", "gptq:n_bits=4,group_size=32", "4 bits, groups of 32", PACKED, "GPTQ"),
    Entry("awq_w4g32", "awq:n_bits=4,group_size=32", "4 bits, groups of 32", PACKED, "AWQ"),
    Entry("hqq_w4g32", "hqq:n_bits=4,group_size=32", "4 bits, groups of 32", PACKED, "HQQ"),
    Entry(
        "affine_w3g64", "affine:n_bits=3,group_size=64", "3 bits, groups of 64", PACKED, "nearest"
    ),
    Entry("gptq_w3g64", "gptq:n_bits=3,group_size=64", "3 bits, groups of 64", PACKED, "GPTQ"),
    Entry("awq_w3g64", "awq:n_bits=3,group_size=64", "3 bits, groups of 64", PACKED, "AWQ"),
    Entry("hqq_w3g64", "hqq:n_bits=3,group_size=64", "3 bits, groups of 64", PACKED, "HQQ"),
    Entry(
        "affine_w2g64", "affine:n_bits=2,group_size=64", "2 bits, groups of 64", PACKED, "nearest"
    ),
    Entry("gptq_w2g64", "gptq:n_bits=2,group_size=64", "2 bits, groups of 64", PACKED, "GPTQ"),
    Entry("awq_w2g64", "awq:n_bits=2,group_size=64", "2 bits, groups of 64", PACKED, "AWQ"),
    Entry("hqq_w2g64", "hqq:n_bits=2,group_size=64", "2 bits, groups of 64", PACKED, "HQQ"),
    Entry(
        "ultra_low_w1g64",
        "ultra_low:n_bits=1,group_size=64",
        "signs, a scale for 64",
        PACKED,
        "nearest",
    ),
    Entry(
        "bitnet_rounded", "bitnet", "ternary, one scale, int8 inputs", INT8, "nearest, no training"
    ),
    Entry("affine_w4_row", "affine:n_bits=4,group_size=row", "4 bits, rows", PACKED, "nearest"),
    Entry("gguf_q4_0", "gguf:kind=Q4_0", "4 bits in GGUF's blocks of 32", DECODED, "nearest"),
    Entry("gguf_q8_0", "gguf:kind=Q8_0", "8 bits in GGUF's blocks of 32", DECODED, "nearest"),
    Entry("codebook_nf4", "codebook", "NF4 in blocks of 64, scales in 16 bits", DECODED, "nearest"),
    Entry("e8p", "e8p:compensate=True", "2 bits, E8 lattice", DECODED, "nearest, compensated"),
    Entry(
        "vector_w2",
        "vector:length=4,n_bits=8,hessian=full",
        "8 bits for 4 weights, codebook",
        DECODED,
        "k-means, compensated",
        small=True,
    ),
    Entry(
        "learned_w2g64",
        "learned_rounding:n_bits=2,group_size=64",
        "2 bits, groups of 64",
        PACKED,
        "learned rounding",
        small=True,
    ),
    Entry(
        "trellis_w2",
        "trellis:n_bits=2,state_bits=8,compensate=True",
        "2 bits, trellis",
        DECODED,
        "best path, compensated",
        small=True,
    ),
    Entry(
        "sparse_gptq",
        "sparse_gptq:n_bits=4,group_size=64",
        "half of the weights, 4 bits in groups of 64",
        DECODED,
        "GPTQ with pruning",
    ),
    Entry("sparsegpt", "sparsegpt", "half of the weights, float16", DECODED, "SparseGPT"),
    Entry("wanda", "wanda", "half of the weights, float16", DECODED, "Wanda"),
    Entry("magnitude", "magnitude", "half of the weights, float16", DECODED, "magnitude"),
)
