"""Nearest neighbours in blocks: exact distances, bounded memory, no index to build."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpsyngen.errors import ConfigError

_CANDIDATES = 4  # kept for the exact second look
_BLOCK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Neighbours:
    """The nearest reference of each query.

    Attributes:
        index: int64 [Q], row of the nearest reference; one of them where several are equally near.
        squared: float64 [Q], squared Euclidean distance to it, in units of the given numbers.
    """

    index: NDArray[np.int64]
    squared: NDArray[np.float64]

    @property
    def distance(self) -> NDArray[np.float64]:
        """Euclidean distances [Q]."""
        return np.sqrt(self.squared)

    def take(self, rows: NDArray[np.int64]) -> Neighbours:
        """Those of some of the queries."""
        return Neighbours(self.index[rows], self.squared[rows])


def nearest(
    queries: NDArray[Any],
    references: NDArray[Any],
    *,
    skip: NDArray[np.int64] | None = None,
    block_bytes: int = _BLOCK_BYTES,
) -> Neighbours:
    """The nearest of `references` [N, ...] to each of `queries` [Q, ...], by Euclidean distance.

    Blocks of references are met by matrix products in fp32, ‖r‖² − 2⟨q, r⟩, and the best few are measured again
    without cancellation: in whole numbers for uint8, in fp64 otherwise.  For uint8 of at most 1,024 numbers an image
    the products are exact as well, beyond that neighbours whose distances differ by less than rounding may be swapped.

    Args:
        queries: uint8 or float; further axes are flattened.
        references: the same type and shape of a row; may be a memory map.
        skip: [Q] a row of the references that must not be answered (a query that is itself among them), −1 for none.
        block_bytes: about how much memory a block may take.

    Raises:
        ConfigError: shapes or types that do not fit, or no reference left.
    """
    if queries.shape[1:] != references.shape[1:] or (queries.dtype == np.uint8) != (references.dtype == np.uint8):
        raise ConfigError(
            f"rows of {queries.dtype} {queries.shape[1:]} cannot be compared with {references.dtype} "
            f"{references.shape[1:]}: give images or features of one form."
        )
    if not len(queries) or len(references) < (1 if skip is None else 2):
        raise ConfigError(f"{len(queries)} queries and {len(references)} references: too few to find neighbours.")
    dim = int(np.prod(references.shape[1:]))
    centre = _centre(references)
    rows = max(1, block_bytes // (4 * dim))
    found = [
        _of_block(queries[a : a + rows], references, None if skip is None else skip[a : a + rows], centre, block_bytes)
        for a in range(0, len(queries), rows)
    ]
    return Neighbours(np.concatenate([f.index for f in found]), np.concatenate([f.squared for f in found]))


def _centre(references: NDArray[Any]) -> NDArray[np.float32]:
    """What is subtracted before products are taken; centred numbers lose fewer digits."""
    if references.dtype == np.uint8:
        return np.full(references[0].size, 128, np.float32)
    sample = references[:: max(1, len(references) // 1000)]
    return np.asarray(sample.reshape(len(sample), -1).mean(0), np.float32)


def _flat(rows: NDArray[Any], centre: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(rows).reshape(len(rows), -1).astype(np.float32) - centre


def _of_block(
    queries: NDArray[Any],
    references: NDArray[Any],
    skip: NDArray[np.int64] | None,
    centre: NDArray[np.float32],
    block_bytes: int,
) -> Neighbours:
    q = _flat(queries, centre)
    size = max(_CANDIDATES, block_bytes // (4 * max(q.shape[1], len(q))))
    best = np.full((len(q), 0), np.inf, np.float32)
    where = np.zeros((len(q), 0), np.int64)
    for start in range(0, len(references), size):
        r = _flat(references[start : start + size], centre)
        partial = (r * r).sum(1) - 2 * (q @ r.T)
        if skip is not None:
            inside = (skip >= start) & (skip < start + len(r))
            partial[inside, skip[inside] - start] = np.inf
        if partial.shape[1] > _CANDIDATES:
            columns = np.argpartition(partial, _CANDIDATES - 1, axis=1)[:, :_CANDIDATES]
        else:
            columns = np.broadcast_to(np.arange(partial.shape[1]), partial.shape)
        best = np.concatenate([best, np.take_along_axis(partial, columns, 1)], 1)
        where = np.concatenate([where, columns + start], 1)
        keep = np.argsort(best, axis=1, kind="stable")[:, :_CANDIDATES]
        best, where = np.take_along_axis(best, keep, 1), np.take_along_axis(where, keep, 1)
    exact = np.stack([_squared(queries, references, where[:, k]) for k in range(where.shape[1])], 1)
    exact[~np.isfinite(best)] = np.inf  # skipped, or not a number
    # Equal distances: the lowest row of those looked at, the same in every run.
    order = np.lexsort((where, exact), axis=1)[:, :1]
    return Neighbours(
        np.take_along_axis(where, order, 1)[:, 0].astype(np.int64), np.take_along_axis(exact, order, 1)[:, 0]
    )


def _squared(queries: NDArray[Any], references: NDArray[Any], rows: NDArray[np.int64]) -> NDArray[np.float64]:
    wide = np.int64 if queries.dtype == np.uint8 else np.float64
    out = np.empty(len(queries), np.float64)
    step = max(1, _BLOCK_BYTES // (8 * queries[0].size))
    for a in range(0, len(queries), step):
        part = slice(a, a + step)
        difference = queries[part].astype(wide) - np.asarray(references[rows[part]]).astype(wide)
        out[part] = (difference * difference).reshape(len(difference), -1).sum(1)
    return out
