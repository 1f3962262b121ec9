"""Sliced Wasserstein distance: how far features have to be moved, seen along random directions."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dpsyngen.errors import ConfigError
from dpsyngen.evaluation.scatter import Estimate

DIRECTIONS = 256
_AT_A_TIME = 16


class SlicedWasserstein:
    """The distance of features from those of real images (Bonneel et al. 2015, eq. 9, with p = 2).

    SW₂ = (mean over directions θ of W₂²(⟨θ, x⟩, ⟨θ, y⟩))^½, in units of the features, θ uniform on the sphere.  In one
    dimension W₂² is the mean squared difference of equal quantiles; it is exact for sets of unequal size too.

    Args:
        real: features of real images [m, d].
        seed: of the directions.
        directions: how many.
    """

    def __init__(self, real: NDArray[np.float32], *, seed: int, directions: int = DIRECTIONS) -> None:
        if directions < 1:
            raise ConfigError(f"directions is {directions}, but must be at least 1.")
        drawn = np.random.default_rng(seed).normal(size=(real.shape[1], directions))
        self._axes = (drawn / np.linalg.norm(drawn, axis=0)).astype(np.float32)
        self._real = np.sort(real @ self._axes, axis=0).astype(np.float64)

    def __call__(self, features: NDArray[np.float32], scatter: bool = False) -> Estimate:
        """The distance of features [n, d]; with the influence of each image on its square if `scatter`."""
        projected = (features @ self._axes).astype(np.float64)
        directions = projected.shape[1]
        total, influence = 0.0, np.zeros(len(features))
        for start in range(0, directions, _AT_A_TIME):
            columns = projected[:, start : start + _AT_A_TIME]
            order = np.argsort(columns, axis=0, kind="stable")
            ordered = np.take_along_axis(columns, order, 0)
            real = self._real[:, start : start + _AT_A_TIME]
            total += float(squared_transport(ordered, real).sum())
            if scatter:
                influence += np.bincount(order.reshape(-1), potentials(ordered, real).reshape(-1), len(features))
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
