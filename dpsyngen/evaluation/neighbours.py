"""Nearest neighbours: the search, the balls of precision, recall, density and coverage, and whose neighbours are whose.

The search is scikit-learn's.  Distances between all pairs are taken in blocks, so that sets of any size fit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpsyngen.errors import ConfigError, require
from dpsyngen.evaluation.cas import clopper_pearson
from dpsyngen.evaluation.distances import Estimate

NEIGHBOURS = 5
"""Which neighbour the balls of precision, recall, density and coverage reach to."""
Features = NDArray[np.float32]
_PERMUTATIONS = 99_999
_BLOCK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Neighbours:
    """The row of the nearest reference of each query [Q], one of them where several are equally near, and its squared
    Euclidean distance.
    """

    index: NDArray[np.int64]
    squared: NDArray[np.float64]

    @property
    def distance(self) -> NDArray[np.float64]:
        return np.sqrt(self.squared)

    def take(self, rows: NDArray[np.int64]) -> Neighbours:
        return Neighbours(self.index[rows], self.squared[rows])


def nearest(queries: NDArray[Any], references: NDArray[Any], *, skip: NDArray[np.int64] | None = None) -> Neighbours:
    """Find the nearest of `references` [N, ...] to each of `queries` [Q, ...], by Euclidean distance (scikit-learn).

    The references are searched in blocks, of which one at a time is in fp32; distances are exact (whole numbers for
    uint8).
    `skip` [Q] is a row of the references that must not be answered (a query that is itself among them).
    """
    from sklearn.neighbors import NearestNeighbors

    if queries.shape[1:] != references.shape[1:] or (queries.dtype == np.uint8) != (references.dtype == np.uint8):
        forms = " and ".join(f"{x.dtype} {x.shape[1:]}" for x in (queries, references))
        raise ConfigError(f"rows of {forms} cannot be compared: give images or features of one form.")
    if not len(queries) or len(references) < (1 if skip is None else 2):
        raise ConfigError(f"{len(queries)} queries and {len(references)} references: too few to find neighbours.")
    asked = queries.reshape(len(queries), -1).astype(np.float32)
    index, best = np.zeros(len(queries), np.int64), np.full(len(queries), np.inf)
    size = max(2, _BLOCK_BYTES // (4 * asked.shape[1]))
    for start in range(0, len(references), size):
        block = np.asarray(references[start : start + size]).reshape(-1, asked.shape[1]).astype(np.float32)
        # Two, so that one is left where the other is to be skipped.
        search = NearestNeighbors(n_neighbors=min(2, len(block)), algorithm="brute").fit(block)
        for rows in search.kneighbors(asked, return_distance=False).T + start:
            squared = _squared(queries, references, rows)
            if skip is not None:
                squared[rows == skip] = np.inf
            closer = squared < best
            index[closer], best[closer] = rows[closer], squared[closer]
    return Neighbours(index, best)


def digests(images: NDArray[np.uint8]) -> NDArray[Any]:
    """One text [N] for each of the images [N, C, H, W], alike only where all pixels are."""
    return np.array([hashlib.blake2b(np.ascontiguousarray(i).tobytes(), digest_size=16).hexdigest() for i in images])


def _squared(queries: NDArray[Any], references: NDArray[Any], rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Squared distances [Q] to the given rows without cancellation, so that ties are exact."""
    wide = np.int64 if queries.dtype == np.uint8 else np.float64
    out = np.empty(len(queries), np.float64)
    step = max(1, _BLOCK_BYTES // (8 * queries[0].size))
    for a in range(0, len(queries), step):
        part = slice(a, a + step)
        difference = queries[part].astype(wide) - np.asarray(references[rows[part]]).astype(wide)
        out[part] = (difference * difference).reshape(len(difference), -1).sum(1)
    return out


@dataclass(frozen=True)
class Share:
    """How many generated images have a training image as their nearest real one; `share` counts ties by half.

    `expected` is the share if each real image were equally likely to be in either set: 1/2 for equal sizes.  `low` and
    `high` are its Clopper-Pearson interval at 95 %, for these two sets as they are; a tie counts as held-out for `low`,
    as private for `high`.  `p_permutation` tests one-sided that the share is too large, drawing the membership of real
    images again.  It speaks of sets like these: decide by it.  (A binomial test of the generated images would not do:
    a real image that is the nearest of many would count as that much evidence.)
    """

    images: int
    nearer_private: int
    nearer_held_out: int
    ties: int
    share: float
    expected: float
    low: float
    high: float
    p_permutation: float


def share(
    private: Neighbours, held_out: Neighbours, n_private: int, n_held_out: int, rng: np.random.Generator
) -> Share:
    """Compare the neighbours of the same queries in two sets of `n_private` and `n_held_out` images."""
    nearer, tied = private.squared < held_out.squared, private.squared == held_out.squared
    images, wins, ties = len(nearer), int(nearer.sum()), int(tied.sum())
    # The nearest image of the union does not depend on how it is divided.  So twice the number of generated images
    # whose nearest is private is Σ w over the private images r, where w(r) is twice the number of those that have r as
    # their nearest (once at a tie).  Drawing the private set anew draws how many images of each w it gets:
    # multivariate hypergeometric.
    of_private = np.bincount(private.index, 2 * nearer + tied, n_private)
    of_held_out = np.bincount(held_out.index, 2 * (~nearer & ~tied) + tied, n_held_out)
    weights = np.concatenate([of_private, of_held_out]).astype(np.int64)
    values, counts = np.unique(weights, return_counts=True)
    drawn = rng.multivariate_hypergeometric(counts, n_private, size=_PERMUTATIONS, method="marginals")
    as_large = int((drawn @ values >= weights[:n_private].sum()).sum())
    return Share(
        images=images,
        nearer_private=wins,
        nearer_held_out=images - wins - ties,
        ties=ties,
        share=(wins + ties / 2) / images,
        expected=n_private / (n_private + n_held_out),
        low=clopper_pearson(wins, images)[0],
        high=clopper_pearson(wins + ties, images)[1],
        p_permutation=(1 + as_large) / (1 + _PERMUTATIONS),
    )


class Manifold:
    """Balls around the features of real images, which generated images are measured by.

    * precision: share of the generated images that lie in the ball of a real one (Kynkäänniemi et al. 2019, eq. 1, 2);
    * recall: share of the real images that lie in the ball of a generated one (the same);
    * density: in how many balls of real images a generated image lies, on average, over k (Naeem et al. 2020, eq. 5);
    * coverage: share of the real images whose ball holds a generated image (the same, eq. 6).

    Distances are Euclidean, in blocks (scikit-learn); the border belongs to the ball.

    `real` are features of real images [m, d], m > k.
    """

    def __init__(self, real: Features, *, k: int = NEIGHBOURS) -> None:
        require(k >= 1, "k", k, "at least 1")
        require(len(real) > k, "the number of real images", len(real), f"above k = {k}")
        self._k, self._real = k, real
        self._radii = _neighbourhoods(real, k)[0][:, -1]

    def __call__(self, features: Features, scatter: bool = False) -> dict[str, Estimate]:
        """Measure features [n, d], n > k + 1; `scatter`: with the influence of each image on the four figures.

        The influence on precision and density is exact, they being means; that on recall and coverage is the
        jackknife's: (n − 1) times what leaving the image out takes away.
        """
        n, m, k = len(features), len(self._real), self._k
        require(n > k + 1, "the number of generated images", n, f"above k + 1 = {k + 1}")
        # A ball reaches to the k-th neighbour; the jackknife needs the next one too, to which it grows.
        reach, nearest = _neighbourhoods(features, k + 1)
        in_balls = np.empty(n, np.int64)  # of real images, for each generated one
        holds, recalled = _Holders(m), _Holders(m)
        # All four figures follow from one pass over the pairs: generated in a real ball, and real in a generated ball.
        for part, distance in _blocks(features, self._real):
            inside = distance <= self._radii
            in_balls[part] = inside.sum(1)
            holds.add(inside, part.start)
            recalled.add(distance <= reach[part, k - 1, None], part.start)
        gained = self._gained(features, reach, nearest, recalled) if scatter else 0
        within = in_balls > 0
        # Each figure, and what each image adds to it, up to a constant.
        found: dict[str, tuple[float, NDArray[Any]]] = {
            "precision": (within.mean(), within),
            "recall": (recalled.share, (n - 1) / m * (recalled.lost(n) - gained)),
            "density": (in_balls.mean() / k, in_balls / k),
            "coverage": (holds.share, (n - 1) / m * holds.lost(n)),
        }
        most = {"density": np.inf}
        return {
            name: Estimate(
                float(value), f"k = {k}", added - added.mean() if scatter else None, False, 0.0, most.get(name, 1.0)
            )
            for name, (value, added) in found.items()
        }

    def _gained(
        self, made: Features, reach: Features, nearest: NDArray[np.int64], recalled: _Holders
    ) -> NDArray[np.int64]:
        """[n] how many real images are recalled without image j only because balls that ended at or beyond j grow.

        Leaving j out moves the border of each ball that j is among the k neighbours of to the (k + 1)-th.
        """
        k = self._k
        # Others lose no real image by it: those are still in another ball.
        few = np.flatnonzero(recalled.count <= 1)
        found: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
        for part, distance in _blocks(made, self._real[few]):
            # Real images that a ball takes in when it grows from its k-th to its (k + 1)-th neighbour.
            ring = (distance > reach[part, k - 1, None]) & (distance <= reach[part, k, None])
            ball, image = np.nonzero(ring)
            left_out = nearest[part][ball, :k].reshape(-1)
            image = np.repeat(few[image], k)
            # What was in one ball is only missed if that one is left out.
            missed = (recalled.count[image] == 0) | (recalled.last[image] == left_out)
            found.append(np.unique(image[missed] * len(made) + left_out[missed]))
        return np.bincount(np.unique(np.concatenate(found)) % len(made), minlength=len(made))


class _Holders:
    """For each of m real images, how many generated images hold it (or are held by it), and which one was the last."""

    def __init__(self, m: int) -> None:
        self.count, self.last = np.zeros(m, np.int64), np.full(m, -1, np.int64)

    def add(self, relation: NDArray[np.bool_], start: int) -> None:
        """Rows [b, m] of generated images from number `start`."""
        here = relation.sum(0)
        self.count += here
        self.last = np.where(here > 0, start + relation.argmax(0), self.last)

    @property
    def share(self) -> float:
        return float((self.count > 0).mean())

    def lost(self, n: int) -> NDArray[np.int64]:
        """[n] how many real images each generated image is the only one for."""
        return np.bincount(self.last[self.count == 1], minlength=n)


def _blocks(a: Features, b: Features) -> Iterator[tuple[slice, Features]]:
    """Yield squared distances [rows, len(b)] of some rows of a at a time."""
    from sklearn.metrics import euclidean_distances

    # scikit-learn's products are fp64 inside, so features far from the origin lose no digits.
    step = max(1, _BLOCK_BYTES // (4 * max(1, len(b))))
    for start in range(0, len(a) if len(b) else 0, step):
        part = slice(start, min(start + step, len(a)))
        yield part, euclidean_distances(a[part], b, squared=True)


def _neighbourhoods(features: Features, k: int) -> tuple[Features, NDArray[np.int64]]:
    """Squared distances of the k nearest others, nearest first, and which they are: [n, k] each."""
    reach, nearest = np.empty((len(features), k), np.float32), np.empty((len(features), k), np.int64)
    for part, distance in _blocks(features, features):
        i = np.arange(len(distance))
        distance[i, part.start + i] = np.inf
        found = np.argpartition(distance, k - 1, axis=1)[:, :k]
        values = np.take_along_axis(distance, found, 1)
        order = np.argsort(values, axis=1, kind="stable")
        reach[part], nearest[part] = np.take_along_axis(values, order, 1), np.take_along_axis(found, order, 1)
    return reach, nearest
