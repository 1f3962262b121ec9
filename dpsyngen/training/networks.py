"""Networks of a run: a fresh one, one with weights that an earlier phase released, and what one draws meanwhile."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dpsyngen.config import Config
from dpsyngen.diffusion.denoiser import Denoiser, Ema, NetworkDenoiser
from dpsyngen.diffusion.gaussian import GaussianDenoiser
from dpsyngen.diffusion.loss import NoiseLevels, denoising_loss, make_noisy
from dpsyngen.diffusion.prior import PRIOR_SIZE, SEEN, SHIPPED, Prior, read_prior
from dpsyngen.diffusion.sampling import SamplingSettings
from dpsyngen.diffusion.stages import GAUSSIAN, StagedDenoiser, StageMap
from dpsyngen.diffusion.unet import UNet
from dpsyngen.errors import RunError
from dpsyngen.hardware import Compute
from dpsyngen.privacy.kernels import KernelChoices
from dpsyngen.privacy.per_example import PerExampleGradients, find_physical_batch
from dpsyngen.training.plan import Plan, Shape, stages_of


def make_denoiser(
    config: Config, shape: Shape, conditional: bool, seed: int, gaussian: GaussianDenoiser | None = None
) -> NetworkDenoiser:
    """A fresh network from the public `seed`; on top of `gaussian` from ``config.network.prior``, if that is set."""
    num_classes = shape.num_classes if conditional else 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = make_network(config, shape, conditional, residual=gaussian is not None)
    if gaussian is not None and config.network.prior is not None:
        # What it has of classes starts at zero, so that it answers as the prior does.
        weights = dict(read_prior(config.network.prior, network.channels).weights)
        if network.embed_class is not None:
            weights["embed_class.weight"] = torch.zeros_like(network.embed_class.weight)
        network.load_state_dict(weights)
    return NetworkDenoiser(network, num_classes, config.network.sigma_data, gaussian)


def make_network(config: Config, shape: Shape, conditional: bool = True, *, residual: bool = False) -> UNet:
    """F; on top of a Gaussian it is also shown what that answers and how sure that is."""
    return UNet(
        config.network.size,
        shape.resolution,
        shape.channels,
        shape.num_classes if conditional else 0,
        inputs=SEEN * shape.channels if residual else None,
    )


def with_prior(config: Config) -> Config:
    """The configuration with what a prior implies: the size of the network that it is for; "instant" has one anyway."""
    stages, n = stages_of(config), config.network
    if n.prior is None and any(s.trainer == "prior" for s in stages.stages):
        n = n.model_copy(update={"prior": SHIPPED})
    if n.prior is not None and stages.moments and stages.networks:
        # A run is resumed from any folder.
        prior = n.prior if n.prior == SHIPPED else str(Path(n.prior).resolve())
        n = n.model_copy(update={"size": PRIOR_SIZE, "prior": prior})
    return config.model_copy(update={"network": n})


def prior_of(config: Config, stages: StageMap, channels: int) -> Prior | None:
    """The prior that a run starts from or releases; None if it uses none.  ConfigError if it cannot be read."""
    if config.network.prior is None or not (stages.moments and stages.networks):
        return None
    return read_prior(config.network.prior, channels)


def load_weights(path: Path, denoiser: NetworkDenoiser) -> None:
    try:
        denoiser.load_state_dict(load_file(path))
    except (SafetensorError, OSError, RuntimeError) as error:
        why = str(error).splitlines()[0]
        raise RunError(f"{path} is damaged: {why}.  Remove it and resume: it is trained again.") from None


def fitting_batch(denoiser: NetworkDenoiser, config: Config, shape: Shape, compute: Compute) -> int:
    """Images that fit into memory at a time in a DP-SGD step, found with random numbers instead of images."""
    n, copies = config.network, config.private.copies
    batch = make_noisy(
        torch.zeros(2, shape.channels, shape.resolution, shape.resolution, device=compute.device),
        None,
        NoiseLevels(n.noise_mean, n.noise_std),
        copies=copies,
        num_classes=denoiser.num_classes,
        label_dropout=0.0,
        generator=torch.Generator().manual_seed(0),
    )
    engine = PerExampleGradients(denoiser, 1.0, kernels=KernelChoices(measure=False), workers=1)

    def loss(part: slice) -> Tensor:
        return denoising_loss(denoiser, batch.rows(slice(part.start * copies, part.stop * copies)))

    with compute.autocast():
        return find_physical_batch(engine, loss, copies=copies)


_DRAWN = 16
_STEPS = 20  # at most, so that looking costs less than a step


def preview(
    config: Config, plan: Plan, networks: dict[str, NetworkDenoiser], average: Ema, device: str
) -> NDArray[np.uint8]:
    """Draw images with the network in training at its average, always from the same noise, in 20 steps at most.

    The average is made of the mechanism's outputs, so drawing from it is post-processing and costs no privacy.
    `networks` has one for each name in the stages.  Returns uint8 [16, C, H, W], classes in turn.
    """
    shape = plan.shape
    network = networks[plan.stages.private.network]
    network.load_state_dict(average.average)
    denoisers: dict[str, Denoiser] = dict(networks)
    if network.gaussian is not None:
        denoisers[GAUSSIAN] = network.gaussian
    settings = SamplingSettings(**config.sampling.model_dump() | {"steps": min(config.sampling.steps, _STEPS)})
    (batch,) = settings.draw(
        StagedDenoiser(plan.stages, denoisers),
        (shape.channels, shape.resolution, shape.resolution),
        torch.arange(_DRAWN) % shape.num_classes if shape.num_classes else None,
        _DRAWN,
        device=device,
    )
    return batch.numpy()
