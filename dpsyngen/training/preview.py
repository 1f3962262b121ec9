"""A few images from the average of the weights while the private phase goes on, always from the same noise.

The average is made of the mechanism's outputs, so what is drawn from it is post-processing and costs no privacy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dpsyngen.config import Config
from dpsyngen.diffusion.denoiser import Denoiser, GuidedDenoiser, NetworkDenoiser
from dpsyngen.diffusion.ema import Ema
from dpsyngen.diffusion.residual import ResidualDenoiser
from dpsyngen.diffusion.samplers import sample_batches
from dpsyngen.diffusion.stages import GAUSSIAN, StagedDenoiser
from dpsyngen.diffusion.start import sampling_start
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
    s, shape = config.sampling, plan.shape
    network = networks[plan.stages.private.network]
    network.load_state_dict(average.average)
    private: Denoiser = network
    guided = GuidedDenoiser(private, s.guidance) if shape.num_classes and s.guidance != 1 else None
    options: dict[str, Any] = {"churn": s.churn} if s.churn else {}
    denoisers: dict[str, Denoiser] = dict(networks)
    gaussian = network.gaussian if isinstance(network, ResidualDenoiser) else None
    if gaussian is not None:
        denoisers[GAUSSIAN] = gaussian
    sigma_max, start = sampling_start(plan.stages, gaussian, s.sigma_min, s.sigma_max)
    (batch,) = sample_batches(
        StagedDenoiser(plan.stages, denoisers, private=guided),
        torch.arange(COUNT) % shape.num_classes if shape.num_classes else None,
        COUNT,
        (shape.channels, shape.resolution, shape.resolution),
        sampler=s.sampler,
        steps=min(s.steps, _STEPS),
        sigma_min=s.sigma_min,
        sigma_max=sigma_max,
        rho=s.rho,
        seed=0,
        batch_size=COUNT,
        device=device,
        start_from=start,
        **options,
    )
    return batch.numpy()
