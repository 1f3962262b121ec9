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


def shrink_bands(values: Tensor, noise_variance: Tensor, bands: Tensor) -> Tensor:
    """Posterior means of coefficients that are N(0, τ²) plus noise, with one τ² for each band.

    τ² is estimated from the excess of the squares over the noise, each row weighted by 1/variance.

    Args:
        values: [K, D], rows with noise of different size.
        noise_variance: [K, B] >= 0, variance of the noise of a row in a band; 0 keeps the row as it is.
        bands: [D] in 0..B-1.

    Returns:
        [K, D]: values · τ²/(τ² + noise_variance).
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
    """The largest eigenvalue, to leading order, of a symmetric noise matrix.

    Args:
        std: standard deviation s on the diagonal; off it s/√2 (what :func:`dpsyngen.privacy.moments.scatter_sums`
            gets).
        size: m.

    Returns:
        s·√(2m): the semicircle of entries of variance s²/2 ends at 2·√(m·s²/2).
    """
    return std * math.sqrt(2 * size)


def debiased(eigenvalues: Tensor, edge: float) -> Tensor:
    """The signal's eigenvalues λ from those observed beyond the edge, ŵ = λ + c/λ with c = edge²/4.

    Along the *observed* eigenvector, which has turned away by an angle of cos² = 1 - c/λ², the signal varies by less.

    Args:
        eigenvalues: ŵ; below the edge, where nothing can be seen, the result is ŵ/2.
        edge: see :func:`noise_edge`.
    """
    return (eigenvalues + (eigenvalues.square() - edge**2).clamp_min(0).sqrt()) / 2


def denoised_covariance(covariance: Tensor, edge: float, floor: float) -> Tensor:
    """A positive covariance from a noisy one: what shows above the edge, and the mean of all else around it.

    Args:
        covariance: [d, d], symmetric.
        edge: of its noise.
        floor: least eigenvalue of the result, > 0.

    Returns:
        [d, d].  With nothing above the edge a multiple of the identity; without noise the same matrix, but for the
        floor.
    """
    values, vectors = torch.linalg.eigh(covariance)
    seen = values > edge
    signal = torch.where(seen, debiased(values, edge), 0.0)
    unseen = int((~seen).sum())
    if unseen:
        mean = max((float(values.sum()) - float(signal.sum())) / unseen, floor)
        signal = torch.where(seen, signal, mean)
    return (vectors * signal.clamp_min(floor)) @ vectors.mT
