"""The plan of a run: the public facts, who trains what, and the noise; refused while nothing is spent."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dpsyngen.config import Config, with_batch
from dpsyngen.data import ImageDataset
from dpsyngen.diffusion.stages import USE_MOMENTS, VARIANTS, StageMap, coarse_of, stage_map
from dpsyngen.diffusion.standalone import LARGEST_DIMENSION
from dpsyngen.diffusion.unet import check_resolution, named_size
from dpsyngen.errors import ConfigError, require
from dpsyngen.files import memory_bytes
from dpsyngen.privacy.accounting import Mechanism, calibrate_noise, default_delta
from dpsyngen.privacy.accounting import epsilon as epsilon_of
from dpsyngen.privacy.certificate import protected
from dpsyngen.privacy.moments import LARGEST_MULTIPLIER, check_records
from dpsyngen.programs import TIERS, Program, make_program
from dpsyngen.training.private import DpSgd


@dataclass(frozen=True)
class Shape:
    """What is public about the images (METHOD.md: stated assumptions)."""

    resolution: int
    channels: int  # 1 or 3
    class_names: tuple[str, ...]  # () for an unconditional generator
    records: int  # declared

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


SHARES = (0.2, 0.4, 0.4)
"""Of the queries (see :class:`MomentsPlan`) in 1/z², which the cost of Gaussian mechanisms adds up in."""


@dataclass(frozen=True)
class MomentsPlan:
    """z of the queries: class sums, pooled scatter matrix, scatter matrices by class (None without classes)."""

    mean: float
    pooled: float
    by_class: float | None

    def mechanisms(self) -> tuple[Mechanism, ...]:
        """What the queries cost, all of them together."""
        return tuple(Mechanism(1.0, z) for z in (self.mean, self.pooled, self.by_class) if z is not None)


def plan_moments(noise_multiplier: float, classes: int) -> MomentsPlan:
    """Split one Gaussian mechanism of noise multiplier z >= 0 among the queries: Σ 1/z_i² = 1/z².

    k Gaussian mechanisms compose to one exactly (the vector of all queries, each over its own sensitivity and noise).
    z = 0 is without noise (ε = ∞); `classes` is 0 or 1 for images without labels.
    """
    z = noise_multiplier
    require(z >= 0 and math.isfinite(z), "the noise multiplier of the moments", z, ">= 0 and finite")
    shares = SHARES if classes > 1 else (1 / 3, 2 / 3)
    mean, pooled, *by_class = (z / math.sqrt(share) for share in shares)
    return MomentsPlan(mean, pooled, by_class[0] if by_class else None)


@dataclass(frozen=True)
class Plan:
    """All that is fixed before any private image is used for training."""

    shape: Shape
    stages: StageMap
    delta: float
    mechanism: DpSgd  # not run where the stages are Gaussian
    moments: MomentsPlan | None = None  # None where the stages use none

    @property
    def steps(self) -> int:
        """Steps of DP-SGD."""
        return 0 if self.stages.gaussian else self.mechanism.config.steps

    @property
    def mechanisms(self) -> tuple[Mechanism, ...]:
        """All that the run does to the private images, as the accountant has it."""
        first = () if self.moments is None else self.moments.mechanisms()
        return first + ((self.mechanism.mechanism(self.steps),) if self.steps else ())


def shape_of(dataset: ImageDataset, config: Config) -> Shape:
    """The public facts about a data set."""
    names = dataset.class_names if config.data.labels else ()
    _, used = dataset.images_a_person(config.privacy.most_per_person)
    return Shape(dataset.resolution, dataset.channels, names, config.data.records or used)


def stages_of(config: Config) -> StageMap:
    """The stage map that a configuration asks for."""
    return stage_map(**config.stages.model_dump(), prior=config.network.prior is not None)


_USES_PROGRAMS = tuple(v for v in VARIANTS if v not in ("dpdm", "gaussian", "instant", "residual"))
_TRAINS = tuple(v for v in VARIANTS if v not in ("gaussian", "instant"))
_LOOKED_AT_BY: dict[str, tuple[str, ...]] = {
    "stages.tau_cleaning": ("cleaning", "both", "residual"),
    "stages.tau_coarse": ("coarse", "both", "instant", "residual"),
    "stages.networks": ("cleaning", "coarse", "both"),
    "stages.pretrain": tuple(v for v in VARIANTS if v not in USE_MOMENTS),
    "public.": _USES_PROGRAMS,
    "program.": _USES_PROGRAMS,
    "moments.share": ("residual",),
    "moments.": USE_MOMENTS,
    "private.": _TRAINS,
    "network.prior": tuple(v for v in USE_MOMENTS if v != "gaussian"),
    "network.sigma_data": tuple(v for v in _TRAINS if v not in USE_MOMENTS),
    "network.": _TRAINS,
    "privacy.clipping_norm": _TRAINS,
    "logging.": _TRAINS,
}
"""Settings, by the beginning of their names, and the variants that look at them; all look at any other."""


def matters(name: str, variant: str, pretrain: bool) -> bool:
    """Whether a run of `variant` looks at the setting `name`, "section.name"; `pretrain`: it begins on programs."""
    if pretrain and name.startswith(("public.", "program.")):
        return True
    return next(
        (variant in variants for beginning, variants in _LOOKED_AT_BY.items() if name.startswith(beginning)), True
    )


def without_effect(given: Mapping[str, Any], config: Config) -> str | None:
    """Tell which of the settings that were `given` the variant of `config` does not look at; None: there are none.

    Nothing is told where they name a preset: then they are all the settings of an earlier run.
    """
    s, sections = config.stages, {} if "preset" in given else given
    names = [f"{section}.{name}" for section, values in sections.items() for name in values]
    idle = [name for name in names if not matters(name, s.variant, bool(s.pretrain))]
    if s.variant == "residual" and config.network.prior is None:  # which nobody has a cleaning stage for
        idle += [name for name in names if name == "stages.tau_cleaning"]
    return f"variant {s.variant} looks at no {', '.join(idle)}: what was given has no effect" if idle else None


def make_plan(config: Config, shape: Shape) -> Plan:
    """Check everything that can be checked and calibrate the noise; ConfigError if settings and data do not fit."""
    config = with_batch(config, shape.records)
    n, batch = shape.records, config.private.batch
    delta = default_delta(n) if config.privacy.delta is None else config.privacy.delta
    less = f"below 1/records = {1 / n:.3g}, or some images could be published outright"
    require(delta < 1 / n, "privacy.delta", delta, f"{less}; left out it is {default_delta(n):.0e}")
    stages = stages_of(config)
    allowed = f"at most {n:,}, as there are only {n:,} records; a quarter of them is plenty"
    require(batch <= n or stages.gaussian, "private.batch", batch, allowed)
    if stages.networks:
        check_resolution(named_size(config.network.size), shape.resolution)
    if shape.num_classes == 1:
        raise ConfigError(
            f"there is only one class ({shape.class_names[0]!r}), which leaves nothing to condition on.  Use "
            "--unconditional, or give images of two classes or more."
        )
    if shape.num_classes and config.sampling.guidance != 1 and not stages.gaussian and not config.network.label_dropout:
        raise ConfigError(
            f"sampling.guidance is {config.sampling.guidance:g}, but network.label_dropout is 0, so the network never "
            "learns to do without a class.  Use --set network.label_dropout=0.1, or guidance 1."
        )
    moments = _plan_moments(config, stages, shape, delta) if stages.moments else None
    if math.isinf(config.privacy.epsilon) or stages.gaussian:
        noise = 0.0
    else:
        try:
            noise = calibrate_noise(
                config.privacy.epsilon,
                delta,
                sampling_rate=batch / n,
                steps=config.private.steps,
                spent=() if moments is None else moments.mechanisms(),
                group_size=config.privacy.group_size,
            )
        except ValueError as error:
            raise ConfigError(
                f"no noise level gives ε = {config.privacy.epsilon} at δ = {delta:.3g} with {config.private.steps} "
                f"steps of batch {batch} on {n:,} records ({error})  Use fewer steps or a larger ε."
            ) from None
    mechanism = DpSgd(n, noise, config.privacy.clipping_norm, config.private)
    return Plan(shape, stages, delta, mechanism, moments)


def _check_moments_fit(config: Config, shape: Shape) -> None:
    """Raise ConfigError where the moments would take more than half of the memory, before any of it is taken."""
    classes, size = max(shape.num_classes, 1), shape.channels * shape.resolution**2
    d, most = min(config.moments.rank, size), min(size, LARGEST_DIMENSION)
    # Sums, their noise and what is made of them: so many copies of each were measured, in eight bytes a number.
    needed = 8 * (5 * classes * size + (6 * classes * d * d if classes > 1 else 0) + 14 * most * most)
    if needed > (limit := memory_bytes()[1] // 2):
        raise ConfigError(
            f"DP moments of {classes:,} classes, {size:,} pixel values and rank {d:,} would take "
            f"{needed / 2**30:,.1f} GiB of memory, over half of what is available, {limit / 2**30:,.1f} GiB.  Use a "
            "smaller --resolution or moments.rank, fewer classes (--unconditional), or a variant without moments."
        )


def _plan_moments(config: Config, stages: StageMap, shape: Shape, delta: float) -> MomentsPlan:
    """Noise of the moments, so that they alone cost their share of ε."""
    _check_moments_fit(config, shape)
    check_records(shape.records)
    if math.isinf(config.privacy.epsilon):
        return plan_moments(0.0, shape.num_classes)
    epsilon = config.privacy.epsilon * (1.0 if stages.gaussian else config.moments.share)
    try:
        noise = calibrate_noise(epsilon, delta, sampling_rate=1.0, steps=1, group_size=config.privacy.group_size)
        # Splitting one mechanism into several composes exactly; what the accountant adds is its own discretisation.
        plan = plan_moments(noise, shape.num_classes)
        while epsilon_of(plan.mechanisms(), delta, group_size=config.privacy.group_size) > epsilon:
            noise *= 1.0005
            plan = plan_moments(noise, shape.num_classes)
        if any(m.noise_multiplier > LARGEST_MULTIPLIER for m in plan.mechanisms()):
            raise ValueError(f"a noise multiplier would exceed {LARGEST_MULTIPLIER:,}.")
    except ValueError as error:
        more = "." if stages.gaussian else ", or a larger moments.share."
        raise ConfigError(
            f"no noise level makes the moments cost ε = {epsilon:g} at δ = {delta:.3g} ({error})  Use a larger ε{more}"
        ) from None
    return plan


def program_of(config: Config, shape: Shape) -> Program:
    """The program that draws public images of this size; ConfigError if it cannot, or its prior tier is another."""
    c = config.program
    program = make_program(c.name, resolution=shape.resolution, channels=shape.channels, seed=c.seed, **c.params)
    if c.prior_tier not in (None, program.prior_tier):
        raise ConfigError(
            f"program.prior_tier={c.prior_tier}, but {c.name} has prior tier {program.prior_tier} "
            f"({TIERS[program.prior_tier]}): correct it, or leave it out."
        )
    return program


def with_all_settings(config: Config, program: Program) -> Config:
    """The configuration with the parameters of the program and τ_coarse as they are, so that new defaults leave a run
    alone."""
    params = {k: v for k, v in program.config().items() if k not in ("name", "resolution", "channels", "seed")}
    section = config.program.model_copy(update={"params": params, "prior_tier": program.prior_tier})
    s = config.stages
    stages = s.model_copy(update={"tau_coarse": coarse_of(s.variant, s.tau_coarse)})
    return config.model_copy(update={"program": section, "stages": stages})


_TRAINERS = {
    "public": "images drawn by programs",
    "private": "private images, DP-SGD",
    "moments": "DP moments",
    "prior": "programs, by their moments",
}


def describe(plan: Plan, config: Config, parameters: int) -> Iterator[str]:
    """What is about to be done, in lines that hold nothing private."""
    shape, m = plan.shape, plan.mechanism
    classes = f"{shape.num_classes} classes" if shape.num_classes else "no classes"
    yield f"{shape.records:,} images {shape.channels}x{shape.resolution}x{shape.resolution}, {classes}"
    stages = ", ".join(f"{s.name} ({_TRAINERS[s.trainer]})" for s in reversed(plan.stages.stages))
    own = " at its own noise levels" if plan.stages.pretrain == "matched" else ""
    pretrained = f"; pre-trained on programs{own}" if plan.stages.pretrain else ""
    network = f"{config.network.size} network, {parameters:,} parameters" if parameters else "no network to train"
    yield f"preset {config.preset}; stages, noisy to clean: {stages}{pretrained}; {network}"
    if math.isinf(config.privacy.epsilon):
        yield "NOT PRIVATE: ε = ∞, no clipping, no noise"
    else:
        unit, _ = protected(config.privacy.group_size, config.privacy.most_per_person is not None)
        costs = []
        if plan.moments is not None:
            noises = ", ".join(f"{q.noise_multiplier:.4g}" for q in plan.moments.mechanisms())
            costs.append(f"moments at noise multipliers {noises}")
        if plan.steps:
            rate, noise = f"sampling rate {m.sampling_rate:.4g}", f"noise multiplier {m.noise_multiplier:.4g}"
            costs.append(f"{plan.steps} steps at {rate}, {noise}")
        yield (
            f"target ε = {config.privacy.epsilon:g} at δ = {plan.delta:.3g} for {unit} (add/remove), "
            f"n = {m.records:,} public: {'; '.join(costs)}"
        )
    if config.privacy.insecure_seed is not None:
        yield "NOT PRIVATE: the noise comes from a reproducible seed"
