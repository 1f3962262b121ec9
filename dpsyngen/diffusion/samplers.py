"""Samplers: from noise at σ_max down to an image, through any Denoiser.

All follow the probability-flow ODE dx/dσ = (x - D(x; σ))/σ (EDM eq. 3) on EDM's steps (eq. 5); their randomness
is the starting noise, and the churn of the stochastic one.  Each shows its steps to an ``observe``, if it is given one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpsyngen.diffusion.denoiser import Denoiser
from dpsyngen.errors import ConfigError
from dpsyngen.hardware import send


@dataclass(frozen=True)
class Step:
    """What a sampler had and expected at one of its steps.

    Attributes:
        index: of the step, from 0 at σ_max.
        sigma: σ, the noise level at which the denoiser was asked (with churn, the raised one).
        x: the noisy images, [N, C, H, W].
        denoised: D(x; σ), the images that they were expected to become, [N, C, H, W].
    """

    index: int
    sigma: float
    x: Tensor
    denoised: Tensor


Start = Callable[[Tensor, Tensor | None], Tensor]
"""Makes noisy images x at the sampler's first noise level from standard normal noise and labels."""

Observer = Callable[[Step], None]
"""Is shown each step.  The tensors are the sampler's own: an observer copies what it keeps, and changes nothing."""


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
    """Which steps to look at: those next to `count` levels that are even in log σ, the first and the last among them.

    Args:
        sigmas: of :func:`karras_steps`.
        count: how many, >= 1; fewer are given where two would be the same step.

    Returns:
        indices of steps, ascending.
    """
    if count < 1:
        raise ConfigError(f"the number of steps to look at is {count}, but must be at least 1.")
    levels = sigmas[:-1].log()
    wanted = torch.linspace(levels[0].item(), levels[-1].item(), count, dtype=levels.dtype)
    return sorted({int((levels - level).abs().argmin()) for level in wanted})


def _level(value: float, x: Tensor) -> Tensor:
    return torch.full((len(x),), value, dtype=torch.float64, device=x.device)


def ddim(
    denoiser: Denoiser, x: Tensor, sigmas: Tensor, labels: Tensor | None = None, *, observe: Observer | None = None
) -> Tensor:
    """Deterministic DDIM, which is Euler's method on the ODE (Song et al. 2021; EDM §3).

    Args:
        denoiser: the model.
        x: starting noise of standard deviation ``sigmas[0]``, [N, C, H, W].
        sigmas: descending noise levels, ending in 0.
        labels: [N], or None.
        observe: is shown each step.
    """
    levels = sigmas.tolist()
    for index, (now, after) in enumerate(itertools.pairwise(levels)):
        denoised = denoiser(x, _level(now, x), labels)
        if observe is not None:
            observe(Step(index, now, x, denoised))
        slope = (x - denoised) / now
        x = x + (after - now) * slope
    return x


def heun(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    labels: Tensor | None = None,
    *,
    churn: float = 0.0,
    churn_min: float = 0.0,
    churn_max: float = math.inf,
    churn_noise: float = 1.0,
    draw: Callable[[], Tensor] | None = None,
    observe: Observer | None = None,
) -> Tensor:
    """EDM's second-order sampler; with ``churn`` > 0 its stochastic one (EDM algorithms 1 and 2).

    Args:
        denoiser, x, sigmas, labels, observe: as for :func:`ddim`; shown are the first calls of each step.
        churn: S_churn >= 0, how much noise is added and removed again over all steps.
        churn_min: S_tmin, lowest σ with churn.
        churn_max: S_tmax, highest σ with churn.
        churn_noise: S_noise, standard deviation of the added noise.
        draw: returns standard normal noise of the shape of `x`; None: from PyTorch's global generator.
    """
    levels = sigmas.tolist()
    count = len(levels) - 1
    for index, (now, after) in enumerate(itertools.pairwise(levels)):
        gamma = min(churn / count, math.sqrt(2) - 1) if churn_min <= now <= churn_max else 0.0
        raised = now * (1 + gamma)
        if gamma > 0:
            noise = torch.randn_like(x) if draw is None else draw()
            x = x + math.sqrt(raised**2 - now**2) * churn_noise * noise
        denoised = denoiser(x, _level(raised, x), labels)
        if observe is not None:
            observe(Step(index, raised, x, denoised))
        slope = (x - denoised) / raised
        euler = x + (after - raised) * slope
        if after > 0:
            slope_after = (euler - denoiser(euler, _level(after, euler), labels)) / after
            x = x + (after - raised) * (slope + slope_after) / 2
        else:
            x = euler
    return x


def dpm_solver_pp(
    denoiser: Denoiser, x: Tensor, sigmas: Tensor, labels: Tensor | None = None, *, observe: Observer | None = None
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2) with α = 1, λ = -log σ.

    One network call a step, second order through the previous step's estimate.  Arguments as for :func:`ddim`.
    """
    levels = sigmas.tolist()
    previous: Tensor | None = None
    h_previous = 0.0
    for index, (now, after) in enumerate(itertools.pairwise(levels)):
        denoised = denoiser(x, _level(now, x), labels)
        if observe is not None:
            observe(Step(index, now, x, denoised))
        if after == 0:
            # λ is infinite at σ = 0: the step goes to the estimate itself.
            return denoised
        h = math.log(now / after)
        estimate = denoised
        if previous is not None:
            r = h_previous / h
            estimate = (1 + 1 / (2 * r)) * denoised - previous / (2 * r)
        x = (after / now) * x - math.expm1(-h) * estimate
        previous, h_previous = denoised, h
    return x


SAMPLERS: dict[str, Callable[..., Tensor]] = {"ddim": ddim, "heun": heun, "dpmpp": dpm_solver_pp}


@torch.no_grad()
def sample_batches(
    denoiser: Denoiser,
    labels: Tensor | None,
    count: int,
    shape: tuple[int, int, int],
    *,
    sampler: str = "ddim",
    steps: int = 50,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    seed: int = 0,
    batch_size: int = 256,
    device: str | torch.device = "cpu",
    observe: Observer | None = None,
    start_from: Start | None = None,
    take: slice = slice(None),
    **options: Any,
) -> Iterator[Tensor]:
    """Draw `count` images in batches.

    Image i depends on (seed, i) only, not on the batch size (up to the rounding of sums): each image has a
    generator of its own, for its starting noise and its churn.

    Args:
        denoiser: the model.
        labels: [count] classes, or None.
        count: how many, >= 1.
        shape: (C, H, W).
        sampler: a name in ``SAMPLERS``.
        steps, sigma_min, sigma_max, rho: see :func:`karras_steps`.
        seed: public seed; sampling is post-processing, so it need not be secret.
        batch_size: images at a time, >= 1.
        device: where to compute.
        observe: is shown each step of each batch; the images do not depend on it.
        start_from: makes x at σ_max from noise; None: σ_max times the noise, which stands for an image at σ_max if that
            is far above the data's own spread.
        take: which of the batches to draw, by number; several processes share them out so, and each batch is what it
            would be in one process, to the last bit.
        options: options of the sampler, such as ``churn``.

    Yields:
        uint8 [n, C, H, W] on the CPU.
    """
    if sampler not in SAMPLERS:
        raise ConfigError(f"sampler is {sampler!r}, but must be one of {', '.join(SAMPLERS)}.")
    if count < 1 or batch_size < 1:
        raise ConfigError(f"count={count} and batch_size={batch_size} must be at least 1.")
    if options and sampler != "heun":
        raise ConfigError(f"{', '.join(options)}: only the 'heun' sampler has churn; given sampler {sampler!r}.")
    sigmas = karras_steps(steps, sigma_min, sigma_max, rho)
    for start in range(0, count, batch_size)[take]:
        stop = min(start + batch_size, count)
        generators = [_generator(seed, i) for i in range(start, stop)]

        def draw(generators: list[np.random.Generator] = generators) -> Tensor:
            return send(np.stack([g.standard_normal(shape, np.float32) for g in generators]), device)

        y = None if labels is None else labels[start:stop].to(device)
        extra = options | {"draw": draw} if sampler == "heun" else options
        noise = draw()
        x = noise * sigmas[0].item() if start_from is None else start_from(noise, y)
        images = SAMPLERS[sampler](denoiser, x, sigmas, y, observe=observe, **extra)
        yield to_uint8(images).cpu()


def _generator(seed: int, index: int) -> np.random.Generator:
    """The generator of image `index`.  Philox is keyed with (seed, index), so no two images share their noise.

    PyTorch's CPU generator would: it uses 32 bits of its seed, and among 60,000 images two seeds then often agree.
    """
    mask = 2**64 - 1
    return np.random.Generator(np.random.Philox(key=np.array([seed & mask, index & mask], dtype=np.uint64)))


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] float -> 0..255 uint8, rounded to nearest; values outside are clamped, NaN becomes 0."""
    return torch.nan_to_num((images + 1) * 127.5, nan=0.0).round().clamp(0, 255).to(torch.uint8)


def to_float(images: Tensor) -> Tensor:
    """0..255 uint8 -> [-1, 1] float."""
    return images.float() / 127.5 - 1
