"""Where a sampler starts: at pure noise, or at the lower end of a stage that is known in closed form."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dpsyngen.diffusion.gaussian import GaussianDenoiser
from dpsyngen.diffusion.samplers import Start
from dpsyngen.diffusion.stages import StageMap

_FINE = 2.0**-10  # of a standard deviation; the rounding of the sum, about 1e-15, is far below it


def sampling_start(
    stages: StageMap, gaussian: GaussianDenoiser | None, sigma_min: float, sigma_max: float
) -> tuple[float, Start | None]:
    """The first noise level, and what makes noisy images there.

    Where the top stage is a Gaussian, all that a sampler would do above its lower end τ can be written down: x at
    σ = e^τ has the law N(μ, Σ + σ²I).  It is drawn, and every step goes to the levels that need one.

    Args:
        stages: who owns what.
        gaussian: the denoiser of the DP moments; None if there are none.
        sigma_min, sigma_max: the sampler's noise levels.

    Returns:
        the first noise level, above `sigma_min`, and None where it is pure noise.
    """
    top = stages.stages[-1]
    if gaussian is None or top.trainer != "moments":
        return sigma_max, None
    # A hair below: at τ itself rounding would decide whose level it is, and it is the network's.
    lower_end = math.exp(top.low) * (1 - 1e-9) if top.low > -math.inf else 0.0
    start = max(min(sigma_max, lower_end), sigma_min * 1.001)

    def draw(noise: Tensor, labels: Tensor | None) -> Tensor:
        uniform = None
        if labels is None:
            # The class, too, must follow from the image's noise, and yet be independent of it: the sum over pixels
            # would make one class dark and another bright, but what is left of it after division by a small number is
            # uniform whatever the image looks like.
            total = noise.flatten(1).double().sum(1) / math.sqrt(noise[0].numel())
            uniform = (total / _FINE).remainder(1.0)
        return gaussian.draw(labels, torch.full((len(noise),), start, device=noise.device), noise, uniform)

    return start, draw
