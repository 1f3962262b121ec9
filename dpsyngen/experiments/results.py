"""What the jobs of an experiment found, read back and laid out as one long table.

The long table has a row for each figure of each job, so that a reader can compute anything again that the report
states.  It is private: its figures come from private images.
"""

from __future__ import annotations

import contextlib
import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpsyngen.diffusion.stages import VARIANTS
from dpsyngen.errors import ConfigError, RunError
from dpsyngen.experiments.experiment import Experiment
from dpsyngen.experiments.job_result import KINDS, JobResult, is_number
from dpsyngen.files import write_atomically
from dpsyngen.generator.files import read_description

FIXED = (
    *("job", "kind", "variant", "epsilon", "delta", "seed", "label", "private"),
    *("metric", "on", "class", "value", "low", "high", "floor", "ceiling", "better", "unit", "images"),
)
"""Columns of the long table, beside one for each setting that is varied (after "private")."""
_NUMBERS = {"epsilon", "delta", "value", "low", "high", "floor", "ceiling"}


@dataclass(frozen=True)
class Results:
    """Everything that an experiment found.

    Attributes:
        jobs: finished jobs, in the order of variant, ε, settings and seed; references last.
        skipped: (file, why) of files that were left out.
        experiment: what it is; None where its specification cannot be read.
    """

    jobs: tuple[JobResult, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    experiment: Experiment | None = None

    @classmethod
    def load(cls, exp: Path) -> Results:
        """Read ``exp/results/*.json``.

        A file that is damaged, or that belongs to no job of the specification, or was measured in another way than the
        specification now asks, is left out and named in :attr:`skipped`.

        Raises:
            RunError: there is no such folder.
        """
        folder = exp / "results"
        if not folder.is_dir():
            raise RunError(
                f"{exp} has no folder results, so it is not the folder of an experiment.  Give the folder that "
                "`dpsyngen compare SPEC --out` made."
            )
        try:
            experiment = Experiment(exp)
        except (RunError, ConfigError):
            experiment = None
        planned = {} if experiment is None else {job.name: job for job in experiment.jobs}
        found, skipped = [], []
        for path in sorted(folder.glob("*.json")):
            try:
                one = JobResult.parse(path.read_text(encoding="utf-8"), path.stem)
                if experiment is not None:
                    if one.job not in planned:
                        raise ValueError("it belongs to no job of the specification")
                    if experiment.result(planned[one.job]) is None:
                        raise ValueError("it was measured in another way than the specification now asks")
                found.append(one)
            except (OSError, ValueError) as error:
                skipped.append((path.name, str(error)))
        names = _class_names(exp, found)
        for one in found:
            one.evaluation.setdefault("class_names", names)
        return cls(tuple(sorted(found, key=_place)), tuple(skipped), experiment)

    @property
    def baseline(self) -> str:
        """The variant that the others are compared with."""
        return "dpdm" if self.experiment is None else self.experiment.spec.baseline

    @property
    def runs(self) -> tuple[JobResult, ...]:
        """Those that trained a generator."""
        return tuple(j for j in self.jobs if j.kind == "run")

    @property
    def core(self) -> str:
        """What stands before a unit of time: "core-" if all times are core-seconds."""
        return "core-" if self.runs and all(j.seconds_unit == "core-seconds" for j in self.runs) else ""

    @property
    def epsilons(self) -> tuple[float, ...]:
        """ε of the runs, smallest first."""
        return tuple(sorted({j.epsilon for j in self.runs}))

    @property
    def axes(self) -> tuple[str, ...]:
        """Full names of the settings that are varied."""
        return tuple(sorted({name for j in self.jobs for name in j.settings}))

    def tidy(self) -> list[dict[str, Any]]:
        """The long table: a row for each figure of each job.

        Columns are :data:`FIXED` and one for each of :attr:`axes`; what does not apply is None.
        """
        out = []
        for j in self.jobs:
            head = {
                "job": j.job,
                "kind": j.kind,
                "variant": j.variant,
                "epsilon": j.epsilon,
                "delta": j.delta,
                "seed": j.seed,
                "label": j.label,
                "private": j.private,
                **{axis: j.settings.get(axis) for axis in self.axes},
            }
            for f in j.figures():
                values = {k: getattr(f, k) for k in ("value", "low", "high", "floor", "ceiling", "better", "unit")}
                out.append({**head, "metric": f.metric, "on": f.on, "class": f.of_class, **values, "images": f.images})
        return out

    def write(self, exp: Path) -> list[Path]:
        """Write ``results.csv`` and, where pyarrow is installed, ``results.parquet``; the same bytes each time."""
        rows, axes = self.tidy(), self.axes
        columns = [*FIXED[:8], *axes, *FIXED[8:]]
        out = [exp / "results.csv"]
        write_atomically(out[0], lambda path: _write_csv(path, columns, rows), 0o600)
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            return out
        out.append(exp / "results.parquet")
        write_atomically(out[1], lambda path: _write_parquet(path, columns, rows, axes), 0o600)
        return out


def write_results(exp: Path) -> list[Path]:
    """Write ``results.csv``, ``results.parquet`` (where pyarrow is installed) and ``tables.md``; returns their paths.

    Raises:
        RunError: not the folder of an experiment.
    """
    from dpsyngen.experiments.tables import write_tables

    results = Results.load(exp)
    return [*results.write(exp), write_tables(results, exp)]


def _class_names(exp: Path, jobs: list[JobResult]) -> list[str]:
    """As the first generator that can be read has them; [] if none can."""
    for one in jobs:
        if one.release is not None:
            with contextlib.suppress(RunError, ConfigError):
                return list(read_description(exp / one.release)[0].class_names)
    return []


def _place(j: JobResult) -> tuple[Any, ...]:
    variant = VARIANTS.index(j.variant) if j.variant in VARIANTS else len(VARIANTS)
    settings = sorted((k, isinstance(v, str), str(v) if not is_number(v) else float(v)) for k, v in j.settings.items())
    return KINDS.index(j.kind), variant, j.variant, j.epsilon, repr(settings), j.label, j.seed, j.job


def _write_csv(path: Path, columns: list[str], rows: list[dict[str, Any]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as f:
        writer = csv.DictWriter(f, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _write_parquet(path: Path, columns: list[str], rows: list[dict[str, Any]], axes: tuple[str, ...]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def column(name: str) -> Any:
        values = [row[name] for row in rows]
        if name in axes:
            if all(v is None or is_number(v) for v in values):
                return pa.array([None if v is None else float(v) for v in values], pa.float64())
            return pa.array([None if v is None else str(v) for v in values], pa.string())
        if name in ("seed", "images"):
            return pa.array(values, pa.int64())
        if name == "private":
            return pa.array(values, pa.bool_())
        return pa.array(values, pa.float64() if name in _NUMBERS else pa.string())

    pq.write_table(pa.table({name: column(name) for name in columns}), path, compression="zstd")
