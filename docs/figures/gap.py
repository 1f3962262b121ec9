"""Why the ends of the axis can be left to others: the gap between two optimal denoisers, in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable

from docs.figures.canvas import INK, PRIVATE, PUBLIC, SOFT, Axes, Canvas

PIXELS = 64
LEVELS = [-6 + 0.1 * i for i in range(111)]


def draw() -> str:
    """The SVG file."""
    private, same_mean, other_mean = images(0.3, 1.6), images(0.3, 1.1), images(-0.1, 1.1)
    c = Canvas(
        720,
        330,
        "Share by which a student's loss exceeds the teacher's, against log σ, for two Gaussian models of images. With "
        "equal means the curve falls at both ends; with different means it stays high at large noise.",
    )
    axes = Axes(c, (60, 46, 706, 268), (-6, 5), (-3, 0.4))
    axes.frame(
        [(v, f"{v}".replace("-", "−")) for v in range(-6, 6, 2)],
        [(-3, "0.1 %"), (-2, "1 %"), (-1, "10 %"), (0, "100 %")],
        "noise level, log σ",
        "relative gap: what the student loses more",
    )
    axes.curve(gap(private, other_mean), LEVELS, PRIVATE)
    axes.curve(gap(private, same_mean), LEVELS, PUBLIC, dash="7 3")
    axes.curve(lambda _: math.log10(0.05), (-6, 5), SOFT, width=1.2, dash="3 3")
    c.text(axes.across(-5.9), axes.down(math.log10(0.05)) - 6, "tolerance 5 %", SOFT, size=12)
    c.text(axes.across(2.4), axes.down(0.12), "another mean", PRIVATE, size=13, bold=True)
    c.text(axes.across(1.3), axes.down(-2.2), "the same mean", PUBLIC, size=13, bold=True, at="end")
    c.text(axes.across(-5.9), axes.down(-2.75), "cleaning", INK, size=13)
    c.text(axes.across(4.9), axes.down(-2.75), "coarse", INK, size=13, at="end")
    return c.svg()


def images(mean: float, slope: float) -> tuple[float, list[float]]:
    """A Gaussian on a row of pixels: its mean, of every pixel, and its variances, the eigenvalues of the covariance.

    The eigenvectors are cosines, so both models share them; variances fall with frequency j like j^-slope, and there
    is a little sensor noise.
    """
    variances = [(j + 1) ** -slope for j in range(PIXELS)]
    return mean, [0.15 * PIXELS * v / sum(variances) + 0.03**2 for v in variances]


def gap(teacher: tuple[float, list[float]], student: tuple[float, list[float]]) -> Callable[[float], float]:
    """log₁₀ of the relative gap, as a function of log σ.

    With the Wiener filters A and B of teacher and student, D_a(x) - D_b(x) = (A - B)(x - m_a) + (I - B)(m_a - m_b); the
    means differ along the first cosine alone.
    """
    (mean_a, values_a), (mean_b, values_b) = teacher, student

    def at(log_sigma: float) -> float:
        square = math.exp(2 * log_sigma)
        a, b = ([v / (v + square) for v in values] for values in (values_a, values_b))
        difference = sum((f - g) ** 2 * (v + square) for f, g, v in zip(a, b, values_a, strict=True))
        difference += PIXELS * ((1 - b[0]) * (mean_a - mean_b)) ** 2
        return math.log10(difference / sum(square * f for f in a))  # the loss of A is Σ λσ²/(λ + σ²)

    return at
