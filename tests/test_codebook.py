"""Codebooks in blocks: levels of least squared error, FP4, int4 from minimum to maximum."""

from statistics import NormalDist

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from course_utils.compression import get_method, quantize_model
from course_utils.grids.codebook import FP4, NF4, dynamic_map, lloyd_max, nearest_codes
from course_utils.models import load_model
from course_utils.quantizers.codebook import EVEN


def normal(*shape: int, seed: int = 0, scale: float = 0.02) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantiles(n: int) -> torch.Tensor:
    """`n` values, each of which stands for an equal share of the normal distribution."""
    inverse = NormalDist().inv_cdf
    return torch.tensor([inverse((i + 0.5) / n) for i in range(n)])


@pytest.mark.parametrize("n_levels", [2, 4, 16])
def test_levels_of_the_normal_distribution_meet_the_conditions_of_least_error(n_levels):
    levels = lloyd_max(quantiles(100_001), n_levels).double()
    edges = [-9.0, *((levels[1:] + levels[:-1]) / 2).tolist(), 9.0]
    normal = NormalDist()
    for level, a, b in zip(levels.tolist(), edges, edges[1:], strict=False):
        centroid = (normal.pdf(a) - normal.pdf(b)) / (normal.cdf(b) - normal.cdf(a))
        assert level == pytest.approx(centroid, abs=2e-3)
    assert torch.allclose(levels, -levels.flip(0), atol=1e-4)


@given(st.integers(0, 2**31), st.integers(2, 40))
@settings(max_examples=40, deadline=None)
def test_cells_give_the_codes_of_thresholds(seed, n_levels):
    levels = normal(n_levels, seed=seed, scale=1.0).sort().values
    thresholds = (levels[:-1] + levels[1:]) / 2
    near = torch.cat([thresholds.nextafter(torch.tensor(way)) for way in (-9.0, 9.0)])
    x = torch.cat([normal(2**13, seed=seed + 1, scale=2.0), thresholds, near, levels])
    x = torch.cat([x, torch.tensor([-torch.inf, torch.inf, 1e38, -1e38])])
    assert torch.equal(nearest_codes(x, levels), torch.bucketize(x, thresholds, out_int32=True))


@pytest.mark.parametrize("levels", [NF4, FP4, dynamic_map()])
def test_cells_give_the_codes_of_known_codebooks(levels):
    thresholds = (levels[:-1] + levels[1:]) / 2
    x = torch.cat([normal(2**14, scale=0.4), thresholds, levels])
    assert torch.equal(nearest_codes(x, levels), torch.bucketize(x, thresholds, out_int32=True))
    blocks = x[: 2**14].view(2, -1, 64)
    assert torch.equal(nearest_codes(blocks, levels).flatten(), nearest_codes(x[: 2**14], levels))


def test_two_levels_of_the_normal_distribution_are_its_mean_size():
    assert lloyd_max(quantiles(100_001), 2)[1] == pytest.approx((2 / torch.pi) ** 0.5, abs=1e-3)


def test_weights_count_as_repetitions():
    x, times = normal(2000, scale=1.0), 1 + torch.arange(2000) % 3
    weighted = lloyd_max(x, 4, times)
    assert torch.allclose(weighted, lloyd_max(x.repeat_interleave(times), 4), atol=1e-5)
    x = quantiles(10_001)
    error = [
        ((x - of[nearest_codes(x, of).long()]).square() * x.square()).sum()
        for of in (lloyd_max(x, 8, x.square()), lloyd_max(x, 8))
    ]
    assert error[0] < 0.9 * error[1]


def test_a_few_values_far_out_get_levels_of_their_own():
    x = torch.cat([quantiles(10_001), torch.full((50,), 30.0)])
    assert lloyd_max(x, 4)[3] == pytest.approx(30, abs=1e-3)


@given(st.integers(0, 2**31), st.integers(2, 16))
@settings(max_examples=25, deadline=None)
def test_no_level_with_values_can_be_moved_for_less_error(seed, n_levels):
    x = normal(400, seed=seed, scale=1.0)
    levels = lloyd_max(x, n_levels)
    codes = nearest_codes(x, levels)
    for code in codes.unique().tolist():  # a level that is nearest to no value stays where it is
        assert levels[code] == pytest.approx(x[codes == code].mean().item(), abs=1e-4)


def test_lloyd_max_refuses_what_has_no_levels():
    with pytest.raises(ValueError, match="16 levels for 2 distinct values: ask for fewer levels"):
        lloyd_max(torch.tensor([1.0, 2.0, 2.0]))
    with pytest.raises(ValueError, match="have to be finite"):
        lloyd_max(torch.tensor([1.0, torch.nan]), 1)
    with pytest.raises(ValueError, match="3 weights for 2 values: give one for each"):
        lloyd_max(torch.tensor([1.0, 2.0]), 1, torch.ones(3))
    assert lloyd_max(torch.tensor([1.0, 2.0, 2.0]), 2).tolist() == [1, 2]


def test_fp4_is_that_of_bitsandbytes():
    theirs = bnb.get_4bit_type("fp4", device="cpu").sort().values
    assert torch.equal(FP4, theirs)
    weight = normal(33, 64)
    method = get_method("codebook", levels=FP4.tolist(), scale_dtype="float32")
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="fp4")
    assert torch.equal(method.quantize(weight).dequantize(), bnb.dequantize_4bit(packed, state))


@given(st.integers(1, 30), st.integers(0, 2**31), st.sampled_from((32, 64, 128)))
@settings(max_examples=25, deadline=None)
def test_with_its_levels_it_is_nf4(rows, seed, block_size):
    weight = normal(rows, 128, seed=seed)
    ours = get_method("codebook", block_size=block_size, scale_dtype="float32").quantize(weight)
    nf4 = get_method("nf4", block_size=block_size, double_quantization=False).quantize(weight)
    assert torch.equal(ours.integer_codes(), nf4.integer_codes())
    assert torch.equal(ours.dequantize(), nf4.dequantize())
    assert ours.nbytes == nf4.nbytes + 64


@given(st.integers(1, 9), st.integers(1, 90), st.integers(0, 2**31), st.sampled_from((16, 32, 48)))
@settings(max_examples=40, deadline=None)
def test_from_minimum_to_maximum_no_weight_is_off_by_more_than_half_a_step(
    rows, columns, seed, size
):
    weight = normal(rows, columns, seed=seed)
    method = get_method(
        "codebook", levels=EVEN, offsets=True, block_size=size, scale_dtype="float32"
    )
    back = method.quantize(weight).dequantize()
    for w, b in zip(weight.flatten().split(size), back.flatten().split(size), strict=True):
        step = (w.max() - w.min()) / 15
        assert ((w - b).abs() <= step / 2 + 1e-7).all()
        assert b.min() == w.min() and b.max() == pytest.approx(w.max().item(), abs=1e-7)


def test_bits_per_weight_are_measured():
    weight = normal(64, 256)
    table = 64 * 8 / weight.numel()
    bits = {
        (size, offsets, dtype): get_method(
            "codebook", levels=EVEN, block_size=size, offsets=offsets, scale_dtype=dtype
        ).quantize(weight).bits_per_weight - table
        for size, offsets, dtype in [
            (32, False, "float16"), (64, False, "float32"), (64, True, "float16")
        ]
    }  # fmt: skip
    assert list(bits.values()) == [4.5, 4.5, 4.5]


@pytest.mark.parametrize("offsets", [False, True])
def test_constant_blocks_come_back(offsets):
    weight = torch.full((2, 64), 0.25)
    weight[1] = 0
    levels = EVEN if offsets else tuple(NF4.tolist())
    method = get_method("codebook", levels=levels, offsets=offsets)
    assert torch.equal(method.quantize(weight).dequantize(), weight)


def test_a_model_is_quantized_saved_and_loaded(tmp_path):
    model, tokenizer = load_model("course-lm")
    report = quantize_model(model, get_method("codebook", levels=EVEN, offsets=True, block_size=64))
    assert report.bits_per_weight == pytest.approx(4.5, abs=0.01)
    assert max(layer.weight_error for layer in report.layers) < 0.012
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = load_model(str(tmp_path))
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, again(tokens).logits)


def test_refusals():
    with pytest.raises(ValueError, match=r"16 ascending numbers in -1\.\.1 are needed without"):
        get_method("codebook", levels=(0.0, 1.0))
    with pytest.raises(ValueError, match=r"16 ascending numbers in 0\.\.1 are needed with offsets"):
        get_method("codebook", offsets=True)
    with pytest.raises(ValueError, match="block_size 0: choose a positive number"):
        get_method("codebook", block_size=0)
    with pytest.raises(ValueError, match="scale_dtype 'bfloat16': choose one of float16, float32"):
        get_method("codebook", scale_dtype="bfloat16")
    with pytest.raises(ValueError, match="offsets 1: choose True or False"):
        get_method("codebook", levels=EVEN, offsets=1)
    with pytest.raises(ValueError, match=r"a minimum of -1e\+05 does not fit into float16"):
        method = get_method("codebook", levels=EVEN, offsets=True)
        method.quantize(torch.tensor([[-1e5, 0.0]]))
    with pytest.raises(ValueError, match="1 of 64 weights are not finite"):
        weight = normal(1, 64)
        weight[0, 3] = torch.inf
        get_method("codebook").quantize(weight)
