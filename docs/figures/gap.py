"""Why the ends of the axis can be left to others: the gap between two optimal denoisers, in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from docs.figures.canvas import INK, PRIVATE, PUBLIC, SOFT, Axes, Canvas
from dpsyngen.thresholds.toys import ExactMixture, gaussian_gap, gaussian_loss

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


def images(mean: float, slope: float) -> ExactMixture:
    """A Gaussian on a row of pixels whose variance falls with frequency j like j^-slope, with a little sensor noise."""
    j = torch.arange(PIXELS, dtype=torch.float64)
    basis = torch.cos(math.pi * (j[None] + 0.5) * j[:, None] / PIXELS)
    basis = basis / basis.norm(dim=1, keepdim=True)
    variances = (j + 1) ** -slope
    covariance = basis.mT @ torch.diag(variances * 0.15 * PIXELS / variances.sum() + 0.03**2) @ basis
    return ExactMixture(
        torch.ones(1, dtype=torch.float64),
        torch.full((1, PIXELS), mean, dtype=torch.float64),
        covariance[None],
    )


def gap(teacher: ExactMixture, student: ExactMixture) -> Callable[[float], float]:
    """log₁₀ of the relative gap, as a function of log σ."""

    def at(log_sigma: float) -> float:
        sigma = math.exp(log_sigma)
        return math.log10(gaussian_gap(teacher, student, sigma) / gaussian_loss(teacher, sigma))

    return at
