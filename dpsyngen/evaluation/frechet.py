"""Fréchet distance between two sets of features, each taken as a Gaussian (FID, Heusel et al. 2017, eq. 6)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dpsyngen.errors import ConfigError, DataError


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean [d], covariance [d, d] (fp64, unbiased) and number of a set of features.

    Statistics of private images are private: keep a saved file in the private half.
    """

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

    def save(self, path: Path) -> None:
        """Write to a ``.npz`` file, replacing what is there.

        Raises:
            ConfigError: the name does not end in ``.npz`` (NumPy would add it and the file would be elsewhere).
        """
        if Path(path).suffix != ".npz":
            raise ConfigError(f"feature statistics are written to an .npz file, not to {str(path)!r}.")
        np.savez(path, mean=self.mean, covariance=self.covariance, count=np.int64(self.count))

    @classmethod
    def load(cls, path: Path) -> FeatureStatistics:
        """Read what :meth:`save` wrote; no pickled code is run.

        Raises:
            DataError: the file is missing, unreadable or not such a file.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                mean, covariance = file["mean"].astype(np.float64), file["covariance"].astype(np.float64)
                count = int(file["count"])
            if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)) or count < 2:
                raise ValueError(f"mean {mean.shape}, covariance {covariance.shape} and count {count} do not fit")
            if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
                raise ValueError("it holds NaN or infinite values")
        except Exception as error:  # np.load raises many kinds
            raise DataError(
                f"{path} does not hold feature statistics: {error}.  Compute and save them again."
            ) from None
        return cls(mean, covariance, count)


def frechet_distance(a: FeatureStatistics | NDArray[np.floating], b: FeatureStatistics | NDArray[np.floating]) -> float:
    """‖μ_a - μ_b‖² + tr(Σ_a + Σ_b - 2 (Σ_a Σ_b)^½), >= 0, in squared units of the features.

    The trace of the square root is that of the symmetric (Σ_a^½ Σ_b Σ_a^½)^½, by eigenvalues: no complex numbers, no
    failure on singular covariances.

    Args:
        a: features [N, d] or their statistics.
        b: features [M, d] or their statistics.

    Raises:
        ConfigError: different d, fewer than two images, or features that are not finite.

    Warns:
        UserWarning: no more images than dimensions, N <= d: the covariance is singular and the distance too large.
    """
    a = a if isinstance(a, FeatureStatistics) else FeatureStatistics.of(a)
    b = b if isinstance(b, FeatureStatistics) else FeatureStatistics.of(b)
    if a.mean.shape != b.mean.shape:
        raise ConfigError(f"features of {len(a.mean)} and {len(b.mean)} dimensions cannot be compared.")
    if not (a.full_rank and b.full_rank):
        warnings.warn(
            f"a Fréchet distance in {len(a.mean)} dimensions from {min(a.count, b.count)} images is biased upwards: "
            "take more images than dimensions, or features of fewer dimensions.",
            stacklevel=2,
        )
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    inner = root @ b.covariance @ root
    trace_root = np.sqrt(np.linalg.eigvalsh((inner + inner.T) / 2).clip(0)).sum()
    difference = a.mean - b.mean
    return float(max(difference @ difference + np.trace(a.covariance) + np.trace(b.covariance) - 2 * trace_root, 0.0))


def frechet_influence(features: NDArray[np.floating], real: FeatureStatistics) -> NDArray[np.float64]:
    """[N] what each image of features [N, d] adds to their Fréchet distance from `real`: its influence function.

    φ(x) = 2(μ − μ_r)·(x − μ) + (x − μ)ᵀ(I − A)(x − μ) − its mean, where A is the optimal transport map from N(μ, Σ) to
    N(μ_r, Σ_r): the derivative of the distance with respect to Σ is I − A.  With factors Σ = XᵀX and Σ_r = RᵀR, and
    XRᵀ = U S Pᵀ, A is RᵀP S⁻¹ PᵀR.  Where there are fewer images than dimensions, A is taken on what they span, which
    no resampling leaves.

    Args:
        features: of the images whose influence is asked for.
        real: statistics of what they are compared with, held fixed.
    """
    of_made = FeatureStatistics.of(features)
    x, r = _factor(of_made.covariance), _factor(real.covariance)
    _, s, p = np.linalg.svd(x @ r.T, full_matrices=False)
    kept = s > s.max(initial=0.0) * len(s) * np.finfo(np.float64).eps
    centred = features.astype(np.float64) - of_made.mean
    moved = (centred @ r.T) @ p[kept].T / np.sqrt(s[kept])
    # The factor is the covariance's, whose divisor is N − 1.
    change = len(features) / (len(features) - 1) * ((centred * centred).sum(1) - (moved * moved).sum(1))
    change += 2 * centred @ (of_made.mean - real.mean)
    influence: NDArray[np.float64] = change - change.mean()
    return influence


def _factor(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    """F [rank, d] with FᵀF = covariance."""
    values, vectors = np.linalg.eigh(covariance)
    kept = values > values.max(initial=0.0) * len(values) * np.finfo(np.float64).eps
    factor: NDArray[np.float64] = (vectors[:, kept] * np.sqrt(values[kept])).T
    return factor
