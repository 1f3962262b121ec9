"""The density of noise levels in training: log σ ~ N(P_mean, P_std²), cut to an interval and renormalised."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_ROUNDING = 2.0**-53  # of fp64 below 1
_SMALLEST = 1e-300  # the probability beyond 37 standard deviations


def _normal_cdf(z: float) -> float:
    return 0.5 * math.erfc(-z / math.sqrt(2))


@dataclass(frozen=True)
class NoiseLevels:
    """log σ ~ N(mean, std²) truncated to [low, high], by default without bounds (EDM table 1: mean -1.2, std 1.2)."""

    mean: float = -1.2
    std: float = 1.2
    low: float = -math.inf
    high: float = math.inf

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"low={self.low} must be below high={self.high} (log σ).")
        if not self.std > 0:
            raise ValueError(f"std={self.std} must be positive.")

    @property
    def mass(self) -> float:
        """The share of the untruncated density that lies in [low, high]."""
        a, b = ((e - self.mean) / self.std for e in (self.low, self.high))
        # From the nearer tail, so that an interval far out on the right keeps its digits.
        return _normal_cdf(-a) - _normal_cdf(-b) if a > 0 else _normal_cdf(b) - _normal_cdf(a)

    def quantile(self, u: Tensor) -> Tensor:
        """σ at probabilities `u` in [0, 1], by the inverse CDF: no rejection, so K levels are always K levels."""
        a, b = ((e - self.mean) / self.std for e in (self.low, self.high))
        # Work in the tail where the interval lies: close to 1 the CDF has no digits left.
        sign, first, last = (-1, -a, -b) if a > 0 else (1, a, b)
        # u or a probability of 0 or 1 would give infinity: stop one rounding short of either.
        u = u.double().clamp(_ROUNDING, 1 - _ROUNDING)
        p = _normal_cdf(first) + u * (_normal_cdf(last) - _normal_cdf(first))
        z = sign * torch.special.ndtri(p.clamp(_SMALLEST, 1 - _ROUNDING))
        return (self.mean + self.std * z.clamp(a, b)).exp().float()

    def sample(self, examples: int, copies: int, generator: torch.Generator) -> Tensor:
        """Noise levels of `copies` copies of each example, [examples, copies].

        Stratified: copy k draws from the k-th of `copies` equal slices of the density, in each example, so that
        the average over copies has less variance; each level alone still has the density above.
        """
        device = generator.device
        u = torch.rand((examples, copies), generator=generator, dtype=torch.float64, device=device)
        slices = torch.arange(copies, device=device, dtype=torch.float64)
        return self.quantile((slices + u) / copies)
