"""NF4: codes, bytes and values bit for bit those of bitsandbytes; nothing lost by bad input."""

import subprocess
import sys
import textwrap
from dataclasses import replace

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_llama

from course_utils.compression import QuantizedLinear, get_method, quantize_model
from course_utils.grids.codebook import NF4, OFFSET, dynamic_map, nearest_codes, normal_levels
from course_utils.models import load_model
from course_utils.quantizers.nf4 import BLOCK_SIZES


@pytest.fixture(autouse=True, scope="module")
def uncompiled():
    """bitsandbytes compiles what it does with odd lengths, anew for every one."""
    with torch.compiler.set_stance("force_eager"):
        yield


DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def normal(*shape: int, seed: int = 0, scale: float = 0.02) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_levels_are_quantiles_of_the_normal_distribution():
    assert abs(OFFSET - 0.9677083) < 1e-7
    assert torch.allclose(normal_levels(), NF4, rtol=0, atol=2e-7)
    assert (NF4.diff() > 0).all() and NF4[7] == 0 and NF4[0] == -1 and NF4[15] == 1
    with pytest.raises(ValueError, match=r"offset 1\.0: a probability between 1/2 and 1"):
        normal_levels(1.0)


def test_the_levels_and_the_dynamic_map_are_those_of_bitsandbytes():
    assert torch.equal(NF4, bnb.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(dynamic_map(), bnb.create_dynamic_map())
    assert len(dynamic_map().unique()) == 256 and dynamic_map()[0] == pytest.approx(-0.99296875)


def test_a_tie_goes_to_the_lower_code():
    assert nearest_codes(torch.tensor([0.5, 0.51, -2, 9]), torch.tensor([0.0, 1.0])).tolist() == [
        0, 1, 0, 1,
    ]  # fmt: skip


@given(
    st.integers(1, 40), st.integers(1, 200), st.integers(0, 2**31),
    st.sampled_from(BLOCK_SIZES), st.sampled_from(DTYPES),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_bytes_absmax_and_values_are_those_of_bitsandbytes(rows, columns, seed, block_size, dtype):
    weight = normal(rows, columns, seed=seed).to(dtype)
    ours = get_method("nf4", block_size=block_size, double_quantization=False).quantize(weight)
    packed, state = bnb.quantize_4bit(weight, blocksize=block_size, quant_type="nf4")
    assert torch.equal(ours.codes, packed.flatten())
    assert torch.equal(ours.absmax, state.absmax)
    # As one row: where a block goes on in the next row, bitsandbytes' CPU kernel takes the absmax of another.
    state.shape = (weight.numel(),)
    theirs = bnb.dequantize_4bit(packed, state).view(weight.shape)
    assert torch.equal(ours.dequantize().to(dtype), theirs)
    assert ours.shape == weight.shape


@given(st.integers(2, 60), st.integers(32, 300), st.integers(0, 2**31), st.sampled_from((32, 64)))
@settings(max_examples=30, deadline=None)
def test_the_nested_state_is_that_of_bitsandbytes(rows, columns, seed, block_size):
    weight = normal(rows, columns, seed=seed)
    ours = get_method("nf4", block_size=block_size).quantize(weight)
    packed, state = bnb.quantize_4bit(
        weight, blocksize=block_size, quant_type="nf4", compress_statistics=True
    )
    assert torch.equal(ours.codes, packed.flatten())
    assert torch.equal(ours.offset, state.offset)
    assert torch.equal(ours.nested_absmax, state.state2.absmax)
    # bitsandbytes' fast path on CPUs finds the nearest value by a table, which near a threshold takes the
    # neighbour: so its own codes are compared by what they are off, in units of the nested absmax.
    values = state.state2.code
    off = (values[ours.absmax.long()] - values[state.absmax.long()]).abs()
    scaled = absmax_of(weight, block_size) - ours.offset
    of_block = ours.nested_absmax.repeat_interleave(256)[: len(scaled)]
    seen = of_block > 0
    found = [
        (values[codes.long()] * of_block - scaled).abs()[seen]
        for codes in (ours.absmax, state.absmax)
    ]
    assert (found[0] <= found[1] + 1e-6 * of_block[seen]).all()  # ours is never the farther one
    assert (found[1] - found[0] <= 3e-5 * of_block[seen]).all()
    assert (off[seen] <= 0.0142).all()  # neighbours in the map


def absmax_of(weight: torch.Tensor, block_size: int) -> torch.Tensor:
    return torch.stack([part.abs().amax() for part in weight.flatten().split(block_size)])


def test_the_last_half_byte_of_an_odd_length_is_zero():
    ours = get_method("nf4", double_quantization=False).quantize(normal(3, 5))
    assert ours.codes.numel() == 8 and ours.codes[-1] & 15 == 7
    assert ours.integer_codes().shape == (3, 5)


def test_bits_per_weight_are_measured():
    weight = normal(512, 512)
    plain = get_method("nf4", double_quantization=False).quantize(weight)
    double = get_method("nf4").quantize(weight)
    assert plain.bits_per_weight == 4.5
    assert double.bits_per_weight == pytest.approx(4 + 8 / 64 + 32 / (64 * 256) + 32 / 512**2)


@pytest.mark.parametrize("double", [False, True])
def test_blocks_of_zeros_come_back_as_zeros(double):
    weight = normal(4, 64)
    weight[1] = 0
    back = get_method("nf4", double_quantization=double).quantize(weight).dequantize()
    assert back.isfinite().all() and (back[1] == 0).all()
    zeros = get_method("nf4", double_quantization=double).quantize(torch.zeros(2, 64))
    assert (zeros.dequantize() == 0).all()


@given(st.integers(0, 2**31), st.sampled_from((2.0**-20, 0.5, 2.0**12)))
@settings(max_examples=25, deadline=None)
def test_codes_do_not_depend_on_the_scale_and_come_back_as_themselves(seed, factor):
    method = get_method("nf4", double_quantization=False)
    weight = normal(6, 64, seed=seed)
    first = method.quantize(weight)
    assert torch.equal(method.quantize(weight * factor).codes, first.codes)
    again = method.quantize(first.dequantize())
    assert torch.equal(again.codes, first.codes) and torch.equal(again.absmax, first.absmax)


@given(st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_no_weight_is_off_by_more_than_half_the_widest_gap(seed):
    weight = normal(4, 128, seed=seed)
    ours = get_method("nf4", double_quantization=False).quantize(weight)
    off = (ours.dequantize() - weight).abs().view(-1, 64)
    assert (off <= (NF4.diff().max() / 2 + 1e-6) * ours.absmax[:, None]).all()


def test_a_model_is_quantized():
    model, _ = load_model("course-lm")
    before = {n: m.weight.detach().clone() for n, m in model.named_modules() if n.endswith("c_fc")}
    report = quantize_model(model, get_method("nf4"))
    assert report.bits_per_weight == pytest.approx(4.127, abs=0.001)
    for name, weight in before.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, QuantizedLinear)
        error = (layer.quantized_weight.dequantize() - weight.T).square().sum()
        assert error / weight.square().sum() < 0.012


def test_refusals():
    with pytest.raises(ValueError, match="block_size 48: choose one of 32, 64, 128"):
        get_method("nf4", block_size=48)
    with pytest.raises(ValueError, match="double_quantization 'false': choose True or False"):
        get_method("nf4", double_quantization="false")
    with pytest.raises(ValueError, match=r"1 of 128 weights are not finite.*nan at \[1, 3\]"):
        weight = normal(2, 64)
        weight[1, 3] = torch.nan
        get_method("nf4").quantize(weight)


def test_a_broken_nested_state_is_refused():
    ours = get_method("nf4").quantize(normal(32, 64))
    with pytest.raises(ValueError, match="a broken nested state: absmax as uint8 codes goes with"):
        replace(ours, nested_absmax=None)
    with pytest.raises(ValueError, match="a broken nested state"):
        replace(ours, absmax=ours.block_absmax())
    with pytest.raises(ValueError, match=r"32 x 64 in blocks of 64 take absmax \[32\], got \[31\]"):
        replace(ours, absmax=ours.absmax[1:])
    with pytest.raises(ValueError, match=r"take nested_absmax \[1\], got \[2\]"):
        replace(ours, nested_absmax=ours.nested_absmax.repeat(2))


def test_a_saved_model_computes_in_a_fresh_process(tmp_path):
    """There transformers imports the method while the default device is "meta"."""
    model = tiny_llama().eval()
    quantize_model(model, get_method("nf4", block_size=32))
    model.save_pretrained(tmp_path)
    code = f"""
        import torch, course_utils.compression
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
        print(bool(model(torch.arange(8)[None]).logits.isfinite().all()))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr
