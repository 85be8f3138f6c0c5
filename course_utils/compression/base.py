"""The one shape of every quantization method: `QuantizedWeight`, `Method`, `QuantizedLinear`."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from inspect import get_annotations
from types import NoneType, UnionType
from typing import ClassVar, Literal, Protocol, TypeVar, Union, get_args, get_origin

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_utils.kernels import GroupedCodes, grouped_linear
from course_utils.models.walk import BlockInputs

Layout = TypeVar("Layout", Tensor, tuple[Tensor, ...])
STORABLE = {Tensor, NoneType, bool, int, float, str}  # tensors, and what JSON holds


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight `[out, in]` as it is stored: packed integer codes and all that decoding needs.

    A method derives its own from this; every field that is a tensor is stored, and counted. The other
    fields are numbers, texts and None, which are described in JSON.
    """

    def __init_subclass__(cls, **kwargs):
        """Refuse fields that would be neither stored nor counted: lists, nested weights."""
        super().__init_subclass__(**kwargs)
        for name, kind in get_annotations(cls, eval_str=True).items():
            if bad := _not_storable(kind):
                raise TypeError(
                    f"{cls.__name__}.{name} is {kind}, but of {bad} nothing would be stored or counted: make "
                    "each tensor a field of its own, and all else a number, a text or None"
                )

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

    def grouped(self) -> GroupedCodes | None:
        """The same codes as `kernels.grouped_linear` takes them; None (here) where it does not.

        They stand for exactly the values of `dequantize`.
        """
        return None

    @cached_property
    def kernel_codes(self) -> GroupedCodes | None:
        """`grouped()`, made when first asked for and kept: its checks take as long as a small product."""
        return self.grouped()

    def layout(self, make: Callable[["QuantizedWeight"], Layout]) -> Layout:
        """`make(self)`, made when first asked for and then kept: a kernel's own layout of the weight.

        It is never stored, and not part of `nbytes`: `layout_bytes` tells what it takes. A `QuantizedLinear`
        keeps it as long as it holds these very tensors, so each device gets its own.
        """
        layouts = vars(self).setdefault("_layouts", {})
        if make not in layouts:
            layouts[make] = make(self)
        return layouts[make]

    @property
    def layout_bytes(self) -> int:
        """Bytes of the layouts that kernels have asked for so far."""
        made = vars(self).get("_layouts", {}).values()
        tensors = [
            t for layout in made for t in ([layout] if isinstance(layout, Tensor) else layout)
        ]
        return sum(t.numel() * t.element_size() for t in tensors)


def _not_storable(kind: object) -> object | None:
    """The part of a field's type that is no tensor and no value of JSON, or None."""
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        return next(filter(None, map(_not_storable, get_args(kind))), None)
    stored = kind in STORABLE or origin is Literal or origin is ClassVar or kind is ClassVar
    return None if stored else kind


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

    def __init_subclass__(cls, **kwargs):
        """Refuse a method that makes statistics, and does not say that it wants them."""
        super().__init_subclass__(**kwargs)
        makes = cls.new_statistics is not Method.new_statistics
        if makes and cls.wants_statistics is Method.wants_statistics:
            raise TypeError(
                f"{cls.__name__} defines new_statistics, which nobody calls: say in wants_statistics, a "
                "property or class variable, when `quantize` needs them"
            )

    def for_layer(self, name: str) -> "Method":
        """The method for the layer `name` (dotted path in the model); here itself for all.

        Blocks are rewritten by the method that was asked for; this one is given the layer's statistics,
        quantizes it, and is saved with it.
        """
        return self

    def check_shape(self, out: int, columns: int) -> None:
        """Refuse a weight `[out, columns]` that the settings do not fit; here none.

        Called for every layer before the first is touched.
        """

    def check_block(self, block: nn.Module) -> None:
        """Refuse a decoder block that `prepare` cannot rewrite; here none.

        Called for every block that is to be rewritten, before the first is touched.
        """

    def prepare(self, block: nn.Module, inputs: BlockInputs) -> None:
        """Rewrite a decoder block in place without changing its float function; here nothing.

        Called once a block, before the statistics of its layers are gathered.
        """

    @property
    def wants_statistics(self) -> bool:
        """Whether `quantize` needs statistics of the layer's inputs; here not."""
        return False

    def new_statistics(self, in_features: int, device: torch.device) -> Statistics:
        """Empty statistics for one layer; called if `wants_statistics` says so."""
        raise NotImplementedError

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
        """`x @ weight.T + bias` for `x` `[tokens, in]`, in the dtype of `x`: how inputs are treated.

        It needs no gradient of its own: `QuantizedLinear` gives it that of the decoded weight.
        """
        raise NotImplementedError

    @property
    def rewrites_blocks(self) -> bool:
        """Whether it has a `prepare` of its own."""
        return type(self).prepare is not Method.prepare

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


def check_settings(method: Method, *, wide_groups: tuple[str, ...]) -> None:
    """Refuse settings of a method on a uniform grid that no such grid has.

    What is on or off is a bool (the text "false" would be on), `n_bits` is 2 to 8, a `group_size` that is no
    number is one of `wide_groups`, and `scale_dtype` is float16 or float32.
    """
    settings = {field.name: getattr(method, field.name) for field in fields(method)}
    for field in fields(method):
        if field.type is bool and type(settings[field.name]) is not bool:
            raise ValueError(f"{field.name} {settings[field.name]!r}: choose True or False")
    n_bits, size, dtype = (settings[name] for name in ("n_bits", "group_size", "scale_dtype"))
    if type(n_bits) is not int or n_bits not in range(2, 9):
        raise ValueError(f"n_bits {n_bits!r}: choose 2 to 8")
    if size not in wide_groups and not (type(size) is int and size > 0):
        names = " or ".join(map(repr, wide_groups))
        raise ValueError(f"group_size {size!r}: choose a positive number or {names}")
    if dtype not in ("float16", "float32"):
        raise ValueError(f"scale_dtype {dtype!r}: choose one of float16, float32")


def all_finite(x: Tensor) -> bool:
    """Whether no value is NaN or infinite.

    Either would be in the sum, which takes a fraction of the time. A sum can also overflow: then each
    value is looked at.
    """
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())


def dequantized_linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """`x @ W.T + bias` with the values of the codes, for `x` `[tokens, in]`, in the dtype of `x`.

    Kernels read the packed codes where they can (`kernels.backend`). Elsewhere weight and bias take the
    dtype of `x` here, since what is stored does not follow the model's (`QuantizedLinear`).
    """
    if (codes := weight.kernel_codes) is not None:
        return grouped_linear(x, codes, bias)
    return F.linear(x, weight.dequantize().to(x.dtype), None if bias is None else bias.to(x.dtype))


Multiply = Callable[[Tensor, QuantizedWeight, Tensor | None], Tensor]


def with_decoded_gradient(
    multiply: Multiply, x: Tensor, weight: QuantizedWeight, bias: Tensor | None
) -> Tensor:
    """`multiply(x, weight, bias)` `[tokens, out]`, with the gradients of `x @ W.T + bias`, W decoded.

    Rounded inputs have no gradient worth the name; that of the decoded weight is bitsandbytes' as well. The
    weight is decoded again in the backward pass: what waits for it is the packed weight alone.
    """
    if not torch.is_grad_enabled():  # around a small layer, autograd's function costs more than it
        return multiply(x, weight, bias)
    return _DecodedGradient.apply(multiply, weight, x, bias, *weight.tensors().values())


class _DecodedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, multiply: Multiply, weight: QuantizedWeight, x: Tensor, bias, *stored: Tensor):
        ctx.names = tuple(weight.tensors())
        ctx.bare = replace(weight, **dict.fromkeys(ctx.names))
        ctx.save_for_backward(*stored)
        return multiply(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        of_x = of_bias = None
        _, _, x_needs, bias_needs, *_ = ctx.needs_input_grad
        if x_needs:
            weight = replace(ctx.bare, **dict(zip(ctx.names, ctx.saved_tensors, strict=True)))
            of_x = gradient @ weight.dequantize().to(gradient.dtype)  # [tokens, in]
        if bias_needs:
            of_bias = gradient.sum(0)
        return None, None, of_x, of_bias, *(None for _ in ctx.names)


def keeping_dtype(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`fn`, as a module's `.to()` applies it to each tensor, but for a change of dtype."""

    def move(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

    return move


class QuantizedLinear(nn.Module):
    """A linear layer that holds a `QuantizedWeight` and nothing of the float weight."""

    def __init__(self, method: Method, weight: QuantizedWeight, bias: Tensor | None):
        super().__init__()
        self.method = method
        self._stored = tuple(weight.tensors())
        self._weight = replace(weight, **dict.fromkeys(self._stored))  # all but the tensors
        self.out_features, self.in_features = weight.shape
        for name, tensor in weight.tensors().items():
            self.register_buffer(name, tensor)
        self.register_buffer("bias", bias)

    @property
    def quantized_weight(self) -> QuantizedWeight:
        """The weight, over the module's own buffers (so it follows `.to(device)`)."""
        now = {name: self._buffers[name] for name in self._stored}
        # The same one as before, and so with the layouts that kernels have made of it, while it holds.
        if any(getattr(self._weight, name) is not tensor for name, tensor in now.items()):
            self._weight = replace(self._weight, **now)
        return self._weight

    def _forget(self) -> None:
        """Hold no tensors beside the buffers, which are about to change."""
        self._weight = replace(self._weight, **dict.fromkeys(self._stored))

    def _apply(self, fn, recurse: bool = True):
        """Follow the model to its device, but not to its dtype: scales are what the method stored."""
        self._forget()
        return super()._apply(keeping_dtype(fn), recurse)

    def _load_from_state_dict(self, *args, **kwargs):
        self._forget()
        super()._load_from_state_dict(*args, **kwargs)

    def __getattr__(self, name: str):
        if name == "weight":
            raise AttributeError(
                "a quantized layer holds no float weight, and this code reads it: leave the layer float by a "
                "mapping of layers to methods, or decode it by quantized_weight.dequantize()"
            )
        return super().__getattr__(name)

    def forward(self, input: Tensor | None = None, *, x: Tensor | None = None) -> Tensor:
        """`[..., in]` to `[..., out]`; `nn.Linear` calls its argument `input`, and `Conv1D` `x`."""
        x = input if x is None else x
        if x.shape[-1:] != (self.in_features,) or not x.is_floating_point():
            raise ValueError(
                f"inputs of this layer are float [..., {self.in_features}], got {x.dtype} {tuple(x.shape)}"
            )
        flat = x.reshape(-1, self.in_features)
        y = with_decoded_gradient(self.method.linear, flat, self.quantized_weight, self.bias)
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
    # |x W^T - Q(x) Q(W)^T|^2 / |x W^T|^2 on the calibration tokens, without bias; None where it was not
    # measured: without calibration, or if the layer never ran on it
    output_error: float | None
    seconds: float  # taken by the method's `quantize`
