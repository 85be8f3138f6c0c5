"""Codebooks: codes that stand for values which need not be evenly spaced.

NF4 is from Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314,
section 3, with the values of bitsandbytes; the 8-bit dynamic map, which its double quantization takes for
the absmax, from Dettmers 2016, arXiv 1511.04561. Built step by step in `chronology/nf4_demo`.
"""

from statistics import NormalDist

import torch
from torch import Tensor

# The published values. `normal_levels()` gives them to 2e-7: the quantile function's last digits differ
# from library to library, so the table is what is stored against.
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip

# Where the outermost quantiles lie: half way between those of 1/32 and 1/30 of the mass, one for each side.
OFFSET = 1 - (1 / 32 + 1 / 30) / 2


def normal_levels(offset: float = OFFSET) -> Tensor:
    """16 levels in -1..1 with an exact 0, by quantiles of the normal distribution, float32, ascending.

    8 positive ones and 7 negative ones, evenly spaced in probability from 1/2 to `offset` on each side, and
    divided by the largest. Raises ValueError for an offset outside 1/2..1.
    """
    if not 0.5 < offset < 1:
        raise ValueError(f"offset {offset}: a probability between 1/2 and 1, NF4's is {OFFSET:.7f}")
    quantile = NormalDist().inv_cdf
    positive = [quantile(offset + (0.5 - offset) * i / 8) for i in range(8)]
    negative = [-quantile(offset + (0.5 - offset) * i / 7) for i in range(7)]
    levels = torch.tensor(sorted([*negative, 0.0, *positive]), dtype=torch.float64)
    return (levels / levels.max()).float()


def dynamic_map() -> Tensor:
    """The 256 values of the signed 8-bit dynamic data type, float32, ascending.

    127 negative ones, 0, and 128 positive ones up to 1.0; the least is -0.99296875. Seven decades, each
    with twice as many values as the one below, evenly spaced between 0.1 and 1 of it.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        means = (edges[:-1] + edges[1:]) / 2
        values += (10.0 ** (decade - 6) * means).tolist()
        values += (-(10.0 ** (decade - 6)) * means).tolist()
    return torch.tensor(sorted(values))


def nearest_codes(x: Tensor, codebook: Tensor) -> Tensor:
    """The code (int32, as `x`) of the value of `codebook` `[n]`, ascending, that is nearest to each of `x`.

    A tie goes to the lower code. Compared are thresholds half way between neighbours, not distances.
    """
    thresholds = (codebook[:-1] + codebook[1:]) / 2
    return torch.bucketize(x, thresholds, out_int32=True)
