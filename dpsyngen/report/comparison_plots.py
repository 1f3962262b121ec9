"""Plots of a comparison: quality against ε, the thresholds, compute and classes, every seed shown beside its mean."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpsyngen.experiments.measures import Measure, Row, View, epsilon_name
from dpsyngen.experiments.statistics import summarise
from dpsyngen.files import write_atomically, write_text
from dpsyngen.report.comparison_svg import INK, Plot, finished, label, legend, new_axes, style

THRESHOLDS = {"stages.tau_cleaning": "τ_cleaning (log σ)", "stages.tau_coarse": "τ_coarse (log σ)"}
_LINES = {
    "real": ("trained on real images", (0, (1, 1.5))),
    "test": ("real test images", (0, (1, 1.5))),
    "programs": ("images of programs", (0, (5, 3))),
}


def comparison_plots(view: View) -> list[Plot]:
    """All plots for which there is data."""
    return [plot for plot, _ in _plots(view)]


def write_plots(view: View, folder: Path) -> list[Plot]:
    """Write each plot as SVG and as PNG (on white) into `folder`, made if need be; plots of before are removed."""
    folder.mkdir(mode=0o700, exist_ok=True)
    out = []
    for plot, png in _plots(view):
        # Alone, the picture has no page to take its colour from.
        own = "<style>svg{color:#1d2129}@media(prefers-color-scheme:dark){svg{color:#e7e9ec}}</style>"
        namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        text = re.sub(r"(<svg)([^>]*>)", rf"\1 {namespaces}\2{own}", plot.svg, count=1)
        write_text(folder / f"{plot.name}.svg", text, 0o600)
        write_atomically(folder / f"{plot.name}.png", lambda path, png=png: _save(path, png), 0o600)  # type: ignore[misc]
        out.append(plot)
    wanted = {f"{plot.name}.{suffix}" for plot in out for suffix in ("svg", "png")}
    for path in folder.iterdir():
        if path.suffix in (".svg", ".png") and path.name not in wanted:
            path.unlink()
    return out


def _save(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _plots(view: View) -> Iterator[tuple[Plot, bytes]]:
    accuracies = [m for m in view.measures if m.metric == "accuracy"]
    distances = [m for m in view.measures if m.metric == "frechet"] or [
        m for m in view.measures if m.metric != "accuracy"
    ][:1]
    for measure in [*accuracies, *distances]:
        yield _against_epsilon(view, measure)
    main = [m for m in (view.primary, *distances[:1]) if m is not None]
    for axis in THRESHOLDS:
        for measure in dict.fromkeys(main):
            for epsilon in view.epsilons:
                found = _against_threshold(view, measure, axis, epsilon)
                if found is not None:
                    yield found
    for measure in dict.fromkeys(main):
        for epsilon in view.epsilons:
            found = _against_share(view, measure, epsilon)
            if found is not None:
                yield found
    if view.primary is not None:
        for what in ("seconds", "images"):
            found = _against_compute(view, view.primary, what)
            if found is not None:
                yield found
        found = _by_class(view, view.primary)
        if found is not None:
            yield found


# ------------------------------------------------------------------------------------------------ the plots


def _against_epsilon(view: View, measure: Measure) -> tuple[Plot, bytes]:
    """A line for each variant; with one ε, a line of points for each (see :func:`_at_one_epsilon`)."""
    if len(view.epsilons) == 1:
        return _at_one_epsilon(view, measure)
    rows = [r for r in _plain_rows(view) if any(view.values(measure, e, r) for e in view.epsilons)]
    figure, axes = new_axes(4.3, 3.1)
    said = []
    for number, row in enumerate(rows):
        colour, marker, dash = style(row.variant, number)
        shift = 0.5 * (number - (len(rows) - 1) / 2) / max(5, len(rows))
        places, means = [], []
        for index, epsilon in enumerate(view.epsilons):
            if values := view.values(measure, epsilon, row):
                _points(axes, index + shift, values, colour, marker, 0.035)
                places.append(index + shift)
                means.append(summarise(values).mean)
                said.append(f"{row.name} at {epsilon_name(epsilon)}: {_in_words(values)}")
        axes.plot(places, means, color=colour, ls=dash, lw=1.6, label=row.name, marker=marker, ms=5)
    said += _reference_lines(axes, view, measure)
    axes.set_xticks(range(len(view.epsilons)), [epsilon_name(e).removeprefix("ε = ") for e in view.epsilons])
    axes.set_xlim(-0.5, len(view.epsilons) - 0.5)
    label(axes.set_xlabel, "ε (not to scale)")
    label(axes.set_ylabel, _axis_name(measure))
    legend(axes)
    note = f"Small marks: single runs.  Line and bar: mean ± standard deviation over seeds.  {_direction(measure)}"
    title = f"{_capital(measure.name)} against ε"
    return finished(figure, f"epsilon-{measure.metric}-{measure.on}", title, said, note)


def _at_one_epsilon(view: View, measure: Measure) -> tuple[Plot, bytes]:
    """A line of points for each row, its name beside it."""
    epsilon = view.epsilons[0]
    rows = [r for r in view.rows if view.values(measure, epsilon, r)]
    figure, axes = new_axes(4.3, 0.9 + 0.36 * len(rows))
    said = []
    for number, row in enumerate(rows):
        colour, marker, _ = style(row.variant, number)
        values = view.values(measure, epsilon, row)
        s = summarise(values)
        axes.errorbar(s.mean, number, xerr=s.sd or None, color=colour, marker=marker, ms=6, capsize=2.5, lw=1.3)
        if len(values) > 1:
            axes.scatter(values, [number + 0.27] * len(values), s=10, color=colour, marker=marker, alpha=0.7, lw=0)
        said.append(f"{row.name}: {_in_words(values)}")
    said += _reference_lines(axes, view, measure)
    axes.set_yticks(range(len(rows)), [r.name.replace(" (", "\n(") for r in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    label(axes.set_xlabel, _axis_name(measure))
    legend(axes, columns=1)
    note = f"Small marks: single runs.  Mark and bar: mean ± standard deviation over seeds.  {_direction(measure)}"
    title = f"{_capital(measure.name)}, {epsilon_name(epsilon)}"
    return finished(figure, f"epsilon-{measure.metric}-{measure.on}", title, said, note)


def _against_threshold(view: View, measure: Measure, axis: str, epsilon: float) -> tuple[Plot, bytes] | None:
    """A line for each variant and each combination of the other settings."""
    lines: dict[tuple[str, str], list[tuple[float, Row]]] = {}
    for row in view.rows:
        settings = dict(row.settings)
        value = settings.pop(axis, None)
        if isinstance(value, int | float) and view.values(measure, epsilon, row):
            others = ", ".join(f"{k.rsplit('.', 1)[-1]}={v}" for k, v in sorted(settings.items()))
            lines.setdefault((row.variant, others), []).append((float(value), row))
    if not any(len({x for x, _ in line}) > 1 for line in lines.values()):
        return None
    figure, axes = new_axes(4.3, 3.1)
    said = []
    count = len(lines)
    thresholds = sorted({x for line in lines.values() for x, _ in line})
    step = min((b - a for a, b in itertools.pairwise(thresholds)), default=1.0)
    for number, ((variant, others), line) in enumerate(lines.items()):
        colour, marker, dash = style(variant, number)
        name = line[0][1].variant_name + (f", {others}" if others else "")
        same = [k for k in lines if k[0] == variant]
        if len(same) > 1:  # told apart by the dash
            dash = ("-", "--", ":", "-.")[same.index((variant, others)) % 4]
        shift = 0.06 * step * (number - (count - 1) / 2)
        places, means = [], []
        for x, row in sorted(line, key=lambda at: at[0]):
            values = view.values(measure, epsilon, row)
            _points(axes, x + shift, values, colour, marker, 0.025 * step)
            places.append(x + shift)
            means.append(summarise(values).mean)
            said.append(f"{name} at {x:g}: {means[-1]:.4g}")
        axes.plot(places, means, color=colour, ls=dash, lw=1.6, label=name, marker=marker, ms=5)
    base = [r for r in view.rows if r.variant == view.baseline and not r.settings]
    if base and (values := view.values(measure, epsilon, base[0])):
        colour, _, _ = style(view.baseline, 0)
        axes.axhline(summarise(values).mean, color=colour, lw=1.2, ls=(0, (1, 1.5)), label=f"{base[0].name} (mean)")
        said.append(f"{base[0].name}: {summarise(values).mean:.4g}")
    axes.set_xticks(thresholds, [f"{x:g}" for x in thresholds])
    label(axes.set_xlabel, THRESHOLDS[axis])
    label(axes.set_ylabel, _axis_name(measure))
    legend(axes)
    title = f"{_capital(measure.name)} against {THRESHOLDS[axis].split(' ')[0]}, {epsilon_name(epsilon)}"
    name = f"threshold-{axis.rsplit('.', 1)[-1]}-{measure.metric}-{measure.on}-eps{epsilon:g}"
    note = f"Small marks: single runs.  Line and bar: mean ± standard deviation over seeds.  {_direction(measure)}"
    return finished(figure, name, title, said, note)


def _against_share(view: View, measure: Measure, epsilon: float) -> tuple[Plot, bytes] | None:
    """A line for each variant whose thresholds vary, over the share of the noise levels that programs train alone.

    It holds both thresholds at once, where :func:`_against_threshold` shows one.
    """
    if not set(THRESHOLDS) & set(view.results.axes):
        return None
    lines: dict[str, list[tuple[float, Row]]] = {}
    for row in view.rows:
        share = view.programs_share(row)
        if share is not None and view.values(measure, epsilon, row):
            lines.setdefault(row.variant, []).append((100 * share, row))
    if not any(len({x for x, _ in line}) > 1 for line in lines.values()):
        return None
    figure, axes = new_axes(4.3, 3.1)
    said = []
    for number, (variant, line) in enumerate(lines.items()):
        colour, marker, dash = style(variant, number)
        line.sort(key=lambda at: at[0])
        means = []
        for x, row in line:
            values = view.values(measure, epsilon, row)
            _points(axes, x, values, colour, marker, 1.2)
            means.append(summarise(values).mean)
            said.append(f"{row.name} at {x:.0f} %: {_in_words(values)}")
        # Settings of one share are points of their own, not a line.
        joined = dash if len({x for x, _ in line}) == len(line) else ""
        name = line[0][1].variant_name
        axes.plot([x for x, _ in line], means, color=colour, ls=joined, lw=1.6, label=name, marker=marker, ms=5)
    label(axes.set_xlabel, "noise levels trained on programs alone, %")
    label(axes.set_ylabel, _axis_name(measure))
    legend(axes)
    title = f"{_capital(measure.name)} against the share of programs, {epsilon_name(epsilon)}"
    name = f"threshold-share-{measure.metric}-{measure.on}-eps{epsilon:g}"
    note = f"Small marks: single runs.  Line and bar: mean ± standard deviation over seeds.  {_direction(measure)}"
    return finished(figure, name, title, said, note)


def _against_compute(view: View, measure: Measure, what: str) -> tuple[Plot, bytes] | None:
    """A point for each run; the marker says which variant, the size which ε."""
    points: list[tuple[float, float, str, float]] = []
    for job in view.results.runs:
        cost: float | None = job.seconds_training
        if cost is not None:
            cost /= 60
        if what == "images":
            seen, parameters = job.images_of_steps, job.facts.get("parameters")
            cost = None if seen is None or parameters is None else seen * job.facts.get("copies", 1) * parameters
        value = next(
            (f.value for f in job.figures() if (f.metric, f.on, f.of_class) == (measure.metric, measure.on, "")), None
        )
        if cost and value is not None:
            points.append((cost, measure.scale * value, job.variant, job.epsilon))
    costs = [p[0] for p in points]
    # Where all runs cost the same by design, the picture would say nothing.
    if len(points) < 2 or (what == "images" and max(costs) < 1.2 * min(costs)):
        return None
    figure, axes = new_axes(4.3, 3.1)
    said = []
    sizes = {e: 22 + 26 * i for i, e in enumerate(view.epsilons)}
    for number, variant in enumerate(dict.fromkeys(p[2] for p in points)):
        colour, marker, _ = style(variant, number)
        mine = [p for p in points if p[2] == variant]
        axes.scatter(
            [p[0] for p in mine],
            [p[1] for p in mine],
            s=[sizes[p[3]] for p in mine],
            color=colour,
            marker=marker,
            alpha=0.75,
            lw=0,
            label=Row(variant, "").variant_name,
        )
        at = float(np.mean([p[0] for p in mine])), float(np.mean([p[1] for p in mine]))
        said.append(f"{Row(variant, '').variant_name}: {at[1]:.4g} for {at[0]:.3g} on average")
    if max(costs) > 20 * min(costs):
        axes.set_xscale("log")
    elif what == "seconds":
        axes.set_xlim(0, 1.08 * max(costs))
    x = (
        f"training time, {view.results.core}minutes"
        if what == "seconds"
        else "private images used × copies × parameters"
    )
    label(axes.set_xlabel, x)
    label(axes.set_ylabel, _axis_name(measure))
    legend(axes)
    scale = "" if len(view.epsilons) == 1 else f"  Larger marks: larger ε ({_listed(view.epsilons)})."
    note = f"One mark a run.{scale}  {_direction(measure)}" + (
        "  Times depend on the machine and on what else it did." if what == "seconds" else ""
    )
    title = f"{_capital(measure.name)} against {'training time' if what == 'seconds' else 'private computation'}"
    return finished(figure, f"compute-{what}-{measure.metric}-{measure.on}", title, said, note)


def _by_class(view: View, measure: Measure) -> tuple[Plot, bytes] | None:
    """Mean accuracy of each class, as a map: variants by classes."""
    names = view.classes(measure.on)
    if measure.metric != "accuracy" or not 2 <= len(names) <= 40:
        return None
    rows = [(e, r) for e in view.epsilons for r in _plain_rows(view) if view.values(measure, e, r, names[0])]
    if not rows:
        return None
    grid = np.array(
        [[np.mean(v) if (v := view.values(measure, e, r, n)) else math.nan for n in names] for e, r in rows]
    )
    figure, axes = new_axes(min(9.0, 2.2 + 0.62 * len(names)), 0.9 + 0.3 * len(rows))
    picture = axes.imshow(grid, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    for y, x in np.ndindex(*grid.shape):
        if not math.isnan(grid[y, x]):
            dark = grid[y, x] < 55  # of cividis: light letters there
            axes.text(x, y, f"{grid[y, x]:.0f}", ha="center", va="center", fontsize=8, color="#fff" if dark else "#000")
    axes.set_xticks(range(len(names)), [_short(n) for n in names], rotation=0 if max(map(len, names)) < 5 else 35)
    if max(map(len, names)) >= 5:
        for text in axes.get_xticklabels():
            text.set_ha("right")
    several = len(view.epsilons) > 1
    axes.set_yticks(range(len(rows)), [f"{r.name}, {epsilon_name(e)}" if several else r.name for e, r in rows])
    for index in range(1, len(rows)):
        if rows[index][0] != rows[index - 1][0]:
            axes.axhline(index - 0.5, color="#888", lw=2.5)
    for side in ("bottom", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0)
    bar = figure.colorbar(picture, ax=axes, fraction=0.03, pad=0.015)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, colors=INK, length=0)
    said = [
        f"{r.name} at {epsilon_name(e)}: {np.nanmin(g):.3g} to {np.nanmax(g):.3g}"
        for (e, r), g in zip(rows, grid, strict=True)
    ]
    note = "Percent of the real test images of each class, mean over seeds."
    return finished(figure, "classes", f"{_capital(measure.name)} by class", said, note, wide=True)


# ------------------------------------------------------------------------------------------------ parts


def _plain_rows(view: View) -> Sequence[Row]:
    """Rows without varied settings, if each variant has one; else all."""
    plain = [row for row in view.rows if not row.label]
    return plain if {r.variant for r in plain} == {r.variant for r in view.rows} else view.rows


def _points(axes: Any, x: float, values: Sequence[float], colour: str, marker: str, beside: float) -> None:
    """A bar of one standard deviation, and every run `beside` it."""
    s = summarise(values)
    if s.sd is not None:
        axes.errorbar(x, s.mean, yerr=s.sd, color=colour, capsize=2.5, lw=1.3)
    if len(values) > 1:
        axes.scatter([x + beside] * len(values), values, s=10, color=colour, marker=marker, alpha=0.7, lw=0)


def _reference_lines(axes: Any, view: View, measure: Measure) -> list[str]:
    """Draw the references, across the axis of values; returns them in words."""
    said = []
    single = len(view.epsilons) == 1
    line = axes.axvline if single else axes.axhline
    found = {i: v for i, e in enumerate(view.epsilons) if (v := view.reference("dp-classifier", measure, e))}
    low, high = axes.get_xlim() if single else axes.get_ylim()
    if not single:
        # These are drawn whatever their height, and what lies within it is not off the scale.
        high = max([high, *(summarise(v).mean for v in found.values())])
        low = min([low, *(summarise(v).mean for v in found.values())])
    margin = 0.9 * (high - low)
    look = {"color": INK, "lw": 1.1, "alpha": 0.75}

    def draw(mean: float, name: str, dash: Any) -> None:
        # One that is far away would press everything else together.
        if low - margin <= mean <= high + margin:
            line(mean, ls=dash, label=name, **look)
        else:
            axes.plot([], [], ls=dash, label=f"{name}: {mean:.3g} (off scale)", **look)

    for kind, (name, line_dash) in _LINES.items():
        if values := view.reference(kind, measure, math.inf):
            said.append(f"{name}: {_in_words(values)}")
            draw(summarise(values).mean, name, line_dash)
    dash: Any = (0, (8, 2, 1, 2))
    if single and found:
        draw(summarise(found[0]).mean, "DP-SGD classifier", dash)
    elif found:
        means = [summarise(v).mean for v in found.values()]
        axes.plot(list(found), means, ls=dash, marker="*", ms=7, label="DP-SGD classifier", **look)
    said += [f"DP-SGD classifier at {epsilon_name(view.epsilons[i])}: {_in_words(v)}" for i, v in found.items()]
    return said


def _in_words(values: Sequence[float]) -> str:
    s = summarise(values)
    return f"{s.mean:.4g}" if s.sd is None else f"{s.mean:.4g} ± {s.sd:.2g}"


def _axis_name(measure: Measure) -> str:
    return f"{measure.on_name} accuracy, %" if measure.metric == "accuracy" else measure.metric_name


def _direction(measure: Measure) -> str:
    return f"{measure.better.capitalize()} is better."


def _listed(epsilons: Sequence[float]) -> str:
    return ", ".join(epsilon_name(e).removeprefix("ε = ") for e in epsilons)


def _short(name: str) -> str:
    return name if len(name) <= 14 else f"{name[:13]}…"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
