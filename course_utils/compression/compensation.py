"""The column loop: what changing a column costs, the columns that are still float make up for.

Algorithm 1 of GPTQ (Frantar et al. 2022, arXiv 2210.17323), for any way of changing columns: what they
become, `rounding` says. Built step by step in `chronology/gptq_demo`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# (first column, those columns [out, width], pending [out, n]) -> what they become, [out, width].
# `pending` are the errors of the n columns before, which the columns of later blocks still have to make up
# for: W[:, j] of such a column is W[:, j] - pending @ U[first - n : first, j] once they have.
Rounding = Callable[[int, Tensor, Tensor], Tensor]


@torch.no_grad()
def compensate(
    W: Tensor, U: Tensor, rounding: Rounding, *, width: int = 1, block_size: int = 128
) -> Tensor:
    """Change all columns of `W` `[out, in]`, first to last, `width` at a time; the errors E `[out, in]`.

    `U` `[in, in]` is the upper factor of the inverse Hessian, H^-1 = U^T U (`hessian.inverse_factor`).
    Columns i of a step that become Q leave the error E_i = (W_i - Q) U_ii^-1, and every later column j moves
    by -E_i U_ij: the least squares answer to it. The sum of E^2 is the trace of dW H dW^T, dW = W - Q.

    Within a block of `block_size` columns each step moves the columns up to the block's end; those behind it
    move once, when the block is done. `W` is changed in place, and `rounding` may look at it: it finds the
    columns behind its block as the blocks before have left them. Columns that lie in one piece of memory
    (`W.T` contiguous) are quickest. Raises ValueError if `width` does not divide the columns and blocks.
    """
    columns = W.shape[1]
    if columns % width or block_size % width:
        raise ValueError(
            f"steps of {width} columns do not divide both the {columns} columns and blocks of "
            f"{block_size}: choose a width that divides both"
        )
    E = torch.zeros_like(W)
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        block = W[:, start:stop].clone()  # [out, block], follows every step
        for i in range(start, stop, width):
            j = i + width
            w = block[:, i - start : j - start]  # [out, width]
            E_i = torch.sub(w, rounding(i, w, E[:, start:i]), out=E[:, i:j])
            _divide(E_i, U[i:j, i:j])
            block[:, j - start :].addmm_(E_i, U[i:j, j:stop], alpha=-1)
        W[:, stop:].addmm_(E[:, start:stop], U[start:stop, stop:], alpha=-1)
    return E


def _divide(E_i: Tensor, U_ii: Tensor) -> None:
    """`E_i` `[out, width]`, in place, times the inverse of the upper triangular `U_ii` `[width, width]`."""
    if len(U_ii) == 1:
        E_i.div_(U_ii)  # exact rounding, which a triangular solver need not give
    else:
        E_i.copy_(torch.linalg.solve_triangular(U_ii, E_i, upper=True, left=False))
