"""The step-level audit: tell two runs of one DP-SGD step apart, with and without a worst-case record.

An attacker who knows everything but whether the canary took part sees what a step releases and compares its projection
on the canary's direction with a threshold that was fixed before.  If one record makes a difference of at most C and the
noise is N(0, (zC)²) in each coordinate, the step is μ-GDP with μ = 1/z (Dong, Roth & Su, "Gaussian differential
privacy", 2022), and then at *every* threshold

    P(false alarm) + P(miss) >= 2 Φ(-μ/2).

In n trials with the canary and n without, the number of errors E is a sum of 2n independent Bernoulli variables whose
mean is at least 2nΦ(-μ/2).  By Hoeffding ("On the distribution of the number of successes in independent trials",
1956, theorem 4) its lower tail is at most that of the binomial with equal probabilities, so P(Bin(2n, Φ(-μ/2)) <= E)
is an exact p-value against μ, and a Clopper-Pearson bound on E/2n is a lower bound on μ.  It is tighter than two
bounds, one for each kind of error.

At a large z one record hardly shows.  Then the canary is a *group* of G = ⌈z⌉ equal records: a μ-GDP mechanism is
Gμ-GDP for groups of G (their theorem 2.14), so a bound on the group's μ, over G, is one on μ.  At a very small z (below
0.15) errors are too rare to be counted and the game has little power; ``invariants`` measures the noise itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from dp_accounting import get_epsilon_gaussian
from numpy.typing import NDArray
from scipy.stats import binom, norm
from torch import Tensor, nn

from dpsyngen.audit.report import Bound, Finding, by_p_value
from dpsyngen.errors import require
from dpsyngen.evaluation.cas import clopper_pearson
from dpsyngen.privacy.clipping import ClippedGradient

_BACKGROUND = 6  # coordinates that the other records use
_HUGE = 1e4  # a canary's gradient before clipping, in units of C


class Probe(nn.Module):
    """Two linear layers whose per-example gradients are the example itself: gradients are chosen by choosing inputs."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, 1, bias=False), nn.Linear(width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = (self.first(x) + self.second(x)).squeeze(1)
        return out


@dataclass
class StepGame:
    """The scores of the game, and the bound on μ of one step that they give at the confidence.

    Attributes:
        with_canary, without_canary: the scores of the trials, as many of either, in units of C.
        slots: games that shared a call of the mechanism, each in coordinates of its own.
        group: G, records that the canary consists of.
        noise_multiplier: z as claimed.
    """

    with_canary: NDArray[np.float64]
    without_canary: NDArray[np.float64]
    slots: int
    group: int
    noise_multiplier: float
    confidence: float

    def __post_init__(self) -> None:
        # The threshold is fixed before any score is seen: half way between the means 0 and G·C of the two hypotheses.
        threshold = self.group / 2
        self.trials, self.mu_claimed = len(self.with_canary), 1 / self.noise_multiplier
        self.false_alarms = int((self.without_canary > threshold).sum())
        self.misses = int((self.with_canary <= threshold).sum())
        errors = self.false_alarms + self.misses
        # Clopper-Pearson bound on the mean error rate, one-sided, so twice the error; -2 Φ⁻¹(rate) turns it into μ,
        # of a group of G, and the smaller rate into the larger μ.
        rates = clopper_pearson(errors, 2 * self.trials, 1 - 2 * (1 - self.confidence))
        self.mu_lower, upper = (max(-2 * float(norm.ppf(rate)), 0.0) / self.group for rate in reversed(rates))
        # For information: the noise over the claimed noise, if it is Gaussian.
        self.noise_ratio = [self.mu_claimed / mu if mu > 0 else math.inf for mu in (upper, self.mu_lower)]
        self.p_value = float(binom.cdf(errors, 2 * self.trials, norm.cdf(-self.group * self.mu_claimed / 2)))

    def bound(self, delta: float) -> Bound:
        """On one step without subsampling."""
        # μ-GDP is what a Gaussian mechanism of noise multiplier 1/μ has.
        of_both = (self.mu_lower, self.mu_claimed)
        lower, claimed = (get_epsilon_gaussian(1 / mu, delta) if mu > 0 else 0.0 for mu in of_both)
        return Bound("one step, worst-case record", lower, claimed, delta)

    def to_dict(self, delta: float) -> dict[str, Any]:
        """For JSON: no infinities, no scores; ε at `delta`."""
        bound = self.bound(delta)
        each = (1 + self.confidence) / 2  # of the two intervals, which then hold together at the confidence
        return {
            "trials": self.trials,
            "group": self.group,
            "slots": self.slots,
            "false_alarm_rate": clopper_pearson(self.false_alarms, self.trials, each),
            "miss_rate": clopper_pearson(self.misses, self.trials, each),
            "mu_lower": self.mu_lower,
            "mu_claimed": self.mu_claimed,
            "epsilon_lower": bound.lower,
            "epsilon_claimed": bound.claimed,
            "noise_ratio": [r if math.isfinite(r) else None for r in self.noise_ratio],
            "confidence": self.confidence,
        }

    @property
    def finding(self) -> Finding:
        """To be judged by :func:`dpsyngen.audit.report.decide`."""
        low, high = self.noise_ratio
        return by_p_value(
            "a step hides a worst-case record",
            f"{self.false_alarms} false alarms and {self.misses} misses in 2 x {self.trials}; μ >= {self.mu_lower:.4g}",
            f"at least binomial: μ <= {self.mu_claimed:.4g}",
            self.p_value,
            f"noise is {low:.3f} to {high:.3f} of what is claimed",
        )


def play_step_game(
    summed: Callable[[nn.Module, Callable[[slice], Tensor], int], ClippedGradient],
    released: Callable[[ClippedGradient, int], list[Tensor]],
    *,
    clipping_norm: float,
    noise_multiplier: float,
    expected_examples: float,
    copies: int = 1,
    trials: int = 10_000,
    slots: int = 1,
    confidence: float = 0.999,
) -> StepGame:
    """Play the game with a given implementation of a step.

    Args:
        summed: (module, loss, examples) -> the clipped sum, as ``PerExampleGradients(module, …).sum``.
        released: (sum, step) -> the noisy mean; called with another step number each time.
        clipping_norm, noise_multiplier, expected_examples: C, z and the constant divisor, as claimed; > 0.
        trials: with the canary, and as many without, at least.
        slots: games in one call.  1 makes no assumption on the noise of different coordinates; more is faster where a
            call is slow, and takes them to be independent, as is claimed.
        confidence: of the bounds in the result, at least 0.95.
    """
    positive = {"noise_multiplier": noise_multiplier, "clipping_norm": clipping_norm, "trials": trials, "slots": slots}
    for name, value in (positive | {"expected_examples": expected_examples}).items():
        require(value > 0, name, value, "positive")
    require(0.95 <= confidence < 1, "confidence", confidence, "in [0.95, 1)")
    z, c = noise_multiplier, clipping_norm
    group = math.ceil(z)

    module = Probe(slots + _BACKGROUND)
    # In even calls the canary takes part in the even slots, in odd calls in the odd ones: as many trials of either.
    presence = (np.arange(slots) + np.arange(2)[:, None]) % 2 == 0  # [2, slots]
    sums = [summed(module, *_records(module, present, group, c, copies)) for present in presence]
    calls = 2 * math.ceil(trials / slots)
    scores = np.empty((calls, slots))
    for call in range(calls):
        first, second = released(sums[call % 2], call)
        scores[call] = (first.flatten() + second.flatten()).double().cpu().numpy()[:slots]
    # The canary's gradient is the same in both layers, so its unit vector is (1, 1)/√2 in its slot.
    scores *= expected_examples / (math.sqrt(2) * c)
    present = presence[np.arange(calls) % 2]
    return StepGame(scores[present], scores[~present], slots, group, z, confidence)


def _records(
    module: Probe, present: NDArray[np.bool_], group: int, c: float, copies: int
) -> tuple[Callable[[slice], Tensor], int]:
    """The loss and the number of examples: some ordinary records, and the canaries that are present."""
    # Gradients of ordinary records: from far below C to far above it, in directions that do not touch the canaries'.
    ordinary = c * torch.logspace(-3, 3, _BACKGROUND)
    rows = torch.diag(torch.cat([torch.full((len(present),), c * _HUGE), ordinary]))
    counts = torch.cat([torch.from_numpy(present) * group, torch.ones(_BACKGROUND, dtype=torch.int64)])
    rows = rows.repeat_interleave(counts, 0)

    def loss(part: slice) -> Tensor:
        out: Tensor = module(rows[part].repeat_interleave(copies, 0))
        return out

    return loss, len(rows)
