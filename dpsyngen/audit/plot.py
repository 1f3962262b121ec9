"""The picture of an audit: lower bounds beside what is claimed, and how well the attacks told records apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpsyngen.audit.report import AuditReport
from dpsyngen.files import write_text

_COLOURS = {"public": "#2a9d8f", "private": "#d1495b"}


def write_audit_plot(report: AuditReport, path: Path) -> None:
    """Draw the attacks of an audit as SVG; the file is private.

    Args:
        report: with at least one attack.
        path: where to write.
    """
    import io

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    attacks = _scores(report)
    figure, axes = plt.subplots(1, 1 + len(attacks), figsize=(4.2 * (1 + len(attacks)), 3.4))
    panels = np.atleast_1d(axes)
    _bounds(panels[0], report)
    for panel, (name, with_it, without) in zip(panels[1:], attacks, strict=True):
        _curve(panel, name, with_it, without)
    for panel in panels:
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
        panel.tick_params(labelsize=8)
    figure.tight_layout()
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    write_text(path, buffer.getvalue(), 0o600)


def _scores(report: AuditReport) -> list[tuple[str, NDArray[np.float64], NDArray[np.float64]]]:
    """(name, scores with, scores without) of each attack."""
    out = []
    if report.step_game is not None:
        out.append(("one step", report.step_game.with_canary, report.step_game.without_canary))
    out += [(name, o.scores[o.inside], o.scores[~o.inside]) for name, o in report.one_runs.items()]
    return out


def _bounds(panel: Any, report: AuditReport) -> None:
    bounds = report.bounds()
    places = np.arange(len(bounds))[::-1]
    for place, (_, lower, claimed, _) in zip(places, bounds, strict=True):
        panel.barh(place, lower, height=0.5, color=_COLOURS["public" if lower <= claimed else "private"])
        panel.plot([claimed, claimed], [place - 0.4, place + 0.4], color="#333", lw=2)
        panel.text(max(lower, claimed), place, f"  {lower:.2f}", va="center", fontsize=8)
    panel.set_yticks(places, [what.replace(", ", ",\n") for what, *_ in bounds], fontsize=8)
    panel.set_xlim(0, 1.25 * max(claimed for _, _, claimed, _ in bounds))
    panel.set_xlabel(f"ε: lower bound at confidence {report.confidence:g} (bar), claimed (line)", fontsize=8)


def _curve(panel: Any, name: str, with_it: NDArray[np.float64], without: NDArray[np.float64]) -> None:
    """Receiver operating characteristic, on logarithmic axes where attacks matter."""
    thresholds = np.sort(np.concatenate([with_it, without]))
    caught = 1 - np.searchsorted(np.sort(with_it), thresholds, side="right") / len(with_it)
    alarms = 1 - np.searchsorted(np.sort(without), thresholds, side="right") / len(without)
    panel.plot(alarms, caught, color=_COLOURS["private"], lw=1.5)
    low = 1 / len(without)
    diagonal = np.geomspace(low, 1, 50)
    panel.plot(diagonal, diagonal, color="#999", lw=1, ls="--")
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xlim(low, 1)
    panel.set_ylim(low, 1.05)
    panel.set_title(name, fontsize=9)
    panel.set_xlabel("false alarms", fontsize=8)
    panel.set_ylabel("records recognised", fontsize=8)
