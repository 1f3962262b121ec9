"""Is it Poisson sampling?  Tests of batch sizes and of which records are in which batch.

If each record is in each batch on its own with probability q, batch sizes are independent binomial variables and,
given their sizes, the batches are independent uniform subsets.  Shuffling keeps every batch to its size and every
record to one batch an epoch; a rate that is not q moves the mean; a reused seed repeats a batch; dropped empty batches
leave none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from dpsyngen.audit.findings import Finding, by_p_value

_LONGEST = 1 << 24  # numbers in a distribution that is computed exactly


def check_sizes(sizes: NDArray[np.int64], records: int, rate: float) -> list[Finding]:
    """Whether batch sizes are those of Poisson sampling.

    Args:
        sizes: [T] examples of each step.
        records: number of records present.
        rate: q as claimed, in (0, 1].

    Returns:
        to be judged by :func:`dpsyngen.audit.findings.decide`.
    """
    from scipy.stats import binom

    steps, total = len(sizes), int(sizes.sum())
    mean = records * rate
    spread, p_spread = _dispersion(sizes, records, rate)
    empty, chance = int((sizes == 0).sum()), float((1 - rate) ** records)
    return [
        by_p_value(
            "records are included at the claimed rate",
            f"{total} inclusions in {steps} steps: rate {total / max(steps * records, 1):.5g}",
            f"Binomial({steps * records}, {rate:.5g})",
            _two_sided(binom.cdf(total, steps * records, rate), binom.sf(total - 1, steps * records, rate)),
        ),
        by_p_value(
            "batch sizes vary as Poisson sampling says",
            f"mean squared deviation {spread:.4g}",
            f"that of {steps} draws of Binomial({records}, {rate:.5g}), {mean * (1 - rate):.4g} on average",
            p_spread,
        ),
        by_p_value(
            "empty batches occur and are steps",
            f"{empty} empty of {steps}",
            f"Binomial({steps}, {chance:.3g}); none has probability {(1 - chance) ** steps:.2g}",
            _two_sided(binom.cdf(empty, steps, chance), binom.sf(empty - 1, steps, chance)),
        ),
    ]


def check_batches(batches: Sequence[NDArray[np.int64]], records: int, rate: float) -> list[Finding]:
    """:func:`check_sizes`, and whether the records in the batches are independent between steps.

    Args:
        batches: the records of each step, in the order of the steps; without repetitions.
        records, rate: see :func:`check_sizes`.
    """
    steps = len(batches)
    inside = np.zeros((steps, records), dtype=bool)
    for t, batch in enumerate(batches):
        inside[t, batch] = True
    sizes = np.array([len(b) for b in batches], dtype=np.int64)
    spread, p_spread = _dispersion(inside.sum(0), steps, rate)
    mean = steps * rate
    findings = check_sizes(sizes, records, rate)
    findings.append(
        by_p_value(
            "how often a record is used varies as Poisson sampling says",
            f"mean squared deviation {spread:.4g}",
            f"that of {records} draws of Binomial({steps}, {rate:.5g}), {mean * (1 - rate):.4g} on average",
            p_spread,
        )
    )
    if steps >= 2 and rate < 1:
        findings += _overlaps(inside, sizes, records)
    return findings


def _overlaps(inside: NDArray[np.bool_], sizes: NDArray[np.int64], records: int) -> list[Finding]:
    """Given their sizes, the overlap of two batches is hypergeometric; those of successive pairs are independent."""
    from scipy.stats import hypergeom

    common = inside.astype(np.int64) @ inside.T.astype(np.int64)
    successive = int(np.diagonal(common, 1).sum())
    total = np.ones(1)
    for a, b in pairwise(sizes):
        total = np.convolve(total, hypergeom.pmf(np.arange(min(a, b) + 1), records, a, b))
    first, second = np.triu_indices(len(sizes), 1)
    overlap = common[first, second]
    upper = hypergeom.sf(overlap - 1, records, sizes[first], sizes[second])
    worst = int(np.argmin(upper))
    return [
        by_p_value(
            "successive batches are independent",
            f"{successive} records in a batch and the next",
            "sum of hypergeometric variables, exactly, given the sizes of the batches",
            _two_sided(float(total[: successive + 1].sum()), float(total[successive:].sum())),
        ),
        by_p_value(
            "no batch repeats an earlier one",
            f"steps {first[worst]} and {second[worst]} have {overlap[worst]} records in common, of "
            f"{sizes[first[worst]]} and {sizes[second[worst]]}",
            f"hypergeometric, the largest of {len(upper)} pairs (Bonferroni)",
            float(upper[worst]) * len(upper),
        ),
    ]


def _two_sided(lower: float, upper: float) -> float:
    """Twice the smaller tail."""
    return min(1.0, 2 * min(float(lower), float(upper)))


def _dispersion(values: NDArray[np.int64], trials: int, rate: float) -> tuple[float, float]:
    """Mean squared deviation of `values` from their mean under Binomial(trials, rate), and its two-sided p-value.

    Squares of whole numbers are whole numbers, so the distribution of their sum is computed exactly, as a power of the
    Fourier transform of the distribution of one (rounding leaves some 1e-12 of a probability).
    """
    from scipy.fft import irfft, next_fast_len, rfft
    from scipy.stats import binom

    draws, mean, variance = len(values), trials * rate, trials * rate * (1 - rate)
    centre = round(mean)
    reach = math.ceil(9 * math.sqrt(variance) + 45)  # both tails beyond are below 1e-15 together
    support = np.arange(max(0, centre - reach), min(trials, centre + reach) + 1)
    # Sums so far above the mean have no probability, so that what wraps around is nothing.
    longest = int(draws * (variance + 1) * (1 + 40 * math.sqrt(2 / draws)) + 60 * reach) + 1
    unit = max(1, math.ceil(longest / _LONGEST))
    cost = (support - centre) ** 2 // unit
    pmf = np.bincount(cost, weights=binom.pmf(support, trials, rate))
    size = next_fast_len(min(draws * int(cost.max()), longest // unit + draws) + 2, real=True)
    pmf = np.bincount(np.arange(len(pmf)) % size, weights=pmf, minlength=size)
    total = np.clip(irfft(rfft(pmf) ** draws, size), 0.0, None)
    observed = int(((values - centre) ** 2 // unit).sum())
    figure = float(((values - mean) ** 2).mean())
    if observed >= size:
        return figure, 0.0
    return figure, _two_sided(total[: observed + 1].sum(), total[observed:].sum())
