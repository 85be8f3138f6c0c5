"""HQQ: codes and zero points of the hqq package; what its solver does, and what it refuses."""

from itertools import pairwise

import pytest
import torch
from hqq.core.quantize import Quantizer
from hypothesis import given, settings
from hypothesis import strategies as st

from course_utils.compression import get_method, quantize_model
from course_utils.kernels import pack_slices
from course_utils.models import load_model
from course_utils.quantizers.hqq import HQQ, PIECE, WIDTHS, dead_zone, shrink, solve


def normal(*shape: int, seed: int = 0, scale: float = 0.02) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def theirs(weight: torch.Tensor, method: HQQ):
    """Codes, zero points and scales of the package, a group a row."""
    codes, meta = Quantizer.quantize(
        weight, nbits=method.n_bits, group_size=method.group_size, axis=method.axis,
        round_zero=method.n_bits == 4, bitpack=False, device="cpu",
    )  # fmt: skip
    parts = codes, meta["zero"], meta["scale"]
    return parts if method.axis == 1 else tuple(part.T for part in parts)


@given(
    st.sampled_from(WIDTHS), st.sampled_from((0, 1)), st.sampled_from((64, 128)),
    st.integers(1, 20), st.sampled_from((0.02, 1.0)), st.integers(0, 2**31),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_codes_and_zero_points_are_those_of_hqq(n_bits, axis, size, rows, scale, seed):
    """The larger weights leave the dead zone, so that the shrinkage takes part."""
    weight = normal(rows, 256, seed=seed, scale=scale)
    method = HQQ(n_bits, size, axis, scale_dtype="float32")
    ours, (codes, zero, scales) = method.quantize(weight), theirs(weight, method)
    assert torch.equal(ours.integer_codes().float(), codes)
    torch.testing.assert_close(ours.zero_point, zero, rtol=0, atol=2e-6)
    assert torch.equal(ours.scale, scales)
    back = (codes - zero) * scales
    back = (back if axis == 1 else back.T).reshape(weight.shape)
    torch.testing.assert_close(ours.dequantize(), back, rtol=0, atol=1e-6 * scale)


@pytest.mark.parametrize("n_bits", WIDTHS)
def test_groups_come_back_from_their_bytes(n_bits):
    weight = normal(6, 192)
    for axis in (0, 1):
        ours = HQQ(n_bits, 64, axis, scale_dtype="float32").quantize(weight)
        assert ours.shape == weight.shape and ours.group_size == 64
        assert ours.bits_per_weight == n_bits + 64 / 64
        assert (ours.dequantize() - weight).abs().max() < weight.abs().max()


def test_the_packages_bytes_hold_the_same_codes():
    """As `Quantizer.quantize` leaves them, packed by slices of the groups."""
    weight = normal(8, 64 * 5)
    for n_bits in WIDTHS:
        packed, _ = Quantizer.quantize(
            weight, nbits=n_bits, group_size=64, axis=1, round_zero=n_bits == 4, device="cpu"
        )
        codes = HQQ(n_bits, 64).quantize(weight).integer_codes()  # [groups, 64]
        assert torch.equal(pack_slices(codes, n_bits), packed)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_weight_of_many_pieces_has_the_codes_of_the_package(axis):
    """The solver works on a few groups at a time, and stops by the error of all."""
    weight = normal(768, 256)
    assert weight.numel() // 64 > 2 * PIECE
    method = HQQ(3, 64, axis, scale_dtype="float32")
    ours, (codes, zero, _) = method.quantize(weight), theirs(weight, method)
    assert torch.equal(ours.integer_codes().float(), codes)
    torch.testing.assert_close(ours.zero_point, zero, rtol=0, atol=2e-6)


@pytest.mark.parametrize("factor", [2.0**-4, 8.0])
def test_shrinking_in_steps_scaled_weights_have_the_same_codes(factor):
    weight = normal(32, 128)
    steps = HQQ(2, 64, shrink_in="steps", scale_dtype="float32")
    first, second = steps.quantize(weight), steps.quantize(factor * weight)
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.zero_point, second.zero_point)
    assert torch.equal(factor * first.scale, second.scale)
    published = HQQ(2, 64, scale_dtype="float32")
    assert not torch.equal(first.zero_point, published.quantize(weight).zero_point)
    large = published.quantize(64 * weight)  # leaves the dead zone
    assert not torch.equal(large.zero_point, published.quantize(weight).zero_point)


def test_the_update_is_the_mean_of_what_is_not_shrunk():
    """Z - mean((off - shrink(off)) / S): the zero point moves by what the shrinkage leaves."""
    method = HQQ(2, 64)
    groups = method.groups(normal(8, 64, scale=1.0))
    inverse, Z = method.start(groups)
    off = groups - ((groups * inverse + Z).round().clamp(0, 3) - Z) / inverse
    for in_steps in (False, True):
        unit = inverse if in_steps else 1.0
        kept = off * unit - shrink(off * unit, 10.0, 0.7)
        expected = Z - (kept / unit * inverse).mean(1, keepdim=True)
        found, _ = solve(groups, inverse, Z, 3, p=0.7, beta=10.0, iterations=1, in_steps=in_steps)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_the_shrinkage_is_zero_in_the_dead_zone_and_nowhere_else():
    edge = dead_zone(10.0, 0.7)
    assert edge == pytest.approx(0.1701, abs=1e-4)
    x = torch.tensor([0.0, edge * 0.999, edge * 1.001, 1.0])
    out = shrink(x, 10.0, 0.7)
    assert out[:2].tolist() == [0, 0] and (out[2:] > 0).all()
    assert out[3] == pytest.approx(0.9)
    assert torch.equal(shrink(-x, 10.0, 0.7), -out)


def test_on_weights_of_usual_size_the_norm_changes_nothing():
    """Nothing is off by 0.17: the zero points are those of alternating least squares."""
    weight = normal(32, 128)
    first, second = (HQQ(3, 64, p=p).quantize(weight) for p in (0.7, 1.0))
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.zero_point, second.zero_point)
    large = 50 * weight
    first, second = (HQQ(3, 64, p=p).quantize(large) for p in (0.7, 1.0))
    assert not torch.equal(first.zero_point, second.zero_point)


@pytest.mark.parametrize("n_bits", [4, 3, 2])
def test_the_error_falls_until_the_last_turn_and_below_round_to_nearest(n_bits):
    method = HQQ(n_bits, 64)
    groups = method.groups(normal(64, 256))
    inverse, Z = method.start(groups)
    _, errors = solve(groups, inverse, Z, 2**n_bits - 1, p=0.7, beta=10.0, iterations=20)
    assert all(after < before for before, after in pairwise(errors[:-1]))
    assert min(errors) < errors[0]


def test_a_turn_finds_the_best_zero_points_for_its_codes():
    groups = normal(8, 64)
    method = HQQ(3, 64)
    inverse, Z = method.start(groups)
    codes = (groups * inverse + Z).round().clamp(0, 7)
    found, _ = solve(groups, inverse, Z, 7, p=0.7, beta=10.0, iterations=1)
    error = lambda zero: ((codes - zero) / inverse - groups).square().sum()  # noqa: E731
    assert all(error(found) <= error(found + step) for step in (-0.01, 0.01, -1e-3, 1e-3))


@pytest.mark.parametrize("n_bits", WIDTHS)
def test_constant_groups_and_zeros_stay_finite(n_bits):
    weight = torch.zeros(3, 64)
    weight[1], weight[2] = 0.5, -3e-5
    back = HQQ(n_bits, 64).quantize(weight).dequantize()
    assert back.isfinite().all() and (back[0] == 0).all()
    assert (back - weight).abs().max() < 2e-3


def test_a_model_is_quantized_and_loses_less_than_by_round_to_nearest():
    errors = []
    for iterations in (0, 20):
        model, _ = load_model("course-lm")
        report = quantize_model(model, get_method("hqq", n_bits=2, iterations=iterations))
        errors.append(sum(layer.weight_error for layer in report.layers))
        assert report.bits_per_weight == 2.5
    assert errors[1] < 0.95 * errors[0]


def test_refusals():
    for given_, text in (
        ({"n_bits": 5}, "n_bits 5: choose one of 1, 2, 3, 4, 8"),
        ({"axis": 2}, "axis 2: choose one of 0, 1"),
        ({"group_size": 0}, "group_size 0: choose a positive number"),
        ({"p": 2.0}, "p 2.0, beta 10.0: p lies above 0 and is at most 1"),
        ({"iterations": -1}, "iterations -1: choose 0 or more"),
        ({"shrink_in": "bits"}, "shrink_in 'bits': choose one of weights, steps"),
        ({"scale_dtype": "int8"}, "scale_dtype 'int8': choose one of float16, float32"),
    ):
        with pytest.raises(ValueError, match=text):
            get_method("hqq", **given_)
    with pytest.raises(ValueError, match="group_size 64 does not divide the 96 columns"):
        get_method("hqq").quantize(normal(2, 96))
    with pytest.raises(ValueError, match="not finite in float32"):
        get_method("hqq").quantize(torch.full((2, 64), torch.inf))
