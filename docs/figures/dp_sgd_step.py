"""One step of DP-SGD, computed: who is sampled, how gradients are clipped, what is added, what is released."""

from __future__ import annotations

import math

import numpy as np
import torch

from docs.figures.canvas import GREY_SOFT, INK, LINE, PRIVATE, PRIVATE_SOFT, PUBLIC, SOFT, Canvas
from dpsyngen.privacy.noise import noisy_mean
from dpsyngen.privacy.per_example import PerExampleGradients
from dpsyngen.privacy.randomness import Randomness, poisson_sample

RECORDS, RATE, NOISE = 60, 0.15, 1.0
PIXELS = 52.0  # of the figure, for the clipping norm C = 1


def draw() -> str:
    """The SVG file."""
    randomness = Randomness.from_insecure_seed(8)
    chosen = poisson_sample(randomness, 0, RECORDS, RATE)
    # Made-up gradients in the plane that point roughly one way, as gradients of one batch do; through the real engine.
    generator = np.random.default_rng(3)
    lengths, angles = generator.lognormal(0.1, 0.55, RECORDS), generator.normal(0.5, 0.6, RECORDS)
    wanted = torch.tensor(np.stack([lengths * np.cos(angles), lengths * np.sin(angles)], 1), dtype=torch.float32)[
        chosen
    ]
    model = torch.nn.Linear(2, 1, bias=False)
    engine = PerExampleGradients(model, clipping_norm=1.0, workers=1)
    clipped = engine.sum(lambda part: model(wanted[part])[:, 0], len(chosen))
    total = clipped.sums[0][0]
    released = noisy_mean(
        clipped, noise_multiplier=NOISE, expected_examples=RATE * RECORDS, randomness=randomness, step=0
    )[0][0] * (RATE * RECORDS)

    c = Canvas(
        720,
        316,
        f"One step of DP-SGD. {len(chosen)} of {RECORDS} records are drawn, each on its own; their gradients are "
        "cut to length C; the sum gets Gaussian noise and is divided by the expected batch.",
    )
    for number, (x, title) in enumerate(
        ((12.0, "sample"), (192, "clip"), (372, "add up, add noise"), (588, "release"))
    ):
        c.text(x, 24, f"{number + 1}  {title}", INK, size=14, bold=True)

    for i in range(RECORDS):
        x, y = 20 + 14.5 * (i % 10), 52 + 14.5 * (i // 10)
        picked = i in chosen
        c.rect(x, y, 11, 11, PRIVATE if picked else GREY_SOFT, edge="none" if picked else LINE, round=2)
    _words(
        c,
        12,
        168,
        [
            "each record in with",
            f"probability q = {RATE},",
            f"here {len(chosen)} of {RECORDS};",
            "next time another number",
        ],
    )

    centre = (248.0, 108.0)
    c.circle(*centre, PIXELS, PRIVATE_SOFT, edge=PRIVATE)
    for gradient in wanted:
        length = float(gradient.norm())
        _vector(c, centre, gradient, LINE)
        _vector(c, centre, gradient / max(1.0, length), PRIVATE)
    c.text(centre[0] - 30, centre[1] + PIXELS + 16, "length C", PRIVATE, size=12)
    outside = int((clipped.norms > 1).sum())
    _words(
        c,
        192,
        196,
        [
            f"{outside} of {len(chosen)} gradients are",
            "longer than C and are cut;",
            "one image moves the sum",
            "by C at most",
        ],
    )

    start, scale = (378.0, 152.0), PIXELS * 0.46
    ends = [_at(start, v, scale) for v in (total, released)]
    c.circle(*ends[0], NOISE * scale, "none", edge=SOFT)
    c.arrow(start, ends[0], PRIVATE, width=2.5)
    c.arrow(ends[0], ends[1], SOFT, width=2)
    c.arrow(start, ends[1], PUBLIC, width=2.5)
    _words(
        c,
        372,
        196,
        [
            "sum of clipped gradients (red)",
            "+ noise N(0, (zC)²), z = 1 (grey;",
            "circle: one standard deviation)",
            "= what is used (green)",
        ],
    )

    c.rect(588, 44, 120, 58, "#d5efeb", round=6)
    c.text(648, 68, "noisy sum", PUBLIC, at="middle", bold=True)
    c.line([(604, 75), (692, 75)], PUBLIC, width=1.2)
    c.text(648, 92, f"q·n = {RATE * RECORDS:g}", PUBLIC, at="middle")
    _words(
        c,
        588,
        124,
        ["divided by the", "expected batch,", "a constant; then", "Adam, EMA and all", "that follows is free"],
    )

    c.rect(12, 272, 696, 32, GREY_SOFT, round=6)
    c.text(24, 293, "before all this: the step is written into the ledger, and is on the disk", INK, size=13)
    return c.svg()


def _at(origin: tuple[float, float], vector: torch.Tensor, scale: float = PIXELS) -> tuple[float, float]:
    return origin[0] + scale * float(vector[0]), origin[1] - scale * float(vector[1])


def _vector(c: Canvas, origin: tuple[float, float], vector: torch.Tensor, colour: str) -> None:
    if math.hypot(*vector.tolist()) > 0.05:
        c.arrow(origin, _at(origin, vector), colour, width=1.6)


def _words(c: Canvas, x: float, y: float, lines: list[str]) -> None:
    for number, line in enumerate(lines):
        c.text(x, y + 17 * number, line, SOFT, size=12.5)
