"""The Triton product against the torch reference: under its interpreter, or on a GPU; and what is refused."""

import pytest
import torch

from course_utils.grids.codebook import NF4
from course_utils.kernels import GroupedCodes, backend, grouped_linear, pack
from course_utils.kernels import triton_grouped as module
from course_utils.kernels.grouped import PREFILL
from course_utils.kernels.triton_grouped import triton_linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(module.triton is None, reason="triton is not installed")


def a_weight(out, groups, width, n_bits, codebook=None, high_first=False):
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(2**n_bits, (out, groups * width), generator=draw)
    scale = torch.rand(out, groups, generator=draw) + 0.1
    zero = torch.rand(out, groups, generator=draw) * 2**n_bits if codebook is None else None
    parts = [None if t is None else t.to(DEVICE) for t in (pack(codes, n_bits), scale, zero)]
    return GroupedCodes(*parts, codebook, n_bits, groups * width, high_first)


@needs_triton
@pytest.mark.parametrize("n_bits", [2, 4, 8])
@pytest.mark.parametrize("shape", [(1, 1, 32), (17, 2, 64), (16, 3, 32), (33, 1, 256), (5, 2, 128)])
@pytest.mark.parametrize("tokens", [1, 3])
def test_the_triton_product_is_the_reference(shape, n_bits, tokens):
    weight = a_weight(*shape, n_bits)
    x = torch.randn(tokens, weight.columns, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    exact = x.double() @ weight.dequantize().double().T
    found = triton_linear(x, weight)
    assert found.shape == (tokens, shape[0])
    assert (found - exact).norm() / exact.norm() < 1e-5


@needs_triton
def test_it_keeps_the_dtype_and_takes_no_token():
    weight = a_weight(4, 1, 64, 4)
    x = torch.randn(3, 64, device=DEVICE)
    found = triton_linear(x.bfloat16(), weight)
    assert found.dtype == torch.bfloat16
    assert triton_linear(x[:0], weight).shape == (0, 4)
    assert torch.equal(triton_linear(x.T.contiguous().T, weight), triton_linear(x, weight))


@needs_triton
@pytest.mark.parametrize(
    ("weight", "x", "message"),
    [
        ((2, 1, 64, 4), (1, 32), r"inputs are float \[tokens, 64\], got torch.float32 \(1, 32\)"),
        ((2, 1, 64, 3), (1, 64), "no Triton code for 3 bits in groups of 64: use grouped_linear"),
        ((2, 1, 48, 4), (1, 48), "no Triton code for 4 bits in groups of 48"),
        ((2, 1, 64, 4, NF4), (1, 64), "no Triton code for a codebook"),
        ((2, 1, 64, 4, None, True), (1, 64), "no Triton code for high_first"),
    ],
)
def test_what_it_has_no_code_for_is_refused(weight, x, message):
    with pytest.raises(ValueError, match=message):
        triton_linear(torch.randn(*x, device=DEVICE), a_weight(*weight))


@needs_triton
def test_integers_are_refused():
    with pytest.raises(ValueError, match=r"inputs are float .* got torch.int64"):
        triton_linear(torch.ones(1, 64, dtype=torch.int64, device=DEVICE), a_weight(2, 1, 64, 4))


@needs_triton
@pytest.mark.parametrize("inputs", ["float", "int8"])
def test_the_dispatch_takes_triton_on_request_for_few_inputs(monkeypatch, inputs):
    weight, x = a_weight(5, 2, 64, 4), torch.randn(3, 128, device=DEVICE)
    monkeypatch.setenv("COURSE_KERNELS", "torch")
    expected = grouped_linear(x, weight, inputs=inputs)
    monkeypatch.setenv("COURSE_KERNELS", "triton")
    assert backend(weight) == "triton"
    assert (grouped_linear(x, weight, inputs=inputs) - expected).norm() / expected.norm() < 1e-5
    many = torch.randn(PREFILL + 1, 128, device=DEVICE)  # decoded, and multiplied by torch
    torch.testing.assert_close(grouped_linear(many, weight), many @ weight.dequantize().T)
    assert backend(a_weight(2, 1, 64, 3)) == "torch"


def test_without_triton_the_dispatch_takes_torch(monkeypatch):
    monkeypatch.setenv("COURSE_KERNELS", "triton")
    monkeypatch.setattr(module, "triton", None)
    assert backend(a_weight(2, 1, 64, 4)) == "torch"


def test_without_triton_it_says_so(monkeypatch):
    monkeypatch.setattr(module, "triton", None)
    with pytest.raises(ImportError, match="Triton is not installed here"):
        triton_linear(torch.ones(1, 64), a_weight(2, 1, 64, 4))


@needs_triton
def test_a_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    weight = GroupedCodes(
        torch.zeros(2, 32, dtype=torch.uint8), torch.ones(2, 1), torch.zeros(2, 1), None, 4, 64
    )
    with pytest.raises(RuntimeError, match="set TRITON_INTERPRET=1"):
        triton_linear(torch.ones(1, 64), weight)
