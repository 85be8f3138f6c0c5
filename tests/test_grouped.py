"""Products with packed codes: the compiled backend against the torch reference, and what is refused."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from course_utils.grids.codebook import NF4
from course_utils.kernels import GroupedCodes, backend, grouped_linear, int8_matmul, pack
from course_utils.kernels import compiled as backend_module
from course_utils.kernels.grouped import PREFILL, rounded_inputs
from course_utils.kernels.int8 import _in_float_pieces

SHAPES = st.sampled_from([(1, 1, 32), (3, 2, 32), (5, 1, 96), (2, 3, 64), (7, 1, 128), (4, 2, 256)])


def a_weight(out, groups, width, n_bits, seed, codebook=None, high_first=False):
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**n_bits, (out, groups * width), generator=draw)
    scale = torch.rand(out, groups, generator=draw) + 0.1
    zero = torch.rand(out, groups, generator=draw) * 2**n_bits if codebook is None else None
    packed = pack(codes, n_bits)
    return GroupedCodes(packed, scale, zero, codebook, n_bits, groups * width, high_first)


def relative(found, expected):
    return ((found - expected).norm() / expected.norm().clamp(min=1e-30)).item()


@settings(deadline=None, max_examples=60)
@given(SHAPES, st.sampled_from([2, 3, 4, 8]), st.integers(1, 40), st.integers(0, 99))
def test_the_compiled_product_is_the_reference(shape, n_bits, tokens, seed):
    weight = a_weight(*shape, n_bits, seed)
    assert backend(weight) == "compiled"
    x = torch.randn(tokens, weight.columns, generator=torch.Generator().manual_seed(seed))
    exact = (x.double() @ weight.dequantize().double().T).float()
    assert relative(grouped_linear(x, weight), exact) < 1e-5
    rounded = rounded_inputs(x, weight.tile)
    exact = (rounded.double() @ weight.dequantize().double().T).float()
    assert relative(grouped_linear(x, weight, inputs="int8"), exact) < 1e-5


@settings(deadline=None, max_examples=20)
@given(SHAPES, st.booleans(), st.integers(1, 40), st.integers(0, 99))
def test_a_codebook_of_16_values(shape, high_first, tokens, seed):
    weight = a_weight(*shape, 4, seed, codebook=NF4, high_first=high_first)
    x = torch.randn(tokens, weight.columns, generator=torch.Generator().manual_seed(seed))
    expected = x @ weight.dequantize().T
    assert relative(grouped_linear(x, weight), expected) < 1e-5


@pytest.mark.parametrize("n_bits", [2, 3, 4, 8])
@pytest.mark.parametrize("tokens", [1, 5, PREFILL + 1])
def test_inputs_that_are_codes_give_whole_sums(n_bits, tokens):
    weight, draw = a_weight(7, 1, 192, n_bits, 0), torch.Generator().manual_seed(0)
    ones, whole = torch.ones_like(weight.scale), weight.zero.round()
    weight = GroupedCodes(weight.codes, ones, whole, None, n_bits, 192)
    x = torch.randint(-127, 128, (tokens, 192), generator=draw).float()
    expected = x.double() @ weight.dequantize().double().T
    assert torch.equal(grouped_linear(x, weight, inputs="codes").double(), expected)


def test_the_first_of_two_codes_is_the_high_half_on_request():
    codes = torch.tensor([[0x21]], dtype=torch.uint8)
    parts = torch.ones(1, 1), torch.zeros(1, 1), None, 4, 2
    assert GroupedCodes(codes, *parts).dequantize().tolist() == [[1, 2]]
    assert GroupedCodes(codes, *parts, high_first=True).dequantize().tolist() == [[2, 1]]


@pytest.mark.parametrize("n_bits", [2, 3, 4, 8])
def test_one_input_times_one_reads_a_weight_exactly(n_bits):
    weight = a_weight(6, 2, 64, n_bits, 0)
    found = grouped_linear(torch.eye(weight.columns), weight).T  # by decoded rows
    assert torch.equal(found, weight.dequantize())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_products_come_in_the_dtype_of_the_inputs(dtype):
    weight, x = a_weight(5, 2, 32, 4, 1), torch.randn(3, 64).to(dtype)
    found = grouped_linear(x, weight)
    assert found.dtype == dtype
    assert relative(found.float(), x.float() @ weight.dequantize().T) < 1e-2


def test_float64_inputs_are_multiplied_in_float64():
    weight, x = a_weight(5, 2, 32, 4, 1), torch.randn(3, 64, dtype=torch.float64)
    assert torch.equal(grouped_linear(x, weight), x @ weight.dequantize().double().T)


def test_all_numbers_of_threads_give_the_same():
    weight, x = a_weight(64, 4, 64, 4, 2), torch.randn(5, 256)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found += [(grouped_linear(x, weight), grouped_linear(x, weight, inputs="int8"))]
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for pair in found for a, b in zip(pair, found[0], strict=True))


def test_inputs_that_are_not_contiguous_and_none_at_all():
    weight, x = a_weight(5, 2, 32, 4, 3), torch.randn(64, 4)
    torch.testing.assert_close(
        grouped_linear(x.T, weight), grouped_linear(x.T.contiguous(), weight)
    )
    assert grouped_linear(torch.empty(0, 64), weight).shape == (0, 5)


def test_groups_that_no_tile_divides_and_other_widths_take_torch():
    for weight in (a_weight(3, 2, 24, 4, 0), a_weight(3, 2, 32, 5, 0)):
        assert backend(weight) == "torch"
        x = torch.randn(2, weight.columns)
        torch.testing.assert_close(grouped_linear(x, weight), x @ weight.dequantize().T)
        assert relative(grouped_linear(x, weight, inputs="int8"), x @ weight.dequantize().T) < 2e-2


@pytest.mark.parametrize("inputs", ["float", "int8"])
@pytest.mark.parametrize("tokens", [1, PREFILL + 1])
def test_a_nan_stays_in_its_row(inputs, tokens):
    weight, x = a_weight(5, 2, 32, 4, 3), torch.ones(tokens + 1, 64)
    x[0, 7] = torch.nan
    found = grouped_linear(x, weight, inputs=inputs)
    assert found[0].isnan().all()
    assert found[1:].isfinite().all()


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 3000), st.integers(0, 99))
def test_int8_products_are_exact_by_whoever_computes_them(m, n, k, seed):
    draw = torch.Generator().manual_seed(seed)
    a, b = (torch.randint(-128, 128, (rows, k), generator=draw).char() for rows in (m, n))
    assert torch.equal(int8_matmul(a, b), _in_float_pieces(a, b))


def test_int8_products_of_the_largest_codes_are_exact():
    for rows in (1, 64):
        a = torch.full((rows, 4096), -128, dtype=torch.int8)
        assert (int8_matmul(a, a) == 4096 * 128**2).all()


def test_what_does_not_agree_is_refused():
    weight = a_weight(5, 2, 32, 4, 3)
    parts = [weight.codes, weight.scale, weight.zero, None, 4, 64]

    def refused(error, message, place, value):
        changed = [*parts[:place], value, *parts[place + 1 :]]
        with pytest.raises(error, match=message):
            GroupedCodes(*changed)

    refused(TypeError, "codes is torch.uint8, got torch.int32", 0, weight.codes.int())
    refused(ValueError, r"codes is \(5, 32\), got \(4, 32\)", 0, weight.codes[:4])
    refused(TypeError, "scale is torch.float32, got torch.float16", 1, weight.scale.half())
    refused(ValueError, r"zero is \(5, 2\), got \(5, 1\)", 2, weight.zero[:, :1])
    refused(ValueError, "either zero points or a codebook", 3, NF4)
    with pytest.raises(ValueError, match=r"inputs are \[tokens, 64\], got \(2, 60\)"):
        grouped_linear(torch.randn(2, 60), weight)
    with pytest.raises(TypeError, match=r"inputs are float, got torch\.int64"):
        grouped_linear(torch.ones(2, 64).long(), weight)
    with pytest.raises(ValueError, match="inputs 'int4': choose one of float, int8, codes"):
        grouped_linear(torch.randn(2, 64), weight, inputs="int4")


def test_a_weight_that_is_not_contiguous_takes_torch():
    weight, x = a_weight(5, 2, 32, 4, 3), torch.randn(2, 64)
    codes = weight.codes.T.contiguous().T
    slanted = GroupedCodes(codes, weight.scale, weight.zero, None, 4, 64)
    assert backend(slanted) == "torch"
    assert relative(grouped_linear(x, slanted), grouped_linear(x, weight)) < 1e-5


def test_the_backend_is_chosen_by_the_environment(monkeypatch):
    weight, x = a_weight(5, 2, 32, 4, 3), torch.randn(2, 64)
    compiled = grouped_linear(x, weight)
    monkeypatch.setenv("COURSE_KERNELS", "torch")
    assert backend(weight) == "torch"
    assert relative(grouped_linear(x, weight), compiled) < 1e-5
    monkeypatch.setenv("COURSE_KERNELS", "fast")
    message = "COURSE_KERNELS='fast': choose one of auto, torch, compiled, triton"
    with pytest.raises(ValueError, match=message):
        backend(weight)


def run(code, **environment):
    code = textwrap.dedent("""
        import torch
        from course_utils.kernels import GroupedCodes, backend, grouped_linear, pack
        weight = GroupedCodes(pack(torch.ones(2, 64).int(), 4), torch.ones(2, 1), torch.zeros(2, 1),
                              None, 4, 64)
    """) + textwrap.dedent(code)
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_without_a_compiler_torch_computes_and_one_warning_says_so():
    code = """
        for _ in range(2):
            assert grouped_linear(torch.ones(1, 64), weight).tolist() == [[64, 64]]
        print(backend(weight))
    """
    done = run(code, CXX="no-such-compiler", COURSE_KERNELS="auto")
    assert done.stdout == "torch\n", done.stderr
    assert (
        done.stderr.count("multiplied by torch, more slowly: no C++ compiler (no-such-compiler)")
        == 1
    )
    done = run("backend(weight)", CXX="no-such-compiler", COURSE_KERNELS="compiled")
    assert "NoCompiler: no C++ compiler (no-such-compiler) works here: install g++" in done.stderr


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = run("print(backend(weight))", COURSE_CACHE=str(tmp_path / "file" / "cache"))
    assert done.stdout == "compiled\n", done.stderr


def test_importing_the_package_compiles_nothing(tmp_path):
    done = run("print('ok')", COURSE_CACHE=str(tmp_path))
    assert done.stdout == "ok\n", done.stderr
    assert not list(tmp_path.iterdir())


def test_two_processes_at_once_build_one_library(tmp_path):
    code = "import sys; from course_utils.kernels.compiled import library; library()"
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "COURSE_CACHE": str(tmp_path)}
    both = [subprocess.Popen(command, env=environment) for _ in range(2)]
    assert [process.wait(300) for process in both] == [0, 0]
    assert len(list(tmp_path.glob("kernels/*/kernels.so"))) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="pages are protected by mprotect")
@pytest.mark.parametrize("n_bits", [2, 3, 4, 8])
def test_no_kernel_reads_or_writes_past_its_buffers(n_bits):
    """Every buffer ends where a protected page begins: one byte too far ends the process."""
    done = run(f"""
        import ctypes, mmap
        from course_utils.kernels import base3_product, hadamard, int8_matmul
        n_bits, kept, PAGE = {n_bits}, [], mmap.PAGESIZE
        libc = ctypes.CDLL(None, use_errno=True)

        def guarded(tensor):
            size = tensor.numel() * tensor.element_size()
            room = -(-max(size, 1) // PAGE) * PAGE
            memory = mmap.mmap(-1, room + PAGE)
            address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
            assert libc.mprotect(ctypes.c_void_p(address + room), PAGE, 0) == 0
            view = torch.frombuffer(memory, dtype=torch.uint8)[room - size : room]
            kept.append(memory)
            copy = view.view(tensor.dtype).view(tensor.shape)
            copy.copy_(tensor)
            return copy

        empty = torch.Tensor.new_empty
        torch.Tensor.new_empty = lambda self, *shape: guarded(empty(self, *shape))
        for width in (32, 64, 128):
            for tokens in (1, 3, 8, 17):
                codes = pack(torch.randint(2**n_bits, (3, 2 * width)), n_bits)
                weight = GroupedCodes(guarded(codes), guarded(torch.rand(3, 2)),
                                      guarded(torch.rand(3, 2)), None, n_bits, 2 * width)
                x = guarded(torch.randn(tokens, 2 * width))
                for inputs in ("float", "int8"):
                    grouped_linear(x, weight, inputs=inputs)
        hadamard(guarded(torch.randn(3, 64)))
        base3_product(guarded(torch.ones(3, 75).char()), guarded(torch.ones(2, 15).byte() * 255))
        a = guarded(torch.ones(3, 77).char())
        int8_matmul(a, a)
        print("whole")
    """)
    assert done.stdout == "whole\n", (done.returncode, done.stderr[-1000:])


def test_the_compiler_is_told_by_what_it_says_of_itself():
    name, choice, told = backend_module._compiler()
    assert name and choice in backend_module.CHOICES
    assert b"__VERSION__" in told
