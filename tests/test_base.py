"""What every method's classes have to be: fields that are stored, statistics that are declared, layouts."""

import copy
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Optional

import pytest
import torch
from torch import Tensor

from course_utils.compression import Method, QuantizedLinear, QuantizedWeight, get_method
from course_utils.compression.embedding import Int8Rows
from course_utils.compression.hessian import Hessian
from course_utils.quantizers.affine import AffineWeight


@pytest.mark.parametrize(
    "kind", [list[Tensor], dict[str, Tensor], AffineWeight, AffineWeight | None, tuple[int, int], object]
)  # fmt: skip
def test_fields_that_would_be_neither_stored_nor_counted_are_refused(kind):
    """Nested weights and lists were passed over: not saved, and not among the bytes."""
    with pytest.raises(
        TypeError, match=r"Nested\.part is .* nothing would be stored or counted: make"
    ):
        type("Nested", (QuantizedWeight,), {"__annotations__": {"codes": Tensor, "part": kind}})


def test_tensors_numbers_and_texts_are_fields():
    @dataclass(frozen=True)
    class Fine(QuantizedWeight):
        codes: Tensor
        scale: Tensor | None
        other: Optional[Tensor]  # noqa: UP045
        kind: Literal["a", "b"]
        n_bits: "int"
        name: ClassVar[dict] = {}

    fine = Fine(torch.zeros(3), None, torch.zeros(2), "a", 4)
    assert set(fine.tensors()) == {"codes", "other"} and fine.nbytes == 20


def test_a_method_that_makes_statistics_has_to_say_that_it_wants_them():
    with pytest.raises(TypeError, match="Silent defines new_statistics, which nobody calls"):
        type("Silent", (Method,), {"new_statistics": lambda *_: None})


@pytest.mark.parametrize(
    ("name", "given", "wants"),
    [
        ("affine", {}, False), ("affine", {"inputs": "static", "group_size": "row"}, True),
        ("gguf", {}, False), ("gptq", {}, True), ("llm_int8", {}, False),
        ("smoothquant", {}, False), ("smoothquant", {"inputs": "static"}, True),
    ],
)  # fmt: skip
def test_asking_whether_a_method_wants_statistics_makes_none(name, given, wants, monkeypatch):
    """One feature's were made, to see whether there are any."""
    method = get_method(name, **given)
    monkeypatch.setattr(type(method), "new_statistics", None)
    assert method.wants_statistics is wants


# A kernel's own layout


def columns_first(weight: Int8Rows) -> Tensor:
    return weight.codes.T.contiguous()


def a_layer() -> QuantizedLinear:
    method = get_method("llm_int8")
    return QuantizedLinear(method, method.quantize(torch.randn(8, 6)), None)


def test_a_layout_is_made_once_never_stored_and_its_bytes_are_told():
    layer = a_layer()
    weight, state, made = layer.quantized_weight, layer.state_dict().keys(), []

    def recorded(weight: Int8Rows) -> Tensor:
        made.append(weight)
        return columns_first(weight)

    assert weight.layout_bytes == 0
    nbytes = weight.nbytes
    layout = weight.layout(recorded)
    layer(torch.randn(2, 6))
    assert layer.quantized_weight.layout(recorded) is layout and len(made) == 1
    assert weight.layout(lambda w: (w.codes, w.absmax))[0] is weight.codes
    assert weight.layout_bytes == 48 + 48 + 32 and weight.nbytes == nbytes
    assert layer.state_dict().keys() == state == {"codes", "absmax"}
    assert replace(weight, original=None).layout_bytes == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.to("meta"),
        lambda layer: layer.half(),
        lambda layer: layer.load_state_dict(a_layer().state_dict()),
        lambda layer: setattr(layer, "codes", a_layer().codes),
    ],
    ids=["device", "dtype", "state", "buffer"],
)
def test_a_layout_is_made_anew_when_the_weight_is_another(change):
    layer = a_layer()
    before = layer.quantized_weight.layout(columns_first)
    change(layer)
    after = layer.quantized_weight.layout(columns_first)
    assert after is not before and after.device == layer.codes.device
    if not after.is_meta:
        assert torch.equal(after, layer.codes.T)


def test_a_copied_layer_has_a_layout_of_its_own():
    layer = a_layer()
    layer.quantized_weight.layout(columns_first)
    copied = copy.deepcopy(layer)
    copied.codes.zero_()
    copied.load_state_dict(copied.state_dict())
    assert not copied.quantized_weight.layout(columns_first).any()
    assert torch.equal(layer.quantized_weight.layout(columns_first), layer.codes.T)


# Weights that are nearly too large or too small for float32


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e20, 3e36, 3.4e38])
@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("llm_int8", {}), ("smoothquant", {}),
        ("affine", {"n_bits": 8, "group_size": "row", "inputs": "per_token", "scale_dtype": "float32"}),
        ("affine", {"n_bits": 8, "scale_dtype": "float32", "group_size": 16, "symmetric": True}),
        ("gptq", {"n_bits": 8, "scale_dtype": "float32", "group_size": 16}),
    ],
)  # fmt: skip
def test_large_and_small_weights_decode_and_multiply(name, given, size):
    """127 times the absmax overflowed from 2.7e36 on, and so did a product of scales."""
    W = torch.rand(5, 16, generator=torch.Generator().manual_seed(0)).mul_(size)
    W[:, 0] = -size if size < 1e38 and name == "affine" and "symmetric" not in given else size
    x = torch.randn(7, 16, generator=torch.Generator().manual_seed(1)) * (
        1e-3 if size > 1e38 else 1
    )
    method, statistics = get_method(name, **given), None
    if method.wants_statistics:
        statistics = Hessian(16)
        statistics.update(torch.randn(200, 16))
    stored = method.quantize(W, statistics)
    decoded = stored.dequantize()
    torch.testing.assert_close(decoded / size, W / size, rtol=0, atol=0.05)
    expected = x.double() @ W.double().T
    error = (method.linear(x, stored, None).double() - expected).norm() / expected.norm()
    assert error < 0.05
    if statistics is not None:
        assert 0 <= method.output_error(W, decoded, statistics) < 1e-2


def test_a_grid_whose_end_overflows_is_refused():
    """Of 16 symmetric codes the lowest decodes to 16/15 of the largest weight."""
    W = torch.tensor([[-3.3e38, 0.0, 1.0, 2.0]])
    with pytest.raises(ValueError, match="is no finite float32 interval"):
        get_method("affine", symmetric=True, group_size="row", scale_dtype="float32").quantize(W)


def test_the_error_of_large_weights_is_a_number():
    from course_utils.compression.driver import quantize_layer
    from course_utils.models import LinearLayer

    layer = torch.nn.Linear(16, 5)
    layer.weight.data.mul_(1e36)
    _, report = quantize_layer(LinearLayer("large", layer), get_method("llm_int8"))
    assert 0 < report.weight_error < 1e-3
