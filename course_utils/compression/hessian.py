"""The Hessian of a layer's output error, from its inputs, and the factor of its inverse.

The error |W x - Q x|^2 of any row of W is a quadratic form in W - Q, and H = 2 E[x x^T] its matrix. GPTQ and
SparseGPT read from it how a weight that is still float can make up for one that was changed.
"""

import warnings

import torch
from torch import Tensor

from course_utils.compression.base import all_finite

STRIP = 192  # rows of the Hessian that are added to at once: small ones leave out more of its upper half


class Hessian:
    """H = 2/n sum x x^T over all n tokens x of a layer's inputs: of |W x - Q x|^2, in any row of W.

    Summed up in float64, the half below the diagonal only, since H is symmetric. The factor 2/n
    changes no code (unless some features are dead: the diagonal of those becomes 1, whatever the
    others are, as in the authors' code).
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu"):
        self.tokens = self.batches = self._complete = 0
        self._sum = torch.zeros(in_features, in_features, dtype=torch.float64, device=device)

    def update(self, x: Tensor) -> None:
        """Take in a batch of inputs `x` `[tokens, in]`; ValueError if some are NaN or infinite."""
        self.batches += 1
        if not all_finite(x):
            raise ValueError(
                f"calibration batch {self.batches}: {int((~x.isfinite()).sum())} of {x.numel()} "
                f"inputs are NaN or infinite in {x.dtype}. Repair the checkpoint, or load the model "
                "in a wider dtype."
            )
        x = x.double()
        for start in range(0, x.shape[1], STRIP):
            stop = start + STRIP
            self._sum[start:stop, :stop].addmm_(x[:, start:stop].T, x[:, :stop])
        self.tokens += len(x)

    def matrix(self) -> Tensor:
        """The Hessian (float64 `[in, in]`).

        Raises ValueError if there were no inputs, or none but zeros. Warns of fewer tokens than
        features: H is singular then, and what the calibration does not show, damping alone decides.
        """
        features = len(self._sum)
        if not self.tokens:
            raise ValueError(
                "the Hessian has seen no inputs: the calibration is empty, or the layer never ran. Give more "
                "calibration, or leave the layer out"
            )
        if not self._sum.diagonal().any():
            raise ValueError(
                f"all {self.tokens} calibration inputs are zero: nothing tells which weights "
                "matter. Look for what blocks the layer's inputs, or leave the layer out"
            )
        if self.tokens < features:
            warnings.warn(
                f"the Hessian of {features} features comes from {self.tokens} calibration tokens "
                "only, so it is singular and rests on its damping: give at least "
                f"{features} tokens, better 10 times as many",
                stacklevel=2,
            )
        return self._symmetric_sum() * (2 / self.tokens)

    def relative_error(self, weight: Tensor, approximation: Tensor) -> float:
        """|x W^T - x Q^T|^2 / |x W^T|^2 over all tokens seen: tr(dW H dW^T) / tr(W H W^T).

        Multiplied in float32, which is enough for reports, in units of the largest weight, whose square may
        be too large.
        """
        H = self._symmetric_sum().float()
        unit = weight.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
        parts = ((weight - approximation) / unit, weight / unit)
        error, power = (((m @ H) * m).sum().item() for m in parts)
        return error / power if power else 0.0

    def _symmetric_sum(self) -> Tensor:
        """The sum, with its upper half filled in if batches came since that was done."""
        if self._complete != self.tokens:
            self._sum.tril_().add_(self._sum.tril(-1).T)
            self._complete = self.tokens
        return self._sum


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor U of the damped Hessian's inverse: H^-1 = U^T U, `[in, in]`.

    Damping adds `damping` times the mean of the diagonal to the diagonal (0.01 in the paper). Row k
    of U holds all that column k needs: U[k, k]^2 and U[k, k:] U[k, k] are the head and the first row
    of the inverse of H[k:, k:], the Hessian of the columns that are still float.

    The authors invert H, and factorize the inverse. The same U is the inverse of the upper R with
    H = R R^T: one Cholesky factorization, from the last column to the first, instead of two.

    Raises ValueError if the damped Hessian is not positive definite in its dtype.
    """
    damped = hessian.flip(0, 1)
    damped.diagonal().add_(damping * hessian.diagonal().mean())
    lower, failed = torch.linalg.cholesky_ex(damped)  # R with its rows and columns turned round
    del damped
    if not failed:
        eye = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
        U = torch.linalg.solve_triangular(lower, eye, upper=False).flip(0, 1)
    if failed or not U.isfinite().all():
        raise ValueError(
            f"the Hessian {tuple(hessian.shape)} with damping {damping} is not positive definite in "
            f"{hessian.dtype}: raise the damping (the paper's is 0.01), or give more calibration tokens"
        )
    return U


def check_hessian(hessian: Tensor, columns: int) -> None:
    """Refuse a Hessian that is not that of a weight with so many columns, or not finite."""
    if hessian.shape != (columns, columns) or not hessian.is_floating_point():
        raise ValueError(
            f"the Hessian of a weight with {columns} columns is float [{columns}, {columns}], "
            f"got {hessian.dtype} {tuple(hessian.shape)}"
        )
    if not hessian.isfinite().all():
        raise ValueError(
            f"{int((~hessian.isfinite()).sum())} of {hessian.numel()} entries of the Hessian are NaN "
            "or infinite: look for such values in the calibration's activations"
        )
