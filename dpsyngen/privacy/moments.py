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
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from dpsyngen.privacy.noise import fine_normal
from dpsyngen.privacy.randomness import Randomness

_SLACK = 1e-9  # more than fp64 can round away in the norm of a row of a million numbers, and in scaling it
_VECTOR_BITS = 30  # the norm of a row, in steps of its grid, is below 2^31
_SCATTER_BITS = 18  # below 2^19, so an outer product is below 2^38
_PIECE = 1 << 12  # rows at a time: their sum of outer products stays below 2^53, where fp64 is exact
_MOST_RECORDS = 1 << 24  # sums then stay below 2^62
_LARGEST_NOISE = 2.0**58


class Rows(NamedTuple):
    """A batch of records.

    Attributes:
        values: [B, D], one row a record.  Rows that are not finite contribute exactly zero.
        labels: [B], the group of each record; None where there is one group.
        outside: [B], for :func:`scatter_sums`: squared length of the part of each record's vector that ``values``
            leaves out; None where nothing is left out.
    """

    values: Tensor
    labels: Tensor | None = None
    outside: Tensor | None = None


@dataclass(frozen=True)
class VectorSum:
    """A sum over records, in whole steps of a grid, with its sensitivity.

    Formal guarantee: adding or removing one record changes ``isometric`` by at most ``l2_sensitivity`` in L2 norm.
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

    @property
    def isometric(self) -> Tensor:
        """[groups, length] fp64: Gaussian noise of one size in all coordinates is what is added to it.  Private."""
        return self.values * self.weights

    def among(self, sums: Tensor, records: int, not_finite: int) -> VectorSum:
        """The sum over more records, which this is a part of; the sensitivity stays.

        Args:
            sums: int64, of all parts.
            records, not_finite: of all parts.

        Raises:
            ValueError: there are more than 2^24 records in all.
        """
        _check_records(records)
        return replace(self, sums=sums, records=records, not_finite=not_finite)

    def noise_std(self, noise_multiplier: float) -> Tensor:
        """[length], standard deviation of the noise in each coordinate of what :func:`released` returns.  Public."""
        return noise_multiplier * self.l2_sensitivity / self.weights


def class_sums(batches: Iterable[Rows], classes: int, *, norm: float, count_weight: float = 0.0) -> VectorSum:
    """For each class the sum of its rows, each clipped to L2 norm `norm`, and the number of its records.

    Sensitivity: a record belongs to one class.  It adds a row of norm at most `norm` and, in a coordinate of weight w,
    one: √(norm² + w²).  With w = 0 the number is left out.

    Args:
        batches: see :class:`Rows`; labels in 0 .. classes-1, or None where `classes` is 1.
        classes: >= 1.
        norm: clipping norm, > 0.
        count_weight: w >= 0.

    Returns:
        ``sums`` are [classes, D + 1], the number last; [classes, D] without it.

    Raises:
        ValueError: an argument is out of range, or there are more than 2^24 records.
    """
    _check(norm, classes)
    if not (count_weight >= 0 and math.isfinite(count_weight)):
        raise ValueError(f"count_weight is {count_weight}, but must be >= 0 and finite.")
    grid = _power_below(norm) * 2.0**-_VECTOR_BITS
    totals: Tensor | None = None
    counts = torch.zeros(classes, dtype=torch.int64)
    records = dropped = 0
    for batch in batches:
        rows, _, kept = _clipped(batch, norm)
        labels = _labels(batch, classes)
        if totals is None:
            totals = torch.zeros(classes, rows.shape[1], dtype=torch.int64)
        totals.index_add_(0, labels, (rows / grid).trunc_().to(torch.int64))
        counts.index_add_(0, labels, kept.to(torch.int64))
        records, dropped = records + len(rows), dropped + int((~kept).sum())
    if totals is None:
        raise ValueError("there is no batch, so the length of a row is not known: give an empty one, [0, D].")
    _check_records(records)
    length = totals.shape[1]
    grids = torch.full((length,), grid, dtype=torch.float64)
    weights = torch.ones(length, dtype=torch.float64)
    if count_weight == 0:
        return VectorSum(totals, grids, weights, norm, records, dropped)
    one = torch.ones(1, dtype=torch.float64)
    return VectorSum(
        torch.cat([totals, counts[:, None]], 1),
        torch.cat([grids, one]),
        torch.cat([weights, one * count_weight]),
        math.hypot(norm, count_weight),
        records,
        dropped,
    )


def scatter_sums(batches: Iterable[Rows], groups: int, *, norm: float) -> VectorSum:
    """For each group the sum of r rᵀ over its rows r, clipped to L2 norm `norm`: the upper triangle, row by row.

    Off the diagonal the weight is √2, so that the norm of the weighted triangle is the Frobenius norm of the matrix,
    and ‖r rᵀ‖ = ‖r‖² <= norm² is the sensitivity.  Noise has half the variance there that it has on the diagonal.

    Where batches have ``outside``, the whole vector (r, r_out) is clipped to `norm`, and the sum of the ‖r_out‖² is one
    more coordinate: √(‖r‖⁴ + ‖r_out‖⁴) <= ‖r‖² + ‖r_out‖² <= norm², so the sensitivity is the same.

    Args:
        batches: see :class:`Rows`; all or none with ``outside``.
        groups: >= 1.
        norm: clipping norm, > 0.

    Returns:
        ``sums`` are [groups, D(D+1)/2], one more with ``outside``; see :func:`matrices`.

    Raises:
        ValueError: an argument is out of range, or there are more than 2^24 records.
    """
    _check(norm, groups)
    step = _power_below(norm) * 2.0**-_SCATTER_BITS
    totals: Tensor | None = None
    energy = torch.zeros(groups, dtype=torch.int64)
    records = dropped = 0
    with_outside: bool | None = None
    for batch in batches:
        if with_outside not in (None, batch.outside is not None):
            raise ValueError("some batches have `outside` and some have not: give it with all of them or none.")
        with_outside = batch.outside is not None
        rows, outside, kept = _clipped(batch, norm)
        labels = _labels(batch, groups)
        if totals is None:
            totals = torch.zeros(groups, rows.shape[1], rows.shape[1], dtype=torch.int64)
        whole = (rows / step).trunc_()
        for start in range(0, len(whole), _PIECE):
            piece, of = whole[start : start + _PIECE], labels[start : start + _PIECE]
            for group in range(groups):
                part = piece if groups == 1 else piece[of == group]
                totals[group] += (part.mT @ part).to(torch.int64)
        energy.index_add_(0, labels, (outside / step**2).trunc_().to(torch.int64))
        records, dropped = records + len(rows), dropped + int((~kept).sum())
    if totals is None:
        raise ValueError("there is no batch, so the length of a row is not known: give an empty one, [0, D].")
    _check_records(records)
    i, j = torch.triu_indices(totals.shape[1], totals.shape[1])
    sums = totals[:, i, j]
    weights = torch.where(i == j, 1.0, math.sqrt(2.0)).double()
    if with_outside:
        sums = torch.cat([sums, energy[:, None]], 1)
        weights = torch.cat([weights, torch.ones(1, dtype=torch.float64)])
    return VectorSum(sums, torch.full_like(weights, step**2), weights, norm**2, records, dropped)


def released(total: VectorSum, noise_multiplier: float, randomness: Randomness, step: int) -> Tensor:
    """The Gaussian mechanism: the sum with noise N(0, (z·Δ)²) in each coordinate of its isometric form.

    Formal guarantee: one run of the Gaussian mechanism with noise multiplier z, ``Mechanism(1.0, z, 1)``, under
    adding or removing one record.  To be charged before the result is used.

    Args:
        total: the sum; the noise is scaled from its own ``l2_sensitivity``.
        noise_multiplier: z >= 0; 0 adds none (no privacy).
        randomness: the run's secret streams.
        step: number of the query in this run; each has its own noise.

    Returns:
        [groups, length] fp64, on the grid of the sum: coordinate i has noise of standard deviation z·Δ / weights[i].
    """
    if not (noise_multiplier >= 0 and math.isfinite(noise_multiplier)):
        raise ValueError(f"noise_multiplier is {noise_multiplier}, but must be >= 0 and finite.")
    if noise_multiplier == 0:
        return total.values
    std = total.noise_std(noise_multiplier) / total.grid
    if float(std.max()) > _LARGEST_NOISE:
        raise ValueError(
            f"noise_multiplier is {noise_multiplier:.3g}, which leaves the whole numbers that are computed "
            "with: choose a smaller one (a larger ε)."
        )
    normal = torch.from_numpy(fine_normal(randomness, step, total.sums.numel(), "moments")).view(total.sums.shape)
    return (total.sums + normal.mul_(std).round_().to(torch.int64)).double() * total.grid


def matrices(values: Tensor, size: int) -> tuple[Tensor, Tensor | None]:
    """What :func:`released` returns for :func:`scatter_sums`, as matrices.

    Args:
        values: [groups, D(D+1)/2], or one coordinate more.
        size: D.

    Returns:
        [groups, D, D], symmetric; [groups] energies outside, or None.
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


def _clipped(batch: Rows, norm: float) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [B, D] and outside energies [B] after clipping, fp64, and which records were finite, [B]."""
    rows = batch.values.detach().cpu().double()
    zeros = torch.zeros(len(rows), dtype=torch.float64)
    outside = zeros if batch.outside is None else batch.outside.detach().cpu().double().clamp_min(0)
    squares = rows.square().sum(1) + outside
    kept = torch.isfinite(squares)  # squares of finite rows may overflow, too: they are left out as well
    factors = (norm * (1.0 - _SLACK) / squares.sqrt()).clamp_max(1.0)
    rows = torch.where(kept[:, None], rows * factors[:, None], 0.0)
    return rows, torch.where(kept, outside.sqrt().mul(factors).square(), 0.0), kept


def _labels(batch: Rows, groups: int) -> Tensor:
    if batch.labels is None:
        if groups != 1:
            raise ValueError(f"records have no labels, but there are {groups} groups.")
        return torch.zeros(len(batch.values), dtype=torch.int64)
    labels = batch.labels.detach().cpu().to(torch.int64)
    if labels.shape != (len(batch.values),) or (len(labels) and not 0 <= labels.min() <= labels.max() < groups):
        raise ValueError(f"labels must be [{len(batch.values)}], in 0..{groups - 1}.")
    return labels


def _power_below(value: float) -> float:
    """The largest power of two that is not above `value`."""
    return 2.0 ** math.floor(math.log2(value))


def _check(norm: float, groups: int) -> None:
    if not 1e-60 < norm < 1e60:  # squares of it, and of its grid, are ordinary numbers
        raise ValueError(f"norm is {norm}, but must be between 1e-60 and 1e60.")
    if groups < 1:
        raise ValueError(f"{groups} classes or groups were asked for, but at least 1 is needed.")


def _check_records(records: int) -> None:
    if records > _MOST_RECORDS:
        raise ValueError(f"there are {records:,} records, but sums are exact for at most {_MOST_RECORDS:,}.")
