"""How alike two representations are: linear CKA, whatever their widths and axes are.

Kornblith and others, arXiv 1905.00414. Used by `distillation/feature_distillation`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment of `x` `[n, p]` and `y` `[n, q]`, rows of the same n examples.

    ||Y'X||^2 / (||X'X|| ||Y'Y||) with centred columns and Frobenius norms: 1 for a rotated or scaled
    copy, and near 0 for unrelated ones while n is much larger than both widths. Computed in double.
    Raises `ValueError` for other shapes, and for a representation that is the same for all examples.
    """
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise ValueError(
            f"representations {tuple(x.shape)} and {tuple(y.shape)} have to be [examples, width], of "
            "the same examples"
        )
    x, y = (z.double() - z.double().mean(0) for z in (x, y))
    own = [torch.linalg.matrix_norm(z.T @ z) for z in (x, y)]
    if min(own) == 0:
        raise ValueError(
            "a representation is the same for all examples: there is nothing to compare"
        )
    return (torch.linalg.matrix_norm(y.T @ x) ** 2 / (own[0] * own[1])).item()


def cka_map(rows: Sequence[Tensor], columns: Sequence[Tensor]) -> Tensor:
    """`linear_cka` of each of `rows` with each of `columns`: `[len(rows), len(columns)]`.

    Each is `[..., width]`, and all hold the same examples.
    """
    flat = [[z.detach().flatten(0, -2).cpu() for z in side] for side in (rows, columns)]
    return torch.tensor([[linear_cka(x, y) for y in flat[1]] for x in flat[0]])
