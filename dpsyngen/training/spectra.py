"""What can be said of a signal under Gaussian noise of *known* variance: post-processing, which costs no privacy.

Vectors: empirical Bayes with a normal prior in each band (Efron & Morris, "Stein's estimation rule and its
competitors", JASA 1973).  Symmetric matrices: the spectrum of noise alone ends at its edge; an eigenvalue λ of the
signal beyond the transition shows as λ + c/λ (Benaych-Georges & Nadakuditi, "The eigenvalues and eigenvectors of
finite, low rank perturbations of large random matrices", Adv. Math. 2011).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_SCALE_VARIANCE = 0.25
"""Of the mean variance of one class in units of all together, before anything is seen: a guess, soon overruled."""


def shrink_bands(values: Tensor, noise_variance: Tensor, bands: Tensor) -> Tensor:
    """Posterior means of coefficients that are N(0, τ²) plus noise, with one τ² for each band.

    τ² is estimated from the excess of the squares over the noise, each row weighted by 1/variance.

    Args:
        values: [K, D], rows with noise of different size.
        noise_variance: [K, B] >= 0, of the noise of a row in a band; 0 keeps the row as it is.
        bands: [D] in 0..B-1.  The result is values · τ²/(τ² + noise_variance).
    """
    count = noise_variance.shape[1]
    size = torch.bincount(bands, minlength=count).clamp_min(1)
    energy = torch.zeros_like(noise_variance).index_add_(1, bands, values.square()) / size
    weights = 1 / noise_variance.clamp_min(1e-30)
    prior = ((energy - noise_variance) * weights).sum(0) / weights.sum(0)
    prior = prior.clamp_min(0)
    factors = torch.where(noise_variance > 0, prior / (prior + noise_variance).clamp_min(1e-30), 1.0)
    return values * factors[:, bands]


def noise_edge(std: float, size: int) -> float:
    """The largest eigenvalue, to leading order, of a symmetric [m, m] noise matrix, s·√(2m).

    Its standard deviation is s on the diagonal and s/√2 off it (what :func:`dpsyngen.privacy.moments.scatter_sums`
    gets): the semicircle of entries of variance s²/2 ends at 2·√(m·s²/2).
    """
    return std * math.sqrt(2 * size)


def noise_limit(std: float, size: int) -> float:
    """What the largest eigenvalue of noise stays below with a probability of 99 %.

    It is about edge·(1 + X/(2·m^⅔)) with X of the Tracy-Widom law (Tracy & Widom, "On orthogonal and symplectic matrix
    ensembles", Comm. Math. Phys. 1996), of which 2.02 is the 99 % quantile.
    """
    return noise_edge(std, size) * (1 + 2.02 / (2 * size ** (2 / 3)))


def debiased(eigenvalues: Tensor, edge: float) -> Tensor:
    """The signal's eigenvalues λ from those observed beyond the edge, ŵ = λ + c/λ with c = edge²/4.

    Along the *observed* eigenvector, which has turned away by an angle of cos² = 1 - c/λ², the signal varies by less.
    Below the edge, where nothing can be seen, the result is ŵ/2.
    """
    return (eigenvalues + (eigenvalues.square() - edge**2).clamp_min(0).sqrt()) / 2


def shrunk_number(value: float, noise_variance: float, mean: float, variance: float) -> float:
    """The posterior mean of a number with prior N(mean, variance) that was seen with noise."""
    return mean + (value - mean) * variance / (variance + noise_variance)


def turned_variances(eigenvalues: Tensor, std: float) -> Tensor:
    """The signal's variances along *all* eigenvectors of a noisy matrix, given its eigenvalues λ_i alone.

    ξ_i = λ_i - 2c·(1/d)·Σ_j (λ_i - λ_j)/((λ_i - λ_j)² + η²), c = edge²/4, η = √(c/d): the best estimate among those
    that keep the eigenvectors (Bun, Allez, Bouchaud & Potters, "Rotational invariant estimator for general noisy
    matrices", IEEE Trans. Inf. Theory 2016, for additive noise).  The sum stays.  Noise alone becomes 0, and what
    stands alone beyond the edge λ - c/λ in terms of the signal's λ.
    """
    size = len(eigenvalues)
    c = noise_edge(std, size) ** 2 / 4
    gaps = eigenvalues[:, None] - eigenvalues
    return eigenvalues - 2 * c * (gaps / (gaps.square() + c / size).clamp_min(1e-300)).mean(1)


def denoised_white_covariance(covariance: Tensor, std: float, *, least: float, most: float) -> Tensor:
    """A covariance [d, d] with eigenvalues in [least, most] from a noisy one that is expected near the identity.

    Where no eigenvalue stands out of the noise (standard deviation `std` on the diagonal) it is a multiple of the
    identity, of its mean; where the mean does not show either, the identity.
    """
    size = len(covariance)
    values, vectors = torch.linalg.eigh(covariance)
    mean = float(values.mean())
    if float((values - mean).abs().max()) <= noise_limit(std, size):
        # The mean of d values of the diagonal has noise of variance std²/d.
        signal = torch.full_like(values, shrunk_number(mean, std**2 / size, 1.0, _SCALE_VARIANCE))
    else:
        signal = turned_variances(values, std)
    return (vectors * signal.clamp(least, most)) @ vectors.mT


def cosine_matrix(size: int) -> Tensor:
    """[size, size] fp64, the orthonormal DCT-II: row f is √(2/size)·cos(π f (2i + 1) / (2 size)), row 0 over √2."""
    f, i = torch.arange(size, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64)[None]
    matrix = (math.pi * f * (2 * i + 1) / (2 * size)).cos() * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


class Frequencies:
    """The cosine transform of images [C, H, W].

    Attributes:
        size: D = C·H·W.
        radius: [D] fp64, how fine each coefficient is, ascending: √(f_y² + f_x²), twice √(f_y² + f_x² + 1) for a colour
            difference.
        bands: [D] int64, number of the ring that a coefficient belongs to, from 0: a whole radius, and whether it is
            grey or a colour difference.
    """

    def __init__(self, shape: tuple[int, int, int]) -> None:
        c, h, w = shape
        self.shape, self.size = shape, c * h * w
        self._matrices = cosine_matrix(c), cosine_matrix(h), cosine_matrix(w)
        colour, fy, fx = (a.flatten() for a in torch.meshgrid(*map(torch.arange, shape), indexing="ij"))
        squares = (fy.square() + fx.square()).double()
        radius = torch.where(colour == 0, squares, 4 * (squares + 1)).sqrt()
        self._order = torch.argsort(radius, stable=True)
        self.radius = radius[self._order]
        rings = 2 * radius.round().long() + (colour > 0)
        self.bands = torch.unique(rings, return_inverse=True)[1][self._order]

    def transform(self, flat: Tensor, count: int | None = None) -> Tensor:
        """The `count` coarsest coefficients (all, if None) of images [N, D]: [N, count], fp64."""
        c, h, w = self._matrices
        images = flat.double().view(-1, *self.shape)
        out = h @ images @ w.mT
        if self.shape[0] > 1:
            out = torch.einsum("kc,nchw->nkhw", c, out)
        return out.flatten(1)[:, self._order[:count]]

    def inverse(self, coefficients: Tensor) -> Tensor:
        """Images [N, D] of their coarsest coefficients [N, count]; the others are 0."""
        c, h, w = self._matrices
        every = coefficients.new_zeros(len(coefficients), self.size, dtype=torch.float64)
        every[:, self._order[: coefficients.shape[1]]] = coefficients.double()
        out = h.mT @ every.view(-1, *self.shape) @ w
        if self.shape[0] > 1:
            out = torch.einsum("kc,nkhw->nchw", c, out)
        return out.flatten(1)
