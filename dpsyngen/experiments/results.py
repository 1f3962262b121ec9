"""What the jobs of an experiment found, read back from their files and laid out as one long table.

The long table has a row for each figure of each job, so that a reader can compute anything again that the report
states.  It is private: its figures come from private images.
"""

from __future__ import annotations

import contextlib
import csv
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

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


@dataclass(frozen=True)
class JobResult:
    """One finished job, as its file states it.

    Attributes:
        job: its name.
        kind: "run", or a reference: "real", "programs", "dp-classifier".
        variant: "" for a reference.
        epsilon: ε, infinite without privacy.
        delta: δ, None without privacy.
        seed: of the grid.
        settings: what is varied beyond variant, ε and seed, by full name.
        label: short name of the settings.
        private: False if its noise could be predicted.
        facts: steps, seconds and so on; numbers by name.
        release: folder of the generator in the experiment's folder, or None.
        evaluation: what :func:`dpsyngen.evaluation.evaluate_images` found.
        seconds_unit: "core-seconds" on a CPU, "seconds" elsewhere.
    """

    job: str
    kind: Literal["run", "real", "programs", "dp-classifier"]
    variant: str
    epsilon: float
    delta: float | None
    seed: int
    settings: dict[str, Any]
    label: str
    private: bool
    facts: dict[str, float]
    release: str | None
    evaluation: dict[str, Any] = field(repr=False)
    seconds_unit: str = "seconds"

    @classmethod
    def parse(cls, text: str, name: str) -> JobResult:
        """From the text of ``results/<name>.json``.

        Raises:
            ValueError: it is not such a file; the message says why.
        """
        try:
            v = json.loads(text)
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
        if not isinstance(v, dict):
            raise ValueError("it holds no object")
        try:
            kind, evaluation, release = v["kind"], v["evaluation"], v.get("release")
            facts = {str(k): _number(x, k) for k, x in (v.get("facts") or {}).items() if is_number(x)}
            out = cls(
                job=str(v["job"]),
                kind=kind,
                variant=str(v["variant"]),
                epsilon=math.inf if v["epsilon"] in ("inf", None) else _number(v["epsilon"], "epsilon"),
                delta=None if v.get("delta") is None else _number(v["delta"], "delta"),
                seed=int(v["seed"]),
                settings=dict(v.get("settings") or {}),
                label=str(v.get("label") or ""),
                private=bool(v.get("private", True)),
                facts=facts,
                release=None if release is None else str(release),
                evaluation=dict(evaluation or {}),
                seconds_unit=str((v.get("facts") or {}).get("seconds_unit", "seconds")),
            )
        except KeyError as error:
            raise ValueError(f"it has no {error}") from None
        except (TypeError, AttributeError) as error:
            raise ValueError(f"something has the wrong type ({error})") from None
        if kind not in KINDS:
            raise ValueError(f"kind is {printable(repr(kind), 60)}")
        if out.job != name:
            raise ValueError(f"it is about the job {printable(out.job, 60)}")
        if kind == "run" and not out.variant:
            raise ValueError("it is a run without a variant")
        if release is not None and (PurePosixPath(release).is_absolute() or ".." in PurePosixPath(release).parts):
            raise ValueError("its release lies outside the experiment")
        list(out.figures())  # so that what is wrong in the figures shows here
        return out

    @property
    def seconds_training(self) -> float | None:
        """Of public and private training together; None if neither was taken."""
        if "seconds_training" in self.facts:
            return self.facts["seconds_training"]
        parts = [self.facts[k] for k in ("seconds_public", "seconds_private") if k in self.facts]
        return sum(parts) if parts else None

    @property
    def images_seen(self) -> float | None:
        """Expected number of private images that training used, each time counted; None if unknown."""
        f = self.facts
        if "private_images_seen" in f:
            return f["private_images_seen"]
        return f["steps"] * f["batch"] if {"steps", "batch"} <= f.keys() else None

    @property
    def images_of_steps(self) -> float | None:
        """The same without those that DP moments were taken of, which no network saw."""
        seen = self.images_seen
        return None if seen is None else seen - self.facts.get("moments_images_seen", 0)

    def figures(self) -> Iterator[Figure]:
        """Everything that was measured on this job.

        Raises:
            ValueError: the evaluation does not have the form that it should.
        """
        try:
            names = [str(n) for n in self.evaluation.get("class_names") or ()]
            for on, c in (self.evaluation.get("cas") or {}).items():
                yield from _cas_figures(str(on), c, names)
            for on, f in (self.evaluation.get("features") or {}).items():
                images = f.get("generated_images")
                for metric, m in f["metrics"].items():
                    yield Figure(
                        str(metric),
                        str(on),
                        "",
                        _number(m["value"], metric),
                        low=_optional(m, "low"),
                        high=_optional(m, "high"),
                        floor=_optional(m, "floor"),
                        ceiling=_optional(m, "ceiling"),
                        better=_direction(m.get("better", "lower")),
                        images=None if images is None else int(images),
                    )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"its evaluation has not the right form ({error!r})") from None
        facts = dict(self.facts)
        if self.seconds_training is not None:
            facts["seconds_training"] = self.seconds_training
        if self.images_seen is not None:
            facts["private_images_seen"] = self.images_seen
        for name in sorted(facts):
            yield Figure(name, "", "", facts[name], unit=self.seconds_unit if name.startswith("seconds_") else "")


@dataclass(frozen=True)
class Figure:
    """One number.

    Attributes:
        metric: its name.
        on: classifier or feature extractor; "" for a fact of the run.
        of_class: name of the class, for class-wise accuracy; "" for all classes.
        value: it.
        low, high: 95 % interval from this run's images alone: it does not hold the spread between seeds.
        floor: what real test images get.
        ceiling: what images drawn by programs get.
        better: "lower" or "higher"; None for a fact.
        unit: "share" is a number from 0 to 1.
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


def _cas_figures(on: str, c: dict[str, Any], names: list[str]) -> Iterator[Figure]:
    images = c.get("n_test")
    count = None if images is None else int(images)
    low, high = _optional(c, "accuracy_low"), _optional(c, "accuracy_high")
    value = _number(c["accuracy"], "accuracy")
    yield Figure("accuracy", on, "", value, low, high, better="higher", unit="share", images=count)
    if c.get("validation_accuracy") is not None:
        value = _number(c["validation_accuracy"], "validation_accuracy")
        yield Figure("validation_accuracy", on, "", value, better="higher", unit="share", images=c.get("n_validation"))
    for number, share in enumerate(c.get("per_class_accuracy") or ()):
        if share is not None:
            name = names[number] if number < len(names) else str(number)
            yield Figure("accuracy", on, name, _number(share, "accuracy"), better="higher", unit="share")


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any, name: object) -> float:
    if not is_number(value) or not math.isfinite(value):
        raise ValueError(f"{printable(name, 60)} is {printable(repr(value), 60)}, which is not a number")
    return float(value)


def _optional(values: dict[str, Any], name: str) -> float | None:
    return None if values.get(name) is None else _number(values[name], name)


def _direction(value: Any) -> Literal["lower", "higher"]:
    if value == "lower":
        return "lower"
    if value == "higher":
        return "higher"
    raise ValueError(f"better is {printable(repr(value), 60)}")


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
