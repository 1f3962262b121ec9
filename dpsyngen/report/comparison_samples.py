"""Images of all variants from the same noise, so that a reader compares them image by image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpsyngen.errors import DpsyngenError
from dpsyngen.evaluation.pairs import png_url
from dpsyngen.experiments.measures import Row, View, epsilon_name, row_of
from dpsyngen.experiments.results import JobResult
from dpsyngen.generator.generator import ReleasedGenerator
from dpsyngen.programs import image_grid

NOISE_SEED = 20_241
"""Of the images in the report.  Fixed, so that they are not selected; no run was scored on them."""
_PER_CLASS = 4
_MOST_CLASSES = 10
_MOST_ROWS = 12
_SETTINGS = ("sampler", "steps", "guidance", "churn")


@dataclass(frozen=True)
class Picture:
    """Images of one class of one variant."""

    source: str
    alt: str


@dataclass(frozen=True)
class GridRow:
    """Images of one variant, a picture for each class."""

    name: str
    seed: int
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Grid:
    """The images at one ε.

    Attributes:
        epsilon: in words.
        classes: names of the columns; one empty name without classes.
        rows: one a variant.
        missing: (variant, why) of those that could not be drawn.
        omitted_classes, omitted_rows: numbers of those that are left out for length.
    """

    epsilon: str
    classes: tuple[str, ...]
    rows: tuple[GridRow, ...]
    missing: tuple[tuple[str, str], ...]
    omitted_classes: int
    omitted_rows: int


def sample_grids(view: View, exp: Path, on_progress: Callable[[str], None] | None = None) -> list[Grid]:
    """A grid for each ε that has a generator.

    Args:
        view: of the experiment.
        exp: its folder.
        on_progress: called with a line for each variant.
    """
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
                names = generator.class_names[:_MOST_CLASSES] or ("",)
                if rows and names != classes:
                    raise DpsyngenError("it has other classes than the variant above")
                classes, left = names, max(0, len(generator.class_names) - _MOST_CLASSES)
                rows.append(GridRow(row.name, job.seed, _pictures(generator, row, job, classes)))
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


def _pictures(generator: ReleasedGenerator, row: Row, job: JobResult, classes: tuple[str, ...]) -> tuple[Picture, ...]:
    drawn: dict[str, Any] = job.evaluation.get("sampling") or {}
    settings = {k: drawn[k] for k in _SETTINGS if drawn.get(k) is not None}
    where = f"{row.name}, {epsilon_name(job.epsilon)}"
    if classes == ("",):
        images = generator.sample(2 * _MOST_CLASSES, seed=NOISE_SEED, **settings).images
        return (Picture(png_url(image_grid(images, _MOST_CLASSES)), f"{where}: {len(images)} images"),)
    labels = generator.labels(_PER_CLASS * len(classes), list(range(len(classes))))
    assert labels is not None
    images = generator.sample(len(labels), labels=labels, seed=NOISE_SEED, **settings).images
    return tuple(
        Picture(
            png_url(image_grid(images[np.flatnonzero(labels == c)], 2)), f"{where}: {_PER_CLASS} images of class {name}"
        )
        for c, name in enumerate(classes)
    )
