"""Fréchet distance between two sets of features, each taken as a Gaussian (FID, Heusel et al. 2017, eq. 6)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpsyngen.errors import ConfigError


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean [d], covariance [d, d] (fp64, unbiased) and number of a set of features."""

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]
    count: int

    @classmethod
    def of(cls, features: NDArray[np.floating]) -> FeatureStatistics:
        """Statistics of features [N, d], N >= 2.

        Raises:
            ConfigError: fewer than two images, or features that are not finite.
        """
        if features.ndim != 2 or len(features) < 2:
            raise ConfigError(f"a Fréchet distance needs features [N, d] of at least 2 images, not {features.shape}.")
        wide = features.astype(np.float64)
        if not np.isfinite(wide).all():
            raise ConfigError("the features hold NaN or infinite values, so they have no covariance.")
        mean = wide.mean(0)
        centred = wide - mean
        return cls(mean, centred.T @ centred / (len(wide) - 1), len(wide))

    @property
    def full_rank(self) -> bool:
        """Whether there were more images than dimensions; if not, the distance is biased upwards."""
        return self.count > len(self.mean)


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """‖μ_a - μ_b‖² + tr(Σ_a + Σ_b - 2 (Σ_a Σ_b)^½), >= 0.

    The trace of the square root is that of the symmetric (Σ_a^½ Σ_b Σ_a^½)^½, by eigenvalues: no complex numbers, no
    failure on singular covariances.
    """
    if a.mean.shape != b.mean.shape:
        raise ConfigError(f"features of {len(a.mean)} and {len(b.mean)} dimensions cannot be compared.")
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    inner = root @ b.covariance @ root
    trace_root = np.sqrt(np.linalg.eigvalsh((inner + inner.T) / 2).clip(0)).sum()
    difference = a.mean - b.mean
    return float(max(difference @ difference + np.trace(a.covariance) + np.trace(b.covariance) - 2 * trace_root, 0.0))
