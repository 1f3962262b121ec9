"""Sums of vectors and of their outer products over all records, released once by the Gaussian mechanism.

Each record contributes one clipped vector or matrix to the sum of its group; every record is used (sampling rate 1),
and a query costs what one run of the Gaussian mechanism costs, ``Mechanism(1.0, z, 1)``.

All sums are of whole numbers: a clipped row is rounded towards zero to multiples of a power of two, so that the bound
on what one record contributes is a bound on integers, and the sum is the same in any order and number of batches.
The noise is rounded to the same grid, which is rounding (sum + noise): post-processing.  So no low digit of the sum
shows through the noise, as it does in a floating-point sum (Mironov, CCS 2012).  The sampler itself is that of
:mod:`dpsyngen.privacy.noise`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from dpsyngen.errors import require
from dpsyngen.privacy.noise import fine_normal
from dpsyngen.privacy.randomness import Randomness

_SLACK = 1e-9  # more than fp64 can round away in the norm of a row of a million numbers, and in scaling it
_VECTOR_BITS = 30  # the norm of a row, in steps of its grid, is below 2^31
_SCATTER_BITS = 18  # below 2^19, so an outer product is below 2^38
_PIECE = 1 << 12  # rows at a time: their sum of outer products stays below 2^53, where fp64 is exact
_MOST_RECORDS = 1 << 24  # sums then stay below 2^62
_LARGEST_NOISE = 2.0**58
LARGEST_MULTIPLIER = 1 << 19
"""z of a query, whose noise is then at most 2^57 steps of the grid; see :func:`released`."""


class Rows(NamedTuple):
    """A batch of records: one row each, and for :func:`scatter_sums` the squared length of what the row leaves out."""

    values: Tensor  # [B, D]; rows that are not finite contribute exactly zero
    labels: Tensor | None = None  # [B], the group of each record; None where there is one group
    outside: Tensor | None = None  # [B]


@dataclass(frozen=True)
class VectorSum:
    """A sum over records, in whole steps of a grid, with its sensitivity.

    Formal guarantee: adding or removing one record changes its *isometric form*, ``values`` times ``weights``, to which
    noise of one size is added in all coordinates, by at most ``l2_sensitivity`` in L2 norm.
    This is a statement about whole numbers and holds exactly, as long as there are no more than 2^24 records.

    Attributes:
        sums: int64 [groups, length].
        grid: [length] fp64, what 1 stands for in each coordinate; powers of two.
        weights: [length] fp64, by what each coordinate is multiplied before norms are taken.
        l2_sensitivity: Δ.
        records: how many went in.  Private.
        not_finite: how many of them contribute zero because they were not finite.  Private.
    """

    sums: Tensor
    grid: Tensor
    weights: Tensor
    l2_sensitivity: float
    records: int
    not_finite: int

    @property
    def values(self) -> Tensor:
        """[groups, length] fp64, the sums themselves.  Private."""
        return self.sums.double() * self.grid

    def among(self, sums: Tensor, records: int, not_finite: int) -> VectorSum:
        """The sum over more records, of which this is a part: `sums` (int64) and counts of all parts."""
        check_records(records)
        return replace(self, sums=sums, records=records, not_finite=not_finite)

    def noise_std(self, noise_multiplier: float) -> Tensor:
        """[length], standard deviation of the noise in each coordinate of what :func:`released` returns.  Public."""
        return noise_multiplier * self.l2_sensitivity / self.weights


def class_sums(batches: Iterable[Rows], classes: int, *, norm: float, count_weight: float = 0.0) -> VectorSum:
    """For each class the sum of its rows, each clipped to L2 norm `norm`, and the number of its records.

    Sensitivity: a record belongs to one class.  It adds a row of norm at most `norm` and, in a coordinate of weight w,
    one: √(norm² + w²).  With w = 0 the number is left out.

    `batches`, one at least, have labels in 0 .. classes-1, or None where `classes` is 1.  ``sums`` are
    [classes, D + 1], the number last; [classes, D] without it.  At most 2^24 records.
    """
    require(count_weight >= 0 and math.isfinite(count_weight), "count_weight", count_weight, ">= 0 and finite")
    clipped = _Clipped(batches, classes, norm)
    grid = _power_below(norm) * 2.0**-_VECTOR_BITS
    counts, totals = torch.zeros(classes, dtype=torch.int64), torch.zeros(0)
    for rows, _, kept, labels in clipped:
        if not len(totals):
            totals = torch.zeros(classes, rows.shape[1], dtype=torch.int64)
        totals.index_add_(0, labels, (rows / grid).trunc_().to(torch.int64))
        counts.index_add_(0, labels, kept.to(torch.int64))
    length = totals.shape[1]
    grids, weights = torch.full((length,), grid, dtype=torch.float64), torch.ones(length, dtype=torch.float64)
    sensitivity = norm
    if count_weight > 0:
        one = torch.ones(1, dtype=torch.float64)
        totals = torch.cat([totals, counts[:, None]], 1)
        grids, weights = torch.cat([grids, one]), torch.cat([weights, one * count_weight])
        sensitivity = math.hypot(norm, count_weight)
    return VectorSum(totals, grids, weights, sensitivity, clipped.records, clipped.not_finite)


def scatter_sums(batches: Iterable[Rows], groups: int, *, norm: float) -> VectorSum:
    """For each group the sum of r rᵀ over its rows r, clipped to L2 norm `norm`: the upper triangle, row by row.

    Off the diagonal the weight is √2, so that the norm of the weighted triangle is the Frobenius norm of the matrix,
    and ‖r rᵀ‖ = ‖r‖² <= norm² is the sensitivity.  Noise has half the variance there that it has on the diagonal.

    Where batches have ``outside``, the whole vector (r, r_out) is clipped to `norm`, and the sum of the ‖r_out‖² is one
    more coordinate: √(‖r‖⁴ + ‖r_out‖⁴) <= ‖r‖² + ‖r_out‖² <= norm², so the sensitivity is the same.

    `batches`, one at least, have ``outside`` all or none.  ``sums`` are [groups, D(D+1)/2], one more with ``outside``;
    see :func:`matrices`.  At most 2^24 records.
    """
    clipped = _Clipped(batches, groups, norm)
    step = _power_below(norm) * 2.0**-_SCATTER_BITS
    energy, totals = torch.zeros(groups, dtype=torch.int64), torch.zeros(0)
    for rows, outside, _, labels in clipped:
        if not len(totals):
            totals = torch.zeros(groups, rows.shape[1], rows.shape[1], dtype=torch.int64)
        whole = (rows / step).trunc_()
        for start in range(0, len(whole), _PIECE):
            piece, of = whole[start : start + _PIECE], labels[start : start + _PIECE]
            for group in of.unique().tolist():  # of thousands of classes a piece has few
                part = piece if groups == 1 else piece[of == group]
                totals[group] += (part.mT @ part).to(torch.int64)
        energy.index_add_(0, labels, (outside / step**2).trunc_().to(torch.int64))
    i, j = torch.triu_indices(totals.shape[1], totals.shape[1])
    sums = totals[:, i, j]
    weights = torch.where(i == j, 1.0, math.sqrt(2.0)).double()
    if clipped.with_outside:
        sums = torch.cat([sums, energy[:, None]], 1)
        weights = torch.cat([weights, torch.ones(1, dtype=torch.float64)])
    grids = torch.full_like(weights, step**2)
    return VectorSum(sums, grids, weights, norm**2, clipped.records, clipped.not_finite)


def released(total: VectorSum, noise_multiplier: float, randomness: Randomness, step: int) -> Tensor:
    """The Gaussian mechanism: the sum with noise N(0, (z·Δ)²) in each coordinate of its isometric form.

    Formal guarantee: one run of the Gaussian mechanism with noise multiplier z, ``Mechanism(1.0, z, 1)``, under
    adding or removing one record.  To be charged before the result is used.

    Args:
        total: the sum; the noise is scaled from its own ``l2_sensitivity``.
        noise_multiplier: z >= 0; 0 adds none (no privacy).
        randomness, step: the run's secret streams, and the number of the query: each has its own noise.

    Returns:
        [groups, length] fp64, on the grid of the sum: coordinate i has noise of standard deviation z·Δ / weights[i].
    """
    ok = noise_multiplier >= 0 and math.isfinite(noise_multiplier)
    require(ok, "noise_multiplier", noise_multiplier, ">= 0 and finite")
    if noise_multiplier == 0:
        return total.values
    std = total.noise_std(noise_multiplier) / total.grid
    if float(std.max()) > _LARGEST_NOISE:
        raise ValueError(
            f"noise_multiplier is {noise_multiplier:.3g}, which leaves the whole numbers that are computed "
            "with: choose a smaller one (a larger ε)."
        )
    # round(sum + noise) = sum + round(noise) on the grid of the sum: rounding is post-processing.
    normal = torch.from_numpy(fine_normal(randomness, step, total.sums.numel(), "moments")).view(total.sums.shape)
    return (total.sums + normal.mul_(std).round_().to(torch.int64)).double() * total.grid


def matrices(values: Tensor, size: int) -> tuple[Tensor, Tensor | None]:
    """What :func:`released` returns for :func:`scatter_sums`, as matrices.

    `values` are [groups, D(D+1)/2], or one coordinate more; the result is [groups, D, D], symmetric, and [groups]
    energies outside, or None.
    """
    triangle = size * (size + 1) // 2
    if values.shape[1] not in (triangle, triangle + 1):
        raise ValueError(f"{values.shape[1]} coordinates are no triangle of a {size}×{size} matrix ({triangle}).")
    i, j = torch.triu_indices(size, size)
    out = values.new_zeros(len(values), size, size)
    out[:, i, j] = values[:, :triangle]
    out[:, j, i] = values[:, :triangle]
    return out, values[:, triangle] if values.shape[1] > triangle else None


# ------------------------------------------------------------------------------------------------------- clipping


class _Clipped:
    """Batches after clipping, one after the other; counts what went in.

    ======================================  =======================================================
    a record                                adds
    ======================================  =======================================================
    that is not finite, or whose square     exactly zero; counted in ``records`` and ``not_finite``
    overflows
    in an empty batch [0, D]                nothing; the batch says how long a row is
    ======================================  =======================================================
    """

    def __init__(self, batches: Iterable[Rows], groups: int, norm: float) -> None:
        # So that squares of the norm, and of its grid, are ordinary numbers.
        require(1e-60 < norm < 1e60, "norm", norm, "between 1e-60 and 1e60")
        require(groups >= 1, "the number of classes or groups", groups, "at least 1")
        self.batches, self.groups, self.norm = batches, groups, norm
        self.records = self.not_finite = 0
        self.with_outside: bool | None = None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Rows [B, D] and energies outside [B] after clipping, fp64; which records are finite; their labels [B]."""
        for batch in self.batches:
            if self.with_outside not in (None, batch.outside is not None):
                raise ValueError("some batches have `outside` and some have not: give it with all of them or none.")
            self.with_outside = batch.outside is not None
            rows = batch.values.detach().cpu().double()
            zeros = torch.zeros(len(rows), dtype=torch.float64)
            outside = zeros if batch.outside is None else batch.outside.detach().cpu().double().clamp_min(0)
            # r · min(1, norm/‖r‖) in fp64, with a slack that covers its rounding.
            squares = rows.square().sum(1) + outside
            kept = torch.isfinite(squares)
            factors = (self.norm * (1.0 - _SLACK) / squares.sqrt()).clamp_max(1.0)
            rows = torch.where(kept[:, None], rows * factors[:, None], 0.0)
            outside = torch.where(kept, outside.sqrt().mul(factors).square(), 0.0)
            self.records, self.not_finite = self.records + len(rows), self.not_finite + int((~kept).sum())
            yield rows, outside, kept, self._labels(batch)
        if self.with_outside is None:
            raise ValueError("there is no batch, so the length of a row is not known: give an empty one, [0, D].")
        check_records(self.records)

    def _labels(self, batch: Rows) -> Tensor:
        if batch.labels is None:
            require(self.groups == 1, "the number of groups", self.groups, "1 where records have no labels")
            return torch.zeros(len(batch.values), dtype=torch.int64)
        labels = batch.labels.detach().cpu().to(torch.int64)
        count, last = len(batch.values), self.groups - 1
        if labels.shape != (count,) or (count and not 0 <= labels.min() <= labels.max() <= last):
            raise ValueError(f"labels must be [{count}], in 0..{last}.")
        return labels


def _power_below(value: float) -> float:
    """The largest power of two that is not above `value`."""
    return 2.0 ** math.floor(math.log2(value))


def check_records(records: int) -> None:
    """Raise ConfigError beyond 2²⁴ records, up to which sums are exact."""
    require(records <= _MOST_RECORDS, "the number of records", f"{records:,}", f"at most {_MOST_RECORDS:,}")
