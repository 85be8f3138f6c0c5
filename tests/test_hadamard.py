"""The Hadamard transform: against its matrix, as a rotation, and what is refused."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from course_utils.kernels import hadamard
from course_utils.kernels.hadamard import factors, hadamard_matrix

SIZES = [1, 2, 4, 12, 20, 24, 64, 144, 192, 240, 256, 576, 1536]


@pytest.mark.parametrize("n", SIZES)
def test_its_matrix_holds_ones_and_is_orthogonal(n):
    H = hadamard_matrix(n)
    assert set(H.unique().tolist()) <= {-1.0, 1.0}
    assert torch.equal(H @ H.T, n * torch.eye(n))


def test_the_smallest_are_sylvesters():
    assert hadamard_matrix(2).tolist() == [[1, 1], [1, -1]]
    assert hadamard_matrix(4)[3].tolist() == [1, -1, -1, 1]


@pytest.mark.parametrize("backend", ["auto", "torch"])
@settings(deadline=None, max_examples=25)
@given(st.sampled_from(SIZES), st.integers(0, 5), st.integers(0, 99))
def test_the_transform_is_the_product_with_the_matrix(backend, n, rows, seed):
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("COURSE_KERNELS", backend)
        x = torch.randn(rows, n, generator=torch.Generator().manual_seed(seed))
        expected = x.double() @ hadamard_matrix(n).double().T / math.sqrt(n)
        torch.testing.assert_close(hadamard(x).double(), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(hadamard(x.double()), expected, rtol=0, atol=1e-12)


def test_it_keeps_norms_and_spreads_an_outlier_evenly():
    x = torch.zeros(576)
    x[7] = 24.0
    assert torch.equal(hadamard(x).abs(), torch.ones(576))
    y = torch.randn(3, 1536)
    torch.testing.assert_close(hadamard(y).norm(dim=1), y.norm(dim=1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_result_has_the_inputs_dtype_and_shape_and_the_input_stays(dtype):
    x = torch.randn(2, 3, 64).to(dtype)
    before = x.clone()
    found = hadamard(x)
    assert found.dtype == dtype and found.shape == x.shape
    assert torch.equal(x, before)
    torch.testing.assert_close(found.double(), hadamard(x.double()), rtol=1e-2, atol=1e-2)


def test_inputs_that_are_not_contiguous_and_none_at_all():
    x = torch.randn(64, 5)
    assert torch.equal(hadamard(x.T), hadamard(x.T.contiguous()))
    assert hadamard(torch.empty(0, 64)).shape == (0, 64)


def test_sizes_are_taken_apart():
    assert factors(576) == [12, 12, 4]
    assert factors(1536) == [12, 128]
    assert factors(240) == [20, 12, 1]
    assert factors(256) == [256]


@pytest.mark.parametrize("n", [0, 3, 6, 10, 100, 768 * 7])
def test_sizes_without_a_matrix_are_refused(n):
    with pytest.raises(ValueError, match=rf"no Hadamard matrix of size {n} here: 2\^k"):
        hadamard(torch.zeros(2, n))


def test_whole_numbers_are_refused():
    with pytest.raises(TypeError, match=r"takes floats, got torch\.int64: convert"):
        hadamard(torch.ones(4).long())
