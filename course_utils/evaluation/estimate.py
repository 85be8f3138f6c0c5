"""A mean with its standard error, and how it is said.

Tokens are no independent trials: neighbours share a context, and those of one document a subject. The
error is therefore taken over whole documents, as clustered standard errors are (Miller 2024, "Adding
Error Bars to Evals", arXiv 2411.00640), and over calibration texts where those vary.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A mean, and the standard error that it has over `count` `units`.

    About 19 of 20 such means lie within 2 errors of the truth. With few units the error is itself
    uncertain, by a share of about 1 / sqrt(2 (count - 1)): 19% for 15 documents, 32% for 6 cuts.
    """

    value: float
    error: float
    count: int
    units: str

    @property
    def distinguished(self) -> bool:
        """Whether the value is at least 2 standard errors from 0."""
        return self.value != 0 and abs(self.value) >= 2 * self.error

    def __str__(self) -> str:
        return f"{with_error(self.value, self.error)} ({self.count} {self.units})"


def over_units(values: Tensor, unit: Tensor, units: str) -> Estimate:
    """Mean of `values` `[n]` with its error over the units: `unit` `[n]` says which each belongs to.

    Units may differ in size. With sums S_c of n_c values and the mean m = sum S_c / sum n_c, the squared
    error is C / (C - 1) times the sum over the C units of (S_c - m n_c)^2, over n^2. For units of one size
    that is the variance of their means over C. Raises `ValueError` for less than 2 units.
    """
    _, index = unit.unique(return_inverse=True)
    count = int(index.max()) + 1 if len(unit) else 0
    if count < 2:
        raise ValueError(f"an error over {count} {units}: at least 2 are needed, take more tokens.")
    sums = torch.zeros(count, dtype=torch.float64).index_add(0, index, values.double())
    sizes = index.bincount().double()
    mean = sums.sum() / len(values)
    squares = (sums - mean * sizes).square().sum() * count / (count - 1)
    return Estimate(mean.item(), squares.sqrt().item() / len(values), count, units)


def over_cuts(values: Sequence[float]) -> Estimate:
    """Mean and error of one value, measured with the model calibrated on one text after the other.

    The error says how far other calibration texts would move the mean. It does not hold the error over
    the evaluation's documents, which are the same for all cuts. To compare two methods give their
    differences, cut by cut. Raises `ValueError` for less than 2 values.
    """
    if len(values) < 2:
        raise ValueError(f"an error over {len(values)} calibration cuts: at least 2 are needed.")
    error = statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(statistics.fmean(values), error, len(values), "calibration cuts")


def format_difference(difference: Estimate, unit: str = "nats") -> str:
    """A difference as the course says it: "+0.123 ± 0.004 nats", and whether it is one at all."""
    said = f"{with_error(difference.value, difference.error, '+')} {unit}"
    return said if difference.distinguished else f"{said}, not distinguished from 0"


def with_error(value: float, error: float, sign: str = "") -> str:
    """Value ± error with one digit of the error, two if it begins with 1."""
    if error == 0:
        return f"{value:{sign}.4g} ± 0"
    exponent = math.floor(math.log10(error))
    decimals = max(0, -exponent + (error < 2 * 10**exponent))
    return f"{value:{sign}.{decimals}f} ± {error:.{decimals}f}"
