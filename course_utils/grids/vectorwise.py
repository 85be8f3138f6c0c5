"""The vector-wise int8 grid: each row of a matrix by its largest magnitude.

Dettmers et al. 2022, arXiv 2208.07339, sections 3.1 and 3.2. Built step by step in
`chronology/llm_int8_demo`. Codes and row statistics are bit for bit those of bitsandbytes.
"""

import torch
from torch import Tensor


def vectorwise_quantize(x: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Absmax int8 quantization of each row of `x` `[rows, columns]`.

    Returns the codes (int8 `[rows, columns]`, -127..127, rounded half to even), the rows' absmax
    (float32 `[rows]`), and the outlier columns (int64). With a positive `threshold`, an entry of
    magnitude >= threshold is an outlier and its column an outlier column: absmax is taken without the
    outlier entries, and the codes of outlier columns are 0. A row whose absmax is 0, or so small that
    127 / absmax overflows float32 (below 3.8e-37), has codes 0.
    """
    x = x.float()
    outliers = torch.empty(0, dtype=torch.int64, device=x.device)
    if threshold > 0:
        is_outlier = x.abs() >= threshold
        outliers = is_outlier.any(0).nonzero().flatten()
        x = x.masked_fill(is_outlier, 0)
    absmax = x.abs().amax(1)
    inverse = 127 / absmax
    inverse = torch.where(inverse.isfinite(), inverse, 0)[:, None]
    codes = (x * inverse).round().to(torch.int8)
    codes[:, outliers] = 0
    return codes, absmax, outliers
