"""What a budget buys: ε against steps for three amounts of noise, and ε of groups, by the accountant of every run."""

from __future__ import annotations

import math

from docs.figures.canvas import INK, MOMENTS, PRIVATE, PUBLIC, Axes, Canvas
from dpsyngen.privacy.accounting import Mechanism, epsilon

RECORDS, BATCH, DELTA = 60_000, 1024, 1e-5
NOISES = ((1.0, PRIVATE, ""), (2.0, MOMENTS, "7 3"), (4.0, PUBLIC, "2 2"))
STEPS = (10, 100, 1000, 10_000)
GROUPS = (1, 2, 4, 7, 10)


def draw() -> str:
    """The SVG file."""
    c = Canvas(
        720,
        330,
        "Left: ε against steps of DP-SGD for 60,000 images in expected batches of 1,024, for noise multipliers 1, 2 "
        "and 4; more noise and fewer steps mean a smaller ε. Right: ε for groups of up to 10 images of one person in a "
        "run with ε near 1 for one image; it grows faster than the group.",
    )
    q = BATCH / RECORDS
    c.text(12, 20, "ε by steps and noise multiplier z", bold=True)
    left = Axes(c, (52, 56, 388, 282), (1, 4), (math.log10(0.05), math.log10(20)))
    left.frame(
        [(1, "10"), (2, "100"), (3, "1,000"), (4, "10,000")],
        [(math.log10(v), f"{v:g}") for v in (0.1, 0.3, 1, 3, 10)],
        "steps",
        "ε at δ = 10⁻⁵",
    )
    for z, colour, dash in NOISES:
        curve = {math.log10(t): math.log10(epsilon([Mechanism(q, z, t)], DELTA)) for t in STEPS}
        left.curve(curve.__getitem__, list(curve), colour, dash=dash)
        c.text(left.across(2.05), left.down(curve[2.0]) - 8, f"z = {z:g}", colour, size=12.5, at="end", bold=True)

    c.text(428, 20, "ε of several images of one person", bold=True)
    z = 1.8
    values = {g: epsilon([Mechanism(q, z, 600)], DELTA, "pld", g) for g in GROUPS}
    top = 10 * math.ceil(values[10] / 10)
    right = Axes(c, (468, 56, 706, 282), (1, 10), (0, top))
    right.frame(
        [(g, str(g)) for g in GROUPS],
        [(v, f"{v:g}") for v in range(0, top + 1, 5 if top <= 20 else 10)],
        "images that come or go together, g",
        "ε at δ = 10⁻⁵",
    )
    right.curve(lambda g: values[int(g)], list(values), PRIVATE)
    for g, value in values.items():
        c.circle(right.across(g), right.down(value), 3.2, PRIVATE)
    right.curve(lambda g: g * values[1], (1, 10), INK, width=1.4, dash="4 3")
    c.text(right.across(7.2), right.down(7.2 * values[1]) + 22, "g times ε", INK, size=12.5)
    return c.svg()
