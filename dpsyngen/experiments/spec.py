"""What an experiment is: a grid of runs, one by one, how their generators are measured, and what it may cost.

A specification is a YAML file.  It is public in the sense of METHOD.md: nothing in it may be chosen by looking at the
private images.  What comes out of an experiment is private, all of it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from dpsyngen.config import MAX_EPSILON, Config, DataConfig, Variant, explain, load_config, merge_settings, preset_names
from dpsyngen.errors import ConfigError, printable, shown
from dpsyngen.evaluation.metrics import Measured
from dpsyngen.files import read_yaml, read_yaml_file
from dpsyngen.training.plan import matters, stages_of

PUBLISHED: tuple[Variant, ...] = ("dpdm", "finetune", "cleaning", "coarse", "both")
"""What an experiment compares if it does not say: the variants of the paper, and the union of the last two."""
Reference = Literal["real", "dp-classifier", "programs"]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
MOST_JOBS = 10_000
_LABEL = r"^([A-Za-z0-9][A-Za-z0-9._=+-]{0,39})?$"
# What a grid varies by its own name, or what the experiment itself decides.
_RESERVED = {
    "data": "set the data section of the specification",
    "privacy.epsilon": "use grid.epsilon",
    "privacy.insecure_seed": "use noise: seeded",
    "privacy.budget": "use cost.budget_file",
    "privacy.groups": "train such runs one by one, with dpsyngen train --groups",
    "privacy.most_per_person": "train such runs one by one, with dpsyngen train --groups",
    "stages.variant": "use grid.variant",
    "network.seed": "use grid.seeds",
    "program.seed": "use grid.seeds",
    "sampling": "set the sampling section of the specification",
    "preset": "set preset at the top of the specification",
}


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataFacts(_Part):
    """What is public about the images; lets `--dry-run` work without them, and a wrong data set be noticed."""

    records: int = Field(ge=1, le=10**12)
    resolution: int = Field(ge=8, le=256)
    channels: Literal[1, 3]
    classes: int = Field(ge=0, le=10**6)


class DataSpec(DataConfig):
    """The images of an experiment, and how they are read: by the settings of the section ``data`` of a run."""

    train: str = Field(max_length=4096, description="private images: what `dpsyngen train --data` takes")
    test: str | None = Field(None, max_length=4096, description="real test images, never trained on")
    facts: DataFacts | None = Field(None, description="what train must be like; None, or with --data: whatever it is")

    @property
    def section(self) -> dict[str, Any]:
        """The section ``data`` of a run's configuration."""
        return self.model_dump(include=set(DataConfig.model_fields)) | {"source": self.train}

    @model_validator(mode="after")
    def _one_source(self) -> DataSpec:
        if self.source:
            raise ValueError("data.source is not set here: the images are data.train and data.test")
        return self


class Case(_Part):
    """A named combination of settings."""

    label: str = Field("", pattern=_LABEL, description="letters, digits and ._=+-: it names folders")
    settings: dict[str, Any] = Field(default_factory=dict, description="full names, as stages.tau_coarse")
    variants: tuple[Variant, ...] | None = Field(None, description="of the grid's, those that have it; None: all")


class GridSpec(_Part):
    """What is varied; every combination is a run."""

    variant: tuple[Variant, ...] = PUBLISHED
    epsilon: tuple[float, ...] = Field((1.0, 10.0), description="ε of a run; inf trains without privacy")
    seeds: tuple[Seed, ...] = Field((0, 1, 2), description="of the network, the programs, the sampling")
    axes: dict[str, tuple[Any, ...]] = Field(default_factory=dict, description="settings by full name, all combined")
    cases: tuple[Case, ...] = Field((Case(),), description="named combinations, each with all axes")
    # Settings, by full name, of the runs of one variant; axes and cases go first.
    variant_settings: dict[Variant, dict[str, Any]] = Field(default_factory=dict)

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=True)

    @field_validator("seeds", mode="before")
    @classmethod
    def _count(cls, value: Any) -> Any:
        """``seeds: 3`` means 0, 1, 2."""
        if isinstance(value, bool):
            raise ValueError("give the seeds, such as [0, 1, 2], or how many")
        return range(value) if isinstance(value, int) and 0 < value <= MOST_JOBS else value

    @field_validator("variant", "epsilon", "seeds", "cases")
    @classmethod
    def _some(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        if not value:
            raise ValueError("it is empty: leave it out for the default, or give at least one")
        if len({repr(v) for v in value}) < len(value):
            raise ValueError("something is in it twice")
        return value

    @field_validator("epsilon", mode="before")
    @classmethod
    def _infinite(cls, value: Any) -> Any:
        """One number stands for a list of it, and "inf" or "∞" for no privacy."""
        one = [value] if isinstance(value, int | float | str) else value
        return [math.inf if e in ("inf", "∞") else e for e in one] if isinstance(one, list | tuple) else value

    @model_validator(mode="after")
    def _sound(self) -> GridSpec:
        for e in self.epsilon:
            if not e > 0 or MAX_EPSILON < e < math.inf:
                raise ValueError(f"epsilon {e:g} must be above 0 and at most {MAX_EPSILON:g}, or inf for no privacy")
        if len({c.label for c in self.cases}) < len(self.cases):
            raise ValueError("two cases have the same label")
        if unknown := {v for c in self.cases for v in c.variants or ()} - set(self.variant):
            raise ValueError(f"cases name variants that the grid has not: {', '.join(sorted(unknown))}")
        for name in (*self.axes, *(n for c in self.cases for n in c.settings)):
            check_setting(name)
        for name in (n for own in self.variant_settings.values() for n in own):
            check_setting(name, drawn=True)
        for name, values in self.axes.items():
            if not values or len({repr(v) for v in values}) < len(values):
                raise ValueError(f"the axis {name} is empty or has a value twice")
            for case in self.cases:
                if name in case.settings:
                    raise ValueError(f"{name} is an axis and set by the case {case.label!r}: give it one place")
        return self


class SamplingSpec(_Part):
    """How generated images are drawn; None: as the preset says."""

    images: int = Field(5000, ge=2, le=10**7)
    sampler: Literal["ddim", "heun", "dpmpp"] | None = None
    steps: int | None = Field(None, ge=1, le=10_000)
    guidance: float | None = Field(None, ge=0, le=1e6)
    churn: float | None = Field(None, ge=0, le=1e6)


class EvaluationSpec(Measured):
    """What is measured; see docs/metrics.md and docs/cas.md."""

    features: tuple[str, ...] = ("efficientnet-lite0", "pixels-pca")
    inception_weights: str | None = Field(None, max_length=4096)


class DpClassifierSpec(_Part):
    """The reference that trains a classifier on the private images by DP-SGD; None: by rule from n and ε."""

    steps: int | None = Field(None, ge=1, le=10**6)
    batch: int | None = Field(None, ge=1, le=10**9)


class CostSpec(_Part):
    """What the experiment may use up."""

    hours: float | None = Field(None, gt=0, le=10**6, description="of computing, all processes together; None: any")
    total_epsilon: float | None = Field(None, gt=0, le=MAX_EPSILON, description="ε of all private runs together")
    delta: float | None = Field(None, gt=0, lt=1, description="δ of that; None: the runs'")
    budget_file: str | None = Field(None, max_length=4096, description="see `dpsyngen budget`; every run reserves")


class Spec(_Part):
    """An experiment."""

    name: str = Field(max_length=100)
    description: str = Field("", max_length=4000)
    data: DataSpec
    # As grid.variant: what the published variants go with.
    preset: str = "paper-cpu"
    settings: dict[str, Any] = Field(default_factory=dict, description="of all runs, as in a configuration file")
    grid: GridSpec = GridSpec()
    references: tuple[Reference, ...] = get_args(Reference)
    dp_classifier: DpClassifierSpec = DpClassifierSpec()
    baseline: Variant = Field("dpdm", description="the variant that the others are compared with")
    sampling: SamplingSpec = SamplingSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    cost: CostSpec = CostSpec()
    # seeded: the same numbers each time, for public data; stamps every run NOT PRIVATE.
    noise: Literal["system", "seeded"] = "system"

    @model_validator(mode="after")
    def _together(self) -> Spec:
        if self.preset not in preset_names():
            raise ValueError(f"preset is {shown(self.preset)}, but must be one of {', '.join(preset_names())}")
        for section, values in self.settings.items():
            if not isinstance(values, dict):
                raise ValueError(f"settings.{section} must be a section with settings in it")
            for name in values:
                check_setting(f"{section}.{name}", exists=False)
        limited = self.cost.budget_file or self.cost.total_epsilon
        if limited and self.noise == "seeded":
            raise ValueError("noise: seeded, for public data, does not go with cost.budget_file or cost.total_epsilon")
        if limited and math.inf in self.grid.epsilon:
            raise ValueError("a run of ε = inf exceeds any budget: leave it out of grid.epsilon, or drop the budget")
        if self.data.test is None and self.evaluation.classifiers:
            raise ValueError("data.test is missing: classifiers are scored on it.  Or evaluation: {classifiers: []}")
        if not self.data.labels and self.evaluation.classifiers:
            raise ValueError("without labels there is nothing to classify: give evaluation: {classifiers: []}")
        return self

    def to_yaml(self) -> str:
        """As a file that gives this specification again, defaults written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def check_setting(name: str, exists: bool = True, drawn: bool = False) -> None:
    """Raise ValueError unless `name`, such as stages.tau_coarse, is a setting that an experiment may vary.

    `exists`: there has to be such a setting; `drawn`: it may be one of the sampler's.
    """
    section, _, rest = name.partition(".")
    for reserved, instead in _RESERVED.items():
        if (name == reserved or section == reserved) and not (drawn and section == "sampling"):
            raise ValueError(f"{shown(name)} is not set here: {instead}")
    if exists:
        known = Config.model_fields.get(section)
        fields = getattr(known.annotation, "model_fields", {}) if known else {}
        if rest not in fields and not name.startswith("program.params."):
            names = ", ".join(f"{section}.{f}" for f in fields) or "SECTION.NAME"
            raise ValueError(f"there is no setting {shown(name)} (there are: {names})")


def spec_names() -> tuple[str, ...]:
    """Names of the specifications that ship with the package."""
    folder = resources.files("dpsyngen") / "experiments" / "specs"
    return tuple(sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml")))


def load_spec(given: str | Path) -> Spec:
    """Read a specification from a YAML file, or one that ships with the package by its name.

    Raises:
        ConfigError: no such file or name, or something in it is not allowed; all problems at once.
    """
    if str(given) in spec_names():
        source = resources.files("dpsyngen") / "experiments" / "specs" / f"{given}.yaml"
        values = read_yaml(source.read_text(encoding="utf-8"), f"the specification {given}")
    elif Path(given).exists():
        values = read_yaml_file(Path(given), "the specification")
    else:
        ships = f"no such specification ships with dpsyngen: those are {', '.join(spec_names())}"
        raise ConfigError(f"there is no file {printable(str(given))}, and {ships}.")
    return parse_spec(values, str(given))


def parse_spec(values: Any, name: str = "the specification") -> Spec:
    """A specification from nested mappings; ConfigError with all problems at once."""
    if not isinstance(values, dict):
        raise ConfigError(f"{printable(name)} must hold a mapping of sections ({', '.join(Spec.model_fields)}).")
    try:
        return Spec.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{printable(name)}: {explain(error, Spec)}") from None


# ------------------------------------------------------------------------------------------------- the grid

Kind = Literal["run", "real", "dp-classifier"]


@dataclass(frozen=True)
class Job:
    """One run, or one reference: "real" trains classifiers on real images, "dp-classifier" does so by DP-SGD.

    `name` is that of its folder and files; `variant`, `label` and `settings` (by full name, as far as the variant looks
    at them) are what is varied; `config` are all settings of a run, None for a reference.
    """

    name: str
    kind: Kind
    variant: str
    epsilon: float
    seed: int
    label: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    config: Config | None = None


def jobs_of(spec: Spec) -> tuple[Job, ...]:
    """List the jobs of an experiment, in the order in which they are run.

    That is seed by seed, so that an experiment that is cut short has all variants with fewer seeds and not some
    variants with all.  A combination that differs from another one in a setting only that its variant does not look at
    (τ for DPDM) would be the same run again, and is left out.

    Raises:
        ConfigError: a combination is not allowed, or there are more than 10,000.
    """
    g = spec.grid
    count = len(g.variant) * len(g.epsilon) * len(g.seeds) * len(g.cases)
    count *= math.prod(len(v) for v in g.axes.values())
    if count > MOST_JOBS:
        raise ConfigError(f"the grid has {count:,} runs, but at most {MOST_JOBS:,} are allowed.")
    # How images are drawn is refused now, not after the training.
    drawn = spec.sampling.model_dump(exclude={"images"}, exclude_none=True)
    load_config(merge_settings(spec.settings, {"sampling": drawn}), preset=spec.preset)
    out: dict[str, Job] = {}
    combinations = [dict(zip(g.axes, values, strict=True)) for values in itertools.product(*g.axes.values())]
    for seed, epsilon in itertools.product(g.seeds, g.epsilon):
        for case, axes, variant in itertools.product(g.cases, combinations, g.variant):
            if variant not in (case.variants or g.variant):
                continue
            job = _run(spec, variant, epsilon, seed, case.label, case.settings | axes)
            same = out.setdefault(job.name, job)
            if same.config != job.config:
                raise ConfigError(
                    f"two runs of the grid would be called {job.name}: give the cases other labels, or values of an "
                    "axis that begin or end alike as cases with labels of their own."
                )
        if spec.evaluation.classifiers:
            if "real" in spec.references:
                out.setdefault(f"real-seed{seed}", Job(f"real-seed{seed}", "real", "", math.inf, seed))
            # At ε = ∞ that is what "real" is.
            if "dp-classifier" in spec.references and math.isfinite(epsilon):
                name = f"dp-classifier-eps{_short(epsilon)}-seed{seed}"
                out[name] = Job(name, "dp-classifier", "", epsilon, seed)
    return tuple(out.values())


def _run(spec: Spec, variant: str, epsilon: float, seed: int, case: str, given: dict[str, Any]) -> Job:
    own = spec.grid.variant_settings.get(variant, {})  # type: ignore[call-overload]
    of_all = {f"stages.{name}": value for name, value in spec.settings.get("stages", {}).items()}
    pretrain = (of_all | own | given).get("stages.pretrain")
    settings = {name: value for name, value in given.items() if matters(name, variant, bool(pretrain))}
    told = [name for name in settings if not case or name in spec.grid.axes]
    shortened = [f"{name.rsplit('.', 1)[-1]}={_short(settings[name])}" for name in told]
    label = ",".join([case, *shortened] if case and settings else shortened)
    parts = [variant, f"eps{_short(epsilon)}", *([label.replace(",", "-")] if label else []), f"seed{seed}"]
    name = "-".join(parts)
    nested: dict[str, Any] = spec.settings
    for full, value in (own | settings).items():
        for part in reversed(full.split(".")):
            value = {part: value}
        nested = merge_settings(nested, value)
    fixed: dict[str, dict[str, Any]] = {
        "data": spec.data.section,
        "privacy": {"epsilon": epsilon},
        "stages": {"variant": variant},
        "network": {"seed": seed},
        "program": {"seed": seed},
    }
    if spec.noise == "seeded":
        # From the name: runs that share a seed must not share their noise, or they would not be independent.
        fixed["privacy"]["insecure_seed"] = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest())
    if spec.cost.budget_file:
        fixed["privacy"]["budget"] = spec.cost.budget_file
    try:
        config = load_config(merge_settings(nested, fixed), preset=spec.preset)
        stages_of(config)
    except ConfigError as error:
        raise ConfigError(f"the run {name} cannot be: {error}") from None
    return Job(name, "run", variant, epsilon, seed, label, settings, config)


def _short(value: Any) -> str:
    """A value in the name of a run; of a path its last part, as an experiment makes paths absolute when it begins."""
    text = f"{value:g}" if isinstance(value, float) else str(value).rpartition("/")[2]
    return "".join(c if c.isalnum() or c in "._=+-" else "_" for c in text)[:40]


def digest(value: Any) -> str:
    """Digest JSON-able values, whatever the order of keys."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
