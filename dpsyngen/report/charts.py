"""Charts of the reports as inline SVG: text stays text, and every colour comes from the page's style sheet.

A chart is drawn about as wide as a phone, so that its letters keep their size there; a page puts several side by side
where there is room.  Each says in its label what it shows, for those who do not see it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 340, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 26, 40
_MOST_POINTS = 240
_MOST_SERIES = 4  # as many as style.css has dashes for


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: as the legend has it.
        points: (x, y), x ascending, all finite.
        tone: "public", "private" or "plain"; the style sheet gives it a colour.
    """

    name: str
    points: Sequence[tuple[float, float]]
    tone: str = "plain"


def line_chart(
    series: Sequence[Series], title: str, *, x_label: str, percent: bool = False, smooth: bool = True
) -> Markup | None:
    """Lines with a running mean over the values themselves; None if no series has two points.

    The y axis is logarithmic where the values, all above 0, span more than a factor of 30.

    Args:
        series: at most four are drawn with dashes of their own.
        title: of the chart, for its label.
        x_label: of the x axis, which counts something, such as steps.
        percent: values are shares, shown as 0 to 100 %.
        smooth: draw the running mean (over a twentieth of the points).
    """
    shown = [s for s in series if len(s.points) > 1]
    if not shown:
        return None
    x_low, x_high = (f(x for s in shown for x, _ in s.points) for f in (min, max))
    y_low, y_high = (f(y for s in shown for _, y in s.points) for f in (min, max))
    logarithmic = not percent and y_low > 0 and y_high / y_low > 30
    if percent:
        y_low, y_high = 0.0, 1.0
    y_ticks = _decades(y_low, y_high) if logarithmic else nice_ticks(y_low, y_high)
    y_low, y_high = min(y_low, y_ticks[0]), max(y_high, y_ticks[-1])
    inner_width, inner_height = WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM

    def across(x: float) -> float:
        return _LEFT + inner_width * (x - x_low) / ((x_high - x_low) or 1)

    def down(y: float) -> float:
        if logarithmic:
            part = math.log(y / y_low) / math.log(y_high / y_low)
        else:
            part = (y - y_low) / ((y_high - y_low) or 1)
        return _TOP + inner_height * (1 - part)

    out: list[str] = []
    for tick in y_ticks:
        y = down(tick)
        text = f"{100 * tick:g} %" if percent else f"{tick:g}"
        out.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(f'<text class="tick" x="{_LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{text}</text>')
    for tick in nice_ticks(x_low, x_high, 5):
        if x_low <= tick <= x_high and tick == round(tick):
            place = f'x="{across(tick):.1f}" y="{HEIGHT - _BOTTOM + 15}"'
            out.append(f'<text class="tick" {place} text-anchor="middle">{tick:,g}</text>')
    out.append(f'<text class="tick" x="{WIDTH - _RIGHT}" y="{HEIGHT - 8}" text-anchor="end">{escape(x_label)}</text>')
    legend = _LEFT
    for number, one in enumerate(shown):
        points = _thinned(one.points)
        look = f"tone-{one.tone} dash-{number % _MOST_SERIES}"
        mean = _running_mean(points, max(1, len(points) // 20))
        drawn = mean if smooth and len(mean) > 1 else points
        if drawn is not points:
            out.append(f'<polyline class="raw tone-{one.tone}" points="{_points(points, across, down)}"/>')
        out.append(f'<polyline class="line {look}" points="{_points(drawn, across, down)}"/>')
        if len(shown) > 1:
            out.append(f'<line class="line {look}" x1="{legend}" x2="{legend + 20}" y1="10" y2="10"/>')
            out.append(f'<text class="tick" x="{legend + 25}" y="13.5">{escape(one.name)}</text>')
            legend += 38 + 7 * len(one.name)
    label = ". ".join([title, *(_in_words(s, x_label, percent) for s in shown)])
    return svg(WIDTH, HEIGHT, label, out)


def _in_words(series: Series, x_label: str, percent: bool) -> str:
    def value(y: float) -> str:
        return f"{100 * y:.0f} %" if percent else f"{y:.3g}"

    (x_first, first), (x_last, last) = series.points[0], series.points[-1]
    x_best, best = min(series.points, key=lambda p: p[1])
    return (
        f"{series.name}: {value(first)} at {x_label} {x_first:g}, {value(last)} at {x_label} {x_last:g}, "
        f"lowest {value(best)} at {x_label} {x_best:g}"
    )


def svg(width: int, height: int, label: str, parts: Sequence[str], *, css_class: str = "") -> Markup:
    """An inline SVG picture.

    Args:
        width, height: of its own coordinates; about CSS pixels.
        label: what it shows, in words.
        parts: SVG elements; texts in them are escaped already.
        css_class: more classes, next to "chart".
    """
    look = f"chart {css_class}" if css_class else "chart"
    opening = f'<svg class="{look}" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">'
    return Markup(opening + "".join(parts) + "</svg>")


def nice_ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round values (1, 2 or 5 times a power of ten apart) that enclose low to high; one more than `about` or so."""
    if high <= low:
        margin = abs(low) * 0.1 or 1.0
        low, high = low - margin, high + margin
    raw = (high - low) / about
    scale = 10.0 ** math.floor(math.log10(raw))
    step = next(m * scale for m in (1, 2, 5, 10) if m * scale >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{n * step:.12g}") for n in range(first, last + 1)]


def _decades(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    step = max(1, -(-(last - first) // 5))
    return [10.0**n for n in range(first, last + step, step)]


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most 240 points: the means of equal runs of them."""
    run = -(-len(points) // _MOST_POINTS)
    if run <= 1:
        return list(points)
    groups = [points[i : i + run] for i in range(0, len(points), run)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def _running_mean(points: Sequence[tuple[float, float]], width: int) -> list[tuple[float, float]]:
    """Means of `width` neighbours, each in the middle of them, so that the line is not late."""
    return [
        (points[i + width // 2][0], sum(y for _, y in points[i : i + width]) / width)
        for i in range(len(points) - width + 1)
    ]


def _points(
    points: Sequence[tuple[float, float]], across: Callable[[float], float], down: Callable[[float], float]
) -> str:
    return " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in points)
