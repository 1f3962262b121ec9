"""What must be true of every DP-SGD run, tested on a transcript of one: noise, divisor, repeats, sampling, ledger.

The noise that a step added is what it released, times the constant that it should have divided by, minus the sum that
went in.  A transcript keeps figures of it: for all coordinates the squares, tensor by tensor, and the projection on
the sum; the coordinates themselves only for a fixed selection, so that long audits of large networks fit into memory.

Is it Poisson sampling?  If each record is in each batch on its own with probability q, batch sizes are independent
binomial variables and, given their sizes, the batches are independent uniform subsets.  Shuffling keeps every batch to
its size and every record to one batch an epoch; a rate that is not q moves the mean; a reused seed repeats a batch;
dropped empty batches leave none.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.fft import irfft, next_fast_len, rfft
from scipy.stats import beta, binom, chi2, hypergeom

from dpsyngen.audit.report import Finding, by_p_value
from dpsyngen.training.private import StepRecord

_LONGEST = 1 << 24  # numbers in a distribution that is computed exactly

KEPT = 1 << 16
"""Coordinates whose noise is kept, for correlations between steps."""


@dataclass(frozen=True)
class StepTrace:
    """What a transcript keeps of a step."""

    step: int
    chosen: NDArray[np.int64]
    charged: int  # steps that the ledger had when this one was taken
    squares: NDArray[np.float64]  # [tensors] sum of squares of the noise, in units of (z·C)²
    sizes: NDArray[np.int64]  # [tensors] how many coordinates each has
    sum_norm: float  # L2 norm of the clipped sum
    along_sum: float  # the noise's coordinate in the direction of the sum, in units of z·C; NaN for a sum of zero
    noise: NDArray[np.float32]  # [<= KEPT] the selected coordinates of the noise, in units of z·C
    digest: str  # SHA-256 of the bits of the released tensors


class Transcript:
    """Collects steps; give it to the training as its observer.

    `noise_scale` is z·C and `expected_examples` qn, as claimed, both positive; `charged` says how many steps the ledger
    has now.
    """

    def __init__(self, records: int, noise_scale: float, expected_examples: float, charged: Callable[[], int]) -> None:
        self.records, self.noise_scale, self.expected_examples = records, noise_scale, expected_examples
        self.charged = charged
        self.traces: list[StepTrace] = []

    def add(self, record: StepRecord) -> None:
        """Write a step down."""
        digest = hashlib.sha256()
        squares, noises = [], []
        dot = norm = 0.0
        for total, released in zip(record.sums, record.released, strict=True):
            out = released.detach().double().cpu().flatten()
            digest.update(out.numpy().tobytes())
            clean = total.detach().double().cpu().flatten()
            # released = (sum + zC·N(0, I))/qn, so this is N(0, 1) in each coordinate if the claim is true.
            noise = (out * self.expected_examples - clean) / self.noise_scale
            squares.append(float(noise.square().sum()))
            dot += float(noise @ clean)
            norm += float(clean.square().sum())
            noises.append(noise.float())
        norm = math.sqrt(norm)
        sizes = np.array([len(n) for n in noises], dtype=np.int64)
        # The same coordinates in each step, and not in step with the layout of the network.
        kept = torch.cat(noises).numpy()[_selection(int(sizes.sum()), KEPT)]
        along = dot / norm if norm > 0 else math.nan
        books = record.step, record.chosen.copy(), self.charged()
        self.traces.append(StepTrace(*books, np.array(squares), sizes, norm, along, kept, digest.hexdigest()))

    @property
    def distinct(self) -> list[StepTrace]:
        """The last attempt at each step, by number."""
        return [t for _, t in sorted({t.step: t for t in self.traces}.items())]


_SAME = 1e-3
"""Rounding that a repeated step is allowed: of its noise in any coordinate, over z·C, and of its sum, over its norm."""


@lru_cache(maxsize=4)
def _selection(parameters: int, kept: int) -> NDArray[np.int64]:
    return np.sort(np.random.default_rng(0).permutation(parameters)[:kept])


@dataclass(frozen=True)
class Claim:
    """What the ledger says was done: q, z·C and the number of steps charged."""

    sampling_rate: float
    noise_scale: float
    steps: int
    crashed: bool = False  # after a step that was not in a checkpoint, so that steps were repeated


def check_transcript(transcript: Transcript, claim: Claim) -> list[Finding]:
    """Compare what a run did with what it charged; tests among the findings wait for ``report.decide``."""
    steps = transcript.distinct
    if not steps:
        return [Finding("steps were taken", False, "none", f"{claim.steps} steps")]
    return [
        *_books(transcript, claim),
        *_scale(steps),
        *_fresh(steps),
        *_repeats(transcript, claim),
        *check_batches([t.chosen for t in steps], transcript.records, claim.sampling_rate),
    ]


def _books(transcript: Transcript, claim: Claim) -> list[Finding]:
    """Every step is charged, before it is taken, at the noise that is added."""
    numbers = [t.step for t in transcript.distinct]
    late = [t.step for t in transcript.traces if t.charged <= t.step]
    return [
        Finding(
            "steps taken are the steps charged",
            numbers == list(range(claim.steps)),
            f"{len(numbers)} different steps, numbered {numbers[0]} to {numbers[-1]}",
            f"steps 0 to {claim.steps - 1}",
        ),
        Finding(
            "each step is in the ledger before it is taken",
            not late,
            f"{len(late)} of {len(transcript.traces)} were not",
            "none",
            f"steps {late[:5]}" if late else "",
        ),
        # The transcript measures noise in units of what the training means to add; is that what was charged?
        Finding(
            "the ledger charges the noise that is added",
            math.isclose(transcript.noise_scale, claim.noise_scale, rel_tol=1e-9),
            f"standard deviation {transcript.noise_scale:.6g} meant",
            f"{claim.noise_scale:.6g} charged",
        ),
    ]


def _two_sided(lower: Any, upper: Any) -> Any:
    """Two-sided p-values from both tails: twice the smaller one."""
    return np.minimum(1.0, 2 * np.minimum(lower, upper))


def _chi_square(squares: Any, freedom: Any) -> Any:
    """Two-sided p-values of sums of squares of standard normal variables."""
    return _two_sided(chi2.cdf(squares, freedom), chi2.sf(squares, freedom))


def _binomial(name: str, statistic: str, null: str, count: int, trials: int, rate: float) -> Finding:
    """Whether a count is Binomial(trials, rate), two-sided."""
    return by_p_value(
        name, statistic, null, float(_two_sided(binom.cdf(count, trials, rate), binom.sf(count - 1, trials, rate)))
    )


def _smallest(p_values: NDArray[np.float64]) -> tuple[int, float]:
    """Where the smallest of several p-values is, and its Bonferroni p-value."""
    i = int(np.argmin(p_values))
    return i, min(1.0, float(p_values[i]) * len(p_values))


def _scale(steps: list[StepTrace]) -> list[Finding]:
    """The noise has standard deviation z·C in each step, in each tensor, overall and along the sum: chi-square."""
    along = np.array([t.along_sum for t in steps if not math.isnan(t.along_sum)])
    squares = np.stack([t.squares for t in steps])
    sizes = steps[0].sizes
    of_steps, of_tensors = squares.sum(1), squares.sum(0)
    step, p_step = _smallest(_chi_square(of_steps, np.full(len(steps), sizes.sum())))
    tensor, p_tensor = _smallest(_chi_square(of_tensors, sizes * len(steps)))
    freedom = int(sizes.sum()) * len(steps)
    ratio = math.sqrt(of_steps.sum() / freedom)
    return [
        by_p_value(
            "noise has the claimed scale, overall",
            f"{ratio:.5f} of the claimed standard deviation",
            f"chi-square with {freedom} degrees of freedom",
            float(_chi_square(of_steps.sum(), freedom)),
        ),
        by_p_value(
            "noise has the claimed scale in every step",
            f"step {steps[step].step} is farthest off: {math.sqrt(of_steps[step] / sizes.sum()):.5f} of the claimed",
            f"chi-square with {sizes.sum()} degrees of freedom, the farthest of {len(steps)} (Bonferroni)",
            p_step,
        ),
        by_p_value(
            "noise has the claimed scale in every parameter",
            f"tensor {tensor} is farthest off: {math.sqrt(of_tensors[tensor] / sizes[tensor] / len(steps)):.5f} of the "
            "claimed",
            f"chi-square with as many degrees of freedom as coordinates, the farthest of {len(sizes)} (Bonferroni)",
            p_tensor,
        ),
        # What is released is the sum over the constant divisor, plus noise that does not depend on the sum.
        by_p_value(
            "the sum is divided by the constant expected batch",
            f"noise along the sum, squared and added up over {len(along)} steps: {float((along**2).sum()):.4g}",
            f"chi-square with {len(along)} degrees of freedom",
            float(_chi_square(float((along**2).sum()), len(along))) if len(along) else 1.0,
        ),
    ]


def _fresh(steps: list[StepTrace]) -> list[Finding]:
    """Different steps have independent noise.  The squared correlation of two Gaussian vectors is a beta variable."""
    if len(steps) < 2:
        return []
    noise = np.stack([t.noise for t in steps]).astype(np.float64)
    d = noise.shape[1]
    norms = np.linalg.norm(noise, axis=1)
    # A step without noise has norm 0 here; the tests of scale find it.
    correlation = noise @ noise.T / np.maximum(np.outer(norms, norms), 1e-300)
    first, second = np.triu_indices(len(steps), 1)
    r = correlation[first, second]
    worst, p = _smallest(beta.sf(np.minimum(r**2, 1.0), 0.5, (d - 1) / 2))
    a, b = steps[first[worst]].step, steps[second[worst]].step
    return [
        by_p_value(
            "noise of different steps is uncorrelated",
            f"largest correlation {r[worst]:.4g}, of steps {a} and {b}",
            f"r² ~ Beta(1/2, {(d - 1) / 2:g}), the largest of {len(r)} pairs (Bonferroni)",
            p,
        )
    ]


def _repeats(transcript: Transcript, claim: Claim) -> list[Finding]:
    """A step that is taken again after a crash is the same step: an attacker learns nothing from the second one."""
    first: dict[int, StepTrace] = {}
    again = [(first[t.step], t) for t in transcript.traces if first.setdefault(t.step, t) is not t]
    if not claim.crashed and not again:
        return []

    def same(a: StepTrace, b: StepTrace) -> bool:
        return (
            np.array_equal(a.chosen, b.chosen)
            and a.noise.shape == b.noise.shape
            and float(np.abs(a.noise - b.noise).max(initial=0.0)) <= _SAME
            and abs(a.sum_norm - b.sum_norm) <= _SAME * max(a.sum_norm, 1e-12)
        )

    different = [b.step for a, b in again if not same(a, b)]
    return [
        Finding(
            "a step that is repeated after a crash is the same step",
            bool(again) and not different,
            f"{len(again)} steps were repeated, {len(different)} of them with other records or other noise; "
            f"{sum(a.digest == b.digest for a, b in again)} to the last bit",
            "all of them the same, at least one repeated",
            f"steps {different[:5]}" if different else "",
        )
    ]


# ------------------------------------------------------------------------------------------- Poisson sampling


def check_sizes(sizes: NDArray[np.int64], records: int, rate: float) -> list[Finding]:
    """Whether the batch sizes [T] are those of Poisson sampling from the records present at rate q, in (0, 1]."""
    steps, total = len(sizes), int(sizes.sum())
    empty, chance = int((sizes == 0).sum()), float((1 - rate) ** records)
    return [
        _binomial(
            "records are included at the claimed rate",
            f"{total} inclusions in {steps} steps: rate {total / max(steps * records, 1):.5g}",
            f"Binomial({steps * records}, {rate:.5g})",
            total,
            steps * records,
            rate,
        ),
        _spread("batch sizes vary as Poisson sampling says", sizes, records, rate),
        _binomial(
            "empty batches occur and are steps",
            f"{empty} empty of {steps}",
            f"Binomial({steps}, {chance:.3g}); none has probability {(1 - chance) ** steps:.2g}",
            empty,
            steps,
            chance,
        ),
    ]


def _spread(name: str, values: NDArray[np.int64], trials: int, rate: float) -> Finding:
    """Whether values vary as draws of Binomial(trials, rate) do."""
    spread, p = _dispersion(values, trials, rate)
    null = f"that of {len(values)} draws of Binomial({trials}, {rate:.5g}), {trials * rate * (1 - rate):.4g} on average"
    return by_p_value(name, f"mean squared deviation {spread:.4g}", null, p)


def check_batches(batches: Sequence[NDArray[np.int64]], records: int, rate: float) -> list[Finding]:
    """:func:`check_sizes`, and whether the records in the batches are independent between steps."""
    steps = len(batches)
    inside = np.zeros((steps, records), dtype=bool)
    for t, batch in enumerate(batches):
        inside[t, batch] = True
    sizes = inside.sum(1)
    used = _spread("how often a record is used varies as Poisson sampling says", inside.sum(0), steps, rate)
    findings = [*check_sizes(sizes, records, rate), used]
    if steps >= 2 and rate < 1:
        findings += _overlaps(inside, sizes, records)
    return findings


def _overlaps(inside: NDArray[np.bool_], sizes: NDArray[np.int64], records: int) -> list[Finding]:
    """Given their sizes, the overlap of two batches is hypergeometric; those of successive pairs are independent."""
    common = inside.astype(np.int64) @ inside.T.astype(np.int64)
    successive = int(np.diagonal(common, 1).sum())
    # The distribution of the sum over successive pairs is the convolution of theirs.
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
            float(_two_sided(total[: successive + 1].sum(), total[successive:].sum())),
        ),
        by_p_value(
            "no batch repeats an earlier one",
            f"steps {first[worst]} and {second[worst]} have {overlap[worst]} records in common, of "
            f"{sizes[first[worst]]} and {sizes[second[worst]]}",
            f"hypergeometric, the largest of {len(upper)} pairs (Bonferroni)",
            float(upper[worst]) * len(upper),
        ),
    ]


def _dispersion(values: NDArray[np.int64], trials: int, rate: float) -> tuple[float, float]:
    """Mean squared deviation of `values` from their mean under Binomial(trials, rate), and its two-sided p-value.

    Squares of whole numbers are whole numbers, so the distribution of their sum is computed exactly, as a power of the
    Fourier transform of the distribution of one (rounding leaves some 1e-12 of a probability).
    """
    draws, mean, variance = len(values), trials * rate, trials * rate * (1 - rate)
    # Only a range around the mean is computed, in units that keep the transform within _LONGEST numbers.
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
    return figure, float(_two_sided(total[: observed + 1].sum(), total[observed:].sum()))
