"""Precision, recall, density and coverage: which images lie in the neighbourhoods of which.

The neighbourhood of an image is the ball that reaches to its k-th nearest image of the same set, itself not counted.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from dpsyngen.errors import ConfigError
from dpsyngen.evaluation.scatter import Estimate

NEIGHBOURS = 5
_BLOCK_BYTES = 64 * 2**20


class Manifold:
    """The balls around features of real images, and what they say of others.

    * precision: share of the generated images that lie in the ball of a real one (Kynkäänniemi et al. 2019, eq. 1, 2);
    * recall: share of the real images that lie in the ball of a generated one (the same);
    * density: in how many balls of real images a generated image lies, on average, over k (Naeem et al. 2020, eq. 5);
    * coverage: share of the real images whose ball holds a generated image (the same, eq. 6).

    Distances are Euclidean, by blocks of matrix products in fp32; the border belongs to the ball.

    Args:
        real: features of real images [m, d], m >= 2.
        k: which neighbour a ball reaches to; of smaller sets the farthest.
        block_bytes: about how much memory a block of distances may take.
    """

    def __init__(self, real: NDArray[np.float32], *, k: int = NEIGHBOURS, block_bytes: int = _BLOCK_BYTES) -> None:
        if k < 1:
            raise ConfigError(f"k is {k}, but must be at least 1.")
        _require_two(real, "real")
        self._k, self._bytes = k, block_bytes
        self._centre = real.mean(0, dtype=np.float64).astype(np.float32)  # centred numbers lose fewer digits
        self._real = real - self._centre
        self._radii: dict[int, NDArray[np.float32]] = {}

    def __call__(self, features: NDArray[np.float32], scatter: bool = False) -> dict[str, Estimate]:
        """The four figures of features [n, d], n >= 2; with the influence of each image if `scatter` is asked for.

        The influence on precision and density is exact, they being means; that on recall and coverage is the
        jackknife's: (n − 1) times what leaving the image out takes away.

        Raises:
            ConfigError: fewer than two images.
        """
        _require_two(features, "generated")
        n, m = len(features), len(self._real)
        k = min(self._k, n - 1, m - 1)
        if k not in self._radii:
            self._radii[k] = _neighbourhoods(self._real, k, self._bytes)[0][:, k - 1]
        real_radii = self._radii[k]
        made = features - self._centre
        reach, nearest = _neighbourhoods(made, k + 1 if scatter and n > k + 1 else k, self._bytes)
        in_balls = np.empty(n, np.int64)  # of real images, for each generated one
        holds, recalled = _Holders(m), _Holders(m)
        for part, distance in _blocks(made, self._real, self._bytes):
            inside = distance <= real_radii
            in_balls[part] = inside.sum(1)
            holds.add(inside, part.start)
            recalled.add(distance <= reach[part, k - 1, None], part.start)
        influence: dict[str, NDArray[np.float64]] = {}
        if scatter:
            influence = {
                "precision": (in_balls > 0) - (in_balls > 0).mean(),
                "density": (in_balls - in_balls.mean()) / k,
                "coverage": _centred((n - 1) / m * holds.lost(n)),
                "recall": _centred((n - 1) / m * (recalled.lost(n) - self._gained(made, reach, nearest, recalled, k))),
            }
        values = {
            "precision": float((in_balls > 0).mean()),
            "recall": recalled.share,
            "density": float(in_balls.mean() / k),
            "coverage": holds.share,
        }
        return {
            name: Estimate(
                value,
                f"k = {k}",
                influence.get(name),
                smallest=0.0,
                largest=np.inf if name == "density" else 1.0,
            )
            for name, value in values.items()
        }

    def _gained(
        self,
        made: NDArray[np.float32],
        reach: NDArray[np.float32],
        nearest: NDArray[np.int64],
        recalled: _Holders,
        k: int,
    ) -> NDArray[np.int64]:
        """[n] how many real images are recalled without image j only because balls that ended at or beyond j grow.

        Leaving j out moves the border of each ball that j is among the k neighbours of to the (k + 1)-th.
        """
        gained = np.zeros(len(made), np.int64)
        if reach.shape[1] == k:
            return gained  # too few images for balls to grow
        # Others lose no real image by it: those are still in another ball.
        few = np.flatnonzero(recalled.count <= 1)
        found: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
        for part, distance in _blocks(made, self._real[few], self._bytes):
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


def _centred(x: NDArray[np.floating]) -> NDArray[np.float64]:
    return np.asarray(x - x.mean(), np.float64)


def _require_two(features: NDArray[np.float32], which: str) -> None:
    if len(features) < 2:
        raise ConfigError(f"there is {len(features)} {which} image, but neighbourhoods need at least 2.")


def _blocks(
    a: NDArray[np.float32], b: NDArray[np.float32], block_bytes: int
) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """Squared distances [rows, len(b)] of some rows of a at a time."""
    squares = np.einsum("ij,ij->i", b, b)
    step = max(1, block_bytes // (4 * max(1, len(b))))
    for start in range(0, len(a), step):
        part = slice(start, min(start + step, len(a)))
        rows = a[part]
        distance = rows @ b.T
        distance *= -2
        distance += np.einsum("ij,ij->i", rows, rows)[:, None]
        distance += squares
        yield part, distance


def _neighbourhoods(
    features: NDArray[np.float32], k: int, block_bytes: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Squared distances of the k nearest others, nearest first, and which they are: [n, k] each."""
    reach, nearest = np.empty((len(features), k), np.float32), np.empty((len(features), k), np.int64)
    for part, distance in _blocks(features, features, block_bytes):
        i = np.arange(len(distance))
        distance[i, part.start + i] = np.inf
        found = np.argpartition(distance, k - 1, axis=1)[:, :k]
        values = np.take_along_axis(distance, found, 1)
        order = np.argsort(values, axis=1, kind="stable")
        reach[part], nearest[part] = np.take_along_axis(values, order, 1), np.take_along_axis(found, order, 1)
    return reach, nearest
