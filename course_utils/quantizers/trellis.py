"""Trellis codes: 256 weights as one path through a graph of states, found by Viterbi's algorithm.

QTIP (Tseng et al. 2024, arXiv 2406.11235) with its computed code 1MAD (`grids.trellis`): a tile of 16 by 16
weights is a sequence, each weight moves a window over the stored bits by `n_bits`, and the bits in the window
give its value. A dimension of 256 at the price of a scalar code: distortion comes closer to the limit of
2^(-2 bits) than with vectors of 8. Rows are scaled by their root mean square. The values suit numbers like
draws of a normal distribution, which QTIP makes of weights by a rotation first; this module does not.

Left out: tail-biting (a tile stores its first state, `state_bits` - `n_bits` bits more), two weights a step,
finetuning, and kernels: decoding is exact, and not fast. Built step by step in
`chronology/tpoti_two_bit_ladder`.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from course_utils.compression.base import QuantizedWeight, check_weight
from course_utils.compression.hessian import Hessian
from course_utils.compression.stepwise import HessianMethod, compensated, divisor, row_scale
from course_utils.grids.trellis import best_states, state_values, states_of, stream_of
from course_utils.kernels import pack, unpack

SIDE = 16  # of a tile, which is a sequence of 256


@dataclass(frozen=True)
class TrellisWeight(QuantizedWeight):
    """A stream of bits for each tile of 16 by 16 weights, and a scale a row."""

    codes: Tensor  # uint8 [out / 16, in / 16, bytes]
    scale: Tensor  # float16 or float32 [out]
    n_bits: int
    state_bits: int

    @property
    def shape(self) -> tuple[int, int]:
        return SIDE * self.codes.shape[0], SIDE * self.codes.shape[1]

    def states(self) -> Tensor:
        """The states (int64 `[out / 16, in / 16, 256]`) of the tiles, row after row of each."""
        length = self.state_bits + (SIDE * SIDE - 1) * self.n_bits
        return states_of(unpack(self.codes, 1, length), self.state_bits, self.n_bits)

    def dequantize(self) -> Tensor:
        """The weight `[out, in]` in float32: scale times the values of the states."""
        values = state_values(self.state_bits).to(self.codes.device)[self.states()]
        values = values.unflatten(2, (SIDE, SIDE)).transpose(1, 2)  # [out / 16, 16, in / 16, 16]
        return values.flatten(2).flatten(0, 1) * self.scale.float()[:, None]


@dataclass(frozen=True)
class Trellis(HessianMethod):
    """`n_bits` a weight through a trellis of 2^`state_bits` states; inputs stay float.

    `state_bits`: time grows with the number of states, and so does what a window can say; QTIP's is 16.
    `compensate`: tiles are chosen by the column loop of GPTQ, 16 columns a step, so that later columns make
    up for errors. As in QTIP, a step takes the nearest path, as if errors in its 16 columns counted alike and
    did not add up: where inputs differ much or go together within a step, the loop can lose by it. It takes
    calibration. `damping`: share of the Hessian's mean diagonal that is added to it. `scale_dtype`: how the
    rows' scales are stored.
    """

    n_bits: int = 2
    state_bits: int = 10
    compensate: bool = False
    damping: float = 0.01
    scale_dtype: Literal["float16", "float32"] = "float16"
    name: ClassVar[str] = "trellis"
    weight_type: ClassVar[type] = TrellisWeight

    def __post_init__(self):
        if type(self.n_bits) is not int or self.n_bits not in range(1, 5):
            raise ValueError(f"n_bits {self.n_bits!r}: choose 1 to 4")
        state_values(self.state_bits)  # refuses what is no number of bits
        if self.state_bits <= self.n_bits:
            raise ValueError(
                f"state_bits {self.state_bits} with n_bits {self.n_bits}: a window has to keep some of the "
                "bits before; choose more state_bits"
            )
        if type(self.compensate) is not bool:
            raise ValueError(f"compensate {self.compensate!r}: choose True or False")
        if not 0 <= self.damping < float("inf"):
            raise ValueError(f"damping {self.damping} must be 0 or positive; GPTQ's is 0.01")
        if self.scale_dtype not in ("float16", "float32"):
            raise ValueError(f"scale_dtype {self.scale_dtype!r}: choose one of float16, float32")

    @property
    def uses_hessian(self) -> bool:
        """With `compensate`."""
        return self.compensate

    def check_shape(self, out: int, columns: int) -> None:
        """Refuse a weight that tiles of 16 by 16 do not cover."""
        if out % SIDE or columns % SIDE:
            raise ValueError(
                f"tiles of {SIDE} by {SIDE} do not cover a weight [{out}, {columns}]: leave this layer to "
                "another method"
            )

    def quantize(self, weight: Tensor, statistics: Hessian | None = None) -> TrellisWeight:
        """The best streams for `weight` `[out, in]`."""
        check_weight(weight)
        self.check_shape(*weight.shape)
        self.check_statistics(statistics)
        scale = row_scale(weight, self.scale_dtype)
        by = divisor(scale)  # [out, 1]
        values = state_values(self.state_bits).to(weight.device)
        out, columns = weight.shape
        shape = out // SIDE, columns // SIDE
        states = torch.empty(*shape, SIDE * SIDE, dtype=torch.long, device=weight.device)

        def choose(i: int, w: Tensor, metric: Tensor | None = None) -> Tensor:
            """Tiles of the columns from i on; `w` `[out, some of them]`."""
            tiles = (w / by).view(shape[0], SIDE, -1, SIDE).transpose(1, 2).flatten(2)
            found = best_states(tiles.flatten(0, 1), values, self.n_bits).view(tiles.shape)
            states[:, i // SIDE : i // SIDE + tiles.shape[1]] = found
            chosen = values[found].unflatten(2, (SIDE, SIDE)).transpose(1, 2)
            return chosen.reshape(w.shape) * by

        if self.compensate:
            compensated(weight, statistics, choose, width=SIDE, damping=self.damping)
        else:
            choose(0, weight.float())
        stream = stream_of(states.flatten(0, 1), self.state_bits, self.n_bits)
        codes = pack(stream, 1).view(*shape, -1)
        return TrellisWeight(codes, scale, self.n_bits, self.state_bits)
