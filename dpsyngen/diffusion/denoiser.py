"""The Denoiser contract, a network as one, and the moving average of its weights."""

from __future__ import annotations

import math
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from dpsyngen.diffusion import standalone
from dpsyngen.diffusion.gaussian import GaussianDenoiser

UNIFORM_PRIOR_SIGMA = math.sqrt(1 / 3)
"""σ_d of DPDM: the standard deviation of a uniform distribution on [-1, 1].  Not measured on any data."""


class Denoiser(Protocol):
    """All that the samplers see: an estimate of E[x₀ | x₀ + σ·n = x, label]."""

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """Estimate the clean image, [N, C, H, W].

        Args:
            x: noisy images, [N, C, H, W], x₀ in [-1, 1] plus noise of standard deviation σ.
            sigma: noise levels, [N], > 0.
            labels: [N] classes in 0..num_classes-1, or None where there is no condition.
        """
        ...


class NetworkDenoiser(standalone.NetworkDenoiser):
    """A Denoiser with a network F to train, and the weight of its loss; unconditional where `num_classes` is 0.

    D = c_skip·x + c_out·F(c_in·x, c_noise), EDM eq. 7 with the coefficients of its table 1 and σ_d = √(1/3), unless a
    measurement was paid for: input and target of F have unit variance, and c_skip keeps F's error from being amplified.
    On a `gaussian` G it is the D of :mod:`dpsyngen.diffusion.prior`; F ends near 0, so training starts from G.

    F(input [N, C or 4C, H, W], c_noise [N], classes [N] or None) gives [N, C, H, W], and alone is trained and saved.  A
    label equal to `num_classes`, or None for all, means "no class".
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        sigma_data: float = UNIFORM_PRIOR_SIGMA,
        gaussian: GaussianDenoiser | None = None,
    ) -> None:
        super().__init__(network, num_classes, sigma_data, gaussian)

    @property
    def gaussian(self) -> GaussianDenoiser | None:
        """G, the constants that D is made on; None for EDM's D."""
        return cast(GaussianDenoiser | None, self._gaussian[0])

    def weight(self, sigma: Tensor, labels: Tensor | None) -> Tensor:
        """λ(σ) > 0, [N]: what ‖D - x₀‖² is weighted with in training, :func:`loss_weight`; on a Gaussian 1 / mean s².

        So the loss of each σ is 1 at the start; on a Gaussian if the data are as their moments say.
        """
        if self.gaussian is None:
            return loss_weight(sigma, self.sigma_data)
        with torch.no_grad():
            return self.gaussian.left(sigma, labels).square().flatten(1).mean(1).reciprocal()

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        """Move G along with the network (``.to(device)``)."""
        if self.gaussian is not None:
            self.gaussian._apply(fn, recurse)
        return super()._apply(fn, recurse)


def loss_weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """λ(σ) = (σ² + σ_d²) / (σ·σ_d)², EDM table 1: makes the loss of each σ start at 1."""
    return (sigma.square() + sigma_data**2) / (sigma * sigma_data).square()


class GuidedDenoiser:
    """Classifier-free guidance (Ho & Salimans 2022): D = D(∅) + w·(D(y) - D(∅)); w = 1 is none."""

    def __init__(self, denoiser: Denoiser, weight: float) -> None:
        self.denoiser, self.weight = denoiser, weight

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        conditional = self.denoiser(x, sigma, labels)
        if labels is None or self.weight == 1:
            return conditional
        unconditional = self.denoiser(x, sigma, None)
        return unconditional + self.weight * (conditional - unconditional)


class Ema:
    """Moving average of weights, which costs no privacy: at step t θ̄ ← m·θ̄ + (1 - m)·θ, m = min(decay, (1+t)/(10+t)).

    The warm-up of m keeps the random start from lingering in short runs, which is what private training has.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self.average: dict[str, Tensor] = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take one step towards the weights of `module`."""
        self.steps += 1
        momentum = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                self.average[name].lerp_(value, 1 - momentum)
            else:
                self.average[name].copy_(value)
