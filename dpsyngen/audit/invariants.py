"""What must be true of every DP-SGD run, tested on a transcript of one: noise, divisor, repeats, sampling, ledger."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpsyngen.audit.findings import Finding, by_p_value, exact
from dpsyngen.audit.inclusions import check_batches
from dpsyngen.training.transcript import StepTrace, Transcript

_SAME = 1e-3
"""Rounding that a repeated step is allowed: of its noise in any coordinate, over z·C, and of its sum, over its norm."""


@dataclass(frozen=True)
class Claim:
    """What the ledger says was done.

    Attributes:
        sampling_rate: q.
        noise_scale: z·C.
        steps: how many were charged.
        crashed: whether the run was interrupted after a step that was not in a checkpoint, so that steps were repeated.
    """

    sampling_rate: float
    noise_scale: float
    steps: int
    crashed: bool = False


def check_transcript(transcript: Transcript, claim: Claim) -> list[Finding]:
    """Compare what a run did with what it charged.

    Args:
        transcript: of the whole run, all sessions.
        claim: from the ledger.

    Returns:
        exact findings, and tests that wait for :func:`dpsyngen.audit.findings.decide`.
    """
    steps = transcript.distinct
    if not steps:
        return [exact("steps were taken", False, "none", f"{claim.steps} steps")]
    return [
        _as_many_as_charged(steps, claim),
        _charged_before(transcript.traces),
        _charged_noise(transcript, claim),
        *_scale(steps),
        _centred(steps),
        *_fresh(steps),
        *_repeats(transcript, claim),
        *check_batches([t.chosen for t in steps], transcript.records, claim.sampling_rate),
    ]


def _as_many_as_charged(steps: list[StepTrace], claim: Claim) -> Finding:
    numbers = [t.step for t in steps]
    return exact(
        "steps taken are the steps charged",
        numbers == list(range(claim.steps)),
        f"{len(numbers)} different steps, numbered {numbers[0]} to {numbers[-1]}",
        f"steps 0 to {claim.steps - 1}",
    )


def _charged_before(traces: list[StepTrace]) -> Finding:
    late = [t.step for t in traces if t.charged <= t.step]
    return exact(
        "each step is in the ledger before it is taken",
        not late,
        f"{len(late)} of {len(traces)} were not",
        "none",
        f"steps {late[:5]}" if late else "",
    )


def _charged_noise(transcript: Transcript, claim: Claim) -> Finding:
    """The transcript measures noise in units of what the training means to add; is that what was charged?"""
    return exact(
        "the ledger charges the noise that is added",
        math.isclose(transcript.noise_scale, claim.noise_scale, rel_tol=1e-9),
        f"standard deviation {transcript.noise_scale:.6g} meant",
        f"{claim.noise_scale:.6g} charged",
    )


def _chi_square(squares: float | NDArray[np.float64], freedom: int | NDArray[np.int64]) -> NDArray[np.float64]:
    """Two-sided p-values of sums of squares of standard normal variables."""
    from scipy.stats import chi2

    return np.minimum(1.0, 2 * np.minimum(chi2.cdf(squares, freedom), chi2.sf(squares, freedom)))


def _smallest(p_values: NDArray[np.float64]) -> tuple[int, float]:
    """Where the smallest of several p-values is, and its Bonferroni p-value."""
    i = int(np.argmin(p_values))
    return i, min(1.0, float(p_values[i]) * len(p_values))


def _scale(steps: list[StepTrace]) -> list[Finding]:
    """The noise has standard deviation z·C, in each step, in each tensor, and overall: exact chi-square tests."""
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
    ]


def _centred(steps: list[StepTrace]) -> Finding:
    """What is released is the sum over the constant divisor, plus noise that does not depend on the sum."""
    along = np.array([t.along_sum for t in steps if not math.isnan(t.along_sum)])
    squares = float((along**2).sum())
    p = float(_chi_square(squares, len(along))) if len(along) else 1.0
    return by_p_value(
        "the sum is divided by the constant expected batch",
        f"noise along the sum, squared and added up over {len(along)} steps: {squares:.4g}",
        f"chi-square with {len(along)} degrees of freedom",
        p,
    )


def _fresh(steps: list[StepTrace]) -> list[Finding]:
    """Different steps have independent noise.  The squared correlation of two Gaussian vectors is a beta variable."""
    if len(steps) < 2:
        return []
    from scipy.stats import beta

    noise = np.stack([t.noise for t in steps]).astype(np.float64)
    d = noise.shape[1]
    norms = np.linalg.norm(noise, axis=1)
    # A step without noise is for the tests of scale to find.
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
    attempts: dict[int, list[StepTrace]] = {}
    for t in transcript.traces:
        attempts.setdefault(t.step, []).append(t)
    again = {step: of_step for step, of_step in attempts.items() if len(of_step) > 1}
    if not claim.crashed and not again:
        return []
    different = [step for step, of_step in again.items() if not all(_same(of_step[0], t) for t in of_step[1:])]
    identical = sum(len({t.digest for t in of_step}) == 1 for of_step in again.values())
    return [
        exact(
            "a step that is repeated after a crash is the same step",
            bool(again) and not different,
            f"{len(again)} steps were repeated, {len(different)} of them with other records or other noise; "
            f"{identical} to the last bit",
            "all of them the same, at least one repeated",
            f"steps {different[:5]}" if different else "",
        )
    ]


def _same(a: StepTrace, b: StepTrace) -> bool:
    return (
        np.array_equal(a.chosen, b.chosen)
        and a.noise.shape == b.noise.shape
        and float(np.abs(a.noise - b.noise).max(initial=0.0)) <= _SAME
        and abs(a.sum_norm - b.sum_norm) <= _SAME * max(a.sum_norm, 1e-12)
    )
