"""EDM's training: the density of noise levels, noisy rows, and the loss of each.

log σ ~ N(P_mean, P_std²), cut to an interval and renormalised; the copies of an example stand next to each other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dpsyngen.diffusion.denoiser import NetworkDenoiser

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


@dataclass(frozen=True)
class NoisyBatch:
    """Rows ready for the denoiser: ``examples * copies`` of them, the copies of an example adjacent.

    Attributes:
        clean: x₀, [rows, C, H, W] in [-1, 1].
        noisy: x = x₀ + σ·n.
        sigma: σ, [rows].
        labels: class of each row, ``num_classes`` where dropped, or None for an unconditional network.
    """

    clean: Tensor
    noisy: Tensor
    sigma: Tensor
    labels: Tensor | None

    def rows(self, part: slice | Tensor) -> NoisyBatch:
        """Some of the rows."""
        labels = None if self.labels is None else self.labels[part]
        return NoisyBatch(self.clean[part], self.noisy[part], self.sigma[part], labels)

    def to(self, device: torch.device) -> NoisyBatch:
        """The rows on a device."""
        labels = None if self.labels is None else self.labels.to(device)
        return NoisyBatch(self.clean.to(device), self.noisy.to(device), self.sigma.to(device), labels)

    @classmethod
    def joined(cls, parts: list[NoisyBatch]) -> NoisyBatch:
        """The rows of all parts, in order; all with labels or all without."""
        if len(parts) == 1:
            return parts[0]
        labels = [p.labels for p in parts if p.labels is not None]
        clean, noisy, sigma = (torch.cat([getattr(p, f) for p in parts]) for f in ("clean", "noisy", "sigma"))
        return cls(clean, noisy, sigma, torch.cat(labels) if labels else None)


def make_noisy(
    images: Tensor,
    labels: Tensor | None,
    levels: NoiseLevels,
    *,
    copies: int,
    num_classes: int,
    label_dropout: float,
    generator: torch.Generator,
) -> NoisyBatch:
    """Repeat images [examples, C, H, W] in [-1, 1] `copies` times, each at its own level, and drop labels at random.

    labels are [examples], or None: no class; one is dropped with probability `label_dropout`.  `num_classes` is 0 for
    an unconditional network, and `generator` the source of σ, n and the dropout.
    """
    examples, device = len(images), images.device
    sigma = levels.sample(examples, copies, generator).reshape(-1).to(device)  # [examples * copies]
    clean = images.repeat_interleave(copies, 0)  # [examples * copies, C, H, W]
    noise = torch.randn(clean.shape, generator=generator, device=generator.device).to(device)  # n ~ N(0, I)
    classes: Tensor | None = None
    if num_classes:
        no_class = torch.full((examples * copies,), num_classes, dtype=torch.long, device=device)
        if labels is None:
            classes = no_class
        else:
            kept = torch.rand(examples * copies, generator=generator, device=generator.device) >= label_dropout
            classes = torch.where(kept.to(device), labels.repeat_interleave(copies, 0), no_class)
    return NoisyBatch(clean, clean + sigma.view(-1, 1, 1, 1) * noise, sigma, classes)  # x = x₀ + σ·n


def denoising_loss(denoiser: NetworkDenoiser, batch: NoisyBatch) -> Tensor:
    """λ(σ)·‖D(x; σ) - x₀‖² of each row, averaged over its pixels, [rows] (EDM eq. 2 and table 1)."""
    denoised = denoiser(batch.noisy, batch.sigma, batch.labels)  # D(x₀ + σ·n; σ)
    squared = (denoised - batch.clean).square().flatten(1).mean(1)  # ‖D - x₀‖²/(C·H·W), [rows]
    return denoiser.weight(batch.sigma, batch.labels) * squared
