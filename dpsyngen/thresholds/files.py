"""What ``dpsyngen stages`` writes and says: tables, every number with what it came from, and the thresholds as YAML."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from dpsyngen.config import load_config
from dpsyngen.files import strict_text, write_text
from dpsyngen.thresholds.elbow import Elbow, Method
from dpsyngen.thresholds.gap import Array, GapCurve
from dpsyngen.thresholds.private_gap import PrivateCurve
from dpsyngen.thresholds.results import PROXY, WIENER, Loss, Measured, StandInElbows, variant_of
from dpsyngen.thresholds.theory import data_radius, kl_bound, price
from dpsyngen.version import __version__

_IN_WORDS = {
    "programs": "the other programs",
    "wiener": "the proxy's Wiener filter",
    "proxy": "the proxy",
    "private": "the private images (DP)",
}


@dataclass(frozen=True)
class StagesResult:
    """All that a call found.

    Attributes:
        settings: all that decides the figures, JSON-able.
        networks: of each network its family, seed and file.
        measured: the curves.
        found: elbows of every student against every stand-in.
        decided: the one of `found` that the thresholds are of.
        method: the elbow's method that was chosen.
        losses: of the families on the proxy.
        private: the DP estimate and its statement, if there is one.
        moments: whether the training is to have DP moments of the private images, which then own the coarse stage.
    """

    settings: Mapping[str, Any]
    networks: Sequence[Mapping[str, Any]]
    measured: Measured
    found: Sequence[StandInElbows]
    decided: StandInElbows
    method: Method
    losses: Sequence[Loss]
    private: tuple[PrivateCurve, Mapping[str, Any]] | None = None
    moments: bool = False

    @property
    def cleaning(self) -> Elbow:
        return self.decided.elbows["cleaning", self.method]

    @property
    def coarse(self) -> Elbow:
        return self.decided.elbows["coarse", self.method]

    @property
    def variant(self) -> str:
        """Of the method, with the stages that were found."""
        return variant_of(self.cleaning.log_sigma, self.coarse.log_sigma, self.moments)

    def curves(self) -> Iterator[tuple[str, GapCurve]]:
        """Every curve with what its images stand for."""
        yield from (("programs", c) for c in self.measured.programs)
        yield from (("wiener", c) for c in self.measured.wiener)
        yield from (("proxy", c) for c in self.measured.proxy)
        yield from (("floor", c) for c in self.measured.floors)


def write_results(folder: Path, result: StagesResult, given: Mapping[str, Any]) -> list[Path]:
    """Write ``gap.csv``, ``proxy_loss.csv`` (with a proxy), ``stages.yaml`` and ``gap.json``, the last one last.

    Args:
        folder: an existing folder.
        result: what was found.
        given: settings that the user gave, which ``stages.yaml`` keeps.

    Returns:
        the files, in this order.
    """
    from dpsyngen.thresholds.csv import gap_csv, loss_csv

    texts = {"gap.csv": gap_csv(result)}
    if result.losses:
        texts["proxy_loss.csv"] = loss_csv(result.losses)
    texts["stages.yaml"] = stages_yaml(result, given)
    texts["gap.json"] = strict_text(document(result), indent=1) + "\n"
    for name, text in texts.items():
        write_text(folder / name, text)
    return [folder / name for name in texts]


# ---------------------------------------------------------------------------------------------- document


def document(result: StagesResult) -> dict[str, Any]:
    """Everything, for programs; each number with the settings, seeds and versions it came from."""
    import torch

    m = result.measured
    return {
        "dpsyngen": __version__,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "settings": dict(result.settings),
        "networks": list(result.networks),
        "stages": {
            "variant": result.variant,
            "tau_cleaning": result.cleaning.log_sigma,
            "tau_coarse": None if result.moments else result.coarse.log_sigma,
            "method": result.method,
            "decided_by": result.decided.by,
            "student": result.decided.student,
        },
        "elbows": elbow_rows(result),
        "theory": _theory(result),
        "log_sigma": m.log_sigma.tolist(),
        "pixels": m.pixels,
        "curves": [
            {
                "stand_in": stand_in,
                "images": c.images,
                "teacher": c.teacher,
                "student": c.student,
                "relative_gap": c.relative().tolist(),
                "excess": c.excess().tolist(),
                "gap": c.gap.mean(1).tolist(),
                "teacher_loss": c.teacher_loss.mean(1).tolist(),
                "student_loss": c.student_loss.mean(1).tolist(),
            }
            for stand_in, c in result.curves()
        ],
        "means": [
            {
                "stand_in": f.by,
                "student": f.student,
                "relative_gap": f.mean.relative.tolist(),
                "relative_gap_95": [b.tolist() for b in f.band()],
                "excess": f.mean.excess.tolist(),
                "excess_95": [b.tolist() for b in f.band(excess=True)],
            }
            for f in result.found
        ],
        "proxy_loss": [asdict(loss) for loss in result.losses],
        "proxy_loss_by_level": _by_level(m),
        "private": None if result.private is None else result.private[0].to_dict() | dict(result.private[1]),
    }


def _by_level(measured: Measured) -> dict[str, list[float]] | None:
    """Loss of each family's networks, and of the reference predictors, on the proxy at each level."""
    if measured.zero_loss is None:
        return None
    out = {"zero-information": measured.zero_loss.mean(0).tolist()}
    if measured.wiener_loss is not None:
        out[WIENER] = measured.wiener_loss.mean(0).tolist()
    return out | {name: losses.mean((0, 1)).tolist() for name, losses in measured.proxy_losses.items()}


def elbow_rows(result: StagesResult) -> list[dict[str, Any]]:
    """Every elbow, with what stands in for the private images and what the stage would cost in nats."""
    rows = []
    for f in result.found:
        gap = mean_gap(result, f)
        for elbow in f.elbows.values():
            nats = None
            if elbow.log_sigma is not None and gap is not None:
                nats = stage_price(result.measured, gap, elbow)
            rows.append({"stand_in": f.by, "student": f.student, **elbow.to_dict(), "price_nats": nats})
    return rows


def mean_gap(result: StagesResult, found: StandInElbows) -> Array | None:
    """E(D_a - D_b)², mean over the pixels, averaged over the curves that `found` averages, [M]."""
    if found.by == "private":
        return None if result.private is None else np.maximum(result.private[0].gap, 0)
    curves = [c for c in result.measured.against(found.by) if c.student == found.student]
    return np.asarray(np.concatenate([c.gap.mean(1) for c in curves]).mean(0))


def stage_price(measured: Measured, gap: Array, elbow: Elbow) -> float:
    """∫ G/σ² d log σ over the stage, as far as the grid goes; see :func:`dpsyngen.thresholds.theory.price`."""
    u, tau = measured.log_sigma, elbow.log_sigma
    assert tau is not None
    inside = u < tau if elbow.side == "cleaning" else u > tau
    order = np.argsort(np.append(u[inside], tau))
    at_tau = math.exp(np.interp(tau, u, np.log(np.maximum(gap, 1e-30))))
    return price(np.append(u[inside], tau)[order], measured.pixels * np.append(gap[inside], at_tau)[order])


def _theory(result: StagesResult) -> dict[str, Any]:
    """The worst case that the data range allows, beside what was measured."""
    radius = data_radius(result.measured.pixels)
    tau = result.coarse.log_sigma
    return {
        "radius": radius,
        "largest_w2": 2 * radius,
        "kl_bound_at_tau_coarse": None if tau is None else kl_bound(2 * radius, math.exp(tau)),
        "kl_bound_at_80": kl_bound(2 * radius, 80.0),
    }


# ------------------------------------------------------------------------------------------------- YAML


def stages_yaml(result: StagesResult, given: Mapping[str, Any]) -> str:
    """Settings for ``dpsyngen train --config``: the user's own, with the program and the stages that were found."""
    comment = [
        f"# Found by dpsyngen stages {__version__}; how is in gap.json beside this file.",
        f"# {result.decided.student} in place of {_IN_WORDS[result.decided.by]}, method {result.method}:",
        *(f"# {line}" for line in stage_lines(result)),
    ]
    values = dict(given) | {"stages": _stages(result, given)}
    return "\n".join(comment) + "\n" + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _stages(result: StagesResult, given: Mapping[str, Any]) -> dict[str, Any]:
    """The section ``stages``: what the user set, with the variant and the thresholds that were found."""
    before = load_config(dict(given)).stages
    kept = {"variant", "tau_cleaning"} if result.moments else {"variant", "tau_cleaning", "tau_coarse"}
    section: dict[str, Any] = {k: v for k, v in given.get("stages", {}).items() if k not in kept}
    section["variant"] = result.variant
    cleaning = result.cleaning.log_sigma
    coarse = before.tau_coarse if result.moments else result.coarse.log_sigma
    # A threshold that is not in use must still be on its side of the other one, or the file would be refused.
    if cleaning is not None:
        section["tau_cleaning"] = round(cleaning if coarse is None else min(cleaning, coarse - 0.1), 3)
        if coarse is None and cleaning >= before.tau_coarse:
            section["tau_coarse"] = round(cleaning + 1, 3)
    if coarse is not None and not result.moments:
        section["tau_coarse"] = round(coarse, 3)
    low, high = (section.get(k, getattr(before, k)) for k in ("tau_cleaning", "tau_coarse"))
    if low >= high:
        section["tau_cleaning"] = round(high - 1, 3)
    return section


def teacher_line(result: StagesResult) -> str | None:
    """Where the proxy's networks are no measure of what can be known of its images; None if nothing shows that."""
    wiener, own = result.measured.wiener_loss, result.measured.proxy_losses.get(PROXY)
    if wiener is None or own is None:
        return None
    behind = own.mean((0, 1)) > wiener.mean(0)
    if not behind.any():
        return None
    return (
        f"note: at {behind.sum()} of {len(behind)} noise levels the networks trained on the proxy are worse than its "
        "Wiener filter, so the gap to them is not the gap to the optimum; train longer (--steps), and see the rows "
        "in place of the Wiener filter"
    )


def stage_lines(result: StagesResult) -> list[str]:
    """The two stages in words."""
    out = [_line(result.cleaning, "<")]
    if not result.moments:
        return [*out, _line(result.coarse, ">")]
    if result.decided.by != WIENER:
        out.append(
            "note: the training has DP moments of the private images, and nothing here says where programs are better "
            "than what follows from those; with --proxy their Wiener filter is the one to compare with"
        )
    return [*out, f"coarse: owned by DP moments of the private images (variant {result.variant})"]


def _line(elbow: Elbow, relation: str) -> str:
    if elbow.log_sigma is None:
        return f"no {elbow.side} stage for programs: {elbow.reason}"
    interval = "" if elbow.low is None else f" [95 %: {elbow.low:.2f} to {elbow.high:.2f}]"
    line = f"{elbow.side}: programs own log σ {relation} {elbow.log_sigma:.2f}{interval}"
    if elbow.found < 0.95:
        line += f", but only {100 * elbow.found:.0f} % of the bootstrap's curves have such a stage"
    return line
