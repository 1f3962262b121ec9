"""Exact dead leaves against the theory of the model, and that reference mode is not a sample of it."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import integrate, stats

from dpsyngen.errors import ConfigError
from dpsyngen.programs import make_program
from dpsyngen.programs.dead_leaves import SHAPES, DeadLeaves
from dpsyngen.programs.drawing.exact_leaves import RECORDED
from dpsyngen.programs.drawing.shapes import KINDS, padded_masses, padded_radius
from tests.programs.drawn import covered, drawn

# SHA-256 of images 0…7 at seed 7.
GOLDEN: dict[tuple[str, str, int], str] = {
    ("disc", "black-white", 1): "ed1c7860d9fe73374e43357a076719778fca139a25b1e64f346efb5f5aad31d0",
    ("square", "black-white", 1): "e1054e3b9f4484584d2dd234a5ea24f6c54cea2c42a8e84f8cf7882077ca5d62",
    ("oriented-square", "black-white", 1): "14c2fd0ef7fe2d14839b7b689e7adbac9f7fab18f2399a4002d9f07097155fa7",
    ("rectangle", "black-white", 1): "a4d0395a000eeb921e037e6be40700ae65100dbc7d7ba92b8566e38df8a0b4c7",
    ("triangle", "black-white", 1): "f64ce147f7d99b2c07c15e21a0ce8ac19a8990519ed57e732fdeafcde41ad616",
    ("quadrilateral", "black-white", 1): "71a3707886ea395ab3d758ce6c0b4c9c2935d77967589294b018b7943eb3aa8f",
    ("mixed", "black-white", 1): "5d382071dc586c8db557752cdfbafe4c6bc2ece34afba989c53d1eb6dc60d5f9",
    ("mixed", "grey", 1): "fb3ef283f15e47fea34b0148e68ffe79f8079ebf423364656521f566116c65d5",
    ("mixed", "rgb", 3): "2162dd159f1bb70e72a83f2aa0855ad2353f5ced2db744124b1c41dc6202c4c9",
    ("mixed", "palette", 3): "6625b068c140b56ba3a8ab21f5d85af89493bc4358d1808ca86d891292b732b4",
}


def _leaves(resolution: int = 32, channels: int = 1, **params: Any) -> DeadLeaves:
    program = make_program("dead-leaves", resolution=resolution, channels=channels, **params)
    assert isinstance(program, DeadLeaves)
    return program


def _numbers(program: DeadLeaves, count: int) -> NDArray[np.int32]:
    """The leaf seen at each pixel, [count, S, S]."""
    nothing = np.empty((0, RECORDED))
    return np.stack([covered(program, i, nothing)[0] for i in range(count)])


def _same_leaf(h: float, r_min: float, r_max: float) -> float:
    """B(h) = γ(h) / (2γ(0) − γ(h)) for discs: that two points at distance h lie on the same leaf."""

    def overlap(r: float) -> float:
        if h >= 2 * r:
            return 0.0
        return 2 * r * r * np.arccos(h / (2 * r)) - h / 2 * np.sqrt(4 * r * r - h * h)

    gamma = integrate.quad(lambda r: r**-3 * overlap(r), r_min, r_max, points=[max(r_min, h / 2)], limit=400)[0]
    whole = np.pi * np.log(r_max / r_min)
    return float(gamma / (2 * whole - gamma))


def test_two_pixels_share_a_leaf_as_often_as_theory_says() -> None:
    numbers = _numbers(_leaves(shape="disc", r_min=1 / 32), 3000)
    for h, stated in [(1, 0.7016), (2, 0.501), (4, 0.315), (8, 0.178)]:
        expected = _same_leaf(h, 1.0, 32.0)
        assert expected == pytest.approx(stated, abs=1e-3)
        share = (numbers[:, :, h:] == numbers[:, :, :-h]).mean((1, 2)), (numbers[:, h:] == numbers[:, :-h]).mean((1, 2))
        for each in share:
            assert abs(each.mean() - expected) < 4.5 * each.std() / np.sqrt(len(each))


def test_grey_levels_have_the_moments_of_a_uniform() -> None:
    levels = _leaves(shape="disc", r_min=1 / 32).batch(range(6000))[:, 0] / 255.0
    means = levels.mean((1, 2))
    assert abs(means.mean() - 1 / 2) < 4.5 * means.std() / np.sqrt(len(means))
    squares = ((levels - 0.5) ** 2).mean((1, 2))
    # 256 levels of equal weight from 0 to 1 have the variance (1/12)·(257/255).
    assert abs(squares.mean() - 257 / 255 / 12) < 4.5 * squares.std() / np.sqrt(len(squares))
    for h in (1, 2, 4, 8):
        d2 = ((levels[:, h:] - levels[:, :-h]) ** 2).mean((1, 2))
        expected = (1 - _same_leaf(h, 1.0, 32.0)) / 6 * 257 / 255
        assert abs(d2.mean() - expected) < 4.5 * d2.std() / np.sqrt(len(d2))


def _border_against_centre(program: DeadLeaves, count: int) -> float:
    """z-score of E[d²] between neighbours along the border less that in the middle; paired, image by image."""
    levels = program.batch(range(count))[:, 0] / 255.0
    along = (levels[:, :, 1:] - levels[:, :, :-1]) ** 2
    middle = program.resolution // 2
    border = (along[:, 0].mean(1) + along[:, -1].mean(1)) / 2
    centre = (along[:, middle - 1].mean(1) + along[:, middle].mean(1)) / 2
    difference = border - centre
    return float(difference.mean() / difference.std() * np.sqrt(count))


@pytest.mark.parametrize("shape", ["disc", "mixed"])
def test_the_border_is_like_the_centre(shape: str) -> None:
    assert abs(_border_against_centre(_leaves(shape=shape), 6000)) < 4.5


def test_reference_mode_is_neither_stationary_nor_a_sample_of_the_model() -> None:
    program = _leaves(shape="disc", r_min=1 / 32, mode="reference")
    assert abs(_border_against_centre(program, 6000)) > 6
    levels = program.batch(range(3000))[:, 0]
    same = (levels[:, 1:] == levels[:, :-1]).mean((1, 2))
    # Equal levels: the same leaf, or one of 256 by chance.  (The published code rounds radii too: 0.76.)
    shared = (same - 1 / 256) / (1 - 1 / 256)
    assert shared.mean() - 4.5 * shared.std() / np.sqrt(len(shared)) > 0.7016


@given(
    st.integers(1, 70),
    st.sampled_from(SHAPES),
    st.integers(0, 2**64 - 1),
    st.floats(1e-5, 0.5),
    st.floats(1e-3, 0.5),
    st.floats(0, 8),
)
@settings(max_examples=60)
def test_every_pixel_is_covered(
    resolution: int, shape: str, seed: int, r_min: float, width: float, exponent: float
) -> None:
    program = _leaves(resolution, shape=shape, seed=seed, r_min=r_min, r_max=r_min + width, exponent=exponent)
    canvas, leaves = covered(program, 5, np.empty((0, RECORDED)))
    assert canvas.min() >= 0  # −1 is uncovered
    assert canvas.max() == leaves - 1  # the last one covered what was left
    params = drawn(program, 5)
    assert params["leaves"] == leaves
    # Each pixel belongs to one leaf, and the record says how many each kept.
    assert np.array_equal(np.bincount(canvas.ravel(), minlength=leaves), params["visible"])


@pytest.mark.parametrize(
    ("exponent", "r_min", "r_max"), [(3.0, 1.0, 32.0), (2.0, 0.5, 9.0), (1.0, 2.0, 3.0), (4.2, 1.0, 32.0)]
)
def test_radius_law(exponent: float, r_min: float, r_max: float) -> None:
    size = 32.0
    total = integrate.quad(lambda r: r**-exponent * (size + 2 * r) ** 2, r_min, r_max, limit=200)[0]
    fine = np.geomspace(r_min, r_max, 20_001)
    cdf = integrate.cumulative_simpson(fine**-exponent * (size + 2 * fine) ** 2, x=fine, initial=0) / total

    masses = np.empty(3)
    assert padded_masses(exponent, r_min, r_max, size, masses) == pytest.approx(total, rel=1e-9)
    u = np.random.default_rng(0).random(20_000)
    direct = [padded_radius(v, exponent, r_min, r_max, masses) for v in u]
    assert stats.kstest(direct, lambda r: np.interp(r, fine, cdf)).pvalue > 1e-3

    # As drawn: the topmost leaf of each image comes from that law and nothing else.
    program = _leaves(exponent=exponent, r_min=r_min / 32, r_max=r_max / 32, shape="disc")
    first = [drawn(program, i)["radius"][0] for i in range(1500)]
    assert stats.kstest(first, lambda r: np.interp(r, fine, cdf)).pvalue > 1e-3


def test_centres_are_uniform_in_the_padded_square() -> None:
    program = _leaves(shape="disc")
    first = [drawn(program, i) for i in range(3000)]
    for axis in ("x", "y"):
        share = [(p[axis][0] + p["radius"][0]) / (32 + 2 * p["radius"][0]) for p in first]
        assert stats.kstest(share, "uniform").pvalue > 1e-3


def test_scaling_the_picture_is_scaling_the_radii() -> None:
    """Every second pixel at [2, 32] is a picture at [1, 16]: same law, so the same share of equal neighbours."""
    fine = _numbers(_leaves(64, shape="mixed", r_min=2 / 64, r_max=0.5), 1500)[:, ::2, ::2]
    coarse = _numbers(_leaves(32, shape="mixed", r_min=1 / 32, r_max=0.5, seed=1), 1500)
    for h in (1, 3, 9):
        a, b = ((n[:, h:] == n[:, :-h]).mean((1, 2)) for n in (fine, coarse))
        assert abs(a.mean() - b.mean()) < 4.5 * np.sqrt(a.var() / len(a) + b.var() / len(b))


def test_pictures_are_scale_invariant_away_from_the_cut_offs() -> None:
    """Power ∝ 1/f², which zooming leaves as it is, for r⁻³ and not for steeper or flatter laws of size."""
    size, frequencies = 128, np.arange(3, 40)
    window = np.outer(np.hanning(size), np.hanning(size))
    axis = np.fft.fftfreq(size, 1 / size)
    ring = np.rint(np.hypot(axis[:, None], axis[None, :]))

    def slope(exponent: float) -> float:
        program = _leaves(size, shape="disc", r_min=1 / size, exponent=exponent)
        power = (np.abs(np.fft.fft2((program.batch(range(200))[:, 0] - 127.5) * window)) ** 2).mean(0)
        return float(np.polyfit(np.log(frequencies), np.log([power[ring == f].mean() for f in frequencies]), 1)[0])

    assert abs(slope(3.0) + 2) < 0.25
    assert slope(2.2) < -2.35
    assert slope(3.8) > -1.65


def test_supersampling_averages_the_finer_picture() -> None:
    smooth = _leaves(24, 3, supersample=4, seed=3).batch(range(6))
    fine = _leaves(96, 3, seed=3).batch(range(6)).astype(float)
    assert np.abs(smooth - fine.reshape(6, 3, 24, 4, 24, 4).mean((3, 5))).max() <= 0.5


def test_palette_images_have_few_colours() -> None:
    images = _leaves(32, 3, colour="palette").batch(range(400))
    counts = np.array([len(np.unique(image.reshape(3, -1), axis=1).T) for image in images])
    assert counts.max() == 8
    assert counts.min() == 2  # a palette has 2 to 8, evenly
    assert abs((counts == 8).mean() - 1 / 7) < 0.06
    grey = _leaves(32, 1, colour="palette").batch(range(50))
    assert max(len(np.unique(image)) for image in grey) <= 8


@pytest.mark.parametrize(("shape", "colour", "channels"), GOLDEN)
def test_golden_images(shape: str, colour: str, channels: int) -> None:
    images = _leaves(28, channels, seed=7, shape=shape, colour=colour).batch(range(8))
    assert hashlib.sha256(images.tobytes()).hexdigest() == GOLDEN[shape, colour, channels]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"mode": "fast"}, "'fast'.*exact, reference"),
        ({"exponent": 9}, r"exponent is 9(\.0)?.*from 0 to 8"),
        ({"exponent": float("nan")}, "exponent is nan"),
        ({"supersample": 0}, "supersample is 0"),
        ({"supersample": 8, "resolution": 1024}, "8192 pixels"),
        ({"mode": "reference", "exponent": 2.0}, "leave out exponent"),
    ],
)
def test_bad_parameters(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _leaves(**{"resolution": 16, **bad})


def test_every_shape_is_named_once() -> None:
    assert (*KINDS, "mixed") == SHAPES
