"""The one shape of every quantization method: `QuantizedWeight`, `Method`, `QuantizedLinear`."""

from dataclasses import dataclass, fields, replace
from typing import ClassVar, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_utils.models.walk import BlockInputs


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight `[out, in]` as it is stored: packed integer codes and all that decoding needs.

    A method derives its own from this; every field that is a tensor is stored, and counted.
    """

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    @property
    def nbytes(self) -> int:
        """Bytes stored: the sum over `tensors()`, scales and all."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight that this stands for."""
        raise NotImplementedError

    @property
    def bits_per_weight(self) -> float:
        """Measured, not nominal: stored bits over the number of weights."""
        out, columns = self.shape
        return 8 * self.nbytes / (out * columns)

    def dequantize(self) -> Tensor:
        """The weight `[out, in]` in float32 that the stored codes stand for."""
        raise NotImplementedError


class Statistics(Protocol):
    """What a method wants to know of a layer's inputs, gathered in one pass over the calibration."""

    def update(self, x: Tensor) -> None:
        """Take in the inputs `x` `[tokens, in]` of one calibration sequence."""


class Method:
    """A quantization method with its settings: a frozen dataclass derived from this.

    Its `name` is that of its module in `course_utils.quantizers`, by which `get_method` finds it. The
    fields of the dataclass are the settings, and are what is saved with a model. `quantize` and `linear`
    are all that a method must define.
    """

    name: ClassVar[str]
    weight_type: ClassVar[type[QuantizedWeight]]
    # Whose outputs a block gets while its statistics are gathered: those of the blocks before it as
    # they were, or as they are once quantized.
    prefix: ClassVar[Literal["quantized", "float"]] = "quantized"

    def check_shape(self, out: int, columns: int) -> None:
        """Refuse a weight `[out, columns]` that the settings do not fit; here none.

        Called for every layer before the first is touched.
        """

    def prepare(self, block: nn.Module, inputs: BlockInputs) -> None:
        """Rewrite a decoder block in place without changing its float function; here nothing.

        Called once a block, before the statistics of its layers are gathered.
        """

    def new_statistics(self, in_features: int, device: torch.device) -> Statistics | None:
        """Empty statistics for one layer, or None (here) if `quantize` needs none."""
        return None

    def quantize(self, weight: Tensor, statistics: Statistics | None = None) -> QuantizedWeight:
        """Codes of a float `weight` `[out, in]`, given the statistics of its layer's inputs."""
        raise NotImplementedError

    def output_error(
        self, weight: Tensor, approximation: Tensor, statistics: Statistics
    ) -> float | None:
        """|x W^T - x Q^T|^2 / |x W^T|^2 over the calibration, Q the `approximation` `[out, in]`.

        None (here) if the statistics do not tell: then it is measured.
        """
        return None

    def linear(self, x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
        """`x @ weight.T + bias` for `x` `[tokens, in]`, in the dtype of `x`: how inputs are treated."""
        raise NotImplementedError

    @property
    def rewrites_blocks(self) -> bool:
        """Whether it has a `prepare` of its own."""
        return type(self).prepare is not Method.prepare

    @property
    def wants_statistics(self) -> bool:
        """Whether `quantize` needs statistics of the layer's inputs."""
        return self.new_statistics(1, torch.device("cpu")) is not None

    @property
    def needs_calibration(self) -> bool:
        """Whether it looks at inputs before it quantizes: it rewrites blocks, or wants statistics."""
        return self.rewrites_blocks or self.wants_statistics


def check_weight(weight: Tensor) -> None:
    """Refuse what no method can quantize: not a matrix, empty, not float, NaN or infinite."""
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(
            f"a weight is a matrix [out, in] with no empty side, got {tuple(weight.shape)}"
        )
    if not weight.is_floating_point():
        raise TypeError(
            f"a weight to quantize is float, got {weight.dtype}: is it quantized already?"
        )
    bad = ~weight.float().isfinite()
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        raise ValueError(
            f"{int(bad.sum())} of {weight.numel()} weights are not finite in float32, the first is "
            f"{weight[row, column].item()} at [{row}, {column}]: repair the checkpoint."
        )


def check_switches(method: Method) -> None:
    """Refuse settings that are on or off, and got neither: the text "false" would be on."""
    for field in fields(method):
        value = getattr(method, field.name)
        if field.type is bool and type(value) is not bool:
            raise ValueError(f"{field.name} {value!r}: choose True or False")


def all_finite(x: Tensor) -> bool:
    """Whether no value is NaN or infinite.

    Either would be in the sum, which takes a fraction of the time. A sum can also overflow: then each
    value is looked at.
    """
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())


def dequantized_linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """`x @ W.T + bias` with the decoded weight, for `x` `[tokens, in]`, in the dtype of `x`.

    Weight and bias take that dtype here, since what is stored does not follow the model's
    (`QuantizedLinear`).
    """
    return F.linear(x, weight.dequantize().to(x.dtype), None if bias is None else bias.to(x.dtype))


class QuantizedLinear(nn.Module):
    """A linear layer that holds a `QuantizedWeight` and nothing of the float weight."""

    def __init__(self, method: Method, weight: QuantizedWeight, bias: Tensor | None):
        super().__init__()
        self.method = method
        self._stored = tuple(weight.tensors())
        self._layout = replace(weight, **dict.fromkeys(self._stored))  # all but the tensors
        self.out_features, self.in_features = weight.shape
        for name, tensor in weight.tensors().items():
            self.register_buffer(name, tensor)
        self.register_buffer("bias", bias)

    @property
    def quantized_weight(self) -> QuantizedWeight:
        """The weight, over the module's own buffers (so it follows `.to(device)`)."""
        return replace(self._layout, **{name: getattr(self, name) for name in self._stored})

    def _apply(self, fn, recurse: bool = True):
        """Follow the model to its device, but not to its dtype: scales are what the method stored."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)

    def forward(self, x: Tensor) -> Tensor:
        """`x` `[..., in]` to `[..., out]`."""
        if x.shape[-1:] != (self.in_features,) or not x.is_floating_point():
            raise ValueError(
                f"inputs of this layer are float [..., {self.in_features}], got {x.dtype} {tuple(x.shape)}"
            )
        flat = x.reshape(-1, self.in_features)
        y = self.method.linear(flat, self.quantized_weight, self.bias)
        return y.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        bits = self.quantized_weight.bits_per_weight
        return f"{self.in_features}, {self.out_features}, {bits:.3f} bits per weight, {self.method}"


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer."""

    name: str
    shape: tuple[int, int]
    bits_per_weight: float
    nbytes: int
    weight_error: float  # |W - Q(W)|^2 / |W|^2, with W as `prepare` left it
    # |x W^T - Q(x) Q(W)^T|^2 / |x W^T|^2 on the calibration tokens, if there were any; without bias
    output_error: float | None
    seconds: float  # taken by the method's `quantize`
