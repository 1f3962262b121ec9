"""Drawing images: settings that are checked before anything is computed, and the one loop that draws with them.

Generator and benchmarks draw through :meth:`SamplingSettings.draw`.  The file that a release carries for
diffusers (``release/hub/denoiser.py``) holds the same steps once more, and a test compares the pixels.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np
import torch
from torch import Tensor

from dpsyngen.diffusion.denoiser import Denoiser, GuidedDenoiser
from dpsyngen.diffusion.gaussian import GaussianDenoiser
from dpsyngen.diffusion.samplers import SAMPLERS, Observer, karras_steps, to_uint8, unobserved
from dpsyngen.diffusion.stages import GAUSSIAN, StagedDenoiser, StageMap
from dpsyngen.errors import ConfigError, require
from dpsyngen.hardware import send

MAX_STEPS = 10_000  # of a sampler, as in the configuration

_FINE = 2.0**-10  # of a standard deviation; the rounding of the sum, about 1e-15, is far below it

Start = Callable[[Tensor, Tensor | None], Tensor]
"""Makes noisy images x at the sampler's first noise level from standard normal noise and labels."""


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

    sampler: str = "ddim"
    steps: int = 50
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    guidance: float = 1.0
    churn: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.sampler in tuple(SAMPLERS), "sampler", self.sampler, SAMPLERS)
        steps_allowed = _is_whole(self.steps) and 1 <= self.steps <= MAX_STEPS
        require(steps_allowed, "the number of sampler steps", self.steps, f"at least 1 and at most {MAX_STEPS:,}")
        require(_is_whole(self.seed), "the seed", self.seed, "a whole number")
        for name in ("steps", "seed"):  # NumPy's numbers cannot be written as JSON
            object.__setattr__(self, name, int(getattr(self, name)))
        for name in ("sigma_min", "sigma_max", "rho", "guidance", "churn"):
            value, may_be_0 = getattr(self, name), name in ("guidance", "churn")
            allowed = "0 or more" if may_be_0 else "a number above 0"
            require(_is_finite(value) and (value > 0 or (may_be_0 and value == 0)), name, value, allowed)
            object.__setattr__(self, name, float(value))
        if self.churn and self.sampler != "heun":
            raise ConfigError(f"churn needs the sampler 'heun'; given {self.sampler!r}.")

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
        """Draw `count` images, batch by batch.

        Image i depends on (seed, i, its label) only, not on the batch size (up to the rounding of sums): each image has
        a random generator of its own, for its starting noise and its churn.

        Args:
            denoiser: the model.  Guidance is applied to it (to the private stage of a staged one), and where the top
                stage of a staged one is a Gaussian, sampling starts at its lower end (:func:`sampling_start`).
            shape: (C, H, W) of an image.
            labels: [count] classes, or None.
            count: how many, >= 1.
            batch_size: images at a time, >= 1.
            device: where to compute.
            observe: is shown each step of each batch; the images do not depend on it.
            take: which of the batches to draw, by number.  Several processes share them out so, and each batch is what
                it would be in one process, to the last bit.

        Yields:
            uint8 [n, C, H, W] on the CPU.

        Raises:
            ConfigError: `count` or `batch_size` is below 1, or the noise levels are not descending.
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
            generators = [_generator(self.seed, i) for i in range(begin, end)]

            def noise(generators: list[np.random.Generator] = generators) -> Tensor:
                return send(np.stack([g.standard_normal(shape, np.float32) for g in generators]), device)

            y = None if labels is None else labels[begin:end].to(device)  # [n]
            # σ_max·n stands for an image at σ_max: that is far above the spread of the images themselves.
            x = noise() * sigmas[0].item() if start is None else start(noise(), y)  # [n, C, H, W]
            options = {"churn": self.churn, "draw": noise} if self.sampler == "heun" else {}
            images = SAMPLERS[self.sampler](denoiser, x, sigmas, y, observe=observe or unobserved, **options)
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

    def start(noise: Tensor, labels: Tensor | None) -> Tensor:
        uniform = None
        if labels is None:
            # The class, too, must follow from the image's noise, and yet be independent of it: the sum over pixels
            # would make one class dark and another bright, but what is left of it after division by a small number is
            # uniform whatever the image looks like.
            total = noise.flatten(1).double().sum(1) / math.sqrt(noise[0].numel())  # [n], standard normal
            uniform = (total / _FINE).remainder(1.0)
        return gaussian.draw(labels, torch.full((len(noise),), first, device=noise.device), noise, uniform)

    return first, start


def _generator(seed: int, index: int) -> np.random.Generator:
    """The generator of image `index`.  Philox is keyed with (seed, index), so no two images share their noise.

    PyTorch's CPU generator would: it uses 32 bits of its seed, and among 60,000 images two seeds then often agree.
    """
    mask = 2**64 - 1
    return np.random.Generator(np.random.Philox(key=np.array([seed & mask, index & mask], dtype=np.uint64)))


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and bool(abs(value) <= sys.float_info.max)  # type: ignore[operator]
