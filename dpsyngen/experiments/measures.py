"""Results as a reader asks for them: one measure over seeds, for each variant at each ε, and the answer in words."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, get_args

from dpsyngen.diffusion.stages import VARIANTS
from dpsyngen.evaluation.metrics import METRICS
from dpsyngen.experiments.experiment import Experiment
from dpsyngen.experiments.results import Figure, JobResult, is_number
from dpsyngen.experiments.spec import Kind
from dpsyngen.experiments.statistics import (
    Better,
    Comparison,
    against_best,
    best_of,
    column_decimals,
    compare,
    difference_decimals,
    mean_text,
    number,
    seeds_in_words,
    summarise,
)

VARIANT_NAMES = {name: name.capitalize() for name in VARIANTS} | {"dpdm": "DPDM", "finetune": "FineTune"}
ON_NAMES = {
    "cnn": "CNN",
    "mlp": "MLP",
    "logreg": "logistic regression",
    "efficientnet-lite0": "EfficientNet-Lite0",
    "inception": "Inception-v3",
    "pixels": "pixels",
    "pixels-pca": "pixels (PCA)",
}
"""Classifiers and feature extractors, in the order in which tables have them."""
FIXED = (
    *("job", "kind", "variant", "epsilon", "delta", "seed", "label", "private"),
    *("metric", "on", "class", "value", "low", "high", "floor", "ceiling", "better", "unit", "images"),
)
"""Columns of the long table, beside one for each setting that is varied (after "private")."""
EQUAL_FACTS = ("records", "steps", "batch", "copies", "parameters", "threads")
"""What runs at one ε must share for a comparison on equal terms."""


def epsilon_name(epsilon: float) -> str:
    """ "ε = 1", or "ε = ∞"."""
    return "ε = ∞" if math.isinf(epsilon) else f"ε = {epsilon:g}"


@dataclass(frozen=True)
class Measure:
    """A figure that runs are compared by: "accuracy" or a metric of features, `on` a classifier or an extractor."""

    metric: str
    on: str
    better: Better

    @property
    def name(self) -> str:
        """In a sentence: "CNN accuracy", "Fréchet distance on pixels (PCA)"."""
        if self.metric == "accuracy":
            return f"{self.on_name} accuracy" if self.on_name.isupper() else f"accuracy of {self.on_name}"
        return f"{self.metric_name} on {self.on_name}"

    @property
    def metric_name(self) -> str:
        return METRICS[self.metric].title if self.metric in METRICS else self.metric

    @property
    def on_name(self) -> str:
        return ON_NAMES.get(self.on, self.on)

    @property
    def scale(self) -> float:
        """Factor from a stored value to a shown one: accuracies are shown in percent."""
        return 100.0 if self.metric == "accuracy" else 1.0

    @property
    def unit(self) -> str:
        return " %" if self.metric == "accuracy" else ""

    @property
    def difference_unit(self) -> str:
        return " points" if self.metric == "accuracy" else ""


@dataclass(frozen=True)
class Row:
    """A variant with its settings: what has one mean at one ε."""

    variant: str
    label: str
    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def variant_name(self) -> str:
        return VARIANT_NAMES[self.variant]

    @property
    def name(self) -> str:
        return f"{self.variant_name} ({self.settings_name})" if self.label else self.variant_name

    @property
    def settings_name(self) -> str:
        return self.label.replace(",", ", ")


class View:
    """The results of an experiment by measure (accuracies first), ε (smallest first) and row (in tables' order).

    `jobs` are the finished ones, in the order of variant, ε, settings and seed, references last; `runs` those of them
    that trained a generator.  `skipped` are (file, why) of results that are damaged, belong to no job of the
    specification, or were measured in another way than it now asks.
    """

    def __init__(self, exp: Path) -> None:
        self.experiment = Experiment(exp)
        self.baseline = self.experiment.spec.baseline
        planned = {job.name: job for job in self.experiment.jobs}
        jobs, skipped = [], []
        for path in sorted((exp / "results").glob("*.json")):
            try:
                if (job := planned.get(path.stem)) is None:
                    raise ValueError("it belongs to no job of the specification")
                if (result := self.experiment.result(job)) is None:
                    raise ValueError("it is damaged, or was measured in another way than the specification now asks")
                jobs.append(JobResult.of(job, result))
            except ValueError as error:
                skipped.append((path.name, str(error)))
        self.jobs, self.skipped = tuple(sorted(jobs, key=_job_place)), tuple(skipped)
        self.runs = tuple(j for j in self.jobs if j.kind == "run")
        self.axes = tuple(sorted({name for j in self.jobs for name in j.settings}))  # settings that are varied
        rows: dict[Row, None] = {}
        self._figures: dict[tuple[str, str, str, float, Row], dict[int, Figure]] = {}
        measures: dict[Measure, None] = {}
        for run in self.runs:
            row = row_of(run)
            rows[row] = None
            for f in run.figures():
                if f.better is None or f.metric == "validation_accuracy":
                    continue
                self._figures.setdefault((f.metric, f.on, f.of_class, run.epsilon, row), {})[run.seed] = f
                if not f.of_class:
                    measures[Measure(f.metric, f.on, f.better)] = None
        self.rows = tuple(rows)
        self.epsilons = tuple(sorted({run.epsilon for run in self.runs}))
        self.measures = tuple(sorted(measures, key=_measure_place))

    @cached_property
    def primary(self) -> Measure | None:
        """What the headline is about: CNN accuracy if there is one, else the first measure.

        The choice looks at names only, so it cannot favour a variant.
        """
        cnn = [m for m in self.measures if m.metric == "accuracy" and m.on == "cnn"]
        return next(iter((*cnn, *self.measures)), None)

    @property
    def core(self) -> str:
        """What stands before a unit of time: "core-" if all times are core-seconds."""
        return "core-" if self.runs and all(j.seconds_unit == "core-seconds" for j in self.runs) else ""

    def tidy(self) -> list[dict[str, Any]]:
        """The long table: a row for each figure of each job, so that anything that is stated can be computed again.

        Columns are :data:`FIXED` and one for each of the settings that are varied; what does not apply is None.
        """
        out = []
        for j in self.jobs:
            head = {"job": j.name} | {name: getattr(j, name) for name in FIXED[1:8]}
            head |= {axis: j.settings.get(axis) for axis in self.axes}
            for f in j.figures():
                out.append(head | {name: getattr(f, "of_class" if name == "class" else name) for name in FIXED[8:]})
        return out

    @cached_property
    def labels(self) -> bool:
        """Whether settings are varied."""
        return any(row.label for row in self.rows)

    def values(self, measure: Measure, epsilon: float, row: Row, of_class: str = "") -> list[float]:
        """In the order of seeds, in the units that are shown; [] if there are none."""
        found = self._figures.get((measure.metric, measure.on, of_class, epsilon, row), {})
        return [measure.scale * found[seed].value for seed in sorted(found)]

    def half_widths(self, measure: Measure, epsilon: float) -> list[float]:
        """Of the intervals of single runs, in the units that are shown."""
        of_rows = (self._figures.get((measure.metric, measure.on, "", epsilon, row), {}) for row in self.rows)
        found = ((f.low, f.high) for of_row in of_rows for f in of_row.values())
        return [measure.scale * (high - low) / 2 for low, high in found if low is not None and high is not None]

    def groups(self, measure: Measure, epsilon: float) -> dict[str, list[float]]:
        """Values by name of the row, for those rows that have some."""
        found = {row.name: self.values(measure, epsilon, row) for row in self.rows}
        return {name: values for name, values in found.items() if values}

    def classes(self, on: str) -> list[str]:
        """Names of the classes that `on` was scored by."""
        return list(dict.fromkeys(c for metric, o, c, _, _ in self._figures if metric == "accuracy" and o == on and c))

    def baselines(self, measure: Measure, epsilon: float) -> dict[str, str]:
        """Name of the baseline of each row that has one at this ε.

        It is the baseline variant with the same settings, or with as many of them as it looks at (DPDM has no τ).
        """
        out = {}
        with_values = [row for row in self.rows if self.values(measure, epsilon, row)]
        candidates = [row for row in with_values if row.variant == self.baseline]
        for row in with_values:
            fitting = [c for c in candidates if set(c.settings) <= set(row.settings)]
            if row.variant != self.baseline and fitting:
                out[row.name] = max(fitting, key=lambda c: len(c.settings)).name
        return out

    def reference(self, kind: str, measure: Measure, epsilon: float) -> list[float]:
        """Values of a reference in shown units: over seeds of a job's kind; of "test" and "programs", real test images
        and images of programs in place of generated ones, their mean over runs.
        """
        bounds = {"test": "floor", "programs": "ceiling"}
        wanted = "run" if kind in bounds else kind
        jobs = [j for j in self.jobs if j.kind == wanted]
        if kind == "dp-classifier":
            jobs = [j for j in jobs if j.epsilon == epsilon]
        figures = [f for j in jobs for f in j.figures() if (f.metric, f.of_class) == (measure.metric, "")]
        if kind != "dp-classifier":  # which is of a kind of its own, to read every classifier's accuracy by
            figures = [f for f in figures if f.on == measure.on]
        found = (getattr(f, bounds.get(kind, "value")) for f in figures)
        values = [measure.scale * value for value in found if value is not None]
        return [fmean(values)] if values and kind in bounds else values

    def seeds(self) -> list[int]:
        """Numbers of seeds that rows have at an ε, without repetition."""
        return sorted(set(Counter((job.epsilon, row_of(job)) for job in self.runs).values()))

    def unequal(self) -> list[str]:
        """What differs between runs at one ε and settings but must not, in words."""
        found: dict[str, list[str]] = {}
        varied = {axis.rsplit(".", 1)[-1] for axis in self.axes}
        for epsilon in self.epsilons:
            at: dict[str, dict[float, dict[str, None]]] = {}
            for job in (j for j in self.runs if j.epsilon == epsilon):
                for what, value in _terms(job):
                    at.setdefault(what, {}).setdefault(value, {})[row_of(job).name] = None
            for what, values in at.items():
                if len(values) > 1 and what not in varied:
                    parts = [f"{value:,g} ({', '.join(names)})" for value, names in values.items()]
                    found.setdefault(f"{what} {'; '.join(parts)}", []).append(epsilon_name(epsilon))
        return [f"{', '.join(epsilons)}: {text}" for text, epsilons in found.items()]


def row_of(job: JobResult) -> Row:
    """The row that a run belongs to."""
    plain = {k: v if isinstance(v, str | int | float | None) else repr(v) for k, v in job.settings.items()}
    return Row(job.variant, job.label, tuple(sorted(plain.items())))


def _terms(job: JobResult) -> list[tuple[str, float]]:
    terms = [(name, job.facts[name]) for name in EQUAL_FACTS if name in job.facts]
    if job.delta is not None:
        terms.append(("δ", job.delta))
    for f in job.figures():
        if f.images is not None and f.better is not None and not f.of_class and f.metric != "validation_accuracy":
            what = "real test images" if f.metric == "accuracy" else "generated images"
            terms.append((f"{what} ({ON_NAMES.get(f.on, f.on)})", f.images))
    return list(dict.fromkeys(terms))


def _measure_place(m: Measure) -> tuple[Any, ...]:
    return m.metric != "accuracy", _place(ON_NAMES, m.on), m.better == "higher", _place(METRICS, m.metric)


def _job_place(j: JobResult) -> tuple[Any, ...]:
    variant = (*VARIANTS, "").index(j.variant)
    settings = sorted((k, isinstance(v, str), str(v) if not is_number(v) else float(v)) for k, v in j.settings.items())
    return get_args(Kind).index(j.kind), variant, j.epsilon, repr(settings), j.label, j.seed


def _place(names: Iterable[str], name: str) -> tuple[int, str]:
    listed = [*names, name]
    return listed.index(name), name


class Answer(NamedTuple):
    """What the experiment says at one ε: which variant did best, and each against its baseline, a sentence each."""

    epsilon: float
    headline: str
    lines: tuple[str, ...]


def answers(view: View) -> list[Answer]:
    """The answer of the primary measure at each ε; [] if nothing was measured."""
    measure, out = view.primary, []
    for epsilon in view.epsilons:
        if measure is not None and (groups := view.groups(measure, epsilon)):
            family = compare(list(view.baselines(measure, epsilon).items()), groups, measure.better)
            out.append(Answer(epsilon, _headline(groups, measure), tuple(_sentence(c, measure) + "." for c in family)))
    return out


def _sentence(c: Comparison, measure: Measure) -> str:
    """ "Cleaning is better than DPDM by 2.1 points (95 % CI 0.4 to 3.8)", or what was not shown and why."""
    unit, digits = measure.difference_unit, difference_decimals(c)
    said = f"{c.first} against {c.second}: {number(c.difference, digits, True)}{unit}"
    if c.low is None or c.high is None:
        return f"{said}; {c.reason}"
    if c.verdict == "not shown":
        return f"{said}, 95 % CI {number(c.low, digits)} to {number(c.high, digits)}: {c.reason}"
    low, high = sorted((abs(c.low), abs(c.high)))
    by = f"by {number(abs(c.difference), digits)}{unit} (95 % CI {number(low, digits)} to {number(high, digits)})"
    return f"{c.first} is {c.verdict} than {c.second} {by}"


def _headline(groups: dict[str, list[float]], measure: Measure) -> str:
    best = best_of(groups, measure.better)
    summaries = {name: summarise(values) for name, values in groups.items()}
    shown = mean_text(summaries[best], column_decimals(list(summaries.values())))
    text = f"the best mean {measure.name} is that of {best}, {shown}{measure.unit}"
    if len(groups) == 1:
        return f"{text}; there is nothing to compare it with."
    compared = against_best(groups, measure.better)
    untested = [c for c in compared if c.verdict == "not tested"]
    if len(untested) == len(compared):
        return f"{text}; {untested[0].reason}."
    counts = [len(values) for values in groups.values()]
    seeds = seeds_in_words(min(counts), max(counts)).replace(" and ", " to ")
    undecided = [c.first for c in compared if c.verdict != "worse"]
    if not undecided:
        return f"{text}; with {seeds} all others are shown to be worse."
    if len(undecided) == len(compared):
        return f"{text}; with {seeds} no other variant is shown to differ from it."
    names = " and ".join(filter(None, (", ".join(undecided[:-1]), undecided[-1])))
    return f"{text}; with {seeds} no difference from it is shown for {names}."
