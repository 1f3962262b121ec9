"""Which of two sets of real images has the nearest neighbours, and whether that can be chance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpsyngen.evaluation.neighbours import Neighbours

CONFIDENCE = 0.95
_PERMUTATIONS = 99_999


@dataclass(frozen=True)
class Share:
    """How many generated images have a training image as their nearest real one.

    Attributes:
        images: generated images.
        nearer_private, nearer_held_out, ties: their numbers; the three add up.
        share: (nearer_private + ties/2) / images.
        expected: what it would be if each real image were equally likely to be in either set: 1/2 for equal sizes.
        low, high: Clopper-Pearson interval of the share at 95 %; a tie counts as held-out for the lower end and as
            private for the upper.
        p_binomial: two-sided exact binomial test against `expected`, ties left out (the sign test).  It speaks of these
            two sets as they are: an image that is the nearest of many counts as that much evidence.
        p_permutation: one-sided permutation test that the share is too large: the membership of real images is drawn
            again, with as many in each set.  It speaks of sets like these, and is the one to decide by.
    """

    images: int
    nearer_private: int
    nearer_held_out: int
    ties: int
    share: float
    expected: float
    low: float
    high: float
    p_binomial: float
    p_permutation: float


def share(
    private: Neighbours, held_out: Neighbours, n_private: int, n_held_out: int, rng: np.random.Generator
) -> Share:
    """Compare the neighbours of the same queries in two sets of `n_private` and `n_held_out` images."""
    from scipy.stats import binomtest

    nearer, tied = private.squared < held_out.squared, private.squared == held_out.squared
    images, wins, ties = len(nearer), int(nearer.sum()), int(tied.sum())
    losses = images - wins - ties
    expected = n_private / (n_private + n_held_out)
    low, _ = interval(wins, images)
    _, high = interval(wins + ties, images)
    return Share(
        images=images,
        nearer_private=wins,
        nearer_held_out=losses,
        ties=ties,
        share=(wins + ties / 2) / images,
        expected=expected,
        low=low,
        high=high,
        p_binomial=float(binomtest(wins, wins + losses, expected).pvalue) if wins + losses else 1.0,
        p_permutation=_permutation(private, held_out, nearer, tied, n_private, n_held_out, rng),
    )


def interval(successes: int, trials: int) -> tuple[float, float]:
    """Clopper-Pearson interval of a share, at 95 %."""
    from scipy.stats import binomtest

    found = binomtest(successes, trials).proportion_ci(CONFIDENCE, method="exact")
    return float(found.low), float(found.high)


def _permutation(
    private: Neighbours,
    held_out: Neighbours,
    nearer: NDArray[np.bool_],
    tied: NDArray[np.bool_],
    n_private: int,
    n_held_out: int,
    rng: np.random.Generator,
) -> float:
    """P(a share this large), if every division of the real images into sets of these sizes is equally likely.

    The nearest image of the union does not depend on the division.  So the number of generated images whose nearest is
    private is Σ w over the images r of the private set, where w(r) says how many have r as their nearest (half an image
    at a tie).  Drawing the private set anew draws how many images of each w it gets: multivariate hypergeometric.
    """
    votes_private, votes_held_out = 2 * nearer + tied, 2 * (~nearer & ~tied) + tied
    weights = np.concatenate(
        [
            np.bincount(private.index, votes_private, n_private),
            np.bincount(held_out.index, votes_held_out, n_held_out),
        ]
    ).astype(np.int64)
    values, counts = np.unique(weights, return_counts=True)
    drawn = rng.multivariate_hypergeometric(counts, n_private, size=_PERMUTATIONS, method="marginals")
    seen = weights[:n_private].sum()
    return float((1 + (drawn @ values >= seen).sum()) / (1 + _PERMUTATIONS))
