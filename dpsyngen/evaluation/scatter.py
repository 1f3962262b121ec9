"""How far a figure would have come out otherwise, had other images been generated: bootstrap intervals.

Only the generated images are drawn again; the real ones are the yardstick and stay as they are, so that generators
that are compared on the same real images are compared fairly.

A figure that is no mean (a Fréchet distance, a recall) cannot simply be computed of resampled images: images that are
drawn twice shift it, a Fréchet distance upwards and a recall downwards, and 200 distances in 1,280 dimensions would
take minutes.  So the figure T is first written as a mean, T + mean(φ), where φ_i, the *influence* of image i, is what
the figure would change by, per share of the images, if there were more like it (the infinitesimal jackknife, or the
jackknife where T has no derivative).  The bootstrap then draws from the φ_i.

The interval is for figures of as many images, the same real images, and the same extractor.  A bias that comes from
having few images is no scatter and is not in it; the floor, taken with as many images, has about the same bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
FEWEST = 40
"""Replicates below which nothing lies outside the interval."""


@dataclass(frozen=True)
class Estimate:
    """A figure, and how each of the images counted in it.

    Attributes:
        value: the figure.
        protocol: how it was taken.
        influence: [n] of each generated image, in the figure's units; its mean is 0.  None where it was not asked for.
        rooted: the influence is that of value², of which `value` is the root.
        smallest, largest: the range that the figure can have.
    """

    value: float
    protocol: str
    influence: NDArray[np.float64] | None = None
    rooted: bool = False
    smallest: float = -np.inf
    largest: float = np.inf


class Bootstrap:
    """Percentile intervals, all from the same resampled sets.

    Args:
        images: n, how many generated images there are.
        replicates: how many sets of n images are drawn from them, with replacement.
        seed: of the draws.
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
        low, high = np.quantile(change, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        if estimate.rooted:
            low, high = np.sqrt(np.maximum(np.array([low, high]) + estimate.value**2, 0.0))
        else:
            low, high = low + estimate.value, high + estimate.value
        return float(max(low, estimate.smallest)), float(min(high, estimate.largest))

    def protocol(self) -> dict[str, Any]:
        """What the intervals are, JSON-able."""
        return {
            "level": LEVEL,
            "replicates": self.replicates,
            "resampled": "generated images; real images are held fixed",
            "kind": "percentile bootstrap of the influence of each image; a bias from few images is not in it",
        }
