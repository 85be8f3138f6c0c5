"""The course's figures: drawn without error, readable, and the README's picture up to date."""

from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from course_utils.plotting import (
    codes_against_outlier,
    error_against_threshold,
    feature_maxima,
    relative_bars,
)
from course_utils.plotting.palette import FIGURE, palette_picture, quantize_picture, scene

matplotlib.use("agg")


def drawn():
    row = torch.randn(64, generator=torch.Generator().manual_seed(0))
    yield codes_against_outlier(row, [3.0, 60.0])
    yield feature_maxima({"a layer": row.abs(), "another": 10 * row.abs()}, 6.0)
    yield error_against_threshold([0, 1, 5], {"chosen": [1, 0.1, 0.01]}, [None, 6.0, 1.0])
    yield relative_bars({"model": {"float32": 2.0, "int8": 3.0}}, "time")


@pytest.mark.parametrize("number", range(4))
def test_every_axis_is_labelled_and_the_ground_is_opaque(number):
    figure = list(drawn())[number]
    figure.canvas.draw()
    assert figure.get_facecolor() == (1.0, 1.0, 1.0, 1.0)
    assert figure.axes[0].get_ylabel()
    assert all(axis.get_xlabel() or axis.get_xticklabels() for axis in figure.axes)


def test_bars_are_relative_to_the_first_variant():
    figure = relative_bars({"m": {"float32": 2.0, "int8": 3.0}}, "time")
    assert [patch.get_height() for patch in figure.axes[0].patches] == [1.0, 1.5]


def test_the_readmes_picture_is_the_one_that_the_code_draws():
    committed = np.asarray(Image.open(Path(__file__).parent.parent / FIGURE), dtype=int)
    now = np.asarray(palette_picture(), dtype=int)
    assert committed.shape == now.shape
    assert (committed != now).mean() < 1e-3  # another CPU may round a few pixels the other way


@pytest.mark.parametrize("n_bits", [8, 4, 2])
def test_a_picture_of_n_bits_has_its_levels_and_errs_by_half_a_step(n_bits):
    codes, back = quantize_picture(scene(), n_bits)
    assert len(np.unique(codes)) <= 2**n_bits
    assert np.abs(back - scene()).max() <= 0.5 / (2**n_bits - 1) + 1e-12
