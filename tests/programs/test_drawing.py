"""The building blocks against independent implementations: functions, transform, raster, gamma draws, colours."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from matplotlib.path import Path
from numpy.typing import NDArray
from scipy import special, stats

from dpsyngen.programs.drawing import portable
from dpsyngen.programs.drawing.colours import MIX_COLOURS, MIX_VALUES, colour_mix, ground_colour, ink_colour
from dpsyngen.programs.drawing.counter_rng import below, fill_normal, fill_uniform
from dpsyngen.programs.drawing.fields import inverse_2d, power_of_two
from dpsyngen.programs.drawing.raster import add_segment, fill_polygon, stretch
from dpsyngen.programs.wavelet_marginal import LOW_PASS, fill_heavy_tailed

ZERO = np.uint64(0)


@given(st.floats(0, 1))
def test_cosine_and_sine(turns: float) -> None:
    cos, sin = portable.cos_sin(turns)
    assert abs(cos - math.cos(2 * math.pi * turns)) < 1e-15 * 8
    assert abs(sin - math.sin(2 * math.pi * turns)) < 1e-15 * 8
    assert abs(cos * cos + sin * sin - 1) < 1e-15


@given(st.floats(-1000, 1000), st.floats(1e-300, 1e300))
def test_exponential_and_logarithm(x: float, y: float) -> None:
    assert portable.exp2(x) == pytest.approx(2.0**x, rel=3e-15, abs=1e-300)
    assert portable.log2(y) == pytest.approx(math.log2(y), rel=1e-15, abs=1e-15)


@given(st.floats(1e-3, 1e3), st.floats(-8, 8), st.floats(0.05, 60))
def test_power_and_gamma(x: float, y: float, a: float) -> None:
    assert portable.power(x, y) == pytest.approx(x**y, rel=1e-13)
    assert portable.log2_gamma(a) == pytest.approx(special.gammaln(a) / math.log(2), rel=1e-12, abs=1e-12)


def test_edge_values() -> None:
    assert portable.exp2(-2000.0) == 0.0
    assert portable.exp2(1024.0) == math.inf
    assert portable.log2(0.0) == -math.inf
    assert portable.power(0.0, 2.0) == 0.0
    assert portable.power(0.0, 0.0) == 1.0


@pytest.mark.parametrize("count", [1, 2, 3, 5, 4001])
def test_normals_and_uniforms(count: int) -> None:
    normal, uniform = np.empty(count), np.empty(count)
    assert fill_normal(ZERO, ZERO, ZERO, ZERO, normal) == -(-count // 4)
    assert fill_uniform(ZERO, ZERO, ZERO, ZERO, uniform) == -(-count // 4)
    assert len(set(normal)) == len(set(uniform)) == count
    if count > 1000:
        assert stats.kstest(normal, "norm").pvalue > 1e-3
        assert stats.kstest(uniform, "uniform").pvalue > 1e-3


def test_below_is_even() -> None:
    words = np.linspace(0, 2**32 - 1, 7001).astype(np.uint64)
    counts = np.bincount([below(w, 7) for w in words])
    assert len(counts) == 7
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("n", [1, 2, 8, 64])
def test_transform_is_numpys(n: int) -> None:
    rng = np.random.default_rng(n)
    z = rng.normal(size=(n, n)) + 1j * rng.normal(size=(n, n))
    re, im = z.real.copy(), z.imag.copy()
    inverse_2d(re, im)
    assert np.abs(re + 1j * im - np.fft.ifft2(z) * n * n).max() < 1e-12 * n * n
    re, im = z.real.copy(), z.imag.copy()
    inverse_2d(im, re)  # swapped: forward
    assert np.abs(re + 1j * im - np.fft.fft2(z)).max() < 1e-12 * n * n


def test_power_of_two() -> None:
    assert [power_of_two(n) for n in (1, 2, 3, 28, 32, 33)] == [1, 2, 4, 32, 32, 64]


def _sampled(xs: NDArray[np.float64], ys: NDArray[np.float64], size: int, factor: int = 40) -> NDArray[np.float64]:
    """The share of a grid of points within each pixel that lies in the polygon."""
    places = (np.arange(size * factor) + 0.5) / factor
    grid = np.stack(np.meshgrid(places, places), -1).reshape(-1, 2)
    inside = Path(np.stack([xs, ys], 1)).contains_points(grid).astype(float)
    return np.asarray(inside.reshape(size, factor, size, factor).mean((1, 3)))


@given(st.integers(0, 10_000), st.integers(3, 9), st.floats(0.2, 1.6))
@settings(max_examples=40)
def test_polygons_cover_what_lies_inside(seed: int, corners: int, radius: float) -> None:
    """Star-shaped polygons, some of which leave the canvas, against counting points."""
    rng = np.random.default_rng(seed)
    size = 12
    angles = np.sort(rng.uniform(0, 2 * np.pi, corners))
    assume(np.diff(angles, append=angles[0] + 2 * np.pi).max() < np.pi)  # else outlines may cross themselves
    radii = rng.uniform(0.3, 1, corners) * radius * size / 2
    x, y = rng.uniform(0, size, 2)
    xs, ys = x + radii * np.cos(angles), y + radii * np.sin(angles)
    cover = np.empty((size, size))
    for order in (slice(None), slice(None, None, -1)):  # either direction
        fill_polygon(xs[order].copy(), ys[order].copy(), cover)
        difference = np.abs(cover - _sampled(xs, ys, size))
        assert difference.max() < 0.05


def test_polygon_areas_are_exact() -> None:
    cover = np.empty((16, 16))
    xs, ys = np.array([2.25, 13.75, 9.5, 4.125]), np.array([3.5, 1.25, 12.75, 10.5])
    fill_polygon(xs, ys, cover)
    shoelace = 0.5 * abs(np.sum(xs * np.roll(ys, -1) - ys * np.roll(xs, -1)))
    assert cover.sum() == pytest.approx(shoelace, rel=1e-12)


def test_segments_have_their_width_and_length() -> None:
    cover = np.zeros((64, 64))
    add_segment(cover, 12.0, 30.0, 52.0, 34.0, 4.0, 4.0)
    length = math.hypot(40, 4)
    assert cover.sum() == pytest.approx(8 * length + math.pi * 16, rel=5e-3)
    before = cover.copy()
    add_segment(cover, 12.0, 30.0, 52.0, 34.0, 4.0, 4.0)
    assert np.array_equal(cover, before)  # twice is once


def test_stretch_uses_the_full_range() -> None:
    canvas = np.random.default_rng(0).normal(size=(3, 8, 8))
    out = np.empty((3, 8, 8), dtype=np.uint8)
    stretch(canvas, out)
    assert (out.min(), out.max()) == (0, 255)
    stretch(np.ones((3, 8, 8)), out)
    assert (out == 128).all()


@pytest.mark.parametrize("r", [0.4, 0.8, 1.0, 2.0, 4.0])
def test_heavy_tailed_draws(r: float) -> None:
    out = np.empty((90, 90))
    fill_heavy_tailed(np.uint64(3), ZERO, ZERO, r, 5.0, out)
    scale = 5.0 * math.exp(0.5 * (special.gammaln(1 / r) - special.gammaln(3 / r)))
    assert stats.kstest(out.ravel(), stats.gennorm(r, scale=scale).cdf).pvalue > 1e-3
    assert stats.gennorm(r, scale=scale).std() == pytest.approx(5.0)


def test_wavelet_is_orthonormal_with_four_vanishing_moments() -> None:
    h = np.array(LOW_PASS)
    for shift in (0, 2, 4, 6):
        assert np.dot(h[shift:], h[: 8 - shift]) == pytest.approx(float(shift == 0), abs=1e-11)
    g = h[::-1] * np.tile([1.0, -1.0], 4)
    for moment in range(4):
        assert np.dot(g, np.arange(8.0) ** moment) == pytest.approx(0, abs=1e-8)


def test_colour_mix_is_the_covariance_of_its_palette() -> None:
    colours, weights, root = colour_mix(np.random.default_rng(5).random(MIX_VALUES))
    assert 3 <= len(colours) == len(weights) <= MIX_COLOURS
    assert weights.sum() == pytest.approx(1)
    covariance = np.cov(colours.T, aweights=weights, bias=True)
    assert np.allclose(root @ root.T, covariance, atol=1e-9)
    counts = [len(colour_mix(np.random.default_rng(s).random(MIX_VALUES))[1]) for s in range(2000)]
    assert stats.chisquare(np.bincount(counts)[3:]).pvalue > 1e-3


@pytest.mark.parametrize("ground", [0, 1, 2])
def test_inks_stand_out_from_the_ground(ground: int) -> None:
    for index in range(300):
        for grey in (True, False):
            behind = ground_colour(ZERO, np.uint64(index), ground, grey)
            ink = ink_colour(ZERO, np.uint64(index), 2, grey, behind)
            assert np.abs(ink - behind).max() >= 64
            assert ink.min() >= 0
            assert ink.max() <= 255
