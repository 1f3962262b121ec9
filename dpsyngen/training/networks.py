"""Networks of a run: a fresh one, and one with weights that an earlier phase released."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from dpsyngen.config import Config
from dpsyngen.diffusion.denoiser import PreconditionedDenoiser
from dpsyngen.diffusion.unet import UNet
from dpsyngen.errors import RunError
from dpsyngen.training.plan import Shape


def make_denoiser(config: Config, shape: Shape, conditional: bool, seed: int) -> PreconditionedDenoiser:
    """A freshly initialised network; its random start depends on the public `seed` only."""
    num_classes = shape.num_classes if conditional else 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = UNet(config.network.size, shape.resolution, shape.channels, num_classes)
    return PreconditionedDenoiser(network, num_classes, config.network.sigma_data)


def load_weights(path: Path, denoiser: PreconditionedDenoiser) -> None:
    try:
        denoiser.load_state_dict(load_file(path))
    except (SafetensorError, OSError, RuntimeError) as error:
        raise RunError(
            f"{path} is damaged: {str(error).splitlines()[0]}.  Remove it and resume: it is trained again, to the same "
            "weights."
        ) from None
