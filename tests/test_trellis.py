"""Trellis codes: exact search and decoding, distortion against theory, models, bad input."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_vector import correlated, normal, relative_error, seen
from transformers import GPT2Config, GPT2LMHeadModel

from course_utils.compression import get_method, quantize_model
from course_utils.grids.trellis import best_states, state_values, states_of, stream_of
from course_utils.quantizers.trellis import Trellis

SEEDS = st.integers(0, 2**31)


def follows(states, state_bits, n_bits):
    """Whether each state begins with what the one before ends with."""
    kept = 2 ** (state_bits - n_bits)
    return (states[:, 1:] >> n_bits == states[:, :-1] % kept).all()


@pytest.mark.parametrize("state_bits", [2, 8, 10, 16])
def test_values_look_like_draws_of_a_normal_distribution(state_bits):
    values = state_values(state_bits).double()
    assert values.shape == (2**state_bits,)
    assert values.mean() == pytest.approx(0, abs=1e-6)
    assert values.square().mean() == pytest.approx(1, abs=1e-6)
    if state_bits == 16:
        inside = (values.abs() < 1).double().mean()
        assert inside == pytest.approx(0.6827, abs=0.02)
        # QTIP's constants: mean 510 and spread 147.80 of the sum of four bytes
        word = 12345 * 34038481 + 76625530 & 0xFFFFFFFF
        total = sum(word >> shift & 255 for shift in (0, 8, 16, 24))
        assert values[12345] == pytest.approx((total - 510) / 147.8005, abs=2e-3)


@settings(deadline=None, max_examples=20)
@given(SEEDS, st.sampled_from([(2, 1), (3, 1), (3, 2), (4, 3)]), st.integers(2, 5))
def test_viterbi_finds_the_best_of_all_paths(seed, bits, length):
    state_bits, n_bits = bits
    values, x = normal(2**state_bits, seed=seed), normal(3, length, seed=seed + 1)
    found = best_states(x, values, n_bits)
    assert follows(found, state_bits, n_bits)
    streams = torch.tensor(list(product((0, 1), repeat=state_bits + (length - 1) * n_bits)))
    paths = values[states_of(streams, state_bits, n_bits)]  # [streams, length]
    best = (x[:, None] - paths).square().sum(2).amin(1)
    torch.testing.assert_close((x - values[found]).square().sum(1), best, rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=30)
@given(SEEDS, st.sampled_from([(4, 1), (5, 2), (10, 2), (11, 3), (16, 4)]))
def test_a_stream_gives_its_states_back(seed, bits):
    state_bits, n_bits = bits
    stream = (normal(4, state_bits + 9 * n_bits, seed=seed) > 0).to(torch.uint8)
    states = states_of(stream, state_bits, n_bits)
    assert states.shape == (4, 10) and follows(states, state_bits, n_bits)
    assert torch.equal(stream_of(states, state_bits, n_bits), stream)


@pytest.mark.parametrize(("state_bits", "expected"), [(4, 0.1445), (8, 0.0918), (10, 0.0780)])
def test_the_distortion_at_two_bits_falls_with_the_states(state_bits, expected):
    """Lloyd-Max has 0.1175, the E8 lattice 0.0919, and the limit is 0.0625."""
    x = normal(64, 256)
    values = state_values(state_bits)
    error = (x - values[best_states(x, values, 2)]).square().mean().item()
    # the code is one draw of 2^L values, and the fewer there are the more it depends on them
    assert error == pytest.approx(expected, rel=0.15 if state_bits == 4 else 0.06)


@pytest.mark.parametrize(("n_bits", "scalar"), [(1, 0.3634), (2, 0.1175), (3, 0.03455)])
def test_it_errs_less_than_scalar_levels_and_more_than_the_limit(n_bits, scalar):
    weight = normal(64, 128)
    quantized = Trellis(n_bits=n_bits, state_bits=9).quantize(weight)
    assert 4.0**-n_bits < relative_error(weight, quantized) < 0.9 * scalar


@settings(deadline=None, max_examples=10)
@given(SEEDS, st.sampled_from([(1, 5), (2, 6), (3, 7), (4, 8), (2, 3)]))
def test_packed_bytes_decode_exactly(seed, bits):
    n_bits, state_bits = bits
    weight = normal(32, 48, seed=seed)
    quantized = Trellis(n_bits, state_bits).quantize(weight)
    assert quantized.codes.shape == (2, 3, -(-(state_bits + 255 * n_bits) // 8))
    states = quantized.states()
    assert follows(states.flatten(0, 1), state_bits, n_bits)
    tiles = state_values(state_bits)[states]  # [2, 3, 256]
    back = quantized.dequantize()
    for i, j in product(range(2), range(3)):
        rows = slice(16 * i, 16 * i + 16)
        expected = tiles[i, j].view(16, 16) * quantized.scale[rows].float()[:, None]
        assert torch.equal(back[rows, 16 * j : 16 * j + 16], expected)


def test_bits_are_counted_with_first_states_and_scales():
    weight = normal(32, 256)
    quantized = Trellis().quantize(weight)  # L = 10: 8 bits more a tile of 256
    assert quantized.bits_per_weight == pytest.approx(2 + 8 / 256 + 16 / 256)


def test_the_column_loop_lowers_the_output_error():
    x, weight = correlated(600, 64, unequal=0.3), normal(32, 64)
    plain, made_up = (
        (x @ (weight - Trellis(compensate=c, state_bits=7).quantize(weight, seen(x)).dequantize()).T)
        .square().sum().item()
        for c in (False, True)
    )  # fmt: skip
    assert made_up < plain


@pytest.mark.filterwarnings("ignore:the Hessian of")
@pytest.mark.parametrize("compensate", [False, True])
def test_models_are_quantized_saved_and_loaded(compensate, tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=99, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    tokens = torch.arange(40).view(2, 20)
    method = Trellis(n_bits=3, state_bits=6, compensate=compensate)
    report = quantize_model(model, method, calibration=tokens if compensate else None)
    assert len(report.layers) == 8
    with torch.no_grad():
        expected = model(tokens).logits
        model.save_pretrained(tmp_path)
        assert torch.equal(type(model).from_pretrained(tmp_path)(tokens).logits, expected)


def test_rows_of_zeros_and_constant_matrices():
    assert not Trellis(state_bits=5).quantize(torch.zeros(16, 32)).dequantize().any()
    some = normal(16, 32)
    some[5] = 0
    assert not Trellis(state_bits=5).quantize(some).dequantize()[5].any()
    constant = torch.full((16, 32), -0.25)
    assert relative_error(constant, Trellis(state_bits=6).quantize(constant)) < 0.3


def test_refusals():
    for changed, message in (
        ({"n_bits": 5}, "n_bits 5: choose 1 to 4"),
        ({"state_bits": 17}, "state_bits 17: choose 2 to 16"),
        ({"n_bits": 3, "state_bits": 3}, "state_bits 3 with n_bits 3: .* choose more state_bits"),
        ({"compensate": "no"}, "compensate 'no': choose True or False"),
        ({"damping": -0.1}, "damping -0.1 must be 0 or positive"),
        ({"scale_dtype": "int8"}, "scale_dtype 'int8': choose one of float16, float32"),
    ):
        with pytest.raises(ValueError, match=message):
            get_method("trellis", **changed)
    with pytest.raises(ValueError, match=r"tiles of 16 by 16 do not cover a weight \[24, 64\]"):
        Trellis().quantize(normal(24, 64))
    with pytest.raises(ValueError, match="needs the Hessian of the layer's inputs"):
        Trellis(compensate=True).quantize(normal(16, 16))
