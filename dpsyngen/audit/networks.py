"""The two networks that audits train, in which a record shows more than it would in a run.

The *lookup* network has one number for each class and nothing else.  A canary with a class of its own then has a
gradient along a coordinate of its own, far longer than C, and the same whatever noise is drawn: each step in which it
is used moves what is released in that coordinate by exactly C.

The *lively* network is the run's, with weights as if it had been trained for a while.  Fresh ones have layers near zero
behind which nothing has a gradient, so all images pull at the same few weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dpsyngen.config import Config
from dpsyngen.diffusion.denoiser import NetworkDenoiser, PreconditionedDenoiser
from dpsyngen.diffusion.gaussian import GaussianDenoiser
from dpsyngen.training.networks import make_denoiser
from dpsyngen.training.plan import Shape

LOOKUP_LEVELS = {"noise_mean": 2.0, "noise_std": 0.1}
"""Density of log σ: noise far above the image, where the loss hardly depends on which noise it was."""

LIVELY_LEVELS = {"noise_mean": -1.0, "noise_std": 0.05}
"""Noise levels close to each other, so that those of the training resemble the auditor's."""

_PERTURBATION = 0.05  # standard deviation of what is added to each weight

_STEEP = 1e4


class LookupNetwork(nn.Module):
    """F = the number of the row's class, in all pixels.

    Args:
        num_classes: classes, besides "no class".
        channels, resolution: of the images.
        steep: factor between the number and the output, which makes gradients long.
    """

    def __init__(self, num_classes: int, channels: int, resolution: int, steep: float) -> None:
        super().__init__()
        self.table = nn.Embedding(num_classes + 1, 1)
        nn.init.zeros_(self.table.weight)
        self.shape, self.steep = (channels, resolution, resolution), steep

    def forward(self, x: Tensor, c_noise: Tensor, classes: Tensor | None = None) -> Tensor:
        """See :class:`dpsyngen.diffusion.unet.UNet`."""
        assert classes is not None
        return self.steep * self.table(classes).view(-1, 1, 1, 1).expand(-1, *self.shape)


def lookup_denoiser(
    config: Config, shape: Shape, conditional: bool, seed: int, gaussian: GaussianDenoiser | None = None
) -> NetworkDenoiser:
    """In place of :func:`dpsyngen.training.networks.make_denoiser`."""
    network = LookupNetwork(shape.num_classes, shape.channels, shape.resolution, _STEEP * config.privacy.clipping_norm)
    return PreconditionedDenoiser(network, shape.num_classes, config.network.sigma_data)


def lively_denoiser(
    config: Config, shape: Shape, conditional: bool, seed: int, gaussian: GaussianDenoiser | None = None
) -> NetworkDenoiser:
    """In place of :func:`dpsyngen.training.networks.make_denoiser`; a pure function of its arguments, like that."""
    denoiser = make_denoiser(config, shape, conditional, seed, gaussian)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in denoiser.parameters():
            p.add_(_PERTURBATION * torch.randn(p.shape, generator=generator))
    return denoiser


def lookup_scores(released: list[Tensor], canaries: int) -> Tensor:
    """[canaries] what a release says of each; white images pull their numbers up, so their gradients are negative."""
    return -torch.cat([t.detach().flatten() for t in released])[:canaries].double()
