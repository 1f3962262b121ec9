"""The log σ axis as a picture: which stage owns what, who trained it, and how training noise levels are spread."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from dpsyngen.report.charts import svg

WHO = {
    "private": "private images, DP-SGD",
    "public": "programs, no privacy cost",
    "moments": "DP moments, in closed form",
}
_SHORT = {"private": "private, DP-SGD", "public": "programs", "moments": "DP moments"}
_POINTS = 160


def stage_charts(
    stages: Sequence[Mapping[str, Any]], mean: float, std: float, sigma_min: float, sigma_max: float
) -> list[Markup]:
    """The same picture for a wide page and for a phone; style.css shows one of them.

    Args:
        stages: of the certificate, from the clean end: name, log_sigma_low, log_sigma_high, trained_by.
        mean, std: of log σ in training.
        sigma_min, sigma_max: of the sampler.
    """
    return [
        _chart(stages, mean, std, sigma_min, sigma_max, width, look) for width, look in ((720, "wide"), (340, "narrow"))
    ]


def _chart(
    stages: Sequence[Mapping[str, Any]],
    mean: float,
    std: float,
    sigma_min: float,
    sigma_max: float,
    width: int,
    look: str,
) -> Markup:
    low, high = math.log(sigma_min) - 0.6, math.log(sigma_max) + 0.6
    ends = [
        (
            low if s["log_sigma_low"] is None else min(max(s["log_sigma_low"], low), high),
            high if s["log_sigma_high"] is None else min(max(s["log_sigma_high"], low), high),
        )
        for s in stages
    ]

    def across(log_sigma: float) -> float:
        return 2 + (width - 4) * (log_sigma - low) / (high - low)

    names = WHO if look == "wide" else _SHORT
    halves = [3.6 * max(len(s["name"]), len(names[s["trained_by"]])) for s in stages]
    # A label that is wider than its stage would run into its neighbour's: then each has a line of its own.
    crowded = any(across(b) - across(a) < 2 * half for half, (a, b) in zip(halves, ends, strict=True))
    crowded = crowded and len(stages) > 1
    rise = 34 * (len(stages) - 1) if crowded else 0
    top, bottom = 46 + rise, 160 + rise
    out: list[str] = []
    for number, (stage, (a, b)) in enumerate(zip(stages, ends, strict=True)):
        tone, left, right = stage["trained_by"], across(a), across(b)
        out.append(
            f'<rect class="ground tone-{tone}" x="{left:.1f}" y="{top}" width="{right - left:.1f}" '
            f'height="{bottom - top}"/>'
        )
        levels = [a + (b - a) * i / _POINTS for i in range(_POINTS + 1)]
        curve = [
            f"{across(v):.1f},{bottom - (bottom - top - 8) * math.exp(-0.5 * ((v - mean) / std) ** 2):.1f}"
            for v in levels
        ]
        outline = " ".join([f"{left:.1f},{bottom}", *curve, f"{right:.1f},{bottom}"])
        out.append(f'<polygon class="hill tone-{tone}" points="{outline}"/>')
        where = 18 + (34 * number if crowded else 0)
        middle = (left + right) / 2
        middle = min(max(middle, halves[number] + 2), width - halves[number] - 2)
        if crowded:
            out.append(
                f'<line class="grid" x1="{(left + right) / 2:.1f}" x2="{(left + right) / 2:.1f}" y1="{where + 20}" '
                f'y2="{top}"/>'
            )
        for text, size, y in ((stage["name"], "name", where), (names[tone], "tick", where + 16)):
            out.append(
                f'<text class="{size} tone-{tone}" x="{middle:.1f}" y="{y}" text-anchor="middle">{escape(text)}</text>'
            )
        if number:
            out.append(f'<line class="cut" x1="{left:.1f}" x2="{left:.1f}" y1="{top}" y2="{bottom + 26}"/>')
    cuts = [
        (across(a), f"log σ = {_text(stage['log_sigma_low'])}")
        for stage, (a, _) in zip(stages[1:], ends[1:], strict=True)
    ]
    for x, text in _apart(cuts, width):
        out.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 39}" text-anchor="middle">{text}</text>')
    last = -math.inf
    for sigma in (sigma_min, 0.01, 0.1, 1.0, 10.0, sigma_max):
        x = across(math.log(sigma))
        if sigma_min <= sigma <= sigma_max and x - last > 38:
            last = x
            out.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{sigma:g}</text>')
    out.append(f'<line class="axis" x1="2" x2="{width - 2}" y1="{bottom}" y2="{bottom}"/>')
    out.append(f'<text class="tick" x="2" y="{bottom + 56}">← clean image</text>')
    out.append(f'<text class="tick" x="{width / 2}" y="{bottom + 56}" text-anchor="middle">noise level σ</text>')
    out.append(f'<text class="tick" x="{width - 2}" y="{bottom + 56}" text-anchor="end">pure noise →</text>')
    return svg(width, bottom + 62, _in_words(stages), out, css_class=look)


def _text(log_sigma: float) -> str:
    return f"{round(log_sigma, 3):g}".replace("-", "−")


def _apart(labels: Sequence[tuple[float, str]], width: int) -> list[tuple[float, str]]:
    """At most two labels, moved as little as need be for them to stand side by side within 0 to `width`."""
    places, halves = [x for x, _ in labels], [3.4 * len(text) for _, text in labels]
    if len(labels) == 2 and (lack := halves[0] + halves[1] + 6 - (places[1] - places[0])) > 0:
        places = [places[0] - lack / 2, places[1] + lack / 2]
    left = max([0.0, *(h - x for x, h in zip(places, halves, strict=True))])
    right = max([0.0, *(x + h - width for x, h in zip(places, halves, strict=True))])
    return [(x + left - right, text) for x, (_, text) in zip(places, labels, strict=True)]


def _in_words(stages: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    for s in stages:
        below, above = s["log_sigma_low"], s["log_sigma_high"]
        if below is None and above is None:
            where = "all noise levels"
        elif below is None:
            where = f"log σ below {above:g}"
        elif above is None:
            where = f"log σ above {below:g}"
        else:
            where = f"log σ from {below:g} to {above:g}"
        how = "" if s["trained_by"] == "moments" else "trained on "
        parts.append(f"stage {s['name']}, {where}: {how}{WHO[s['trained_by']]}")
    return "Stages of the noise levels. " + "; ".join(parts) + "."
