"""Distances between the features of two sets of images: Fréchet, kernel (KID) and sliced Wasserstein.

Each comes with the influence of every generated image on it, from which :class:`Bootstrap` makes intervals.  Everything
is computed in fp64 but the matrix products over all pairs, which are fp32.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpsyngen.errors import ConfigError, require

SUBSETS, SUBSET_SIZE = 100, 1000
"""Subsets of the kernel distance and images in each, as torch-fidelity has them."""
DIRECTIONS = 256
_DIRECTIONS_AT_ONCE = 16
_BLOCK_BYTES = 64 * 2**20
LEVEL = 0.95
FEWEST = 40
"""Replicates below which nothing lies outside the interval."""


@dataclass(frozen=True)
class Estimate:
    """A figure in its range from `smallest` to `largest`, how it was taken, and how each generated image counted in it.

    `influence` [n] has mean 0 and the figure's units, or those of its square if `rooted`; None where not asked for.
    """

    value: float
    protocol: str
    influence: NDArray[np.float64] | None = None
    rooted: bool = False
    smallest: float = -np.inf
    largest: float = np.inf


class Bootstrap:
    """Percentile intervals, all from the same resampled sets of generated images.

    Only the generated images are drawn again; the real ones stay as they are, one yardstick for all generators that are
    compared on them.  A figure T that is no mean cannot simply be computed of resampled images: repeated images shift a
    Fréchet distance upwards and a recall downwards, and 200 distances in 1,280 dimensions take minutes.  So T is
    linearised, T + mean(φ), where φ_i, the *influence* of image i, is what T would change by, per share of the images,
    if there were more like it (the infinitesimal jackknife, or the jackknife where T has no derivative), and φ is
    resampled.  A bias that comes from having few images is not in the interval; the floor has about the same bias.
    """

    def __init__(self, images: int, replicates: int, seed: int) -> None:
        self.replicates = replicates
        rng = np.random.default_rng(seed)
        # Counts of each image, replicate by replicate: all at once they are drawn as 8-byte numbers.
        self._counts = np.empty((replicates, images), np.uint16)
        for row in self._counts:
            row[:] = np.bincount(rng.integers(0, images, images), minlength=images)

    def interval(self, estimate: Estimate) -> tuple[float, float] | None:
        """The central 95 % of the resampled figures; None where they do not vary, as for a share of 0 or 1."""
        if estimate.influence is None or not np.ptp(estimate.influence):
            return None
        change = self._counts @ estimate.influence / len(estimate.influence)
        ends = np.quantile(change, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        ends = np.sqrt((ends + estimate.value**2).clip(0)) if estimate.rooted else ends + estimate.value
        low, high = ends.clip(estimate.smallest, estimate.largest)
        return float(low), float(high)

    def protocol(self) -> dict[str, Any]:
        """What the intervals are, JSON-able."""
        return {
            "level": LEVEL,
            "replicates": self.replicates,
            "resampled": "generated images; real images are held fixed",
            "kind": "percentile bootstrap of the influence of each image; a bias from few images is not in it",
        }


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean [d], covariance [d, d] (fp64, unbiased) and number of a set of features; private if the images are."""

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]
    count: int

    @classmethod
    def of(cls, features: NDArray[np.floating]) -> FeatureStatistics:
        """Compute the statistics of features [N, d]; ConfigError for one image or features that are not finite."""
        if features.ndim != 2 or len(features) < 2:
            raise ConfigError(f"a Fréchet distance needs features [N, d] of at least 2 images, not {features.shape}.")
        wide = features.astype(np.float64)
        if not np.isfinite(wide).all():
            raise ConfigError("the features hold NaN or infinite values, so they have no covariance.")
        return cls(wide.mean(0), np.atleast_2d(np.cov(wide, rowvar=False)), len(wide))

    @property
    def full_rank(self) -> bool:
        """Whether there were more images than dimensions; if not, the distance is biased upwards."""
        return self.count > len(self.mean)


def frechet_distance(a: FeatureStatistics | NDArray[np.floating], b: FeatureStatistics | NDArray[np.floating]) -> float:
    """‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½) ≥ 0, in squared units of the features (Heusel et al. 2017, eq. 6).

    `a` and `b` are features [N, d] and [M, d], or their statistics.

    Raises:
        ConfigError: different d, fewer than two images, or features that are not finite.

    Warns:
        UserWarning: N ≤ d: the covariance is singular and the distance too large.
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
    # With Σ_a = AᵀA, tr (Σ_a Σ_b)^½ = tr (A Σ_b Aᵀ)^½: symmetric, so eigenvalues do, without the complex numbers of a
    # general matrix square root and without failing on singular covariances.
    root = _factor(a.covariance)
    trace_root = np.sqrt(np.linalg.eigvalsh(root @ b.covariance @ root.T).clip(0)).sum()
    difference = a.mean - b.mean
    return float(max(difference @ difference + np.trace(a.covariance) + np.trace(b.covariance) - 2 * trace_root, 0.0))


def frechet_influence(features: NDArray[np.floating], real: FeatureStatistics) -> NDArray[np.float64]:
    """[N] the influence of each image of features [N, d] on their Fréchet distance from `real`, which is held fixed.

    φ(x) = 2(μ − μ_r)·(x − μ) + (x − μ)ᵀ(I − A)(x − μ) − its mean, where A is the optimal transport map from N(μ, Σ) to
    N(μ_r, Σ_r): the derivative of the distance with respect to Σ is I − A.  With factors Σ = XᵀX and Σ_r = RᵀR, and
    XRᵀ = U S Pᵀ, A is RᵀP S⁻¹ PᵀR.  Where there are fewer images than dimensions, A is taken on what they span, which
    no resampling leaves.
    """
    made = FeatureStatistics.of(features)
    x, r = _factor(made.covariance), _factor(real.covariance)
    _, s, p = np.linalg.svd(x @ r.T, full_matrices=False)
    kept = s > s.max(initial=0.0) * len(s) * np.finfo(np.float64).eps
    centred = features.astype(np.float64) - made.mean
    moved = (centred @ r.T) @ p[kept].T / np.sqrt(s[kept])
    # The factor is the covariance's, whose divisor is N − 1.
    change = len(features) / (len(features) - 1) * ((centred * centred).sum(1) - (moved * moved).sum(1))
    change += 2 * centred @ (made.mean - real.mean)
    influence: NDArray[np.float64] = change - change.mean()
    return influence


def _factor(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    """F [rank, d] with FᵀF = covariance."""
    values, vectors = np.linalg.eigh(covariance)
    kept = values > values.max(initial=0.0) * len(values) * np.finfo(np.float64).eps
    factor: NDArray[np.float64] = (vectors[:, kept] * np.sqrt(values[kept])).T
    return factor


class KernelDistance:
    """The kernel distance (KID, Bińkowski et al. 2018, §4) of features from those of real images.

    MMD² = mean k(x, x') + mean k(y, y') − 2 mean k(x, y) over pairs of different images, unbiased, with
    k(x, y) = (⟨x, y⟩/d + 1)³, averaged over random subsets with torch-fidelity's draws for the same seed.  It can be
    negative where the sets are alike.
    Subsets of sets smaller than `subset_size` are whole.
    """

    def __init__(
        self, real: NDArray[np.float32], *, seed: int, subsets: int = SUBSETS, subset_size: int = SUBSET_SIZE
    ) -> None:
        if subsets < 1 or subset_size < 2:
            raise ConfigError(f"{subsets} subsets of {subset_size} images: at least 1 of 2 images are needed.")
        self._real, self._seed, self._subsets, self._size = real, seed, subsets, subset_size
        self._of_real: dict[tuple[int, int], NDArray[np.float64]] = {}

    def __call__(self, features: NDArray[np.float32], scatter: bool = False) -> Estimate:
        """Measure features [n, d], n >= 2; `scatter`: with the influence of each image on the distance of all pairs."""
        n, m = len(features), len(self._real)
        if min(n, m) < 2:
            raise ConfigError(f"a kernel distance needs at least 2 images of either kind, not {n} and {m}.")
        size = min(self._size, n, m)
        # Every subset's mean over pairs follows from sums over its members: of the generated, the real, and across.
        x, y = _memberships(n, m, size, self._subsets, self._seed)
        xx, rows_x = _kernel_sums(features, features, x, x, same=True)
        xy, rows_y = _kernel_sums(features, self._real, x, y, same=False)
        # The draws from the real images depend on n, since they come from one generator.
        if (n, size) not in self._of_real:
            self._of_real[n, size] = _kernel_sums(self._real, self._real, y, y, same=True)[0]
        value = float(((xx + self._of_real[n, size]) / (size * (size - 1)) - 2 * xy / size**2).mean())
        influence = None
        if scatter:
            influence = 2 * (rows_x / (n - 1) - rows_y / m)
            influence -= influence.mean()
        return Estimate(value, f"mean of {self._subsets} subsets of {size:,} images", influence)


def _memberships(n: int, m: int, size: int, subsets: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Which of n and of m images are in each subset: 0 or 1, [n, subsets] and [m, subsets]."""
    x, y = np.zeros((n, subsets), np.float32), np.zeros((m, subsets), np.float32)
    rng = np.random.RandomState(seed % 2**32)  # NumPy's old generator: torch-fidelity draws from it, in this order
    for s in range(subsets):
        x[rng.choice(n, size, replace=False), s] = 1
        y[rng.choice(m, size, replace=False), s] = 1
    return x, y


def _kernel_sums(
    a: NDArray[np.float32], b: NDArray[np.float32], in_a: NDArray[np.float32], in_b: NDArray[np.float32], *, same: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sums of k(a_i, b_j), i ≠ j if `same`: within each subset [subsets], and over all j for each i [len(a)].

    Every pair is computed once, in blocks, for all subsets together: a hundred subsets of their own would compute most
    pairs many times.
    """
    total, rows = np.zeros(in_a.shape[1]), np.empty(len(a))
    step = max(1, _BLOCK_BYTES // (4 * len(b)))
    for start in range(0, len(a), step):
        part = slice(start, start + step)
        inner = a[part] @ b.T
        inner *= np.float32(1 / a.shape[1])
        inner += 1
        kernel = inner * inner
        kernel *= inner
        if same:
            i = np.arange(len(kernel))
            kernel[i, start + i] = 0
        total += ((kernel @ in_b) * in_a[part]).sum(0, dtype=np.float64)
        rows[part] = kernel.sum(1, dtype=np.float64)
    return total, rows


class SlicedWasserstein:
    """The sliced Wasserstein distance of features from those of real images (Bonneel et al. 2015, eq. 9, with p = 2).

    SW₂ = (mean over directions θ of W₂²(⟨θ, x⟩, ⟨θ, y⟩))^½, in units of the features, θ uniform on the sphere.  In one
    dimension W₂² is the mean squared difference of equal quantiles; it is exact for sets of unequal size too.
    """

    def __init__(self, real: NDArray[np.float32], *, seed: int, directions: int = DIRECTIONS) -> None:
        require(directions >= 1, "directions", directions, "at least 1")
        drawn = np.random.default_rng(seed).normal(size=(real.shape[1], directions))
        self._axes = (drawn / np.linalg.norm(drawn, axis=0)).astype(np.float32)
        self._real = np.sort(real @ self._axes, axis=0).astype(np.float64)

    def __call__(self, features: NDArray[np.float32], scatter: bool = False) -> Estimate:
        """Measure features [n, d]; `scatter`: with the influence of each image on the squared distance."""
        projected = (features @ self._axes).astype(np.float64)
        n, directions = projected.shape
        total, influence = 0.0, np.zeros(n)
        for start in range(0, directions, _DIRECTIONS_AT_ONCE):  # all at once take gigabytes for 100,000 images
            columns = projected[:, start : start + _DIRECTIONS_AT_ONCE]
            order = np.argsort(columns, axis=0, kind="stable")
            ordered = np.take_along_axis(columns, order, 0)
            real = self._real[:, start : start + _DIRECTIONS_AT_ONCE]
            total += float(squared_transport(ordered, real).sum())
            if scatter:
                influence += np.bincount(order.ravel(), potentials(ordered, real).ravel(), n)
        influence = influence / directions
        return Estimate(
            float(np.sqrt(total / directions)),
            f"{directions} random directions",
            influence - influence.mean() if scatter else None,
            rooted=True,
            smallest=0.0,
        )


def squared_transport(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """W₂² [directions] of sorted numbers x [n, directions] and y [m, directions]: ∫ (Q_x − Q_y)² over the levels."""
    n, m = len(x), len(y)
    # Levels at which one of the two quantile functions steps, in whole numbers of 1/(n·m): no rounding.
    levels = np.union1d(np.arange(1, n + 1, dtype=np.int64) * m, np.arange(1, m + 1, dtype=np.int64) * n)
    widths = np.diff(levels, prepend=0) / (n * m)
    difference = x[(levels - 1) // m] - y[(levels - 1) // n]
    squared: NDArray[np.float64] = widths @ (difference * difference)
    return squared


def potentials(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """The derivative of W₂² with respect to the weight of each of x [n, directions], up to a constant a direction.

    It is the Kantorovich potential f: where x_i and x_{i+1} send to the same y, f_{i+1} − f_i is the difference of
    their costs, (x_{i+1} − y)² − (x_i − y)².  Where the next x begins with the next y, the mean of the two is taken.
    """
    n, m = len(x), len(y)
    level = np.arange(1, n, dtype=np.int64) * m
    shared = (y[(level - 1) // n] + y[level // n]) / 2
    steps = np.diff(x, axis=0) * (x[1:] + x[:-1] - 2 * shared)
    return np.concatenate([np.zeros((1, x.shape[1])), np.cumsum(steps, axis=0)])
