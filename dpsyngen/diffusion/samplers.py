"""Samplers: from noise at σ_max down to an image, through any Denoiser.

All follow the probability-flow ODE dx/dσ = (x - D(x; σ))/σ (EDM eq. 3) on EDM's noise levels (eq. 5).  Their only
randomness is the starting noise and, in the stochastic one, the churn.  A sampler shows each step to ``observe``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

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


def unobserved(step: Step) -> None:
    """Look at nothing."""


def karras_steps(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """Noise levels of `steps` steps and the final 0, [steps + 1] in fp64 (EDM eq. 5)."""
    if steps < 1 or not 0 < sigma_min < sigma_max:
        raise ConfigError(
            f"a sampler needs steps >= 1 and 0 < sigma_min < sigma_max; given steps={steps}, sigma_min={sigma_min}, "
            f"sigma_max={sigma_max}."
        )
    if steps == 1:
        return torch.tensor([sigma_max, 0.0], dtype=torch.float64)
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    top, bottom = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return torch.cat([(top + ramp * (bottom - top)) ** rho, torch.zeros(1, dtype=torch.float64)])


def evenly_in_log(sigmas: Tensor, count: int) -> list[int]:
    """Choose the steps of `sigmas` next to `count` >= 1 levels even in log σ, the first and the last step among them.

    Returns their indices, ascending; fewer where two would be the same step.
    """
    require(count >= 1, "the number of steps to look at", count, "at least 1")
    levels = sigmas[:-1].log()
    wanted = torch.linspace(levels[0].item(), levels[-1].item(), count, dtype=levels.dtype)
    return sorted({int((levels - level).abs().argmin()) for level in wanted})


def _level(sigma: float, x: Tensor) -> Tensor:
    return torch.full((len(x),), sigma, dtype=torch.float64, device=x.device)  # [N]


def ddim(
    denoiser: Denoiser, x: Tensor, sigmas: Tensor, labels: Tensor | None = None, *, observe: Observer = unobserved
) -> Tensor:
    """Deterministic DDIM, which is Euler's method on the ODE (Song et al. 2021; EDM §3).

    Args:
        denoiser, labels: D(x; σ, y), and y [N] or None.
        x: starting noise of standard deviation ``sigmas[0]``, [N, C, H, W]; returned are images in about [-1, 1].
        sigmas: descending noise levels, ending in 0.
        observe: is shown each step.
    """
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas.tolist())):
        denoised = denoiser(x, _level(sigma, x), labels)  # D(x; σ_i, y), [N, C, H, W]
        observe(Step(i, sigma, x, denoised))
        d = (x - denoised) / sigma  # dx/dσ at σ_i
        x = x + (sigma_next - sigma) * d
    return x


def heun(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    labels: Tensor | None = None,
    *,
    churn: float = 0.0,
    draw: Callable[[], Tensor] | None = None,
    observe: Observer = unobserved,
) -> Tensor:
    """EDM's second-order sampler (algorithm 1); with ``churn`` > 0 its stochastic one (algorithm 2)
    at all levels and with S_noise = 1.

    Args:
        denoiser, x, sigmas, labels, observe: as for :func:`ddim`; shown are the first calls of each step.
        churn: S_churn >= 0, how much noise is added and removed again over all steps.
        draw: returns standard normal noise of the shape of `x`; None: from PyTorch's global generator.
    """
    levels = sigmas.tolist()
    steps = len(levels) - 1
    for i, (t, t_next) in enumerate(itertools.pairwise(levels)):
        # Raise the noise level to t̂ = t + γ·t.  γ <= √2 - 1, so that at most as much noise is added as there is.
        gamma = min(churn / steps, math.sqrt(2) - 1)
        t_hat = t * (1 + gamma)
        if gamma > 0:
            epsilon = torch.randn_like(x) if draw is None else draw()
            x = x + math.sqrt(t_hat**2 - t**2) * epsilon
        # Euler step from t̂ to the next level.
        denoised = denoiser(x, _level(t_hat, x), labels)  # D(x̂; t̂, y), [N, C, H, W]
        observe(Step(i, t_hat, x, denoised))
        d = (x - denoised) / t_hat
        euler = x + (t_next - t_hat) * d
        # Second-order correction: the mean of the slopes at both ends.  At σ = 0 there is no slope, so none there.
        if t_next > 0:
            d_next = (euler - denoiser(euler, _level(t_next, euler), labels)) / t_next
            x = x + (t_next - t_hat) * (d + d_next) / 2
        else:
            x = euler
    return x


def dpm_solver_pp(
    denoiser: Denoiser, x: Tensor, sigmas: Tensor, labels: Tensor | None = None, *, observe: Observer = unobserved
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2) with α = 1, λ = -log σ.

    One network call a step; the second order comes from the previous step's estimate.  Arguments as for :func:`ddim`.
    """
    previous: Tensor | None = None
    h_previous = 0.0
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas.tolist())):
        denoised = denoiser(x, _level(sigma, x), labels)  # D(x; σ_i, y), [N, C, H, W]
        observe(Step(i, sigma, x, denoised))
        if sigma_next == 0:
            return denoised  # λ is infinite at σ = 0: x ← D(x; σ)
        h = math.log(sigma / sigma_next)  # h_i = λ_i+1 - λ_i
        # Extrapolate D to the middle of the step, from this level and the one before; the first step is of order one.
        estimate = denoised
        if previous is not None:
            r = h_previous / h
            estimate = (1 + 1 / (2 * r)) * denoised - previous / (2 * r)
        x = (sigma_next / sigma) * x - math.expm1(-h) * estimate
        previous, h_previous = denoised, h
    return x


SAMPLERS: dict[str, Callable[..., Tensor]] = {"ddim": ddim, "heun": heun, "dpmpp": dpm_solver_pp}


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] float -> 0..255 uint8, rounded to nearest; values outside are clamped, NaN becomes 0."""
    return torch.nan_to_num((images + 1) * 127.5, nan=0.0).round().clamp(0, 255).to(torch.uint8)


def to_float(images: Tensor) -> Tensor:
    """0..255 uint8 -> [-1, 1] float."""
    return images.float() / 127.5 - 1
