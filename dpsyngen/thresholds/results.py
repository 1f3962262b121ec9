"""What the comparison of public denoisers says: the curves, their elbows, and who denoises the proxy how well."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from dpsyngen.thresholds.elbow import METHODS, SIDES, Elbow, Method, Side, find_elbow
from dpsyngen.thresholds.gap import Array, GapCurve, MeanCurve, mean_curve
from dpsyngen.thresholds.private_gap import PrivateCurve

StandIn = Literal["programs", "wiener", "proxy", "private"]
PROXY = "proxy"
"""What the proxy is called among the families."""
WIENER = "wiener"
"""What the Wiener filter of the proxy is called."""

BINS: tuple[tuple[str, float, float], ...] = (
    ("below -3", -np.inf, -3.0),
    ("-3 to -1", -3.0, -1.0),
    ("-1 to 0", -1.0, 0.0),
    ("0 to 2", 0.0, 2.0),
    ("above 2", 2.0, np.inf),
)
"""Pieces of the log σ axis in which losses are averaged: cleaning, cleaning and further, middle, further, coarse."""


@dataclass(frozen=True)
class Loss:
    """How well one family's denoisers do on the proxy in one piece of the axis.

    Attributes:
        family: label; "proxy" for the networks trained on the proxy, "wiener" for the Wiener filter.
        log_sigma: name of the piece, from ``BINS``.
        over_zero, over_wiener, over_proxy: mean over the levels in the piece of the loss over that of the
            zero-information predictor, of the Wiener filter (None: too many pixels) and of the proxy's own networks.
        over_zero_low, over_zero_high: 95 % interval, over images and seeds.
        seeds: number of networks.
    """

    family: str
    log_sigma: str
    over_zero: float
    over_zero_low: float
    over_zero_high: float
    over_wiener: float | None
    over_proxy: float
    seeds: int


@dataclass(frozen=True)
class StandInElbows:
    """The elbows of one student against one stand-in for the private images.

    Attributes:
        by: what stands in for the private images.
        student: label of the family.
        mean: relative gap and excess, averaged over networks.
        elbows: by (side, method).
    """

    by: StandIn
    student: str
    mean: MeanCurve
    elbows: Mapping[tuple[Side, Method], Elbow]

    def band(self, excess: bool = False) -> tuple[Array, Array]:
        """95 % interval of the relative gap, or of the excess, at each level, [M] and [M]."""
        drawn = self.mean.excess_drawn if excess else self.mean.relative_drawn
        if not len(drawn):
            curve = self.mean.excess if excess else self.mean.relative
            return curve, curve
        low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
        return low, high


@dataclass
class Measured:
    """All that was measured without private images.

    Attributes:
        log_sigma: [M].
        pixels: d, of an image.
        programs: curves of programs against programs.
        proxy: curves of programs against the proxy.
        wiener: curves of programs against the proxy's Wiener filter, on the proxy's images.
        floors: curves of networks against others of their own family.
        proxy_losses: of each family's networks on the held-out proxy images, [S, N, M].
        zero_loss, wiener_loss: of the reference predictors on them, [N, M].
        clipping_norm: C that public images suggest for a private estimate.
    """

    log_sigma: Array
    pixels: int
    programs: list[GapCurve] = field(default_factory=list)
    proxy: list[GapCurve] = field(default_factory=list)
    wiener: list[GapCurve] = field(default_factory=list)
    floors: list[GapCurve] = field(default_factory=list)
    proxy_losses: dict[str, Array] = field(default_factory=dict)
    zero_loss: Array | None = None
    wiener_loss: Array | None = None
    clipping_norm: float = 1.0

    def against(self, by: StandIn) -> list[GapCurve]:
        """The curves of one public stand-in."""
        return {"programs": self.programs, "wiener": self.wiener, "proxy": self.proxy}[by]


_PUBLIC: tuple[StandIn, ...] = ("programs", "wiener", "proxy")


def stand_in_elbows(
    measured: Measured, tolerance: float, replicates: int, private: tuple[str, PrivateCurve] | None = None
) -> list[StandInElbows]:
    """The elbows of every student against every stand-in, the most direct stand-in last.

    Args:
        measured: see :class:`StageSearch`.
        tolerance: relative gap that the method "tolerance" allows.
        replicates: of the bootstrap.
        private: label of the student of a private estimate, and the estimate.
    """
    out = []
    for by in _PUBLIC:
        curves = measured.against(by)
        for student in dict.fromkeys(c.student for c in curves):
            mine = [c for c in curves if c.student == student]
            out.append(_elbows(by, student, measured.log_sigma, mean_curve(mine, replicates), tolerance))
    if private is not None:
        student, curve = private
        out.append(_elbows("private", student, curve.log_sigma, curve.mean_curve(replicates), tolerance))
    return out


def _elbows(by: StandIn, student: str, log_sigma: Array, mean: MeanCurve, tolerance: float) -> StandInElbows:
    elbows = {}
    for side, method in itertools.product(SIDES, METHODS):
        by_loss = method == "loss"
        curve = mean.excess if by_loss else mean.relative
        drawn = mean.excess_drawn if by_loss else mean.relative_drawn
        elbows[side, method] = find_elbow(log_sigma, curve, drawn, side, method, tolerance)
    return StandInElbows(by, student, mean, elbows)


def deciding(found: Sequence[StandInElbows], student: str, moments: bool = False) -> StandInElbows:
    """The elbows that decide: of `student`, against the most direct stand-in there is.

    With `moments` a training has the private images' mean and covariance, so programs must hold their own against what
    follows from these in closed form: against the Wiener filter, where there is one.
    """
    mine = [f for f in found if f.student == student]
    return next((f for f in mine if f.by == WIENER), mine[-1]) if moments else mine[-1]


def variant_of(cleaning: float | None, coarse: float | None, moments: bool = False) -> str:
    """The variant of the method in which programs own exactly the stages that were found; with `moments`, those of the
    private images own the coarse one.
    """
    if moments:
        return "residual" if cleaning is None else "residual-cleaning"
    return {
        (True, True): "both",
        (True, False): "cleaning",
        (False, True): "coarse",
        (False, False): "dpdm",
    }[cleaning is not None, coarse is not None]


def proxy_loss_rows(measured: Measured, replicates: int) -> list[Loss]:
    """How well each family's networks denoise the proxy, piece by piece of the axis; [] without a proxy."""
    if measured.zero_loss is None:
        return []
    zero, wiener, own = measured.zero_loss, measured.wiener_loss, measured.proxy_losses[PROXY]
    losses = dict(measured.proxy_losses)
    if wiener is not None:
        losses[WIENER] = wiener[None]
    rng = np.random.default_rng(0)
    weights = rng.multinomial(len(zero), np.full(len(zero), 1 / len(zero)), size=replicates) / len(zero)
    chosen = {name: rng.integers(len(v), size=(replicates, len(v))) for name, v in losses.items()}
    rows = []
    for name, values in losses.items():
        of_seed = values.mean(1)  # [S, M]
        drawn = np.einsum("bn,snm->bsm", weights, values)
        drawn = np.take_along_axis(drawn, chosen[name][:, :, None], 1).mean(1) / (weights @ zero)
        for title, low, high in BINS:
            inside = (measured.log_sigma >= low) & (measured.log_sigma < high)
            if not inside.any():
                continue
            mean = of_seed.mean(0)
            interval = np.percentile(drawn[:, inside].mean(1), [2.5, 97.5]) if replicates else (np.nan, np.nan)
            rows.append(
                Loss(
                    name,
                    title,
                    float((mean / zero.mean(0))[inside].mean()),
                    float(interval[0]),
                    float(interval[1]),
                    None if wiener is None else float((mean / wiener.mean(0))[inside].mean()),
                    float((mean / own.mean((0, 1)))[inside].mean()),
                    len(values),
                )
            )
    return rows
