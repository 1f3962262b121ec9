"""Networks of a run: a fresh one, and one with weights that an earlier phase released."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from dpsyngen.config import Config
from dpsyngen.diffusion.denoiser import NetworkDenoiser, PreconditionedDenoiser
from dpsyngen.diffusion.gaussian import GaussianDenoiser, ResidualDenoiser
from dpsyngen.diffusion.unet import UNet
from dpsyngen.errors import RunError
from dpsyngen.training.plan import Shape


def make_denoiser(
    config: Config, shape: Shape, conditional: bool, seed: int, gaussian: GaussianDenoiser | None = None
) -> NetworkDenoiser:
    """A freshly initialised network; its random start depends on the public `seed` only.

    Args:
        config: its size and σ_d.
        shape: of the images.
        conditional: whether it knows classes.
        seed: public.
        gaussian: what the network is a residual of; None: it stands alone.
    """
    num_classes = shape.num_classes if conditional else 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = make_network(config, shape, conditional, residual=gaussian is not None)
    if gaussian is not None:
        return ResidualDenoiser(network, num_classes, gaussian)
    return PreconditionedDenoiser(network, num_classes, config.network.sigma_data)


def make_network(config: Config, shape: Shape, conditional: bool = True, *, residual: bool = False) -> UNet:
    """F; a residual network is also shown what it is a residual of."""
    return UNet(
        config.network.size,
        shape.resolution,
        shape.channels,
        shape.num_classes if conditional else 0,
        inputs=2 * shape.channels if residual else None,
    )


def load_weights(path: Path, denoiser: NetworkDenoiser) -> None:
    try:
        denoiser.load_state_dict(load_file(path))
    except (SafetensorError, OSError, RuntimeError) as error:
        raise RunError(
            f"{path} is damaged: {str(error).splitlines()[0]}.  Remove it and resume: it is trained again, to the same "
            "weights."
        ) from None
