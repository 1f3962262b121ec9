"""The denoisers of a released generator, from its weights."""

from __future__ import annotations

from pathlib import Path

import torch

from dpsyngen.diffusion.denoiser import NetworkDenoiser, PreconditionedDenoiser
from dpsyngen.diffusion.gaussian import ClassGaussians, GaussianDenoiser, ResidualDenoiser
from dpsyngen.diffusion.stages import GAUSSIAN
from dpsyngen.diffusion.unet import UNet
from dpsyngen.errors import ConfigError, RunError, printable
from dpsyngen.generator.files import GeneratorDescription, load_weights, moments_shapes


def load_gaussian(release: Path, about: GeneratorDescription, device: str) -> GaussianDenoiser | None:
    """The denoiser of the DP moments; None if there are none.

    Raises:
        RunError: the weights are missing or damaged.
    """
    if about.moments is None:
        return None
    path = release / "weights" / f"{GAUSSIAN}.safetensors"
    tensors = load_weights(path, moments_shapes(about))
    try:
        moments = ClassGaussians.from_tensors(tensors)
    except ConfigError as error:
        raise RunError(f"the weights {printable(path)} are damaged: {error}") from None
    return GaussianDenoiser(moments, (about.channels, about.resolution, about.resolution)).to(device)


def load_network(
    release: Path, about: GeneratorDescription, name: str, gaussian: GaussianDenoiser | None, device: str
) -> NetworkDenoiser:
    """The denoiser of the network `name`.

    Args:
        release: the folder.
        about: its description.
        name: one of its networks.
        gaussian: the denoiser that it is a residual of; None: it stands alone.
        device: where to compute.

    Raises:
        RunError: the weights are missing, damaged, or not those of this network.
    """
    classes = len(about.class_names) if about.conditional[name] else 0
    inputs = None if gaussian is None else 2 * about.channels

    def make() -> UNet:
        return UNet(about.network.size, about.resolution, about.channels, classes, inputs)

    def around(unet: UNet) -> NetworkDenoiser:
        if gaussian is None:
            return PreconditionedDenoiser(unet, classes, about.network.sigma_data)
        return ResidualDenoiser(unet, classes, gaussian)

    with torch.device("meta"):
        unet = make()
    expected = {f"network.{k}": v for k, v in unet.state_dict().items()}
    weights = load_weights(release / "weights" / f"{name}.safetensors", expected)
    denoiser = around(make())
    denoiser.load_state_dict(weights)
    return denoiser.to(device).eval()
