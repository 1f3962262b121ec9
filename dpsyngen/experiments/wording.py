"""How figures and differences are worded: digits by spread, and sentences that say no more than was shown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from dpsyngen.experiments.measures import Measure, View
from dpsyngen.experiments.statistics import (
    Comparison,
    Summary,
    against_baselines,
    against_best,
    best_of,
    seeds_in_words,
    summarise,
)


@dataclass(frozen=True)
class Answer:
    """What the experiment says at one ε.

    Attributes:
        epsilon: ε.
        headline: which variant did best, and whether that means anything.
        lines: each variant against its baseline, in one sentence each.
    """

    epsilon: float
    headline: str
    lines: tuple[str, ...]


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
    """The digits of a column: those of its median spread; of intervals or of the values where there is one seed.

    Args:
        summaries: of the column's rows.
        intervals: half widths of 95 % intervals of single runs.
    """
    spreads = [s.sd for s in summaries if s.sd] or [w / 2 for w in intervals if w > 0]
    if spreads:
        return decimals_for(statistics.median_low(spreads))
    largest = max((abs(s.mean) for s in summaries), default=0.0)
    return 2 if largest == 0 else 2 - math.floor(math.log10(largest))


def mean_text(s: Summary, decimals: int) -> str:
    """ "63.4 ± 1.2"."""
    return number(s.mean, decimals) + ("" if s.sd is None else f" ± {number(s.sd, decimals)}")


def p_text(p: float) -> str:
    """ "0.031", or "< 0.001", never 0."""
    return "< 0.001" if p < 0.001 else f"{p:.2g}" if p < 0.995 else "1"


def comparison_text(c: Comparison, measure: Measure) -> str:
    """ "Cleaning is better than DPDM by 2.1 points (95 % CI 0.4 to 3.8)", or what was not shown and why."""
    unit = measure.difference_unit
    if c.low is None or c.high is None:
        return f"{c.first} against {c.second}: {number(c.difference, difference_decimals(c), True)}{unit}; {c.reason}"
    digits = difference_decimals(c)
    if c.verdict == "not shown":
        interval = f"95 % CI {number(c.low, digits)} to {number(c.high, digits)}"
        return f"{c.first} against {c.second}: {number(c.difference, digits, True)}{unit}, {interval}: {c.reason}"
    low, high = sorted((abs(c.low), abs(c.high)))
    by = f"by {number(abs(c.difference), digits)}{unit} (95 % CI {number(low, digits)} to {number(high, digits)})"
    return f"{c.first} is {c.verdict} than {c.second} {by}"


def difference_decimals(c: Comparison) -> int:
    if c.low is None or c.high is None:
        return 2 if c.difference == 0 else max(0, 2 - math.floor(math.log10(abs(c.difference))))
    return decimals_for((c.high - c.low) / 4)


def answers(view: View) -> list[Answer]:
    """The answer of the primary measure at each ε; [] if nothing was measured."""
    measure = view.primary
    out = []
    for epsilon in view.epsilons if measure is not None else ():
        assert measure is not None
        groups = view.groups(measure, epsilon)
        if groups:
            families = against_baselines(view.baselines(measure, epsilon), groups, measure.better)
            lines = tuple(comparison_text(c, measure) + "." for c in families)
            out.append(Answer(epsilon, _headline(groups, measure), lines))
    return out


def _headline(groups: dict[str, list[float]], measure: Measure) -> str:
    best = best_of(groups, measure.better)
    summaries = {name: summarise(values) for name, values in groups.items()}
    digits = column_decimals(list(summaries.values()))
    text = f"the best mean {measure.name} is that of {best}, {mean_text(summaries[best], digits)}{measure.unit}"
    if len(groups) == 1:
        return f"{text}; there is nothing to compare it with."
    compared = against_best(groups, measure.better)
    open_ = [c.first for c in compared if c.verdict != "worse"]
    untested = [c for c in compared if c.verdict == "not tested"]
    if len(untested) == len(compared):
        return f"{text}; {untested[0].reason}."
    if not open_:
        return f"{text}; with {_seeds(groups)} all others are shown to be worse."
    seeds = _seeds(groups)
    if len(open_) == len(compared):
        return f"{text}; with {seeds} no other variant is shown to differ from it."
    return f"{text}; with {seeds} no difference from it is shown for {_and(open_)}."


def _seeds(groups: dict[str, list[float]]) -> str:
    counts = [len(values) for values in groups.values()]
    return seeds_in_words(min(counts), max(counts)).replace(" and ", " to ")


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
