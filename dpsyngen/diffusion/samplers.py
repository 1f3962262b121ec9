"""Samplers: from noise at σ_max down to an image, through any Denoiser.

All follow the probability-flow ODE dx/dσ = (x - D(x; σ))/σ (EDM eq. 3) on EDM's noise levels (eq. 5), by
:func:`dpsyngen.diffusion.standalone.solve`, which releases carry.  Their only randomness is the starting noise and, in
the stochastic one, the churn.  A sampler shows each step to ``observe``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dpsyngen.diffusion import standalone
from dpsyngen.diffusion.denoiser import Denoiser
from dpsyngen.errors import ConfigError, require


@dataclass(frozen=True)
class Step:
    """One step of a sampler: what it had, and what it expected.

    Attributes:
        index: of the step, from 0 at σ_max.
        sigma: σ, the noise level at which the denoiser was asked (with churn, the raised one).
        x, denoised: the noisy images, and D(x; σ), what they were expected to become, [N, C, H, W].
    """

    index: int
    sigma: float
    x: Tensor
    denoised: Tensor


Observer = Callable[[Step], object]
"""Is shown each step.  The tensors are the sampler's own: an observer copies what it keeps, and changes nothing."""


def karras_steps(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """Noise levels of `steps` steps and the final 0, [steps + 1] in fp64 (EDM eq. 5)."""
    if steps < 1 or not 0 < sigma_min < sigma_max:
        given = f"{steps=}, {sigma_min=}, {sigma_max=}"
        raise ConfigError(f"a sampler needs steps >= 1 and 0 < sigma_min < sigma_max; given {given}.")
    return torch.tensor(standalone.karras_steps(steps, sigma_min, sigma_max, rho), dtype=torch.float64)


def evenly_in_log(sigmas: Tensor, count: int) -> list[int]:
    """Choose the steps of `sigmas` next to `count` >= 1 levels even in log σ, the first and the last step among them.

    Returns their indices, ascending; fewer where two would be the same step.
    """
    require(count >= 1, "the number of steps to look at", count, "at least 1")
    levels = sigmas[:-1].log()
    wanted = torch.linspace(levels[0].item(), levels[-1].item(), count, dtype=levels.dtype)
    return sorted({int((levels - level).abs().argmin()) for level in wanted})


def solved(
    sampler: str,
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    labels: Tensor | None = None,
    *,
    churn: float = 0.0,
    draw: Callable[[], Tensor] | None = None,
    observe: Observer | None = None,
) -> Tensor:
    """Follow the ODE from noise to images in about [-1, 1], [N, C, H, W].

    Args:
        sampler: a name in ``standalone.SAMPLERS``.  "ddim", of order 1: deterministic DDIM, which is Euler's method on
            the ODE (Song et al. 2021; EDM §3).  "heun", of order 2: EDM's sampler (algorithm 1), two network calls a
            step but for the last; with `churn` > 0 its stochastic one (algorithm 2) at all levels and with S_noise = 1.
            "dpmpp", of order 2: DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2) with α = 1,
            λ = -log σ, one network call a step; the second order comes from the previous step's estimate.
        denoiser, labels: D(x; σ, y), and y [N] or None.
        x: starting noise of standard deviation ``sigmas[0]``, [N, C, H, W].
        sigmas: descending noise levels, ending in 0.
        churn: S_churn >= 0 of heun, how much noise is added and removed again over all steps; 0 elsewhere.
        draw: returns standard normal noise of the shape of `x`; None: from PyTorch's global generator.
        observe: is shown each step, of heun the first call of each; None: nobody looks.
    """

    def denoise(x: Tensor, sigma: float) -> Tensor:
        return denoiser(x, torch.full((len(x),), sigma, dtype=torch.float64, device=x.device), labels)

    def see(*step: Any) -> None:
        if observe is not None:
            observe(Step(*step))

    return standalone.solve(sampler, denoise, x, sigmas.tolist(), churn, draw or partial(torch.randn_like, x), see)


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] float -> 0..255 uint8, rounded to nearest; values outside are clamped, NaN becomes 0."""
    return torch.nan_to_num((images + 1) * 127.5, nan=0.0).round().clamp(0, 255).to(torch.uint8)


def to_float(images: Tensor) -> Tensor:
    """0..255 uint8 -> [-1, 1] float."""
    return images.float() / 127.5 - 1
