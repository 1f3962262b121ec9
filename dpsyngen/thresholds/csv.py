"""The tables of ``dpsyngen stages`` as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from dpsyngen.thresholds.gap import Array
from dpsyngen.thresholds.results import Loss
from dpsyngen.thresholds.theory import price_density

if TYPE_CHECKING:
    from dpsyngen.thresholds.files import StagesResult

CSV_COLUMNS = (
    *("stand_in", "images", "teacher", "student", "seed", "log_sigma", "sigma", "relative_gap", "low", "high"),
    *("excess", "gap", "teacher_loss", "student_loss", "nats_per_log_sigma"),
)


def gap_csv(result: StagesResult) -> str:
    """All curves, a line a level: of each seed, and for each student and stand-in the mean with its 95 % interval."""
    out = io.StringIO()
    lines = csv.DictWriter(out, CSV_COLUMNS, restval="", lineterminator="\n")
    lines.writeheader()
    pixels = result.measured.pixels
    for stand_in, c in result.curves():
        names: dict[str, Any] = {"stand_in": stand_in, "images": c.images, "teacher": c.teacher, "student": c.student}
        columns = {
            "relative_gap": c.relative(),
            "excess": c.excess(),
            "gap": c.gap.mean(1),
            "teacher_loss": c.teacher_loss.mean(1),
            "student_loss": c.student_loss.mean(1),
            "nats_per_log_sigma": c.nats(pixels),
        }
        for s in range(c.seeds):
            lines.writerows(_lines(names | {"seed": s}, c.log_sigma, {k: v[s] for k, v in columns.items()}))
    if result.private is not None:
        p = result.private[0]
        names = {"stand_in": "private", "images": "private", "seed": 0}
        names |= {k: result.settings[k] for k in ("teacher", "student")}
        columns = {
            "relative_gap": p.relative(),
            "excess": p.excess(),
            "gap": p.gap,
            "teacher_loss": p.teacher_loss,
            "student_loss": p.student_loss,
            "nats_per_log_sigma": price_density(np.exp(p.log_sigma), pixels * p.gap),
        }
        lines.writerows(_lines(names, p.log_sigma, columns))
    for f in result.found:
        names = {"stand_in": f.by, "student": f.student, "seed": "mean"}
        low, high = f.band()
        columns = {"relative_gap": f.mean.relative, "low": low, "high": high, "excess": f.mean.excess}
        lines.writerows(_lines(names, result.measured.log_sigma, columns))
    return out.getvalue()


def _lines(names: Mapping[str, Any], log_sigma: Array, columns: Mapping[str, Array]) -> Iterator[dict[str, Any]]:
    for m, u in enumerate(log_sigma):
        figures = {"log_sigma": u, "sigma": math.exp(u)} | {k: v[m] for k, v in columns.items()}
        yield dict(names) | {k: f"{v:.6g}" for k, v in figures.items()}


def loss_csv(losses: Sequence[Loss]) -> str:
    """A line for each family and piece of the axis."""
    out = io.StringIO()
    lines = csv.DictWriter(out, list(asdict(losses[0])), lineterminator="\n")
    lines.writeheader()
    for loss in losses:
        lines.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in asdict(loss).items()})
    return out.getvalue()
