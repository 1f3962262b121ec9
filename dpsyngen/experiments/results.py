"""What the jobs of an experiment found, read back from their files and laid out as one long table.

The long table has a row for each figure of each job, so that a reader can compute anything again that the report
states.  It is private: its figures come from private images.
"""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from dpsyngen.diffusion.stages import VARIANTS
from dpsyngen.errors import ConfigError, RunError, printable
from dpsyngen.experiments.experiment import Experiment
from dpsyngen.files import write_atomically
from dpsyngen.generator.files import read_description

KINDS = ("run", "real", "programs", "dp-classifier")
FIXED = (
    *("job", "kind", "variant", "epsilon", "delta", "seed", "label", "private"),
    *("metric", "on", "class", "value", "low", "high", "floor", "ceiling", "better", "unit", "images"),
)
"""Columns of the long table, beside one for each setting that is varied (after "private")."""
_NUMBERS = {"epsilon", "delta", "value", "low", "high", "floor", "ceiling"}


@pydantic_dataclass(frozen=True, config=ConfigDict(allow_inf_nan=False))
class Figure:
    """One number.

    Attributes:
        on: classifier or feature extractor; "" for a fact of the run.
        of_class: name of the class, for class-wise accuracy; "" for all classes.
        low, high: 95 % interval from this run's images alone: it does not hold the spread between seeds.
        floor, ceiling: what real test images get, and what images drawn by programs get.
        better, unit: None for a fact; "share" is a number from 0 to 1.
        images: number of generated images (features) or real test images (accuracy).
    """

    metric: str
    on: str
    of_class: str
    value: float
    low: float | None = None
    high: float | None = None
    floor: float | None = None
    ceiling: float | None = None
    better: Literal["lower", "higher"] | None = None
    unit: str = ""
    images: int | None = None


class JobResult(BaseModel):
    """One finished job, as its file states it.

    `variant` is "" for a reference, `epsilon` infinite and `delta` None without privacy, `settings` what is varied
    beyond variant, ε and seed, by full name, and `label` its short name; `private` is False if the noise could be
    predicted, `facts` are steps, seconds and so on, `release` the folder of the generator in the experiment's folder,
    and `evaluation` what :func:`dpsyngen.evaluation.evaluate_images` found.
    """

    model_config = ConfigDict(frozen=True)

    job: str
    kind: Literal["run", "real", "programs", "dp-classifier"]
    variant: str
    epsilon: float
    delta: float | None = None
    seed: int
    settings: dict[str, Any] = {}
    label: str = ""
    private: bool = True
    facts: dict[str, Any] = {}
    release: str | None = None
    evaluation: Annotated[dict[str, Any], BeforeValidator(lambda given: given or {})] = Field(repr=False)

    @classmethod
    def parse(cls, text: str, name: str) -> JobResult:
        """Read the text of ``results/<name>.json``.

        Raises:
            ValueError: it is not such a file; the message says why.
        """
        try:
            out = cls.model_validate_json(text)
            list(out.figures())  # so that what is wrong in the figures shows here
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(printable(f"{'.'.join(map(str, first['loc']))}: {first['msg']}", 200)) from None
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"its evaluation has not the right form ({error!r})") from None
        if out.job != name:
            raise ValueError(f"it is about the job {printable(out.job, 60)}")
        if out.kind == "run" and not out.variant:
            raise ValueError("it is a run without a variant")
        place = PurePosixPath(out.release or "")
        if place.is_absolute() or ".." in place.parts:
            raise ValueError("its release lies outside the experiment")
        return out

    @property
    def seconds_unit(self) -> str:
        """ "core-seconds" on a CPU, "seconds" elsewhere."""
        return str(self.facts.get("seconds_unit", "seconds"))

    @property
    def seconds_training(self) -> float | None:
        """Of public and private training together; None if neither was taken."""
        parts = [self.facts[k] for k in ("seconds_public", "seconds_private") if k in self.facts]
        known: float | None = self.facts.get("seconds_training", sum(parts) if parts else None)
        return known

    @property
    def images_seen(self) -> float | None:
        """Expected number of private images that training used, each time counted; None if unknown."""
        f = self.facts
        return f.get("private_images_seen", f["steps"] * f["batch"] if {"steps", "batch"} <= f.keys() else None)

    def figures(self) -> Iterator[Figure]:
        """Yield everything that was measured on this job.

        Raises:
            ValueError, KeyError, TypeError, AttributeError: the evaluation does not have the form that it should.
        """
        names = self.evaluation.get("class_names") or ()
        share: Any = {"better": "higher", "unit": "share"}
        for on, c in (self.evaluation.get("cas") or {}).items():
            low, high, n = c.get("accuracy_low"), c.get("accuracy_high"), c.get("n_test")
            yield Figure("accuracy", on, "", c["accuracy"], low, high, images=n, **share)
            if c.get("validation_accuracy") is not None:
                value, n = c["validation_accuracy"], c.get("n_validation")
                yield Figure("validation_accuracy", on, "", value, images=n, **share)
            for number, value in enumerate(c.get("per_class_accuracy") or ()):
                if value is not None:
                    name = str(names[number] if number < len(names) else number)
                    yield Figure("accuracy", on, name, value, **share)
        for on, f in (self.evaluation.get("features") or {}).items():
            for metric, m in f["metrics"].items():
                bounds = {k: m.get(k) for k in ("low", "high", "floor", "ceiling")}
                better, images = m.get("better", "lower"), f.get("generated_images")
                yield Figure(metric, on, "", m["value"], better=better, images=images, **bounds)
        facts = {name: value for name, value in self.facts.items() if is_number(value)}
        derived = {"seconds_training": self.seconds_training, "private_images_seen": self.images_seen}
        facts |= {name: value for name, value in derived.items() if value is not None}
        for name in sorted(facts):
            yield Figure(name, "", "", facts[name], unit=self.seconds_unit if name.startswith("seconds_") else "")


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


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
        names: list[str] = []  # as the first generator that can be read has them
        for one in found:
            if not names and one.release is not None:
                with contextlib.suppress(RunError, ConfigError):
                    names = list(read_description(exp / one.release)[0].class_names)
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
            head = {name: getattr(j, name) for name in FIXED[:8]}
            head |= {axis: j.settings.get(axis) for axis in self.axes}
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

    kinds = {"seed": pa.int64(), "images": pa.int64(), "private": pa.bool_(), **dict.fromkeys(_NUMBERS, pa.float64())}

    def column(name: str) -> Any:
        values = [row[name] for row in rows]
        if name not in axes:
            return pa.array(values, kinds.get(name, pa.string()))
        make, kind = (float, pa.float64()) if all(v is None or is_number(v) for v in values) else (str, pa.string())
        return pa.array([None if v is None else make(v) for v in values], kind)

    pq.write_table(pa.table({name: column(name) for name in columns}), path, compression="zstd")
