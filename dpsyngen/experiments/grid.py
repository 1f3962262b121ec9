"""The runs of an experiment, one by one, with the settings of each."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any, Literal

from dpsyngen.config import Config, load_config, merge_settings
from dpsyngen.diffusion.stages import USE_MOMENTS
from dpsyngen.errors import ConfigError
from dpsyngen.experiments.spec import MOST_JOBS, Spec
from dpsyngen.training.plan import stages_of

Kind = Literal["run", "real", "programs", "dp-classifier"]


@dataclass(frozen=True)
class Job:
    """One run, or one reference.

    Attributes:
        name: of its folder and files.
        kind: "run" trains a generator; "real" trains classifiers on real images; "dp-classifier" does so by DP-SGD;
            "programs" measures images drawn by programs.
        variant: "" for a reference.
        epsilon: ε; infinite without privacy.
        seed: of the grid.
        label: name of the settings that are varied; "" where none are.
        settings: those settings, by full name; a setting that the variant does not look at is left out.
        config: all settings of a run; None for a reference.
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
    """All jobs of an experiment, in the order in which they are run: seed by seed, so that an experiment that is cut
    short has all variants with fewer seeds and not some variants with all.

    A combination that differs from another one in a setting only that its variant does not look at (τ for DPDM) would
    be the same run again, and is left out.

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
            job = _run(spec, variant, epsilon, seed, case.label, case.settings | axes)
            same = out.setdefault(job.name, job)
            if same.config != job.config:
                raise ConfigError(
                    f"two runs of the grid would be called {job.name}: give the cases labels that tell them apart."
                )
        for kind in spec.references:
            job = _reference(kind, epsilon, seed if kind != "programs" else g.seeds[0])
            if _wanted(spec, job):
                out.setdefault(job.name, job)
    return tuple(out.values())


def _run(spec: Spec, variant: str, epsilon: float, seed: int, case: str, given: dict[str, Any]) -> Job:
    pretrain = given.get("stages.pretrain", spec.settings.get("stages", {}).get("pretrain"))
    settings = {name: value for name, value in given.items() if _matters(name, variant, pretrain is True)}
    shortened = [f"{name.rsplit('.', 1)[-1]}={_short(value)}" for name, value in settings.items()]
    label = case if case and settings else ",".join(shortened)
    if case and settings and spec.grid.axes:
        label = ",".join([case, *(s for n, s in zip(settings, shortened, strict=True) if n in spec.grid.axes)])
    parts = [variant, f"eps{_short(epsilon)}", *([label.replace(",", "-")] if label else []), f"seed{seed}"]
    name = "-".join(parts)
    nested: dict[str, Any] = spec.settings
    own = spec.grid.variant_settings.get(variant, {})  # type: ignore[call-overload]
    for full, value in (own | settings).items():
        for part in reversed(full.split(".")):
            value = {part: value}
        nested = merge_settings(nested, value)
    fixed: dict[str, dict[str, Any]] = {
        "data": {
            "source": spec.data.train,
            "resolution": spec.data.resolution,
            "channels": spec.data.channels,
            "labels": spec.data.labels,
        },
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
    except ConfigError as error:
        raise ConfigError(f"the run {name} cannot be: {error}") from None
    return Job(name, "run", variant, epsilon, seed, label, settings, config)


def _matters(name: str, variant: str, pretrain: bool) -> bool:
    """Whether a run of `variant` looks at a setting at all; `pretrain`: it begins on programs whatever the variant."""
    if name == "stages.tau_cleaning":
        return variant in ("cleaning", "both", "residual-cleaning")
    if name == "stages.tau_coarse":
        return variant in ("coarse", "both", "residual", "residual-cleaning")
    if name == "stages.networks":
        return variant in ("cleaning", "coarse", "both")
    if name == "stages.pretrain":
        return variant not in USE_MOMENTS
    if name.startswith(("public.", "program.")):
        return variant not in ("dpdm", "gaussian", "residual") or pretrain
    if name == "moments.share":
        return variant in ("residual", "residual-cleaning")
    if name.startswith("moments."):
        return variant in USE_MOMENTS
    if name.startswith(("private.", "network.")):
        return variant != "gaussian"
    return True


def _short(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return "".join(c if c.isalnum() or c in "._=+-" else "_" for c in text)[:40]


def _reference(kind: Kind, epsilon: float, seed: int) -> Job:
    if kind == "dp-classifier":
        return Job(f"dp-classifier-eps{_short(epsilon)}-seed{seed}", kind, "", epsilon, seed)
    return Job(f"{kind}-seed{seed}", kind, "", math.inf, seed)


def _wanted(spec: Spec, job: Job) -> bool:
    if job.kind == "programs":
        return bool(spec.evaluation.features and spec.evaluation.metrics)
    if job.kind == "dp-classifier" and math.isinf(job.epsilon):
        return False  # that is what "real" is
    return bool(spec.evaluation.classifiers)


def programs_share(config: Config) -> float:
    """Share of the training noise levels, by their density, that programs alone train; 0 for DPDM and Residual."""
    levels = NormalDist(config.network.noise_mean, config.network.noise_std)
    return sum(levels.cdf(stage.high) - levels.cdf(stage.low) for stage in stages_of(config).public)


def digest(value: Any) -> str:
    """Of JSON-able values, whatever the order of keys."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
