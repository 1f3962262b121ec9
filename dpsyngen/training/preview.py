"""A few images from the average of the weights while the private phase goes on, always from the same noise.

The average is made of the mechanism's outputs, so what is drawn from it is post-processing and costs no privacy.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from dpsyngen.config import Config
from dpsyngen.diffusion.denoiser import Denoiser, NetworkDenoiser
from dpsyngen.diffusion.ema import Ema
from dpsyngen.diffusion.gaussian import ResidualDenoiser
from dpsyngen.diffusion.sampling import SamplingSettings
from dpsyngen.diffusion.stages import GAUSSIAN, StagedDenoiser
from dpsyngen.training.plan import Plan

COUNT = 16
_STEPS = 20  # at most, so that looking costs less than a step


def preview(
    config: Config, plan: Plan, networks: dict[str, NetworkDenoiser], average: Ema, device: str
) -> NDArray[np.uint8]:
    """Draw images with the network in training at its average.

    Args:
        config: the run's settings of the sampler, but of at most 20 steps.
        plan: the run's stages and shape.
        networks: one for each name in the stages; the private one is loaded with the average.
        average: of the private network.
        device: where to compute.

    Returns:
        uint8 [16, C, H, W], classes in turn.
    """
    shape = plan.shape
    network = networks[plan.stages.private.network]
    network.load_state_dict(average.average)
    denoisers: dict[str, Denoiser] = dict(networks)
    if isinstance(network, ResidualDenoiser):
        denoisers[GAUSSIAN] = network.gaussian
    given = config.sampling.model_dump()
    settings = SamplingSettings(**given | {"steps": min(config.sampling.steps, _STEPS)})
    (batch,) = settings.draw(
        StagedDenoiser(plan.stages, denoisers),
        (shape.channels, shape.resolution, shape.resolution),
        torch.arange(COUNT) % shape.num_classes if shape.num_classes else None,
        COUNT,
        device=device,
    )
    return batch.numpy()
