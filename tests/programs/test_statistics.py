"""The statistic that defines each family, measured on its images."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage, special, stats

from dpsyngen.programs import Program, fractal, make_program, spectrum, wavelet_marginal
from dpsyngen.programs.contours import POINTS
from tests.programs.drawn import drawn


def make(name: str, resolution: int = 32, channels: int = 1, **params: Any) -> Program:
    return make_program(name, resolution=resolution, channels=channels, seed=5, **params)


# ------------------------------------------------------------------------------------------------ spectrum


def test_spectrum_has_exactly_its_amplitudes() -> None:
    """The field itself, before it is rounded: |F(u, v)| · (|u|^(s+d) + |v|^(s−d)) is the same at all frequencies."""
    n = 32
    amplitudes, re, im = np.empty((n, n)), np.empty((n, n)), np.empty((n, n))
    slope, difference, turns = 1.3, 0.1, 0.07
    spectrum.amplitudes_of(slope, difference, turns, amplitudes)
    spectrum.two_fields(np.uint64(1), np.uint64(2), 0, True, amplitudes, re, im)
    f = np.fft.fftfreq(n)
    a = 2 * np.pi * turns
    u = np.abs(f[None, :] * np.cos(a) + f[:, None] * np.sin(a))
    v = np.abs(f[:, None] * np.cos(a) - f[None, :] * np.sin(a))
    below = u ** (slope + difference) + v ** (slope - difference)
    inner = np.ones((n, n), dtype=bool)
    inner[n // 2] = inner[:, n // 2] = inner[0, 0] = False  # the highest frequency is its own opposite
    for field in (re, im):
        transform = np.abs(np.fft.fft2(field)) / n / n
        assert np.allclose((transform * below)[inner], 1.0, rtol=1e-9)
        assert transform[0, 0] < 1e-12
    assert abs(np.corrcoef(re.ravel(), im.ravel())[0, 1]) < 0.4


@pytest.mark.parametrize("slope", [1.0, 2.0])
def test_spectrum_of_images_falls_with_the_slope(slope: float) -> None:
    images = make("spectrum", 64, slope=slope, difference=0.0).batch(range(100))[:, 0].astype(float)
    power = (np.abs(np.fft.fft2(images - images.mean((1, 2), keepdims=True))) ** 2).mean(0)
    f = np.fft.fftfreq(64, 1 / 64)
    ring = np.rint(np.hypot(f[:, None], f[None, :]))
    k = np.arange(2, 24)
    fitted = np.polyfit(np.log(k), np.log([power[ring == r].mean() for r in k]), 1)[0]
    assert abs(fitted + 2 * slope) < 0.12


def test_spectrum_slopes_and_angles_are_uniform() -> None:
    laws = [drawn(make("spectrum"), i) for i in range(1500)]
    assert stats.kstest([p["slope"] for p in laws], "uniform", (0.5, 3)).pvalue > 1e-3
    assert stats.kstest([p["angle"] for p in laws], "uniform", (0, 2 * math.pi)).pvalue > 1e-3
    assert stats.kstest([p["difference"] for p in laws], "norm", (0, 0.05)).pvalue > 1e-3
    assert {drawn(make("spectrum", turn=False), i)["angle"] for i in range(5)} == {0.0}


@pytest.mark.parametrize("name", ["spectrum", "wavelet-marginal", "smooth-noise"])
def test_palette_colours_cover_their_shares(name: str) -> None:
    """The number of pixels of each colour is its weight times the pixels, to the nearest one."""
    from dpsyngen.programs.drawing.colours import MIX_VALUES, colour_mix
    from dpsyngen.programs.drawing.counter_rng import fill_uniform

    program = make(name, 24, 3, colour="palette")
    for index in (0, 1, 2):
        u = np.empty(MIX_VALUES)
        fill_uniform(np.uint64(5), np.uint64(0x636D6978), np.uint64(index), np.uint64(0), u)
        colours, weights, _ = colour_mix(u)
        pixels = program(index).reshape(3, -1).T
        for colour, weight in zip(colours, weights, strict=True):
            share = (pixels == np.floor(256 * colour)).all(1).sum()
            assert abs(share - weight * 576) <= 1.0


# ------------------------------------------------------------------------------------------- wavelets


def _analyse(field: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
    """One level of the periodic orthonormal transform: low, and the bands of rows, columns and both."""
    h = np.array(wavelet_marginal.LOW_PASS)
    g = h[::-1] * np.tile([1.0, -1.0], 4)

    def split(x: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        taps = [np.roll(x, -t, axis=0)[::2] for t in range(8)]
        return sum(a * t for a, t in zip(h, taps, strict=True)), sum(a * t for a, t in zip(g, taps, strict=True))

    left, right = split(field.T)
    low, rows = split(left.T)
    columns, both = split(right.T)
    return low, rows, columns, both


def test_wavelet_coefficients_follow_their_law_in_every_band() -> None:
    side, levels = 64, 4
    tails = np.array([[0.4, 0.8, 0.6], [0.7, 0.5, 0.45], [0.6, 0.6, 0.6], [0.8, 0.4, 0.5]])
    offset, decay = np.array([0, 0]), 1.3
    found: dict[tuple[int, int], list[NDArray[np.float64]]] = {}
    for index in range(12):
        field = np.empty((side, side))
        wavelet_marginal.draw_field(np.uint64(3), np.uint64(index), np.uint64(0), decay, tails, offset, field)
        for level in range(levels):
            field, *bands = _analyse(field)
            for k, band in enumerate(bands):
                found.setdefault((level, k), []).append(band.ravel())
        found.setdefault((levels, 0), []).append(field.ravel())
    for (level, k), bands in found.items():
        r = 2.0 if level == levels else tails[level, k]
        deviation = 2 ** (decay * min(level + 1, levels))
        scale = deviation * math.exp(0.5 * (special.gammaln(1 / r) - special.gammaln(3 / r)))
        assert stats.kstest(np.concatenate(bands), stats.gennorm(r, scale=scale).cdf).pvalue > 1e-4


def test_wavelet_images_are_shifted_copies_of_their_field() -> None:
    program = make("wavelet-marginal", 16)
    params = drawn(program, 2)
    field = np.empty((16, 16))
    wavelet_marginal.draw_field(
        np.uint64(5), np.uint64(2), np.uint64(0), params["decay"], params["tails"], params["offset"], field
    )
    scaled = (field - field.min()) / (field.max() - field.min()) * 255
    assert np.array_equal(np.floor(scaled + 0.5), program(2)[0])


# --------------------------------------------------------------------------------------- smooth noise


def test_perlin_noise_vanishes_at_the_nodes_and_is_smooth() -> None:
    from dpsyngen.programs.smooth_noise import add_octave

    size, cells = 256, 4.0
    field = np.zeros((size, size))
    add_octave(np.uint64(1), np.uint64(1), 0, cells, 1.0, False, field)
    assert np.abs(field).max() <= math.sqrt(0.5) + 1e-12  # the bound of two-dimensional Perlin noise
    assert np.abs(field).max() > 0.3
    # A node lies within half a pixel of some pixel in each cell; slopes there are 1 at most.
    step = cells / size
    blocks = np.abs(field).reshape(4, 64, 4, 64).min((1, 3))
    assert blocks.max() < 2 * step
    assert np.abs(np.diff(field, axis=0)).max() < 4 * step  # continuous, also across cells
    assert np.abs(np.diff(field, 2, axis=1)).max() < 60 * step * step  # and its slope, too


def test_ridged_noise_is_the_fold_of_perlin_noise() -> None:
    from dpsyngen.programs.smooth_noise import add_octave

    plain, ridged = np.zeros((32, 32)), np.zeros((32, 32))
    add_octave(np.uint64(1), np.uint64(1), 0, 3.0, 1.0, False, plain)
    add_octave(np.uint64(1), np.uint64(1), 0, 3.0, 1.0, True, ridged)
    assert np.allclose(ridged, 0.5 - np.abs(plain))


def test_more_cells_are_finer() -> None:
    def correlation(cells: float) -> float:
        images = make("smooth-noise", 64, cells=cells, octaves=1, kind="perlin").batch(range(100))[:, 0].astype(float)
        images -= images.mean((1, 2), keepdims=True)
        return float((images[:, :, 8:] * images[:, :, :-8]).mean() / (images**2).mean())

    assert correlation(1.0) > 0.8
    assert abs(correlation(16.0)) < 0.1


# ------------------------------------------------------------------------------------------- networks


def _fractions_of_power_above(program: Program, frequency: float) -> float:
    images = program.batch(range(60)).astype(float)
    power = (np.abs(np.fft.fft2(images - images.mean((2, 3), keepdims=True))) ** 2).mean((0, 1))
    f = np.fft.fftfreq(program.resolution, 1 / program.resolution)
    return float(power[np.hypot(f[:, None], f[None, :]) > frequency].sum() / power.sum())


def test_strong_pink_noise_gives_networks_high_frequencies() -> None:
    assert _fractions_of_power_above(make("random-network", kind="high-frequency"), 6) > 2 * _fractions_of_power_above(
        make("random-network", kind="random"), 6
    )


def test_filters_of_each_kind_are_what_it_says() -> None:
    from dpsyngen.programs.random_network import ORIENTED, RANDOM, SPARSE, WAVELETS, draw_filters

    def filters(kind: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        out, biases, _ = draw_filters(np.uint64(0), np.uint64(4), np.uint64(0), kind, 5, 6)
        return out, biases

    def wavelets(f: NDArray[np.float32]) -> NDArray[np.int64]:
        """Which wavelet each filter is a multiple of; −1 for none."""
        shapes = WAVELETS.reshape(9, 9) / np.linalg.norm(WAVELETS.reshape(9, 9), axis=1, keepdims=True)
        flat = f.reshape(30, 9) / np.linalg.norm(f.reshape(30, 9), axis=1, keepdims=True)
        match = np.abs(flat @ shapes.T)
        return np.where(match.max(1) > 1 - 1e-5, match.argmax(1), -1).reshape(6, 5)

    for kind in (RANDOM, SPARSE, ORIENTED):  # normalised: each output has the same power for white input
        assert np.allclose((filters(kind)[0] ** 2).sum((1, 2, 3)), 1.4**2, rtol=1e-4)
    assert (wavelets(filters(RANDOM)[0]) == -1).all()
    assert (filters(RANDOM)[1] == 0).all()
    sparse, oriented = wavelets(filters(SPARSE)[0]), wavelets(filters(ORIENTED)[0])
    assert sparse.min() >= 0
    assert (sparse != sparse[0]).any()
    assert oriented.min() >= 0
    assert (oriented == oriented[0]).all()  # one wavelet for each input
    assert 0 < np.abs(filters(SPARSE)[1]).max() <= 0.2


def test_convolution_is_scipys() -> None:
    from dpsyngen.programs.random_network import convolve

    rng = np.random.default_rng(0)
    size, inputs, outputs = 9, 3, 2
    image = rng.normal(size=(inputs, size, size)).astype(np.float32)
    filters = rng.normal(size=(outputs, inputs, 3, 3)).astype(np.float32)
    biases, strengths = rng.normal(size=(2, outputs)).astype(np.float32)
    noise = rng.normal(size=(size, size)).astype(np.float32)
    out = convolve(image, filters, biases, strengths, noise)
    for o in range(outputs):
        value = biases[o] + strengths[o] * noise
        value = value + sum(ndimage.correlate(image[i], filters[o, i], mode="nearest") for i in range(inputs))
        expected = np.where(value > 0, value, 0.2 * value)
        assert np.allclose(out[o], expected, atol=1e-4)


def test_network_images_have_the_mean_and_contrast_they_say() -> None:
    program = make("random-network", 32, 3, contrast=[20, 25])
    for index in range(10):
        params, image = drawn(program, index), program(index)
        if params["mean"] - 4 * params["contrast"] > 0 and params["mean"] + 4 * params["contrast"] < 255:
            assert image.mean() == pytest.approx(params["mean"], abs=1)
        assert image.std() == pytest.approx(params["contrast"], rel=0.15)


# ------------------------------------------------------------------------------------------- fractals


def test_every_fractal_is_a_contraction_with_the_stated_sigma_factor() -> None:
    program = make("fractal", maps=[2, 8])
    counts = []
    for index in range(600):
        params = drawn(program, index)
        count = len(params["maps"])
        counts.append(count)
        s = np.linalg.svd(params["maps"][:, :, :2], compute_uv=False)
        assert np.allclose(s, params["singular_values"], atol=1e-9)
        assert s.max() < 1
        factor = (s[:, 0] + 2 * s[:, 1]).sum()
        assert (5 + count) / 2 - 1e-9 <= factor <= (6 + count) / 2 + 1e-9
        assert params["chances"].sum() == pytest.approx(1)
        assert np.abs(params["maps"][:, :, 2]).max() <= 1
    assert stats.chisquare(np.bincount(counts)[2:]).pvalue > 1e-3


def test_fractal_pixels_lie_on_the_attractor() -> None:
    """Each map sends the attractor into itself: points that numpy plays from the maps land where the image is lit."""
    program = make("fractal", 48, points=40, maps=3)
    rng = np.random.default_rng(0)
    for index in range(4):
        params = drawn(program, index)
        maps, chances = params["maps"], params["chances"]
        x = np.zeros((4000, 2))
        for _ in range(60):
            chosen = maps[rng.choice(len(maps), size=len(x), p=chances)]
            x = np.einsum("nij,nj->ni", chosen[:, :, :2], x) + chosen[:, :, 2]
        span = (x.max(0) - x.min(0)).max()
        pixel = np.floor((x - (x.max(0) + x.min(0)) / 2) * (46 / span) + 24).astype(int).clip(0, 47)
        lit = ndimage.binary_dilation(program(index)[0] > 0, iterations=1)
        assert lit[pixel[:, 1], pixel[:, 0]].mean() > 0.97


def test_no_fractal_is_rejected_whatever_the_draw() -> None:
    for seed in range(300):
        maps = fractal.draw_maps(np.uint64(seed), np.uint64(2**62), 8, 8)
        assert maps.shape == (8, 9)
        assert np.isfinite(maps).all()
        assert (maps[:, 8] >= 0).all()
        assert (maps[:, 7] >= maps[:, 8] - 1e-12).all()


# -------------------------------------------------------------------------------- contours and strokes


def test_strokes_follow_their_bezier_curves() -> None:
    program = make("strokes", 64, strokes=1, width=[0.06, 0.06])
    for index in range(20):
        params, image = drawn(program, index), program(index)[0]
        t = np.linspace(0, 1, 200)[:, None]
        p = params["points"][0]
        curve = (1 - t) ** 3 * p[0] + 3 * (1 - t) ** 2 * t * p[1] + 3 * (1 - t) * t**2 * p[2] + t**3 * p[3]
        rows, columns = np.nonzero(image)
        near = np.hypot(columns[:, None] + 0.5 - curve[:, 0], rows[:, None] + 0.5 - curve[:, 1]).min(1)
        assert near.max() < params["widths"].max() / 2 + 1.2
        i, j = np.floor(curve[:, 1]).astype(int), np.floor(curve[:, 0]).astype(int)
        assert (image[i, j] > 0.8 * image.max()).all()
        assert params["widths"] == pytest.approx(0.06 * 64)


def test_contours_have_the_area_of_their_outlines() -> None:
    program = make("contours", 64, figures=1, outline=0.0, gradient=0.0, radius=0.35)
    for index in range(60):
        params, image = drawn(program, index), program(index)[0].astype(float)
        x, y = params["points"][0].T
        area = 0.5 * abs(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1)))
        assert image.sum() / image.max() == pytest.approx(area, rel=0.02, abs=1.5)


def test_mirrored_figures_are_mirror_images() -> None:
    program = make("contours", 64, shape="mirrored", figures=1, upright=True, radius=0.3)
    for index in range(20):
        points = drawn(program, index)["points"][0]
        middle = points[:, 0].mean()
        assert np.allclose(points[: POINTS // 2, 0] - middle, middle - points[: POINTS // 2 - 1 : -1, 0])
        assert np.allclose(points[: POINTS // 2, 1], points[: POINTS // 2 - 1 : -1, 1])


def test_superellipses_satisfy_their_equation() -> None:
    program = make("contours", 64, shape="superellipse", figures=1, upright=True)
    for index in range(20):
        points = drawn(program, index)["points"][0]
        centre = (points.max(0) + points.min(0)) / 2
        a, b = (points.max(0) - points.min(0)) / 2
        x, y = (np.abs(points - centre) / (a, b)).T
        k = POINTS // 8  # at an eighth of a turn both coordinates are 2^(−1/m)
        m = -math.log(2) / math.log(x[k])
        assert 0.49 < m < 8.1
        assert np.allclose(x**m + y**m, 1.0, atol=1e-6)


def test_figures_are_where_they_fit() -> None:
    program = make("contours", 64, figures=1)
    points = np.stack([drawn(program, i)["points"][0] for i in range(200)])
    assert points.min() > -1e-9
    assert points.max() < 64 + 1e-9
    shapes = [drawn(program, i)["shapes"][0] for i in range(400)]
    counts = [shapes.count(s) for s in ("polygon", "superellipse", "mirrored", "harmonics")]
    assert stats.chisquare(counts).pvalue > 1e-3


# ------------------------------------------------------------------------------ mixtures and wrappers


def test_mixture_follows_its_weights_and_its_parts() -> None:
    program = make("mixture", 16, programs=["strokes", "contours", "strokes"], weights=[1, 3, 4])
    chosen = [drawn(program, i)["program"] for i in range(2000)]
    assert stats.chisquare(np.bincount(chosen), 2000 * np.array([1, 3, 4]) / 8).pvalue > 1e-3
    for index in range(30):
        assert np.array_equal(program(index), program.programs[chosen[index]](index))
    # Two parts of one family are independent.
    assert not np.array_equal(program.programs[0].batch(range(9)), program.programs[2].batch(range(9)))
    never = make("mixture", 16, programs=["strokes", "contours"], weights=[0, 1])
    assert {drawn(never, i)["program"] for i in range(50)} == {1}


def test_affine_is_scipys() -> None:
    program = make("affine", 24, source={"name": "dead-leaves", "r_min": 0.2})
    for index in range(6):
        p = drawn(program, index)
        source = program.source(index)[0].astype(float)
        a = math.radians(p["turn"])
        turn = np.array([[math.cos(a), math.sin(a)], [-math.sin(a), math.cos(a)]])
        back = np.array([[1, -p["shear"]], [0, 1]]) @ turn / p["scale"]  # (x, y) of the result to (x, y) of the source
        matrix = back[::-1, ::-1]
        centre = 11.5
        offset = centre - matrix @ (centre + 24 * np.array(p["shift"][::-1]))
        expected = ndimage.affine_transform(source, matrix, offset, order=1, mode="reflect")
        assert np.abs(program(index)[0] - expected).max() <= 0.51


def test_blur_is_scipys() -> None:
    program = make("blur", 24, source={"name": "dead-leaves", "r_min": 0.1}, deviation=[0.3, 3.0])
    for index in range(6):
        deviation = drawn(program, index)["deviation"]
        expected = ndimage.gaussian_filter(program.source(index)[0].astype(float), deviation, mode="reflect")
        assert np.abs(program(index)[0] - expected).max() < 0.6
    assert np.array_equal(make("blur", 8, source="strokes", deviation=0.0).batch(range(5)),
                          make("blur", 8, source="strokes", deviation=0.0).source.batch(range(5)))  # fmt: skip


def test_invert() -> None:
    half = make("invert", 8, source="strokes", probability=0.5)
    inverted = [drawn(half, i)["inverted"] for i in range(600)]
    assert abs(np.mean(inverted) - 0.5) < 0.1
    for index in range(10):
        source = half.source(index)
        assert np.array_equal(half(index), 255 - source if inverted[index] else source)
