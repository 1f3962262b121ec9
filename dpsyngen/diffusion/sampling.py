"""How images are drawn from a generator: settings that are checked before anything is computed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpsyngen.diffusion.samplers import SAMPLERS
from dpsyngen.errors import ConfigError, shown

MAX_STEPS = 10_000  # of a sampler, as in the configuration


def _is_finite(value: Any) -> bool:
    """Whether a number is one that floating point has; whole numbers can be larger."""
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def _is_number(value: object, kind: type = float) -> bool:
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return whole or (kind is float and isinstance(value, float | np.floating))


@dataclass(frozen=True)
class SamplingSettings:
    """How images are drawn; enough, with the labels, to draw the same ones again.

    Attributes:
        sampler: "ddim", "heun" or "dpmpp".
        steps: sampler steps, 1 to 10,000.
        sigma_min, sigma_max, rho: EDM's noise levels.
        guidance: weight of classifier-free guidance, >= 0; 1 is none.
        churn: S_churn of the stochastic "heun", >= 0.
        seed: public; image i depends on (seed, i, its label).

    Raises:
        ConfigError: a value that is not allowed.
    """

    sampler: str
    steps: int
    sigma_min: float
    sigma_max: float
    rho: float
    guidance: float
    churn: float
    seed: int

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ConfigError(f"sampler is {shown(self.sampler)}, but must be one of {', '.join(SAMPLERS)}.")
        if not _is_number(self.steps, int) or not 1 <= self.steps <= MAX_STEPS:
            raise ConfigError(
                f"the number of sampler steps is {shown(self.steps)}, but must be at least 1 and at most {MAX_STEPS:,}."
            )
        if not _is_number(self.seed, int):
            raise ConfigError(f"the seed is {shown(self.seed)}, but must be a whole number.")
        for name in ("sigma_min", "sigma_max", "rho"):
            value = getattr(self, name)
            if not _is_number(value) or not _is_finite(value) or value <= 0:
                raise ConfigError(f"{name} is {shown(value)}, but must be a number above 0.")
        if not _is_number(self.guidance) or not _is_finite(self.guidance) or self.guidance < 0:
            raise ConfigError(f"guidance is {shown(self.guidance)}, but must be 0 or more (1 is none).")
        if not _is_number(self.churn) or not _is_finite(self.churn) or self.churn < 0:
            raise ConfigError(f"churn is {shown(self.churn)}, but must be 0 or more.")
        if self.churn and self.sampler != "heun":
            raise ConfigError(f"churn needs the sampler 'heun'; given {self.sampler!r}.")
        for field in ("steps", "seed"):
            object.__setattr__(self, field, int(getattr(self, field)))
        for field in ("sigma_min", "sigma_max", "rho", "guidance", "churn"):
            object.__setattr__(self, field, float(getattr(self, field)))  # numpy's numbers cannot be written as JSON
