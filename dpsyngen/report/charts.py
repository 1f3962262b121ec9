"""Charts of the reports: drawn by matplotlib, put into the page as inline SVG.

Text stays text, and colours are those of the page's style sheet (``style.css``), so that a chart follows the reader's
colour scheme.  A chart is drawn about as wide as a phone, where its letters keep their size; a page puts several side
by side where there is room.  Each says in its label what it shows, for those who do not see it.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

Points = Sequence[tuple[float, float]]

INK, EDGE = "#010203", "#010204"
"""What becomes the colour of the page's text, and of its edges."""
_TONES = {  # line, fill and ground; all are stand-ins for colours of the style sheet
    "public": ("#010205", "#010206", "#010207"),
    "private": ("#010208", "#010209", "#01020a"),
    "moments": ("#01020b", "#01020c", "#01020d"),
}
_TONES["prior"] = _TONES["public"]  # it comes from programs, too
_CSS = {INK: "currentColor", EDGE: "var(--edge)"}
for _tone, _variable in (("public", "--pub"), ("private", "--priv"), ("moments", "--mom")):
    _CSS |= {c: f"var({_variable}{part})" for c, part in zip(_TONES[_tone], ("", "-fill", "-soft"), strict=True)}

WHO = {
    "private": "private images, DP-SGD",
    "public": "programs, no privacy cost",
    "prior": "programs, shown the DP moments",
    "moments": "DP moments, in closed form",
}
_MOST_POINTS = 240


@contextmanager
def new_axes(width: float, height: float, size: float = 8.5) -> Iterator[tuple[Any, Any]]:
    """A figure of so many inches and its axes, with letters of `size` points; everything is drawn within the context.

    Names of classes and phases come from users: they are never taken for formulas.
    """
    import matplotlib
    from matplotlib.figure import Figure

    look: Any = {"text.parse_math": False, "svg.fonttype": "none", "font.size": size, "text.color": INK}
    look |= {"axes.edgecolor": "#888", "axes.labelcolor": INK, "axes.spines.top": False, "axes.spines.right": False}
    look |= {f"{axis}tick.{what}": colour for axis in "xy" for what, colour in (("color", "#888"), ("labelcolor", INK))}
    with matplotlib.rc_context(look):
        figure = Figure(figsize=(width, height))
        yield figure, figure.subplots()


def inline(figure: Any, name: str, alt: str, css_class: str = "") -> Markup:
    """The figure as SVG that can stand in a page beside others: the same figure gives the same text.

    `name` is unique in the page; `alt` says what it shows, in words and numbers.
    """
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(file, format="svg", bbox_inches="tight", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    box = re.search(r'viewBox="([^"]+)"', text)
    assert box is not None
    text = text[text.index(">", text.index("<svg")) + 1 :].strip()
    # Neither metadata nor rules for the whole page, which matplotlib writes into each picture.
    text = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    used = set(re.findall(r"""(?:href="|url\()#([^")]+)""", text))
    # Those that are used follow from the salt, so they are unique in the page; the others are not.
    text = re.sub(r' id="([^"]+)"', lambda m: m[0] if m[1] in used else "", text)
    # The letters are the page's.
    text = re.sub(r"font-family: [^;\"]*;? ?", "", re.sub(r"\s*\n\s*", " ", text))
    for colour, css in _CSS.items():
        text = text.replace(colour, css)
    look = f"chart {css_class}".strip()
    opening = f'<svg class="{look}" viewBox="{box[1]}" role="img" aria-label="{escape(alt)}" stroke-linejoin="round">'
    return Markup(opening + text)


def line_chart(lines: Mapping[str, Points], title: str, tone: str, *, percent: bool = False) -> Markup | None:
    """Lines over steps, with a running mean over the values themselves; None if no line has two points.

    The y axis is logarithmic where the values, all above 0, span more than a factor of 30.

    Args:
        lines: (step, y) of each by name, steps ascending, all finite.
        tone: "public" or "private".
        percent: values are shares, shown as 0 to 100 %.
    """
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    lines = {name: points for name, points in lines.items() if len(points) > 1}
    if not lines:
        return None
    colour, fill, _ = _TONES[tone]
    with new_axes(4.2, 2.3, 10.5) as (figure, axes):
        dashes: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1.5, 2)))
        for number, (name, points) in enumerate(lines.items()):
            x, y, mean = smoothed(points)
            start = (len(x) - len(mean)) // 2  # in the middle of what it is the mean of, so that the line is not late
            axes.plot(x, y, color=fill, lw=1, alpha=0.4)
            axes.plot(x[start : start + len(mean)], mean, color=colour, lw=2, ls=dashes[number % 4], label=name)
        values = [y for points in lines.values() for _, y in points]
        if percent:
            axes.set_ylim(0, 1.03)
            axes.yaxis.set_major_formatter(PercentFormatter(1, 0, " %"))
        elif min(values) > 0 and max(values) > 30 * min(values):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.grid(axis="y", color=EDGE, alpha=0.3, lw=0.8)
        axes.set_xlabel("step")
        if len(lines) > 1:
            axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=2)
        words = [f"{name}: {_in_words(points, percent)}" for name, points in lines.items()]
        return inline(figure, "line-" + slug(title), ". ".join([title, *words]))


def smoothed(points: Points) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """x, y and running mean of y over a twentieth of the points; of a long line at most 240 points, means of runs."""
    run = -(-len(points) // _MOST_POINTS)
    x, y = (np.array([v[i : i + run].mean() for i in range(0, len(v), run)]) for v in np.array(points, float).T)
    width = max(1, len(y) // 20)
    return x, y, np.convolve(y, np.full(width, 1 / width), "valid")


def _in_words(points: Points, percent: bool) -> str:
    def at(x: float, y: float) -> str:
        return f"{100 * y:.0f} % at step {x:g}" if percent else f"{y:.3g} at step {x:g}"

    return f"{at(*points[0])}, {at(*points[-1])}, lowest {at(*min(points, key=lambda p: p[1]))}"


def slug(text: str) -> str:
    """A name for files and for elements of a page."""
    return re.sub(r"[^A-Za-z0-9.=+-]+", "_", text)


def stage_chart(stages: Sequence[Mapping[str, Any]], network: Mapping[str, Any], sampling: Mapping[str, Any]) -> Markup:
    """The log σ axis: who trained which stage, and how training noise levels are spread.

    Args:
        stages: of the certificate, from the clean end: name, log_sigma_low, log_sigma_high, trained_by.
        network, sampling: sections of the configuration: noise_mean and noise_std, sigma_min and sigma_max.
    """
    mean, std = network["noise_mean"], network["noise_std"]
    sigma_min, sigma_max = sampling["sigma_min"], sampling["sigma_max"]
    low, high = math.log(sigma_min) - 0.6, math.log(sigma_max) + 0.6
    ticks = [sigma_min]
    ticks += [t for t in (0.01, 0.1, 1.0, 10.0, 100.0) if 6 * sigma_min < t < sigma_max / 6] + [sigma_max]
    said = []
    with new_axes(6.2, 2.0, 10) as (figure, axes):
        for stage in stages:
            a, b = (
                end if stage[name] is None else min(max(stage[name], low), high)
                for name, end in (("log_sigma_low", low), ("log_sigma_high", high))
            )
            _, fill, soft = _TONES[stage["trained_by"]]
            u, who = np.linspace(a, b, 160), WHO[stage["trained_by"]]
            axes.axvspan(a, b, color=soft, lw=0)
            label = f"{stage['name']} ({_where(stage)}): {who}"
            hill = np.exp(-(((u - mean) / std) ** 2) / 2) * (stage["trained_by"] in ("public", "private"))
            axes.fill_between(u, hill, color=fill, alpha=0.6, lw=0, label=label)
            if stage["log_sigma_low"] is not None:
                axes.axvline(a, color=EDGE, lw=1, ls=(0, (4, 3)))
            trained = "" if stage["trained_by"] == "moments" else "trained on "
            said.append(f"stage {stage['name']}, {_where(stage)}: {trained}{who}")
        axes.set(xlim=(low, high), ylim=(0, 1.1), yticks=[])
        axes.set_xticks([math.log(t) for t in ticks], [f"{t:g}" for t in ticks])
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("← clean image  ·  noise level σ  ·  pure noise →")
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(-0.02, 1.0), handlelength=1.2, labelspacing=0.3)
        return inline(figure, "stages", f"Stages of the noise levels. {'; '.join(said)}.", "stages")


def _where(stage: Mapping[str, Any]) -> str:
    ends = [
        f"{sign} {round(stage[name], 3):g}".replace("-", "−")
        for sign, name in ((">", "log_sigma_low"), ("<", "log_sigma_high"))
        if stage[name] is not None
    ]
    if len(ends) == 2:
        return f"log σ from {ends[0][2:]} to {ends[1][2:]}"
    return f"log σ {ends[0]}" if ends else "all noise levels"
