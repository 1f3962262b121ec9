"""The report of an experiment: one HTML file that stands alone.  It is private, as all figures of an experiment are.

Its plots show quality against ε and against the thresholds, every seed beside its mean.  Colours stand out from white
and from black by 3:1, differ for the colour-blind, and never stand alone: each variant has a marker and a dash of its
own.  Text takes the colour of the page.
"""

from __future__ import annotations

import io
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from dpsyngen.errors import DpsyngenError
from dpsyngen.experiments.measures import ON_NAMES, VARIANT_NAMES, Measure, Row, View, answers, epsilon_name, row_of
from dpsyngen.experiments.results import JobResult
from dpsyngen.experiments.statistics import summarise
from dpsyngen.experiments.tables import all_tables
from dpsyngen.files import write_bytes, write_text
from dpsyngen.generator.generator import ReleasedGenerator
from dpsyngen.programs.grid import image_grid, png_url
from dpsyngen.report.charts import INK, inline, new_axes, slug
from dpsyngen.report.html import class_images, render

NOISE_SEED = 20_241
"""Of the images in the report.  Fixed, so that they are not selected; no run was scored on them."""
_PER_CLASS = 4
_MOST_CLASSES = 10
_MOST_ROWS = 12

STYLES: dict[str, tuple[str, str, Any]] = {
    "dpdm": ("#7d838c", "o", "-"),
    "finetune": ("#b87400", "s", (0, (6, 2))),
    "cleaning": ("#009070", "^", (0, (2, 1.5))),
    "coarse": ("#2b7fc4", "D", (0, (7, 2, 1.5, 2))),
    "both": ("#c0519b", "v", (0, (4, 1, 1, 1, 1, 1))),
    "gaussian": ("#a1532f", "p", (0, (1, 1))),
    "instant": ("#b8860b", "P", (0, (4, 1))),
    "residual": ("#2f8f57", "*", (0, (9, 1.5))),
}
"""Colour, marker and dashes of each variant."""
_REFERENCES = {
    "real": ("trained on real images", (0, (1, 1.5))),
    "test": ("real test images", (0, (1, 1.5))),
    "programs": ("images of programs", (0, (5, 3))),
}
KINDS = ("epsilon-accuracy", "epsilon", "threshold")
"""The first words of plots' names, one for each section of the report that has plots."""
_MARKS = "Small marks: single runs.  Line and bar: mean ± standard deviation over seeds."


def write_comparison(exp: Path, on_progress: Callable[[str], None] | None = None) -> Path:
    """Write ``report.html`` and ``plots/`` into the folder of an experiment; `on_progress` gets a line now and then."""
    view = View(exp)
    if on_progress:
        on_progress("drawing plots")
    plots = write_plots(view, exp / "plots")
    tables = {table.key: table for table in all_tables(view)}
    experiment = view.experiment
    values = {
        "name": experiment.spec.name,
        "description": experiment.spec.description,
        "facts": list(_facts(view, experiment.about.get("seconds"))),
        "answers": [(epsilon_name(a.epsilon), a.headline, a.lines) for a in answers(view)],
        "measure": view.primary.name if view.primary else "",
        "baseline": VARIANT_NAMES[view.baseline],
        "predictable": any(not j.private and not math.isinf(j.epsilon) for j in view.runs),
        "unequal": view.unequal(),
        "failed": list(_failed(view)),
        "tables": tables,
        "features": [t for key, t in tables.items() if key.endswith(("-lower", "-higher"))],
        "plots": {kind: [p for p in plots if p.kind == kind] for kind in KINDS},
        "grids": sample_grids(view, exp, on_progress),
        "noise_seed": NOISE_SEED,
        "protocol": list(_protocol(view)),
        "kinds": {job.kind for job in view.jobs},
        "privacy": experiment.about.get("privacy"),
    }
    write_text(exp / "report.html", render("comparison.html.j2", values), 0o600)
    return exp / "report.html"


def _facts(view: View, seconds: float | None) -> Iterator[tuple[str, str]]:
    runs = view.runs
    count = sum(job.kind == "run" for job in view.experiment.jobs)
    yield "runs finished", f"{len(runs):,} of {count:,}"
    yield "seeds", " to ".join(f"{n}" for n in sorted({min(s), max(s)})) if (s := view.seeds()) else "0"
    yield "ε", ", ".join(epsilon_name(e).removeprefix("ε = ") for e in view.epsilons)
    deltas = sorted({j.delta for j in runs if j.delta is not None})
    if deltas:
        yield "δ", ", ".join(f"{d:.3g}" for d in deltas)
    yield "variants", ", ".join(dict.fromkeys(row.variant_name for row in view.rows))
    if seconds is not None:
        yield "computing time", f"{seconds / 3600:,.1f} {view.core}hours"


def _failed(view: View) -> Iterator[tuple[str, str]]:
    """(job, why) of every job without figures."""
    skipped = dict(view.skipped)
    have = {job.name for job in view.jobs}
    for job, status in view.experiment.statuses().items():
        if job not in have and f"{job}.json" not in skipped:
            said = {"failed": f"failed: {status.error}", "waiting": "not begun", "running": "running"}
            yield job, said.get(status.state, "interrupted")
    yield from ((name.removesuffix(".json"), f"left out: {why}") for name, why in skipped.items())


def _protocol(view: View) -> Iterator[tuple[str, str]]:
    data = view.experiment.spec.data
    test = f"; real test images: {data.test}" if data.test else ""
    yield "Images", f"Private training images: {data.train}{test}."
    drawn = {
        ", ".join(f"{k} {s[k]}" for k in ("images", "sampler", "steps", "guidance") if k in s)
        for j in view.runs
        if isinstance(s := j.evaluation.get("sampling"), dict)
    }
    if drawn:
        yield "Generated images", f"For each run: {'; '.join(sorted(drawn))}.  Their seed is that of the run."
    yield from _measured(view.runs)


def _measured(runs: tuple[JobResult, ...]) -> Iterator[tuple[str, str]]:
    """What was measured on how many images; classifiers and features of which the same can be said share a line."""
    found: dict[tuple[str, str], dict[str, None]] = {}
    for job in runs:
        for note in job.evaluation.get("notes") or ():
            found.setdefault(("Read first", f"{note}."), {})[job.variant or job.kind] = None
        for name, c in (job.evaluation.get("cas") or {}).items():
            trained, chosen, scored = (c.get(key, "?") for key in ("n_train", "n_validation", "n_test"))
            text = f"trained on {trained} generated images, chosen on {chosen} held-out generated ones, scored once on "
            text += f"{scored} real test images."
            found.setdefault(("Classifiers", text), {})[ON_NAMES.get(name, name)] = None
        for name, f in (job.evaluation.get("features") or {}).items():
            flags = dict.fromkeys(m["flag"] for m in f.get("metrics", {}).values() if m.get("flag"))
            few = f" (DOUBTFUL or not measured: {'; '.join(flags)})" if flags else ""
            text = f"{f.get('generated_images', '?')} generated images against {f.get('real_images', '?')} real "
            text += f"training images{few}.  Floor: real test images in their place."
            found.setdefault(("Features", text), {})[ON_NAMES.get(name, name)] = None
    yield from ((what, f"{', '.join(names)}: {text}") for (what, text), names in found.items())


# ------------------------------------------------------------------------------- images from the same noise


class GridRow(NamedTuple):
    """Images of one variant: for each class a picture, and what it shows."""

    name: str
    pictures: tuple[tuple[str, str], ...]


class Grid(NamedTuple):
    """The images at one ε."""

    epsilon: str  # in words
    classes: tuple[str, ...]  # names of the columns; () without classes
    rows: tuple[GridRow, ...]  # one a variant
    missing: tuple[tuple[str, str], ...]  # (variant, why) of those that could not be drawn
    omitted_classes: int  # numbers of those that are left out for length
    omitted_rows: int


def sample_grids(view: View, exp: Path, on_progress: Callable[[str], None] | None = None) -> list[Grid]:
    """A grid for each ε that has a generator."""
    out = []
    for epsilon in view.epsilons:
        chosen = _chosen(view, epsilon)
        rows: list[GridRow] = []
        missing: list[tuple[str, str]] = []
        classes: tuple[str, ...] = ()
        left = 0
        for row, job in chosen[:_MOST_ROWS]:
            if on_progress:
                on_progress(f"drawing images of {row.name} at {epsilon_name(epsilon)}")
            try:
                generator = ReleasedGenerator(_release(exp, job))
                names = generator.class_names[:_MOST_CLASSES]
                if rows and names != classes:  # else pictures would stand under names that are not theirs
                    raise DpsyngenError("it has other classes than the variant above")
                classes, left = names, len(generator.class_names) - len(names)
                rows.append(GridRow(row.name, tuple(_pictures(generator, row, job))))
            except (DpsyngenError, OSError) as error:
                missing.append((row.name, str(error)))
        if rows or missing:
            omitted = max(0, len(chosen) - _MOST_ROWS)
            out.append(Grid(epsilon_name(epsilon), classes, tuple(rows), tuple(missing), left, omitted))
    return out


def _chosen(view: View, epsilon: float) -> list[tuple[Row, JobResult]]:
    """The run of each row whose images are shown: of the lowest seed that all have, or of its own lowest."""
    by_row: dict[Row, dict[int, JobResult]] = {}
    for job in view.runs:
        if job.epsilon == epsilon:
            by_row.setdefault(row_of(job), {})[job.seed] = job
    common = set.intersection(*(set(jobs) for jobs in by_row.values())) if by_row else set()
    return [(row, by_row[row][min(common or by_row[row])]) for row in view.rows if row in by_row]


def _release(exp: Path, job: JobResult) -> Path:
    release = (exp / "runs" / job.name / "release").resolve()
    if not release.is_relative_to(exp.resolve()):
        raise DpsyngenError("its generator lies outside the folder of the experiment")
    return release


def _pictures(generator: ReleasedGenerator, row: Row, job: JobResult) -> Iterator[tuple[str, str]]:
    drawn: dict[str, Any] = job.evaluation.get("sampling") or {}
    settings = {k: drawn[k] for k in ("sampler", "steps", "guidance", "churn") if drawn.get(k) is not None}
    for name, images in class_images(generator, _MOST_CLASSES, _PER_CLASS, NOISE_SEED, **settings):
        picture = png_url(image_grid(images, 2 if name else 8))
        of_class = f" of class {name}" if name else ""
        yield picture, f"{row.name}, {epsilon_name(job.epsilon)}: {len(images)} images{of_class}"


# -------------------------------------------------------------------------------------------------- plots


@dataclass(frozen=True)
class Plot:
    """One picture."""

    name: str  # of its files
    title: str  # above it
    alt: str  # what it shows, in words and numbers
    note: str  # how to read it
    svg: Markup  # to put into a page; its text has the colour of the page's text
    png: bytes  # on white

    @property
    def kind(self) -> str:
        """The section of the report that it belongs to."""
        return next(kind for kind in KINDS if self.name.startswith(kind))


class Line(NamedTuple):
    """One line of a plot."""

    variant: str  # decides its look
    name: str  # in the legend
    points: Sequence[tuple[float, str, Sequence[float]]]  # of each x, its name in words, and values over seeds
    dash: Any = None  # in place of the variant's; "" joins nothing


def write_plots(view: View, folder: Path) -> list[Plot]:
    """Write each plot as PNG, on white, into `folder`, made if need be; plots of before are removed."""
    folder.mkdir(mode=0o700, exist_ok=True)
    out = list(comparison_plots(view))
    for plot in out:
        write_bytes(folder / f"{plot.name}.png", plot.png, 0o600)
    wanted = {f"{plot.name}.png" for plot in out}
    for path in folder.iterdir():
        if path.suffix in (".svg", ".png") and path.name not in wanted:
            path.unlink()
    return out


def comparison_plots(view: View) -> Iterator[Plot]:
    """All plots for which there is data."""
    accuracies = [m for m in view.measures if m.metric == "accuracy"]
    others = [m for m in view.measures if m.metric != "accuracy"]
    distances = [m for m in others if m.metric == "frechet"] or others[:1]
    for measure in [*accuracies, *distances]:
        yield _against_epsilon(view, measure)
    main = list(dict.fromkeys(m for m in (view.primary, *distances[:1]) if m is not None))
    for threshold, m, e in itertools.product(("tau_cleaning", "tau_coarse"), main, view.epsilons):
        plot = _against_threshold(view, m, threshold, e)
        if plot is not None:
            yield plot


def _against_epsilon(view: View, measure: Measure) -> Plot:
    """A line for each variant; at one ε a point for each variant and setting."""
    lines, rows = [], view.rows
    plain = tuple(row for row in rows if not row.label)
    if len(view.epsilons) > 1 and {r.variant for r in plain} == {r.variant for r in rows}:
        rows = plain  # without varied settings, as each variant has such a row
    for row in rows:
        values = [(i, epsilon_name(e), view.values(measure, e, row)) for i, e in enumerate(view.epsilons)]
        points = [(i, f"{row.name} at {name}", v) for i, name, v in values if v]
        if points:
            lines.append(Line(row.variant, row.name, points))
    with _line_plot(measure, lines, "ε (not to scale)", 0.5 / max(5, len(lines)), beside=0.035) as (figure, axes, said):
        said += _reference_lines(axes, view, measure)
        axes.set_xticks(range(len(view.epsilons)), [epsilon_name(e).removeprefix("ε = ") for e in view.epsilons])
        axes.set_xlim(-0.5, len(view.epsilons) - 0.5)
        return _finished(figure, "epsilon", measure, "against ε", said)


def _against_threshold(view: View, measure: Measure, threshold: str, epsilon: float) -> Plot | None:
    """A line for each variant and each combination of the other settings; None where the threshold does not vary."""
    own = f"stages.{threshold}"
    found: dict[tuple[str, tuple[str, ...]], list[tuple[float, str, list[float]]]] = {}
    for row in view.rows:
        x, values = dict(row.settings).get(own), view.values(measure, epsilon, row)
        if isinstance(x, int | float) and values:
            others = tuple(f"{k.rsplit('.', 1)[-1]}={v}" for k, v in row.settings if k != own)
            found.setdefault((row.variant, others), []).append((x, f"{row.name} at {x:g}", values))
    if not any(len(points) > 1 for points in found.values()):
        return None
    lines: list[Line] = []
    alike = Counter(variant for variant, _ in found)
    for variant, others in found:
        # Lines of one variant are told apart by the dash.
        dash = None if alike[variant] == 1 else ("-", "--", ":", "-.")[len(lines) % 4]
        name = ", ".join((Row(variant, "").variant_name, *others))
        lines.append(Line(variant, name, sorted(found[variant, others]), dash))
    span = float(np.ptp([x for line in lines for x, *_ in line.points]))
    x_label = f"{threshold.replace('tau', 'τ')} (log σ)"
    # Variants have the same thresholds, where their bars would cover each other.
    with _line_plot(measure, lines, x_label, 0.03 * span, beside=0.012 * span) as (figure, axes, said):
        base = next((r for r in view.rows if r.variant == view.baseline and not r.settings), None)
        if base is not None and (values := view.values(measure, epsilon, base)):
            look = {"color": STYLES[base.variant][0], "lw": 1.2, "ls": (0, (1, 1.5))}
            axes.axhline(summarise(values).mean, label=f"{base.name} (mean)", **look)
            said.append(f"{base.name}: {_in_words(values)}")
        title = f"against {threshold.replace('tau', 'τ')}, {epsilon_name(epsilon)}"
        return _finished(figure, f"threshold-{threshold}", measure, title, said, f"-eps{epsilon:g}")


@contextmanager
def _line_plot(
    measure: Measure, lines: Sequence[Line], x_label: str, apart: float, beside: float
) -> Iterator[tuple[Any, Any, list[str]]]:
    """A plot of lines through means, which stand `apart`, with a bar of one standard deviation and every run `beside`
    it; yields figure, axes and a list with all of it in words.
    """
    said = []
    with new_axes(4.3, 3.1) as (figure, axes):
        for number, line in enumerate(lines):
            colour, marker, dash = STYLES[line.variant]
            left = apart * (number - (len(lines) - 1) / 2)
            for x, name, values in line.points:
                s = summarise(values)
                if s.sd is not None:
                    axes.errorbar(x + left, s.mean, yerr=s.sd, color=colour, capsize=2.5, lw=1.3)
                if len(values) > 1:
                    places = [x + left + beside] * len(values)
                    axes.scatter(places, values, s=10, color=colour, marker=marker, alpha=0.7, lw=0)
                said.append(f"{name}: {_in_words(values)}")
            means = [summarise(values).mean for _, _, values in line.points]
            look = {"color": colour, "ls": dash if line.dash is None else line.dash, "marker": marker}
            axes.plot([x + left for x, _, _ in line.points], means, lw=1.6, label=line.name, ms=5, **look)
        name = f"{measure.on_name} accuracy, %" if measure.metric == "accuracy" else measure.metric_name
        axes.set(xlabel=x_label, ylabel=name)
        yield figure, axes, said


def _reference_lines(axes: Any, view: View, measure: Measure) -> list[str]:
    """Draw the references, across the axis of values; returns them in words."""
    look = {"color": INK, "lw": 1.1, "alpha": 0.75}
    found = {i: v for i, e in enumerate(view.epsilons) if (v := view.reference("dp-classifier", measure, e))}
    said = [f"DP-SGD classifier at {epsilon_name(view.epsilons[i])}: {_in_words(v)}" for i, v in found.items()]
    if found:
        means, dashes = [summarise(v).mean for v in found.values()], (0, (8, 2, 1, 2))
        axes.plot(list(found), means, marker="*", ms=7, ls=dashes, label="DP-SGD classifier", **look)
    low, high = axes.get_ylim()
    for kind, (name, dash) in _REFERENCES.items():
        if values := view.reference(kind, measure, math.inf):
            mean = summarise(values).mean
            said.append(f"{name}: {_in_words(values)}")
            # One that is far away would press everything else together.
            if abs(mean - (low + high) / 2) < 1.4 * (high - low):
                axes.axhline(mean, ls=dash, label=name, **look)
            else:
                axes.plot([], [], ls=dash, label=f"{name}: {mean:.3g} (off scale)", **look)
    return said


def _finished(figure: Any, kind: str, measure: Measure, title: str, said: Sequence[str], suffix: str = "") -> Plot:
    """The plot as SVG for a page, and as PNG on white; `title` goes on behind the name of the measure."""
    title, name = f"{measure.name} {title}", slug(f"{kind}-{measure.metric}-{measure.on}{suffix}")
    title = title[:1].upper() + title[1:]
    alt = f"{title}.  {'; '.join(said)}."
    axes = figure.axes[0]
    if longest := max(map(len, axes.get_legend_handles_labels()[1]), default=0):
        # Above the axes, in as many columns as fit.
        columns = 3 if longest < 14 else 2 if longest < 36 else 1
        place = {"loc": "lower left", "bbox_to_anchor": (-0.02, 1.0), "borderaxespad": 0.2}
        axes.legend(frameon=False, fontsize=8, ncols=columns, handlelength=3.4, columnspacing=1.2, **place)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=200, bbox_inches="tight", facecolor="white", metadata={"Software": None})
    svg = inline(figure, name, alt, "plot")
    return Plot(name, title, alt, f"{_MARKS}  {measure.better.capitalize()} is better.", svg, png.getvalue())


def _in_words(values: Sequence[float]) -> str:
    s = summarise(values)
    return f"{s.mean:.4g}" if s.sd is None else f"{s.mean:.4g} ± {s.sd:.2g}"
