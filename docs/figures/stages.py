"""The log σ axis: who answers where, in the published variant Both and in the default."""

from __future__ import annotations

import math

from docs.figures.canvas import (
    INK,
    MOMENTS,
    MOMENTS_SOFT,
    PRIVATE,
    PRIVATE_SOFT,
    PUBLIC,
    PUBLIC_SOFT,
    SOFT,
    Canvas,
)
from dpsyngen.config import load_config
from dpsyngen.diffusion.stages import stage_map

LOW, HIGH = math.log(0.002), math.log(80)
WHO = {
    "public": ("programs", PUBLIC, PUBLIC_SOFT),
    "private": ("private images, DP-SGD", PRIVATE, PRIVATE_SOFT),
    "moments": ("DP moments", MOMENTS, MOMENTS_SOFT),
    "prior": ("programs: the prior", PUBLIC, PUBLIC_SOFT),
}


def draw() -> str:
    """The SVG file."""
    c = Canvas(
        720,
        330,
        "The log σ axis from a clean image to pure noise. Variant Both: programs train below log σ = −3 and above 2, "
        "private images between. Default, variant Residual: below −3 the prior answers, which programs trained, up to "
        "1.5 private images train, above DP moments answer.",
    )
    row(c, 30, "variant Both, as published thresholds have it", "paper-cpu")
    row(c, 180, "variant Residual, the default preset", "cpu-small")
    return c.svg()


def row(c: Canvas, top: float, title: str, preset: str) -> None:
    """One variant: a band for each stage, over it how often training draws each noise level, where there is any."""
    config = load_config(preset=preset)
    s, n = config.stages, config.network
    stages = stage_map(s.variant, tau_cleaning=s.tau_cleaning, tau_coarse=s.tau_coarse).stages
    left, right, bottom = 12, 708, top + 92

    def across(log_sigma: float) -> float:
        return left + (right - left) * (min(max(log_sigma, LOW), HIGH) - LOW) / (HIGH - LOW)

    c.text(left, top - 8, title, INK, bold=True)
    for stage in stages:
        name, colour, soft = WHO[stage.trainer]
        a, b = across(stage.low), across(stage.high)
        c.rect(a, top, b - a, bottom - top, soft)
        if stage.trainer in ("public", "private"):
            levels = [max(stage.low, LOW) + (min(stage.high, HIGH) - max(stage.low, LOW)) * i / 80 for i in range(81)]
            hill = [(across(v), bottom - 58 * math.exp(-0.5 * ((v - n.noise_mean) / n.noise_std) ** 2)) for v in levels]
            c.area([(a, bottom), *hill, (b, bottom)], colour, opacity=0.25)
        c.text((a + b) / 2, top + 18, stage.name, colour, at="middle", bold=True)
        c.text((a + b) / 2, top + 33, name, colour, size=12, at="middle")
        if stage.low > -math.inf:
            c.line([(a, top), (a, bottom + 6)], SOFT, width=1.2, dash="4 3")
            c.text(a, bottom + 20, f"log σ = {stage.low:g}".replace("-", "−"), INK, size=12, at="middle")
    c.line([(left, bottom), (right, bottom)], SOFT, width=1)
    c.text(left, bottom + 20, "← clean image, σ = 0.002", SOFT, size=12)
    c.text(right, bottom + 20, "σ = 80, noise →", SOFT, size=12, at="end")
