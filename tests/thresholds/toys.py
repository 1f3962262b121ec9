"""Distributions whose optimal denoiser is known in closed form: what tests hold the code to.

Everything is in float64.  D is the dimension d; an image is a point with its pixels in a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class ExactMixture:
    """A mixture of Gaussians, and its optimal denoiser E[x₀ | x₀ + σ·n = x].

    Args:
        weights: [K], not negative, summing to 1.
        means: [K, d].
        covariances: [K, d, d], symmetric and positive semi-definite; zeros make a component a single image.

    Raises:
        ValueError: shapes that do not fit, or weights or covariances that are not such.
    """

    def __init__(
        self, weights: Tensor | Sequence[float], means: Tensor | Sequence, covariances: Tensor | Sequence
    ) -> None:
        self.weights = torch.as_tensor(weights, dtype=torch.float64)
        self.means = torch.as_tensor(means, dtype=torch.float64)
        self.covariances = torch.as_tensor(covariances, dtype=torch.float64)
        k, d = self.means.shape if self.means.ndim == 2 else (0, 0)
        if not k or self.weights.shape != (k,) or self.covariances.shape != (k, d, d):
            raise ValueError(
                f"weights, means and covariances are {list(self.weights.shape)}, {list(self.means.shape)} and "
                f"{list(self.covariances.shape)}, but must be [K], [K, d] and [K, d, d]."
            )
        if (self.weights < 0).any() or abs(float(self.weights.sum()) - 1) > 1e-9:
            raise ValueError(f"weights are {self.weights.tolist()}, but must be at least 0 and sum to 1.")
        if not torch.allclose(self.covariances, self.covariances.mT):
            raise ValueError("a covariance is not symmetric.")
        values, self._axes = torch.linalg.eigh(self.covariances)
        if (values < -1e-9 * values.abs().amax().clamp_min(1)).any():
            raise ValueError(f"a covariance has the eigenvalue {float(values.min()):.3g}, but must not be negative.")
        self._values = values.clamp_min(0)

    @classmethod
    def gaussian(cls, mean: Tensor | Sequence[float], covariance: Tensor | Sequence) -> ExactMixture:
        """One Gaussian: mean [d], covariance [d, d]."""
        m = torch.as_tensor(mean, dtype=torch.float64)
        return cls([1.0], m[None], torch.as_tensor(covariance, dtype=torch.float64)[None])

    @property
    def dimension(self) -> int:
        """d."""
        return int(self.means.shape[1])

    @property
    def mean(self) -> Tensor:
        """[d]."""
        return self.weights @ self.means

    @property
    def variance(self) -> float:
        """The variances of the coordinates, summed: the loss of the best constant."""
        spread = (self.means - self.mean).square().sum(1) + self._values.sum(1)
        return float(self.weights @ spread)

    def smoothed(self, sigma: float) -> ExactMixture:
        """The distribution of x₀ + σ·n."""
        noise = sigma**2 * torch.eye(self.dimension, dtype=torch.float64)
        return ExactMixture(self.weights, self.means, self.covariances + noise)

    def sample(self, count: int, seed: int) -> Tensor:
        """[count, d]."""
        generator = torch.Generator().manual_seed(seed)
        chances = torch.rand(count, generator=generator, dtype=torch.float64)
        which = torch.searchsorted(self.weights.cumsum(0)[:-1].contiguous(), chances, right=True)
        normal = torch.randn(count, self.dimension, generator=generator, dtype=torch.float64)
        scaled = self._values[which].sqrt() * normal
        return self.means[which] + torch.einsum("nij,nj->ni", self._axes[which], scaled)

    def denoise(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """E[x₀ | x]: the components' Wiener filters, weighted by their posterior probabilities.

        Args:
            x: [N, d].
            sigma: σ > 0, one for all or [N].

        Returns:
            [N, d], float64.
        """
        x = x.double()
        chances, along, total = self._responsibilities(x, torch.as_tensor(sigma, dtype=torch.float64))
        filtered = self._values / total * along  # [N, K, d], in each component's own axes
        means = self.means + torch.einsum("kij,nkj->nki", self._axes, filtered)
        return torch.einsum("nk,nki->ni", chances, means)

    def log_density(self, x: Tensor) -> Tensor:
        """log of the density at x, [N]; all components need a covariance of full rank."""
        z = torch.einsum("nki,kij->nkj", x.double()[:, None] - self.means, self._axes)
        return torch.logsumexp(self._log_terms(z, self._values[None]), 1)

    def _log_terms(self, along: Tensor, total: Tensor) -> Tensor:
        quadratic = (along.square() / total + total.log()).sum(-1) + self.dimension * math.log(2 * math.pi)
        return self.weights.log() - quadratic / 2

    def _responsibilities(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        square = sigma.square().expand(len(x))[:, None, None]
        total = self._values + square
        along = torch.einsum("nki,kij->nkj", x[:, None] - self.means, self._axes)
        return torch.softmax(self._log_terms(along, total), 1), along, total

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """As a :class:`dpsyngen.diffusion.denoiser.Denoiser` of images with d pixels in all; there are no classes."""
        return self.denoise(x.flatten(1), sigma).view(x.shape).to(x.dtype)


def gaussian_gap(a: ExactMixture, b: ExactMixture, sigma: float) -> float:
    """E|D_a(x) - D_b(x)|² over x = x₀ + σ·n, x₀ ~ a, for two single Gaussians, summed over the coordinates.

    With the Wiener filters A = C_a(C_a + σ²I)⁻¹ and B, the difference is (A - B)(x - m_a) + (I - B)(m_a - m_b).
    """
    if len(a.weights) != 1 or len(b.weights) != 1:
        raise ValueError("both must be single Gaussians; a mixture's gap has no closed form but in one dimension.")
    eye = torch.eye(a.dimension, dtype=torch.float64)
    total_a, total_b = (m.covariances[0] + sigma**2 * eye for m in (a, b))
    filter_a = torch.linalg.solve(total_a, a.covariances[0]).mT
    filter_b = torch.linalg.solve(total_b, b.covariances[0]).mT
    difference = filter_a - filter_b
    shift = (eye - filter_b) @ (a.means[0] - b.means[0])
    return float(torch.einsum("ij,jk,ik->", difference, total_a, difference) + shift.square().sum())


def gaussian_loss(a: ExactMixture, sigma: float) -> float:
    """mmse of a single Gaussian: Σ λσ²/(λ + σ²) over the eigenvalues of its covariance."""
    if len(a.weights) != 1:
        raise ValueError("a mixture's loss has no closed form but in one dimension.")
    values = a._values[0]
    return float((values * sigma**2 / (values + sigma**2)).sum())


def gap_in_one_dimension(a: ExactMixture, b: ExactMixture, sigma: float, points: int = 20_001) -> tuple[float, float]:
    """(gap, mmse of a) of two mixtures on the line, by the trapezoidal rule over x: exact but for 1e-8 or less.

    mmse = E[x₀²] - E[D_a(x)²], as D_a is the conditional mean.
    """
    if a.dimension != 1 or b.dimension != 1:
        raise ValueError("both must have one dimension.")
    noisy = a.smoothed(sigma)
    reach = 12 * noisy._values.sqrt().amax()
    x = torch.linspace(float(noisy.means.min() - reach), float(noisy.means.max() + reach), points, dtype=torch.float64)
    density = noisy.log_density(x[:, None]).exp()
    own, other = a.denoise(x[:, None], sigma)[:, 0], b.denoise(x[:, None], sigma)[:, 0]
    second = float(a.weights @ (a.means[:, 0].square() + a._values[:, 0]))
    gap = float(torch.trapezoid(density * (own - other).square(), x))
    return gap, second - float(torch.trapezoid(density * own.square(), x))


def kl_of_gaussians(a: ExactMixture, b: ExactMixture) -> float:
    """KL(a ‖ b) of two single Gaussians with covariances of full rank, in nats."""
    if len(a.weights) != 1 or len(b.weights) != 1:
        raise ValueError("both must be single Gaussians.")
    ca, cb = a.covariances[0], b.covariances[0]
    shift = b.means[0] - a.means[0]
    solved = torch.linalg.solve(cb, ca)
    quadratic = float(shift @ torch.linalg.solve(cb, shift))
    return 0.5 * (float(torch.trace(solved)) - a.dimension + quadratic - float(torch.linalg.slogdet(solved)[1]))
