"""Where the gap curve stops being small: the thresholds τ_cleaning and τ_coarse, with their uncertainty.

Three methods; all look from an end of the axis (clean or noisy) to the curve's peak and no further.

- **tolerance** (the default): the threshold is where the relative gap first exceeds a tolerance t.  Below τ_cleaning,
  or above τ_coarse, the student's answers then differ from the teacher's by at most the share t of the teacher's own
  loss at *every* σ.  It says so if there is no such stage.  This is the statement of the paper's theorems (arXiv
  2412.09842): noise levels beyond which the loss is within a tolerance.
- **loss**: the same of the excess, what the student's loss really is over the teacher's.  The two agree for an optimal
  teacher.  A network that was trained briefly is far from optimal: the student may differ from it and be no worse.
- **kneedle**: the point of the relative gap that lies farthest below the straight line from the end to the peak, both
  axes scaled to [0, 1] (Satopää, Albrecht, Irwin, Raghavan, "Finding a 'Kneedle' in a haystack", ICDCSW 2011).  It is
  what the eye calls an elbow and needs no tolerance, but it also finds an elbow in curves that are never small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dpsyngen.thresholds.gap import Array

Side = Literal["cleaning", "coarse"]
Method = Literal["tolerance", "loss", "kneedle"]
METHODS: tuple[Method, ...] = ("tolerance", "loss", "kneedle")
SIDES: tuple[Side, ...] = ("cleaning", "coarse")
_SMALLEST = 1e-12  # noise may make an estimate of a gap negative


@dataclass(frozen=True)
class Elbow:
    """A threshold.

    Attributes:
        side: "cleaning" (the stage is below it) or "coarse" (above it).
        method: see the module.
        log_sigma: τ; None if there is none.
        low, high: 95 % interval of τ: percentiles of the bootstrap's elbows; None if it has none.
        found: share of the bootstrap's curves that have an elbow at this side.
        value: the curve at τ: the relative gap, or with method "loss" the excess; the tolerance if there is one.
        reason: why there is none; "" if there is one.
    """

    side: Side
    method: Method
    log_sigma: float | None
    low: float | None
    high: float | None
    found: float
    value: float | None
    reason: str


def find_elbow(
    log_sigma: Sequence[float] | Array,
    curve: Array,
    replicates: Array,
    side: Side,
    method: Method = "tolerance",
    tolerance: float = 0.05,
) -> Elbow:
    """The elbow of a curve at one side.

    Args:
        log_sigma: [M], ascending.
        curve: relative gap, or with method "loss" the excess, [M].
        replicates: the curve as it could have come out, [B, M], as :func:`dpsyngen.thresholds.gap.mean_curve` gives it;
            B = 0 is allowed.
        side: which end of the axis.
        method: see the module.
        tolerance: of the methods that have one.
    """
    u = np.asarray(log_sigma, dtype=np.float64)
    value, reason = _locate(u, curve, side, method, tolerance)
    found = [v for v in (_locate(u, c, side, method, tolerance)[0] for c in replicates) if v is not None]
    low, high = (float(v) for v in np.percentile(found, [2.5, 97.5])) if found else (None, None)
    share = len(found) / len(replicates) if len(replicates) else float(value is not None)
    at = None if value is None else float(np.interp(value, u, curve)) if method == "kneedle" else tolerance
    return Elbow(side, method, value, low, high, share, at, reason)


def _locate(u: Array, curve: Array, side: Side, method: Method, tolerance: float) -> tuple[float | None, str]:
    """τ, or None and why there is none."""
    if side == "coarse":
        value, reason = _locate(-u[::-1], curve[::-1], "cleaning", method, tolerance)
        return None if value is None else -value, reason
    # From here on the end that is looked from is the first point.
    peak = int(np.argmax(curve))
    return _kneedle(u, curve, peak) if method == "kneedle" else _tolerance(u, curve, peak, method, tolerance)


def _tolerance(u: Array, curve: Array, peak: int, method: Method, tolerance: float) -> tuple[float | None, str]:
    what = "gap" if method == "tolerance" else "excess of the loss"
    if curve[peak] <= tolerance:
        # Networks that were hardly trained are all alike.
        return None, f"the {what} is within {100 * tolerance:g} % everywhere: train longer to tell the stages apart"
    first = int(np.argmax(curve > tolerance))
    if first == 0:
        return None, f"the {what} is {100 * curve[0]:.3g} % at this end already, above {100 * tolerance:g} %"
    below, above, limit = float(curve[first - 1]), float(curve[first]), tolerance
    if method == "tolerance":
        # Gaps grow by powers of σ, so the curve is nearly straight in log g against log σ.  An excess may be negative.
        below, above, limit = (float(np.log(max(v, _SMALLEST))) for v in (below, above, limit))
    return float(u[first - 1] + (limit - below) / (above - below) * (u[first] - u[first - 1])), ""


def _kneedle(u: Array, curve: Array, peak: int) -> tuple[float | None, str]:
    if peak < 2:
        return None, "the gap is largest at this end"
    x = (u[: peak + 1] - u[0]) / (u[peak] - u[0])
    lowest = curve[: peak + 1].min()
    y = (curve[: peak + 1] - lowest) / max(float(curve[peak] - lowest), _SMALLEST)
    depth = x - y
    i = int(np.argmax(depth))
    if depth[i] <= 0 or i in (0, peak):
        return None, "the curve bends nowhere at this end"
    # The vertex of the parabola through the deepest point and its neighbours: the grid is coarser than what is sought.
    a, b, _ = np.polyfit(x[i - 1 : i + 2] - x[i], depth[i - 1 : i + 2], 2)
    shift = 0.0 if a >= 0 else float(np.clip(-b / (2 * a), (x[i - 1] - x[i]) / 2, (x[i + 1] - x[i]) / 2))
    return float(u[0] + (x[i] + shift) * (u[peak] - u[0])), ""
