"""The report of an experiment: one HTML file that stands alone.  It is private, as all figures of an experiment are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dpsyngen.errors import DpsyngenError
from dpsyngen.experiments.measures import ON_NAMES, VARIANT_NAMES, Row, View, answers, epsilon_name, row_of
from dpsyngen.experiments.results import JobResult, Results
from dpsyngen.experiments.tables import all_tables
from dpsyngen.files import write_text
from dpsyngen.generator.generator import ReleasedGenerator
from dpsyngen.programs.grid import image_grid, png_url
from dpsyngen.report.comparison_plots import KINDS, write_plots
from dpsyngen.report.html import class_images, render

NOISE_SEED = 20_241
"""Of the images in the report.  Fixed, so that they are not selected; no run was scored on them."""
_PER_CLASS = 4
_MOST_CLASSES = 10
_MOST_ROWS = 12


def write_comparison(exp: Path, on_progress: Callable[[str], None] | None = None) -> Path:
    """Write ``report.html`` and ``plots/`` into the folder of an experiment; `on_progress` gets a line now and then."""
    results = Results.load(exp)
    view = View(results)
    if on_progress:
        on_progress("drawing plots")
    plots = write_plots(view, exp / "plots")
    tables = {table.key: table for table in all_tables(view)}
    experiment = results.experiment
    values = {
        "name": experiment.spec.name,
        "description": experiment.spec.description,
        "facts": list(_facts(view, experiment.about.get("seconds"))),
        "answers": [
            {"epsilon": epsilon_name(a.epsilon), "headline": a.headline, "lines": a.lines} for a in answers(view)
        ],
        "measure": view.primary.name if view.primary else "",
        "baseline": VARIANT_NAMES.get(view.baseline, view.baseline),
        "predictable": any(not j.private and not math.isinf(j.epsilon) for j in results.runs),
        "unequal": view.unequal(),
        "failed": list(_failed(results)),
        "tables": tables,
        "features": [t for key, t in tables.items() if key.endswith(("-lower", "-higher"))],
        "plots": {kind: [p for p in plots if p.kind == kind] for kind in KINDS},
        "grids": sample_grids(view, exp, on_progress),
        "noise_seed": NOISE_SEED,
        "protocol": list(_protocol(view)),
        "kinds": {job.kind for job in results.jobs},
        "privacy": experiment.about.get("privacy"),
    }
    path = exp / "report.html"
    write_text(path, render("comparison.html.j2", values), 0o600)
    return path


def _facts(view: View, seconds: float | None) -> Iterator[tuple[str, str]]:
    runs = view.results.runs
    count = sum(job.kind == "run" for job in view.results.experiment.jobs)
    yield "runs finished", f"{len(runs):,} of {count:,}"
    yield "seeds", " to ".join(f"{n}" for n in sorted({min(s), max(s)})) if (s := view.seeds()) else "0"
    yield "ε", ", ".join(epsilon_name(e).removeprefix("ε = ") for e in view.epsilons)
    deltas = sorted({j.delta for j in runs if j.delta is not None})
    if deltas:
        yield "δ", ", ".join(f"{d:.3g}" for d in deltas)
    yield "variants", ", ".join(dict.fromkeys(row.variant_name for row in view.rows))
    if seconds is not None:
        yield "computing time", f"{seconds / 3600:,.1f} {view.results.core}hours"


def _failed(results: Results) -> Iterator[tuple[str, str]]:
    """(job, why) of every job without figures."""
    skipped = dict(results.skipped)
    have = {job.job for job in results.jobs}
    for job, status in results.experiment.statuses().items():
        if job not in have and f"{job}.json" not in skipped:
            said = {"failed": f"failed: {status.error}", "waiting": "not begun", "running": "running"}
            yield job, said.get(status.state, "interrupted")
    yield from ((name.removesuffix(".json"), f"left out: {why}") for name, why in skipped.items())


def _protocol(view: View) -> Iterator[tuple[str, str]]:
    data = view.results.experiment.spec.data
    test = f"; real test images: {data.test}" if data.test else ""
    yield "Images", f"Private training images: {data.train}{test}."
    drawn = {
        ", ".join(f"{k} {s[k]}" for k in ("images", "sampler", "steps", "guidance") if k in s)
        for j in view.results.runs
        if isinstance(s := j.evaluation.get("sampling"), dict)
    }
    if drawn:
        yield "Generated images", f"For each run: {'; '.join(sorted(drawn))}.  Their seed is that of the run."
    yield from _measured(view.results.runs)


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
                if rows and names != classes:
                    raise DpsyngenError("it has other classes than the variant above")
                classes, left = names, max(0, len(generator.class_names) - _MOST_CLASSES)
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
    for job in view.results.runs:
        if job.epsilon == epsilon and job.release is not None:
            by_row.setdefault(row_of(job), {})[job.seed] = job
    common = set.intersection(*(set(jobs) for jobs in by_row.values())) if by_row else set()
    return [(row, by_row[row][min(common or by_row[row])]) for row in view.rows if row in by_row]


def _release(exp: Path, job: JobResult) -> Path:
    release = (exp / (job.release or "")).resolve()
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
