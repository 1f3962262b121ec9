"""Drawing images: settings that are checked before anything is computed, and the one loop that draws with them.

Generator and benchmarks draw through :meth:`SamplingSettings.draw`.  What a release carries for diffusers
(``diffusion/standalone.py``) has a loop of its own, and a test compares the pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from pydantic import ConfigDict, Field, ValidationError
from torch import Tensor

from dpsyngen.config import SamplingConfig, explain
from dpsyngen.diffusion import standalone
from dpsyngen.diffusion.denoiser import Denoiser, GuidedDenoiser
from dpsyngen.diffusion.gaussian import GaussianDenoiser
from dpsyngen.diffusion.samplers import Observer, karras_steps, solved, to_uint8
from dpsyngen.diffusion.stages import GAUSSIAN, StagedDenoiser, StageMap
from dpsyngen.errors import ConfigError, require

Start = Callable[[Tensor, Tensor | None], Tensor]
"""Makes noisy images x at the sampler's first noise level from standard normal noise and labels."""


class SamplingSettings(SamplingConfig):
    """How images are drawn; enough, with the labels, to draw the same ones again.  ConfigError if not allowed."""

    model_config = ConfigDict(strict=True)

    seed: int = Field(0, description="public; image i depends on (seed, i, its label)")

    def __init__(self, **values: Any) -> None:
        # NumPy's numbers are no Python numbers.
        plain = {name: v.item() if isinstance(v, np.generic) else v for name, v in values.items()}
        try:
            super().__init__(**plain)
        except ValidationError as error:
            raise ConfigError(explain(error, type(self))) from None

    def levels(self, denoiser: Denoiser) -> tuple[Tensor, Start | None]:
        """Noise levels at which a draw asks `denoiser`, and the final 0: [steps + 1]; and what draws x at the first."""
        steps, first, start = self.steps, self.sigma_max, None
        if isinstance(denoiser, StagedDenoiser):
            gaussian = denoiser.denoisers.get(GAUSSIAN)
            known = gaussian if isinstance(gaussian, GaussianDenoiser) else None
            first, start = sampling_start(denoiser.stages, known, self.sigma_min, self.sigma_max)
            # Where all is Gaussian, x is drawn at σ_min, and a single step takes that noise off.
            steps = steps if denoiser.stages.networks else 1
        return karras_steps(steps, self.sigma_min, first, self.rho), start

    @torch.no_grad()
    def draw(
        self,
        denoiser: Denoiser,
        shape: tuple[int, int, int],
        labels: Tensor | None,
        count: int,
        *,
        batch_size: int = 256,
        device: str | torch.device = "cpu",
        observe: Observer | None = None,
        take: slice = slice(None),
    ) -> Iterator[Tensor]:
        """Draw `count` images (C, H, W) of `labels` [count] or None, batch by batch: uint8 [n, C, H, W], on the CPU.

        Image i depends on (seed, i, its label) only, not on the batch size (up to the rounding of sums): each image has
        a random generator of its own, for its starting noise and its churn.

        Args:
            denoiser: the model.  Guidance is applied to it (to the private stage of a staged one), and where the top
                stage of a staged one is a Gaussian, sampling starts at its lower end (:func:`sampling_start`).
            device: where to compute.
            observe: is shown each step of each batch; the images do not depend on it.
            take: which of the batches to draw, by number.  Several processes share them out so, and each batch is what
                it would be in one process, to the last bit.
        """
        require(count >= 1, "the number of images", count, "at least 1")
        require(batch_size >= 1, "batch_size", batch_size, "at least 1")
        sigmas, start = self.levels(denoiser)
        if self.guidance != 1 and isinstance(denoiser, StagedDenoiser):
            denoiser = denoiser.guided(self.guidance)
        elif self.guidance != 1:
            denoiser = GuidedDenoiser(denoiser, self.guidance)
        for begin in range(0, count, batch_size)[take]:
            end = min(begin + batch_size, count)
            # Not PyTorch's generator: it uses 32 bits of a seed, and among 60,000 images two seeds then often agree.
            noise = standalone.noise_of([(self.seed, i) for i in range(begin, end)], shape, device)
            y = None if labels is None else labels[begin:end].to(device)  # [n]
            # σ_max·n stands for an image at σ_max: that is far above the spread of the images themselves.
            x = noise() * sigmas[0].item() if start is None else start(noise(), y)  # [n, C, H, W]
            images = solved(self.sampler, denoiser, x, sigmas, y, churn=self.churn, draw=noise, observe=observe)
            yield to_uint8(images).cpu()


def sampling_start(
    stages: StageMap, gaussian: GaussianDenoiser | None, sigma_min: float, sigma_max: float
) -> tuple[float, Start | None]:
    """The first noise level, and what draws noisy images there.

    Where the top stage is a Gaussian, all that a sampler would do above its lower end τ can be written down: x at
    σ = e^τ has the law N(μ, Σ + σ²I).  It is drawn, and every step goes to the levels that need one.  Elsewhere the
    first level is `sigma_max`, where x is pure noise, and nothing draws there (None).
    """
    top = stages.stages[-1]
    if gaussian is None or top.trainer != "moments":
        return sigma_max, None
    # A hair below τ: at τ itself rounding would decide whose level it is, and it is the network's.
    lower_end = math.exp(top.low) * (1 - 1e-9) if top.low > -math.inf else 0.0
    first = max(min(sigma_max, lower_end), sigma_min * 1.001)

    return first, lambda noise, labels: gaussian.draw(labels, first, noise)
