"""The one-run audit: how much a single training run with many canaries betrays (Steinke, Nasr & Jagielski 2023).

"Privacy auditing with one (1) training run", arXiv 2305.08846.  Each of m canaries is in the data or not by a fair coin
of its own; from the result the auditor guesses r of the coins and abstains on the others.  If the training is
(ε, δ)-DP, then (their theorem 5.2), with B ~ Binomial(r, e^ε/(1 + e^ε)),

    P(correct guesses >= v) <= P(B >= v) + 2mδ · max over i = 1..v of P(v > B >= v - i) / i,

whatever the canaries and the guesses have to do with each other.  So too many correct guesses refute an ε, and all
refuted ε together are a lower bound.  r must be fixed before the guesses are judged: ``plan_guesses`` chooses it by
simulating the mechanism that is claimed, with random numbers of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import binom

from dpsyngen.audit.report import Finding, by_p_value
from dpsyngen.errors import require
from dpsyngen.training.private import StepRecord


def one_run_p_value(correct: int, guesses: int, canaries: int, epsilon: float, delta: float) -> float:
    """Chance of v or more correct guesses of r about m canaries, at most, if the training is (ε, δ)-DP."""
    require(0 <= guesses <= canaries, "guesses", guesses, f"at most the {canaries} canaries")
    require(0 <= correct <= guesses, "correct", correct, f"at most the {guesses} guesses")
    require(epsilon >= 0, "epsilon", epsilon, ">= 0")
    require(0 <= delta < 1, "delta", delta, "in [0, 1)")
    if correct == 0:
        return 1.0
    p = 1 / (1 + math.exp(-epsilon))  # of guessing a coin right, at best, with δ = 0
    slope = 0.0
    if delta > 0:
        below = np.cumsum(binom.pmf(np.arange(correct - 1, -1, -1), guesses, p))  # P(v > B >= v - i), i = 1..v
        slope = float((below / np.arange(1, correct + 1)).max())
    return min(1.0, float(binom.sf(correct - 1, guesses, p)) + 2 * canaries * delta * slope)


def one_run_epsilon(correct: int, guesses: int, canaries: int, delta: float, confidence: float) -> float:
    """Lower bound on ε at `delta`: with probability `confidence` at least, training is not (less than this, δ)-DP.

    The ε that are refuted are all those below the bound.
    """
    require(0 < confidence < 1, "confidence", confidence, "in (0, 1)")

    def excess(epsilon: float) -> float:
        return 1 - confidence - one_run_p_value(correct, guesses, canaries, epsilon, delta)

    if excess(0.0) <= 0:
        return 0.0
    top = 1.0
    while excess(top) > 0:
        top *= 2
    return float(brentq(excess, 0.0, top, xtol=1e-12))


def guess(scores: NDArray[np.float64], guesses: int) -> NDArray[np.int64]:
    """+1 (in) for the highest of the scores [m], -1 (out) for the lowest, half of `guesses` each, and 0 between."""
    ok = guesses % 2 == 0 and 0 <= guesses <= len(scores)
    require(ok, "guesses", guesses, f"even and at most the {len(scores)} canaries")
    order = np.argsort(scores, kind="stable")
    out = np.zeros(len(scores), dtype=np.int64)
    out[order[: guesses // 2]] = -1
    out[order[len(scores) - guesses // 2 :]] = 1
    return out


def plan_guesses(
    canaries: int,
    delta: float,
    confidence: float,
    sampling_rate: float,
    noise_multiplier: float,
    steps: int,
    simulations: int = 20,
) -> int:
    """How many guesses to make, an even number: the best for the claimed mechanism and worst-case canaries, simulated.

    The score of a canary is then Binomial(steps, q) + z √steps N(0, 1), the first term for those that are in.  Nothing
    of the run is used, so the bound keeps its confidence.
    """
    rng = np.random.default_rng(0)
    options = sorted({max(2, 2 * round(canaries * share / 2)) for share in np.geomspace(0.02, 1.0, 14)})
    options = [r for r in options if r <= canaries]
    bounds = np.zeros((simulations, len(options)))
    for s in range(simulations):
        inside = rng.random(canaries) < 0.5
        scores = np.where(inside, rng.binomial(steps, sampling_rate, canaries), 0)
        scores = scores + noise_multiplier * math.sqrt(steps) * rng.standard_normal(canaries)
        for i, r in enumerate(options):
            correct = int((guess(scores, r) == np.where(inside, 1, -1)).sum())
            bounds[s, i] = one_run_epsilon(correct, r, canaries, delta, confidence)
    return options[int(np.argmax(bounds.mean(0)))]


@dataclass
class OneRun:
    """The scores of the canaries, and the lower bound on ε at δ that they give at the confidence."""

    seen: NDArray[np.float64]  # [m] the score of each canary; private
    inside: NDArray[np.bool_]  # [m] the coins
    guesses: int  # r, fixed beforehand
    delta: float
    epsilon_claimed: float  # what the ledger of the attacked run says
    confidence: float

    def __post_init__(self) -> None:
        self.canaries = len(self.seen)
        self.correct = int((guess(self.seen, self.guesses) == np.where(self.inside, 1, -1)).sum())
        found = self.correct, self.guesses, self.canaries
        self.epsilon_lower = one_run_epsilon(*found, self.delta, self.confidence)
        self.p_value = one_run_p_value(*found, self.epsilon_claimed, self.delta)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: no scores."""
        names = ("canaries", "guesses", "correct", "delta", "epsilon_lower", "epsilon_claimed", "confidence")
        return {name: getattr(self, name) for name in names}

    @property
    def finding(self) -> Finding:
        """To be judged by :func:`dpsyngen.audit.report.decide`."""
        return by_p_value(
            "canaries cannot be told better than ε allows",
            f"{self.correct} of {self.guesses} guesses about {self.canaries} canaries right: "
            f"ε >= {self.epsilon_lower:.4g}",
            f"at most binomial, plus what δ allows: ε <= {self.epsilon_claimed:.4g} at δ = {self.delta:.3g}",
            self.p_value,
        )


def lookup_scores(record: StepRecord, canaries: int) -> NDArray[np.float64]:
    """What a step releases of each canary of the lookup network, [m]: canary i has class i, and so coordinate i.

    White images pull their numbers up, so their gradients are negative.
    """
    return -torch.cat([t.detach().flatten() for t in record.released])[:canaries].double().cpu().numpy()
