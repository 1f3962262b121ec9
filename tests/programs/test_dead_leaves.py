"""Dead leaves as published (reference mode): purity, coverage, laws of radius and colour, spectrum, bad parameters."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from dpsyngen.errors import ConfigError
from dpsyngen.programs import Program, make_program
from dpsyngen.programs.dead_leaves import SHAPES, DeadLeaves
from dpsyngen.programs.drawing.colours import RGB
from dpsyngen.programs.drawing.reference_leaves import EMPTY, leaf_radius, paint, paint_over
from dpsyngen.programs.drawing.shapes import LeafLaw, convex_spans, disc_spans, rectangle_spans
from tests.programs.drawn import leaf_counts

# SHA-256 of images 0…7 at seed 7: what other machines and later versions must draw too.
GOLDEN: dict[tuple[str, str, int], str] = {
    ("disc", "black-white", 1): "85a9602f0330ba23f28d967c8f30f90356de40d9304ca16c487e749c06143afb",
    ("square", "black-white", 1): "134b2b6ca3f655cc6b1f724f454db3706b1dd471d6eb3955f2baf51c51d23ec8",
    ("oriented-square", "black-white", 1): "9256a42de02147674b8f25dd90a85dbd5bc8f43ba7ea0138f092c097992616b1",
    ("rectangle", "black-white", 1): "0cc6d1fc6117838546b7006a32242c995832e3f1dcba03d864c8c3be2d1e7ce5",
    ("triangle", "black-white", 1): "91a44e402a26934dfeaacfbb20b4553a76123dce632ccf6088f1b4b525f8edf4",
    ("quadrilateral", "black-white", 1): "fda99a81475e7a2ad96fc6a4e9b259f641c16f3fb73c378f4ed95ebd175977c0",
    ("mixed", "black-white", 1): "886382757a99265ea099878edf9b018f54f5ee5c5982dcce0769f4523b8f50a4",
    ("mixed", "grey", 1): "d3e5880432aac55e0447f0a9710677901a9aeb137ec26d14cf8d289240018767",
    ("mixed", "rgb", 3): "569de559997c17da3530d5f81e85a0be7e69f25f0ec3e6e9497e8c4ee062694a",
    ("mixed", "black-white", 3): "6009cf595909ee90f9deedaa8ab3b24f5576f351301d1fa2b27145d0de492a59",
    ("mixed", "grey", 3): "535e20c6a2fc228b86c7585335c192c70c215d116f275f4928e734ff9b712947",
}


def _leaves(resolution: int = 16, channels: int = 3, mode: str = "reference", **params: Any) -> Program:
    return make_program("dead-leaves", resolution=resolution, channels=channels, mode=mode, **params)


def _sha(images: NDArray[np.uint8]) -> str:
    return hashlib.sha256(images.tobytes()).hexdigest()


@pytest.mark.parametrize(("shape", "colour", "channels"), GOLDEN)
def test_golden_images(shape: str, colour: str, channels: int) -> None:
    program = _leaves(28, channels, seed=7, shape=shape, colour=colour)
    assert _sha(program.batch(range(8))) == GOLDEN[shape, colour, channels]


def test_compiled_code_computes_what_plain_python_does() -> None:
    """No contraction to fused multiply-add, no inexact library call, no integer wrap-around, no stale cache."""
    code = (
        "import hashlib, dpsyngen.programs as p;"
        "x = p.make_program('dead-leaves', resolution=6, channels=3, seed=1, r_min=0.15, mode='reference');"
        "x = x.batch(range(3));"
        "print(hashlib.sha256(x.tobytes()).hexdigest())"
    )
    plain = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "NUMBA_DISABLE_JIT": "1"},
        capture_output=True,
        text=True,
    )
    assert plain.stdout.strip() == _sha(_leaves(6, seed=1, r_min=0.15).batch(range(3))), plain.stderr


@given(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=9), st.integers(1, 4))
@settings(max_examples=25)
def test_image_depends_on_nothing_but_its_index(indices: list[int], threads: int) -> None:
    program = _leaves()
    alone = np.stack([program(i) for i in indices])
    assert np.array_equal(program.batch(indices, threads=threads), alone)
    assert np.array_equal(program.batch(indices[::-1]), alone[::-1])


def test_indices_seeds_and_shapes_give_different_images() -> None:
    few = [0, 1, 2**32, 2**32 + 1, 2**62]
    batches = [_leaves(seed=seed, shape=shape).batch(few) for seed in (0, 1, 2**32) for shape in SHAPES]
    assert len({image.tobytes() for batch in batches for image in batch}) == len(few) * 3 * len(SHAPES)


@given(
    st.integers(8, 64),
    st.integers(0, len(SHAPES) - 1),
    st.integers(0, 2**64 - 1),
    st.floats(1e-4, 0.5),
    st.floats(1e-3, 0.5),
)
@settings(max_examples=60)
def test_every_pixel_is_covered(resolution: int, shape: int, seed: int, r_min: float, width: float) -> None:
    canvas = np.full((resolution, resolution), EMPTY, dtype=np.int32)
    only = shape if shape < 6 else -1
    law = LeafLaw(np.arange(1.0, 7.0) / 6, only, RGB, False, 3.0, r_min, r_min + width)
    paint_over(canvas, np.uint64(seed), np.uint64(5), law)
    assert canvas.min() >= 0  # an unpainted pixel is EMPTY = −1
    assert canvas.max() <= 0xFFFFFF


@pytest.mark.parametrize("shape", SHAPES)
def test_tiny_leaves_cover_like_a_coupon_collector(shape: str) -> None:
    """Leaves far below a pixel paint the one that holds their centre, so N pixels take N·H_N leaves on average.

    Checks at once that centres are uniform, that slivers never vanish, and that painting stops when covered.
    """
    program = _leaves(8, 1, shape=shape, r_min=1e-4, r_max=2e-4)
    assert isinstance(program, DeadLeaves)
    counts = leaf_counts(program, 2000)
    n = 64
    mean = n * sum(1 / k for k in range(1, n + 1))
    deviation = np.sqrt(sum((1 - k / n) / (k / n) ** 2 for k in range(1, n + 1)))
    assert abs(counts.mean() - mean) < 4.5 * deviation / np.sqrt(len(counts))
    assert abs(counts.std() / deviation - 1) < 0.15


def test_large_leaves_need_few() -> None:
    # Discs of at least 0.95 of the resolution: half of the images need very few.
    program = _leaves(8, 1, shape="disc", r_min=0.95)
    assert isinstance(program, DeadLeaves)
    counts = leaf_counts(program, 200)
    assert counts.min() == 1
    assert np.median(counts) <= 3


@pytest.mark.parametrize(("r_min", "r_max"), [(0.03, 1.0), (0.1, 0.2), (0.5, 0.5001)])
def test_radius_law(r_min: float, r_max: float) -> None:
    def cdf(r: NDArray[np.float64]) -> NDArray[np.float64]:
        def area(x: Any) -> Any:  # ∫ r⁻³ − r_max⁻³ from r_min to x
            return (r_min**-2 - x**-2) / 2 - (x - r_min) / r_max**3

        return np.asarray(area(r) / area(r_max))

    v = np.random.default_rng(0).random(20_000)
    radii = np.array([leaf_radius(x, r_min, r_max) for x in v])
    assert radii.min() >= r_min
    assert radii.max() <= r_max
    assert np.abs(cdf(radii) - (1 - v)).max() < 1e-9  # an exact inverse, not only in distribution
    assert stats.kstest(radii, cdf).pvalue > 1e-3
    assert leaf_radius(0.0, r_min, r_max) == r_max
    assert leaf_radius(1.0, r_min, r_max) == pytest.approx(r_min, rel=1e-12)


def test_radius_is_accurate_in_the_thin_upper_tail() -> None:
    # Near r_max the law reads v·Z ≈ 3/2·(1 − r)², with Z = (0.03⁻² − 1)/2 − 0.97.
    v = 2.0**-53
    expected = np.sqrt(v * ((0.03**-2 - 1) / 2 - 0.97) / 1.5)
    assert 1 - leaf_radius(v, 0.03, 1.0) == pytest.approx(expected, rel=1e-6)


def test_radii_and_centres_of_drawn_discs() -> None:
    """The law as drawn, not only as a function: the share of images that their first disc covers."""
    program = _leaves(16, 1, shape="disc", r_min=0.5)
    assert isinstance(program, DeadLeaves)
    share = (leaf_counts(program, 20_000) == 1).mean()
    rng = np.random.default_rng(1)
    x, y = rng.random((2, 400_000)) * 16
    fine = np.linspace(0.5, 1, 20_001)
    law = (4 - fine**-2.0) / 2 - (fine - 0.5)
    radius = np.interp(rng.random(400_000), law / law[-1], fine) * 16
    farthest = np.hypot(np.maximum(x - 0.5, 15.5 - x), np.maximum(y - 0.5, 15.5 - y))
    expected = (farthest < radius).mean()
    assert 0.002 < expected < 0.5
    assert abs(share - expected) < 4.5 * np.sqrt(expected / 20_000)


@pytest.mark.parametrize(("colour", "levels"), [("grey", 256), ("rgb", 256), ("black-white", 2)])
def test_colours_are_uniform(colour: str, levels: int) -> None:
    images = _leaves(8, 3, colour=colour).batch(range(12_000))
    pixel = images[:, :, 3, 4].astype(int)  # one pixel an image: independent draws
    for channel in pixel.T:
        values, counts = np.unique(channel, return_counts=True)
        assert len(values) == levels
        assert (values[0], values[-1]) == (0, 255)
        assert stats.chisquare(counts).pvalue > 1e-3
    if colour == "rgb":
        correlation = np.corrcoef(pixel.T)[np.triu_indices(3, 1)]
        assert np.abs(correlation).max() < 4.5 / np.sqrt(len(pixel))
    else:
        assert (images == images[:, :1]).all()
        assert np.array_equal(images[:8, :1], _leaves(8, 1, colour=colour).batch(range(8)))


def _spectral_slope(**params: Any) -> float:
    """Exponent of the radially averaged power spectrum over frequencies 3 to 23 cycles an image."""
    size = 64
    window = np.outer(np.hanning(size), np.hanning(size))
    images = (_leaves(size, 1, **params).batch(range(300))[:, 0] - 127.5) * window
    power = (np.abs(np.fft.fft2(images)) ** 2).mean(0)
    axis = np.fft.fftfreq(size, 1 / size)
    radius = np.rint(np.hypot(axis[:, None], axis[None, :]))
    frequencies = np.arange(3, 24)
    return float(np.polyfit(np.log(frequencies), np.log([power[radius == f].mean() for f in frequencies]), 1)[0])


def test_power_spectrum_falls_as_one_over_f_squared() -> None:
    assert -2.45 < _spectral_slope() < -1.75
    # The bounds separate the law from others: few sizes of leaf have another slope.
    assert _spectral_slope(r_min=0.4) < -2.5
    assert _spectral_slope(r_max=0.05) > -1.7


def _inside(kind: str) -> NDArray[np.bool_]:
    y, x = np.mgrid[0:12, 0:12] + 0.5
    if kind == "disc":
        return (x - 5.2) ** 2 + (y - 6.1) ** 2 < 3.7**2
    if kind == "rectangle":
        return (np.abs(x - 5.2) < 3.3) & (np.abs(y - 1.1) < 2.2)
    xs, ys = _QUADRILATERAL
    cross = [(xs[k - 3] - xs[k]) * (y - ys[k]) - (ys[k - 3] - ys[k]) * (x - xs[k]) for k in range(4)]
    return np.all([c > 0 for c in cross], axis=0)


_QUADRILATERAL = (np.array([9.3, 4.2, -2.1, 3.4]), np.array([2.7, 11.2, 5.6, 0.9]))


@pytest.mark.parametrize("kind", ["disc", "rectangle", "quadrilateral"])
def test_painted_pixels_are_those_whose_centres_lie_inside(kind: str) -> None:
    canvas = np.full((12, 12), EMPTY, dtype=np.int32)
    canvas[6, :5] = 1
    inside = _inside(kind)
    starts, stops = np.empty((2, 12), dtype=np.int64)
    if kind == "disc":
        first, stop = disc_spans(12, 5.2, 6.1, 3.7, starts, stops)
    elif kind == "rectangle":
        first, stop = rectangle_spans(12, 5.2, 1.1, 3.3, 2.2, starts, stops)
    else:
        first, stop = convex_spans(12, *_QUADRILATERAL, 4, starts, stops)
    painted, fresh = paint(canvas, starts, stops, first, stop, 9)
    assert np.array_equal(canvas == 9, inside)
    assert (painted, fresh) == (inside.sum(), inside.sum() - inside[6, :5].sum())


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"shape": "star"}, "'star'.*disc, square"),
        ({"shape": None}, "one of disc"),
        ({"colour": "red"}, "'red'.*grey, rgb, black-white"),
        ({"colour": "rgb", "channels": 1}, "needs 3 channels"),
        ({"r_min": 0.0}, r"r_min is 0(\.0)?.*above 0"),
        ({"r_min": -0.1}, "r_min"),
        ({"r_min": float("nan")}, "r_min is nan"),
        ({"r_max": 1.5}, "r_max is 1.5.*at most 1"),
        ({"r_max": float("inf")}, "r_max is inf"),
        ({"r_max": "1"}, "r_max is '1', but must be a number"),
        ({"r_min": None}, "r_min is None, but must be a number"),
        ({"r_min": 0.5, "r_max": 0.5}, "r_min < r_max"),
        ({"r_min": 0.6, "r_max": 0.5}, "r_min < r_max"),
    ],
)
def test_bad_parameters(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _leaves(**bad)
