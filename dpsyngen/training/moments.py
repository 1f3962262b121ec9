"""Means and covariances of the private images by the Gaussian mechanism: the coarse stage in closed form.

Three queries over all images (docs/moments.md derives their sensitivities): the sum and number of each class, one
scatter matrix of all residuals in a basis of low frequencies, and one scatter matrix a class in the few directions
that the second query found.  What is made of them is post-processing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dpsyngen.data import ImageDataset
from dpsyngen.diffusion.gaussian import ClassGaussians, GaussianDenoiser
from dpsyngen.diffusion.samplers import to_float
from dpsyngen.diffusion.standalone import LARGEST_DIMENSION
from dpsyngen.distributed import ALONE, Ranks
from dpsyngen.errors import ConfigError, RunError
from dpsyngen.privacy.accounting import Mechanism
from dpsyngen.privacy.ledger import Ledger
from dpsyngen.privacy.moments import Rows, VectorSum, class_sums, matrices, released, scatter_sums
from dpsyngen.privacy.randomness import Randomness
from dpsyngen.training.plan import MomentsPlan, Shape
from dpsyngen.training.spectra import (
    TYPICAL_ENERGY,
    Bands,
    Frequencies,
    denoised_white_covariance,
    noise_edge,
    powers,
    shrink_bands,
    shrink_blocks,
    with_sum,
)

COUNT_WEIGHT = 0.25  # of √D, the norm of an image
RESIDUAL_NORM = 0.5  # of √D
WHITE_NORM = 1.2  # of √d, the root of the mean squared norm of whitened residuals
SMALLEST_VARIANCE = 1e-5
SMALLEST_WHITE_VARIANCE = 0.02

_UNIFORM_REST = 0.1
_ROUND = 5.0  # how far the energy of a band is moved at once
_DIRECTIONS_PER_FOUND = 8
_FEWEST_FREQUENCIES = 64
_NUMBERS_A_BATCH = 1 << 22


class Stopped(Exception):
    """The estimate was given up, because somebody asked for it."""


def scatter_frequencies(noise_multiplier: float, records: int, size: int) -> int:
    """m, in how many of the coarsest frequencies the pooled scatter matrix is released: a rule without data.

    Noise in a matrix of m dimensions hides eigenvalues below s·√(2m), s = R²z/n.  If energy 0.6 R² falls on the
    components like 1/j (the law of natural images: power 1/f², and j ~ f² components up to f), the j-th has
    0.6 R² / (j·H_D), so j*(m) = 0.6 n / (z·H_D·√(2m)) of them show.  m is the least that has room for 8 j*(m) of
    them, clamped to [min(D, 64), min(D, 4096)].

    A noise multiplier z of 0 gives the largest m; n is `records`, D is `size`.
    """
    most = min(size, LARGEST_DIMENSION)
    if noise_multiplier == 0:
        return most
    harmonic = sum(1 / j for j in range(1, size + 1))
    m = (_DIRECTIONS_PER_FOUND * TYPICAL_ENERGY * records / (noise_multiplier * harmonic * math.sqrt(2))) ** (2 / 3)
    return int(min(max(math.ceil(min(m, most)), min(size, _FEWEST_FREQUENCIES)), most))


def estimate_moments(
    dataset: ImageDataset,
    classes: int,
    records: int,
    plan: MomentsPlan,
    randomness: Randomness,
    *,
    rank: int,
    stopped: Callable[[], bool] = lambda: False,
    ranks: Ranks = ALONE,
) -> ClassGaussians:
    """Run the queries and fit a Gaussian to each class.

    Formal guarantee: the result is post-processing of the adaptive composition of ``plan.mechanisms()``, under adding
    or removing one image; charge them before calling.  A function of the key, the data and the plan alone: running it
    again with the same key repeats the noise.

    Args:
        dataset, classes: the private images, and K; with 0 or 1 labels are not looked at.
        records: declared number of records (public).
        plan: of :func:`plan_moments` for as many classes.
        randomness: the run's secret streams; the queries are steps 0, 1 and 2 of its purpose "moments".
        rank: the most directions that are kept, >= 1.
        stopped: asked now and then, in the main process, whether to give up, by raising Stopped.
        ranks: the processes that share the images; sums are of whole numbers, so their number does not show in a bit.

    Raises:
        ConfigError: labels, plan, records or rank do not fit.
    """
    if (classes > 1) != (plan.by_class is not None):
        raise ConfigError(f"the plan of the moments was not made for {classes} classes: see plan_moments.")
    if classes > 1 and classes != dataset.num_classes:
        raise ConfigError(f"moments of {classes} classes were asked for, but the images have {dataset.num_classes}.")
    if records < 1 or rank < 1:
        raise ConfigError(f"records={records} and rank={rank} must both be at least 1.")
    images = _Images(dataset, classes > 1, stopped, ranks)
    sums = _class_sums(images, max(classes, 1), records, plan.mean, randomness)
    # Made of released numbers alone, but another processor may round them otherwise: all go on with the same.
    rough, counts = ranks.from_main((sums.means(), sums.counts))
    basis, variances, rest, spectrum = ranks.from_main(_pooled(images, rough, records, plan.pooled, randomness, rank))
    means = ranks.from_main(sums.means(basis))
    covariances = variances.diag().expand(len(means), -1, -1)
    if plan.by_class is not None:
        whitened = _by_class(images, means, counts, basis / variances.sqrt(), plan.by_class, randomness)
        covariances = variances.sqrt()[:, None] * whitened * variances.sqrt()
    found = means, basis, covariances, rest, spectrum, counts / counts.sum()
    return ClassGaussians(*(t.float().contiguous() for t in found))


class _Images:
    """This process's share of the private images in batches, as rows [B, D] in [-1, 1]."""

    def __init__(self, dataset: ImageDataset, labelled: bool, stopped: Callable[[], bool], ranks: Ranks) -> None:
        self.dataset, self.stopped, self.ranks = dataset, stopped, ranks
        self.share = ranks.share(len(dataset))
        self.shape = (dataset.channels, dataset.resolution, dataset.resolution)
        self.size = math.prod(self.shape)
        self.labels = torch.from_numpy(np.asarray(dataset.labels)) if labelled else None

    def batches(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        step = min(max(_NUMBERS_A_BATCH // self.size, 16), 4096)
        first, last = self.share.start, self.share.stop
        for start in range(first, max(last, first + 1), step):
            stop = min(start + step, last)
            index = np.arange(start, stop)
            labels = None if self.labels is None else self.labels[start:stop]
            yield to_float(torch.from_numpy(self.dataset.batch(index))).flatten(1), labels
            if self.ranks.alone and self.stopped():
                raise Stopped

    def of_all(self, mine: VectorSum) -> VectorSum:
        """The sum over the shares of all processes."""
        if self.ranks.alone:
            return mine
        about = self.ranks.gather((mine.records, mine.not_finite, self.ranks.main and self.stopped()))
        records, not_finite, stopped = zip(*about, strict=True)
        if any(stopped):
            raise Stopped
        return mine.among(self.ranks.sum_everywhere(mine.sums), sum(records), sum(not_finite))

    def residuals(self, means: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Images minus the released mean of their class, fp64."""
        for rows, labels in self.batches():
            yield rows.double() - (means[labels] if labels is not None else means[0]), labels


# --------------------------------------------------------------------------------------------- the three queries


@dataclass(frozen=True)
class _ClassSums:
    """What query 1 tells, in the cosine basis: the mean of all images, and how each class's mean differs from it."""

    frequencies: Frequencies
    pooled: Tensor  # [1, D], denoised
    deviations: Tensor  # [K, D], with noise
    white: Tensor  # [K, 1], variance of their noise in each coefficient
    along_mean: Tensor  # [K, 1], and that of a multiple of `pooled`, from the noise of the number of records
    counts: Tensor  # [K]

    def means(self, basis: Tensor | None = None) -> Tensor:
        """Posterior means of the class means, [K, D].

        With the directions V [D, d] in which images of one class vary, the most first, these are told from noise one by
        one, and rings of frequencies outside them: classes differ much as the images of a class do.
        """
        rings = self.frequencies.rings
        if basis is None:
            found = self._denoised(self.deviations, self.pooled, rings)
        else:
            directions = self.frequencies.transform(basis.mT)  # [d, D], orthonormal
            along, pooled = self.deviations @ directions.mT, self.pooled @ directions.mT
            order = torch.arange(len(directions))  # the j-th as if of radius √j
            inside = self._denoised(along, pooled, Bands(order, order.double().sqrt(), torch.zeros_like(order)))
            left = rings.mean(1 - directions.square().sum(0)).clamp_min(1e-9)  # of white noise, outside them
            outside, pooled = self.deviations - along @ directions, self.pooled - pooled @ directions
            found = self._denoised(outside, pooled, rings, left) + inside @ directions
        return self.frequencies.inverse(self.pooled + found).clamp(-1, 1)

    def _denoised(self, deviations: Tensor, pooled: Tensor, bands: Bands, white: Tensor | float = 1.0) -> Tensor:
        """Of deviations [K, …] in some basis, with `pooled` in it; a band has the share `white` of the white noise."""
        return shrink_bands(deviations, self.white * white + self.along_mean * bands.mean(pooled.square()), bands)


def _class_sums(images: _Images, classes: int, records: int, z: float, randomness: Randomness) -> _ClassSums:
    """Query 1: sums and numbers of records."""
    norm = math.sqrt(images.size)
    weight = COUNT_WEIGHT * norm if classes > 1 else 0.0  # the number of all records is public
    total = images.of_all(class_sums((Rows(*b) for b in images.batches()), classes, norm=norm, count_weight=weight))
    noisy, std = released(total, z, randomness, step=0), total.noise_std(z)
    frequencies = Frequencies(images.shape)
    sums, rings, noise = frequencies.transform(noisy[:, : images.size]), frequencies.rings, float(std[0]) ** 2
    of_mean = torch.full((1, len(rings.radius)), classes * noise / records**2, dtype=torch.float64)
    pooled = shrink_bands(sums.sum(0, keepdim=True) / records, of_mean, rings)
    if classes == 1:
        none, n = torch.zeros(1, 1, dtype=torch.float64), torch.tensor([float(records)], dtype=torch.float64)
        return _ClassSums(frequencies, pooled, torch.zeros_like(pooled), none, none, n)
    counted, count_std = noisy[:, -1:], float(std[-1])
    # A constant below which no number can be told from its noise.
    least = 1 + 2 * count_std
    counts = counted.clamp_min(least)
    # Each class against the mean of all, so that a class of unknown size ends there and not at grey.  The noise of its
    # number goes along the mean of all.
    deviations, inverse = (sums - counted * pooled) / counts, 1 / counts.square()
    # What is divided by a number that is too large looks small, so a hidden one is its posterior mean, (n/K)² being the
    # variance of the prior.
    share = records / classes
    likely = (share + (counted - share) * share**2 / (share**2 + count_std**2)).clamp_min(1)
    number = torch.where(counted > least, counted, likely)[:, 0]
    return _ClassSums(frequencies, pooled, deviations, noise * inverse, count_std**2 * inverse, number)


def _pooled(
    images: _Images, means: Tensor, records: int, z: float, randomness: Randomness, rank: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query 2: directions V [D, d], variances along them [d], and ψ and q [D] of what is outside them."""
    size = images.size
    m = scatter_frequencies(z, records, size)
    frequencies = Frequencies(images.shape)

    def rows() -> Iterator[Rows]:
        for residual, _ in images.residuals(means):
            inside = frequencies.transform(residual, m)
            yield Rows(inside, None, residual.square().sum(1) - inside.square().sum(1))

    total = images.of_all(scatter_sums(rows(), 1, norm=RESIDUAL_NORM * math.sqrt(size)))
    noisy = released(total, z, randomness, step=1) / records
    scatters, outside = matrices(noisy, m)
    scatter, std, most = scatters[0], float(total.noise_std(z)[0]) / records, total.l2_sensitivity
    finer = 0.0 if outside is None else float(outside[0])
    power = powers(scatter.diagonal(), finer, std, frequencies, TYPICAL_ENERGY * most)
    power *= min(1.0, most / float(power.sum()))  # clipped, all is R² at most
    # The estimate: diag(power), and what the scatter matrix says beyond it as far as it can be told from noise.
    estimate = power[:m].diag() + shrink_blocks(scatter - power[:m].diag(), std, frequencies.rings.index[:m], power[:m])
    values, vectors = (t.flip(-1) for t in torch.linalg.eigh(estimate))
    values = with_sum(values, float(power[:m].sum()))
    d = min(rank, max(int((torch.linalg.eigvalsh(scatter) > noise_edge(std, m)).sum()), 1))
    basis = torch.linalg.qr(frequencies.inverse(vectors[:, :d].mT.contiguous()).mT)[0]
    left = frequencies.rings.mean(torch.cat([vectors[:, d:].square() @ values[d:], power[m:]]))
    rest = _profile(frequencies, values, vectors, power[m:])
    return basis, values[:d].clamp_min(SMALLEST_VARIANCE), rest, _spectrum(frequencies, basis, rest, left)


def _profile(frequencies: Frequencies, values: Tensor, vectors: Tensor, finer: Tensor) -> Tensor:
    """ψ [D] with mean 1, as the pixels vary: where nothing ever varies there is to be no grain.

    Of V Λ Vᵀ in the coarsest frequencies, and the variances `finer` of the others.
    """
    size, m = frequencies.size, len(values)
    if size > LARGEST_DIMENSION:  # of which the denoiser takes the mean
        return torch.ones(size, dtype=torch.float64)
    roots = torch.eye(size, dtype=torch.float64)
    roots[:m, :m] = vectors.mT
    variances = torch.cat([values, finer]) @ frequencies.inverse(roots).square()
    return (1 - _UNIFORM_REST) * variances / variances.mean().clamp_min(1e-12) + _UNIFORM_REST


def _spectrum(frequencies: Frequencies, basis: Tensor, rest: Tensor, left: Tensor) -> Tensor:
    """q [D], in the order [C, H, W], with which a band has the variance outside the basis that is `left` [B] to it."""
    bands, mean = frequencies.rings.index, frequencies.rings.mean
    q = left[bands]
    if frequencies.size > LARGEST_DIMENSION:
        share = 1 - frequencies.transform(basis.mT).square().sum(0)  # what P leaves of a frequency
        q *= (left / mean(share * q).clamp_min(1e-15)).clamp(1 / _ROUND, _ROUND)[bands]
    else:
        images = frequencies.inverse(torch.eye(frequencies.size)) * rest.sqrt()
        spread = frequencies.transform(images - (images @ basis) @ basis.mT).square()  # of one frequency to all
        for _ in range(8):  # ψ and P move energy between bands
            q *= (left / mean(q @ spread).clamp_min(1e-15)).clamp(1 / _ROUND, _ROUND)[bands]
    return frequencies.in_order(q[None])[0].clamp_min(SMALLEST_VARIANCE)


def _by_class(
    images: _Images, means: Tensor, counts: Tensor, whitening: Tensor, z: float, randomness: Randomness
) -> Tensor:
    """Query 3: the covariance of each class in units of the pooled one, [K, d, d]."""
    d = whitening.shape[1]
    batches = (Rows(residual @ whitening, labels) for residual, labels in images.residuals(means))
    total = images.of_all(scatter_sums(batches, len(means), norm=WHITE_NORM * math.sqrt(d)))
    scatter, _ = matrices(released(total, z, randomness, step=2), d)
    std, everyone = float(total.noise_std(z)[0]), float(counts.sum())
    # The mean over classes, by frequency, is the identity, so none exceeds one over its frequency.
    return torch.stack(
        [
            denoised_white_covariance(s / n, std / n, least=SMALLEST_WHITE_VARIANCE, most=everyone / n)
            for s, n in zip(scatter, counts.tolist(), strict=True)
        ]
    )


# ------------------------------------------------------------------------------------------------- the phase

MOMENTS = "moments"
"""Name of the phase, and of its queries in the ledger."""


def queries(plan: MomentsPlan, shape: Shape) -> list[tuple[str, Mechanism, float | None]]:
    """What is asked, what it costs and its L2 sensitivity, where that is known before the first answer."""
    size = shape.channels * shape.resolution**2
    counted = 1 + COUNT_WEIGHT**2 if shape.num_classes > 1 else 1.0
    known = [
        ("sum and number of the images of each class", math.sqrt(size * counted)),
        ("scatter matrix of the images around their class means", size * RESIDUAL_NORM**2),
        (f"scatter matrix of each class in the directions found ({WHITE_NORM**2:g} a direction)", None),
    ]
    return [(text, m, bound) for (text, bound), m in zip(known, plan.mechanisms(), strict=False)]


def charged_moments(ledger: Ledger) -> list[Mechanism | None]:
    """The queries that the ledger has; None for one without noise."""
    return [e.mechanism for e in ledger.entries if e.details.get("query") == MOMENTS]


def charge_moments(ledger: Ledger, plan: MomentsPlan, shape: Shape) -> None:
    """Make sure that the ledger has the moments before they are taken; BudgetExceeded if they exceed the target ε.

    A run that was killed in between takes them again, with the same noise: the same result, charged once.  RunError if
    moments of other noise were charged before, so the settings were changed in between.
    """
    wanted, charged = queries(plan, shape), charged_moments(ledger)
    if charged != [m if m.noise_multiplier > 0 else None for _, m, _ in wanted[: len(charged)]]:
        raise RunError("the ledger has moments with another noise: undo the change of settings, or start a new run.")
    for what, mechanism, sensitivity in wanted[len(charged) :]:
        bound = sensitivity if mechanism.noise_multiplier else "unbounded"
        ledger.charge(mechanism, what, query=MOMENTS, **({} if bound is None else {"l2_sensitivity": bound}))


def load_gaussian(path: Path, shape: Shape) -> GaussianDenoiser:
    """The denoiser of released moments; RunError if they are damaged."""
    try:
        moments = ClassGaussians.from_tensors(load_file(path))
        return GaussianDenoiser(moments, (shape.channels, shape.resolution, shape.resolution))
    except (SafetensorError, OSError, ConfigError) as error:
        raise RunError(
            f"{path} is damaged: {str(error).splitlines()[0]}.  Remove it and resume: the same moments are taken "
            "again, with the same noise."
        ) from None
