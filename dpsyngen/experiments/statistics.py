"""What a difference between variants is worth, given its spread over seeds.

The unit is a run: its noise, its starting weights and its programs are drawn anew for each seed.  Runs that share a
seed share the start and the sampling noise but not the DP noise, which dominates, so runs are taken as independent.
Where sharing makes them alike, the test below only becomes more careful.

The test is Welch's t test (Welch 1947), because spreads differ between variants, and Holm's correction (Holm 1979)
holds the chance of *any* false alarm in a family of comparisons at 5 %.  Tests that pool spreads (Tukey, Dunnett) or
use the studentised range with Welch's degrees of freedom (Games-Howell) are more powerful on paper, but with three
seeds and unequal spreads their false alarms exceed 5 %: tests/experiments/test_statistics.py has the simulation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import Literal, NamedTuple

import numpy as np

LEVEL = 0.05
"""Chance of any false alarm in a family of comparisons; intervals have confidence 1 - LEVEL."""

Better = Literal["lower", "higher"]
Verdict = Literal["better", "worse", "not shown", "not tested"]


class Summary(NamedTuple):
    """Number, mean and sample standard deviation (n - 1; None for one seed) of a variant's values over its seeds."""

    n: int
    mean: float
    sd: float | None


@dataclass(frozen=True)
class Comparison:
    """The difference of the means of two variants, first - second.

    Attributes:
        low, high, p: 95 % confidence interval (Welch) and two-sided p of this comparison alone; None without a test.
        p_corrected: by Holm, for all comparisons of the family.
        family: number of comparisons in the family.
    """

    first: str
    second: str
    n_first: int
    n_second: int
    difference: float
    low: float | None
    high: float | None
    p: float | None
    p_corrected: float | None
    family: int
    better: Better

    @property
    def verdict(self) -> Verdict:
        """Of `first` against `second`."""
        if self.p_corrected is None:
            return "not tested"
        if self.p_corrected > LEVEL:
            return "not shown"
        return "better" if (self.difference > 0) == (self.better == "higher") else "worse"

    @property
    def reason(self) -> str:
        """Why nothing was shown or tested; "" where something was shown."""
        if self.verdict == "not tested":
            if min(self.n_first, self.n_second) > 1:
                return "the values do not vary over seeds, so there is nothing to judge the difference by"
            which = "one seed each" if self.n_first == self.n_second else "a variant with one seed"
            return f"{which} cannot show a difference"
        if self.verdict == "not shown":
            text = f"no difference shown with {seeds_in_words(self.n_first, self.n_second)}"
            if self.p is not None and self.p <= LEVEL:
                text += f" once {self.family} comparisons are allowed for"
            return text
        return ""


def seeds_in_words(first: int, second: int) -> str:
    """ "3 seeds", or "3 and 2 seeds"."""
    return f"{first} seeds" if first == second else f"{first} and {second} seeds"


def summarise(values: Sequence[float]) -> Summary:
    """Summarise values over seeds; ValueError if there are none.

    >>> summarise([1.0, 2.0, 3.0])
    Summary(n=3, mean=2.0, sd=1.0)
    """
    if not len(values):
        raise ValueError("there are no values to summarise")
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Summary(len(values), float(np.mean(values)), sd)


def holm(p: Sequence[float]) -> list[float]:
    """p values corrected for their number by Holm's step-down method, in the given order.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    # Six lines of ours: statsmodels, which has it, would be one more large dependency.
    out = [0.0] * len(p)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        highest = max(highest, min(1.0, (len(p) - rank) * p[index]))
        out[index] = highest
    return out


def compare(
    pairs: Sequence[tuple[str, str]], groups: Mapping[str, Sequence[float]], better: Better
) -> list[Comparison]:
    """A family of comparisons, corrected together.

    `pairs` are (first, second) names in `groups`, which holds the values over seeds of each variant.

    Guarantee: if no two of the compared means differ in truth and runs are independent and near normal, the chance
    that any comparison is said to differ is at most 5 %, whatever the spreads.  For any pattern of true differences
    the same holds of the comparisons that do not differ.
    """
    tested = [_welch(groups[a], groups[b]) for a, b in pairs]
    numbers = [i for i, t in enumerate(tested) if t is not None]
    corrected = dict(zip(numbers, holm([t[0] for t in tested if t is not None]), strict=True))
    out = []
    for i, ((a, b), test) in enumerate(zip(pairs, tested, strict=True)):
        difference = float(np.mean(groups[a]) - np.mean(groups[b]))
        p, low, high = (None, None, None) if test is None else test
        n = len(groups[a]), len(groups[b])
        out.append(Comparison(a, b, *n, difference, low, high, p, corrected.get(i), len(numbers), better))
    return out


def best_of(groups: Mapping[str, Sequence[float]], better: Better) -> str:
    """The name with the best mean; of equals, the first."""
    sign = 1 if better == "higher" else -1
    return max(groups, key=lambda name: sign * float(np.mean(groups[name])))


def against_best(groups: Mapping[str, Sequence[float]], better: Better) -> list[Comparison]:
    """Each variant against the one with the best mean.

    Which is best is read off the same values, so the family is *all* pairs: only so is the chance of a false alarm
    held whichever turns out best.
    """
    names = list(groups)
    best = best_of(groups, better)
    pairs = [(a, b) for i, b in enumerate(names) for a in names[i + 1 :]]
    pairs = [(b, a) if a == best else (a, b) for a, b in pairs]
    return [c for c in compare(pairs, groups, better) if c.second == best]


def _welch(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float] | None:
    """(p, low, high) of mean(a) - mean(b); None where the values do not allow a test."""
    from scipy import stats

    if len(a) < 2 or len(b) < 2:
        return None
    u, v = float(np.var(a, ddof=1)) / len(a), float(np.var(b, ddof=1)) / len(b)
    error = math.sqrt(u + v)
    # Equal values leave rounding errors of the mean behind.
    if error <= 1e-12 * float(np.abs([*a, *b]).max()):
        return None
    # Welch's degrees of freedom; stats.ttest_ind gives the same and takes a millisecond for each of thousands of pairs.
    freedom = (u + v) ** 2 / (u**2 / (len(a) - 1) + v**2 / (len(b) - 1))
    difference = float(np.mean(a) - np.mean(b))
    low, high = stats.t.interval(1 - LEVEL, freedom, loc=difference, scale=error)
    return float(2 * stats.t.sf(abs(difference) / error, freedom)), float(low), float(high)


# --------------------------------------------------------------------------------------------------- digits


def decimals_for(spread: float) -> int:
    """Digits after the point for a figure with a standard deviation of `spread`; negative: round to tens, ….

    The rule of the Particle Data Group: two digits of the spread if they are 10 to 35, else one.

    >>> [decimals_for(s) for s in (0.123, 0.5, 4.2, 42.0, 0.98)]
    [2, 1, 0, -1, 1]
    """
    exponent = math.floor(math.log10(spread))
    leading = round(spread / 10.0 ** (exponent - 2))  # three digits
    if leading > 949:
        return -exponent
    return 1 - exponent if leading <= 354 else -exponent


def number(value: float, decimals: int, sign: bool = False) -> str:
    """A figure with a true minus sign.

    >>> number(-1234.5, -1), number(2.0, 1, sign=True)
    ('−1,230', '+2.0')
    """
    rounded = round(value, decimals) + 0.0  # no minus zero
    return f"{rounded:{'+' if sign else ''},.{max(0, decimals)}f}".replace("-", "−")


def column_decimals(summaries: Sequence[Summary], intervals: Sequence[float] = ()) -> int:
    """The digits of a column: those of its median spread; where there is one seed, of the half widths of single runs'
    `intervals`, or of the values.
    """
    spreads = [s.sd for s in summaries if s.sd] or [w / 2 for w in intervals if w > 0]
    if spreads:
        return decimals_for(median_low(spreads))
    largest = max((abs(s.mean) for s in summaries), default=0.0)
    return 2 if largest == 0 else 2 - math.floor(math.log10(largest))


def mean_text(s: Summary, decimals: int) -> str:
    """ "63.4 ± 1.2"."""
    return number(s.mean, decimals) + ("" if s.sd is None else f" ± {number(s.sd, decimals)}")


def p_text(p: float) -> str:
    """ "0.031", or "< 0.001", never 0."""
    return "< 0.001" if p < 0.001 else f"{p:.2g}" if p < 0.995 else "1"


def difference_decimals(c: Comparison) -> int:
    if c.low is None or c.high is None:
        return 2 if c.difference == 0 else max(0, 2 - math.floor(math.log10(abs(c.difference))))
    return decimals_for((c.high - c.low) / 4)
