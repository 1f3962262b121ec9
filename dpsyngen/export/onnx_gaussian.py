"""The Gaussian's denoiser without a branch or a loop over the batch, as a graph needs it.

:class:`dpsyngen.diffusion.gaussian.GaussianDenoiser` sorts a batch by class first, which saves work; here every class
is computed for every image and the wanted one is selected.  Numbers agree to rounding.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dpsyngen.diffusion.gaussian import GaussianDenoiser


class GaussianGraph(nn.Module):
    """The Wiener filter of each class, its expected error, and drawing from it.

    Args:
        gaussian: what it is to compute the same as.
    """

    means_in: Tensor
    means_outside: Tensor
    basis: Tensor
    outer: Tensor
    turns: Tensor
    inner_variances: Tensor
    outer_variances: Tensor
    frequencies: Tensor
    edges: Tensor

    def __init__(self, gaussian: GaussianDenoiser) -> None:
        super().__init__()
        self.classes, self.dimension, self.shape = gaussian.classes, gaussian.dimension, gaussian.shape
        self.spherical = gaussian.spherical
        self.outside = gaussian.dimension - gaussian.basis.shape[1]
        frequencies = gaussian.log_frequencies.double().exp()
        edges = frequencies.cumsum(0)
        buffers = {
            "means_in": gaussian.means_in,
            "means_outside": gaussian.means - gaussian.means_in @ gaussian.basis.mT
            if gaussian.spherical
            else gaussian.means_out,
            "basis": gaussian.basis,
            "outer": gaussian.outer,
            "turns": gaussian.turns,
            "inner_variances": gaussian.inner_variances,
            "outer_variances": gaussian.outer_variances,
            "frequencies": frequencies.to(gaussian.means.dtype),
            "edges": edges / edges[-1],
        }
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor.detach().clone())

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        """E[x₀ | x, label]: x [N, C, H, W], sigma [N], labels [N] in 0..K (K: unknown) -> [N, C, H, W]."""
        flat, square = x.flatten(1), sigma.square().view(-1, 1)
        along, across = flat @ self.basis, self._across(flat)
        turned = self._turned(along)
        variances = self.inner_variances[:, None]
        total = variances + square
        filtered = self.means_in[:, None] + (variances / total * turned) @ self.turns.mT
        outer_total = self.outer_variances + square
        apart = (across - self.means_outside[:, None]).square() / outer_total
        distance = (turned.square() / total + total.log()).sum(2) + apart.sum(2)
        chances = self._chances(labels, self.frequencies.log() - distance.mT / 2)
        mean = chances @ self.means_outside
        inner = (chances.mT[:, :, None] * filtered).sum(0)
        return self._image(inner, mean + self.outer_variances / outer_total * (across - mean))

    def residual_std(self, sigma: Tensor, labels: Tensor) -> Tensor:
        """[N], root mean square of the filter's error, see :meth:`GaussianDenoiser.residual_std`."""
        square = sigma.square().view(-1, 1)
        outside = (self.outer_variances * square / (self.outer_variances + square)).sum(1)
        if self.spherical:
            outside = outside * self.outside
        inner = (self.inner_variances[:, None] * square / (self.inner_variances[:, None] + square)).sum(2).mT
        weights = self._select(labels, self.frequencies.expand(inner.shape[0], -1))
        return (((weights * inner).sum(1) + outside) / self.dimension).sqrt()

    def draw(self, noise: Tensor, labels: Tensor, sigma: float) -> Tensor:
        """x at σ = `sigma` drawn from the model, see :func:`dpsyngen.diffusion.start.sampling_start`."""
        flat = noise.flatten(1)
        square = sigma**2
        weights = self._select(labels, self._drawn(flat))
        scaled = (self.inner_variances[:, None] + square).sqrt() * (flat @ self.basis @ self.turns)
        along = self.means_in[:, None] + scaled @ self.turns.mT
        across = (self.outer_variances + square).sqrt() * self._across(flat) + weights @ self.means_outside
        return self._image((weights.mT[:, :, None] * along).sum(0), across)

    def _drawn(self, flat: Tensor) -> Tensor:
        """One-hot classes that follow from the noise, as in :func:`sampling_start`, [N, K]."""
        total = flat.double().sum(1) / math.sqrt(self.dimension)
        uniform = (total * 2.0**10).remainder(1.0)
        number = (self.edges[None] <= uniform[:, None]).sum(1).clamp_max(self.classes - 1)
        return self._one_hot(number)

    def _chances(self, labels: Tensor, log_chances: Tensor) -> Tensor:
        return self._select(labels, torch.softmax(log_chances, 1))

    def _select(self, labels: Tensor, unknown: Tensor) -> Tensor:
        """[N, K]: one-hot where the class is known, `unknown` where it is not."""
        return torch.where((labels == self.classes)[:, None], unknown, self._one_hot(labels))

    def _one_hot(self, labels: Tensor) -> Tensor:
        return (labels[:, None] == torch.arange(self.classes)[None]).to(self.means_in.dtype)

    def _turned(self, along: Tensor) -> Tensor:
        """Coordinates of each image in each class's own axes, [K, N, d]."""
        return (along[None] - self.means_in[:, None]) @ self.turns

    def _across(self, flat: Tensor) -> Tensor:
        return flat - (flat @ self.basis) @ self.basis.mT if self.spherical else flat @ self.outer

    def _image(self, along: Tensor, across: Tensor) -> Tensor:
        outside = across if self.spherical else across @ self.outer.mT
        return (along @ self.basis.mT + outside).view(-1, *self.shape)
